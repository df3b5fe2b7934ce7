"""The app folder of a MONAI Label server, and what its training hands to ``train.json``; see docs/monailabel.md."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from monai.bundle import ConfigParser

from glmamba_monai.bundle import locate_bundle
from glmamba_monai.engines.weights import (
    FACTOR_FILE,
    WEIGHTS_FILE,
    find_weights,
    load_weights,
    possible_weights,
    read_weights,
)
from glmamba_monai.files import write_atomically, write_json
from glmamba_monai.networks import build_network
from glmamba_monai.transforms.grid import whole_factor
from glmamba_monai.transforms.pair import volume_name

MODEL = "glmamba"  # name in MONAI Label
NETWORK = "glmamba"  # of inference.json
SAMPLE_APP = "sample-apps/monaibundle/main.py"
BUNDLE_PARTS = ("configs", "docs", "LICENSE")
LABELLED = "monailabel_datalist.json"
BY_FACTOR = "by factor"  # in the list of files of weights that clients choose from, the first and so their default
# Of a training request, besides MONAI Label's own; what is not named is train.json's.
TRAINING_OPTIONS = ("scale", "iterations_per_epoch", "batch_size", "crop_size", "learning_rate", "val_slices")
# The server of the sample app finds its class by the name of a direct base.
MAIN = '''"""MONAI Label's sample app for bundles (sample_app.py) with the answers and the training of glmamba_monai."""

import sample_app
from monailabel.interfaces.app import MONAILabelApp

from glmamba_monai.label_server import GLMambaApp


class MyApp(GLMambaApp, sample_app.MyApp, MONAILabelApp):
    pass
'''
STUB_FOLDER = "torchvision_stub"
STUB = '''"""Lets torchvision import beside a CPU build of torch, which lacks two operators that nothing here calls."""

import torch

