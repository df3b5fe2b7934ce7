"""The scan's time step from its low-rank form as a Triton kernel (CUDA): projection, bias and softplus in one pass.

The time step is the largest map of the network, four times the scan's input, so what counts is to write it once, and to
read its gradient once. The scan's own kernels would compute the softplus of a number once for every lane that shares
its states.
"""

# ruff: noqa: ANN001, ANN202 (types of the kernels' arguments are Triton's)

import torch
import triton
import triton.language as tl
from torch import Tensor

from glmamba_monai.ops.triton_ss2d import per_token, softplus_of

__all__ = ["time_step", "time_step_backward"]

TILE = 4096  # numbers of a tile
GRADIENT_TOKENS = 32  # of a tile of the gradient, which has all channels
MOST_CHANNELS = 512  # of such a tile: more do not fit into the shared memory of small cards
PROGRAMS = 4  # of the gradient's kernel, for each multiprocessor
SMALLEST_PRODUCT = 16  # side of a matrix that the matrix units take


@triton.jit
def _numbers(pointer, place, valid):
    return tl.load(pointer + place, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _time_step_kernel(
    dt, weight, bias, out, positions, channels, token_stride, direction_stride,
    RANK: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    t_valid, d_valid = t < positions, d < channels
    raw = tl.zeros((TOKENS, CHANNELS), tl.float32) + _numbers(bias, k * channels + d, d_valid)[None, :]
    for r in tl.static_range(RANK):
        x = _numbers(dt, k * direction_stride + t * token_stride + r, t_valid)
        raw += x[:, None] * _numbers(weight, (k * channels + d) * RANK + r, d_valid)[None, :]
    place = (k * positions + t)[:, None] * channels + d[None, :]
    tl.store(out + place, softplus_of(raw), mask=t_valid[:, None] & d_valid[None, :])


def time_step(dt: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """softplus(dt weight^T + bias), computed in float32.

    Args:
        dt: `(B, H, W, K, R)`, K = 4 directions; float32, float16 or bfloat16.
        weight: `(K, D, R)`.
        bias: `(K, D)`.

    Returns:
        `(B, H, W, K, D)` in the dtype of `dt`, the directions outermost in memory.
    """
    dt, (token, direction) = per_token("dt", dt)
    batch, height, width, directions, rank = dt.shape
    channels, positions = weight.shape[1], batch * height * width
    out = torch.empty((directions, batch, height, width, channels), dtype=dt.dtype, device=dt.device)
    block = min(64, triton.next_power_of_2(channels))
    tokens = TILE // block
    with torch.cuda.device_of(dt):
        _time_step_kernel[(triton.cdiv(positions, tokens), triton.cdiv(channels, block), directions)](
            *(dt, weight.float().contiguous(), bias.float().contiguous(), out, positions, channels, token, direction),
            **{"RANK": rank, "TOKENS": tokens, "CHANNELS": block, "num_warps": 4},
        )
    return out.permute(1, 2, 3, 0, 4)


@triton.jit
def _gradient_kernel(
    grad, dt, weight, ddt, dweight, positions, channels, token_stride, direction_stride, grad_token, grad_direction,
    RANK: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    k = tl.program_id(1).to(tl.int64)
    d, r = tl.arange(0, CHANNELS), tl.arange(0, PADDED)
    d_valid, r_valid = d < channels, r < RANK
    matrix_valid = d_valid[:, None] & r_valid[None, :]
    place = (k * channels + d[:, None]) * RANK + r[None, :]
    matrix = tl.load(weight + place, mask=matrix_valid, other=0.0).to(grad.dtype.element_ty)
    total = tl.zeros((CHANNELS, PADDED), tl.float32)
    for tile in range(program, tl.cdiv(positions, TOKENS), programs):
        t = tl.arange(0, TOKENS).to(tl.int64) + tile * TOKENS
        t_valid = t < positions
        g_place = k * grad_direction + t[:, None] * grad_token + d[None, :]
        g = tl.load(grad + g_place, mask=t_valid[:, None] & d_valid[None, :], other=0.0)
        valid = t_valid[:, None] & r_valid[None, :]
        x_place = k * direction_stride + t[:, None] * token_stride + r[None, :]
        x = tl.load(dt + x_place, mask=valid, other=0.0).to(grad.dtype.element_ty)
        dx = tl.dot(g, matrix, input_precision="ieee")
        tl.store(ddt + (t[:, None] * tl.num_programs(1) + k) * RANK + r[None, :], dx, mask=valid)
        total = tl.dot(tl.trans(g), x, total, input_precision="ieee")
    out = dweight + program.to(tl.int64) * tl.num_programs(1) * channels * RANK + place
    tl.store(out, total, mask=matrix_valid)


def time_step_backward(grad: Tensor, dt: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `dt` and `weight` from that of `dt weight^T`, in one pass over it.

    Meant for half precision: `grad`, and the others rounded to its dtype. Float32 is multiplied exactly, without the
    matrix units. Sums are in float32, on one device always in the same order.

    Args:
        grad: `(B, H, W, K, D)`.
        dt: `(B, H, W, K, R)`.
        weight: `(K, D, R)`.

    Returns:
        `(B, H, W, K, R)` in the dtype of `dt`, and `(K, D, R)` in float32.
    """
    (grad, grad_strides), (dt, strides) = per_token("grad", grad), per_token("dt", dt)
    batch, height, width, directions, rank = dt.shape
    channels, positions = weight.shape[1], batch * height * width
    processors = torch.cuda.get_device_properties(dt.device).multi_processor_count if dt.is_cuda else 1
    programs = min(triton.cdiv(positions, GRADIENT_TOKENS), triton.cdiv(PROGRAMS * processors, directions))
    ddt = torch.empty(dt.shape, dtype=dt.dtype, device=dt.device)
    dweight = torch.empty((programs, *weight.shape), dtype=torch.float32, device=dt.device)
    constants = {
        "RANK": rank,
        "PADDED": max(SMALLEST_PRODUCT, triton.next_power_of_2(rank)),
        "TOKENS": GRADIENT_TOKENS,
        "CHANNELS": max(SMALLEST_PRODUCT, triton.next_power_of_2(channels)),
        "num_warps": 4,
    }
    with torch.cuda.device_of(dt):
        _gradient_kernel[(programs, directions)](
            *(grad, dt, weight.float().contiguous(), ddt, dweight, positions, channels, *strides, *grad_strides),
            **constants,
        )
    return ddt, dweight.sum(0)
