"""Cheap steps between the heavy ones, fused on a GPU so that each map is read once and written once.

The backends do the same sums; `"torch"` is the definition.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glmamba_monai.ops import backends

__all__ = ["bias_silu", "modulate", "norm_gate", "pixels_in_place"]


def norm_gate(
    y: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None = None, eps: float = 1e-5, backend: str | None = None
) -> Tensor:
    """LayerNorm over the last axis, times SiLU of a gate, computed in float32 (float64 stays).

    Args:
        y: `(..., D)`, what is normalised.
        weight: `(D,)`, scale after the normalisation.
        bias: `(D,)`, shift after it.
        gate: `(..., D)`, before SiLU; None for no gate.
        eps: added to the variance.
        backend: `"triton"`, `"torch"` or None (environment variable, else automatic).

    Returns:
        `(..., D)` in the dtype of `gate`, or of `y` without one.

    Raises:
        ValueError: the shapes differ, or the backend's name is unknown.
        RuntimeError: the backend asked for is not available.

    Source: GLMamba, Fig. 2A.
    """
    if gate is not None and y.shape != gate.shape:
        raise ValueError(f"gate: found shape {list(gate.shape)}, expected that of y, {list(y.shape)}")
    if torch.jit.is_scripting():
        pass  # the definition below
    elif not y.is_meta and backends.backend_for("pointwise", y, backend) == "triton":
        return torch.ops.glmamba.norm_gate(y, weight, bias, gate, eps)
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    normed = F.layer_norm(y.to(dtype), [y.shape[-1]], weight.to(dtype), bias.to(dtype), eps)
    if gate is None:
        return normed.to(y.dtype)
    return (normed * F.silu(gate.to(dtype))).to(gate.dtype)


def bias_silu(x: Tensor, bias: Tensor, residual: Tensor | None = None, backend: str | None = None) -> Tensor:
    """SiLU(x + bias) + residual, computed in float32 (float64 stays).

    Args:
        x: `(..., C)`.
        bias: `(C,)`.
        residual: `(..., C)`, or None for nothing.
        backend: `"triton"`, `"torch"` or None (environment variable, else automatic).

    Returns:
        `(..., C)` in the dtype of `x`.

    Raises:
        ValueError: the shapes differ, or the backend's name is unknown.
        RuntimeError: the backend asked for is not available.
    """
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual: found shape {list(residual.shape)}, expected that of x, {list(x.shape)}")
    if torch.jit.is_scripting():
        pass  # the definition below
    elif not x.is_meta and backends.backend_for("pointwise", x, backend) == "triton":
        return torch.ops.glmamba.bias_silu(x, bias, residual)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = F.silu(x.to(dtype) + bias.to(dtype))
    if residual is not None:
        y = y + residual.to(dtype)
    return y.to(x.dtype)


def modulate(deform: Tensor, mamba: Tensor, backend: str | None = None) -> Tensor:
    """sigmoid(deform) * mamba + deform, computed in float32 (float64 stays).

    Args:
        deform: `(B, H, W, C)`.
        mamba: `(B, H, W, C)`, or `(B, H/2, W/2, 2, 2, C)`: the pixels of 2x2 patches, not yet in place.
        backend: `"triton"`, `"torch"` or None (environment variable, else automatic).

    Returns:
        `(B, H, W, C)` in the dtype of `deform`.

    Raises:
        ValueError: the shapes do not fit, or the backend's name is unknown.
        RuntimeError: the backend asked for is not available.

    Source: GLMamba, Fig. 2C.
    """
    if mamba.dim() == 6 and mamba.shape[3] == 2 and mamba.shape[4] == 2:
        shape = [mamba.shape[0], 2 * mamba.shape[1], 2 * mamba.shape[2], mamba.shape[5]]
    else:
        shape = list(mamba.shape)
    if list(deform.shape) != shape:
        raise ValueError(f"mamba: found shape {list(mamba.shape)}, expected that of deform, {list(deform.shape)}")
    if torch.jit.is_scripting():
        pass  # the definition below
    elif not deform.is_meta and backends.backend_for("pointwise", deform, backend) == "triton":
        return torch.ops.glmamba.modulate(deform, mamba)
    dtype = torch.float64 if deform.dtype == torch.float64 else torch.float32
    mamba, wide = pixels_in_place(mamba).to(dtype), deform.to(dtype)
    return (torch.sigmoid(wide) * mamba + wide).to(deform.dtype)


def pixels_in_place(x: Tensor) -> Tensor:
    """`(B, H/2, W/2, 2, 2, C)`, the pixels of 2x2 patches, as a map `(B, H, W, C)`; a map stays as it is."""
    return x if x.dim() == 4 else x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


# --- backend "triton", as operators that autograd, torch.compile and fake tensors know ----------------------------

torch.library.define("glmamba::norm_gate", "(Tensor y, Tensor weight, Tensor bias, Tensor? gate, float eps) -> Tensor")
torch.library.define(
    "glmamba::norm_gate_backward",
    "(Tensor dout, Tensor y, Tensor weight, Tensor bias, Tensor? gate, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "glmamba::bias_silu", "(Tensor x, Tensor bias, Tensor? residual) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)
torch.library.define(
    "glmamba::bias_silu_backward",
    "(Tensor dout, Tensor x, Tensor bias) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


torch.library.define("glmamba::modulate", "(Tensor deform, Tensor mamba) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
torch.library.define(
    "glmamba::modulate_backward",
    "(Tensor dout, Tensor deform, Tensor mamba) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("glmamba::norm_gate", "cuda")
def _norm_gate(y: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None, eps: float) -> Tensor:
    return backends.load_backend("pointwise", "triton").norm_gate_forward(y, weight, bias, gate, eps)


@torch.library.impl("glmamba::norm_gate_backward", "cuda")
def _norm_gate_backward(
    dout: Tensor, y: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return backends.load_backend("pointwise", "triton").norm_gate_backward(dout, y, weight, bias, gate, eps)


@torch.library.impl("glmamba::bias_silu", "cuda")
def _bias_silu(x: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    return backends.load_backend("pointwise", "triton").bias_silu_forward(x, bias, residual)


@torch.library.impl("glmamba::bias_silu_backward", "cuda")
def _bias_silu_backward(dout: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return backends.load_backend("pointwise", "triton").bias_silu_backward(dout, x, bias)


@torch.library.impl("glmamba::modulate", "cuda")
def _modulate(deform: Tensor, mamba: Tensor) -> Tensor:
    return backends.load_backend("pointwise", "triton").modulate_forward(deform, mamba)


@torch.library.impl("glmamba::modulate_backward", "cuda")
def _modulate_backward(dout: Tensor, deform: Tensor, mamba: Tensor) -> tuple[Tensor, Tensor]:
    return backends.load_backend("pointwise", "triton").modulate_backward(dout, deform, mamba)


@torch.library.register_fake("glmamba::norm_gate")
def _fake_norm_gate(y: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None, eps: float) -> Tensor:
    return torch.empty(y.shape, dtype=y.dtype if gate is None else gate.dtype, device=y.device)


@torch.library.register_fake("glmamba::norm_gate_backward")
def _fake_norm_gate_backward(
    dout: Tensor, y: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dgate = y.new_empty((0,)) if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=y.device)
    return torch.empty(y.shape, dtype=y.dtype, device=y.device), torch.empty_like(weight), torch.empty_like(bias), dgate


@torch.library.register_fake("glmamba::bias_silu")
def _fake_bias_silu(x: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.register_fake("glmamba::bias_silu_backward")
def _fake_bias_silu_backward(dout: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(bias)


@torch.library.register_fake("glmamba::modulate")
def _fake_modulate(deform: Tensor, mamba: Tensor) -> Tensor:
    return torch.empty(deform.shape, dtype=deform.dtype, device=deform.device)


@torch.library.register_fake("glmamba::modulate_backward")
def _fake_modulate_backward(dout: Tensor, deform: Tensor, mamba: Tensor) -> tuple[Tensor, Tensor]:
    return _fake_modulate(deform, mamba), torch.empty(mamba.shape, dtype=mamba.dtype, device=mamba.device)


def _save_norm_gate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.eps = inputs[4]


def _differentiate_norm_gate(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: checkpoints refuse more
    dy, dweight, dbias, dgate = torch.ops.glmamba.norm_gate_backward(dout, *saved, ctx.eps)
    return dy, dweight, dbias, None if saved[3] is None else dgate, None


def _save_bias_silu(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.residual_dtype = None if inputs[2] is None else inputs[2].dtype


def _differentiate_bias_silu(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    dx, dbias = torch.ops.glmamba.bias_silu_backward(dout, *ctx.saved_tensors)
    return dx, dbias, None if ctx.residual_dtype is None else dout.to(ctx.residual_dtype)


def _save_modulate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_modulate(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.glmamba.modulate_backward(dout, *ctx.saved_tensors)


torch.library.register_autograd("glmamba::norm_gate", _differentiate_norm_gate, setup_context=_save_norm_gate)
torch.library.register_autograd("glmamba::bias_silu", _differentiate_bias_silu, setup_context=_save_bias_silu)
torch.library.register_autograd("glmamba::modulate", _differentiate_modulate, setup_context=_save_modulate)


def _differentiate_twice(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("norm_gate, bias_silu, modulate: no second gradients on a GPU")


torch.library.register_autograd("glmamba::norm_gate_backward", _differentiate_twice)
torch.library.register_autograd("glmamba::bias_silu_backward", _differentiate_twice)
torch.library.register_autograd("glmamba::modulate_backward", _differentiate_twice)
