"""GLMamba's fusion of two feature maps, on a GPU without the maps between its steps.

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

__all__ = ["fuse_modalities"]


def fuse_modalities(
    low_resolution: Tensor,
    reference: Tensor,
    complement_weight: Tensor,
    complement_bias: Tensor,
    mixture_weight: Tensor,
    mixture_bias: Tensor,
    backend: str | None = None,
) -> Tensor:
    """Difference, similarity and complement of two feature maps, weighted per image.

    With L and R for the two maps:

    - difference = L - R, similarity = L R;
    - complement = s_L L + s_R R, where (s_L, s_R) = softmax(complement_weight [L; R] + complement_bias), per pixel;
    - result = m_1 difference + m_2 similarity + m_3 complement, where m = softmax(mixture_weight p + mixture_bias), per
      image, and p are the maxima over H and W of the channels of difference, similarity and complement, in this order.

    Computed in float32 (float64 stays), also under autocast, but for the products with the weights in a scripted
    module, which autocast rounds. The gradient of a maximum that several pixels share is split evenly among them by
    the backend torch, and goes to the first of them with the backend triton. The backend triton keeps no map but the
    two given ones for the backward pass.

    Args:
        low_resolution: L, `(B, H, W, C)`.
        reference: R, `(B, H, W, C)`.
        complement_weight: `(2, 2C)`.
        complement_bias: `(2,)`.
        mixture_weight: `(3, 3C)`.
        mixture_bias: `(3,)`.
        backend: `"triton"`, `"torch"` or None (that of the operation "pointwise": environment variable, else
            automatic).

    Returns:
        `(B, H, W, C)` in the dtype of `low_resolution`.

    Raises:
        ValueError: the shapes differ, or the backend's name is unknown.
        RuntimeError: the backend asked for is not available.

    Source: GLMamba, eqs 6-11.
    """
    channels = low_resolution.shape[-1]
    check_shape("reference", reference, list(low_resolution.shape), "low_resolution")
    check_shape("complement_weight", complement_weight, [2, 2 * channels], "low_resolution")
    check_shape("complement_bias", complement_bias, [2], "low_resolution")
    check_shape("mixture_weight", mixture_weight, [3, 3 * channels], "low_resolution")
    check_shape("mixture_bias", mixture_bias, [3], "low_resolution")
    inputs = (low_resolution, reference, complement_weight, complement_bias, mixture_weight, mixture_bias)
    if low_resolution.is_meta:
        return _fuse(*inputs)
    if torch.jit.is_scripting():
        return _fuse(*inputs)  # TorchScript cannot switch autocast off
    else:  # TorchScript compiles one branch only
        if backends.backend_for("pointwise", low_resolution, backend) == "triton":
            return torch.ops.glmamba.fuse_modalities(*inputs)[0]
        with torch.autocast(low_resolution.device.type, enabled=False):
            return _fuse(*inputs)


def _fuse(
    low_resolution: Tensor,
    reference: Tensor,
    complement_weight: Tensor,
    complement_bias: Tensor,
    mixture_weight: Tensor,
    mixture_bias: Tensor,
) -> Tensor:
    dtype = torch.float64 if low_resolution.dtype == torch.float64 else torch.float32
    x, y = low_resolution.to(dtype), reference.to(dtype)
    difference = x - y  # eq. 6
    similarity = x * y  # eq. 7
    logits = F.linear(torch.cat((x, y), dim=-1), complement_weight.to(dtype), complement_bias.to(dtype))
    shares = torch.softmax(logits, dim=-1)
    complement = x * shares[..., 0:1] + y * shares[..., 1:2]  # eqs 8, 9
    pooled = torch.cat([f.amax(dim=(1, 2)) for f in (difference, similarity, complement)], dim=1)
    mixture = torch.softmax(F.linear(pooled, mixture_weight.to(dtype), mixture_bias.to(dtype)), dim=1)  # eq. 10
    mixture = mixture[:, :, None, None, None]
    out = mixture[:, 0] * difference + mixture[:, 1] * similarity + mixture[:, 2] * complement  # eq. 11
    return out.to(low_resolution.dtype)


# --- backend "triton", as operators that autograd, torch.compile and fake tensors know ----------------------------

torch.library.define(
    "glmamba::fuse_modalities",
    "(Tensor low_resolution, Tensor reference, Tensor complement_weight, Tensor complement_bias,"
    " Tensor mixture_weight, Tensor mixture_bias)"
    " -> (Tensor out, Tensor pooled, Tensor positions, Tensor mixture)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "glmamba::fuse_modalities_backward",
    "(Tensor dout, Tensor low_resolution, Tensor reference, Tensor complement_weight, Tensor complement_bias,"
    " Tensor mixture_weight, Tensor pooled, Tensor positions, Tensor mixture)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _kernels() -> ModuleType:
    backends.load_backend("pointwise", "triton")  # says what is missing, if anything
    return importlib.import_module("glmamba_monai.ops.triton_fusion")


@torch.library.impl("glmamba::fuse_modalities", "cuda")
def _fuse_modalities(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _kernels().fuse_modalities_forward(*inputs)


@torch.library.impl("glmamba::fuse_modalities_backward", "cuda")
def _fuse_modalities_backward(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _kernels().fuse_modalities_backward(*inputs)


@torch.library.register_fake("glmamba::fuse_modalities")
def _fake_fuse_modalities(
    low_resolution: Tensor,
    reference: Tensor,
    complement_weight: Tensor,
    complement_bias: Tensor,
    mixture_weight: Tensor,
    mixture_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, _, _, channels = low_resolution.shape
    return (
        low_resolution.new_empty(low_resolution.shape),
        low_resolution.new_empty((batch, 3 * channels), dtype=torch.float32),
        low_resolution.new_empty((batch, 3 * channels), dtype=torch.int32),
        low_resolution.new_empty((batch, 3), dtype=torch.float32),
    )


@torch.library.register_fake("glmamba::fuse_modalities_backward")
def _fake_fuse_modalities_backward(
    dout: Tensor,
    low_resolution: Tensor,
    reference: Tensor,
    complement_weight: Tensor,
    complement_bias: Tensor,
    mixture_weight: Tensor,
    *_: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        low_resolution.new_empty(low_resolution.shape),
        reference.new_empty(reference.shape),
        complement_weight.new_empty(complement_weight.shape),
        complement_bias.new_empty((2,)),
        mixture_weight.new_empty(mixture_weight.shape),
        mixture_weight.new_empty((3,)),
    )


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5], *output[1:])


def _differentiate(ctx: Any, dout: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return torch.ops.glmamba.fuse_modalities_backward(dout, *ctx.saved_tensors)


def _differentiate_twice(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("fuse_modalities: its gradients cannot be differentiated again on a GPU")


torch.library.register_autograd("glmamba::fuse_modalities", _differentiate, setup_context=_save)
torch.library.register_autograd("glmamba::fuse_modalities_backward", _differentiate_twice)
