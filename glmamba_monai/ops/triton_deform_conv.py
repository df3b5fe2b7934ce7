"""Modulated deformable convolution on a GPU: Triton kernels that sample and multiply in one pass.

Symbols: C channels of the input, N output channels, k a tap of the kernel, M the output positions of one tile
(`TILE_H x TILE_W` of one image, a square-like patch, so that neighbouring samples meet in the first-level cache).
Everything is channels last: a sample is four pixels of C contiguous numbers.

    forward:   Y[M, N]   = sum over k of A_k[M, C] W_k[C, N]              A_k: the samples of tap k
    backward:  dA_k[M, C] = dY[M, N] W_k^T[N, C], from it dX (added atomically to the four pixels) and, as dot
               products with the four pixels, the gradients of offset and mask
               dW_k[N, C] = sum over tiles of dY^T[N, M] A_k[M, C]
"""

# ruff: noqa: ANN001, ANN202 (types of the kernels' arguments are Triton's)

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from glmamba_monai.ops.triton_pointwise import bias_silu_backward, bias_silu_forward

__all__ = ["backward", "forward", "residual_backward", "residual_forward"]


class Launch(NamedTuple):
    """How a kernel is cut into programs.

    Args:
        tile: rows and columns of a program's output positions.
        depth: channels sampled at a time.
        group: forward: samplings per computation of the positions; weight: taps of a program.
        warps: warps of a program.
        stages: depth of the loads' software pipeline.
        registers: most registers of a thread, None for the compiler's choice; fewer let more programs run at once.
    """

    tile: tuple[int, int] = (8, 16)
    depth: int = 32
    group: int = 3
    warps: int = 8
    stages: int = 1
    registers: int | None = None


# By bytes of a number of the input.
FORWARD = {4: Launch((8, 8), group=1, warps=4, registers=128), 2: Launch((8, 8), group=1, warps=4, registers=128)}
SAMPLES = {4: Launch((8, 8), warps=4), 2: Launch((4, 8), warps=4, registers=128)}
WEIGHT = {4: Launch((8, 8), registers=128), 2: Launch((8, 8))}
# Output channels that one program holds at most: more take several passes or several programs.
MAX_BLOCK = 128
# How a float32 product is computed where tf32 is not allowed.
EXACT = "ieee"


