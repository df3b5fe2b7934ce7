"""The four-direction selective scan of a feature map (SS2D), with gradients for every input.

Everything is stored at map positions, channels last; a direction is only an order of visiting them: 0 along the rows
(left to right, row after row), 1 along the columns, 2 and 3 the same backwards. Sequence by sequence
(docs/method.md):

    dt_t = softplus(delta_t + delta_bias)
    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t,    y_t = sum over states of C_t h_t + D u_t
"""

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glmamba_monai.ops import backends, native
from glmamba_monai.ops.selective_scan import selective_scan
from glmamba_monai.ops.shapes import check_shape

__all__ = ["projected_ss2d_scan", "ss2d_scan"]


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

    Computed in float32 (float64 stays), also under autocast; gradients have the dtypes of their inputs. A training step
    keeps no tensor of all states: they are recomputed. A scripted module runs the backend torch.

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
        return u.new_empty(u.shape, dtype=torch.float64 if u.dtype == torch.float64 else torch.float32)
    if torch.jit.is_scripting():
        if backend is not None and backend != "torch":
            raise ValueError(f"backend: found {backend}, expected 'torch' or None in a scripted module")
        y = _by_sequences(u, delta, A, B, C, D, delta_bias, local, "torch")
    else:
        name = backends.backend_for("ss2d_scan", u, backend)
        y = _IMPLEMENTATIONS[name](u, delta, A, B, C, D, delta_bias, local)
    return y


def _check_shapes(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor, local: bool
) -> None:
    if u.dim() != 4 or min(u.shape) < 1:
        raise ValueError(f"u: found shape {list(u.shape)}, expected (B, H, W, D), each at least 1")
    if A.dim() != 3 or A.shape[2] < 1:
        raise ValueError(f"A: found shape {list(A.shape)}, expected (K, D, N) with N >= 1")
    batch, height, width, channels = u.shape
    if local and (height % 2 != 0 or width % 2 != 0):
        raise ValueError(f"u: found a map of {height} x {width}, expected even sides to cut it into quadrants")
    states = A.shape[2]
    check_shape("delta", delta, [batch, height, width, 4, channels], "u and A")
    check_shape("A", A, [4, channels, states], "u and A")
    check_shape("B", B, [batch, height, width, 4, states], "u and A")
    check_shape("C", C, [batch, height, width, 4, states], "u and A")
    check_shape("D", D, [4, channels], "u and A")
    check_shape("delta_bias", delta_bias, [4, channels], "u and A")


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
    y = _sum_of_maps(y.view(y.shape[0], 4, -1, y.shape[2]), u.shape[1], u.shape[2])
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


# --- backends "triton" and "native": one operator of torch, with a kernel per device -------------------------------
# Beside y the operator returns what its backward pass starts from: the states that the native kernels noted, or what
# each chunk of the Triton kernels adds to the states, and that chunk's sum of time steps (empty for the native ones).
# Without delta_bias, delta is the time step itself, after softplus, but the gradients of both are still those before
# softplus: this is for `projected_ss2d_scan` and the Triton kernels alone. `training` is a hint that a backward pass
# will follow, which an operator's kernels cannot see: the Triton kernels cut the map for it.

