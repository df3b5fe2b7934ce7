"""Modulated deformable convolution (DCNv2), with gradients for every input.

For every output position p, with p_k the kernel's taps (paper equation 5):

    Y(p) = sum over k of w_k X(p + p_k + dp_k) dm_k
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glmamba_monai.ops import backends
from glmamba_monai.ops.pointwise import bias_silu
from glmamba_monai.ops.shapes import check_shape

__all__ = ["deform_conv2d", "deform_residual"]

# Output positions per chunk. With 96 channels and 9 taps the sampled values of one chunk take 28 MB, those of a
# whole 240x240 slice 199 MB. Smaller chunks gain nothing: each adds a gradient of the size of the input.
CHUNK = 8192


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: int | tuple[int, int] = 1,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Convolve with every tap moved by an offset and weighted by a mask; stride 1, dilation 1, one offset group.

    Values between pixels are bilinear, pixels outside the input are zero. All is computed in float32 (float64 stays),
    also under autocast, but for two things: the backend triton multiplies a half-precision input by the weight in that
    precision (positions, sampling and sums are in float32 there too), and a scripted module leaves the matrix product
    to autocast. On a GPU float32 is multiplied in tf32 where torch's own convolutions are:
    `torch.backends.cudnn.allow_tf32`. The sampled values are never kept for the backward pass (but in a scripted
    module), so a training step does not hold one copy of the input per tap.

    Args:
        input: `(B, C, H, W)`.
        offset: pixels, `(B, 2*kh*kw, H_out, W_out)`; for tap k (row-major) channel 2k is dy and 2k+1 is dx.
        weight: `(C_out, C, kh, kw)`.
        bias: `(C_out,)`.
        padding: pixels of zeros on each side, one number or (vertical, horizontal).
        mask: `(B, kh*kw, H_out, W_out)`; None for all ones.
        backend: `"triton"`, `"torchvision"`, `"native"`, `"torch"` or None (environment variable, else automatic).

    Returns:
        `(B, C_out, H_out, W_out)` with `H_out = H + 2*padding - kh + 1`, in the dtype of `input`. On the meta device an
        empty tensor of that shape, to count costs.

    Raises:
        ValueError: a shape does not fit, or the backend's name is unknown.
        TypeError: float64 with a backend that has no such kernel.
        RuntimeError: the backend asked for is not available.

    Source: Zhu et al., "Deformable ConvNets v2", 2019, equation 1; arguments as in torchvision.
    """
    pad_y, pad_x = _pair(padding)
    _check_shapes(input, offset, weight, bias, pad_y, pad_x, mask)
    if input.is_meta:
        return input.new_empty((input.shape[0], weight.shape[0], offset.shape[2], offset.shape[3]))
    if torch.jit.is_scripting():
        if backend is not None and backend != "torch":
            raise ValueError(f"backend: found {backend}, expected 'torch' or None in a scripted module")
        y = _torch_deform(input, offset, weight, bias, pad_y, pad_x, mask)
    else:
        name = backends.backend_for("deform_conv2d", input, backend)
        y = _IMPLEMENTATIONS[name](input, offset, weight, bias, pad_y, pad_x, mask)
    return y.to(input.dtype)


