"""The fused steps: the definition against PyTorch's layers, the Triton kernels against the definition in float64.

Without a GPU the kernels run at small sizes in Triton's interpreter, in a second process (see conftest).
"""

import os

import pytest
import torch
import torch.nn.functional as F

from glmamba_monai.ops import bias_silu, modulate, norm_gate, pixels_in_place

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"

needs_kernels = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="runs in the interpreter's process")


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(found, expected):
    return float((found.double().cpu() - expected).norm() / expected.norm())


def test_norm_gate_is_layer_norm_times_silu():
    norm = torch.nn.LayerNorm(7).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    y, gate = 3 + 2 * numbers(2, 5, 4, 7), numbers(2, 5, 4, 7, seed=1)
    torch.testing.assert_close(norm_gate(y, norm.weight, norm.bias, gate), norm(y) * F.silu(gate))
    torch.testing.assert_close(norm_gate(y, norm.weight, norm.bias), norm(y))


def test_bias_silu_adds_what_is_left():
    x, bias, residual = numbers(2, 5, 7), numbers(7, seed=1), numbers(2, 5, 7, seed=2)
    torch.testing.assert_close(bias_silu(x, bias), F.silu(x + bias))
    torch.testing.assert_close(bias_silu(x, bias, residual), residual + F.silu(x + bias))


def test_modulate_takes_pixels_in_place_or_by_patches():
    deform, patches = numbers(2, 6, 4, 7), numbers(2, 3, 2, 2, 2, 7, seed=1)
    # torch's pixel shuffle: channels first, the pixels of a patch innermost
    shuffled = F.pixel_shuffle(patches.permute(0, 5, 3, 4, 1, 2).flatten(1, 3), 2).permute(0, 2, 3, 1)
    torch.testing.assert_close(pixels_in_place(patches), shuffled, rtol=0, atol=0)
    torch.testing.assert_close(modulate(deform, patches), torch.sigmoid(deform) * shuffled + deform)
    torch.testing.assert_close(modulate(deform, shuffled), modulate(deform, patches))


def test_the_gate_s_and_the_input_s_dtypes_stay():
    y, gate = numbers(3, 8).float(), numbers(3, 8, seed=1).bfloat16()
    assert norm_gate(y, torch.ones(8), torch.zeros(8), gate).dtype == torch.bfloat16
    assert bias_silu(gate, torch.zeros(8)).dtype == torch.bfloat16


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"gate: found shape \[3, 8\], expected that of y, \[4, 8\]"):
        norm_gate(torch.ones(4, 8), torch.ones(8), torch.ones(8), torch.ones(3, 8))
    with pytest.raises(ValueError, match=r"residual: found shape \[8\], expected that of x, \[3, 8\]"):
        bias_silu(torch.ones(3, 8), torch.ones(8), torch.ones(8))
    with pytest.raises(ValueError, match=r"mamba: found shape \[1, 2, 2, 2, 2, 8\], expected that of deform"):
        modulate(torch.ones(1, 2, 2, 8), torch.ones(1, 2, 2, 2, 2, 8))


# --- The kernels ---


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the tests run in this process")
def test_in_the_interpreter(interpreter_run):
    assert interpreter_run.returncode == 0, interpreter_run.stdout[-5000:] + interpreter_run.stderr[-1000:]
    assert " passed" in interpreter_run.stdout


