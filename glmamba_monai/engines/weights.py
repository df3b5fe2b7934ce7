"""Files of weights: which one is used, and that it fits the network."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import nn

from glmamba_monai.data import LEFT_OUT_KEY
from glmamba_monai.networks import NETWORKS, build_network, find_network
from glmamba_monai.transforms.augmentation import FACTORS
from glmamba_monai.transforms.grid import ABOUT, WHOLE, whole_factor
from glmamba_monai.transforms.volume import FACTOR_KEY

logger = logging.getLogger(__name__)

CHECKPOINT_FILE, WEIGHTS_FILE = "checkpoint.pt", "model.pt"
FACTOR_FILE = "model_{}x.pt"  # weights for one factor alone


def read_checkpoint(path: str | os.PathLike[str]) -> Any:
    """Load a file of :func:`torch.save`, tensors and plain values only, onto the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file, or holds code.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever pickle or the zip reader happen to raise on a damaged file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if "weights_only" in reason:  # torch advises to run what is in it
            reason = "it holds other things than tensors and plain values"
        raise ValueError(
            f"{path}: is no file of weights, or a damaged one ({reason}); copy it again or choose another file"
        ) from error


def load_weights(network: nn.Module, path: str | os.PathLike[str], name: str) -> None:
    """Load weights into a network, all or none.

    Args:
        network: the network.
        path: a bare state_dict, or a checkpoint of this package.
        name: registered name of the network, for the message.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_weights`.
    """
    network.load_state_dict(read_weights(network, path, name))


def with_initial_weights(network: nn.Module, path: str | os.PathLike[str] | None, name: str) -> nn.Module:
    """The network a training begins with: as it was built, or with the weights of an earlier training.

    Args:
        network: as it was built.
        path: file of the weights, see :func:`load_weights`; None for none.
        name: registered name of the network, for the message.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_weights`.
    """
    if path is not None:
        load_weights(network, path, name)
        logger.info("the training of %s begins with the weights of %s", name, path)
    return network


def read_weights(network: nn.Module, path: str | os.PathLike[str], name: str) -> dict[str, torch.Tensor]:
    """The weights in a file, which fit a network; the network stays as it is.

    Args:
        network: the network.
        path: a bare state_dict, or a checkpoint of this package.
        name: registered name of the network, for the message.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the weights belong to another network; the message names the one they fit.
    """
    content = read_checkpoint(path)
    weights = content.get("network", content) if isinstance(content, dict) else content
    if _shapes(weights) != _shapes(network.state_dict()):
        with torch.device("meta"):
            fitting = [n for n in NETWORKS.names if _shapes(build_network(n).state_dict()) == _shapes(weights) != {}]
        remedy = f"they fit {' or '.join(fitting)}: name it with --network" if fitting else "they fit no known network"
        raise ValueError(f"{path}: the weights do not fit network {name!r}; {remedy}")
    stored = content.get("name") if isinstance(content, dict) else None
    if stored in NETWORKS and not _same_layout(stored, name):  # rows of Table 1 differ in ways that no shape shows
        raise ValueError(f"{path}: the checkpoint is of network {stored!r}, not {name!r}: name it with --network")
    return weights


