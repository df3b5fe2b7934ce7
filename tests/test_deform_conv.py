import sys
import types

import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from glmamba_monai.ops import backends, deform_conv2d, deform_residual

NATIVE_IS_THERE, WHY_NOT = backends._try_load("deform_conv2d", "native")
needs_native = pytest.mark.skipif(not NATIVE_IS_THERE, reason=f"the native kernels are not there: {WHY_NOT}")
on_cpu = pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_native)])


@pytest.fixture(autouse=True)
def _no_forced_backend(monkeypatch):
    monkeypatch.delenv("GLMAMBA_DEFORM_BACKEND", raising=False)


def make_inputs(b=2, c=3, out=4, size=(7, 9), kernel=(3, 3), padding=1, spread=2.0, mask=True, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    pad = (padding, padding) if isinstance(padding, int) else padding
    height, width = (n + 2 * p - k + 1 for n, p, k in zip(size, pad, kernel))
    taps = kernel[0] * kernel[1]
    return {
        "input": torch.randn(b, c, *size, generator=g),
        "offset": spread * torch.randn(b, 2 * taps, height, width, generator=g),
        "weight": torch.randn(out, c, *kernel, generator=g),
        "bias": torch.randn(out, generator=g) if bias else None,
        "mask": torch.rand(b, taps, height, width, generator=g) if mask else None,
    }


def sampling_loop(input, offset, weight, bias=None, mask=None, padding=1):
    """The definition in float64: one output position, one tap and one corner at a time."""
    input, offset, weight, bias, mask = (x if x is None else x.double() for x in (input, offset, weight, bias, mask))
    pad_y, pad_x = (padding, padding) if isinstance(padding, int) else padding
    height, width = input.shape[2:]
    kw = weight.shape[3]
    images = []
    for b in range(input.shape[0]):
        positions = []
        for i in range(offset.shape[2]):
            for j in range(offset.shape[3]):
                total = torch.zeros(weight.shape[0], dtype=torch.float64)
                for k in range(weight.shape[2] * kw):
                    y = i - pad_y + k // kw + offset[b, 2 * k, i, j]
                    x = j - pad_x + k % kw + offset[b, 2 * k + 1, i, j]
                    value = torch.zeros(input.shape[1], dtype=torch.float64)
                    for row in (int(torch.floor(y)), int(torch.floor(y)) + 1):
                        for column in (int(torch.floor(x)), int(torch.floor(x)) + 1):
                            if 0 <= row < height and 0 <= column < width:
                                share = (1 - (y - row).abs()) * (1 - (x - column).abs())
                                value = value + share * input[b, :, row, column]
                    value = value if mask is None else value * mask[b, k, i, j]
                    total = total + weight[:, :, k // kw, k % kw] @ value
                positions.append(total if bias is None else total + bias)
        images.append(torch.stack(positions, 1))
    return torch.stack(images).view(input.shape[0], -1, *offset.shape[2:])


def relative(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def value_and_gradients(function, inputs, **options):
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


@on_cpu
@pytest.mark.parametrize("size", [(30, 41), (1, 5), (40, 240)])
@pytest.mark.parametrize(
    ("kernel", "padding"), [((3, 3), 1), ((1, 1), 0), ((5, 5), 2), ((3, 5), (1, 2)), ((1, 3), (0, 4))]
)
def test_zero_offsets_give_an_ordinary_convolution(size, kernel, padding, backend):
    channels = 1 if kernel == (5, 5) else 3  # float32 itself rounds sums of 75 products by 1e-5
    inputs = make_inputs(c=channels, size=size, kernel=kernel, padding=padding, mask=False, spread=0.0)
    # In float64: the rounding of a float32 convolution depends on the processor.
    expected = F.conv2d(*(inputs[name].double() for name in ("input", "weight", "bias")), padding=padding)
    found = deform_conv2d(**inputs, padding=padding, backend=backend)
    assert found.dtype == torch.float32 and relative(found, expected) <= 1e-5
    assert float((found - expected).abs().max()) <= 1e-5


@on_cpu
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"mask": False, "bias": False},
        {"padding": 0, "size": (5, 8)},
        {"padding": 2, "size": (4, 3), "kernel": (5, 5), "c": 2, "b": 1},
        {"padding": 0, "kernel": (1, 1)},
        {"padding": (0, 2), "kernel": (1, 3), "size": (3, 5)},
        {"spread": 30.0},  # nearly all outside
        {"spread": 6.0, "size": (3, 4)},
    ],
)
def test_equals_explicit_bilinear_sampling_with_all_gradients(case, backend):
    inputs = make_inputs(**case)
    # A few taps moved far beyond every border, beyond the range of a 32-bit integer too.
    inputs["offset"].flatten()[:6] = torch.tensor([1e4, -1e4, 3e9, -3e9, 1e20, -1e20])
    padding = case.get("padding", 1)
    expected = value_and_gradients(sampling_loop, inputs, padding=padding)
    assert_close(value_and_gradients(deform_conv2d, inputs, padding=padding, backend=backend), expected)


