"""Checkpoints that survive a crash, and weights that are refused when they do not fit."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import os
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines import Workflow
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from glmamba_monai.data import LEFT_OUT_KEY
from glmamba_monai.data.datalist import DATALIST_FILE, Datalist, write_datalist
from glmamba_monai.files import write_checkpoint
from glmamba_monai.networks import NETWORKS, build_network, find_network
from glmamba_monai.transforms.augmentation import FACTORS
from glmamba_monai.transforms.grid import ABOUT, WHOLE, whole_factor
from glmamba_monai.transforms.volume import FACTOR_KEY

logger = logging.getLogger(__name__)

CHECKPOINT_FILE, WEIGHTS_FILE = "checkpoint.pt", "model.pt"
FACTOR_FILE = "model_{}x.pt"  # weights for one factor alone
LEARNT = 0.5  # dB above zero-filling: it has learnt something
LOST = 0.2  # of the most it has learnt, at most: it has collapsed


def random_state() -> dict[str, Any]:
    """State of every global random generator, in types that ``torch.load(weights_only=True)`` accepts."""
    _, keys, *numpy_rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(keys.astype(np.int64)), *numpy_rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Undo what has happened to the global random generators since :func:`random_state`."""
    random.setstate(state["python"])
    keys, *numpy_rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *numpy_rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


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


class WeightAverage:
    """Exponential moving average of a network's parameters, updated by every step of its optimiser.

    Before step n + 1 the average counts for n / (n + 9), at most ``decay``, so that the first steps are soon forgotten.
    Torch's ``AveragedModel`` waits for the GPU at every update.

    Args:
        network: without any distributed wrapper.
        optimizer: its optimiser.
        decay: what a step leaves of the average before it, in the long run.
    """

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, decay: float = 0.999) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False)
        # Listed once, not in every step, which has no time to walk through two networks.
        self._average = list(self.network.parameters())
        self._source = list(network.parameters())
        self.decay = decay
        self.steps = 0
        # A hook cannot be forgotten, as a handler can that each config lists anew.
        optimizer.register_step_post_hook(lambda *_: self.update())

    def update(self) -> None:
        average = get_ema_multi_avg_fn(min(self.decay, self.steps / (self.steps + 9)))
        average(self._average, self._source, None)
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "network": self.network.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.network.load_state_dict(state["network"])


def require_no_collapse(history: list[dict[str, float]], folder: Path) -> None:
    """Stop a training that has lost what it had learnt: by itself none has come back (docs/training.md).

    Args:
        history: metrics of its validations so far, see :class:`TrainingState`.
        folder: where its weights lie.

    Raises:
        RuntimeError: it stood well above zero-filling, and the last two validations hardly do.
    """
    gains = [row["val_psnr"] - row["zero_filling_psnr"] for row in history if "zero_filling_psnr" in row]
    best = max(gains, default=0.0)
    if best >= LEARNT and max(gains[-2:]) < LOST * best:
        idist.barrier()  # the first process may still be writing, and is ended where another one fails
        raise RuntimeError(
            f"the training has collapsed: its validations were up to {best:.2f} dB above zero-filling and are now "
            f"{gains[-1]:.2f} dB; the best weights are kept in {folder / WEIGHTS_FILE}. Train again with a lower "
            "--learning_rate"
        )