torch.library.define(
    "glmamba::ss2d_scan",
    "(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor? delta_bias, bool local,"
    " bool training=False) -> (Tensor y, Tensor states, Tensor time_steps)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "glmamba::ss2d_scan_backward",
    "(Tensor grad_y, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor? delta_bias, bool local,"
    " Tensor states, Tensor time_steps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("glmamba::ss2d_scan", "cuda")
def _triton_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return backends.load_backend("ss2d_scan", "triton").forward(*arguments)


@torch.library.impl("glmamba::ss2d_scan", "cpu")
def _native_forward(u: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    y, states = backends.load_backend("ss2d_scan", "native").scan_forward(u, *arguments[:7])
    return y, states, u.new_empty((0,))  # a tuple, for MONAI's MetaTensor takes no number


@torch.library.register_fake("glmamba::ss2d_scan")
def _fake_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor | None,
    local: bool,
    training: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    y = u.new_empty(u.shape, dtype=torch.float32)
    batch, height, width, channels = u.shape
    if u.is_cuda:
        launch = backends.load_backend("ss2d_scan", "triton")._Launch(u, A, local, training=training)
        return y, launch.zeros_per_chunk(u, launch.states, channels), launch.zeros_per_chunk(u, channels)
    regions, length = (4 * batch, height // 2 * (width // 2)) if local else (batch, height * width)
    chunks, blocks, groups = (
        -(-count // size)
        for count, size in ((length, native.STEPS), (channels, native.BLOCK), (A.shape[2], native.GROUP))
    )
    states = u.new_empty((regions, 4, chunks, blocks, groups * native.GROUP, native.BLOCK))
    return y, states, u.new_empty((0,))


@torch.library.impl("glmamba::ss2d_scan_backward", "cuda")
def _triton_backward(grad_y: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    gradients = backends.load_backend("ss2d_scan", "triton").backward(grad_y, *arguments)
    return _as_inputs(gradients, arguments[:7])


@torch.library.impl("glmamba::ss2d_scan_backward", "cpu")
def _native_backward(grad_y: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    gradients = backends.load_backend("ss2d_scan", "native").scan_backward(grad_y, *arguments[:-1])
    return _as_inputs(gradients, arguments[:7])


def _as_inputs(gradients: tuple[Tensor, ...], inputs: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """Gradients in the dtypes of the inputs, contiguous; but delta's, the largest, in the memory order of delta."""
    du, ddelta, *others = (g if x is None else g.to(x.dtype) for g, x in zip(gradients, inputs))
    if ddelta.stride() != torch.empty_like(inputs[1], device="meta").stride():
        ddelta = torch.empty_like(inputs[1]).copy_(ddelta)
    return du.contiguous(), ddelta, *(x.contiguous() for x in others)


@torch.library.register_fake("glmamba::ss2d_scan_backward")
def _fake_backward(grad_y: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    u, delta, *others = arguments[:6]
    D = others[-1]  # delta_bias, which need not be there, has its shape
    return u.new_empty(u.shape), torch.empty_like(delta), *(x.new_empty(x.shape) for x in (*others, D))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.local, _ = inputs
    assert tensors[6] is not None, "delta_bias"
    _, states, time_steps = output
    ctx.mark_non_differentiable(states, time_steps)
    ctx.set_materialize_grads(False)  # else zeros as large as the states
    ctx.save_for_backward(*tensors, states, time_steps)


def _differentiate(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *tensors, states, time_steps = ctx.saved_tensors
    gradients = torch.ops.glmamba.ss2d_scan_backward.default(grad_y, *tensors, ctx.local, states, time_steps)
    return *gradients, None, None


def _differentiate_twice(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("ss2d_scan: its gradients cannot be differentiated again")


torch.library.register_autograd("glmamba::ss2d_scan", _differentiate, setup_context=_save)
torch.library.register_autograd("glmamba::ss2d_scan_backward", _differentiate_twice)


def _as_read(x: Tensor) -> Tensor:
    """A sequence as the kernels read it: in float32, but on a GPU half precision as it is."""
    return backends.for_triton(x) if x.is_cuda else x.float()


def _needs_gradients(*inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def _kernel_ss2d(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor, local: bool
) -> Tensor:
    u, delta, B, C = (_as_read(x) for x in (u, delta, B, C))
    A, D, delta_bias = A.float(), D.float(), delta_bias.float()
    training = _needs_gradients(u, delta, A, B, C, D, delta_bias)
    return torch.ops.glmamba.ss2d_scan.default(u, delta, A, B, C, D, delta_bias, local, training)[0]


_IMPLEMENTATIONS = {
    "triton": _kernel_ss2d,
    "mamba_ssm": _mamba_ssm_ss2d,
    "native": _kernel_ss2d,
    "torch": _torch_ss2d,
}


# --- the time step in its low-rank form ---------------------------------------------------------------------------


def projected_ss2d_scan(
    u: Tensor,
    dt: Tensor,
    dt_proj: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    local: bool = False,
    backend: str | None = None,
) -> Tensor:
    """:func:`ss2d_scan` with the time step `delta = dt dt_proj^T`.

    `delta` is the largest map of all, four times `u`: the kernels' training step does not keep it, but makes it again.

    Args:
        u: input, `(B, H, W, D)`.
        dt: `(B, H, W, K, R)`.
        dt_proj: `(K, D, R)`.
        A, B, C, D, delta_bias, local, backend: as in :func:`ss2d_scan`.

    Returns:
        y, `(B, H, W, D)`, as :func:`ss2d_scan`.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`ss2d_scan`.
    """
    check_shape("dt", dt, [u.shape[0], u.shape[1], u.shape[2], 4, dt_proj.shape[-1]], "u and A")
    check_shape("dt_proj", dt_proj, [4, u.shape[3], dt.shape[-1]], "u and A")
    if torch.jit.is_scripting():
        return ss2d_scan(u, _project(dt, dt_proj), A, B, C, D, delta_bias, local, backend)
    else:  # TorchScript compiles one branch only
        name = "torch" if u.is_meta else backends.backend_for("ss2d_scan", u, backend)
        if name in ("torch", "mamba_ssm"):
            return ss2d_scan(u, _project(dt, dt_proj), A, B, C, D, delta_bias, local, backend)
        training = _needs_gradients(u, dt, dt_proj, A, B, C, D, delta_bias)
        return _ProjectedScan.apply(u, dt, dt_proj, A, B, C, D, delta_bias, local, training)


def _project(dt: Tensor, dt_proj: Tensor) -> Tensor:
    """`delta`, `(B, H, W, K, D)`, in the dtype of `dt`.

    A product for each row of the map: the gradient of dt_proj, tiny and over all positions, is then a sum of many
    small products, not a single one that few of a GPU's processors could work at.
    """
    weight = dt_proj.to(dt.dtype).transpose(1, 2)[:, None, None]  # (K, 1, 1, R, D)
    return torch.matmul(dt.permute(3, 0, 1, 2, 4), weight).permute(1, 2, 3, 0, 4)


class _ProjectedScan(torch.autograd.Function):
    """The operator `glmamba::ss2d_scan`, keeping `dt` in place of `delta`.

    On a GPU the projection, the bias and the softplus are one kernel; on the CPU the scan's does the last two.
    """

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        dt: Tensor,
        dt_proj: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        delta_bias: Tensor,
        local: bool,
        training: bool,
    ) -> Tensor:
        ctx.dtypes = [x.dtype for x in (u, dt, dt_proj, A, B, C, D, delta_bias)]
        u, dt, B, C = (_as_read(x) for x in (u, dt, B, C))
        dt_proj, A, D, delta_bias = (x.float() for x in (dt_proj, A, D, delta_bias))
        with torch.autocast(u.device.type, enabled=False):
            delta, bias = _scanned(dt, dt_proj, delta_bias)
            _check_shapes(u, delta, A, B, C, D, delta_bias, local)
            y, states, time_steps = torch.ops.glmamba.ss2d_scan.default(u, delta, A, B, C, D, bias, local, training)
        ctx.save_for_backward(u, dt, dt_proj, A, B, C, D, delta_bias, states, time_steps)
        ctx.local = local
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        u, dt, dt_proj, A, B, C, D, delta_bias, states, time_steps = ctx.saved_tensors
        with torch.autocast(u.device.type, enabled=False):
            delta, bias = _scanned(dt, dt_proj, delta_bias)
            du, ddelta, *others = torch.ops.glmamba.ss2d_scan_backward.default(
                grad_y, u, delta, A, B, C, D, bias, ctx.local, states, time_steps
            )
            ddt, ddt_proj = _project_backward(ddelta, dt, dt_proj)
            gradients = [du, ddt, ddt_proj, *others]
        return *(g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes)), None, None


def _scanned(dt: Tensor, dt_proj: Tensor, delta_bias: Tensor) -> tuple[Tensor, Tensor | None]:
    """`delta` and `delta_bias` as the operator takes them on this device."""
    if dt.is_cuda:
        return torch.ops.glmamba.time_step.default(dt, dt_proj, delta_bias), None
    # One product for all directions, where the native kernels read it: four times the multiply-adds, but four products
    # of rank 6 take three times as long, and then their results lie direction by direction.
    return F.linear(dt.flatten(3), torch.block_diag(*dt_proj)).unflatten(-1, dt_proj.shape[:2]), delta_bias


def _project_backward(ddelta: Tensor, dt: Tensor, dt_proj: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `dt` and `dt_proj` from that of `delta`."""
    if ddelta.is_cuda:
        return torch.ops.glmamba.time_step_backward.default(ddelta, dt, dt_proj)
    tokens = ddelta.flatten(3).flatten(0, 2)  # (B H W, K D), as in _scanned
    ddt = torch.mm(tokens, torch.block_diag(*dt_proj)).view(dt.shape)
    every = torch.mm(tokens.t(), dt.flatten(3).flatten(0, 2))  # of every direction with every other
    return ddt, every.view(*dt_proj.shape[:2], *dt.shape[3:]).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


torch.library.define(
    "glmamba::time_step",
    "(Tensor dt, Tensor dt_proj, Tensor delta_bias) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("glmamba::time_step", "cuda")
def _triton_time_step(dt: Tensor, dt_proj: Tensor, delta_bias: Tensor) -> Tensor:
    kernels = importlib.import_module("glmamba_monai.ops.triton_time_step")  # of the scan's backend "triton"
    return kernels.time_step(dt, dt_proj, delta_bias)


@torch.library.register_fake("glmamba::time_step")
def _fake_time_step(dt: Tensor, dt_proj: Tensor, delta_bias: Tensor) -> Tensor:
    batch, height, width, directions, _ = dt.shape
    return dt.new_empty((directions, batch, height, width, dt_proj.shape[1])).permute(1, 2, 3, 0, 4)


torch.library.define(
    "glmamba::time_step_backward",
    "(Tensor ddelta, Tensor dt, Tensor dt_proj) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("glmamba::time_step_backward", "cuda")
def _triton_time_step_backward(ddelta: Tensor, dt: Tensor, dt_proj: Tensor) -> tuple[Tensor, Tensor]:
    kernels = importlib.import_module("glmamba_monai.ops.triton_time_step")  # of the scan's backend "triton"
    # In float32 the kernel brings nothing (docs/performance.md), and its tile has all channels.
    if ddelta.dtype != torch.float32 and ddelta.shape[-1] <= kernels.MOST_CHANNELS:
        return kernels.time_step_backward(ddelta, dt, dt_proj)
    ddelta = ddelta.permute(3, 0, 1, 2, 4)  # (K, B, H, W, D)
    ddt = torch.matmul(ddelta, dt_proj.to(ddelta.dtype)[:, None, None]).permute(1, 2, 3, 0, 4)
    rows = torch.matmul(ddelta.transpose(3, 4), dt.permute(3, 0, 1, 2, 4))  # (K, B, H, D, R), see _project
    return ddt.contiguous(), rows.float().sum((1, 2))


@torch.library.register_fake("glmamba::time_step_backward")
def _fake_time_step_backward(ddelta: Tensor, dt: Tensor, dt_proj: Tensor) -> tuple[Tensor, Tensor]:
    return dt.new_empty(dt.shape), dt_proj.new_empty(dt_proj.shape, dtype=torch.float32)
