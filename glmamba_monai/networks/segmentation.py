"""The segmenter of the downstream experiment (docs/downstream.md); no network for super-resolution."""

from __future__ import annotations

import math

import torch.nn.functional as F
from monai.networks.nets import SwinUNETR
from torch import Tensor


class SliceSwinUNETR(SwinUNETR):
    """MONAI's SwinUNETR for slices of any size, with one channel in and one logit out.

    Args:
        feature_size: features at full resolution, a multiple of 12.
    """

    DIVISOR = 32  # SwinUNETR takes no other sizes

    def __init__(self, feature_size: int = 24) -> None:
        super().__init__(in_channels=1, out_channels=1, feature_size=feature_size, spatial_dims=2)

    def forward(self, x_in: Tensor) -> Tensor:
        """Logits ``(B, 1, H, W)`` in float32 of ``(B, 1, H, W)``.

        Slices are padded with zeros on all sides to one square size: at another size, the windows of the attention end
        elsewhere, and a network that has seen squares alone (turned slices of both orientations fill a square) finds
        lesions in the margin.
        """
        height, width = x_in.shape[-2:]
        # Twice the divisor at least: of a single pixel, which is what its deepest level has of one, no norm exists.
        side = max(2, math.ceil(max(height, width) / self.DIVISOR)) * self.DIVISOR
        top, left = (side - height) // 2, (side - width) // 2
        padded = F.pad(x_in, (left, side - width - left, top, side - height - top))
        return super().forward(padded)[..., top : top + height, left : left + width].float()
