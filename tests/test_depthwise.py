"""SiLU of a depthwise convolution: the definition against PyTorch's layers, the kernels against it in float64.

Without a GPU the kernels run at small sizes in Triton's interpreter, in a second process (see test_triton_deform_conv).
"""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from glmamba_monai.ops import depthwise_silu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"

needs_kernels = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="runs in the interpreter's process")


def make_inputs(shape):
    generator = torch.Generator().manual_seed(0)
    channels = shape[-1]
    sizes = (shape, (channels, 1, 3, 3), (channels,), shape)
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]  # x, weight, bias, dout


def relative(found, expected):
    return float((found.double().cpu() - expected).norm() / expected.norm())


def test_the_definition_is_torch_s_convolution_and_silu():
    x, weight, bias, _ = make_inputs((2, 5, 7, 6))
    layer = nn.Conv2d(6, 6, 3, padding=1, groups=6).double()
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    expected = nn.functional.silu(layer(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    torch.testing.assert_close(depthwise_silu(x, weight, bias), expected)


def test_shapes_that_do_not_fit_are_refused():
    x = torch.ones(1, 4, 4, 6)
    with pytest.raises(ValueError, match=r"weight: found shape \[6, 6, 3, 3\], expected \[6, 1, 3, 3\]"):
        depthwise_silu(x, torch.ones(6, 6, 3, 3), torch.ones(6))
    with pytest.raises(ValueError, match=r"bias: found shape \[5\], expected \[6\]"):
        depthwise_silu(x, torch.ones(6, 1, 3, 3), torch.ones(5))


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the tests run in this process")
def test_in_the_interpreter():
    pytest.importorskip("triton", reason="needs the package triton")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-5000:] + run.stderr[-1000:]


# Maps smaller and larger than a program's part in every direction, by one line or column or more.
SHAPES = [(2, 7, 9, 5), (1, 1, 1, 1), (1, 2, 17, 40), (1, 33, 3, 3)]
LARGE = [(4, 120, 120, 192), (3, 61, 60, 96)]


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES + (LARGE if ON_GPU else []))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6)] + ([(torch.bfloat16, 1e-2)] if ON_GPU else []))
def test_kernels(shape, dtype, tolerance):
    from glmamba_monai.ops import triton_depthwise as kernels

    x, weight, bias, dout = make_inputs(shape)
    x, dout = x.to(dtype), dout.to(dtype)
    leaves = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    expected = depthwise_silu(*leaves)
    gradients = torch.autograd.grad(expected, leaves, dout.double())
    # Other strides than those of a contiguous map.
    x = x.transpose(1, 2).contiguous().transpose(1, 2).to(DEVICE)
    weight, bias = weight.float().to(DEVICE), bias.float().to(DEVICE)
    found = kernels.depthwise_silu_forward(x, weight, bias)
    assert found.dtype == dtype and relative(found, expected.detach()) <= tolerance
    found = kernels.depthwise_silu_backward(dout.to(DEVICE), x, weight, bias)
    assert [tensor.dtype for tensor in found] == [dtype, torch.float32, torch.float32]
    for name, tensor, gradient in zip(("x", "weight", "bias"), found, gradients):
        assert tensor.shape == gradient.shape and relative(tensor, gradient) <= tolerance, name


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("autocast", [False, True])
def test_the_operator_equals_the_definition_with_all_gradients(autocast):
    x, weight, bias, dout = (tensor.float().cuda() for tensor in make_inputs((2, 24, 31, 48)))
    results = []
    for backend in ("triton", "torch"):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            given = leaves[0].bfloat16() if autocast else leaves[0]  # as a linear layer before it would give it
            found = depthwise_silu(given, *leaves[1:], backend=backend)
        results.append((found.detach().float(), *torch.autograd.grad(found, leaves, dout.to(found.dtype))))
    for found, expected in zip(*results, strict=True):
        assert relative(found, expected.double().cpu()) <= (1e-2 if autocast else 1e-5)
