"""A Mamba block's channel attention with its residual as Triton kernels (CUDA).

Forward, `y` is read twice, for its means and for the result, and in between one small program per image makes the
attention of its channels; backward likewise. A tile is some pixels of one image, `(ROWS, CHANNELS)`, channels
contiguous. The programs of an image walk over its tiles; each keeps its sums in registers, and the image's program adds
them up, in one order, so that results are the same in every run.
"""

# ruff: noqa: ANN001, ANN202 (types of the kernels' arguments are Triton's)

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["attend_channels_backward", "attend_channels_forward"]

TILE = 2048  # numbers of a tile: 16 pixels of 128 channels
PROGRAMS_PER_PROCESSOR = 2  # of a kernel that sums: each leaves a row for the image's program to add
SUMMED = 64  # such rows that the image's program reads at a time
STAGES = tl.constexpr(3)  # the next tiles' numbers travel while a tile is summed


@triton.jit
def _pixels(tile, image, pixels, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """64-bit places of a tile's numbers in a map, and which of them there are."""
    pixel = tile * ROWS + tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, CHANNELS)[None, :]
    return (image.to(tl.int64) * pixels + pixel) * channels + d, (pixel < pixels) & (d < channels)


@triton.jit
def _row(pointer, channels, CHANNELS: tl.constexpr):
    d = tl.arange(0, CHANNELS)
    return tl.load(pointer + d, mask=d < channels, other=0.0)


@triton.jit
def _bias(bias, channels, HAS_BIAS: tl.constexpr, CHANNELS: tl.constexpr):
    return _row(bias, channels, CHANNELS) if HAS_BIAS else tl.zeros((CHANNELS,), tl.float32)


