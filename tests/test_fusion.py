"""The fusion of two maps: the definition against PyTorch's layers, the kernels against the definition in float64.

Without a GPU the kernels run at small sizes in Triton's interpreter, in a second process (see conftest).
"""

import os

import pytest
import torch
from torch import nn

from glmamba_monai.ops import fuse_modalities

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
NAMES = ("low_resolution", "reference", "complement_weight", "complement_bias", "mixture_weight", "mixture_bias")

needs_kernels = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="runs in the interpreter's process")


def make_inputs(batch=2, height=5, width=7, channels=6):
    """All inputs in float64, weights of a size at which no softmax is nearly one-sided."""
    shape = (batch, height, width, channels)
    shapes = (shape, shape, (2, 2 * channels), (2,), (3, 3 * channels), (3,))
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    inputs[2] /= channels**0.5
    inputs[4] /= 3 * channels
    return inputs


def spread(x):
    """The same map, its rows not one after the other."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def relative(found, expected):
    return float((found.double().cpu() - expected).norm() / expected.norm())


def test_the_definition_is_the_paper_s_formulas():
    low_resolution, reference, *parameters = make_inputs()
    convolution, linear = nn.Conv2d(12, 2, 1).double(), nn.Linear(18, 3).double()
    with torch.no_grad():
        for ours, given in zip((*convolution.parameters(), *linear.parameters()), parameters):
            ours.copy_(given.view_as(ours))
    a, b = low_resolution.permute(0, 3, 1, 2), reference.permute(0, 3, 1, 2)
    shares = torch.softmax(convolution(torch.cat((a, b), 1)), 1)
    maps = (a - b, a * b, shares[:, :1] * a + shares[:, 1:] * b)
    pooled = torch.cat([nn.functional.adaptive_max_pool2d(m, 1).flatten(1) for m in maps], 1)
    mixture = torch.softmax(linear(pooled), 1)
    expected = torch.einsum("bk,kbchw->bhwc", mixture, torch.stack(maps))
    torch.testing.assert_close(fuse_modalities(low_resolution, reference, *parameters), expected)


def test_the_low_resolution_map_s_dtype_stays_and_autocast_does_not_round():
    inputs = make_inputs()
    expected = fuse_modalities(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fuse_modalities(*(x.float() for x in inputs))
    assert found.dtype == torch.float32 and relative(found, expected) <= 1e-6
    halves = [x.bfloat16() for x in inputs[:2]]
    assert fuse_modalities(*halves, *(x.float() for x in inputs[2:])).dtype == torch.bfloat16


def test_meta_tensors_give_an_empty_result_of_the_right_shape():
    y = fuse_modalities(*(x.to("meta") for x in make_inputs()))
    assert y.is_meta and y.shape == (2, 5, 7, 6)


@pytest.mark.parametrize("name", NAMES[1:])
def test_shapes_that_differ_are_refused(name):
    inputs = dict(zip(NAMES, make_inputs()))
    inputs[name] = torch.ones(4, 3)
    with pytest.raises(ValueError, match=rf"{name}: found shape \[4, 3\], expected \[\d.*\]"):
        fuse_modalities(**inputs)


# --- The kernels ---


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the tests run in this process")
def test_in_the_interpreter(interpreter_run):
    assert interpreter_run.returncode == 0, interpreter_run.stdout[-5000:] + interpreter_run.stderr[-1000:]
    assert " passed" in interpreter_run.stdout


@pytest.fixture
def kernels(monkeypatch):
    """The kernels' module; in the interpreter with tiles of few pixels and several programs per image."""
    from glmamba_monai.ops import triton_fusion

    if INTERPRETED:
        monkeypatch.setattr(triton_fusion, "TILE", 32)
    return triton_fusion


SMALL = [(2, 5, 7, 6), (1, 3, 4, 19), (3, 1, 1, 8)]
CASES = [(torch.float32, shape, 1e-5, 1e-4) for shape in SMALL]
if ON_GPU:
    CASES += [(torch.float32, (2, 60, 61, 96), 1e-5, 1e-4), (torch.float32, (1, 2, 9, 1000), 1e-5, 1e-4)]
    CASES += [(torch.bfloat16, (2, 60, 61, 96), 1e-2, 1e-2), (torch.float16, (5, 16, 12, 19), 1e-2, 1e-2)]