library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
'''

PathLike = str | os.PathLike[str]


def set_up_app(folder: PathLike, weights: PathLike | None = None, bundle_root: PathLike | None = None) -> str:
    """Make the app folder of a MONAI Label server from what is installed; nothing is downloaded.

    It holds MONAI Label's sample app for bundles and a copy of the bundle, as ``model/glmamba``. A copy, because
    training in the app writes into the bundle and replaces its weights: neither the bundle it was made of nor another
    app changes, and the folder still works when the former moves.

    Args:
        folder: to make; must not exist or be empty.
        weights: file of weights, used for all volumes; None for those of the bundle, chosen by the factor of each.
        bundle_root: folder of the bundle; None for the one beside the package.

    Returns:
        The command line that starts the server, with ``STUDIES`` for the folder of the images.

    Raises:
        ValueError: the folder is in use, or the weights do not fit.
        FileNotFoundError: MONAI Label is not installed here, or there are no weights.
        OSError: the folder cannot be written.
    """
    folder = Path(os.path.abspath(os.path.expanduser(folder)))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder; name a new one for the app")
    sample = _sample_app()
    root = Path(bundle_root) if bundle_root is not None else Path(locate_bundle(look_at_command_line=False))
    network, models = build_network(NETWORK), [str(root / "models")]
    # The server wants a model.pt, so it goes first: without one there is no app.
    files = [find_weights(None if weights is None else str(weights), models, network)]
    if weights is None:
        files += [file for file in possible_weights(models, network) if file not in files]
    try:
        for file in files:
            read_weights(network, file, NETWORK)  # refused now, not at the first request
    except ValueError as error:
        raise ValueError(f"{error}. The app serves {NETWORK!r} alone") from error
    stub = not _torchvision_imports()

    def write(partial: Path) -> None:
        shutil.copytree(sample, partial, ignore=shutil.ignore_patterns("__pycache__", "model", "logs"))
        (partial / "main.py").rename(partial / "sample_app.py")
        (partial / "main.py").write_text(MAIN, encoding="utf-8")
        bundle = partial / "model" / MODEL
        (bundle / "models").mkdir(parents=True)
        for part in BUNDLE_PARTS:
            source = root / part
            if source.is_dir():
                shutil.copytree(source, bundle / part)
            elif source.is_file():
                shutil.copyfile(source, bundle / part)
        for file, name in zip(files, [WEIGHTS_FILE, *(Path(file).name for file in files[1:])]):
            shutil.copyfile(file, bundle / "models" / name)
        if stub:
            (partial / STUB_FOLDER).mkdir()
            (partial / STUB_FOLDER / "sitecustomize.py").write_text(STUB, encoding="utf-8")

    write_atomically(folder, write)
    # zoo_source: with its default the server looks for the model in the internet; sam2: it would load that model.
    options = ["--conf", "models", MODEL, "--conf", "zoo_source", "ngc", "--conf", "sam2", "false"]
    start = [sys.executable, "-m", "monailabel.main", "start_server", "--app", str(folder), "--studies", "STUDIES"]
    command = shlex.join([*start, *options, "--host", "127.0.0.1", "--port", "8000"])
    return f"PYTHONPATH={shlex.quote(str(folder / STUB_FOLDER))} {command}" if stub else command


def _sample_app() -> Path:
    """The folder of MONAI Label's app for bundles, in this Python environment."""
    try:
        files = metadata.files("monailabel") or []
    except metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"MONAI Label is not installed for {sys.executable}, and label-app copies an app of it; make an "
            "environment of its own with monailabel==0.8.5 and glmamba_monai, as docs/monailabel.md says, and run "
            "label-app there"
        ) from None
    main = next((Path(str(f.locate())).resolve() for f in files if f.as_posix().endswith(SAMPLE_APP)), None)
    if main is None or not main.is_file():
        raise FileNotFoundError(
            f"{main or SAMPLE_APP}: the installed MONAI Label lacks its sample apps; install it again: "
            "pip install --force-reinstall --no-deps monailabel==0.8.5"
        )
    return main.parent


def _torchvision_imports() -> bool:
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # operator torchvision::nms does not exist
        return False
    except ImportError:
        pass  # a stub for torch does not bring it
    return True


def choose_weights(bundle_root: PathLike, named: Any = None, factor: float | Sequence[float] | None = None) -> Path:
    """The file of weights in the app for a request.

    Args:
        bundle_root: the bundle in the app.
        named: the request's ``model_filename``; none, :data:`BY_FACTOR` or no text (MONAI Label puts the list of all
            files there) where the factor shall choose (:func:`~glmamba_monai.engines.find_weights`).
        factor: in plane, of the volume or the training.

    Raises:
        FileNotFoundError: there is no such file.
    """
    models = Path(bundle_root) / "models"
    if not isinstance(named, str) or named in ("", BY_FACTOR):
        try:
            return Path(find_weights(None, [str(models)], build_network(NETWORK), factor))
        except FileNotFoundError:
            raise FileNotFoundError(f"{models / WEIGHTS_FILE}: the weights are gone; put them back") from None
    if not (models / Path(named).name).is_file():
        there = ", ".join(sorted(file.name for file in models.glob("*.pt")))
        raise FileNotFoundError(f"model_filename {named}: there is no such file in {models}; it has {there}")
    return models / Path(named).name


def training_overrides(
    bundle_root: PathLike,
    items: Sequence[Mapping[str, str]],
    request: Mapping[str, Any],
    overrides: Mapping[str, Any],
) -> dict[str, Any]:
    """What to train with instead of what MONAI Label hands to a bundle.

    It would put its items into ``train#dataset#data`` and its number of epochs into ``train#trainer#max_epochs``. As a
    datalist and as ``epochs`` they are checked, split by patient and recorded as every other training's.

    Args:
        bundle_root: the bundle in the app.
        items: of the images with a final label: ``image``, the reference, and ``label``, the high-resolution target.
        request: of the training. Besides MONAI Label's ``pretrained``, ``val_split`` and ``model_filename`` (of the
            weights to begin with; else those for its factor) it may name any of ``TRAINING_OPTIONS``.
        overrides: MONAI Label's, by the names of ``train.json``.

    Returns:
        Overrides of ``train.json``.

    Raises:
        ValueError: there are no two labelled images, or two of one name, or an option is no number.
        FileNotFoundError: the weights to begin with are not there.
    """
    if len(items) < 2:
        raise ValueError(
            f"training: found {len(items)} image(s) with a final label, expected at least 2, one of them to validate "
            "on; submit high-resolution targets as labels of their references"
        )
    root = Path(bundle_root)
    epochs = overrides["train#trainer#max_epochs"]
    if isinstance(epochs, list) or not _are_numbers(epochs) or epochs < 1:
        raise ValueError(f"max_epochs {epochs!r}: expected a number from 1 on")
    options = {name: request[name] for name in TRAINING_OPTIONS if request.get(name) is not None}
    for name, value in options.items():
        if value != "$None" and not _are_numbers(value):  # any other text after a $ would be run as Python
            raise ValueError(f'{name} {value!r}: expected a number, a list of numbers or "$None"')
    scale = options.setdefault("scale", ConfigParser.load_config_file(str(root / "configs" / "train.json"))["scale"])
    if not _are_numbers(scale) or np.size(scale) > 2 or np.min(scale) <= 1:
        raise ValueError(f"scale {scale!r}: expected a number above 1, or two, one for each axis in plane")
    datalist = {"training": [{"subject": volume_name(item["image"]), **item} for item in items]}
    ours: dict[str, Any] = {
        "bundle_root": str(root),
        "dataset_dir": str(write_json(root / LABELLED, datalist)),
        "epochs": int(epochs),
        "device": f"$torch.device({overrides['device']!r})",
        **options,
    }
    if 0 < request.get("val_split", -1) < 1:
        ours["validation"] = request["val_split"]
    if request.get("pretrained", True):
        ours["initial_weights"] = str(choose_weights(root, request.get("model_filename"), scale))
    return ours


def _are_numbers(value: Any) -> bool:
    """Whether it is a number or a list of some."""
    numbers = value if isinstance(value, list) and value else [value]
    return all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers)


def use_trained_weights(bundle_root: PathLike, overrides: Mapping[str, Any]) -> str:
    """Let the server use the weights of a training at its factor, if they are better.

    What counts is the PSNR on the patients that this training has held out, of these weights and of those that the
    server uses at that factor. They become the file for that factor, ``model_2x.pt`` say; of a factor that is no whole
    number, ``model.pt``. A file in whose place they come is kept, ``previous-model_2x.pt``.

    Args:
        bundle_root: the bundle in the app.
        overrides: of the training, see :func:`training_overrides`.

    Returns:
        What was decided and why.
    """
    root, scale = Path(bundle_root), overrides["scale"]
    current, trained = choose_weights(root, factor=scale), root / "results" / WEIGHTS_FILE
    before, after = (_held_out_psnr(root, file, overrides) for file in (current, trained))
    figures = f"PSNR {after:.2f} dB on the held-out images, {before:.2f} dB with the weights in use"
    if not after > before:  # NaN is no better
        return f"the trained weights are no better ({figures}): the server goes on with those it has; {trained}"
    whole = whole_factor(scale)
    place = current.with_name(WEIGHTS_FILE if whole is None else FACTOR_FILE.format(whole))
    former = place.with_name(f"previous-{place.name}") if place.is_file() else current
    if former != current:
        write_atomically(former, lambda partial: shutil.copyfile(place, partial))
    write_atomically(place, lambda partial: shutil.copyfile(trained, partial))
    volumes = f"{whole}x"
    if whole is None:
        volumes = f"every factor without a file of its own, though they were judged at {scale} alone"
    return (
        f"the server uses the trained weights from now on, {place}, for volumes of {volumes} ({figures}); the former "
        f"are in {former}"
    )


def _held_out_psnr(root: Path, weights: Path, overrides: Mapping[str, Any]) -> float:
    parser = ConfigParser()
    parser.read_config(root / "configs" / "train.json")
    unused = {"initial_weights": None, "train#handlers": [], "validate#handlers": []}
    parser.update({**overrides, **unused, "resume": True})  # its split
    load_weights(parser.get_parsed_content("net"), weights, parser.get_parsed_content("network"))
    evaluator = parser.get_parsed_content("validate#evaluator")
    evaluator.run()
    return float(evaluator.state.metrics["val_psnr"])
