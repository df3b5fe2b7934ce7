"""Training and running a segmenter of slices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from ignite.engine import Engine
from monai.metrics.regression import RegressionMetric
from torch import Tensor

from glmamba_monai.engines.progress import EpochLine


def prepare_mask_batch(
    batch: Mapping[str, Tensor], device: Any = None, non_blocking: bool = False, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Input ``(B, 1, ...)`` of the segmenter and its mask ``(B, 1, ...)``, as plain tensors."""
    image, target = (
        batch[key].as_subclass(torch.Tensor).to(device=device, non_blocking=non_blocking, **kwargs)
        for key in ("image", "target")
    )
    return image, target


def mask_of(logits: Tensor) -> Tensor:
    """``(1, ...)``: 1 where the mean over the channels of ``(C, ...)`` (a self-ensemble's orientations) is above 0."""
    return (logits.as_subclass(torch.Tensor).mean(0, keepdim=True) > 0).float()


def mask_items(data: Mapping[str, Any]) -> dict[str, Any]:
    """The training's postprocessing: :func:`mask_of` of ``pred``."""
    return {**data, "pred": mask_of(data["pred"])}


class SliceDice(RegressionMetric):
    """Mean Dice of the slices that have a label, for the training.

    MONAI's ``DiceMetric`` waits for the GPU twice a slice, which :class:`~glmamba_monai.engines.SliceTrainer` never
    does.
    """

    def _compute_metric(self, y_pred: Tensor, y: Tensor) -> Tensor:
        """``(B, 1)`` of two masks ``(B, 1, H, W)``; NaN, which does not count in the mean, of a slice without label."""
        overlap, predicted, true = (mask.flatten(2).sum(2) for mask in (y_pred * y, y_pred, y))
        return torch.where(true > 0, 2 * overlap / (predicted + true), torch.nan)


class SegmentationLine(EpochLine):
    """The line per epoch of a segmenter, with Dice in place of PSNR."""

    def quality(self, engine: Engine) -> list[str]:
        parts = [f"train Dice {engine.state.metrics['train_dice']:.4f}"]
        validation = self.evaluator.state
        if validation.epoch == engine.state.epoch:
            parts.append(f"validation Dice {validation.metrics['val_dice']:.4f}")
        return parts
