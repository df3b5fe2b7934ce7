import importlib.util
import sys
import types

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from glmamba_monai.ops import backends, selective_scan
from glmamba_monai.ops.selective_scan import CHUNK

NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias")


def make_inputs(b=2, k=4, d=6, n=8, length=70, D=True, bias=True, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    inputs = {
        "u": torch.randn(b, k * d, length, generator=g),
        "delta": 0.5 * torch.rand(b, k * d, length, generator=g) + 0.01,
        "A": -torch.rand(k * d, n, generator=g) * n,
        "B": torch.randn(b, k, n, length, generator=g),
        "C": torch.randn(b, k, n, length, generator=g),
        "D": torch.randn(k * d, generator=g) if D else None,
        "delta_bias": 0.1 * torch.rand(k * d, generator=g) if bias else None,
    }
    return {name: x if x is None else x.to(device, dtype) for name, x in inputs.items()}


def recurrence(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False):
    """The definition, one step and one tensor product at a time, in float64."""
    u, delta, A, B, C, D, delta_bias = (x if x is None else x.double() for x in (u, delta, A, B, C, D, delta_bias))
    dt = delta if delta_bias is None else delta + delta_bias[:, None]
    dt = torch.log1p(torch.exp(dt)) if delta_softplus else dt
    d = u.shape[1] // B.shape[1]
    B, C = B.repeat_interleave(d, 1), C.repeat_interleave(d, 1)
    h, ys = torch.zeros(*u.shape[:2], A.shape[1], dtype=torch.float64), []
    for dt_t, u_t, B_t, C_t in zip(dt.unbind(2), u.unbind(2), B.unbind(3), C.unbind(3)):
        h = torch.exp(dt_t[..., None] * A) * h + (dt_t * u_t)[..., None] * B_t
        ys.append((C_t * h).sum(-1))
    y = torch.stack(ys, 2)
    return y if D is None else y + D[:, None] * u


def relative(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def value_and_gradients(function, inputs, **options):
    """Output and gradients by name, for one fixed random cotangent."""
    leaves = {name: None if x is None else x.detach().clone().requires_grad_() for name, x in inputs.items()}
    y = function(**leaves, **options)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device, y.dtype)
    given = {name: x for name, x in leaves.items() if x is not None}
    return y.detach(), dict(zip(given, torch.autograd.grad(y, list(given.values()), cotangent)))


def assert_close(found, expected, forward=1e-5, gradient=1e-4):
    assert relative(found[0], expected[0]) <= forward
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        assert found[1][name].shape == grad.shape
        assert relative(found[1][name], grad) <= gradient, name


@pytest.mark.parametrize(
    "shape",
    [
        {"k": 1, "n": 1, "length": 1, "D": False, "bias": False},
        {"k": 1, "n": 16, "length": 7, "b": 1},
        {"k": 4, "n": 8, "length": 7, "D": False},
        {"k": 4, "n": 1, "length": CHUNK},
        {"k": 1, "n": 8, "length": CHUNK + 1, "bias": False},
        {"k": 4, "n": 16, "length": 3 * CHUNK - 5, "b": 3},
        {"k": 4, "n": 8, "length": 4 * CHUNK, "b": 1, "D": False, "bias": False},
    ],
)
@pytest.mark.parametrize("delta_softplus", [False, True])
def test_equals_the_recurrence_with_all_gradients(shape, delta_softplus):
    inputs = make_inputs(**shape)
    found = value_and_gradients(selective_scan, inputs, delta_softplus=delta_softplus)
    assert_close(found, value_and_gradients(recurrence, inputs, delta_softplus=delta_softplus))


def test_gradcheck_in_double_precision_across_a_chunk_border():
    inputs = make_inputs(b=1, k=2, d=1, n=2, length=CHUNK + 2, dtype=torch.float64)
    leaves = [inputs[name].requires_grad_() for name in NAMES]
    assert torch.autograd.gradcheck(lambda *x: selective_scan(*x, delta_softplus=True), leaves)


def test_strided_inputs_and_a_partial_set_of_gradients():
    inputs = make_inputs(length=40)
    expected = value_and_gradients(recurrence, inputs)
    inputs["u"] = inputs["u"].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["B"] = inputs["B"].flip(-1).contiguous().flip(-1)
    inputs["A"].requires_grad_()
    y = selective_scan(**inputs)
    assert relative(y, expected[0]) <= 1e-5
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(cotangent)
    assert relative(inputs["A"].grad, expected[1]["A"]) <= 1e-4


class CountOps(TorchDispatchMode):
    """Counts dispatched operations and the elements they return."""

    def __init__(self):
        super().__init__()
        self.operations = 0
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        if isinstance(out, torch.Tensor) and func.is_view is False:
            self.elements += out.numel()
        return out


@pytest.mark.parametrize("scripted", [False, True])
def test_work_grows_linearly_with_the_length(scripted):
    def work(length):
        inputs = make_inputs(b=1, k=1, d=2, n=2, length=length)
        leaves = [inputs[name].requires_grad_() for name in NAMES]
        scan = ScanModule(True)
        scan = torch.jit.script(scan) if scripted else scan
        for _ in range(3):  # TorchScript settles on its optimised graph
            scan(*leaves).sum().backward()
        with CountOps() as count:
            scan(*leaves).sum().backward()
        return count.operations, count.elements

    (operations, elements), (operations2, elements2) = work(2048), work(4096)
    assert operations2 <= 2.05 * operations
    # An index into a whole tensor per step keeps the count of operations linear, but not that of elements.
    assert elements2 <= 2.05 * elements


def test_a_training_step_keeps_no_tensor_of_states():
    inputs = make_inputs(b=1, k=1, d=4, n=16, length=8 * CHUNK)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        selective_scan(**{name: x.requires_grad_() for name, x in inputs.items()})
    states = inputs["u"].numel() * inputs["A"].shape[1]
    assert sum(saved) - sum(x.numel() for x in inputs.values()) <= states // CHUNK


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_computed_in_single_precision(dtype):
    inputs = {name: x.to(dtype) for name, x in make_inputs(length=200).items()}
    y, gradients = value_and_gradients(selective_scan, inputs, delta_softplus=True)
    assert y.dtype == dtype and all(g.dtype == dtype for g in gradients.values())
    # Computed in single precision, only the last rounding is left: half a unit in the last place.
    expected = recurrence(**inputs, delta_softplus=True)
    assert torch.allclose(y.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("scripted", [False, True])
def test_autocast_changes_nothing(scripted):
    inputs = make_inputs()
    scan = torch.jit.script(ScanModule(True)) if scripted else ScanModule(True)
    plain = value_and_gradients(scan, inputs)

    def under_autocast(**x):
        with torch.autocast("cpu", torch.bfloat16):
            return scan(**x)

    assert_close(value_and_gradients(under_autocast, inputs), plain, 1e-7, 1e-6)


def test_autocast_around_the_backward_pass_changes_nothing():
    inputs = make_inputs()
    plain = value_and_gradients(selective_scan, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(value_and_gradients(selective_scan, inputs), plain, 1e-7, 1e-6)


class ScanModule(nn.Module):
    def __init__(self, delta_softplus: bool):
        super().__init__()
        self.delta_softplus = delta_softplus

    def forward(
        self,
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        delta_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return selective_scan(u, delta, A, B, C, D, delta_bias, self.delta_softplus)


@pytest.mark.parametrize("optional", [True, False])
def test_scripted_equals_eager_with_gradients(optional):
    inputs = make_inputs(length=2 * CHUNK + 3, D=optional, bias=optional)
    scripted = torch.jit.script(ScanModule(True))
    eager = value_and_gradients(ScanModule(True), inputs)
    assert_close(value_and_gradients(scripted, inputs), eager, 1e-6, 1e-5)
    with torch.no_grad():
        assert relative(scripted(**inputs), eager[0]) <= 1e-6


def test_meta_tensors_give_an_empty_result_of_the_right_shape():
    y = selective_scan(**make_inputs(device="meta", dtype=torch.bfloat16))
    assert y.is_meta and y.shape == (2, 24, 70) and y.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("u", (24, 70)),
        ("u", (2, 22, 70)),
        ("delta", (2, 24, 69)),
        ("A", (23, 8)),
        ("B", (2, 4, 8)),
        ("B", (2, 5, 8, 70)),
        ("B", (1, 4, 8, 70)),
        ("C", (2, 4, 7, 70)),
        ("D", (6,)),
        ("delta_bias", (24, 1)),
    ],
)
def test_a_wrong_shape_is_named(name, shape):
    inputs = make_inputs()
    inputs[name] = torch.zeros(shape)
    reported = "B" if shape == (2, 22, 70) else name  # 4 directions of B cannot share 22 channels
    with pytest.raises(ValueError, match=f"^{reported}: found"):
        selective_scan(**inputs)


def test_no_environment_variable_matters(monkeypatch):
    monkeypatch.setenv("GLMAMBA_SCAN_BACKEND", "mamba_ssm")
    selective_scan(**make_inputs())


def test_unknown_names_list_the_known_ones():
    for name in ("cudnn", "native"):
        with pytest.raises(ValueError, match=rf"backend: found {name}, expected one of \['torch', 'mamba_ssm'\]"):
            selective_scan(**make_inputs(), backend=name)
    with pytest.raises(Exception, match="backend: found fast"):
        torch.jit.script(selective_scan)(**make_inputs(), backend="fast")


def test_mamba_ssm_that_cannot_run_says_why(monkeypatch):
    def missing(name):
        raise OSError(f"no {name} here")

    monkeypatch.setattr(backends, "importlib", types.SimpleNamespace(import_module=missing))
    backends._try_load.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"OSError: no selective_scan_cuda here.*no-build-isolation mamba-ssm"):
            selective_scan(**make_inputs(), backend="mamba_ssm")
    finally:
        backends._try_load.cache_clear()
    monkeypatch.setattr(backends, "load_backend", lambda op, name: types.ModuleType(name))
    with pytest.raises(RuntimeError, match="takes cuda tensors, but the tensors are on cpu"):
        selective_scan(**make_inputs(), backend="mamba_ssm")


# --- against mamba-ssm -------------------------------------------------------------------------------------------


def mamba_reference(monkeypatch):
    """mamba-ssm's own `selective_scan_ref`, without its package's __init__ and compiled parts, or a skip."""
    package = importlib.util.find_spec("mamba_ssm")
    if package is None or not package.submodule_search_locations:
        pytest.skip("mamba_ssm is not installed, so its selective_scan_ref cannot be compared")
    folder = package.submodule_search_locations[0]
    stubs = {
        "selective_scan_cuda": {},
        "mamba_ssm": {"__path__": [folder]},
        "mamba_ssm.utils.torch": {"custom_bwd": lambda f: f, "custom_fwd": lambda f: f},
        "mamba_ssm.ops.triton.layer_norm": {"_layer_norm_fwd": None},
    }
    for name, attributes in stubs.items():
        module = types.ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    file = f"{folder}/ops/selective_scan_interface.py"
    spec = importlib.util.spec_from_file_location("mamba_scan_interface", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        pytest.skip(f"mamba_ssm's selective_scan_interface.py does not import: {type(error).__name__}: {error}")
    return module.selective_scan_ref


@pytest.mark.parametrize("delta_softplus", [False, True])
def test_equals_the_reference_of_mamba_ssm(monkeypatch, delta_softplus):
    reference = mamba_reference(monkeypatch)
    inputs = make_inputs(n=16, length=3 * CHUNK - 5)
    expected = value_and_gradients(reference, inputs, delta_softplus=delta_softplus)
    assert_close(value_and_gradients(selective_scan, inputs, delta_softplus=delta_softplus), expected)


class FakeKernels(types.ModuleType):
    """Stands in for the compiled extension: its calling convention, computed by the recurrence."""

    def fwd(self, u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        assert z is None and u.dtype == delta.dtype == B.dtype == C.dtype
        assert all(x is None or (x.dtype == torch.float32 and x.is_contiguous()) for x in (A, D, delta_bias))
        assert all(x.is_contiguous() for x in (u, delta, B, C))
        y = recurrence(u, delta, A, B, C, D, delta_bias, delta_softplus)
        return [y.to(u.dtype), torch.zeros(1)]

    def bwd(self, u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, delta_softplus, recompute_out_z):
        assert z is out is dz is None and not recompute_out_z and dout.is_contiguous() and x.shape == (1,)
        tensors = (u, delta, A, B, C, D, delta_bias)
        leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
        with torch.enable_grad():
            y = recurrence(*leaves, delta_softplus)
        grads = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], dout.double()))
        return [None if t is None else next(grads) for t in leaves]


