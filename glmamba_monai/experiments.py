"""Experiments that several trainings belong to: what is missing is trained first, by other configs of the bundle.

So far the downstream experiment (docs/downstream.md). It stands above the engines, which are parts of a config and open
none.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow
from monai.engines import Evaluator

from glmamba_monai.bundle import require_options
from glmamba_monai.data.datalist import DATALIST_FILE, Item, evaluation_items, patient_of
from glmamba_monai.data.segmentation import labelled_items
from glmamba_monai.dice import scale_name
from glmamba_monai.engines.downstream import MethodVolumes
from glmamba_monai.engines.weights import (
    CHECKPOINT_FILE,
    WEIGHTS_FILE,
    load_weights,
    other_settings,
    read_checkpoint,
)
from glmamba_monai.networks import build_network

logger = logging.getLogger(__name__)


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
    settings = {name: arguments[name] for name in ("target",) if name in arguments}
    if not _is_finished(folder, settings):
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
    held out; or else ``model.pt`` in ``output_dir`` itself if it is of this network and, as far as the checkpoint
    beside it says, of these contrasts and this factor. A training that is needed goes to the former and holds the given
    subjects out.

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
    settings = {"scale": scale, **{name: arguments[name] for name in ("target", "reference") if name in arguments}}
    if not _is_finished(own, settings):
        if _holds(Path(output_dir), network, settings):
            return str(Path(output_dir) / WEIGHTS_FILE)
        held_out = [item["subject"] for item in items]
        options = {"network": network, "scale": scale, "validation": held_out, "output_dir": str(own)}
        _train(bundle_root, ["train"], {**arguments, **options})
    last = own / CHECKPOINT_FILE
    return str(last if last.is_file() else own / WEIGHTS_FILE)


def _is_finished(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether weights lie there, and no training that was stopped before its last epoch or is of something else.

    What is not finished is resumed, which refuses a training of something else and says of what it is.
    """
    if not (folder / WEIGHTS_FILE).is_file():
        return False
    if not (folder / CHECKPOINT_FILE).is_file():
        return True
    checkpoint = read_checkpoint(folder / CHECKPOINT_FILE)
    return checkpoint["epoch"] >= checkpoint.get("max_epochs", 0) and not other_settings(checkpoint, settings)


def _holds(folder: Path, network: str, settings: Mapping[str, Any]) -> bool:
    """Whether weights of that network lie there, and of no training of something else."""
    for name in (CHECKPOINT_FILE, WEIGHTS_FILE):  # the checkpoint knows its network's name, and what it is of
        if (folder / name).is_file() and (folder / WEIGHTS_FILE).is_file():
            try:
                load_weights(build_network(network), folder / name, network)
            except ValueError:
                return False
            return not other_settings(read_checkpoint(folder / name), settings)
    return False


def _train(bundle_root: str, configs: Sequence[str], arguments: Mapping[str, Any]) -> None:
    files = [str(Path(bundle_root) / "configs" / f"{name}.json") for name in configs]
    require_options(arguments, files)
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
        FileNotFoundError, ValueError: the weights are missing or do not fit, or an argument is none of that training's.
    """
    files = [str(Path(bundle_root) / "configs" / f"{name}.json") for name in ("train", "segmentation_train")]
    require_options(arguments, files)
    parser = ConfigParser()
    parser.read_config(files)
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