class TrainingState:
    """Writes ``checkpoint.pt`` after every epoch, ``model.pt`` whenever validation improves, and resumes.

    The checkpoint holds network, average, optimiser, schedule, epoch, best metric and the state of every random
    generator; draws of slices and augmentation depend on seed and epoch alone
    (:class:`~glmamba_monai.data.SliceSampler`).
    So on a CPU a training that was killed and resumed ends with the same bits as one that was not.

    Its ``history`` is the learning curve: ``epoch``, ``iteration``, ``seconds`` and the evaluator's metrics, for every
    validation. The seconds are those of all steps so far, in whichever process, without validation and saving.
    A training that has collapsed is stopped (:func:`require_no_collapse`), after it has been written, and not resumed.

    Attach it as the last handler of the trainer, so that an epoch's validation lies behind it.

    Args:
        network: without any distributed wrapper.
        optimizer: its optimiser.
        schedule: its learning-rate schedule.
        evaluator: the engine that validates; its key metric decides what is best.
        folder: where the files go.
        name: registered name of the network; kept in the checkpoint.
        datalist: the split; written beside the weights once the training starts, when every volume has been read.
        settings: what else the training is of (contrasts, factor), plain values; kept in the checkpoint. A training of
            others is not resumed: its best metric and its weights would pass for those of this one.
        resume: continue from the checkpoint that stands in ``folder``, if there is one.
        write: whether this process writes (rank 0).
        average: what to take the weights of ``model.pt`` from, instead of the network; the evaluator's network, then.
        choose: whether validation chooses the weights of ``model.pt``; else they are those of the last epoch.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        evaluator: Workflow,
        folder: str | os.PathLike[str],
        name: str,
        datalist: Datalist,
        settings: Mapping[str, Any] | None = None,
        resume: bool = False,
        write: bool = True,
        average: WeightAverage | None = None,
        choose: bool = True,
    ) -> None:
        self.network = network
        self.average = average
        self.choose = choose
        self.optimizer = optimizer
        self.schedule = schedule
        self.evaluator = evaluator
        self.folder = Path(folder)
        self.name = name
        self.datalist = datalist
        self.settings = dict(settings or {})
        self.resume = resume
        self.write = write
        self.best_epoch = 0
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []

    def attach(self, engine: Workflow) -> None:
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch_completed)

    def started(self, engine: Workflow) -> None:
        path = self.folder / CHECKPOINT_FILE
        if not self.resume:
            if self.write:
                self._set_aside()
        elif path.is_file():
            self._restore(engine, path)
        else:
            logger.warning("resume: there is no %s yet; starting from the beginning", path)
        if self.write:
            write_datalist(self.datalist, self.folder)

    def epoch_completed(self, engine: Workflow) -> None:
        state = self.evaluator.state
        if engine.state.epoch == engine.state.max_epochs != state.epoch:
            self.evaluator.run(engine.state.epoch)  # whatever the interval, the last epoch is validated
        improved = state.best_metric_epoch > self.best_epoch
        self.best_epoch = max(self.best_epoch, state.best_metric_epoch)
        self.seconds += engine.state.times[Events.EPOCH_COMPLETED.name]
        if state.epoch == engine.state.epoch:
            progress = {"epoch": engine.state.epoch, "iteration": engine.state.iteration, "seconds": self.seconds}
            self.history.append({**progress, **state.metrics})
        if self.write:
            self._save(engine, improved)
        require_no_collapse(self.history, self.folder)  # by all processes, or the others would wait

    def _save(self, engine: Workflow, improved: bool) -> None:
        """Write the checkpoint, and the weights if validation has improved or does not choose them."""
        state = self.evaluator.state
        if improved or not self.choose:
            shipped = self.network if self.average is None else self.average.network
            # On the CPU: torch.load puts tensors back where they were, and others may have no GPU.
            weights = {name: tensor.cpu() for name, tensor in shipped.state_dict().items()}
            write_checkpoint(self.folder / WEIGHTS_FILE, weights)
        write_checkpoint(
            self.folder / CHECKPOINT_FILE,
            {
                "name": self.name,
                "settings": self.settings,
                "network": self.network.state_dict(),
                "average": None if self.average is None else self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule_step": self.schedule.last_epoch,
                "epoch": engine.state.epoch,
                "max_epochs": engine.state.max_epochs,
                "iteration": engine.state.iteration,
                "best_metric": state.best_metric,
                "best_metric_epoch": state.best_metric_epoch,
                "seconds": self.seconds,
                "history": self.history,
                "random_state": random_state(),
            },
        )

    def _set_aside(self) -> None:
        """A new training must not destroy the results of earlier ones: they are kept under ``previous-``."""
        names = [name for name in (CHECKPOINT_FILE, WEIGHTS_FILE, DATALIST_FILE) if (self.folder / name).is_file()]
        prefixes = itertools.chain(["previous-"], (f"previous-{n}-" for n in itertools.count(2)))
        prefix = next(p for p in prefixes if not any((self.folder / f"{p}{name}").exists() for name in names))
        for name in names:
            os.replace(self.folder / name, self.folder / f"{prefix}{name}")
            logger.warning("%s is of an earlier training; kept as %s%s", self.folder / name, prefix, name)

    def _restore(self, engine: Workflow, path: Path) -> None:
        checkpoint = read_checkpoint(path)
        if not isinstance(checkpoint, dict) or "random_state" not in checkpoint:
            raise ValueError(
                f"{path}: is no checkpoint of a training (are these weights alone?); "
                "put the checkpoint back, or train without --resume"
            )
        if engine.state.max_epochs < checkpoint["epoch"]:
            raise ValueError(
                f"{path}: is of epoch {checkpoint['epoch']}, but the training is to end at epoch "
                f"{engine.state.max_epochs}; raise --epochs"
            )
        for name, recorded in other_settings(checkpoint, self.settings).items():
            raise ValueError(
                f"{path}: is of a training with --{name} {recorded}, this one has {self.settings[name]}; "
                "resume it with the options it was started with, or train in another --output_dir"
            )
        average = checkpoint.get("average")
        if (average is None) != (self.average is None):
            raise ValueError(
                f"{path}: is of a training {'without' if average is None else 'with'} an average of the weights; "
                "resume it with the configs it was started with"
            )
        states = (checkpoint["optimizer"], self.optimizer.state_dict())
        found, expected = ([len(group["params"]) for group in state["param_groups"]] for state in states)
        if found != expected:
            raise ValueError(
                f"{path}: its optimiser has groups of {found} parameters, that of this training of {expected}; "
                "resume it with the configs it was started with"
            )
        load_weights(self.network, path, self.name)
        if self.average is not None:
            self.average.load_state_dict(average)
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        # The step alone, so that a training may be resumed to be made longer.
        self.schedule.last_epoch = checkpoint["schedule_step"]
        self.schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        engine.state.epoch, engine.state.iteration = checkpoint["epoch"], checkpoint["iteration"]
        self.evaluator.state.best_metric = checkpoint["best_metric"]
        self.evaluator.state.best_metric_epoch = self.best_epoch = checkpoint["best_metric_epoch"]
        # Checkpoints of earlier versions have neither.
        self.seconds, self.history = checkpoint.get("seconds", 0.0), checkpoint.get("history", [])
        set_random_state(checkpoint["random_state"])
        require_no_collapse(self.history, self.folder)  # one that is resumed would train on, or pass for a result
        logger.info("resumed from %s, epoch %d", path, checkpoint["epoch"])
