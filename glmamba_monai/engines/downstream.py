"""One segmenter on originals and on the results of every method: the downstream experiment (docs/downstream.md).

The evaluator for super-resolution and that for segmentation form one chain in memory: of each subject,
:class:`MethodVolumes` takes the volumes from the first, MONAI's ``ValidationHandler`` runs the second on them, and
:class:`DownstreamResults` keeps what comes out. Where both come from says :mod:`glmamba_monai.experiments`.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines import Workflow
from monai.metrics import compute_dice, compute_hausdorff_distance
from torch import Tensor

from glmamba_monai.dice import (
    COLUMNS,
    DICE_FILE,
    DICE_SUMMARY_FILE,
    ORIGINAL,
    Row,
    format_dice,
    read_rows,
    scale_name,
    summarise_dice,
)
from glmamba_monai.engines.evaluation import BASELINES
from glmamba_monai.files import file_stem, finite, write_atomically, write_csv, write_json
from glmamba_monai.pictures import draw
from glmamba_monai.transforms import ScaleByMedian

logger = logging.getLogger(__name__)

PREVIOUS_FILE = f"previous-{DICE_FILE}"


class MethodVolumes:
    """The volumes of the subject that an evaluator has just super-resolved, as batches for a segmenter.

    Attach it to that evaluator. Each batch is one volume: ``image (1, 1, X, Y, S)`` scaled as in the segmenter's
    training, the mask ``target (1, 1, X, Y, S)``, ``subject``, ``method`` and ``spacing (1, 3)`` in mm.

    Args:
        network: registered name of the super-resolution network.
    """

    def __init__(self, network: str) -> None:
        self.network = network
        self.methods = tuple(dict.fromkeys((ORIGINAL, *BASELINES, network)))
        self.volumes: dict[str, Tensor] = {}

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Take ``target``, ``seg`` and the baselines of the one item, and its result ``pred``, all ``(1, X, Y, S)``."""
        (item,), (result,) = engine.state.batch, engine.state.output
        volumes = {ORIGINAL: item["target"], self.network: result["pred"], **{name: item[name] for name in BASELINES}}
        self.volumes = {method: _plain(volumes[method]) for method in self.methods}
        self.subject, self.mask = str(item["subject"]), _plain(item["seg"])
        self.affine = np.asarray(item["target"].affine.cpu())

    def __len__(self) -> int:
        return len(self.methods)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        spacing = torch.from_numpy(np.linalg.norm(self.affine[:3, :3], axis=0))[None]
        for method in self.methods:
            yield {
                "image": ScaleByMedian()(self.volumes[method])[None],
                "target": self.mask[None],
                "subject": [self.subject],
                "method": [method],
                "spacing": spacing,
            }


def _plain(volume: Tensor) -> Tensor:
    return torch.as_tensor(volume).as_subclass(torch.Tensor).detach().cpu()


def mask_metrics(predicted: Tensor, true: Tensor, spacing: Sequence[float]) -> dict[str, float]:
    """Dice and the 95 % Hausdorff distance in mm of two masks ``(1, X, Y, S)``, by MONAI, and their volumes in ml.

    Without a voxel in the true mask there is no Dice, without one in either no distance: NaN.
    """
    pair = {"y_pred": predicted[None].cpu(), "y": true[None].cpu()}
    distance = math.nan
    if predicted.any() and true.any():
        found = compute_hausdorff_distance(**pair, include_background=True, percentile=95, spacing=list(spacing))
        distance = found.item()
    voxel = math.prod(spacing) / 1000
    return {
        "dice": compute_dice(**pair).item(),
        "hd95_mm": distance,
        "true_ml": true.sum().item() * voxel,
        "predicted_ml": predicted.sum().item() * voxel,
    }