@pytest.mark.parametrize("optional", [True, False])
def test_the_mamba_ssm_backend_keeps_the_calling_convention(monkeypatch, optional):
    from glmamba_monai.ops.selective_scan import _mamba_ssm_scan

    monkeypatch.setattr(backends, "load_backend", lambda op, name: FakeKernels(name))
    inputs = make_inputs(D=optional, bias=optional)
    expected = value_and_gradients(recurrence, inputs, delta_softplus=True)
    inputs["u"] = inputs["u"].transpose(1, 2).contiguous().transpose(1, 2)
    found = value_and_gradients(lambda *x, **kw: _mamba_ssm_scan(*kw.values()), inputs, delta_softplus=True)
    assert_close(found, expected)
    inputs["u"] = inputs["u"].bfloat16()  # beside float32 sequences: computed in float32
    found = value_and_gradients(lambda *x, **kw: _mamba_ssm_scan(*kw.values()), inputs, delta_softplus=True)
    assert found[0].dtype == torch.float32


needs_mamba = pytest.mark.skipif(
    not torch.cuda.is_available() or backends._try_load("ss2d_scan", "mamba_ssm")[0] is None,
    reason="needs a CUDA device and mamba-ssm's compiled selective_scan_cuda",
)


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("torch", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
        pytest.param("mamba_ssm", marks=needs_mamba),
    ],
)
@pytest.mark.parametrize("optional", [True, False])
def test_cuda_against_float64(optional, backend):
    inputs = make_inputs(d=24, n=16, length=2500, D=optional, bias=optional, device="cuda")
    doubled = {name: None if x is None else x.double() for name, x in inputs.items()}
    exact = value_and_gradients(selective_scan, doubled, delta_softplus=True, backend="torch")
    assert_close(value_and_gradients(selective_scan, inputs, delta_softplus=True, backend=backend), exact, 1e-5, 1e-4)


@needs_mamba
def test_mamba_ssm_equals_torch_on_cuda_in_bfloat16():
    inputs = {n: x.bfloat16() for n, x in make_inputs(d=24, n=16, length=2500, device="cuda").items()}
    found = value_and_gradients(selective_scan, inputs, delta_softplus=True, backend="mamba_ssm")
    assert_close(found, value_and_gradients(selective_scan, inputs, delta_softplus=True, backend="torch"), 1e-2, 2e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_torch_on_cuda_equals_cpu():
    inputs = make_inputs()
    on_cuda = {name: x.cuda() for name, x in inputs.items()}
    y, gradients = value_and_gradients(selective_scan, on_cuda, delta_softplus=True, backend="torch")
    found = y.cpu(), {name: g.cpu() for name, g in gradients.items()}
    assert_close(found, value_and_gradients(selective_scan, inputs, delta_softplus=True, backend="torch"))