@needs_kernels
@pytest.mark.parametrize("patches", [True, False])
@pytest.mark.parametrize("shape", [(2, 4, 6, 5), (1, 2, 2, 1)] + ([(3, 50, 42, 96)] if ON_GPU else []))
@pytest.mark.parametrize("dtype", [torch.float32] + ([torch.bfloat16] if ON_GPU else []))
def test_modulate_kernels(shape, patches, dtype, monkeypatch):
    from glmamba_monai.ops import triton_pointwise as kernels

    monkeypatch.setattr(kernels, "TILE", 64 if INTERPRETED else kernels.TILE)
    b, h, w, c = shape
    deform, dout = numbers(*shape).to(dtype), numbers(*shape, seed=2).to(dtype)
    mamba = numbers(*((b, h // 2, w // 2, 2, 2, c) if patches else shape), seed=1).to(dtype)
    leaves = [x.double().requires_grad_() for x in (deform, mamba)]
    expected = modulate(*leaves)
    gradients = torch.autograd.grad(expected, leaves, dout.double())
    deform, mamba, dout = (x.to(DEVICE) for x in (deform, mamba, dout))
    found = (kernels.modulate_forward(deform, mamba), *kernels.modulate_backward(dout, deform, mamba))
    for name, x, e in zip(("y", "deform", "mamba"), found, (expected.detach(), *gradients)):
        assert x.dtype == dtype and relative(x, e) <= (1e-6 if dtype == torch.float32 else 1e-2), name


def shapes():
    return [(3, 5, 19), (1, 7), (2, 3, 128)] + ([(2, 60, 61, 192), (1, 9, 1000)] if ON_GPU else [])


TOLERANCES = [(torch.float32, 1e-5, 1e-4)] + ([(torch.bfloat16, 1e-2, 1e-2)] if ON_GPU else [])


@needs_kernels
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", shapes())
@pytest.mark.parametrize(("dtype", "forward", "gradient"), TOLERANCES)
def test_norm_gate_kernels(shape, dtype, forward, gradient, gated, monkeypatch):
    from glmamba_monai.ops import triton_pointwise as kernels

    monkeypatch.setattr(kernels, "TILE", 64 if INTERPRETED else kernels.TILE)
    channels = shape[-1]
    y, weight, bias, dout = numbers(*shape), numbers(channels, seed=1), numbers(channels, seed=2), numbers(*shape)
    wide = numbers(*shape[:-1], 2 * channels, seed=3).to(dtype)  # the gate as a part of wider rows
    leaves = [x.requires_grad_() for x in (y, weight, bias, wide[..., channels:].double())][: 3 + gated]
    expected = norm_gate(*leaves)
    gradients = torch.autograd.grad(expected, leaves, dout)
    given = [x.detach().float().to(DEVICE) for x in (y, weight, bias)] + [
        wide.to(DEVICE)[..., channels:] if gated else None
    ]
    assert relative(kernels.norm_gate_forward(*given, 1e-5), expected.detach()) <= forward
    found = kernels.norm_gate_backward(dout.to(DEVICE, dtype), *given, 1e-5)
    assert [x.dtype for x in found[: 3 + gated]] == ([torch.float32] * 3 + [dtype])[: 3 + gated]
    for name, x, e in zip(("y", "weight", "bias", "gate"), found, gradients):
        assert relative(x, e) <= gradient, name


@needs_kernels
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("shape", shapes())
@pytest.mark.parametrize(("dtype", "forward", "gradient"), TOLERANCES)
def test_bias_silu_kernels(shape, dtype, forward, gradient, with_residual, monkeypatch):
    from glmamba_monai.ops import triton_pointwise as kernels

    monkeypatch.setattr(kernels, "TILE", 64 if INTERPRETED else kernels.TILE)
    channels = shape[-1]
    wide = numbers(*shape[:-1], 2 * channels, seed=3).to(dtype)
    bias, residual, dout = numbers(channels, seed=1), numbers(*shape, seed=2).to(dtype), numbers(*shape)
    leaves = [x.requires_grad_() for x in (wide[..., :channels].double(), bias)]
    expected = bias_silu(*leaves, residual.double() if with_residual else None)
    gradients = torch.autograd.grad(expected, leaves, dout)
    x, b = wide.to(DEVICE)[..., :channels], bias.detach().float().to(DEVICE)
    found = kernels.bias_silu_forward(x, b, residual.to(DEVICE) if with_residual else None)
    assert found.dtype == dtype and relative(found, expected.detach()) <= forward
    for name, g, e in zip(("x", "bias"), kernels.bias_silu_backward(dout.to(DEVICE, dtype), x, b), gradients):
        assert relative(g, e) <= gradient, name


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_the_operators_equal_the_definition_with_all_gradients():
    shapes = [(4, 9, 24), (24,), (24,), (4, 9, 24), (4, 9, 24)]
    y, w, b, gate, residual = (numbers(*shape, seed=i) for i, shape in enumerate(shapes))
    for call in (
        lambda y, w, b, g, r: norm_gate(y, w, b, g),
        lambda y, w, b, g, r: norm_gate(y, w, b),
        lambda y, w, b, g, r: bias_silu(y, b, r),
        lambda y, w, b, g, r: modulate(y[None], g[None]),
    ):
        results = []
        for device, dtype in (("cuda", torch.float32), ("cpu", torch.float64)):
            leaves = [x.detach().to(device, dtype).requires_grad_() for x in (y, w, b, gate, residual)]
            out = call(*leaves)
            gradients = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
            results.append([out.detach(), *(g for g in gradients if g is not None)])
        for found, expected in zip(*results, strict=True):
            assert relative(found, expected) <= 1e-4
