import importlib
import types

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from glmamba_monai.ops import (
    backend_report,
    backends,
    deform_conv2d,
    format_backend_report,
    projected_ss2d_scan,
    ss2d_scan,
)
from glmamba_monai.ops.backends import select_backend

OPERATOR = torch.ops.glmamba.ss2d_scan.default
NATIVE_IS_THERE, WHY_NOT = backends._try_load("ss2d_scan", "native")
needs_native = pytest.mark.skipif(not NATIVE_IS_THERE, reason=f"the native kernels are not there: {WHY_NOT}")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
on_cpu = pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_native)])


@pytest.fixture(autouse=True)
def _no_forced_backend(monkeypatch):
    for operation in backends.OPERATIONS.values():
        monkeypatch.delenv(operation.variable, raising=False)


def make_inputs(b=2, h=6, w=4, d=5, n=3, low=-4.0, high=1.0, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    inputs = {
        "u": torch.randn(b, h, w, d, generator=g),
        "delta": low + (high - low) * torch.rand(b, h, w, 4, d, generator=g),
        "A": -n * torch.rand(4, d, n, generator=g) - 0.1,
        "B": torch.randn(b, h, w, 4, n, generator=g),
        "C": torch.randn(b, h, w, 4, n, generator=g),
        "D": torch.randn(4, d, generator=g),
        "delta_bias": 0.1 * torch.randn(4, d, generator=g),
    }
    return {name: x.to(device, dtype) for name, x in inputs.items()}


def step_loop(u, delta, A, B, C, D, delta_bias, local=False):
    """The definition in float64, position after position."""
    u, delta, A, B, C, D, delta_bias = (x.double() for x in (u, delta, A, B, C, D, delta_bias))
    batch, height, width, _ = u.shape
    dt = torch.logaddexp(delta + delta_bias, torch.zeros((), dtype=torch.float64)).flatten(1, 2)  # softplus
    u, B, C = u.flatten(1, 2), B.flatten(1, 2), C.flatten(1, 2)
    grid = torch.arange(height * width).view(height, width)
    halves = [part for rows in grid.chunk(2, 0) for part in rows.chunk(2, 1)]
    y = [torch.zeros(())] * (height * width)
    for region in halves if local else [grid]:
        rows, columns = region.flatten().tolist(), region.t().flatten().tolist()
        for k, order in enumerate((rows, columns, rows[::-1], columns[::-1])):
            state = torch.zeros(())
            for p in order:
                drive = (dt[:, p, k] * u[:, p])[..., None] * B[:, p, k, None]  # (B, D, N)
                state = torch.exp(dt[:, p, k, :, None] * A[k]) * state + drive
                y[p] = y[p] + (state * C[:, p, k, None]).sum(-1) + D[k] * u[:, p]
    return torch.stack(y, 1).view(batch, height, width, -1)


def relative(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def value_and_gradients(function, inputs, **options):
    """Output and gradients by name, for one fixed random cotangent."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    y = function(**leaves, **options)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device, y.dtype)
    return y.detach(), dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), cotangent)))


def assert_close(found, expected, forward=1e-5, gradient=1e-4):
    assert relative(found[0], expected[0]) <= forward
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        assert found[1][name].shape == grad.shape
        assert relative(found[1][name], grad) <= gradient, name


# --- the function ------------------------------------------------------------------------------------------------


@on_cpu
@pytest.mark.parametrize(
    ("shape", "local"),
    [
        ({"b": 1, "h": 1, "w": 1, "d": 1, "n": 1}, False),
        ({"b": 1, "h": 7, "w": 5}, False),
        ({"b": 3, "h": 3, "w": 11, "d": 19, "n": 9}, False),
        ({"b": 1, "h": 9, "w": 17, "d": 24, "n": 16}, False),
        ({"b": 1, "h": 2, "w": 2}, True),
        ({"b": 3, "h": 6, "w": 10, "d": 7, "n": 5}, True),
        ({"b": 1, "h": 12, "w": 22, "d": 3, "n": 2}, True),
        ({"h": 5, "low": -30.0, "high": -10.0}, False),  # steps of 1e-13 to 5e-5
        ({"h": 5, "low": 10.0, "high": 60.0}, False),  # each step forgets all before it
        ({"low": -20.0, "high": 30.0, "n": 4}, True),
    ],
)
def test_equals_the_step_loop_with_all_gradients(shape, local, backend):
    inputs = make_inputs(**shape)
    expected = value_and_gradients(step_loop, inputs, local=local)
    found = value_and_gradients(ss2d_scan, inputs, local=local, backend=backend)
    assert found[0].dtype == torch.float32
    assert_close(found, expected)


def strided(x):
    """The same numbers as every second one of a larger tensor's middle."""
    larger = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), torch.nan, dtype=x.dtype)
    view = larger[..., 2 : 2 + 2 * x.shape[-1] : 2]
    return view.copy_(x)


