"""Channel attention with its residual: the definition against PyTorch's layers, the kernels against it in float64.

Without a GPU the kernels run at small sizes in Triton's interpreter, in a second process (see conftest).
"""

import os

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from glmamba_monai.ops import attend_channels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
NAMES = ("x", "y", "bias", "squeeze_weight", "squeeze_bias", "excite_weight", "excite_bias")

needs_kernels = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="runs in the interpreter's process")


def make_inputs(batch=2, height=5, width=7, channels=6, squeezed=3, with_bias=True):
    """All inputs in float64; y has a mean, so that attention has something to look at."""
    shape = (batch, height, width, channels)
    shapes = (shape, shape, (channels,), (squeezed, channels), (squeezed,), (channels, squeezed), (channels,))
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    inputs[1] += inputs[1].mean(dim=(1, 2), keepdim=True) * 5
    if not with_bias:
        inputs[2] = None
    return inputs


def relative(found, expected):
    return float((found.double().cpu() - expected).norm() / expected.norm())


def leaves_of(inputs):
    return [None if x is None else x.clone().requires_grad_() for x in inputs]


def given_of(inputs, dtype=torch.float32):
    """The inputs as the kernels get them: the maps in `dtype`, the parameters in float32."""
    return [
        None if x is None else x.to(DEVICE, dtype if i < 2 else torch.float32).requires_grad_()
        for i, x in enumerate(inputs)
    ]


@pytest.fixture
def kernels(monkeypatch):
    from glmamba_monai.ops import triton_attention

    if INTERPRETED:  # several tiles, several programs and several rows of sums at these sizes
        monkeypatch.setattr(triton_attention, "TILE", 32)
        monkeypatch.setattr(triton_attention, "PROGRAMS_PER_PROCESSOR", 6)
        monkeypatch.setattr(triton_attention, "SUMMED", 2)
    return triton_attention


@pytest.mark.parametrize("with_bias", [True, False])
def test_it_is_the_attention_of_torch_s_layers(with_bias):
    x, y, bias, *parameters = make_inputs(with_bias=with_bias)
    squeeze, excite = nn.Conv2d(6, 3, 1).double(), nn.Conv2d(3, 6, 1).double()
    with torch.no_grad():
        for to, value in zip((squeeze.weight, squeeze.bias, excite.weight, excite.bias), parameters):
            to.copy_(value.view_as(to))
    attention = nn.Sequential(nn.AdaptiveAvgPool2d(1), squeeze, nn.ReLU(), excite, nn.Sigmoid())
    z = (y if bias is None else y + bias).permute(0, 3, 1, 2)
    expected = x + (z * attention(z)).permute(0, 2, 3, 1)
    torch.testing.assert_close(attend_channels(x, y, bias, *parameters), expected)