@triton.jit
def _sum_of_rows(partial, programs, step, channels, SUMMED: tl.constexpr, CHANNELS: tl.constexpr):
    """What the programs of an image left, one every `step` numbers, added up."""
    d = tl.arange(0, CHANNELS)[None, :]
    total = tl.zeros((SUMMED, CHANNELS), tl.float32)
    for start in range(0, programs, SUMMED):
        program = start + tl.arange(0, SUMMED)[:, None]
        total += tl.load(partial + program * step + d, mask=(program < programs) & (d < channels), other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _pool_kernel(y, partial, pixels, channels, programs, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """A program's sums of y."""
    image, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for tile in tl.range(program, tl.cdiv(pixels, ROWS), programs, num_stages=STAGES):
        place, valid = _pixels(tile, image, pixels, channels, ROWS, CHANNELS)
        total += tl.load(y + place, mask=valid, other=0.0).to(tl.float32)
    d = tl.arange(0, CHANNELS)
    tl.store(partial + tl.program_id(0) * channels + d, tl.sum(total, 0), mask=d < channels)


@triton.jit
def _matrix(weight, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A contiguous matrix, zero beyond its rows and columns."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    return tl.load(weight + row * columns + column, mask=(row < rows) & (column < columns), other=0.0)


@triton.jit
def _attention_kernel(
    partial, bias, squeeze_weight, squeeze_bias, excite_weight, excite_bias, pooled, squeezed, attention,
    pixels, channels, narrow, programs,
    HAS_BIAS: tl.constexpr, SUMMED: tl.constexpr, CHANNELS: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """An image's means, and from them the attention of its channels."""
    image = tl.program_id(0)
    d, s = tl.arange(0, CHANNELS), tl.arange(0, NARROW)
    total = _sum_of_rows(partial + image * programs * channels, programs, channels, channels, SUMMED, CHANNELS)
    mean = tl.where(d < channels, total / pixels + _bias(bias, channels, HAS_BIAS, CHANNELS), 0.0)
    w = _matrix(squeeze_weight, narrow, channels, NARROW, CHANNELS)
    h = tl.sum(w * mean[None, :], 1) + _row(squeeze_bias, narrow, NARROW)
    h = tl.maximum(h, 0.0, propagate_nan=tl.PropagateNan.ALL)  # so that a NaN shows
    w = _matrix(excite_weight, channels, narrow, CHANNELS, NARROW)
    a = tl.sigmoid(tl.sum(w * h[None, :], 1) + _row(excite_bias, channels, CHANNELS))
    tl.store(pooled + image * channels + d, mean, mask=d < channels)
    tl.store(squeezed + image * narrow + s, h, mask=s < narrow)
    tl.store(attention + image * channels + d, a, mask=d < channels)


@triton.jit
def _attend_kernel(
    x, y, bias, attention, out, pixels, channels, tiles,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    image, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    a = _row(attention + image * channels, channels, CHANNELS)[None, :]
    b = _bias(bias, channels, HAS_BIAS, CHANNELS)[None, :]
    place, valid = _pixels(tile, image, pixels, channels, ROWS, CHANNELS)
    kept = tl.load(x + place, mask=valid, other=0.0).to(tl.float32)
    added = tl.load(y + place, mask=valid, other=0.0).to(tl.float32)
    tl.store(out + place, kept + a * (added + b), mask=valid)


@triton.jit
def _sums_backward_kernel(
    dout, y, bias, partial, pixels, channels, programs,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A program's sums of `dout (y + bias)` and of `dout`."""
    image, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    b = _bias(bias, channels, HAS_BIAS, CHANNELS)[None, :]
    product = tl.zeros((ROWS, CHANNELS), tl.float32)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for tile in tl.range(program, tl.cdiv(pixels, ROWS), programs, num_stages=STAGES):
        place, valid = _pixels(tile, image, pixels, channels, ROWS, CHANNELS)
        g = tl.load(dout + place, mask=valid, other=0.0).to(tl.float32)
        product += g * (tl.load(y + place, mask=valid, other=0.0).to(tl.float32) + b)
        total += g
    d = tl.arange(0, CHANNELS)
    partial += tl.program_id(0) * 2 * channels
    tl.store(partial + d, tl.sum(product, 0), mask=d < channels)
    tl.store(partial + channels + d, tl.sum(total, 0), mask=d < channels)


@triton.jit
def _attention_backward_kernel(
    partial, squeeze_weight, excite_weight, pooled, squeezed, attention, shift, gradients,
    pixels, channels, narrow, programs,
    SUMMED: tl.constexpr, CHANNELS: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """An image's gradients of all parameters, one after the other, and what its means add to the gradient of y."""
    image = tl.program_id(0)
    d, s = tl.arange(0, CHANNELS), tl.arange(0, NARROW)
    there, narrow_there = d < channels, s < narrow
    partial += image * programs * 2 * channels
    da = _sum_of_rows(partial, programs, 2 * channels, channels, SUMMED, CHANNELS)
    total = _sum_of_rows(partial + channels, programs, 2 * channels, channels, SUMMED, CHANNELS)
    a = _row(attention + image * channels, channels, CHANNELS)
    mean = _row(pooled + image * channels, channels, CHANNELS)
    h = _row(squeezed + image * narrow, narrow, NARROW)
    dlogit = da * a * (1.0 - a)
    w = _matrix(excite_weight, channels, narrow, CHANNELS, NARROW)
    dh = tl.where(h > 0, tl.sum(w * dlogit[:, None], 0), 0.0)
    w = _matrix(squeeze_weight, narrow, channels, NARROW, CHANNELS)
    dmean = tl.sum(w * dh[:, None], 0)
    tl.store(shift + image * channels + d, dmean / pixels, mask=there)
    gradients += image * (2 * channels + narrow + 2 * channels * narrow)
    tl.store(gradients + d, total * a + dmean, mask=there)  # bias
    gradients += channels
    at = gradients + s[:, None] * channels + d[None, :]
    tl.store(at, dh[:, None] * mean[None, :], mask=narrow_there[:, None] & there[None, :])  # squeeze_weight
    gradients += channels * narrow
    tl.store(gradients + s, dh, mask=narrow_there)  # squeeze_bias
    gradients += narrow
    at = gradients + d[:, None] * narrow + s[None, :]
    tl.store(at, dlogit[:, None] * h[None, :], mask=there[:, None] & narrow_there[None, :])  # excite_weight
    gradients += channels * narrow
    tl.store(gradients + d, dlogit, mask=there)  # excite_bias


@triton.jit
def _map_backward_kernel(
    dout, attention, shift, dy, pixels, channels, tiles, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    image, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    a = _row(attention + image * channels, channels, CHANNELS)[None, :]
    b = _row(shift + image * channels, channels, CHANNELS)[None, :]
    place, valid = _pixels(tile, image, pixels, channels, ROWS, CHANNELS)
    g = tl.load(dout + place, mask=valid, other=0.0).to(tl.float32)
    tl.store(dy + place, g * a + b, mask=valid)


# --- launches ----------------------------------------------------------------------------------------------------


class _Launch:
    """How the maps are cut, and the kernels' arguments that say so."""

    def __init__(self, y: Tensor, squeeze_weight: Tensor) -> None:
        self.batch, height, width, self.channels = y.shape
        self.pixels, self.narrow = height * width, squeeze_weight.shape[0]
        columns = triton.next_power_of_2(self.channels)
        rows = max(1, TILE // columns)
        self.tiles = triton.cdiv(self.pixels, rows)  # of an image
        self.constants = {"ROWS": rows, "CHANNELS": columns, "num_warps": 4}
        self.image_constants = {
            "SUMMED": SUMMED,
            "CHANNELS": columns,
            "NARROW": triton.next_power_of_2(self.narrow),
            "num_warps": 8,
        }
        processors = torch.cuda.get_device_properties(y.device).multi_processor_count if y.is_cuda else 1
        programs = PROGRAMS_PER_PROCESSOR * processors // max(1, self.batch)
        self.programs = max(1, min(self.tiles, programs))  # of an image that sum

    def rows(self, y: Tensor, *shape: int) -> Tensor:
        return y.new_empty((self.batch, *shape), dtype=torch.float32)


def attend_channels_forward(
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    squeeze_weight: Tensor,
    squeeze_bias: Tensor,
    excite_weight: Tensor,
    excite_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`glmamba_monai.ops.attend_channels`.

    Returns:
        The result; the means `(B, C)`, the squeezed ones `(B, S)` after the ReLU, and the attention `(B, C)`.
    """
    launch = _Launch(y, squeeze_weight)
    x, y = x.contiguous(), y.contiguous()
    shape, has_bias = (launch.pixels, launch.channels), bias is not None
    partial = launch.rows(y, launch.programs, launch.channels)
    pooled, squeezed, attention = (launch.rows(y, n) for n in (launch.channels, launch.narrow, launch.channels))
    given = excite_bias if bias is None else bias
    parameters = [p.float().contiguous() for p in (given, squeeze_weight, squeeze_bias, excite_weight, excite_bias)]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        with torch.cuda.device_of(x):
            _pool_kernel[(launch.batch * launch.programs,)](y, partial, *shape, launch.programs, **launch.constants)
            _attention_kernel[(launch.batch,)](
                *(partial, *parameters, pooled, squeezed, attention, *shape, launch.narrow, launch.programs),
                HAS_BIAS=has_bias,
                **launch.image_constants,
            )
            _attend_kernel[(launch.batch * launch.tiles,)](
                x, y, parameters[0], attention, out, *shape, launch.tiles, HAS_BIAS=has_bias, **launch.constants
            )
    return out, pooled, squeezed, attention


def attend_channels_backward(
    dout: Tensor,
    y: Tensor,
    bias: Tensor | None,
    squeeze_weight: Tensor,
    excite_weight: Tensor,
    pooled: Tensor,
    squeezed: Tensor,
    attention: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of y and, one after the other in float32, of the bias, of squeeze's weight and bias and of excite's.

    That of x is `dout`.
    """
    launch = _Launch(y, squeeze_weight)
    dout, y = dout.contiguous(), y.contiguous()
    channels, narrow, has_bias = launch.channels, launch.narrow, bias is not None
    partial = launch.rows(y, launch.programs, 2, channels)
    shift, gradients = launch.rows(y, channels), launch.rows(y, 2 * channels + narrow + 2 * channels * narrow)
    given = (attention if bias is None else bias).float().contiguous()
    weights = [w.float().contiguous() for w in (squeeze_weight, excite_weight)]
    dy = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if y.numel():
        with torch.cuda.device_of(y):
            _sums_backward_kernel[(launch.batch * launch.programs,)](
                *(dout, y, given, partial, launch.pixels, channels, launch.programs),
                HAS_BIAS=has_bias,
                **launch.constants,
            )
            _attention_backward_kernel[(launch.batch,)](
                *(partial, *weights, pooled, squeezed, attention, shift, gradients),
                *(launch.pixels, channels, narrow, launch.programs),
                **launch.image_constants,
            )
            _map_backward_kernel[(launch.batch * launch.tiles,)](
                dout, attention, shift, dy, launch.pixels, channels, launch.tiles, **launch.constants
            )
    else:
        gradients.zero_()
    return dy, gradients.sum(0)
