"""ONNX: a network as a file for ONNX Runtime, for any batch, height and width.

Two operations have no ordinary exporter. The deformable convolution is ONNX's DeformConv. The scan is ONNX's Scan over
the positions, four directions at a time: a loop of six operators whatever the size of the map.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glmamba_monai.files import write_atomically
from glmamba_monai.networks import GLMamba
from glmamba_monai.ops import backends, ss2d

try:
    import onnxscript
    from onnxscript import FLOAT, opset19
    from onnxscript import opset18 as op  # what the exporter writes first
except ImportError as error:
    raise ImportError(f"the ONNX export needs onnx and onnxscript: pip install onnx onnxscript ({error})") from error

__all__ = ["export_onnx"]


def export_onnx(network: nn.Module, filepath: str | Path) -> None:
    """Write a network as ONNX, input ``image`` and output ``pred``, both ``(B, 2, H, W)`` in float32, H, W >= 8.

    Args:
        network: registered network, with its weights.
        filepath: file to write, with the weights in it.
    """
    dim = torch.export.Dim
    shapes = {0: dim("batch"), 2: dim("height", min=8), 3: dim("width", min=8)}
    network = copy.deepcopy(network).float().cpu().eval()
    if isinstance(network, GLMamba):
        network = _Padded(network)
    # No side is a multiple of 4 and no two are equal, so that nothing is taken for constant.
    example = torch.zeros(2, 2, 18, 22)
    with torch.no_grad(), backends.recorded_operators():
        program = torch.export.export(
            network, (example,), dynamic_shapes=(shapes,), prefer_deferred_runtime_asserts_over_guards=True
        )
    decompositions = torch.export.default_decompositions()
    decompositions[torch.ops.glmamba.ss2d_scan.default] = _ss2d_by_steps
    exported = torch.onnx.export(
        program.run_decompositions(decompositions),
        dynamo=True,
        dynamic_shapes=(shapes,),
        input_names=["image"],
        output_names=["pred"],
        opset_version=opset19.version,
        verbose=False,
        custom_translation_table={
            torch.ops.glmamba.deform_conv2d.default: _onnx_deform_conv,
            torch.ops.glmamba.scan_steps.default: _onnx_scan,
        },
    )
    assert exported is not None  # as it is without a file name
    write_atomically(filepath, exported.save)


class _Padded(nn.Module):
    """GLMamba behind a padding to multiples of 4 that the exporter can prove to be such; its own adds nothing."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        x = F.pad(x, [0, (width + 3) // 4 * 4 - width, 0, (height + 3) // 4 * 4 - height], mode="reflect")
        return self.network(x)[:, :, :height, :width]


# --- The scan, its positions first ---------------------------------------------------------------------------------

torch.library.define(
    "glmamba::scan_steps",
    "(Tensor dt, Tensor dt_u, Tensor A, Tensor B, Tensor C) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("glmamba::scan_steps")
def _fake_scan_steps(dt: Tensor, dt_u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    return torch.empty_like(dt)


def _ss2d_by_steps(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    local: bool,
    training: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``glmamba::ss2d_scan`` with the loop over positions left as ``glmamba::scan_steps``.

    Its states and time steps, which only a backward pass reads, are empty.
    """
    height, width = u.shape[1:3]
    dt = F.softplus(delta + delta_bias)
    dt_u = dt * u.unsqueeze(3)  # (B, H, W, K, D)
    maps = [ss2d.split_quadrants(x) if local else x for x in (dt, dt_u, B, C)]
    dt_, dt_u_, B_, C_ = (ss2d._to_sequences(x).permute(3, 0, 1, 2) for x in maps)  # (L, B, K, D | N)
    y = torch.ops.glmamba.scan_steps(
        dt_.unsqueeze(3), dt_u_.unsqueeze(3), A.transpose(1, 2), B_.unsqueeze(4), C_.unsqueeze(3)
    )
    y = ss2d._sum_of_maps(y.squeeze(3).permute(1, 2, 3, 0), maps[0].shape[1], maps[0].shape[2])
    y = ss2d.join_quadrants(y, height, width) if local else y
    return y + u * D.sum(0), u.new_empty(0), u.new_empty(0)


@onnxscript.script(onnxscript.values.Opset("glmamba", 1), default_opset=op)
def _onnx_scan(dt: FLOAT[...], dt_u: FLOAT[...], A: FLOAT[...], B: FLOAT[...], C: FLOAT[...]) -> FLOAT[...]:
    """h_t = exp(dt_t A) h_{t-1} + dt_u_t B_t and y_t = C_t h_t, over the first axis.

    Shapes: dt and dt_u ``(L, B, K, 1, D)``, A ``(K, N, D)``, B ``(L, B, K, N, 1)``, C ``(L, B, K, 1, N)``.
    """

    @onnxscript.graph()
    def step(state: FLOAT[...], dt_t: FLOAT[...], dt_u_t: FLOAT[...], B_t: FLOAT[...], C_t: FLOAT[...]):  # noqa: ANN202
        new_state = op.Add(op.Mul(op.Exp(op.Mul(dt_t, A)), state), op.Mul(dt_u_t, B_t))
        return new_state, op.MatMul(C_t, new_state)

    # The shape of a state from the first position alone: the states of all positions would not fit in memory.
    first = op.Constant(value_int=0)
    zeros = op.Mul(op.Mul(op.Gather(dt, first), op.Gather(B, first)), op.Constant(value_float=0.0))
    _, y = op.Scan(zeros, dt, dt_u, B, C, body=step, num_scan_inputs=4)
    return y


def _onnx_deform_conv(input: Any, offset: Any, weight: Any, mask: Any, pad_y: int, pad_x: int, bias: Any = None) -> Any:
    """``glmamba::deform_conv2d``, whose conventions are torchvision's, as are ONNX's."""
    return opset19.DeformConv(input, weight, offset, bias, mask, pads=[pad_y, pad_x, pad_y, pad_x])
