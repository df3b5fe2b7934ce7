"""The selective state-space scan of Mamba, with gradients for every input.

For every batch entry, direction, channel and state (docs/method.md):

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t,    y_t = sum over states of C_t h_t + D u_t

Symbols: b batch, k directions, d inner width, kd = k * d channels, n states, l length, t steps of one chunk.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glmamba_monai.ops import backends
from glmamba_monai.ops.shapes import check_shape

__all__ = ["selective_scan"]

# Steps per chunk. Measured on 2 busy CPU cores with 1 MB of L2 each (4 x 192 channels, 16 states): 64 is the fastest
# for one sequence of 14,400 and level with 32 for batches of shorter ones; from 128 on batches fall out of the cache.
CHUNK = 64


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    backend: str = "torch",
) -> Tensor:
    """Selective scan over sequences, one state matrix per channel, `B` and `C` shared by a direction's channels.

    The form by sequences, in plain PyTorch or by mamba-ssm, behind the backends of these names of `ss2d_scan`.
    Computed in float32 (float64 stays), also under autocast. In eager mode the memory of a training step does not
    grow with l * n; under `torch.jit.script` the same forward runs, differentiated step by step.

    Args:
        u: input, `(B, K*D, L)`; direction k owns the channels k*D to (k+1)*D - 1.
        delta: time step before bias and softplus, `(B, K*D, L)`.
        A: `(K*D, N)`, negative for a decaying state.
        B: input matrix, `(B, K, N, L)`.
        C: output matrix, `(B, K, N, L)`.
        D: skip weight, `(K*D,)`.
        delta_bias: added to `delta`, `(K*D,)`.
        delta_softplus: whether the time step is softplus(delta + delta_bias).
        backend: `"torch"` or `"mamba_ssm"`.

    Returns:
        y, `(B, K*D, L)`, in the dtype of `u`. On the meta device an empty tensor of that shape, to count costs.

    Raises:
        ValueError: a shape does not fit, or the backend's name is unknown.
        TypeError: float64 with `"mamba_ssm"`, which has no such kernel.
        RuntimeError: the backend asked for is not available.

    Source: Gu and Dao, "Mamba", 2023, equation 2 with their discretisation; GLMamba, SS2D.
    """
    _check_shapes(u, delta, A, B, C, D, delta_bias)
    if u.is_meta:
        return torch.empty_like(u)
    if torch.jit.is_scripting():
        if backend != "torch":
            raise ValueError(f"backend: found {backend}, expected 'torch' in a scripted module")
        y = _torch_scan(u, delta, A, B, C, D, delta_bias, delta_softplus)
    else:
        if backend not in _IMPLEMENTATIONS:
            raise ValueError(f"backend: found {backend}, expected one of {list(_IMPLEMENTATIONS)}")
        backends.select_backend("ss2d_scan", u.is_cuda, backend, u.dtype)  # for its errors
        y = _IMPLEMENTATIONS[backend](u, delta, A, B, C, D, delta_bias, delta_softplus)
    return y.to(u.dtype)


def _check_shapes(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None
) -> None:
    if u.dim() != 3 or u.shape[2] < 1:
        raise ValueError(f"u: found shape {list(u.shape)}, expected (B, K*D, L) with L >= 1")
    if B.dim() != 4:
        raise ValueError(f"B: found shape {list(B.shape)}, expected (B, K, N, L)")
    b, kd, length = u.shape
    k, n = B.shape[1], B.shape[2]
    if k < 1 or kd % k != 0:
        raise ValueError(f"B: found {k} directions, expected a divisor of the {kd} channels of u")
    check_shape("delta", delta, [b, kd, length], "u and B")
    check_shape("A", A, [kd, n], "u and B")
    check_shape("B", B, [b, k, n, length], "u and B")
    check_shape("C", C, [b, k, n, length], "u and B")
    if D is not None:
        check_shape("D", D, [kd], "u and B")
    if delta_bias is not None:
        check_shape("delta_bias", delta_bias, [kd], "u and B")


# --- backend "torch" ---------------------------------------------------------------------------------------------
# States are laid out (T, B, K, N, D): the width is last, so that every product below runs over contiguous memory.


def _steps_first(x: Tensor, k: int) -> Tensor:
    """One chunk of a per-channel sequence: (B, K*D, T) -> (T, B, K, 1, D)."""
    x = x.permute(2, 0, 1).contiguous()  # (T, B, K*D)
    return x.view(x.shape[0], x.shape[1], k, 1, x.shape[2] // k)


def _steps_last(x: Tensor) -> Tensor:
    """Undo `_steps_first`: (T, B, K, 1, D) -> (B, K*D, T)."""
    return x.flatten(2).permute(1, 2, 0)


def _state_major(A: Tensor, k: int) -> Tensor:
    """(K*D, N) -> (K, N, D)."""
    return A.view(k, A.shape[0] // k, A.shape[1]).transpose(1, 2).contiguous()


def _time_step(delta: Tensor, bias: Tensor | None, softplus: bool, k: int) -> tuple[Tensor, Tensor]:
    """delta + bias of one chunk `(B, K*D, T)` and the time step made from it, each (T, B, K, 1, D)."""
    raw = _steps_first(delta, k)
    if bias is not None:
        raw = raw + bias.view(k, 1, -1)
    return raw, F.softplus(raw) if softplus else raw


def _run_states(decay: Tensor, drive: Tensor, state: Tensor) -> Tensor:
    """All states h_t = decay_t h_{t-1} + drive_t of one chunk, (T, B, K, N, D).

    One operation per step over unbound views: an index into the whole tensor would cost a gradient of the whole
    tensor per step. Without gradients `drive` is overwritten, which spares a copy (about a fifth of the time).
    """
    if not torch.is_grad_enabled():
        for a, b in zip(decay.unbind(0), drive.unbind(0)):
            state = b.addcmul_(a, state)
        return drive
    states: list[Tensor] = []
    for a, b in zip(decay.unbind(0), drive.unbind(0)):
        state = torch.addcmul(b, a, state)
        states.append(state)
    return torch.stack(states)


def _scan_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    chunk: int = CHUNK,  # an argument, since TorchScript does not see a module's constants
) -> tuple[Tensor, Tensor]:
    """The scan chunk by chunk: y `(B, K*D, L)` and the state before each chunk `(chunks, B, K, N, D)`."""
    k = B.shape[1]
    A_ = _state_major(A, k)
    state = u.new_zeros(u.shape[0], k, A_.shape[1], A_.shape[2])
    outputs: list[Tensor] = []
    boundaries: list[Tensor] = []
    # Split, since the gradient of a slice is as long as the sequence, once per chunk.
    for u_c, delta_c, B_c, C_c in zip(u.split(chunk, 2), delta.split(chunk, 2), B.split(chunk, 3), C.split(chunk, 3)):
        B_, C_ = B_c.permute(3, 0, 1, 2), C_c.permute(3, 0, 1, 2)  # (T, B, K, N)
        u_ = _steps_first(u_c, k)  # (T, B, K, 1, D)
        _, dt = _time_step(delta_c, delta_bias, delta_softplus, k)
        # A clone, since a view would keep the whole chunk that the state ends.
        boundaries.append(state.clone())
        states = _run_states(torch.exp(dt * A_), (dt * u_) * B_.unsqueeze(-1), state)  # (T, B, K, N, D)
        state = states[-1]
        if torch.jit.is_scripting():
            # TorchScript cannot switch autocast off, which lowers the precision of a matmul, but not of this.
            y = (C_.unsqueeze(-1) * states).sum(-2, keepdim=True)
        else:
            y = torch.matmul(C_.unsqueeze(-2), states)  # (T, B, K, 1, D)
        if D is not None:
            y = torch.addcmul(y, u_, D.view(k, 1, -1))
        outputs.append(_steps_last(y))
    return torch.cat(outputs, 2), torch.stack(boundaries)


class _ChunkedScan(torch.autograd.Function):
    """`_scan_forward` that keeps only inputs and chunk-boundary states, with the adjoint scan as its backward."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
    ) -> Tensor:
        y, boundaries = _scan_forward(u, delta, A, B, C, D, delta_bias, delta_softplus)
        ctx.save_for_backward(u, delta, A, B, C, D, delta_bias, boundaries)
        ctx.delta_softplus = delta_softplus
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad_y.device.type, enabled=False):
            return _scan_backward(grad_y, *ctx.saved_tensors, ctx.delta_softplus)