def deform_residual(
    x: Tensor,
    predicted: Tensor,
    weight: Tensor,
    bias: Tensor,
    predicted_bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`x + SiLU(deform_conv2d(x) + bias)`, with offsets and masks as a layer before it predicts them: in one map.

    With `z = predicted + predicted_bias`, the offsets are the first 18 channels of z and the masks the sigmoid of the
    next 9; any further channels are not read. Where triton runs both operations, `deform_conv2d` and `pointwise`, this
    is one operator, without a map for offsets, masks or sums. Precisions are those of :func:`deform_conv2d`.

    Args:
        x: `(B, C, H, W)`.
        predicted: `(B, 27 or more, H, W)`; offsets in pixels.
        weight: `(C, C, 3, 3)`.
        bias: `(C,)`.
        predicted_bias: `(27,)`, of the layer that predicts, if it is still to be added.
        backend: of `deform_conv2d`, see there.

    Returns:
        `(B, C, H, W)` in the dtype of `x`.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`deform_conv2d`.

    Source: GLMamba, Fig. 2B and equation 5.
    """
    height, width = _output_size(x, weight, 1, 1, "x")
    check_shape("weight", weight, [x.shape[1], x.shape[1], 3, 3], "x")
    check_shape("bias", bias, [x.shape[1]], "x")
    channels = max(predicted.shape[1] if predicted.dim() == 4 else 0, 27)
    check_shape("predicted", predicted, [x.shape[0], channels, height, width], "x")
    if predicted_bias is not None:
        check_shape("predicted_bias", predicted_bias, [27], "x")
    if x.is_meta or torch.jit.is_scripting():
        pass  # step by step, below
    elif backends.backend_for("deform_conv2d", x, backend) == backends.backend_for("pointwise", x) == "triton":
        return _triton_deform_residual(x, predicted, weight, bias, predicted_bias)
    offset, mask, _ = torch.split(predicted, [18, 9, channels - 27], dim=1)
    if predicted_bias is not None:
        offset = offset + predicted_bias[:18].view(-1, 1, 1)
        mask = mask + predicted_bias[18:].view(-1, 1, 1)
    y = deform_conv2d(x, offset, weight, mask=torch.sigmoid(mask), backend=backend)
    return bias_silu(y.permute(0, 2, 3, 1), bias, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _pair(padding: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(padding, int):
        return padding, padding
    else:
        return padding


def _check_shapes(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pad_y: int,
    pad_x: int,
    mask: Tensor | None,
) -> None:
    height, width = _output_size(input, weight, pad_y, pad_x)
    taps = weight.shape[2] * weight.shape[3]
    check_shape("offset", offset, [input.shape[0], 2 * taps, height, width], "input, weight and padding")
    if mask is not None:
        check_shape("mask", mask, [input.shape[0], taps, height, width], "input, weight and padding")
    if bias is not None:
        check_shape("bias", bias, [weight.shape[0]], "input, weight and padding")


def _output_size(input: Tensor, weight: Tensor, pad_y: int, pad_x: int, name: str = "input") -> tuple[int, int]:
    """Rows and columns of the result, if input (called `name`), weight and padding are what they should be."""
    if input.dim() != 4:
        raise ValueError(f"{name}: found shape {list(input.shape)}, expected (B, C, H, W)")
    if weight.dim() != 4 or weight.shape[1] != input.shape[1]:
        raise ValueError(f"weight: found shape {list(weight.shape)}, expected (C_out, {input.shape[1]}, kh, kw)")
    if pad_y < 0 or pad_x < 0:
        raise ValueError(f"padding: found {[pad_y, pad_x]}, expected numbers >= 0")
    height = input.shape[2] + 2 * pad_y - weight.shape[2] + 1
    width = input.shape[3] + 2 * pad_x - weight.shape[3] + 1
    if height < 1 or width < 1:
        raise ValueError(f"{name}: found shape {list(input.shape)}, expected at least the kernel's size after padding")
    return height, width


def _one_dtype(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """All tensors in the dtype of the computation; positions across an image need more than half precision."""
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    bias = None if bias is None else bias.to(dtype)
    mask = None if mask is None else mask.to(dtype)
    return input.to(dtype), offset.to(dtype), weight.to(dtype), bias, mask


# --- backend "torch" ---------------------------------------------------------------------------------------------
# Each sample is a weighted sum of four channels-last pixels, which is what embedding_bag computes; then one matrix
# product. Against grid_sample it took 0.6 of the time, and it adds whole-pixel positions without rounding them.


def _sample(
    pixels: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    size: list[int],
    kernel: list[int],
    pad: list[int],
    top: int,
) -> Tensor:
    """Sample all taps for a band of output rows of one image.

    Args:
        pixels: `(H*W, C)`.
        offset: the band's offsets, `(2*taps, R, W_out)`.
        mask: the band's mask, `(taps, R, W_out)`.
        size: [H, W] of the image.
        kernel: [kh, kw].
        pad: [vertical, horizontal].
        top: first output row of the band.

    Returns:
        `(R*W_out, taps*C)`.
    """
    moved = offset.view(-1, 2, offset.shape[1], offset.shape[2]).permute(1, 2, 3, 0)  # (2, R, W_out, taps)
    rows, columns, taps = moved.shape[1], moved.shape[2], moved.shape[3]
    tap = torch.arange(taps, device=offset.device)
    row = torch.arange(top, top + rows, device=offset.device).view(-1, 1, 1)
    column = torch.arange(columns, device=offset.device).view(-1, 1)
    y, wy = _corners(moved[0], row + tap // kernel[1] - pad[0], size[0])  # (R, W_out, taps, 2)
    x, wx = _corners(moved[1], column + tap % kernel[1] - pad[1], size[1])
    if mask is not None:
        wy = wy * mask.permute(1, 2, 0).unsqueeze(-1)
    index = y.unsqueeze(-1) * size[1] + x.unsqueeze(-2)  # (R, W_out, taps, 2, 2)
    share = wy.unsqueeze(-1) * wx.unsqueeze(-2)
    sampled = F.embedding_bag(index.view(-1, 4), pixels, mode="sum", per_sample_weights=share.view(-1, 4))
    return sampled.view(rows * columns, taps * pixels.shape[1])


def _corners(moved: Tensor, base: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The two pixels on either side of `base + moved` along one axis, and their bilinear weights, `(..., 2)`.

    A pixel outside the image is replaced by pixel 0 with weight 0. The whole part is added as an integer: the
    position of a pixel far from the origin would round the fraction off.
    """
    whole = torch.floor(moved.detach())
    fraction = moved - whole
    # Whole parts beyond this range are outside anyway, but may not fit an integer.
    limit = 2.0**24
    first = base + whole.clamp(-limit, limit).to(torch.int64)
    index = torch.stack((first, first + 1), -1)
    inside = (index >= 0) & (index < size)
    weight = torch.stack((1 - fraction, fraction), -1) * inside
    # 32-bit indices: embedding_bag's kernel for them is three times as fast on CPU.
    return torch.where(inside, index, torch.zeros_like(index)).to(torch.int32), weight


def _weight_matrix(weight: Tensor) -> Tensor:
    """(C_out, C, kh, kw) -> (taps*C, C_out), in the order of `_sample`."""
    return weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0])


