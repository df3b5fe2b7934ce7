"""The training loss (the paper's CELoss)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SR_WEIGHT = 0.7
REFERENCE_WEIGHT = 0.3
EDGE_WEIGHT = 0.1


class ContrastiveEdgeLoss(nn.Module):
    """Mean squared difference of the edges of two images, over three 3x3 edge kernels (the paper's CELoss).

    ``mean over i of mean((E_i * input - E_i * target)^2)``, ``*`` being a convolution with reflect padding.
    The paper prints +1 as the last element of the second kernel; an edge kernel must sum to zero, so -1 is meant.
    """

    KERNELS = (
        ((0.0, -1.0, 0.0), (-1.0, 4.0, -1.0), (0.0, -1.0, 0.0)),
        ((-1.0, 0.0, -1.0), (0.0, 4.0, 0.0), (-1.0, 0.0, -1.0)),
        ((1.0, 1.0, 1.0), (1.0, -8.0, 1.0), (1.0, 1.0, 1.0)),
    )

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernels", torch.tensor(self.KERNELS).unsqueeze(1), persistent=False)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Loss of ``(B, 1, H, W)`` against ``(B, 1, H, W)``, a scalar.

        Raises:
            ValueError: the shapes differ, or there is more than one channel.
        """
        if input.shape != target.shape or input.shape[1] != 1:
            raise ValueError(
                f"input and target must both be (B, 1, H, W), got {tuple(input.shape)} and {tuple(target.shape)}"
            )
        # Convolution is linear: the difference of the edges is the edge of the difference. Second differences of
        # nearly equal images do not survive bfloat16, so autocast is off here.
        with torch.autocast(input.device.type, enabled=False):
            difference = F.pad(input.float() - target.float(), (1, 1, 1, 1), mode="reflect")
            return F.conv2d(difference, self.kernels.to(difference.device)).square().mean()


class GLMambaLoss(nn.Module):
    """``0.7 L1(SR, HR) + 0.3 L1(RecRef, Ref) + 0.1 CELoss(SR, HR)`` (docs/method.md).

    Args:
        edge_weight: weight of :class:`ContrastiveEdgeLoss`; 0 for the rows of Table 1 above "+ CELoss".
    """

    def __init__(self, edge_weight: float = EDGE_WEIGHT) -> None:
        super().__init__()
        self.edge_weight = edge_weight
        self.edge_loss = ContrastiveEdgeLoss()

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Loss of ``(SR, RecRef)`` against ``(HR, Ref)``, both ``(B, 2, H, W)``; a scalar."""
        if input.shape != target.shape or input.shape[1] != 2:
            raise ValueError(
                f"input and target must both be (B, 2, H, W), got {tuple(input.shape)} and {tuple(target.shape)}"
            )
        input, target = input.float(), target.float()
        loss = SR_WEIGHT * F.l1_loss(input[:, 0], target[:, 0])
        loss = loss + REFERENCE_WEIGHT * F.l1_loss(input[:, 1], target[:, 1])
        if self.edge_weight:
            loss = loss + self.edge_weight * self.edge_loss(input[:, 0:1], target[:, 0:1])
        return loss