@triton.jit
def _tile(tile, height, width, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Image (64-bit), rows and columns of a tile's positions, and which of them exist."""
    tiles_x = tl.cdiv(width, TILE_W)
    tiles = tl.cdiv(height, TILE_H) * tiles_x
    image = tile // tiles
    rest = tile % tiles
    lane = tl.arange(0, TILE_H * TILE_W)
    row = rest // tiles_x * TILE_H + lane // TILE_W
    column = rest % tiles_x * TILE_W + lane % TILE_W
    return image.to(tl.int64), row, column, (row < height) & (column < width)


@triton.jit
def _axis(moved, base, size):
    """The pixels on either side of `base + moved`, kept inside; whether they were inside; and the fraction.

    The whole part is added as an integer: a position far from the origin would round the fraction off.
    """
    whole = tl.floor(moved)
    # Whole parts beyond this range are outside anyway, but may not fit an integer.
    first = base + tl.clamp(whole, -16777216.0, 16777216.0).to(tl.int32)
    inside0 = ((first >= 0) & (first < size)).to(tl.float32)
    inside1 = ((first >= -1) & (first < size - 1)).to(tl.float32)
    pixel0 = tl.minimum(tl.maximum(first, 0), size - 1)
    pixel1 = tl.minimum(tl.maximum(first + 1, 0), size - 1)
    return pixel0, pixel1, inside0, inside1, moved - whole


@triton.jit
def _place(
    offset, mask, shift, tap, row, column, valid, height, width, pad_y, pad_x,
    offset_c, offset_h, offset_w, mask_c, mask_h, mask_w,
    TAPS: tl.constexpr, KERNEL_W: tl.constexpr, HAS_MASK: tl.constexpr, PREDICTED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Where tap k samples: four pixels, and per axis the insides, the fraction; the mask (0 for no position).

    PREDICTED: the mask is given before its sigmoid, and `shift` is added to offsets and mask.
    """
    at_row, at_column, at_tap = row, column, tap
    if WIDE:
        at_row, at_column, at_tap = row.to(tl.int64), column.to(tl.int64), tl.cast(tap, tl.int64)
    moved = offset + 2 * at_tap * offset_c + at_row * offset_h + at_column * offset_w
    dy = tl.load(moved, valid, other=0.0).to(tl.float32)
    dx = tl.load(moved + offset_c, valid, other=0.0).to(tl.float32)
    if HAS_MASK:
        share = tl.load(mask + at_tap * mask_c + at_row * mask_h + at_column * mask_w, valid, other=0.0).to(tl.float32)
    else:
        share = valid.to(tl.float32)
    if PREDICTED:
        dy += tl.load(shift + 2 * tap)
        dx += tl.load(shift + 2 * tap + 1)
        share = tl.where(valid, tl.sigmoid(share + tl.load(shift + 2 * TAPS + tap)), 0.0)
    y0, y1, in_y0, in_y1, fy = _axis(dy, row + tap // KERNEL_W - pad_y, height)
    x0, x1, in_x0, in_x1, fx = _axis(dx, column + tap % KERNEL_W - pad_x, width)
    if WIDE:
        y0, y1 = y0.to(tl.int64), y1.to(tl.int64)
    top, bottom = y0 * width, y1 * width
    return top + x0, top + x1, bottom + x0, bottom + x1, in_y0, in_y1, fy, in_x0, in_x1, fx, share


@triton.jit
def _pixels(x, pixel, channel, C: tl.constexpr, EVEN: tl.constexpr):
    """(M, channels) of float32."""
    at = x + pixel[:, None] * C + channel[None, :]
    values = tl.load(at) if EVEN else tl.load(at, (channel < C)[None, :], other=0.0)
    return values.to(tl.float32)


@triton.jit
def _samples(
    x, p00, p01, p10, p11, w00, w01, w10, w11, channel,
    C: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A_k: (M, channels), in the type of the matrix product."""
    blend = _pixels(x, p00, channel, C, EVEN) * w00[:, None]
    blend += _pixels(x, p01, channel, C, EVEN) * w01[:, None]
    blend += _pixels(x, p10, channel, C, EVEN) * w10[:, None]
    blend += _pixels(x, p11, channel, C, EVEN) * w11[:, None]
    return _operand(blend, x.dtype.element_ty, PRECISION)


@triton.jit
def _operand(values, dtype: tl.constexpr, PRECISION: tl.constexpr):
    if PRECISION == "tf32" and dtype == tl.float32:
        # The matrix unit cuts the low bits off, which shrinks every value; rounded, the errors cancel.
        return tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=f,f", [values], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return values.to(dtype)


@triton.jit
def _block(pointer, row, column, rows, columns, row_stride, column_stride):
    """A 2-D block, zero outside `rows x columns`."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(pointer + row[:, None] * row_stride + column[None, :] * column_stride, inside, other=0.0)


@triton.jit
def _store_sums(y, at, valid, n, total, bias, N: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Finished sums (M, n), with the bias, into y."""
    if HAS_BIAS:
        total += tl.load(bias + n, n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at[:, None] * N + n[None, :], total.to(y.dtype.element_ty), valid[:, None] & (n < N)[None, :])


@triton.jit
def _forward_kernel(
    x, offset, mask, shift, weight, bias, y, in_height, in_width, height, width, pad_y, pad_x,
    offset_b, offset_c, offset_h, offset_w, mask_b, mask_c, mask_h, mask_w,
    C: tl.constexpr, N: tl.constexpr, TAPS: tl.constexpr, KERNEL_W: tl.constexpr, HAS_MASK: tl.constexpr,
    PREDICTED: tl.constexpr, HAS_BIAS: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, DEPTH: tl.constexpr,
    GROUP: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x (B, H, W, C), weight (taps, N, C), y (B, H_out, W_out, N); one program: a tile, N0 + N1 output channels."""
    image, row, column, valid = _tile(tl.program_id(0), height, width, TILE_H, TILE_W)
    x += image * in_height * in_width * C
    y += image * height * width * N
    offset += image * offset_b
    mask += image * mask_b
    n0 = tl.program_id(1) * (N0 + N1) + tl.arange(0, N0)
    total0 = tl.zeros((TILE_H * TILE_W, N0), tl.float32)
    if N1 > 0:
        n1 = tl.program_id(1) * (N0 + N1) + N0 + tl.arange(0, N1)
        total1 = tl.zeros((TILE_H * TILE_W, N1), tl.float32)
    for start in range(0, C, DEPTH * GROUP):
        for tap in range(TAPS):
            p00, p01, p10, p11, in_y0, in_y1, fy, in_x0, in_x1, fx, share = _place(
                offset, mask, shift, tap, row, column, valid, in_height, in_width, pad_y, pad_x,
                offset_c, offset_h, offset_w, mask_c, mask_h, mask_w, TAPS, KERNEL_W, HAS_MASK, PREDICTED, WIDE,
            )  # fmt: skip
            # A product with 0, not a choice, so that a NaN in the offset shows wherever it points.
            top, bottom = (1 - fy) * in_y0 * share, fy * in_y1 * share
            left, right = (1 - fx) * in_x0, fx * in_x1
            for j in tl.static_range(GROUP):
                c = start + j * DEPTH + tl.arange(0, DEPTH)
                a = _samples(
                    x, p00, p01, p10, p11, top * left, top * right, bottom * left, bottom * right, c,
                    C, C % (DEPTH * GROUP) == 0, PRECISION,
                )  # fmt: skip
                matrix = weight + tap * N * C
                total0 = tl.dot(a, _block(matrix, c, n0, C, N, 1, C), total0, input_precision=PRECISION)
                if N1 > 0:
                    total1 = tl.dot(a, _block(matrix, c, n1, C, N, 1, C), total1, input_precision=PRECISION)
    at = row * width + column
    if WIDE:
        at = row.to(tl.int64) * width + column
    _store_sums(y, at, valid, n0, total0, bias, N, HAS_BIAS)
    if N1 > 0:
        _store_sums(y, at, valid, n1, total1, bias, N, HAS_BIAS)


@triton.jit
def _corner(x, dx, grad, pixel, share, channel, C: tl.constexpr, EVEN: tl.constexpr):
    """Add dA to a pixel of dX; returns the dot product of dA with that pixel of X, `(M,)`.

    grad and channel have three axes: channels / 4, M, channels % 4.
    """
    at = pixel[None, :, None] * C + channel
    wanted = (share != 0)[None, :, None]
    if EVEN:
        values = tl.load(x + at).to(tl.float32)
    else:
        values = tl.load(x + at, channel < C, other=0.0).to(tl.float32)
        wanted = wanted & (channel < C)
    tl.atomic_add(dx + at, grad * share[None, :, None], wanted, sem="relaxed")
    return tl.sum(tl.sum(grad * values, 2), 0)


@triton.jit
def _grad_block(dy, at, valid, n, N: tl.constexpr, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """dY at a tile's positions, (M, n), in the type of the matrix product."""
    g = tl.load(dy + at[:, None] * N + n[None, :], valid[:, None] & (n < N)[None, :], other=0.0)
    return _operand(g, dtype, PRECISION)


@triton.jit
def _samples_backward_kernel(
    dy, x, offset, mask, shift, weight, dx, d_offset, d_mask, in_height, in_width, height, width, pad_y, pad_x,
    offset_b, offset_c, offset_h, offset_w, mask_b, mask_c, mask_h, mask_w,
    d_offset_b, d_offset_c, d_offset_h, d_offset_w, d_mask_b, d_mask_c, d_mask_h, d_mask_w,
    C: tl.constexpr, N: tl.constexpr, TAPS: tl.constexpr, KERNEL_W: tl.constexpr, HAS_MASK: tl.constexpr,
    PREDICTED: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, DEPTH: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of x, offset and mask; dy (B, H_out, W_out, N), weight (taps, C, N), dx (B, H, W, C) float32, what
    is added to.

    One program: a tile, all taps, all channels, `DEPTH` at a time.
    """
    image, row, column, valid = _tile(tl.program_id(0), height, width, TILE_H, TILE_W)
    x += image * in_height * in_width * C
    dx += image * in_height * in_width * C
    dy += image * height * width * N
    offset += image * offset_b
    mask += image * mask_b
    d_offset += image * d_offset_b
    d_mask += image * d_mask_b
    at_row, at_column = row, column
    if WIDE:
        at_row, at_column = row.to(tl.int64), column.to(tl.int64)
    at = at_row * width + at_column
    dtype: tl.constexpr = x.dtype.element_ty
    n0 = tl.arange(0, N0)
    g0 = _grad_block(dy, at, valid, n0, N, dtype, PRECISION)
    if N1 > 0:
        n1 = N0 + tl.arange(0, N1)
        g1 = _grad_block(dy, at, valid, n1, N, dtype, PRECISION)
    for tap in range(TAPS):
        p00, p01, p10, p11, in_y0, in_y1, fy, in_x0, in_x1, fx, share = _place(
            offset, mask, shift, tap, row, column, valid, in_height, in_width, pad_y, pad_x,
            offset_c, offset_h, offset_w, mask_c, mask_h, mask_w, TAPS, KERNEL_W, HAS_MASK, PREDICTED, WIDE,
        )  # fmt: skip
        top, bottom = (1 - fy) * in_y0, fy * in_y1
        left, right = (1 - fx) * in_x0, fx * in_x1
        q00 = tl.zeros((TILE_H * TILE_W,), tl.float32)
        q01, q10, q11 = q00, q00, q00
        matrix = weight + tap * N * C
        for start in range(0, C, DEPTH):
            c = start + tl.arange(0, DEPTH)
            grad = tl.dot(g0, _block(matrix, n0, c, N, C, 1, N), input_precision=PRECISION)
            if N1 > 0:
                grad = tl.dot(g1, _block(matrix, n1, c, N, C, 1, N), grad, input_precision=PRECISION)
            for more in range(N0 + N1, N, N0):
                n = more + n0
                g = _grad_block(dy, at, valid, n, N, dtype, PRECISION)
                grad = tl.dot(g, _block(matrix, n, c, N, C, 1, N), grad, input_precision=PRECISION)
            even: tl.constexpr = C % DEPTH == 0
            # In this form the compiler moves dA once, to threads that own 16 bytes of a pixel. As a matrix it would
            # do all that follows where the product left dA, and move every pixel and every sum there and back.
            grad = tl.permute(tl.reshape(grad, (TILE_H * TILE_W, DEPTH // 4, 4)), (1, 0, 2))
            c = start + 4 * tl.arange(0, DEPTH // 4)[:, None, None] + tl.arange(0, 4)[None, None, :]
            q00 += _corner(x, dx, grad, p00, top * left * share, c, C, even)
            q01 += _corner(x, dx, grad, p01, top * right * share, c, C, even)
            q10 += _corner(x, dx, grad, p10, bottom * left * share, c, C, even)
            q11 += _corner(x, dx, grad, p11, bottom * right * share, c, C, even)
        grad_y = share * (in_y1 * (left * q10 + right * q11) - in_y0 * (left * q00 + right * q01))
        grad_x = share * (in_x1 * (top * q01 + bottom * q11) - in_x0 * (top * q00 + bottom * q10))
        at_tap = tl.cast(tap, tl.int64) if WIDE else tap
        to = d_offset + 2 * at_tap * d_offset_c + at_row * d_offset_h + at_column * d_offset_w
        tl.store(to, grad_y.to(d_offset.dtype.element_ty), valid)
        tl.store(to + d_offset_c, grad_x.to(d_offset.dtype.element_ty), valid)
        if HAS_MASK:
            grad_share = top * (left * q00 + right * q01) + bottom * (left * q10 + right * q11)
            if PREDICTED:
                grad_share *= share * (1 - share)
            to = d_mask + at_tap * d_mask_c + at_row * d_mask_h + at_column * d_mask_w
            tl.store(to, grad_share.to(d_mask.dtype.element_ty), valid)


@triton.jit
def _weight_backward_kernel(
    dy, x, offset, mask, shift, partial, tiles, splits, in_height, in_width, height, width, pad_y, pad_x,
    offset_b, offset_c, offset_h, offset_w, mask_b, mask_c, mask_h, mask_w,
    C: tl.constexpr, N: tl.constexpr, TAPS: tl.constexpr, KERNEL_W: tl.constexpr, HAS_MASK: tl.constexpr,
    PREDICTED: tl.constexpr, BLOCK_N: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partial (splits, taps, N, C) float32; one program: `GROUP` taps, every `splits`-th tile, a block of N by C."""
    split = tl.program_id(0) // tl.cdiv(TAPS, GROUP)
    first = tl.program_id(0) % tl.cdiv(TAPS, GROUP) * GROUP
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(2) * DEPTH + tl.arange(0, DEPTH)
    totals = ()
    for _ in tl.static_range(GROUP):
        totals += (tl.zeros((BLOCK_N, DEPTH), tl.float32),)
    tile = split
    while tile < tiles:
        image, row, column, valid = _tile(tile, height, width, TILE_H, TILE_W)
        at = row * width + column
        if WIDE:
            at = row.to(tl.int64) * width + column
        g = _grad_block(dy + image * height * width * N, at, valid, n, N, x.dtype.element_ty, PRECISION)
        g = tl.trans(g)
        sums = ()
        for j in tl.static_range(GROUP):
            p00, p01, p10, p11, in_y0, in_y1, fy, in_x0, in_x1, fx, share = _place(
                offset + image * offset_b, mask + image * mask_b, shift, tl.minimum(first + j, TAPS - 1), row, column,
                valid, in_height, in_width, pad_y, pad_x,
                offset_c, offset_h, offset_w, mask_c, mask_h, mask_w, TAPS, KERNEL_W, HAS_MASK, PREDICTED, WIDE,
            )  # fmt: skip
            top, bottom = (1 - fy) * in_y0 * share, fy * in_y1 * share
            left, right = (1 - fx) * in_x0, fx * in_x1
            a = _samples(
                x + image * in_height * in_width * C, p00, p01, p10, p11,
                top * left, top * right, bottom * left, bottom * right, c, C, C % DEPTH == 0, PRECISION,
            )  # fmt: skip
            sums += (tl.dot(g, a, totals[j], input_precision=PRECISION),)
        totals = sums
        tile += splits
    for j in tl.static_range(GROUP):
        to = partial + ((split * TAPS + first + j) * N).to(tl.int64) * C + n[:, None] * C + c[None, :]
        tl.store(to, totals[j], (n < N)[:, None] & (c < tl.where(first + j < TAPS, C, 0))[None, :])


def forward(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    pad_y: int,
    pad_x: int,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """The convolution, stride 1, dilation 1, one offset group; deterministic.

    Positions, blending and sums are in float32. Half-precision inputs are multiplied in their own type; float32 ones
    in tf32 if `torch.backends.cudnn.allow_tf32` (the switch of the convolutions that this replaces), else exactly.

    Args:
        input: `(B, C, H, W)` on a CUDA device, float32, float16 or bfloat16; fastest in channels_last memory.
        offset: `(B, 2*kh*kw, H_out, W_out)`, pixels, any of these types, as in `deform_conv2d`.
        weight: `(N, C, kh, kw)`.
        mask: `(B, kh*kw, H_out, W_out)` or None.
        pad_y: rows of zeros above and below.
        pad_x: columns of zeros at either side.
        bias: `(N,)`, added in float32, or None.
        shift: `(3*kh*kw,)`, added to offset and mask, which is then given before its sigmoid; None for neither.

    Returns:
        `(B, N, H_out, W_out)` in the input's type, channels_last.

    Source: Zhu et al., "Deformable ConvNets v2", 2019, equation 1.
    """
    out_channels, channels = weight.shape[:2]
    shape = (input.shape[0], out_channels, *offset.shape[2:])
    output = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=torch.channels_last)
    if output.numel() == 0:
        return output
    launch = FORWARD[input.element_size()]
    first, second = _split(out_channels)
    depth = min(launch.depth, _power(channels))
    with torch.cuda.device_of(input):
        _forward_kernel[(_tiles(offset, launch), triton.cdiv(out_channels, first + second))](
            _channels_last(input), offset, offset if mask is None else mask, _shift(shift, offset),
            # Channels innermost: the matrix unit wants the inner dimension of a tf32 product contiguous.
            _arrange(weight, (2, 3, 0, 1), input.dtype), weight if bias is None else bias.contiguous(), output,
            *_geometry(input, offset, mask, pad_y, pad_x), **_sizes(input, offset, weight, mask, shift),
            HAS_BIAS=bias is not None, N0=first, N1=second, DEPTH=depth,
            GROUP=min(launch.group, triton.cdiv(channels, depth)),
            **_options(launch, input.dtype),
        )  # fmt: skip
    return output


def backward(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    pad_y: int,
    pad_x: int,
    shift: Tensor | None = None,
    into: tuple[Tensor, Tensor] | None = None,
    beside: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `forward`; that of the input is summed atomically, so its last bits may differ between runs.

    Args:
        grad: gradient of the output, `(B, N, H_out, W_out)`.
        input: as given to `forward`, like all that follow.
        offset: see `forward`.
        weight: see `forward`.
        mask: see `forward`.
        pad_y: see `forward`.
        pad_x: see `forward`.
        shift: see `forward`; its gradient is the sum of those of offset and mask over images and positions.
        into: where the gradients of offset and mask are written; None for new tensors.
        beside: another gradient of the input, which is added on the way; None for nothing.

    Returns:
        Gradients of input, offset, weight and mask (None without one), each in the type of its tensor.
    """
    if into is None:
        grad_offset, grad_mask = torch.empty_like(offset), None if mask is None else torch.empty_like(mask)
    else:
        grad_offset, grad_mask = into
    out_channels, channels, kernel_h, kernel_w = weight.shape
    if grad.numel() == 0:
        return (
            torch.zeros_like(input) if beside is None else beside.to(input.dtype),
            grad_offset,
            torch.zeros_like(weight),
            grad_mask,
        )
    image, grad = _channels_last(input), _channels_last(grad.to(input.dtype))
    given, grad_given = (offset, grad_offset) if mask is None else (mask, grad_mask)
    if beside is None:
        grad_input = torch.zeros_like(image, dtype=torch.float32)
    else:
        grad_input = torch.empty_like(image, dtype=torch.float32).copy_(beside)
    geometry, sizes = _geometry(input, offset, mask, pad_y, pad_x), _sizes(input, offset, weight, mask, shift)
    with torch.cuda.device_of(input):
        launch = SAMPLES[input.element_size()]
        first, second = _split(out_channels)
        _samples_backward_kernel[(_tiles(offset, launch),)](
            grad, image, offset, given, _shift(shift, offset), _arrange(weight, (2, 3, 1, 0), input.dtype),
            grad_input, grad_offset, grad_given, *geometry, *grad_offset.stride(), *grad_given.stride(), **sizes,
            N0=first, N1=second, DEPTH=min(launch.depth, _power(channels)), **_options(launch, input.dtype),
        )  # fmt: skip
        launch = WEIGHT[input.element_size()]
        tiles, taps, depth = _tiles(offset, launch), kernel_h * kernel_w, min(launch.depth, _power(channels))
        group = min(launch.group, taps)
        blocks = triton.cdiv(taps, group), triton.cdiv(out_channels, MAX_BLOCK), triton.cdiv(channels, depth)
        splits = max(1, min(tiles, 4 * _processors(input) // math.prod(blocks)))
        partial = torch.empty(splits, taps, out_channels, channels, dtype=torch.float32, device=input.device)
        _weight_backward_kernel[(splits * blocks[0], *blocks[1:])](
            grad, image, offset, given, _shift(shift, offset), partial, tiles, splits, *geometry, **sizes,
            BLOCK_N=min(MAX_BLOCK, _power(out_channels)), DEPTH=depth, GROUP=group, **_options(launch, input.dtype),
        )  # fmt: skip
    grad_weight = partial.sum(0).view(kernel_h, kernel_w, out_channels, channels).permute(2, 3, 0, 1)
    return grad_input.to(input.dtype), grad_offset, grad_weight.to(weight.dtype).contiguous(), grad_mask


def residual_forward(
    x: Tensor, predicted: Tensor, weight: Tensor, bias: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """See :func:`glmamba_monai.ops.deform_residual`; `shift` is its `predicted_bias`.

    Returns:
        The result, and the convolution before bias and SiLU, both channels last.
    """
    offset, logits = _parts(predicted, shift)
    convolved = forward(x, offset, weight, logits, 1, 1, None, shift)
    out = bias_silu_forward(convolved.permute(0, 2, 3, 1), bias, x.permute(0, 2, 3, 1))
    return out.permute(0, 3, 1, 2), convolved


def residual_backward(
    grad: Tensor, x: Tensor, predicted: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, convolved: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, predicted, weight and bias; that of `shift` is predicted's, summed over images and positions."""
    dconvolved, dbias = bias_silu_backward(grad.permute(0, 2, 3, 1), convolved.permute(0, 2, 3, 1), bias)
    offset, logits = _parts(predicted, shift)
    dpredicted = torch.empty_like(predicted)
    dpredicted[:, shift.shape[0] :] = 0
    dx, _, dweight, _ = backward(
        *(dconvolved.permute(0, 3, 1, 2), x, offset, weight, logits, 1, 1, shift),
        into=_parts(dpredicted, shift),
        beside=grad,
    )
    return dx, dpredicted, dweight, dbias


def _parts(predicted: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    taps = shift.shape[0] // 3
    return predicted[:, : 2 * taps], predicted[:, 2 * taps : 3 * taps]


def _shift(shift: Tensor | None, offset: Tensor) -> Tensor:
    """The kernels' argument: any tensor where there is none."""
    return offset if shift is None else shift.float().contiguous()


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _arrange(weight: Tensor, order: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
    """One matrix per tap, in the type of the product; rounded to tf32 where that is its type."""
    matrix = weight.detach().permute(order).to(dtype).contiguous()
    if dtype == torch.float32 and _precision() == "tf32":
        matrix = ((matrix.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return matrix


def _precision() -> str:
    try:
        allowed = torch.backends.cudnn.allow_tf32
    except RuntimeError:  # torch refuses to read this switch once the newer one was set
        allowed = torch.backends.cudnn.conv.fp32_precision == "tf32"
    return "tf32" if allowed else EXACT


def _geometry(input: Tensor, offset: Tensor, mask: Tensor | None, pad_y: int, pad_x: int) -> tuple[int, ...]:
    strides = (*offset.stride(), *(offset if mask is None else mask).stride())
    return (*input.shape[2:], *offset.shape[2:], pad_y, pad_x, *strides)


def _sizes(input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, shift: Tensor | None) -> dict[str, Any]:
    """Compile-time arguments that all kernels take."""
    out_channels, channels, kernel_h, kernel_w = weight.shape
    # Images are found by 64-bit numbers always, positions in an image only where 32 bits do not hold them.
    extents = [input[0].numel(), out_channels * offset[0, 0].numel(), offset[0].numel()]
    for given in (offset, mask):
        if given is not None:
            extents.append(sum((n - 1) * step for n, step in zip(given.shape[1:], given.stride()[1:])))
    return {
        "C": channels, "N": out_channels, "TAPS": kernel_h * kernel_w, "KERNEL_W": kernel_w,
        "HAS_MASK": mask is not None, "PREDICTED": shift is not None,
        "WIDE": max(extents) >= 2**31, "PRECISION": _precision(),
    }  # fmt: skip


def _options(launch: Launch, dtype: torch.dtype) -> dict[str, Any]:
    tile_h, tile_w = launch.tile
    # Exact products need more registers than the limit, which was chosen for the others.
    exact = dtype == torch.float32 and _precision() != "tf32"
    return {
        "TILE_H": tile_h, "TILE_W": tile_w,
        "num_warps": launch.warps, "num_stages": launch.stages, "maxnreg": None if exact else launch.registers,
    }  # fmt: skip


def _tiles(offset: Tensor, launch: Launch) -> int:
    return offset.shape[0] * triton.cdiv(offset.shape[2], launch.tile[0]) * triton.cdiv(offset.shape[3], launch.tile[1])


def _power(number: int) -> int:
    """The smallest block a matrix product takes that holds this number of channels."""
    return max(16, triton.next_power_of_2(number))


def _split(channels: int) -> tuple[int, int]:
    """Two powers of two (the second may be 0) that hold the channels with little to spare, as 96 = 64 + 32."""
    whole = _power(min(channels, MAX_BLOCK))
    if whole >= 64 and channels <= whole * 3 // 4:
        return whole // 2, whole // 4
    return whole, 0


def _processors(tensor: Tensor) -> int:
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1