@on_cpu
@pytest.mark.parametrize("local", [False, True])
def test_any_memory_layout_is_accepted(local, backend):
    inputs = make_inputs()
    expected = value_and_gradients(ss2d_scan, inputs, local=local, backend=backend)
    for change in (
        strided,
        lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],  # part of one projection's output
        lambda x: x.movedim(-2, 0).contiguous().movedim(0, -2),  # directions outermost
    ):
        layout = {name: change(x) for name, x in inputs.items()}
        assert_close(value_and_gradients(ss2d_scan, layout, local=local, backend=backend), expected, 1e-7, 1e-6)


def test_float64_stays_and_its_gradients_are_those_of_finite_differences():
    inputs = make_inputs(b=1, h=2, w=4, d=2, n=2, dtype=torch.float64)
    assert relative(ss2d_scan(**inputs, local=True), step_loop(**inputs, local=True)) <= 1e-14
    leaves = [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *x: ss2d_scan(*x, local=True), leaves)


@on_cpu
def test_equal_calls_give_equal_bits(backend):
    inputs = make_inputs(h=20, w=30, d=40)
    first = ss2d_scan(**inputs, backend=backend)
    assert all(torch.equal(first, ss2d_scan(**inputs, backend=backend)) for _ in range(3))


@on_cpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_computed_in_single_precision(dtype, backend):
    inputs = make_inputs(dtype=dtype)
    weights = ("A", "D", "delta_bias")
    inputs |= {name: make_inputs()[name] for name in weights}
    y, gradients = value_and_gradients(ss2d_scan, inputs, backend=backend)
    expected = value_and_gradients(step_loop, inputs)
    assert y.dtype == torch.float32 and relative(y, expected[0]) <= 1e-5
    for name, x in gradients.items():
        assert x.dtype == (torch.float32 if name in weights else dtype)
        # Only the last rounding is left.
        assert relative(x, expected[1][name]) <= (1e-4 if name in weights else torch.finfo(dtype).eps), name


@on_cpu
def test_autocast_changes_nothing(backend):
    inputs = make_inputs()
    plain = value_and_gradients(ss2d_scan, inputs, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_gradients(ss2d_scan, inputs, backend=backend)
    assert found[0].dtype == torch.float32
    assert_close(found, plain, 1e-7, 1e-6)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("u", (6, 4, 5)),
        ("u", (0, 6, 4, 5)),
        ("u", (2, 0, 4, 5)),
        ("u", (2, 6, 0, 5)),
        ("u", (2, 6, 4, 0)),
        ("delta", (2, 6, 4, 5)),
        ("delta", (2, 6, 4, 3, 5)),
        ("A", (20, 3)),
        ("A", (4, 6, 3)),
        ("A", (4, 5, 0)),
        ("B", (2, 6, 4, 4, 2)),
        ("B", (2, 4, 6, 4, 3)),
        ("C", (1, 6, 4, 4, 3)),
        ("D", (20,)),
        ("delta_bias", (4, 1)),
    ],
)
def test_a_wrong_shape_is_named(name, shape):
    with pytest.raises(ValueError, match=rf"^{name}: found shape \[{', '.join(map(str, shape))}\], expected"):
        ss2d_scan(**make_inputs() | {name: torch.zeros(shape)})


@pytest.mark.parametrize("size", [(5, 4), (4, 5), (1, 1)])
def test_quadrants_need_even_sides(size):
    inputs = make_inputs(h=size[0], w=size[1])
    with pytest.raises(ValueError, match=f"u: found a map of {size[0]} x {size[1]}, expected even sides"):
        ss2d_scan(**inputs, local=True)


def test_gradients_of_gradients_are_refused():
    inputs = {name: x.requires_grad_() for name, x in make_inputs().items()}
    (du,) = torch.autograd.grad(ss2d_scan(**inputs).square().sum(), inputs["u"], create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match="differentiate"):
        du.sum().backward()


