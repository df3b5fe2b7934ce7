"""The state of a training: checkpoints that survive a crash, and the average of the weights."""

from __future__ import annotations

import copy
import itertools
import logging
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Events
from monai.engines import Workflow
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from glmamba_monai.data.datalist import DATALIST_FILE, Datalist, write_datalist
from glmamba_monai.engines.weights import (
    CHECKPOINT_FILE,
    WEIGHTS_FILE,
    load_weights,
    other_settings,
    read_checkpoint,
)
from glmamba_monai.files import write_checkpoint

logger = logging.getLogger(__name__)

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
