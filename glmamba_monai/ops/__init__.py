"""The two operations that PyTorch lacks, each with several backends (see `format_backend_report`)."""

from glmamba_monai.ops.backends import backend_report, format_backend_report, require_backends
from glmamba_monai.ops.deform_conv import deform_conv2d
from glmamba_monai.ops.selective_scan import selective_scan

__all__ = ["backend_report", "deform_conv2d", "format_backend_report", "require_backends", "selective_scan"]