def test_several_bands_of_rows_equal_one(monkeypatch):
    inputs = make_inputs(size=(13, 11))
    whole = value_and_gradients(deform_conv2d, inputs, backend="torch")
    module = sys.modules["glmamba_monai.ops.deform_conv"]
    monkeypatch.setattr(module, "CHUNK", 30)  # backward pass: bands of two rows, the last of one
    monkeypatch.setattr(module._deform_forward, "__defaults__", (30,))
    assert_close(value_and_gradients(deform_conv2d, inputs, backend="torch"), whole, 1e-6, 1e-5)


def test_gradcheck_in_double_precision():
    inputs = make_inputs(b=1, c=1, out=2, size=(3, 3))
    # Bilinear sampling has kinks at whole pixels: keep the positions away from them.
    whole = torch.floor(inputs["offset"])
    inputs["offset"] = whole + 0.2 + 0.6 * (inputs["offset"] - whole)
    x, d, w, b, m = (x.double().requires_grad_() for x in inputs.values())
    assert torch.autograd.gradcheck(lambda x, d, w, b, m: deform_conv2d(x, d, w, b, 1, m), (x, d, w, b, m))


@on_cpu
def test_whole_offsets_shift_the_image(backend):
    image = torch.randn(1, 2, 8, 9, generator=torch.Generator().manual_seed(0))
    offset = torch.zeros(1, 2, 8, 9)
    offset[:, 0], offset[:, 1] = 2, -3  # dy, dx
    found = deform_conv2d(image, offset, torch.eye(2).view(2, 2, 1, 1), padding=0, backend=backend)
    expected = torch.zeros_like(image)
    expected[:, :, :6, 3:] = image[:, :, 2:, :6]
    assert torch.equal(found, expected)


@on_cpu
def test_a_mask_of_ones_equals_none(backend):
    inputs = make_inputs(mask=False)
    expected = deform_conv2d(**inputs, backend=backend)
    inputs["mask"] = torch.ones(2, 9, 7, 9)
    assert torch.equal(deform_conv2d(**inputs, backend=backend), expected)


