"""SiLU of a 3x3 depthwise convolution as Triton kernels (CUDA), forward and backward.

A program owns a few channels of a strip of columns and walks down some of its lines. Of each line it loads the strip
three times, shifted by -1, 0 and 1 columns, adds it to the three output lines that it belongs to, and keeps those in
registers; so a map is read once from memory and three times from the first-level cache.

The backward pass finds dz, the gradient before SiLU, which needs the convolution once more, and stores it. Then one
walk over dz gives the gradients of input, weight and bias.
"""

# ruff: noqa: ANN001, ANN202 (types of the kernels' arguments are Triton's)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["depthwise_silu_backward", "depthwise_silu_forward"]

COLUMNS, CHANNELS, LINES = 8, 32, 12  # of a program of the forward kernel and of that for dz
BACKWARD_COLUMNS, BACKWARD_CHANNELS, BACKWARD_LINES = 4, 32, 30


@triton.jit
def _strip(map_, line, column, d, begin, end, width, channels):
    """A strip of one line (COLUMNS, CHANNELS) in float32; zero beside the map, and but for lines from begin to end."""
    there = (column >= 0) & (column < tl.where((line >= begin) & (line < end), width, 0))
    place = (line * width + column)[:, None] * channels + d[None, :]
    return tl.load(map_ + place, mask=there[:, None] & (d < channels)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _tap(weight, index: tl.constexpr, d, channels):
    """What the channels are multiplied with at one of the nine places, (1, CHANNELS)."""
    return tl.load(weight + d * 9 + index, mask=d < channels, other=0.0)[None, :]


@triton.jit
def _convolution_kernel(
    x, weight, bias, dout,
    out,  # SiLU(z), or dz when BACKWARD
    height, width, channels,
    BACKWARD: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """z, the convolution with its bias, line by line; from it SiLU(z) or, with `dout`, the gradient dz."""
    blocks = tl.cdiv(channels, CHANNELS)
    d = (tl.program_id(0) % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    column = (tl.program_id(0) // blocks) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * LINES
    image = tl.program_id(2).to(tl.int64) * height * width * channels
    x += image
    dout += image
    out += image
    w0, w1, w2 = _tap(weight, 0, d, channels), _tap(weight, 1, d, channels), _tap(weight, 2, d, channels)
    w3, w4, w5 = _tap(weight, 3, d, channels), _tap(weight, 4, d, channels), _tap(weight, 5, d, channels)
    w6, w7, w8 = _tap(weight, 6, d, channels), _tap(weight, 7, d, channels), _tap(weight, 8, d, channels)
    start = tl.zeros((COLUMNS, CHANNELS), tl.float32) + tl.load(bias + d, mask=d < channels, other=0.0)[None, :]
    above, here = start, start  # z of the line above, which the line read next completes, and of that line
    for i in range(-1, LINES + 1):
        line = first + i
        left = _strip(x, line, column - 1, d, 0, height, width, channels)
        middle = _strip(x, line, column, d, 0, height, width, channels)
        right = _strip(x, line, column + 1, d, 0, height, width, channels)
        z = above + w6 * left + w7 * middle + w8 * right
        above = here + w3 * left + w4 * middle + w5 * right
        here = start + w0 * left + w1 * middle + w2 * right
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        complete = column < tl.where((line > first) & (line <= height), width, 0)
        if BACKWARD:
            slope = sigmoid * (1.0 + z * (1.0 - sigmoid))
            z = _strip(dout, line - 1, column, d, first, height, width, channels) * slope
        else:
            z *= sigmoid
        place = ((line - 1) * width + column)[:, None] * channels + d[None, :]
        tl.store(out + place, z, mask=complete[:, None] & (d < channels)[None, :])


@triton.jit
def _gradient_kernel(
    dz, x, weight, dx,
    sums,  # (programs of the other axes, 10, channels): of the weight's nine places and of the bias
    height, width, channels,
    LINES: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradients of the input, and each program's share of those of weight and bias."""
    blocks = tl.cdiv(channels, CHANNELS)
    d = (tl.program_id(0) % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    column = (tl.program_id(0) // blocks) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * LINES
    last = tl.minimum(first + LINES, height)
    image = tl.program_id(2).to(tl.int64) * height * width * channels
    dz += image
    x += image
    dx += image
    w0, w1, w2 = _tap(weight, 0, d, channels), _tap(weight, 1, d, channels), _tap(weight, 2, d, channels)
    w3, w4, w5 = _tap(weight, 3, d, channels), _tap(weight, 4, d, channels), _tap(weight, 5, d, channels)
    w6, w7, w8 = _tap(weight, 6, d, channels), _tap(weight, 7, d, channels), _tap(weight, 8, d, channels)
    zero = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    s0, s1, s2, s3, s4, s5, s6, s7, s8, s9 = zero, zero, zero, zero, zero, zero, zero, zero, zero, zero
    above, here = zero, zero  # dx of the line above and of this line
    x_above, x_here = zero, zero  # the input there; zero for lines of other programs, whose sums they are
    for i in range(-1, LINES + 1):
        line = first + i
        x_below = _strip(x, line + 1, column, d, first, last, width, channels)
        left = _strip(dz, line, column - 1, d, 0, height, width, channels)
        middle = _strip(dz, line, column, d, 0, height, width, channels)
        right = _strip(dz, line, column + 1, d, 0, height, width, channels)
        # The output at a place came from the inputs around it: x[p + o] had the weight of o.
        done = above + w2 * left + w1 * middle + w0 * right
        above = here + w5 * left + w4 * middle + w3 * right
        here = w8 * left + w7 * middle + w6 * right
        s0 += right * x_above
        s1 += middle * x_above
        s2 += left * x_above
        s3 += right * x_here
        s4 += middle * x_here
        s5 += left * x_here
        s6 += right * x_below
        s7 += middle * x_below
        s8 += left * x_below
        s9 += tl.where((line >= first) & (line < last), middle, 0.0)
        x_above, x_here = x_here, x_below
        complete = column < tl.where((line > first) & (line <= height), width, 0)
        place = ((line - 1) * width + column)[:, None] * channels + d[None, :]
        tl.store(dx + place, done, mask=complete[:, None] & (d < channels)[None, :])
    strip = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.cdiv(width, COLUMNS)
    sums += (strip + tl.program_id(0) // blocks).to(tl.int64) * 10 * channels + d
    d_valid = d < channels
    tl.store(sums, tl.sum(s0, 0), mask=d_valid)
    tl.store(sums + channels, tl.sum(s1, 0), mask=d_valid)
    tl.store(sums + 2 * channels, tl.sum(s2, 0), mask=d_valid)
    tl.store(sums + 3 * channels, tl.sum(s3, 0), mask=d_valid)
    tl.store(sums + 4 * channels, tl.sum(s4, 0), mask=d_valid)
    tl.store(sums + 5 * channels, tl.sum(s5, 0), mask=d_valid)
    tl.store(sums + 6 * channels, tl.sum(s6, 0), mask=d_valid)
    tl.store(sums + 7 * channels, tl.sum(s7, 0), mask=d_valid)
    tl.store(sums + 8 * channels, tl.sum(s8, 0), mask=d_valid)
    tl.store(sums + 9 * channels, tl.sum(s9, 0), mask=d_valid)


# --- launches ----------------------------------------------------------------------------------------------------


def _grid(x: Tensor, columns: int, channels: int, lines: int) -> tuple[int, int, int]:
    batch, height, width, depth = x.shape
    return triton.cdiv(depth, channels) * triton.cdiv(width, columns), triton.cdiv(height, lines), batch


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, dout: Tensor, out: Tensor, backward: bool) -> None:
    constants: dict[str, Any] = {"LINES": LINES, "COLUMNS": COLUMNS, "CHANNELS": CHANNELS, "num_warps": 1}
    if x.numel():
        with torch.cuda.device_of(x):
            _convolution_kernel[_grid(x, COLUMNS, CHANNELS, LINES)](
                x, weight, bias, dout, out, *x.shape[1:], BACKWARD=backward, **constants
            )


def depthwise_silu_forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See :func:`glmamba_monai.ops.depthwise_silu`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _convolve(x, weight.float().contiguous(), bias.float().contiguous(), x, out, backward=False)
    return out


def depthwise_silu_backward(dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    x, dout = x.contiguous(), dout.contiguous()
    flat = weight.float().contiguous()
    dz, dx = torch.empty_like(x), torch.empty_like(x)
    _convolve(x, flat, bias.float().contiguous(), dout, dz, backward=True)
    lines = BACKWARD_LINES
    grid = _grid(x, BACKWARD_COLUMNS, BACKWARD_CHANNELS, lines)
    strips = triton.cdiv(x.shape[2], BACKWARD_COLUMNS) * grid[1] * grid[2]
    sums = torch.empty((strips, 10, x.shape[3]), dtype=torch.float32, device=x.device)
    if x.numel():
        with torch.cuda.device_of(x):
            _gradient_kernel[grid](
                *(dz, x, flat, dx, sums, *x.shape[1:]),
                **{"LINES": lines, "COLUMNS": BACKWARD_COLUMNS, "CHANNELS": BACKWARD_CHANNELS, "num_warps": 1},
            )
    total = sums.sum(0)
    return dx, total[:9].t().reshape(weight.shape).to(weight.dtype), total[9].to(bias.dtype)