def other_settings(content: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of its training that is not so; weights alone, and earlier versions, say nothing.

    Args:
        content: of :func:`read_checkpoint`.
        settings: see :class:`TrainingState`.
    """
    recorded = content.get("settings", {}) if isinstance(content, dict) else {}
    return {k: recorded[k] for k, v in settings.items() if k in recorded and _pair(recorded[k]) != _pair(v)}


def _pair(setting: Any) -> list[Any]:
    """One value for both axes is two that are the same."""
    return np.broadcast_to(setting, 2).tolist()


def _same_layout(one: str, other: str) -> bool:
    a, b = find_network(one), find_network(other)
    return (a.build, a.arguments) == (b.build, b.arguments)


def _shapes(weights: Any) -> dict[str, tuple[int, ...]]:
    entries = weights.items() if isinstance(weights, dict) else ()
    return {k: tuple(v.shape) for k, v in entries if isinstance(v, torch.Tensor)}


def find_weights(
    weights: str | None, folders: Sequence[str], network: nn.Module, factor: float | Sequence[float] | None = None
) -> str | None:
    """The file of weights to use: the one named, else one of the first folder that has any for that factor.

    There ``model_2x.pt`` goes before ``model.pt`` where the factor is 2
    (:func:`~glmamba_monai.transforms.grid.whole_factor`), and so on.

    Args:
        weights: the file that is named.
        folders: where to look for another.
        network: the network.
        factor: in plane, a number or one per axis; None where there is none, or none is known: ``model.pt``.

    Returns:
        Its path; None for a network without parameters (an interpolation), which needs none.

    Raises:
        FileNotFoundError: there is none. Random weights are never used in their place.
    """
    if not _has_parameters(network):
        return None
    whole = None if factor is None else whole_factor(factor)
    names = [WEIGHTS_FILE] if whole is None else [FACTOR_FILE.format(whole), WEIGHTS_FILE]
    if weights is not None and Path(weights).is_dir():
        raise FileNotFoundError(
            f"weights {weights}: is a folder, expected a file such as {Path(weights) / WEIGHTS_FILE}"
        )
    candidates = [Path(folder) / name for folder in folders for name in names] if weights is None else [Path(weights)]
    for path in candidates:
        if path.is_file():
            return str(path)
    wanted = "" if weights is not None or factor is None else f" for the factor {_factor_name(factor)}"
    looked = " nor ".join(map(str, candidates))
    others = {} if weights is not None else _factor_files(folders)
    there = "; there is " + " and ".join(f"{path} for {only}x alone" for only, path in others.items()) if others else ""
    raise FileNotFoundError(
        f"no weights{wanted}: there is no {looked}{there}. Train first (python -m monai.bundle run training "
        "--config_file bundle/configs/train.json) or name a file with --weights"
    )


def possible_weights(folders: Sequence[str], network: nn.Module) -> list[str]:
    """The files that :func:`find_weights` may choose where none is named, whatever the factor.

    Args:
        folders: where to look.
        network: the network, with parameters.

    Raises:
        FileNotFoundError: there is none.
    """
    own = [find_weights(None, folders, network, factor) for factor in _factor_files(folders)]
    if own and not any((Path(folder) / WEIGHTS_FILE).is_file() for folder in folders):
        return own  # enough where all volumes have such a factor
    return list(dict.fromkeys([*own, find_weights(None, folders, network)]))  # one file may serve several factors


def _has_parameters(network: nn.Module) -> bool:
    return any(True for _ in network.parameters())


def _factor_files(folders: Sequence[str]) -> dict[int, Path]:
    """The factors for which there are weights of their own, and the first file of each."""
    pattern = re.compile(re.escape(FACTOR_FILE).replace(r"\{\}", "([2-9]|[1-9][0-9]+)"))
    found: dict[int, Path] = {}
    for folder in folders:
        for path in sorted(Path(folder).glob(FACTOR_FILE.format("*"))):
            match = pattern.fullmatch(path.name)
            if match:
                found.setdefault(int(match[1]), path)
    return found


def _is_trained(factor: Sequence[float]) -> bool:
    """Whether the training of weights for all factors draws such factors; 1 is an interpolated volume's, of any."""
    lowest, highest = min(factor), max(factor)
    alike = highest - lowest <= WHOLE * highest
    return alike and (highest == 1 or ((1 - ABOUT) * min(FACTORS) <= lowest and highest <= (1 + ABOUT) * max(FACTORS)))


def _factor_name(factor: float | Sequence[float]) -> str:
    return " x ".join(f"{f:.3g}" for f in np.atleast_1d(factor))


class WeightsLoader:
    """Loads weights into the network of an evaluator; see :func:`find_weights` and :func:`load_weights`.

    One file, before the evaluator runs, where a file or the factor is named. Else each volume gets the weights of its
    factor, which stands in the batch under ``factor``
    (:class:`~glmamba_monai.transforms.MatchReferenced`); a file is loaded when it is another one than before.

    What is missing or unfit is refused as early as that can be known: on construction where no folder has weights, or
    none for the factor that is named; before the first volume is loaded where any file that may be chosen does not
    fit the network; before the network sees a volume where there are none for its factor.

    Args:
        network: the network.
        name: its registered name.
        folders: where to look for weights, in this order.
        weights: the file to use instead.
        scale: the factor of all volumes, or one per in-plane axis; "auto" where each has its own.

    Attributes:
        path: of the weights in use; None before the first volume where each has its own factor, and for a network
            without parameters.

    Raises:
        FileNotFoundError, ValueError: weights are missing or do not fit.
    """

    def __init__(
        self,
        network: nn.Module,
        name: str,
        folders: Sequence[str],
        weights: str | None = None,
        scale: str | float | Sequence[float] = "auto",
    ) -> None:
        self.network = network
        self.name = name
        self.folders = folders
        self.scale = scale
        self.by_volume = weights is None and isinstance(scale, str) and _has_parameters(network)
        self.path: str | None = None
        if self.by_volume:
            self.choices = possible_weights(folders, network)
        else:
            self.path = find_weights(weights, folders, network, None if isinstance(scale, str) else scale)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self)
        if self.by_volume:
            engine.add_event_handler(Events.ITERATION_STARTED, self.volume_started)

    def __call__(self, engine: Engine | None = None) -> None:
        if self.by_volume:
            self.path = None  # since an earlier run anything may have become of the network
            for path in self.choices:
                read_weights(self.network, path, self.name)
        elif self.path is not None:
            load_weights(self.network, self.path, self.name)
            logger.info("weights of %s loaded from %s", self.name, self.path)
            self._warn_of_another_factor(Path(self.path))

    def _warn_of_another_factor(self, path: Path) -> None:
        """Say where the checkpoint beside the weights, if there is a good one, is of another factor than is wanted."""
        if isinstance(self.scale, str) or path.name not in (CHECKPOINT_FILE, WEIGHTS_FILE):
            return  # previous-model.pt, say, is not of the training beside it
        with contextlib.suppress(FileNotFoundError, ValueError):
            for scale in other_settings(
                read_checkpoint(path.with_name(CHECKPOINT_FILE)), {"scale": self.scale}
            ).values():
                logger.warning("%s: is of a training with --scale %s, used with --scale %s", path, scale, self.scale)

    def volume_started(self, engine: Engine) -> None:
        batch = engine.state.batch
        if LEFT_OUT_KEY in batch:
            return
        subjects = ", ".join(map(str, batch.get("subject", ["the volume"])))
        factors = batch[FACTOR_KEY].reshape(-1, 2).tolist() if FACTOR_KEY in batch else [None]
        try:
            files = {find_weights(None, self.folders, self.network, factor): factor for factor in factors}
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{subjects}: {error}") from error
        if len(files) > 1:
            named = " and ".join(map(str, files))
            raise ValueError(f"{subjects}: their factors ask for the weights {named}; expected one volume a batch")
        ((path, factor),) = files.items()
        another = path != self.path
        if another:
            load_weights(self.network, path, self.name)
            self.path = path
        known = "" if factor is None else f" (factor {_factor_name(factor)})"
        done = "loaded from" if another else "kept, those of"
        logger.info("weights of %s %s %s for %s%s", self.name, done, path, subjects, known)
        if factor is not None and Path(path).name == WEIGHTS_FILE and not _is_trained(factor):
            logger.warning(
                f"{subjects}: the factor is {_factor_name(factor)}; weights for all factors are trained for "
                f"{min(FACTORS)} to {max(FACTORS)}, the same along both axes"
            )
