"""Baselines with GLMamba's interface: ``(B, 2, H, W)`` in, ``(B, 2, H, W)`` out, channel 1 returned as it came."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Interpolation(nn.Module):
    """No network at all: the upsampled low-resolution slice is the result.

    Which interpolation that is was decided before, by the transform that made channel 0 (see ``upsampling`` of the
    registered name): ``zero_filling`` and ``bicubic`` are both this class.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, 2, H, W)`` unchanged."""
        return x


class SRCNN(nn.Module):
    """SRCNN 9-5-5 (Dong et al., 2016) with a global residual, optionally with the reference as second channel.

    The residual and the zero start of the last layer are GLMamba's, so that the comparison is between networks and
    not between their starts.

    Args:
        use_reference: feed channel 1 (the reference) beside channel 0.
    """

    def __init__(self, use_reference: bool = False) -> None:
        super().__init__()
        self.in_channels = 2 if use_reference else 1
        self.patches = nn.Conv2d(self.in_channels, 64, 9, padding=4)
        self.mapping = nn.Conv2d(64, 32, 5, padding=2)
        self.reconstruction = nn.Conv2d(32, 1, 5, padding=2)
        nn.init.zeros_(self.reconstruction.weight)
        nn.init.zeros_(self.reconstruction.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Super-resolve ``(B, 2, H, W)``."""
        features = F.relu(self.mapping(F.relu(self.patches(x[:, : self.in_channels]))))
        return torch.cat((x[:, 0:1] + self.reconstruction(features), x[:, 1:2]), dim=1)