def _pixels(input: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H*W, C)."""
    return input.flatten(2).transpose(1, 2).contiguous()


def _deform_forward(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    pad_y: int,
    pad_x: int,
    mask: Tensor | None,
    chunk: int = CHUNK,  # an argument, since TorchScript does not see a module's constants
) -> Tensor:
    size, kernel, pad = [input.shape[2], input.shape[3]], [weight.shape[2], weight.shape[3]], [pad_y, pad_x]
    pixels, matrix = _pixels(input), _weight_matrix(weight)
    height, width = offset.shape[2], offset.shape[3]
    band = max(1, chunk // width)
    images: list[Tensor] = []
    for i, image in enumerate(pixels.unbind(0)):
        bands: list[Tensor] = []
        for j, part in enumerate(offset[i].split(band, 1)):
            top = j * band
            m = None if mask is None else mask[i, :, top : top + band]
            bands.append(torch.mm(_sample(image, part, m, size, kernel, pad, top), matrix))  # (R*W_out, C_out)
        images.append(torch.cat(bands, 0))
    return torch.stack(images).transpose(1, 2).reshape(input.shape[0], weight.shape[0], height, width)


class _RecomputedDeformConv(torch.autograd.Function):
    """`_deform_forward` that keeps only its inputs and samples again, band by band, in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, offset: Tensor, weight: Tensor, pad_y: int, pad_x: int, mask: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(input, offset, weight, mask)
        ctx.pad = [pad_y, pad_x]
        return _deform_forward(input, offset, weight, pad_y, pad_x, mask)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        input, offset, weight, mask = ctx.saved_tensors
        size, kernel = list(input.shape[2:]), list(weight.shape[2:])
        pixels, matrix = _pixels(input), _weight_matrix(weight)
        grad_pixels, grad_matrix = torch.zeros_like(pixels), torch.zeros_like(matrix)
        grad_offset = torch.empty_like(offset)
        grad_mask = None if mask is None else torch.empty_like(mask)
        height, width = offset.shape[2:]
        band = max(1, CHUNK // width)
        with torch.autocast(grad_y.device.type, enabled=False):
            for i in range(input.shape[0]):
                for top in range(0, height, band):
                    part = (i, slice(None), slice(top, top + band))
                    leaves = [pixels[i], offset[part]] + ([] if mask is None else [mask[part]])
                    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
                    with torch.enable_grad():
                        m = None if mask is None else leaves[2]
                        sampled = _sample(leaves[0], leaves[1], m, size, kernel, ctx.pad, top)
                    dy = grad_y[part].flatten(1)  # (C_out, R*W_out)
                    grad_matrix += (dy @ sampled.detach()).t()
                    grads = torch.autograd.grad(sampled, leaves, dy.t() @ matrix.t())
                    grad_pixels[i] += grads[0]
                    grad_offset[part] = grads[1]
                    if grad_mask is not None:
                        grad_mask[part] = grads[2]
        grad_input = grad_pixels.transpose(1, 2).reshape(input.shape)
        out_channels, channels, kh, kw = weight.shape
        grad_weight = grad_matrix.view(kh, kw, channels, out_channels).permute(3, 2, 0, 1)
        return grad_input, grad_offset, grad_weight, None, None, grad_mask


def _torch_deform(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pad_y: int,
    pad_x: int,
    mask: Tensor | None,
) -> Tensor:
    input, offset, weight, bias, mask = _one_dtype(input, offset, weight, bias, mask)
    if torch.jit.is_scripting():
        # TorchScript cannot switch autocast off, so there the matrix product takes its precision.
        y = _deform_forward(input, offset, weight, pad_y, pad_x, mask)
    else:
        with torch.autocast(input.device.type, enabled=False):
            y = _RecomputedDeformConv.apply(input, offset, weight, pad_y, pad_x, mask)
    return y if bias is None else y + bias.view(-1, 1, 1)


# --- backend "torchvision" ---------------------------------------------------------------------------------------


def _torchvision_deform(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pad_y: int,
    pad_x: int,
    mask: Tensor | None,
) -> Tensor:
    input, offset, weight, bias, mask = _one_dtype(input, offset, weight, bias, mask)
    ops = backends.load_backend("deform_conv2d", "torchvision")
    with torch.autocast(input.device.type, enabled=False):
        return ops.deform_conv2d(input, offset, weight, bias, padding=(pad_y, pad_x), mask=mask)


# --- backends "triton" and "native": one operator of torch, with a kernel per device -------------------------------

torch.library.define(
    "glmamba::deform_conv2d",
    "(Tensor input, Tensor offset, Tensor weight, Tensor? mask, int pad_y, int pad_x, Tensor? bias=None) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "glmamba::deform_conv2d_backward",
    "(Tensor grad, Tensor input, Tensor offset, Tensor weight, Tensor? mask, int pad_y, int pad_x)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("glmamba::deform_conv2d", "cuda")
def _triton_forward(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    pad_y: int,
    pad_x: int,
    bias: Tensor | None = None,
) -> Tensor:
    kernels = backends.load_backend("deform_conv2d", "triton")
    return kernels.forward(input, offset, weight, mask, pad_y, pad_x, bias)


@torch.library.impl("glmamba::deform_conv2d", "cpu")
def _native_forward(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    pad_y: int,
    pad_x: int,
    bias: Tensor | None = None,
) -> Tensor:
    kernels = backends.load_backend("deform_conv2d", "native")
    y = kernels.deform_forward(input, offset, weight, mask, pad_y, pad_x)
    return y if bias is None else y.add_(bias.view(-1, 1, 1))


@torch.library.register_fake("glmamba::deform_conv2d")
def _fake_forward(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    pad_y: int,
    pad_x: int,
    bias: Tensor | None = None,
) -> Tensor:
    shape = (input.shape[0], weight.shape[0], *offset.shape[2:])
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=torch.channels_last)


@torch.library.impl("glmamba::deform_conv2d_backward", "cuda")
def _triton_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    kernels = backends.load_backend("deform_conv2d", "triton")
    return _without_none(grad, kernels.backward(grad, *arguments))


@torch.library.impl("glmamba::deform_conv2d_backward", "cpu")
def _native_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    kernels = backends.load_backend("deform_conv2d", "native")
    return _without_none(grad, kernels.deform_backward(grad, *arguments))


def _without_none(grad: Tensor, gradients: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> tuple[Tensor, ...]:
    """Gradients as the operator returns them: that of a mask that is not there is empty."""
    grad_input, grad_offset, grad_weight, grad_mask = gradients
    return grad_input, grad_offset, grad_weight.contiguous(), grad.new_empty((0,)) if grad_mask is None else grad_mask


@torch.library.register_fake("glmamba::deform_conv2d_backward")
def _fake_backward(
    grad: Tensor, input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, pad_y: int, pad_x: int
) -> tuple[Tensor, ...]:
    given = [offset] if mask is None else [offset, mask]
    if grad.is_cuda:  # the kernels keep the memory order of offset and mask
        moved = [torch.empty_like(x) for x in given]
    else:
        moved = [torch.empty_like(x, memory_format=torch.channels_last) for x in given]
    grad_mask = grad.new_empty((0,)) if mask is None else moved[1]
    grad_input = torch.empty_like(input, memory_format=torch.channels_last)
    return grad_input, moved[0], torch.empty_like(weight, memory_format=torch.contiguous_format), grad_mask


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, offset, weight, mask, ctx.pad_y, ctx.pad_x, bias = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(input, offset, weight, mask)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, offset, weight, mask = ctx.saved_tensors
    grad_input, grad_offset, grad_weight, grad_mask = torch.ops.glmamba.deform_conv2d_backward.default(
        grad, input, offset, weight, mask, ctx.pad_y, ctx.pad_x
    )
    grad_bias = None if ctx.bias_dtype is None else grad.sum((0, 2, 3), dtype=torch.float32).to(ctx.bias_dtype)
    return grad_input, grad_offset, grad_weight, None if mask is None else grad_mask, None, None, grad_bias


def _differentiate_twice(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("deform_conv2d: its gradients cannot be differentiated again")


torch.library.register_autograd("glmamba::deform_conv2d", _differentiate, setup_context=_save)
torch.library.register_autograd("glmamba::deform_conv2d_backward", _differentiate_twice)


def _triton_deform(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pad_y: int,
    pad_x: int,
    mask: Tensor | None,
) -> Tensor:
    input, offset, weight = backends.for_triton(input), backends.for_triton(offset), backends.for_triton(weight)
    mask = None if mask is None else backends.for_triton(mask)
    # The kernel adds the bias to its sums: another pass over the result would take a tenth of the convolution's time.
    bias = None if bias is None else backends.for_triton(bias)
    return torch.ops.glmamba.deform_conv2d.default(input, offset, weight, mask, pad_y, pad_x, bias)


# --- the whole step of a deform block: backend "triton", as one operator -------------------------------------------
# Beside the result it returns the convolution, before bias and SiLU, for the backward pass. There the residual's
# gradient is what the gradient of the convolution's input is added to.

torch.library.define(
    "glmamba::deform_residual",
    "(Tensor x, Tensor predicted, Tensor weight, Tensor bias, Tensor shift) -> (Tensor out, Tensor convolved)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "glmamba::deform_residual_backward",
    "(Tensor grad, Tensor x, Tensor predicted, Tensor weight, Tensor bias, Tensor shift, Tensor convolved)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("glmamba::deform_residual", "cuda")
def _triton_residual_forward(*arguments: Tensor) -> tuple[Tensor, Tensor]:
    return backends.load_backend("deform_conv2d", "triton").residual_forward(*arguments)


@torch.library.impl("glmamba::deform_residual_backward", "cuda")
def _triton_residual_backward(*arguments: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return backends.load_backend("deform_conv2d", "triton").residual_backward(*arguments)


@torch.library.register_fake("glmamba::deform_residual")
def _fake_residual_forward(x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], *x.shape[2:], x.shape[1])
    out = torch.empty(shape, dtype=x.dtype, device=x.device).permute(0, 3, 1, 2)
    return out, torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.register_fake("glmamba::deform_residual_backward")
def _fake_residual_backward(
    grad: Tensor, x: Tensor, predicted: Tensor, weight: Tensor, bias: Tensor, *_: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return dx, torch.empty_like(predicted), dweight, torch.empty_like(bias)


def _save_residual(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    _, convolved = output
    ctx.mark_non_differentiable(convolved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, convolved)


def _differentiate_residual(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, ...]:
    saved = ctx.saved_tensors
    dx, dpredicted, dweight, dbias = torch.ops.glmamba.deform_residual_backward.default(grad, *saved)
    shift = saved[4]
    # Not as a slice, which a MetaTensor with a batch's metadata would take for one of its batch.
    dshift = dpredicted.sum((0, 2, 3), dtype=torch.float32).narrow(0, 0, shift.shape[0])
    return dx, dpredicted, dweight, dbias, dshift.to(shift.dtype)


torch.library.register_autograd("glmamba::deform_residual", _differentiate_residual, setup_context=_save_residual)
torch.library.register_autograd("glmamba::deform_residual_backward", _differentiate_twice)


def _triton_deform_residual(
    x: Tensor, predicted: Tensor, weight: Tensor, bias: Tensor, predicted_bias: Tensor | None
) -> Tensor:
    dtype = x.dtype
    x, predicted, weight = (backends.for_triton(t) for t in (x, predicted, weight))
    shift = predicted.new_zeros(27) if predicted_bias is None else predicted_bias
    return torch.ops.glmamba.deform_residual.default(x, predicted, weight, bias, shift)[0].to(dtype)


def _native_deform(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pad_y: int,
    pad_x: int,
    mask: Tensor | None,
) -> Tensor:
    input, offset, weight, bias, mask = _one_dtype(input, offset, weight, bias, mask)
    return torch.ops.glmamba.deform_conv2d.default(input, offset, weight, mask, pad_y, pad_x, bias)


_IMPLEMENTATIONS = {
    "triton": _triton_deform,
    "torchvision": _torchvision_deform,
    "native": _native_deform,
    "torch": _torch_deform,
}
