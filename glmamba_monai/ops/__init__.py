"""The operations that PyTorch lacks or does in too many passes, with several backends (see `format_backend_report`)."""

from glmamba_monai.ops.attention import attend_channels
from glmamba_monai.ops.backends import backend_report, format_backend_report, require_backends
from glmamba_monai.ops.deform_conv import deform_conv2d, deform_residual
from glmamba_monai.ops.fusion import fuse_modalities
from glmamba_monai.ops.memory import keep_freed_memory
from glmamba_monai.ops.pointwise import bias_silu, modulate, norm_gate, pixels_in_place
from glmamba_monai.ops.selective_scan import selective_scan
from glmamba_monai.ops.ss2d import projected_ss2d_scan, ss2d_scan
from glmamba_monai.ops.streams import expect_other_streams, forgo_streams, side_by_side

__all__ = [
    "attend_channels",
    "backend_report",
    "bias_silu",
    "deform_conv2d",
    "deform_residual",
    "expect_other_streams",
    "forgo_streams",
    "format_backend_report",
    "fuse_modalities",
    "keep_freed_memory",
    "modulate",
    "norm_gate",
    "pixels_in_place",
    "projected_ss2d_scan",
    "require_backends",
    "selective_scan",
    "side_by_side",
    "ss2d_scan",
]