def test_it_computes_in_float32_and_returns_the_dtype_of_x():
    inputs = [t.float() for t in make_inputs()]
    found = attend_channels(inputs[0].bfloat16(), inputs[1].bfloat16(), *inputs[2:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same = attend_channels(inputs[0].bfloat16(), inputs[1].bfloat16(), *inputs[2:])
    expected = attend_channels(inputs[0].bfloat16().float(), inputs[1].bfloat16().float(), *inputs[2:])
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected.bfloat16()) and torch.equal(found, same)


@pytest.mark.parametrize(
    ("i", "shape", "message"),
    [
        (1, (2, 5, 7, 5), r"y: found shape \[2, 5, 7, 5\], expected \[2, 5, 7, 6\] \(from x and squeeze_weight\)"),
        (2, (5,), r"bias: found shape \[5\], expected \[6\]"),
        (3, (3, 5), r"squeeze_weight: found shape \[3, 5\], expected \[3, 6\]"),
        (4, (2,), r"squeeze_bias: found shape \[2\], expected \[3\]"),
        (5, (6, 2), r"excite_weight: found shape \[6, 2\], expected \[6, 3\]"),
        (6, (3,), r"excite_bias: found shape \[3\], expected \[6\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(i, shape, message):
    inputs = make_inputs()
    inputs[i] = torch.ones(shape)
    with pytest.raises(ValueError, match=message):
        attend_channels(*inputs)


# --- The kernels ---


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the tests run in this process")
def test_in_the_interpreter(interpreter_run):
    assert interpreter_run.returncode == 0, interpreter_run.stdout[-5000:] + interpreter_run.stderr[-1000:]
    assert " passed" in interpreter_run.stdout


SHAPES = [(2, 5, 7, 6, 3), (1, 1, 1, 1, 1), (3, 4, 4, 8, 5)] + ([(4, 120, 119, 96, 3)] if ON_GPU else [])


@needs_kernels
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "forward", "gradient"),
    [(torch.float32, 1e-5, 1e-4)] + ([(torch.bfloat16, 1e-2, 1e-2)] if ON_GPU else []),
)
def test_the_kernels_equal_the_definition(shape, dtype, forward, gradient, with_bias, kernels):
    inputs = make_inputs(*shape, with_bias=with_bias)
    inputs[:2] = [x.to(dtype).double() for x in inputs[:2]]
    leaves = leaves_of(inputs)
    expected = attend_channels(*leaves)
    dout = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(expected, [leaf for leaf in leaves if leaf is not None], dout)
    given = [None if x is None else x.detach() for x in given_of(inputs, dtype)]
    out, *rows = kernels.attend_channels_forward(*given)
    assert out.dtype == dtype and relative(out, expected.detach()) <= forward
    _, y, bias, squeeze, _, excite, _ = given
    dy, parameters = kernels.attend_channels_backward(dout.to(DEVICE, dtype), y, bias, squeeze, excite, *rows)
    assert dy.dtype == dtype and relative(dy, gradients[1]) <= gradient
    found = parameters.split([shape[3], *(g.numel() for g in gradients[-4:])])[0 if with_bias else 1 :]
    for name, x, e in zip(NAMES[2 if with_bias else 3 :], found, gradients[2:], strict=True):
        assert float((x.double().cpu() - e.flatten()).norm()) <= gradient * float(e.norm()) + 1e-9, name


@needs_kernels
def test_the_kernels_give_the_same_bits_again_and_take_maps_that_are_not_contiguous(kernels):
    given = [x.detach() for x in given_of(make_inputs())]
    first = kernels.attend_channels_forward(*given)
    spread = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given[:2]]
    for a, b in zip(first, kernels.attend_channels_forward(*spread, *given[2:]), strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def operator():
    """The operator, on CPU tensors in the interpreter."""
    if INTERPRETED:
        from glmamba_monai.ops import triton_attention

        library = torch.library.Library("glmamba", "IMPL")
        library.impl("attend_channels", triton_attention.attend_channels_forward, "CPU")
        library.impl("attend_channels_backward", triton_attention.attend_channels_backward, "CPU")
        yield torch.ops.glmamba.attend_channels.default
        library._destroy()
    else:
        yield torch.ops.glmamba.attend_channels.default


@needs_kernels
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_operator_equals_the_definition_with_all_gradients(operator, kernels, with_bias):
    inputs = make_inputs(with_bias=with_bias)
    leaves, given = leaves_of(inputs), given_of(inputs)
    expected = attend_channels(*leaves)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = operator(*given)[0]
    assert relative(found.detach(), expected.detach()) <= 1e-5
    names = [name for name, x in zip(NAMES, inputs) if x is not None]
    gradients = (
        torch.autograd.grad(y.square().sum(), [x for x in xs if x is not None])
        for y, xs in ((found, given), (expected, leaves))
    )
    for name, x, e in zip(names, *gradients, strict=True):
        assert x.dtype == torch.float32 and relative(x, e) <= 1e-4, name


@needs_kernels
def test_half_precision_and_parameters_of_another_dtype(operator, kernels):
    inputs = make_inputs()
    inputs[:2] = [x.half().double() for x in inputs[:2]]
    dtypes = [torch.float16, torch.float32, torch.float32, torch.float16, torch.float32, torch.float64, torch.float16]
    inputs = [x.to(dtype).double() for x, dtype in zip(inputs, dtypes)]
    leaves = leaves_of(inputs)
    given = [x.to(DEVICE, dtype).requires_grad_() for x, dtype in zip(inputs, dtypes)]
    expected, found = attend_channels(*leaves), operator(*given)[0]
    assert found.dtype == torch.float16 and relative(found.detach(), expected.detach()) <= 1e-3
    gradients = (torch.autograd.grad(y.sum(), xs) for y, xs in ((found, given), (expected, leaves)))
    for name, dtype, x, e in zip(NAMES, dtypes, *gradients, strict=True):
        assert x.dtype == dtype and relative(x, e) <= 1e-2, name


@needs_kernels
def test_a_nan_spoils_its_image_and_no_other(kernels):
    given = [x.detach() for x in given_of(make_inputs())]
    expected = kernels.attend_channels_forward(*given)[0]
    given[1][0, 2, 3, 1] = float("nan")
    found = kernels.attend_channels_forward(*given)[0]
    assert found[0].isnan().all() and torch.equal(found[1], expected[1])
    assert torch.equal(found.isnan().cpu(), attend_channels(*(x.cpu() for x in given)).isnan())


@needs_kernels
def test_gradients_have_the_same_bits_again_and_pass_a_checkpoint(operator, kernels):
    def gradients(call):
        given = given_of(make_inputs())
        return torch.autograd.grad(call(*given).square().sum(), given)

    def result(*given):
        return operator(*given)[0]

    first = gradients(result)
    for again in (gradients(result), gradients(lambda *given: checkpoint(result, *given, use_reentrant=False))):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@needs_kernels
def test_the_operator_keeps_no_map_but_y(operator, kernels):
    given = given_of(make_inputs(3, 10, 12, 2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        operator(*given)
    rows = 3 * (2 + 3 + 2)  # means, squeezed, attention
    assert sum(kept) <= sum(x.numel() for x in given[1:]) + rows


@needs_kernels
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_operator_passes_torchs_own_checks(operator, kernels, with_bias):
    torch.library.opcheck(operator, given_of(make_inputs(1, 3, 4, 2, with_bias=with_bias)))


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_on_a_gpu_the_kernels_run():
    given = [x.detach() for x in given_of(make_inputs())]
    with torch.profiler.profile() as profile:
        found = attend_channels(*given)
    assert any(event.key == "glmamba::attend_channels" for event in profile.key_averages())
    assert relative(found, attend_channels(*make_inputs())) <= 1e-5