@needs_kernels
@pytest.mark.parametrize(("dtype", "shape", "forward", "gradient"), CASES)
def test_the_kernels_equal_the_definition(dtype, shape, forward, gradient, kernels):
    inputs = make_inputs(*shape)
    inputs[:2] = [x.to(dtype).double() for x in inputs[:2]]  # rounded beforehand: the maxima are at the same pixels
    leaves = [x.requires_grad_() for x in inputs]
    expected = fuse_modalities(*leaves)
    dout = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = torch.autograd.grad(expected, leaves, dout.double())
    given = [x.detach().to(DEVICE, dtype if i < 2 else torch.float32) for i, x in enumerate(inputs)]
    given[:2] = [spread(x) for x in given[:2]]
    out, *kept = kernels.fuse_modalities_forward(*given)
    assert out.dtype == dtype and relative(out, expected.detach()) <= forward
    found = kernels.fuse_modalities_backward(spread(dout.to(DEVICE)), *given[:5], *kept)
    assert [(x.dtype, x.shape) for x in found] == [(x.dtype, x.shape) for x in given]
    for name, x, e in zip(NAMES, found, gradients, strict=True):
        assert relative(x, e) <= gradient, name


@needs_kernels
def test_the_gradient_of_a_shared_maximum_goes_to_the_first_pixel(kernels):
    """All pixels alike: what differs between their gradients is what the first one, in its tile and image, gets."""
    batch, height, width, channels = 2, 5, 6, 4
    _, _, *parameters = (x.float().to(DEVICE) for x in make_inputs(batch, height, width, channels))
    given = [torch.full((batch, height, width, channels), v, device=DEVICE) for v in (0.5, -2.0)] + parameters
    out, pooled, positions, mixture = kernels.fuse_modalities_forward(*given)
    assert not positions.any()
    dout = torch.ones_like(out)
    dmap = kernels.fuse_modalities_backward(dout, *given[:5], pooled, positions, mixture)[0].flatten(1, 2)
    assert torch.equal(dmap[:, 1:], dmap[:, 1:2].expand_as(dmap[:, 1:])) and not torch.equal(dmap[:, 0], dmap[:, 1])


@pytest.fixture
def operator():
    """The operator, on CPU tensors in the interpreter; given the inputs, the result alone."""
    if INTERPRETED:
        from glmamba_monai.ops import triton_fusion

        library = torch.library.Library("glmamba", "IMPL")
        library.impl("fuse_modalities", triton_fusion.fuse_modalities_forward, "CPU")
        library.impl("fuse_modalities_backward", triton_fusion.fuse_modalities_backward, "CPU")
        yield torch.ops.glmamba.fuse_modalities.default
        library._destroy()
    else:
        yield torch.ops.glmamba.fuse_modalities.default


@needs_kernels
def test_the_operator_equals_the_definition_with_all_gradients(operator, kernels):
    inputs = make_inputs()
    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = fuse_modalities(*leaves)
    gradients = torch.autograd.grad(expected.square().sum(), leaves)
    given = [x.float().to(DEVICE).requires_grad_() for x in inputs]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = operator(*given)[0]
    assert relative(found.detach(), expected.detach()) <= 1e-5
    for name, x, e in zip(NAMES, torch.autograd.grad(found.square().sum(), given), gradients, strict=True):
        assert relative(x, e) <= 1e-4, name


@needs_kernels
def test_the_operator_keeps_no_other_map(operator, kernels):
    batch, channels = 3, 2
    given = [x.float().to(DEVICE).requires_grad_() for x in make_inputs(batch, 10, 12, channels)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        operator(*given)
    small = batch * (3 * channels + 3 * channels + 3)  # maxima, their positions, mixture
    assert sum(kept) <= sum(x.numel() for x in given) + small


@needs_kernels
def test_the_operator_passes_torchs_own_checks(operator, kernels):
    given = [x.float().to(DEVICE).requires_grad_() for x in make_inputs(1, 3, 4, 2)]
    torch.library.opcheck(operator, given)


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_on_a_gpu_the_kernels_run():
    given = [x.float().cuda() for x in make_inputs()]
    with torch.profiler.profile() as profile:
        found = fuse_modalities(*given)
    assert any(event.key == "glmamba::fuse_modalities" for event in profile.key_averages())
    assert relative(found, fuse_modalities(*make_inputs())) <= 1e-5