# --- torch's machinery -------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("layout", ["plain", "directions outermost", "strided"])
def test_the_operator_passes_torchs_own_checks(local, layout):
    inputs = make_inputs(h=8, w=18, d=17)
    if layout == "directions outermost":
        inputs["delta"] = inputs["delta"].movedim(3, 0).contiguous().movedim(0, 3)
    elif layout == "strided":
        inputs |= {name: strided(inputs[name]) for name in ("delta", "B", "C")}
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    torch.library.opcheck(OPERATOR, (*inputs.values(), local))


class Both(nn.Module):
    """Both operations, as in a network: with layers around them."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 5))
        self.weight = nn.Parameter(torch.linspace(-1, 1, 5 * 5 * 9).view(5, 5, 3, 3))
        self.bias = nn.Parameter(torch.linspace(-1, 1, 5))

    def forward(
        self,
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor,
        delta_bias: torch.Tensor,
    ) -> torch.Tensor:
        y = ss2d_scan(u * self.scale, delta, -torch.exp(A), B, C, D, delta_bias, True).permute(0, 3, 1, 2)
        offset = y.mean(1, keepdim=True).expand(-1, 18, -1, -1)
        return deform_conv2d(y, offset, self.weight, self.bias, mask=torch.sigmoid(offset[:, :9])).relu()


@needs_native
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_equals_eager_with_all_gradients(dynamic):
    torch.compiler.reset()
    module = Both()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for b, h in ((2, 6), (3, 8)) if dynamic else ((2, 6),):
        inputs = make_inputs(b=b, h=h)
        inputs["A"] = inputs["A"].abs().log()
        assert_close(value_and_gradients(compiled, inputs), value_and_gradients(module, inputs), 1e-6, 1e-5)


@needs_native
def test_compiled_under_autocast():
    torch.compiler.reset()
    inputs = make_inputs() | {name: make_inputs()[name].bfloat16() for name in ("u", "delta", "B", "C")}
    compiled = torch.compile(ss2d_scan, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_gradients(compiled, inputs)
    assert {name: x.dtype for name, x in found[1].items()} == {name: x.dtype for name, x in inputs.items()}
    assert_close(found, value_and_gradients(ss2d_scan, inputs), 1e-6, 1e-5)


@pytest.mark.parametrize(("dtype", "result"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_meta_tensors_give_an_empty_result_of_the_right_shape(dtype, result):
    y = ss2d_scan(**make_inputs(device="meta", dtype=dtype))
    assert y.is_meta and y.shape == (2, 6, 4, 5) and y.dtype == result


@needs_native
def test_fake_tensors_follow_shapes_through_both_passes():
    with FakeTensorMode() as mode:
        inputs = {name: mode.from_tensor(x).requires_grad_() for name, x in make_inputs(h=240, w=240).items()}
        y = ss2d_scan(**inputs, local=True)
        gradients = torch.autograd.grad(y.sum(), list(inputs.values()))
    assert isinstance(y, FakeTensor) and y.shape == (2, 240, 240, 5)
    assert [g.shape for g in gradients] == [x.shape for x in inputs.values()]


@pytest.mark.parametrize("local", [False, True])
def test_scripted_equals_eager_with_all_gradients(local):
    inputs = make_inputs()
    scripted = torch.jit.script(ss2d_scan)
    expected = value_and_gradients(ss2d_scan, inputs, local=local)
    for _ in range(2):
        assert_close(value_and_gradients(scripted, inputs, local=local), expected, 1e-6, 1e-5)
    with pytest.raises(Exception, match="backend: found native, expected 'torch'"):
        scripted(**inputs, backend="native")


@needs_native
@pytest.mark.parametrize("projected", [False, True])
def test_the_operator_is_told_whether_a_backward_pass_follows(projected):
    inputs = make_inputs()
    function = ss2d_scan
    if projected:
        function = projected_ss2d_scan
        inputs |= {"dt": inputs.pop("delta")[..., :2], "dt_proj": torch.ones(4, 5, 2)}
    told = []

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator is OPERATOR:
                told.append(len(args) > 8 and args[8])  # a default is left out
            return operator(*args, **(kwargs or {}))

    with Noted():
        function(**inputs)
        inputs["D"].requires_grad_()
        function(**inputs)
        with torch.no_grad():
            function(**inputs)
    assert told == [False, True, False]


@needs_native
def test_a_training_step_keeps_no_tensor_of_states():
    inputs = {name: x.requires_grad_() for name, x in make_inputs(h=16, w=16, d=16, n=16).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        ss2d_scan(**inputs)
    states = inputs["delta"].numel() * 16
    assert sum(saved) - sum(x.numel() for x in inputs.values()) <= states // 64


# --- the choice of a backend -------------------------------------------------------------------------------------


@pytest.fixture
def pretend(monkeypatch):
    """Pretend that there is a certain GPU (None: no GPU), and that some modules can be imported, but no others."""

    def pretend(*names, capability=None):
        def import_module(name):
            if name not in names:
                raise OSError(f"no {name} here")
            module = types.ModuleType(name)
            module.load = lambda: module
            return module

        monkeypatch.setattr(backends, "importlib", types.SimpleNamespace(import_module=import_module))
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(capability is not None))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU X")
        backends._try_load.cache_clear()

    yield pretend
    monkeypatch.undo()
    backends._try_load.cache_clear()


TRITON, MAMBA, NATIVE = "glmamba_monai.ops.triton_ss2d", "selective_scan_cuda", "glmamba_monai.ops.native"


@pytest.mark.parametrize(
    ("modules", "capability", "cpu", "cuda"),
    [
        ((), None, "torch", "torch"),
        ((NATIVE,), None, "native", "torch"),
        ((NATIVE, MAMBA), (7, 5), "native", "mamba_ssm"),
        ((NATIVE, MAMBA, TRITON), (8, 0), "native", "triton"),
        ((TRITON,), (9, 0), "torch", "triton"),
        ((TRITON,), (7, 5), "torch", "torch"),
        ((TRITON, MAMBA), None, "torch", "mamba_ssm"),
    ],
)
def test_automatic_choice_follows_device_and_availability(pretend, modules, capability, cpu, cuda):
    pretend(*modules, capability=capability)
    assert [select_backend("ss2d_scan", is_cuda) for is_cuda in (False, True)] == [cpu, cuda]


def test_automatic_choice_skips_what_cannot_compute_in_float64(pretend):
    pretend(NATIVE, MAMBA, TRITON, capability=(9, 0))
    for is_cuda in (False, True):
        assert select_backend("ss2d_scan", is_cuda, None, torch.float64) == "torch"
    for name, is_cuda in (("native", False), ("triton", True), ("mamba_ssm", True)):
        assert select_backend("ss2d_scan", is_cuda, name, torch.float16) == name
        with pytest.raises(TypeError, match=f"{name!r}, which computes in float32, but the tensors are float64"):
            select_backend("ss2d_scan", is_cuda, name, torch.float64)


def test_argument_beats_environment_beats_automatic(pretend, monkeypatch):
    pretend(MAMBA, NATIVE)
    monkeypatch.setenv("GLMAMBA_SCAN_BACKEND", "torch")
    assert select_backend("ss2d_scan", True) == "torch"
    assert select_backend("ss2d_scan", True, "mamba_ssm") == "mamba_ssm"
    assert select_backend("deform_conv2d", False) == "native"  # has its own variable
    monkeypatch.setenv("GLMAMBA_SCAN_BACKEND", "")
    assert select_backend("ss2d_scan", True) == "mamba_ssm"


def test_unknown_names_list_the_known_ones(monkeypatch):
    known = r"\['triton', 'mamba_ssm', 'native', 'torch'\]"
    with pytest.raises(ValueError, match=rf"backend: found 'cudnn', expected one of {known}"):
        ss2d_scan(**make_inputs(), backend="cudnn")
    monkeypatch.setenv("GLMAMBA_SCAN_BACKEND", "fast")
    with pytest.raises(ValueError, match="GLMAMBA_SCAN_BACKEND: found 'fast'"):
        ss2d_scan(**make_inputs())
    with pytest.raises(ValueError, match="op: found 'scan'"):
        select_backend("scan", False)


@pytest.mark.parametrize(
    ("name", "capability", "reason"),
    [
        ("triton", None, r"no CUDA GPU is visible\).*Linux, a CUDA GPU of compute capability 8\.0"),
        ("triton", (7, 5), r"GPU X has compute capability 7\.5\).*compute capability 8\.0 or newer"),
        ("triton", (9, 0), r"OSError: no glmamba_monai\.ops\.triton_ss2d here\).*pip install triton"),
        ("mamba_ssm", None, r"OSError: no selective_scan_cuda here\).*no-build-isolation mamba-ssm"),
        ("native", None, r"OSError: no glmamba_monai\.ops\.native here\).*C compiler.*pip install --no-deps"),
    ],
)
def test_a_forced_backend_that_is_not_there_says_why_and_how_to_get_it(pretend, name, capability, reason, monkeypatch):
    pretend(capability=capability)
    with pytest.raises(RuntimeError, match=rf"backend '{name}' is not available \(.*{reason}"):
        ss2d_scan(**make_inputs(), backend=name)
    monkeypatch.setenv("GLMAMBA_SCAN_BACKEND", name)
    with pytest.raises(RuntimeError, match="To get it: "):
        ss2d_scan(**make_inputs())


def test_a_build_of_torch_without_cuda_is_the_reason(pretend, monkeypatch):
    pretend(TRITON, capability=(9, 0))
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(RuntimeError, match="this build of torch has no CUDA"):
        select_backend("ss2d_scan", True, "triton")


def test_a_forced_backend_for_another_device_says_so(pretend, monkeypatch):
    pretend(MAMBA, NATIVE)
    monkeypatch.setenv("GLMAMBA_SCAN_BACKEND", "mamba_ssm")
    with pytest.raises(RuntimeError, match="takes cuda tensors, but the tensors are on cpu"):
        ss2d_scan(**make_inputs())
    with pytest.raises(RuntimeError, match="takes cpu tensors, but the tensors are on cuda"):
        select_backend("ss2d_scan", True, "native")


def test_the_environment_variable_reaches_the_operation(monkeypatch):
    module = importlib.import_module("glmamba_monai.ops.ss2d")
    calls = []
    for name, function in module._IMPLEMENTATIONS.items():
        recorded = lambda *a, name=name, function=function: calls.append(name) or function(*a)  # noqa: E731
        monkeypatch.setitem(module._IMPLEMENTATIONS, name, recorded)
    expected = ["torch"]
    monkeypatch.setenv("GLMAMBA_SCAN_BACKEND", "torch")
    ss2d_scan(**make_inputs())
    if NATIVE_IS_THERE:
        monkeypatch.setenv("GLMAMBA_SCAN_BACKEND", "native")
        ss2d_scan(**make_inputs())
        expected.append("native")
    assert calls == expected


def test_the_report_names_what_runs_and_why(pretend, monkeypatch):
    pretend(NATIVE)
    report = backend_report()
    assert report.keys() == backends.OPERATIONS.keys()
    scan = report["ss2d_scan"]
    assert (scan["cpu"], scan["cuda"], scan["available"]) == ("native", "torch", ["native", "torch"])
    text = format_backend_report()
    assert "ss2d_scan: cpu -> native, cuda -> torch (GLMAMBA_SCAN_BACKEND: not set)" in text
    assert "  triton: not available (RuntimeError: no CUDA GPU is visible). To get it: Linux, a CUDA GPU" in text
    assert "  mamba_ssm: not available (OSError: no selective_scan_cuda here). To get it: pip install" in text
    assert "  native: runs on cpu: the first that is available there; does not run on cuda" in text
    assert "  torch: not on cpu: native comes first; runs on cuda: the first that is available there" in text

    monkeypatch.setenv("GLMAMBA_SCAN_BACKEND", "mamba_ssm")
    assert backend_report()["ss2d_scan"]["cuda"].startswith("error: ss2d_scan: backend 'mamba_ssm' is not available")
    pretend(NATIVE, MAMBA)
    scan = backend_report()["ss2d_scan"]
    assert (scan["forced"], scan["cuda"]) == ("mamba_ssm", "mamba_ssm")
    assert scan["cpu"].startswith("error: ")
    assert scan["why"]["mamba_ssm"] == "does not run on cpu; runs on cuda: GLMAMBA_SCAN_BACKEND asks for mamba_ssm"
    assert scan["why"]["native"] == "not on cpu: GLMAMBA_SCAN_BACKEND asks for mamba_ssm; does not run on cuda"


# --- on a GPU ----------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("backend", ["triton", "mamba_ssm", "torch"])
@pytest.mark.parametrize("local", [False, True])
def test_cuda_against_float64(local, backend):
    if backends._try_load("ss2d_scan", backend)[0] is None:
        pytest.skip(backends._try_load("ss2d_scan", backend)[1])
    inputs = make_inputs(b=3, h=38, w=46, d=29, n=11, device="cuda")
    doubled = {name: x.double() for name, x in inputs.items()}
    exact = value_and_gradients(ss2d_scan, doubled, local=local, backend="torch")
    assert_close(value_and_gradients(ss2d_scan, inputs, local=local, backend=backend), exact)


@needs_gpu
def test_compiled_on_cuda_equals_eager_with_all_gradients():
    torch.compiler.reset()
    inputs = make_inputs(h=30, w=40, d=5, n=8, device="cuda")
    inputs["A"] = inputs["A"].abs().log()
    module = Both().cuda()
    for dynamic in (False, True):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        assert_close(value_and_gradients(compiled, inputs), value_and_gradients(module, inputs), 1e-5, 1e-4)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_projected_scan_compiled_on_cuda_equals_eager(dtype):
    torch.compiler.reset()
    shapes = [(2, 4, 6, 5), (2, 4, 6, 4, 3), (4, 5, 3), (4, 5, 2), (2, 4, 6, 4, 2), (2, 4, 6, 4, 2), (4, 5), (4, 5)]
    inputs = [torch.randn(*shape, device="cuda") for shape in shapes]
    inputs[3] = -torch.exp(inputs[3])
    inputs = [x.to(dtype) if i in (0, 1, 4, 5) else x for i, x in enumerate(inputs)]
    found = []
    for scan in (torch.compile(projected_ss2d_scan, fullgraph=True, backend="aot_eager"), projected_ss2d_scan):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = scan(*leaves)
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaves)))
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2  # some gradients are summed atomically, then rounded
    for x, e in zip(*found, strict=True):
        torch.testing.assert_close(x, e, rtol=tolerance, atol=tolerance * float(e.abs().max()))


@pytest.mark.parametrize("backend", [pytest.param("native", marks=needs_native), "torch"])
def test_the_projected_scan_is_the_scan_of_the_projection(backend):
    g = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 6, 5), (2, 4, 6, 4, 3), (4, 5, 3), (4, 5, 2), (2, 4, 6, 4, 2), (2, 4, 6, 4, 2), (4, 5), (4, 5)]
    inputs = [torch.randn(*shape, generator=g) for shape in shapes]
    inputs[3] = -torch.exp(inputs[3])
    results = []
    for projected in (True, False):
        leaves = [x.clone().requires_grad_() for x in inputs]
        u, dt, dt_proj, *others = leaves
        if projected:
            y = projected_ss2d_scan(u, dt, dt_proj, *others, local=True, backend=backend)
        else:
            y = ss2d_scan(u, torch.einsum("bhwkr,kdr->bhwkd", dt, dt_proj), *others, local=True, backend=backend)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@needs_native
def test_the_projected_scan_does_not_keep_the_time_step():
    kept = []
    u, dt, dt_proj = torch.randn(1, 8, 8, 16), torch.randn(1, 8, 8, 4, 2, requires_grad=True), torch.randn(4, 16, 2)
    B = torch.randn(1, 8, 8, 4, 3)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        weights = (-torch.rand(4, 16, 3), B, B, torch.ones(4, 16), torch.zeros(4, 16))
        projected_ss2d_scan(u, dt, dt_proj, *weights, backend="native")
    assert kept and 4 * u.numel() not in kept  # the size of delta


def test_a_projection_of_another_shape_is_refused():
    u, B = torch.zeros(1, 2, 3, 5), torch.zeros(1, 2, 3, 4, 2)
    others = [-torch.ones(4, 5, 2), B, B, torch.zeros(4, 5), torch.zeros(4, 5)]
    with pytest.raises(ValueError, match=r"dt_proj: found shape \[4, 6, 3\], expected \[4, 5, 3\]"):
        projected_ss2d_scan(u, torch.zeros(1, 2, 3, 4, 3), torch.zeros(4, 6, 3), *others)
    with pytest.raises(ValueError, match=r"dt: found shape \[1, 2, 2, 4, 3\], expected \[1, 2, 3, 4, 3\]"):
        projected_ss2d_scan(u, torch.zeros(1, 2, 2, 4, 3), torch.zeros(4, 5, 3), *others)


def test_devices_without_kernels_run_the_torch_form(monkeypatch):
    elsewhere = types.SimpleNamespace(device=torch.device("mps"), is_cuda=False, dtype=torch.float32)
    assert backends.backend_for("ss2d_scan", elsewhere) == "torch"
    with pytest.raises(RuntimeError, match="asked to run on 'native', but on mps only 'torch' runs"):
        backends.backend_for("ss2d_scan", elsewhere, "native")
