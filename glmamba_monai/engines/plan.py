"""How long and on what a training runs by default: one plan for real data, a short one for the demo."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn


@dataclass(frozen=True)
class TrainingPlan:
    """Defaults of a training; each is overridden by the command-line argument of the same name.

    Attributes:
        epochs: number of epochs; validation and a checkpoint lie between them.
        iterations_per_epoch: steps of an epoch.
        batch_size: slices of a step, over all processes.
        crop_size: side of the random square crops in pixels; None for whole slices.
        warmup_steps: steps over which the learning rate rises before it follows the cosine; see :meth:`warmup`.
        val_interval: epochs from one validation to the next.
        val_slices: slices per held-out subject in the validations during training (evenly spaced).
    """

    epochs: int
    iterations_per_epoch: int
    batch_size: int
    crop_size: int | None
    warmup_steps: int
    val_interval: int
    val_slices: int

    def warmup(self, steps: int) -> int:
        """Steps of the warm-up in a training of so many steps: at most a fifth of them."""
        return min(self.warmup_steps, steps // 5)


# Many small crops: at equal cost they beat fewer large ones. The shipped weights are of longer trainings
# (docs/training.md).
REAL_DATA = TrainingPlan(
    epochs=96,
    iterations_per_epoch=250,
    batch_size=8,
    crop_size=64,
    warmup_steps=500,
    val_interval=4,
    val_slices=16,
)
# Minutes on two CPU cores: enough to see the network pass zero-filling.
DEMO = TrainingPlan(
    epochs=8,
    iterations_per_epoch=10,
    batch_size=2,
    crop_size=48,
    warmup_steps=10,
    val_interval=2,
    val_slices=4,
)

# The segmenter of the downstream experiment: on the phantom three minutes on two CPU cores.
SEGMENT_REAL_DATA = TrainingPlan(
    epochs=15,
    iterations_per_epoch=100,
    batch_size=16,
    crop_size=None,
    warmup_steps=50,
    val_interval=5,
    val_slices=0,  # not used: Dice is of the whole volume
)
SEGMENT_DEMO = replace(SEGMENT_REAL_DATA, epochs=10, iterations_per_epoch=20, batch_size=8, warmup_steps=10)


def training_plan(dataset_dir: str | os.PathLike[str] | None) -> TrainingPlan:
    """The plan for a data set; None is the embedded phantom."""
    return DEMO if dataset_dir is None else REAL_DATA


def segmentation_plan(dataset_dir: str | os.PathLike[str] | None) -> TrainingPlan:
    """The plan of the segmenter for a data set; None is the embedded phantom."""
    return SEGMENT_DEMO if dataset_dir is None else SEGMENT_REAL_DATA


def trainable_parameters(network: nn.Module, name: str) -> Iterator[nn.Parameter]:
    """The parameters to optimise.

    Raises:
        ValueError: the network has none.
    """
    if not any(True for _ in network.parameters()):
        raise ValueError(f"network {name!r} has no parameters, so there is nothing to train; evaluate it instead")
    return network.parameters()
