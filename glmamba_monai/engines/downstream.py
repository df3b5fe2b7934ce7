"""One segmenter on originals and on the results of every method: the downstream experiment (docs/downstream.md).

The evaluator for super-resolution and that for segmentation form one chain in memory: of each subject,
:class:`MethodVolumes` takes the volumes from the first, MONAI's ``ValidationHandler`` runs the second on them, and
:class:`DownstreamResults` keeps what comes out.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.engines import Evaluator, Workflow
from monai.metrics import compute_dice, compute_hausdorff_distance
from torch import Tensor

from glmamba_monai.data.datalist import DATALIST_FILE, Item, evaluation_items, patient_of
from glmamba_monai.data.segmentation import labelled_items
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
from glmamba_monai.engines.checkpoint import CHECKPOINT_FILE, WEIGHTS_FILE, load_weights, read_checkpoint
from glmamba_monai.engines.evaluation import BASELINES
from glmamba_monai.files import finite, write_atomically, write_csv, write_json
from glmamba_monai.networks import build_network
from glmamba_monai.pictures import draw
from glmamba_monai.transforms import ScaleByMedian

logger = logging.getLogger(__name__)

# --- weights that are missing are trained -------------------------------------------------------------------------


def trained_segmenter(weights: str | None, output_dir: str, bundle_root: str, arguments: Mapping[str, Any]) -> str:
    """The file of the segmenter's weights, which are trained where they are missing.

    Args:
        weights: the file to use; None for that in ``output_dir/segmentation``.
        output_dir: folder of the results.
        bundle_root: folder of the bundle, whose ``segmentation_train.json`` trains.
        arguments: of that training.
    """
    if weights is not None:
        return weights
    folder = Path(output_dir) / "segmentation"
    if not _is_finished(folder):
        _train(bundle_root, ["train", "segmentation_train"], {**arguments, "output_dir": output_dir})
    return str(folder / WEIGHTS_FILE)


def segmented_items(evaluate_on: str, dataset_dir: str, segmenter: str, *arguments: Any) -> list[Item]:
    """The subjects with a label to segment, by the split of the segmenter's training.

    Args:
        evaluate_on: see :func:`~glmamba_monai.data.evaluation_items`, as for the other arguments.
        dataset_dir: the data set.
        segmenter: file of the segmenter's weights, with its split beside it.
        arguments: what follows ``output_dir`` there.
    """
    items = evaluation_items(evaluate_on, dataset_dir, Path(segmenter).parent, *arguments)
    return labelled_items(items, dataset_dir)


def trained_network(
    weights: str | None,
    network: str,
    scale: Any,
    output_dir: str,
    bundle_root: str,
    items: Sequence[Item],
    arguments: Mapping[str, Any],
) -> str | None:
    """The file of the super-resolution network's weights, which are trained where they are missing.

    They are those in ``output_dir/NETWORK_SCALEx``, of the last epoch, since the best one was chosen on the subjects
    held out; or else ``model.pt`` in ``output_dir`` itself if it is of this network. A training that is needed goes to
    the former and holds the given subjects out.

    Args:
        weights: the file to use instead.
        network: registered name.
        scale: factor, or the factors of both axes.
        output_dir: folder of the results.
        bundle_root: folder of the bundle, whose ``train.json`` trains.
        items: the subjects to be segmented.
        arguments: of that training.

    Returns:
        None for an interpolation, which has no weights.
    """
    if weights is not None or not any(True for _ in build_network(network).parameters()):
        return weights
    own = Path(output_dir) / f"{network}_{scale_name(scale)}"
    if not _is_finished(own):
        if _holds(Path(output_dir), network):
            return str(Path(output_dir) / WEIGHTS_FILE)
        held_out = [item["subject"] for item in items]
        options = {"network": network, "scale": scale, "validation": held_out, "output_dir": str(own)}
        _train(bundle_root, ["train"], {**arguments, **options})
    last = own / CHECKPOINT_FILE
    return str(last if last.is_file() else own / WEIGHTS_FILE)


def _is_finished(folder: Path) -> bool:
    """Whether weights lie there, and no training that was stopped before its last epoch."""
    if not (folder / WEIGHTS_FILE).is_file():
        return False
    if not (folder / CHECKPOINT_FILE).is_file():
        return True
    checkpoint = read_checkpoint(folder / CHECKPOINT_FILE)
    return checkpoint["epoch"] >= checkpoint.get("max_epochs", 0)


def _holds(folder: Path, network: str) -> bool:
    """Whether weights of that network lie there."""
    for name in (CHECKPOINT_FILE, WEIGHTS_FILE):  # the checkpoint knows its network's name
        if (folder / name).is_file() and (folder / WEIGHTS_FILE).is_file():
            try:
                load_weights(build_network(network), folder / name, network)
            except ValueError:
                return False
            return True
    return False


def _train(bundle_root: str, configs: Sequence[str], arguments: Mapping[str, Any]) -> None:
    files = [str(Path(bundle_root) / "configs" / f"{name}.json") for name in configs]
    print(f"\ntraining {arguments.get('network', 'the segmenter')} first, into {arguments['output_dir']}", flush=True)
    workflow = ConfigWorkflow(files, workflow_type="train", logging_file=False, **{**arguments, "resume": True})
    workflow.initialize()
    workflow.run()
    workflow.finalize()


def require_held_out(items: Sequence[Item], weights: Sequence[str | None]) -> None:
    """Make sure that no patient was trained on, as far as the splits beside files of weights say.

    Raises:
        ValueError: one was.
    """
    for path in filter(None, weights):
        file = Path(path).parent / DATALIST_FILE
        if file.is_file():
            training = json.loads(file.read_text(encoding="utf-8"))["training"]
            trained_on = {patient_of(item["subject"]) for item in training}
            if found := sorted(item["subject"] for item in items if patient_of(item["subject"]) in trained_on):
                raise ValueError(
                    f"{', '.join(found)}: {path} was trained on their patients (see {file}); segment patients whom "
                    "neither training has seen, or train with the same --validation"
                )


# --- the chain ----------------------------------------------------------------------------------------------------


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


def segmentation_evaluator(
    weights: str, volumes: MethodVolumes, bundle_root: str, arguments: Mapping[str, Any]
) -> Evaluator:
    """The evaluator of ``segmentation_train.json``, for other volumes and with the weights given.

    Args:
        weights: of the segmenter.
        volumes: what it is to run on.
        bundle_root: folder of the bundle.
        arguments: those of the segmenter's training.

    Raises:
        FileNotFoundError, ValueError: the weights are missing or do not fit.
    """
    parser = ConfigParser()
    parser.read_config([Path(bundle_root) / "configs" / f"{name}.json" for name in ("train", "segmentation_train")])
    own = {"validate#dataloader": volumes, "validate#handlers": [], "validate#key_metric": None}
    parser.update({**arguments, **own, "validate#evaluator#network": "@net"})
    try:
        load_weights(parser.get_parsed_content("net"), weights, parser.get_parsed_content("network"))
    except ValueError as error:
        found = parser.get_parsed_content("feature_size")
        raise ValueError(
            f"{error}; was the segmenter trained with another feature_size than {found}? Then name it in "
            "--segmentation_options"
        ) from error
    logger.info("segmenter loaded from %s", weights)
    return parser.get_parsed_content("validate#evaluator")


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

    ``dice.csv`` has a row a subject, method and factor, ``dice_summary.json`` what :func:`summarise_dice` makes of
    them. Rows of other networks and factors that an earlier run has written stay, if they are of the same segmenter and
    subjects; else they are kept in ``previous-dice.csv`` only. ``pictures`` holds, of each subject, the slice with most
    of the true mask, with outlines.

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
        engine.add_event_handler(Events.STARTED, lambda _: self.rows.clear())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.subject_completed)
        engine.add_event_handler(Events.COMPLETED, self.completed)

    def segmented(self, engine: Engine) -> None:
        """Keep what the segmenter makes of one volume."""
        (item,), (result,) = engine.state.batch, engine.state.output
        true, self.masks[item["method"]] = _plain(result["label"]), _plain(result["pred"])
        metrics = mask_metrics(self.masks[item["method"]], true, item["spacing"].tolist())
        names = {"scale": self.scale, "method": item["method"], "subject": item["subject"]}
        self.rows.append({**names, **metrics, "segmenter": self.segmenter})

    def subject_completed(self, engine: Engine) -> None:
        """Draw the subject whose volumes have all been segmented."""
        made = {row["method"]: row["dice"] for row in self.rows if row["subject"] == self.volumes.subject}
        print(f"{self.volumes.subject}: Dice " + ", ".join(f"{k} {v:.4f}" for k, v in made.items()), flush=True)
        picture = draw(self.volumes.volumes, self.volumes.mask, self.masks, made, self.volumes.affine)
        name = f"{self.volumes.subject}_{self.volumes.network}_{self.scale}.png"
        write_atomically(self.output_dir / "pictures" / name, picture.save)

    def completed(self, engine: Engine) -> None:
        file = self.output_dir / DICE_FILE
        rows = [*self._earlier(file), *self.rows]
        write_csv(file, rows, COLUMNS)
        summary = summarise_dice(rows)
        write_json(self.output_dir / DICE_SUMMARY_FILE, {**self.description, "scales": finite(summary)})
        print(f"\n{format_dice(summary)}\n\nwritten to {file}", flush=True)

    def _earlier(self, file: Path) -> list[Row]:
        """Rows of earlier runs that belong into one table with these."""
        rows = read_rows(file) if file.is_file() else []
        new = {(row["scale"], row["method"]) for row in self.rows}
        subjects = {row["subject"] for row in self.rows}
        kept = []
        for key in dict.fromkeys((row["scale"], row["method"]) for row in rows):
            of_method = [row for row in rows if (row["scale"], row["method"]) == key]
            if {row["subject"] for row in of_method} != subjects or of_method[0]["segmenter"] != self.segmenter:
                previous = write_atomically(file.with_name(f"previous-{file.name}"), lambda p: shutil.copyfile(file, p))
                logger.warning(
                    "%s: %s at %s is of other subjects or another segmenter: left out, kept in %s",
                    *(file, key[1], key[0], previous.name),
                )
            elif key not in new:
                kept += of_method
        return kept