class DownstreamResults:
    """Collects the segmentations of all methods; at the end writes and shows the table.

    ``dice.csv`` has a row a subject, method and factor, ``dice_summary.json`` what
    :func:`~glmamba_monai.dice.summarise_dice` makes of them. Rows of other networks and factors that an earlier run has
    written stay, if they are of the same segmenter and subjects; else they are kept in ``previous-dice.csv`` only,
    which gathers such rows. ``pictures`` holds, of each subject, the slice with most of the true mask, with outlines.

    Until the end the rows of this run stand in ``unfinished-dice_NETWORK_SCALEx.csv``, where a run that fails leaves
    those of the subjects before: ``dice.csv`` never has a part of a run, nor a mixture of two.

    Attach it to the evaluator for super-resolution, behind the handler that runs the segmenter.

    Args:
        volumes: what the segmenter runs on.
        evaluator: the segmenter's.
        output_dir: folder.
        scale: factor.
        segmenter: file of its weights.
        description: what was done; stands in the summary.
    """

    def __init__(
        self,
        volumes: MethodVolumes,
        evaluator: Workflow,
        output_dir: str | os.PathLike[str],
        scale: Any,
        segmenter: str,
        description: Mapping[str, Any],
    ) -> None:
        self.volumes = volumes
        self.evaluator = evaluator
        self.output_dir = Path(output_dir)
        self.scale = scale_name(scale)
        self.segmenter = hashlib.sha256(Path(segmenter).read_bytes()).hexdigest()[:12]
        self.description = dict(description)
        self.rows: list[Row] = []
        self.masks: dict[str, Tensor] = {}

    def attach(self, engine: Engine) -> None:
        self.evaluator.add_event_handler(Events.ITERATION_COMPLETED, self.segmented)
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.subject_completed)
        engine.add_event_handler(Events.COMPLETED, self.completed)

    def started(self, engine: Engine) -> None:
        self.rows.clear()
        for name in (DICE_FILE, PREVIOUS_FILE):  # what is no such table is refused now, not after hours
            self._rows_of(name)

    def segmented(self, engine: Engine) -> None:
        """Keep what the segmenter makes of one volume."""
        (item,), (result,) = engine.state.batch, engine.state.output
        true, self.masks[item["method"]] = _plain(result["label"]), _plain(result["pred"])
        metrics = mask_metrics(self.masks[item["method"]], true, item["spacing"].tolist())
        names = {"scale": self.scale, "method": item["method"], "subject": item["subject"]}
        self.rows.append({**names, **metrics, "segmenter": self.segmenter})

    def subject_completed(self, engine: Engine) -> None:
        """Write and draw the subject whose volumes have all been segmented."""
        made = {row["method"]: row["dice"] for row in self.rows if row["subject"] == self.volumes.subject}
        print(f"{self.volumes.subject}: Dice " + ", ".join(f"{k} {v:.4f}" for k, v in made.items()), flush=True)
        write_csv(self.unfinished, self.rows, COLUMNS)
        picture = draw(self.volumes.volumes, self.volumes.mask, self.masks, made, self.volumes.affine)
        name = f"{file_stem(self.volumes.subject)}_{self.volumes.network}_{self.scale}.png"
        write_atomically(self.output_dir / "pictures" / name, picture.save)

    def completed(self, engine: Engine) -> None:
        file = self.output_dir / DICE_FILE
        rows = [*self._earlier(), *self.rows]
        write_csv(file, rows, COLUMNS)
        self.unfinished.unlink(missing_ok=True)
        summary = summarise_dice(rows)
        write_json(self.output_dir / DICE_SUMMARY_FILE, {**self.description, "scales": finite(summary)})
        print(f"\n{format_dice(summary)}\n\nwritten to {file}", flush=True)

    @property
    def unfinished(self) -> Path:
        """Where the rows of this run stand until it ends."""
        return self.output_dir / f"unfinished-dice_{self.volumes.network}_{self.scale}.csv"

    def _rows_of(self, name: str) -> list[Row]:
        file = self.output_dir / name
        return read_rows(file) if file.is_file() else []

    def _earlier(self) -> list[Row]:
        """Rows of earlier runs that belong into one table with these; those that do not are set aside."""
        rows, new, subjects = self._rows_of(DICE_FILE), {_method(row) for row in self.rows}, _subjects(self.rows)
        kept, left_out = [], []
        for method in dict.fromkeys(map(_method, rows)):
            of_method = [row for row in rows if _method(row) == method]
            if _subjects(of_method) != subjects or of_method[0]["segmenter"] != self.segmenter:
                left_out += of_method
                logger.warning(
                    "%s: %s at %s is of other subjects or another segmenter: left out, kept in %s",
                    *(self.output_dir / DICE_FILE, method[1], method[0], PREVIOUS_FILE),
                )
            elif method not in new:
                kept += of_method
        if left_out:
            write_csv(self.output_dir / PREVIOUS_FILE, [*self._rows_of(PREVIOUS_FILE), *left_out], COLUMNS)
        return kept


def _method(row: Row) -> tuple[str, str]:
    return row["scale"], row["method"]


def _subjects(rows: Sequence[Row]) -> set[str]:
    return {row["subject"] for row in rows}