def _scan_backward(
    grad_y: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    boundaries: Tensor,
    delta_softplus: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of `_scan_forward` in the order of its arguments (None for the flag).

    With g_t the gradient of h_t, the adjoint runs backwards: g_t = C_t grad_y_t + exp(dt_{t+1} A) g_{t+1}. Every
    input's gradient is then a sum over g of the same chunk, whose states are recomputed from its boundary.
    """
    k = B.shape[1]
    A_ = _state_major(A, k)
    grad_u, grad_delta = torch.empty_like(u), torch.empty_like(delta)
    grad_B, grad_C = torch.empty_like(B), torch.empty_like(C)
    grad_A = torch.zeros_like(A_)
    grad_D = None if D is None else D.new_zeros(k, 1, D.shape[0] // k)
    grad_bias = None if delta_bias is None else delta_bias.new_zeros(k, 1, delta_bias.shape[0] // k)
    next_decay = next_grad = torch.zeros_like(boundaries[0])  # (B, K, N, D)

    for i in reversed(range(boundaries.shape[0])):
        steps = slice(i * CHUNK, (i + 1) * CHUNK)
        B_ = B[..., steps].permute(3, 0, 1, 2)  # (T, B, K, N)
        C_ = C[..., steps].permute(3, 0, 1, 2)
        u_ = _steps_first(u[..., steps], k)  # (T, B, K, 1, D)
        raw, dt = _time_step(delta[..., steps], delta_bias, delta_softplus, k)
        dy = _steps_first(grad_y[..., steps], k)
        decay = torch.exp(dt * A_)  # (T, B, K, N, D)
        dt_u = dt * u_
        states = _run_states(decay, dt_u * B_.unsqueeze(-1), boundaries[i])

        grad_state = C_.unsqueeze(-1) * dy  # (T, B, K, N, D)
        for g, a in zip(reversed(grad_state.unbind(0)), reversed(decay.unbind(0))):
            next_grad = g.addcmul_(next_decay, next_grad)
            next_decay = a
        next_decay = next_decay.clone()  # decay is overwritten below

        grad_B[..., steps] = torch.matmul(grad_state, dt_u.transpose(-1, -2)).squeeze(-1).permute(1, 2, 3, 0)
        grad_C[..., steps] = torch.matmul(states, dy.transpose(-1, -2)).squeeze(-1).permute(1, 2, 3, 0)
        grad_dt_u = torch.matmul(B_.unsqueeze(-2), grad_state)  # (T, B, K, 1, D)

        grad_dt_A = decay.mul_(grad_state)  # times h_{t-1}: the gradient of the exponent dt_t A
        grad_dt_A[0] *= boundaries[i]
        grad_dt_A[1:] *= states[:-1]
        grad_A += (grad_dt_A * dt).sum((0, 1))
        grad_raw = (grad_dt_A * A_).sum(-2, keepdim=True).addcmul_(grad_dt_u, u_)  # (T, B, K, 1, D)
        if delta_softplus:
            grad_raw *= torch.sigmoid(raw)
        grad_delta[..., steps] = _steps_last(grad_raw)
        if grad_bias is not None:
            grad_bias += grad_raw.sum((0, 1))

        du = grad_dt_u.mul_(dt)
        if D is not None and grad_D is not None:
            du.addcmul_(dy, D.view(k, 1, -1))
            grad_D += (dy * u_).sum((0, 1))
        grad_u[..., steps] = _steps_last(du)

    return (
        grad_u,
        grad_delta,
        grad_A.transpose(1, 2).reshape(A.shape),
        grad_B,
        grad_C,
        None if grad_D is None else grad_D.flatten(),
        None if grad_bias is None else grad_bias.flatten(),
        None,
    )


def _torch_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    u, delta, A, B, C = u.to(dtype), delta.to(dtype), A.to(dtype), B.to(dtype), C.to(dtype)
    D = None if D is None else D.to(dtype)
    delta_bias = None if delta_bias is None else delta_bias.to(dtype)
    if torch.jit.is_scripting():
        y, _ = _scan_forward(u, delta, A, B, C, D, delta_bias, delta_softplus)
    else:
        with torch.autocast(u.device.type, enabled=False):
            y = _ChunkedScan.apply(u, delta, A, B, C, D, delta_bias, delta_softplus)
    return y


# --- backend "mamba_ssm" -----------------------------------------------------------------------------------------


class _MambaSsmScan(torch.autograd.Function):
    """The CUDA kernels of mamba-ssm. Its gate z is not used: None where the kernels take it."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
    ) -> Tensor:
        kernels = backends.load_backend("ss2d_scan", "mamba_ssm")
        y, states = kernels.fwd(u, delta, A, B, C, D, None, delta_bias, delta_softplus)[:2]
        ctx.save_for_backward(u, delta, A, B, C, D, delta_bias, states)
        ctx.delta_softplus = delta_softplus
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, D, delta_bias, states = ctx.saved_tensors
        kernels = backends.load_backend("ss2d_scan", "mamba_ssm")
        # After the states: z's gated output, a buffer for z's gradient (none) and whether to recompute that output.
        du, ddelta, dA, dB, dC, dD, dbias = kernels.bwd(
            u,
            delta,
            A,
            B,
            C,
            D,
            None,
            delta_bias,
            grad_y.contiguous(),
            states,
            None,
            None,
            ctx.delta_softplus,
            False,
        )[:7]
        return du, ddelta, dA, dB, dC, None if D is None else dD, None if delta_bias is None else dbias, None


def _mamba_ssm_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    # The kernels accumulate in float32 whatever the sequences' dtype, but want one dtype for all four, and contiguous.
    dtype = u.dtype
    if not (delta.dtype == B.dtype == C.dtype == dtype):
        dtype = torch.float32
    sequences = [x.to(dtype).contiguous() for x in (u, delta, B, C)]
    weights = [None if x is None else x.float().contiguous() for x in (A, D, delta_bias)]
    return _MambaSsmScan.apply(
        sequences[0],
        sequences[1],
        weights[0],
        sequences[2],
        sequences[3],
        weights[1],
        weights[2],
        delta_softplus,
    )


_IMPLEMENTATIONS = {"torch": _torch_scan, "mamba_ssm": _mamba_ssm_scan}
