"""Inference on a folder: a volume that cannot be prepared does not cost the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from monai.engines import SupervisedEvaluator

from glmamba_monai.data import LEFT_OUT_KEY


class VolumeEvaluator(SupervisedEvaluator):
    """MONAI's ``SupervisedEvaluator`` over a :class:`~glmamba_monai.data.LenientDataset`, one volume a batch.

    What the data set has left out is passed by; after the last volume an error names all of it. What goes wrong with
    the network, its weights or the writing of results ends the run.

    Attributes:
        left_out: ``{subject: why}``, of the last run.

    Raises:
        RuntimeError: from ``run``, volumes were left out; the others are written.
    """

    left_out: dict[str, str]

    def run(self, global_epoch: int = 1) -> None:
        """Go through all volumes; see MONAI's."""
        self.left_out = {}
        super().run(global_epoch)
        if self.left_out:
            why = "".join(f"\n  {subject}: {reason}" for subject, reason in self.left_out.items())
            raise RuntimeError(
                f"{len(self.left_out)} of {self.state.epoch_length} volumes left out; a result of an earlier run stays "
                f"where it lies:{why}"
            )

    def _iteration(self, engine: SupervisedEvaluator, batchdata: Mapping[str, Any]) -> dict[str, Any]:
        if LEFT_OUT_KEY not in batchdata:
            return super()._iteration(engine, batchdata)
        self.left_out.update(zip(batchdata["subject"], batchdata[LEFT_OUT_KEY]))
        return {}
