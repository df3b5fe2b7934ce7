"""Subjects with a label, and the random slices that a segmenter is trained on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from monai.data import Dataset

from glmamba_monai.data.datalist import Datalist, Item
from glmamba_monai.data.dataset import SliceDataset, SliceDraw
from glmamba_monai.data.layouts import LAYOUT_PATTERNS

logger = logging.getLogger(__name__)


def labelled_items(items: Sequence[Item], dataset_dir: object) -> list[Item]:
    """The items that have a label ``seg``; the others are left out with a line each.

    Args:
        items: of :func:`~glmamba_monai.data.prepare_datalist`.
        dataset_dir: the data set, for the message.

    Raises:
        FileNotFoundError: none has one.
    """
    labelled = [item for item in items if "seg" in item]
    if not labelled:
        patterns = "\n".join(f"  {name}: {p}" for name, p in LAYOUT_PATTERNS.items() if "seg" in p)
        raise FileNotFoundError(
            f"dataset_dir {dataset_dir}: none of {', '.join(item['subject'] for item in items)} has a label; "
            f'expected files (or the key "seg" of a JSON datalist) are\n{patterns}'
        )
    for item in items:
        if "seg" not in item:
            logger.warning("subject %s has no label (seg): left out of the segmentation", item["subject"])
    return labelled


def labelled_datalist(datalist: Datalist) -> Datalist:
    """A datalist with the subjects of both sections that have a label.

    Raises:
        FileNotFoundError: a section has none.
    """
    folder = datalist["made_with"]["dataset_dir"]
    return {**datalist, **{name: labelled_items(datalist[name], folder) for name in ("training", "validation")}}


def segmentation_items(items: Sequence[Item]) -> list[Item]:
    """What a segmenter is trained on: the target contrast as ``image``, the label as ``target``."""
    return [{"subject": item["subject"], "image": item["target"], "target": item["seg"]} for item in items]


class LabelledSlices(SliceDataset):
    """Random slices, of which a fixed share shows some of the label; empty ones are never drawn.

    Args:
        volumes: items with ``image (1, X, Y, S)``, 0 outside the head, and the mask ``target (1, X, Y, S)``.
        transform: see :class:`~glmamba_monai.data.SliceDataset`.
        labelled: share of the slices with label, of a volume that has both kinds.
    """

    def __init__(self, volumes: Dataset, transform: Callable[..., Any], labelled: float = 0.7) -> None:
        super().__init__(volumes, transform)
        self.labelled = labelled
        self._cumulated: dict[int, np.ndarray] = {}

    def sample(self, draw: SliceDraw) -> dict[str, Any]:
        if draw.volume not in self._cumulated:
            volume = self.data[draw.volume]
            lesion, head = (np.asarray(volume[key].amax(dim=(0, 1, 2))) > 0 for key in ("target", "image"))
            self._cumulated[draw.volume] = np.cumsum(_weights(lesion, head & ~lesion, self.labelled))
        cumulated = self._cumulated[draw.volume]
        # The slice in whose part of the whole the position lies, and the middle of it, for `sample` to find it.
        index = int(np.searchsorted(cumulated, draw.position * cumulated[-1], side="right"))
        return super().sample(draw._replace(position=(index + 0.5) / len(cumulated)))


def _weights(labelled: np.ndarray, others: np.ndarray, share: float) -> np.ndarray:
    """Weights of slices: those with label have ``share`` of the sum, where there are others, too."""
    return share * labelled / max(labelled.sum(), 1) + (1 - share) * others / max(others.sum(), 1)
