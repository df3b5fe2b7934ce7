"""A Mamba block's channel attention together with its residual, on a GPU without the maps between its steps.

The backends do the same sums; `"torch"` is the definition.
"""

import importlib
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glmamba_monai.ops import backends
from glmamba_monai.ops.shapes import check_shape

__all__ = ["attend_channels"]


def attend_channels(
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    squeeze_weight: Tensor,
    squeeze_bias: Tensor,
    excite_weight: Tensor,
    excite_bias: Tensor,
    backend: str | None = None,
) -> Tensor:
    """`x + a (y + bias)`, with one weight a for each image and channel.

    a = sigmoid(excite_weight relu(squeeze_weight p + squeeze_bias) + excite_bias), where p is the mean of `y + bias`
    over H and W.

    Computed in float32 (float64 stays), also under autocast, but for the products with the weights in a scripted
    module, which autocast rounds. The backend triton keeps no map but `y` for the backward pass.

    Args:
        x: `(B, H, W, C)`.
        y: `(B, H, W, C)`.
        bias: `(C,)`, or None for nothing.
        squeeze_weight: `(S, C)`.
        squeeze_bias: `(S,)`.
        excite_weight: `(C, S)`.
        excite_bias: `(C,)`.
        backend: `"triton"`, `"torch"` or None (that of the operation "pointwise": environment variable, else
            automatic).

    Returns:
        `(B, H, W, C)` in the dtype of `x`.

    Raises:
        ValueError: the shapes differ, or the backend's name is unknown.
        RuntimeError: the backend asked for is not available.

    Source: GLMamba, Fig. 2A ("CA").
    """
    squeezed, channels = squeeze_weight.shape[0], x.shape[-1]
    check_shape("y", y, list(x.shape), "x and squeeze_weight")
    if bias is not None:
        check_shape("bias", bias, [channels], "x and squeeze_weight")
    check_shape("squeeze_weight", squeeze_weight, [squeezed, channels], "x and squeeze_weight")
    check_shape("squeeze_bias", squeeze_bias, [squeezed], "x and squeeze_weight")
    check_shape("excite_weight", excite_weight, [channels, squeezed], "x and squeeze_weight")
    check_shape("excite_bias", excite_bias, [channels], "x and squeeze_weight")
    inputs = (x, y, bias, squeeze_weight, squeeze_bias, excite_weight, excite_bias)
    if x.is_meta:
        return _attend(*inputs)
    if torch.jit.is_scripting():
        return _attend(*inputs)  # TorchScript cannot switch autocast off
    else:  # TorchScript compiles one branch only
        if backends.backend_for("pointwise", x, backend) == "triton":
            return torch.ops.glmamba.attend_channels(*inputs)[0]
        with torch.autocast(x.device.type, enabled=False):
            return _attend(*inputs)


def _attend(
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    squeeze_weight: Tensor,
    squeeze_bias: Tensor,
    excite_weight: Tensor,
    excite_bias: Tensor,
) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    attended = y.to(dtype)
    if bias is not None:
        attended = attended + bias.to(dtype)
    pooled = attended.mean(dim=(1, 2))
    squeezed = F.relu(F.linear(pooled, squeeze_weight.to(dtype), squeeze_bias.to(dtype)))
    attention = torch.sigmoid(F.linear(squeezed, excite_weight.to(dtype), excite_bias.to(dtype)))
    return torch.addcmul(x.to(dtype), attended, attention[:, None, None].to(dtype)).to(x.dtype)


# --- backend "triton", as operators that autograd, torch.compile and fake tensors know ----------------------------
# Beside the result the operator returns what its backward pass needs of each image: means, squeezed, attention. The
# backward pass returns the parameters' gradients as one vector, in their order.

torch.library.define(
    "glmamba::attend_channels",
    "(Tensor x, Tensor y, Tensor? bias, Tensor squeeze_weight, Tensor squeeze_bias, Tensor excite_weight,"
    " Tensor excite_bias) -> (Tensor out, Tensor pooled, Tensor squeezed, Tensor attention)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "glmamba::attend_channels_backward",
    "(Tensor dout, Tensor y, Tensor? bias, Tensor squeeze_weight, Tensor excite_weight, Tensor pooled,"
    " Tensor squeezed, Tensor attention) -> (Tensor dy, Tensor parameters)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _kernels() -> ModuleType:
    backends.load_backend("pointwise", "triton")  # says what is missing, if anything
    return importlib.import_module("glmamba_monai.ops.triton_attention")


@torch.library.impl("glmamba::attend_channels", "cuda")
def _attend_channels(*inputs: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _kernels().attend_channels_forward(*inputs)


@torch.library.impl("glmamba::attend_channels_backward", "cuda")
def _attend_channels_backward(*inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    return _kernels().attend_channels_backward(*inputs)


@torch.library.register_fake("glmamba::attend_channels")
def _fake_attend_channels(
    x: Tensor, y: Tensor, bias: Tensor | None, squeeze_weight: Tensor, *_: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, channels, squeezed = x.shape[0], x.shape[-1], squeeze_weight.shape[0]
    rows = [x.new_empty((batch, n), dtype=torch.float32) for n in (channels, squeezed, channels)]
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), rows[0], rows[1], rows[2]


@torch.library.register_fake("glmamba::attend_channels_backward")
def _fake_attend_channels_backward(
    dout: Tensor, y: Tensor, bias: Tensor | None, squeeze_weight: Tensor, *_: Tensor
) -> tuple[Tensor, Tensor]:
    sizes = _parameter_sizes(squeeze_weight)
    return torch.empty(y.shape, dtype=y.dtype, device=y.device), y.new_empty((sum(sizes),), dtype=torch.float32)


def _parameter_sizes(squeeze_weight: Tensor) -> list[int]:
    squeezed, channels = squeeze_weight.shape
    return [channels, squeezed * channels, squeezed, channels * squeezed, channels]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, y, bias, squeeze_weight, _, excite_weight, _ = inputs
    _, *rows = output
    ctx.mark_non_differentiable(*rows)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(y, bias, squeeze_weight, excite_weight, *rows)
    ctx.dtypes = [None if t is None else t.dtype for t in inputs]


def _differentiate(ctx: Any, dout: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: checkpoints refuse more
    _, _, squeeze_weight, excite_weight, *_ = saved
    dy, parameters = torch.ops.glmamba.attend_channels_backward(dout, *saved)
    dbias, dsqueeze, dsqueeze_bias, dexcite, dexcite_bias = parameters.split(_parameter_sizes(squeeze_weight))
    dsqueeze, dexcite = dsqueeze.view(squeeze_weight.shape), dexcite.view(excite_weight.shape)
    gradients = [dout, dy, dbias, dsqueeze, dsqueeze_bias, dexcite, dexcite_bias]
    return tuple(None if dtype is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes))


def _differentiate_twice(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("attend_channels: its gradients cannot be differentiated again on a GPU")


torch.library.register_autograd("glmamba::attend_channels", _differentiate, setup_context=_save)
torch.library.register_autograd("glmamba::attend_channels_backward", _differentiate_twice)
