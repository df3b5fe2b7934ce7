"""The scan's time step from its low-rank form as a Triton kernel (CUDA): projection, bias and softplus in one pass.

The time step is the largest map of the network, four times the scan's input, so what counts is to write it once. The
scan's own kernels would compute the softplus of a number once for every lane that shares its states.
"""

# ruff: noqa: ANN001, ANN202 (types of the kernels' arguments are Triton's)

import torch
import triton
import triton.language as tl
from torch import Tensor

from glmamba_monai.ops.triton_ss2d import per_token, softplus_of

__all__ = ["time_step"]

TILE = 4096  # numbers of a tile


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
