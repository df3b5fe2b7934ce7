"""SiLU of a 3x3 convolution of each channel on its own, on a GPU in one pass over the map.

The backends do the same sums; `"torch"` is the definition.
"""

import importlib
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glmamba_monai.ops import backends
from glmamba_monai.ops.pointwise import bias_silu

__all__ = ["depthwise_silu"]


def depthwise_silu(x: Tensor, weight: Tensor, bias: Tensor, backend: str | None = None) -> Tensor:
    """SiLU of a 3x3 depthwise convolution, channels last, zeros around the map.

    The backend triton computes in float32, also under autocast, and keeps nothing but its inputs for the backward pass.
    Under autocast the backend torch rounds the products as autocast does.

    Args:
        x: `(B, H, W, D)`.
        weight: `(D, 1, 3, 3)`.
        bias: `(D,)`.
        backend: `"triton"`, `"torch"` or None (that of the operation "pointwise": environment variable, else
            automatic).

    Returns:
        `(B, H, W, D)`; in the dtype of `x` by the backend triton, in that of the convolution's result by torch.

    Raises:
        ValueError: the shapes do not fit, or the backend's name is unknown.
        RuntimeError: the backend asked for is not available.

    Source: GLMamba, Fig. 2A ("DWConv", SiLU).
    """
    channels = x.shape[-1]
    if list(weight.shape) != [channels, 1, 3, 3]:
        raise ValueError(f"weight: found shape {list(weight.shape)}, expected {[channels, 1, 3, 3]} (from x)")
    if list(bias.shape) != [channels]:
        raise ValueError(f"bias: found shape {list(bias.shape)}, expected {[channels]} (from x)")
    if torch.jit.is_scripting():
        pass  # the definition below
    elif not x.is_meta and backends.backend_for("pointwise", x, backend) == "triton":
        return torch.ops.glmamba.depthwise_silu(x, weight, bias)
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, None, 1, 1, 1, channels)
    return bias_silu(y.permute(0, 2, 3, 1), bias, None, backend)


# --- backend "triton", as operators that autograd, torch.compile and fake tensors know ----------------------------

torch.library.define(
    "glmamba::depthwise_silu", "(Tensor x, Tensor weight, Tensor bias) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)
torch.library.define(
    "glmamba::depthwise_silu_backward",
    "(Tensor dout, Tensor x, Tensor weight, Tensor bias) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _kernels() -> ModuleType:
    backends.load_backend("pointwise", "triton")  # says what is missing, if anything
    return importlib.import_module("glmamba_monai.ops.triton_depthwise")


@torch.library.impl("glmamba::depthwise_silu", "cuda")
def _depthwise_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _kernels().depthwise_silu_forward(x, weight, bias)


@torch.library.impl("glmamba::depthwise_silu_backward", "cuda")
def _depthwise_silu_backward(dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _kernels().depthwise_silu_backward(dout, x, weight, bias)


@torch.library.register_fake("glmamba::depthwise_silu")
def _fake_depthwise_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.register_fake("glmamba::depthwise_silu_backward")
def _fake_depthwise_silu_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_depthwise_silu(x, weight, bias), torch.empty_like(weight), torch.empty_like(bias)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.glmamba.depthwise_silu_backward(dout, *ctx.saved_tensors)


def _differentiate_twice(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("depthwise_silu: its gradients cannot be differentiated again on a GPU")


torch.library.register_autograd("glmamba::depthwise_silu", _differentiate, setup_context=_save)
torch.library.register_autograd("glmamba::depthwise_silu_backward", _differentiate_twice)
