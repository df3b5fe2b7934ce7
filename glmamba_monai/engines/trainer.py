"""MONAI's trainer without what makes a GPU wait in every iteration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.engines import IterationEvents, SupervisedTrainer, Workflow
from monai.transforms import Decollated

from glmamba_monai.engines.evaluation import super_resolved


class SliceTrainer(SupervisedTrainer):
    """MONAI's ``SupervisedTrainer``; see there for the arguments. A GPU is never waited for between two steps.

    An iteration's output is MONAI's list of items, but their ``loss`` is a tensor that stays on the device: MONAI reads
    it in every iteration. With ``amp`` the gradients are not scaled, so ``amp_kwargs`` should ask for bfloat16, which
    has the range of float32: MONAI's ``GradScaler`` waits in every step to learn whether a gradient has overflowed.
    """

    def run(self) -> None:
        self.scaler = torch.amp.GradScaler(self.state.device.type, enabled=False) if self.amp else None
        Workflow.run(self)  # Trainer.run makes its own scaler

    def _register_decollate(self) -> None:
        decollate = Decollated(keys=None, detach=False)

        @self.on(IterationEvents.MODEL_COMPLETED)
        def _decollate_data(engine: SliceTrainer) -> None:
            state = engine.state
            state.batch = decollate(state.batch)
            state.output = decollate({key: value.detach() for key, value in state.output.items()})


def super_resolved_items(data: Mapping[str, Any]) -> dict[str, Any]:
    """The training's postprocessing: :func:`super_resolved` of ``pred`` and ``label``, without the meta of Lambdad."""
    return {**data, **{key: super_resolved(data[key]) for key in ("pred", "label")}}


def stacked_items(output: Sequence[Mapping[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """``pred`` and ``label`` of an iteration as batches: a metric computes a batch as fast as one item."""
    pred, label = (torch.stack([item[key] for item in output]) for key in ("pred", "label"))
    return pred.float(), label
