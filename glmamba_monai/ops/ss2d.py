"""The four-direction selective scan of a feature map (SS2D), with gradients for every input.

Everything is stored at map positions, channels last; a direction is only an order of visiting them: 0 along the rows
(left to right, row after row), 1 along the columns, 2 and 3 the same backwards. Sequence by sequence
(docs/method.md):

    dt_t = softplus(delta_t + delta_bias)
    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t,    y_t = sum over states of C_t h_t + D u_t
"""

from typing import Any

import torch
from torch import Tensor

from glmamba_monai.ops import backends
from glmamba_monai.ops.selective_scan import selective_scan


__all__ = ["ss2d_scan"]

K = 4  # directions


def ss2d_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    local: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Scan a map along its rows and columns, both ways, and sum the four outputs in place.

    Computed in float32 (float64 stays), also under autocast; half-precision inputs are read as they are.

    Args:
        u: input, `(B, H, W, D)`.
        delta: time step before bias and softplus, `(B, H, W, K, D)` with K = 4 directions.
        A: `(K, D, N)`, negative for a decaying state.
        B: input matrix, `(B, H, W, K, N)`.
        C: output matrix, `(B, H, W, K, N)`.
        D: skip weight, `(K, D)`.
        delta_bias: added to `delta`, `(K, D)`.
        local: scan each of the four quadrants on its own instead of the whole map.
        backend: `"triton"`, `"mamba_ssm"`, `"native"`, `"torch"` or None (environment variable, else automatic).

    Returns:
        y, `(B, H, W, D)`, in float32 (float64 for float64 inputs): the sum of four outputs deserves it, and the
        normalisation that follows computes in float32 anyway. On the meta device an empty tensor of that shape.

    Raises:
        ValueError: a shape does not fit, H or W is odd though `local`, or the backend's name is unknown.
        TypeError: float64 with a backend that has no such kernel.
        RuntimeError: the backend asked for is not available.

    Source: GLMamba, Fig. 2A and equations 1-4; Gu and Dao, "Mamba", 2023, equation 2.
    """
    _check_shapes(u, delta, A, B, C, D, delta_bias, local)
    if u.is_meta:
        return u.new_empty(u.shape, dtype=torch.float32)
    if torch.jit.is_scripting():
        if backend is not None and backend != "torch":
            raise ValueError(f"backend: found {backend}, expected 'torch' or None in a scripted module")
        return _by_sequences(u, delta, A, B, C, D, delta_bias, local, "torch")
    name = backends.select_backend("ss2d_scan", u.is_cuda, backend, u.dtype)
    return _IMPLEMENTATIONS[name](u, delta, A, B, C, D, delta_bias, local)


def _check_shapes(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor, local: bool
) -> None:
    if u.dim() != 4 or u.shape[1] < 1 or u.shape[2] < 1:
        raise ValueError(f"u: found shape {list(u.shape)}, expected (B, H, W, D)")
    if A.dim() != 3:
        raise ValueError(f"A: found shape {list(A.shape)}, expected (K, D, N)")
    batch, height, width, channels = u.shape
    if local and (height % 2 != 0 or width % 2 != 0):
        raise ValueError(f"u: found a map of {height} x {width}, expected even sides to cut it into quadrants")
    states = A.shape[2]
    _check_shape("delta", delta, [batch, height, width, K, channels])
    _check_shape("A", A, [K, channels, states])
    _check_shape("B", B, [batch, height, width, K, states])
    _check_shape("C", C, [batch, height, width, K, states])
    _check_shape("D", D, [K, channels])
    _check_shape("delta_bias", delta_bias, [K, channels])


def _check_shape(name: str, tensor: Tensor, expected: list[int]) -> None:
    if list(tensor.shape) != expected:
        raise ValueError(f"{name}: found shape {list(tensor.shape)}, expected {expected} (from u and A)")


# --- backends "torch" and "mamba_ssm": four sequences, prepared in memory -----------------------------------------


def _by_sequences(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    local: bool,
    backend: str,
) -> Tensor:
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    height, width = u.shape[1], u.shape[2]
    if local:
        u, delta, B, C = split_quadrants(u), split_quadrants(delta), split_quadrants(B), split_quadrants(C)
    u_ = torch.stack([u, u, u, u], dim=3)  # (B, H, W, K, D)
    y = selective_scan(
        _to_sequences(u_.to(dtype)).flatten(1, 2),
        _to_sequences(delta.to(dtype)).flatten(1, 2),
        A.to(dtype).flatten(0, 1),
        _to_sequences(B.to(dtype)),
        _to_sequences(C.to(dtype)),
        D.to(dtype).flatten(),
        delta_bias.to(dtype).flatten(),
        True,
        backend,
    )  # (B, K*D, L)
    y = _sum_of_maps(y.view(y.shape[0], K, -1, y.shape[2]), u.shape[1], u.shape[2])
    return join_quadrants(y, height, width) if local else y


def _to_sequences(x: Tensor) -> Tensor:
    """(B, H, W, K, C) at map positions to (B, K, C, L) in the order of each direction."""
    rows = x.permute(0, 3, 4, 1, 2).flatten(3)
    columns = x.permute(0, 3, 4, 2, 1).flatten(3)
    sequences = [rows[:, 0], columns[:, 1], rows[:, 2].flip(-1), columns[:, 3].flip(-1)]
    return torch.stack(sequences, dim=1)


def _sum_of_maps(y: Tensor, height: int, width: int) -> Tensor:
    """(B, K, D, L) in the order of each direction to the sum at map positions, (B, H, W, D)."""
    rows = (y[:, 0] + y[:, 2].flip(-1)).unflatten(-1, [height, width])
    columns = (y[:, 1] + y[:, 3].flip(-1)).unflatten(-1, [width, height])
    return (rows + columns.transpose(2, 3)).permute(0, 2, 3, 1).contiguous()


def split_quadrants(x: Tensor) -> Tensor:
    """Cut `(B, H, W, ...)`, H and W even, into its 2x2 quadrants `(4B, H/2, W/2, ...)`."""
    x = x.unflatten(1, [2, x.shape[1] // 2]).unflatten(3, [2, x.shape[2] // 2])  # (B, 2, H/2, 2, W/2, ...)
    return x.transpose(2, 3).flatten(0, 2)


def join_quadrants(x: Tensor, height: int, width: int) -> Tensor:
    """Undo :func:`split_quadrants`."""
    x = x.unflatten(0, [x.shape[0] // 4, 2, 2])  # (B, 2, 2, H/2, W/2, ...)
    return x.transpose(2, 3).flatten(1, 2).flatten(2, 3)


def _torch_ss2d(*arguments: Any) -> Tensor:
    return _by_sequences(*arguments, "torch")


def _mamba_ssm_ss2d(*arguments: Any) -> Tensor:
    return _by_sequences(*arguments, "mamba_ssm")