class DeformModule(nn.Module):
    def forward(
        self,
        input: torch.Tensor,
        offset: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return deform_conv2d(input, offset, weight, bias, (1, 1), mask)


@pytest.mark.parametrize("optional", [True, False])
def test_scripted_equals_eager_with_gradients(optional):
    inputs = make_inputs(mask=optional, bias=optional, size=(70, 120))  # two bands of rows
    expected = value_and_gradients(DeformModule(), inputs)
    scripted = torch.jit.script(DeformModule())
    for _ in range(2):
        assert_close(value_and_gradients(scripted, inputs), expected, 1e-6, 1e-5)
    with torch.no_grad():
        assert relative(scripted(**inputs), expected[0]) <= 1e-6


@on_cpu
def test_autocast_changes_nothing_in_eager_mode(backend):
    inputs = make_inputs()
    expected = value_and_gradients(deform_conv2d, inputs, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(value_and_gradients(deform_conv2d, inputs, backend=backend), expected, 1e-7, 1e-6)


def test_autocast_in_a_scripted_module_keeps_the_positions():
    inputs = make_inputs(size=(4, 240), spread=0.3)
    # A ramp: a position rounded to half precision would be off by up to half a pixel at the right border.
    inputs["input"] = torch.arange(240.0).expand(2, 3, 4, 240)
    expected = deform_conv2d(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.jit.script(DeformModule())(**inputs)
    assert found.dtype == torch.float32
    assert relative(found, expected) <= 1e-2


@on_cpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_computed_in_single_precision(dtype, backend):
    inputs = {name: x.to(dtype) for name, x in make_inputs().items()}
    y, gradients = value_and_gradients(deform_conv2d, inputs, backend=backend)
    assert y.dtype == dtype and all(g.dtype == dtype for g in gradients.values())
    assert torch.allclose(y.double(), sampling_loop(**inputs), rtol=torch.finfo(dtype).eps, atol=1e-5)


@on_cpu
def test_a_broken_offset_shows_in_the_output_and_nowhere_else(backend):
    inputs = make_inputs()
    expected = deform_conv2d(**inputs, backend=backend)
    inputs["offset"][0, 0, 2, 3] = float("nan")
    found = deform_conv2d(**inputs, backend=backend)
    assert found[0, :, 2, 3].isnan().all()
    found[0, :, 2, 3] = expected[0, :, 2, 3]
    assert torch.equal(found, expected)


@on_cpu
def test_a_training_step_keeps_only_its_inputs(backend):
    inputs = {name: x.requires_grad_() for name, x in make_inputs(c=16, size=(32, 32)).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        deform_conv2d(**inputs, backend=backend)
    assert sum(saved) <= sum(x.numel() for x in inputs.values())


def test_meta_tensors_give_an_empty_result_of_the_right_shape():
    inputs = {name: x.to("meta") for name, x in make_inputs(padding=0).items()}
    y = deform_conv2d(**inputs, padding=0)
    assert y.is_meta and y.shape == (2, 4, 5, 7)


@on_cpu
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("mask", [True, False])
def test_tensors_of_monai_are_taken_with_all_gradients(device, mask, backend):
    inputs = {name: None if x is None else x.to(device) for name, x in make_inputs(mask=mask).items()}
    of_monai = {name: None if x is None else MetaTensor(x) for name, x in inputs.items()}
    expected = deform_conv2d(**inputs, backend=backend)
    found = deform_conv2d(**of_monai, backend=backend)
    assert found.shape == expected.shape and found.device == expected.device
    if device == "cpu":
        assert torch.equal(found.as_tensor(), expected)
        expected = value_and_gradients(deform_conv2d, inputs, backend=backend)
        assert_close(value_and_gradients(deform_conv2d, of_monai, backend=backend), expected, 0, 0)


@needs_native
@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_operator_passes_torchs_own_checks(mask, bias, layout):
    inputs = make_inputs(mask=mask, bias=bias)
    inputs = {n: x.to(memory_format=layout) if x is not None and x.dim() == 4 else x for n, x in inputs.items()}
    names = ("input", "offset", "weight", "mask", "bias")
    *given, b = [None if inputs[n] is None else inputs[n].requires_grad_() for n in names]
    torch.library.opcheck(torch.ops.glmamba.deform_conv2d.default, (*given, 1, 1, b))


@needs_native
def test_fake_tensors_follow_shapes_through_both_passes():
    with FakeTensorMode() as mode:
        inputs = {name: mode.from_tensor(x).requires_grad_() for name, x in make_inputs(size=(200, 300)).items()}
        y = deform_conv2d(**inputs)
        gradients = torch.autograd.grad(y.sum(), list(inputs.values()))
    assert isinstance(y, FakeTensor) and y.shape == (2, 4, 200, 300)
    assert [g.shape for g in gradients] == [x.shape for x in inputs.values()]


def test_float64_stays_and_is_refused_by_a_forced_kernel():
    inputs = {name: x.double() for name, x in make_inputs().items()}
    assert relative(deform_conv2d(**inputs), sampling_loop(**inputs)) <= 1e-14
    if NATIVE_IS_THERE:
        with pytest.raises(TypeError, match="backend: deform_conv2d was asked to run on 'native', which computes in f"):
            deform_conv2d(**inputs, backend="native")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("input", (3, 7, 9)),
        ("input", (2, 4, 7, 9)),
        ("offset", (2, 9, 7, 9)),
        ("offset", (2, 18, 7, 8)),
        ("weight", (4, 3, 3)),
        ("weight", (4, 2, 3, 3)),
        ("bias", (3,)),
        ("mask", (2, 18, 7, 9)),
        ("mask", (1, 9, 7, 9)),
    ],
)
def test_a_wrong_shape_is_named(name, shape):
    inputs = make_inputs()
    inputs[name] = torch.zeros(shape)
    reported = "weight" if shape == (2, 4, 7, 9) else name  # the weight has 3 input channels
    with pytest.raises(ValueError, match=f"^{reported}: found"):
        deform_conv2d(**inputs)


def test_a_wrong_padding_or_backend_is_named():
    with pytest.raises(ValueError, match="padding: found"):
        deform_conv2d(**make_inputs(), padding=-1)
    with pytest.raises(ValueError, match=r"input: found shape .* after padding"):
        deform_conv2d(**make_inputs() | {"input": torch.zeros(2, 3, 2, 9)}, padding=0)
    with pytest.raises(
        ValueError, match=r"backend: found 'mmcv', expected one of \['triton', 'torchvision', 'native', 'torch'\]"
    ):
        deform_conv2d(**make_inputs(), backend="mmcv")
    with pytest.raises(Exception, match="backend: found torchvision, expected 'torch'"):
        torch.jit.script(deform_conv2d)(**make_inputs(), backend="torchvision")


@pytest.fixture
def fake_torchvision(monkeypatch):
    """Pretend that torchvision.ops imports, with or without its compiled operator."""

    def pretend(compiled):
        calls = []
        module = types.ModuleType("torchvision.ops")
        module.deform_conv2d = lambda *a, **kw: calls.append((a, kw)) or a[0].new_zeros(1)

        def import_module(name):
            if name != "torchvision.ops":
                raise ImportError(f"no {name} here")
            return module

        monkeypatch.setattr(backends, "importlib", types.SimpleNamespace(import_module=import_module))
        operators = types.SimpleNamespace(deform_conv2d=None) if compiled else types.SimpleNamespace()
        monkeypatch.setattr(torch.ops, "torchvision", operators, raising=False)
        backends._try_load.cache_clear()
        return calls

    yield pretend
    monkeypatch.undo()
    backends._try_load.cache_clear()


def test_torchvision_is_for_cuda_unless_forced(fake_torchvision, monkeypatch):
    calls = fake_torchvision(compiled=True)
    assert [backends.select_backend("deform_conv2d", cuda) for cuda in (False, True)] == ["torch", "torchvision"]
    monkeypatch.setenv("GLMAMBA_DEFORM_BACKEND", "torchvision")
    inputs = make_inputs()
    deform_conv2d(**inputs, padding=(1, 1))
    (args, options), *rest = calls
    assert not rest and all(a is inputs[n] for a, n in zip(args, ("input", "offset", "weight", "bias")))
    assert options["padding"] == (1, 1) and options["mask"] is inputs["mask"]


def test_torchvision_without_its_compiled_operator_is_not_available(fake_torchvision):
    fake_torchvision(compiled=False)
    assert backends.select_backend("deform_conv2d", True) == "torch"
    with pytest.raises(RuntimeError, match=r"compiled operator deform_conv2d is missing.*install the torchvision"):
        deform_conv2d(**make_inputs(), backend="torchvision")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("case", [{}, {"padding": (0, 2), "kernel": (1, 3)}, {"mask": False}, {"spread": 1000.0}])
def test_torch_equals_torchvision(case, device):
    module, reason = backends._try_load("deform_conv2d", "torchvision")
    if module is None:
        pytest.skip(f"torchvision's deform_conv2d: {reason}")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    inputs = {name: x if x is None else x.to(device) for name, x in make_inputs(**case).items()}
    options = {"padding": case.get("padding", 1)}
    expected = value_and_gradients(deform_conv2d, inputs, backend="torchvision", **options)
    assert_close(value_and_gradients(deform_conv2d, inputs, backend="torch", **options), expected)


# --- the whole step of a deform block ---


def make_residual_inputs(more=2, b=2, c=3, size=(7, 9), spread=2.0, seed=0):
    """x, predictions with further channels, weight, bias and the predictions' bias."""
    inputs = make_inputs(b=b, c=c, out=c, size=size, spread=spread, seed=seed)
    logits = torch.logit(inputs["mask"].clamp(0.05, 0.95))
    rest = torch.full_like(logits[:, :1], float("nan")).expand(-1, more, -1, -1)  # must not be read
    return {
        "x": inputs["input"],
        "predicted": torch.cat((inputs["offset"], logits, rest), 1),
        "weight": inputs["weight"],
        "bias": inputs["bias"],
        "predicted_bias": torch.randn(27, generator=torch.Generator().manual_seed(4)),
    }


@pytest.mark.parametrize("more", [0, 2])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_whole_step_is_the_convolution_of_offsets_and_sigmoids_and_its_residual(with_bias, more):
    inputs = make_residual_inputs(more)
    z = inputs["predicted"] + F.pad(inputs["predicted_bias"], (0, more)).view(-1, 1, 1) * with_bias
    y = deform_conv2d(inputs["x"], z[:, :18], inputs["weight"], inputs["bias"], mask=torch.sigmoid(z[:, 18:27]))
    if not with_bias:
        inputs["predicted_bias"] = None
    torch.testing.assert_close(deform_residual(**inputs), inputs["x"] + F.silu(y))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("predicted", (2, 26, 7, 9), r"predicted: found shape \[2, 26, 7, 9\], expected \[2, 27, 7, 9\]"),
        ("predicted", (2, 29, 7, 8), r"predicted: found shape \[2, 29, 7, 8\], expected \[2, 29, 7, 9\]"),
        ("predicted", (27,), r"predicted: found shape \[27\], expected \[2, 27, 7, 9\]"),
        ("predicted_bias", (29,), r"predicted_bias: found shape \[29\], expected \[27\]"),
        ("weight", (4, 3, 3, 3), r"weight: found shape \[4, 3, 3, 3\], expected \[3, 3, 3, 3\]"),
        ("bias", (4,), r"bias: found shape \[4\], expected \[3\]"),
    ],
)
def test_a_wrong_shape_of_the_whole_step_is_named(name, shape, message):
    with pytest.raises(ValueError, match=message):
        deform_residual(**make_residual_inputs() | {name: torch.zeros(shape)})
