"""What a training shows: its loss, a line per epoch, pictures for TensorBoard, a table at the end."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from monai.engines import Workflow
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from glmamba_monai.engines.evaluation import SubjectMetrics, format_table, over_subjects
from glmamba_monai.engines.weights import WEIGHTS_FILE, load_weights


class LossCurve:
    """TensorBoard's curve of the loss, the mean of every epoch, and the end of a training that diverges.

    To read a loss is to wait for the GPU, which in turn waits for what it is to do next. So the losses stay where they
    are and are read together, every :data:`INTERVAL` iterations and at the end of an epoch. Its mean becomes the metric
    ``epoch_loss``; with the last loss, all work of the epoch is done when its time is taken.

    Attach it before the validation, which a training that has diverged need not reach.

    Args:
        folder: TensorBoard's log folder; None for no curve (ranks above 0).
    """

    INTERVAL = 50

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.folder = folder
        self.writer: SummaryWriter | None = None

    def attach(self, engine: Workflow) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self.epoch_started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.iteration_completed)
        engine.add_event_handler(Events.COMPLETED, self.completed)

    def completed(self, engine: Workflow) -> None:
        if self.writer is not None:
            self.writer.close()

    def epoch_started(self, engine: Workflow) -> None:
        if self.writer is None and self.folder is not None:  # not before: bad data shall leave no folder behind
            self.writer = SummaryWriter(str(self.folder))
        self.unread: list[torch.Tensor] = []
        self.total = 0.0

    def iteration_completed(self, engine: Workflow) -> None:
        state = engine.state
        self.unread.append(state.output[0]["loss"])
        of_epoch = (state.iteration - 1) % state.epoch_length + 1
        if of_epoch % self.INTERVAL == 0 or of_epoch == state.epoch_length:
            self._read(state.iteration)
            state.metrics["epoch_loss"] = self.total / of_epoch

    def _read(self, last_iteration: int) -> None:
        losses = torch.stack(self.unread).tolist()
        self.unread = []
        for iteration, loss in enumerate(losses, last_iteration - len(losses) + 1):
            if not math.isfinite(loss):
                raise ValueError(
                    f"the loss is {loss} at iteration {iteration}: the training has diverged. "
                    "checkpoint.pt is of the last whole epoch; lower --learning_rate"
                )
            if self.writer is not None:
                self.writer.add_scalar("train_loss", loss, iteration)
        if self.writer is not None:
            self.writer.flush()
        self.total += sum(losses)


class EpochLine:
    """Prints a line per epoch: loss, PSNR, images per second of training alone, time left.

    Attach it after :class:`LossCurve` and the validation.
    """

    def __init__(self, evaluator: Workflow) -> None:
        self.evaluator = evaluator

    def attach(self, engine: Workflow) -> None:
        engine.add_event_handler(Events.STARTED, self.started)
        engine.add_event_handler(Events.EPOCH_STARTED, self.epoch_started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch_completed)

    def started(self, engine: Workflow) -> None:
        self.start = time.perf_counter()
        self.epochs_done = 0  # by this process: a resumed training starts later

    def epoch_started(self, engine: Workflow) -> None:
        self.images = 0

    def iteration_completed(self, engine: Workflow) -> None:
        self.images += len(engine.state.batch)

    def epoch_completed(self, engine: Workflow) -> None:
        state = engine.state
        seconds = state.times[Events.EPOCH_COMPLETED.name]  # of the steps alone, without validation
        parts = [f"epoch {state.epoch}/{state.max_epochs}", f"loss {state.metrics['epoch_loss']:.4f}"]
        parts += self.quality(engine)
        processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.epochs_done += 1
        elapsed = time.perf_counter() - self.start
        left = elapsed / self.epochs_done * (state.max_epochs - state.epoch)
        parts += [f"{processes * self.images / seconds:.1f} images/s", f"{format_duration(left)} left"]
        print(", ".join(parts), flush=True)

    def quality(self, engine: Workflow) -> list[str]:
        """What the line says of the epoch's results, and of the validation's where there was one."""
        parts, validation = [f"train PSNR {engine.state.metrics['train_psnr']:.2f} dB"], self.evaluator.state
        if validation.epoch == engine.state.epoch:
            psnr, zero_filling = validation.metrics["val_psnr"], validation.metrics["zero_filling_psnr"]
            parts.append(f"validation PSNR {psnr:.2f} dB ({psnr - zero_filling:+.2f} over zero-filling)")
        return parts


def format_duration(seconds: float) -> str:
    """``h:mm:ss``."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


class ValidationPictures:
    """After each validation, shows the middle slice of its last subject in TensorBoard.

    Target, zero-filling and result in the range of the target, and the error of both five-fold.

    Args:
        folder: TensorBoard's log folder.
    """

    ERROR_GAIN = 5

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.writer = SummaryWriter(str(folder))

    def attach(self, engine: Workflow) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, lambda _: self.writer.flush())

    def __call__(self, engine: Engine) -> None:
        item, result = engine.state.batch[-1], engine.state.output[-1]
        volumes = {
            "target": item["target"],
            "zero_filling": item["zero_filling"],
            "super_resolved": result["pred"],
        }
        slices = {
            name: torch.as_tensor(v[0, ..., v.shape[-1] // 2]).cpu() / float(item["data_range"])
            for name, v in volumes.items()
        }
        for name in ("zero_filling", "super_resolved"):
            slices[f"{name}_error_x{self.ERROR_GAIN}"] = self.ERROR_GAIN * (slices[name] - slices["target"]).abs()
        for name, image in slices.items():
            # Arrays hold x first; a picture has its rows along y.
            self.writer.add_image(f"validation/{name}", image.T.flip(0)[None].clamp(0, 1), engine.state.epoch)


class FinalTable:
    """When a training has ended, validates its best weights once more and prints the table.

    Args:
        network: without any distributed wrapper.
        name: its registered name.
        evaluator: the engine that validates.
        metrics: its metric.
        folder: where ``model.pt`` lies.
        show: whether this process prints (rank 0).
    """

    def __init__(
        self,
        network: nn.Module,
        name: str,
        evaluator: Workflow,
        metrics: SubjectMetrics,
        folder: str | os.PathLike[str],
        show: bool = True,
    ) -> None:
        self.network = network
        self.name = name
        self.evaluator = evaluator
        self.metrics = metrics
        self.weights = Path(folder) / WEIGHTS_FILE
        self.show = show

    def attach(self, engine: Workflow) -> None:
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Workflow) -> None:
        if dist.is_available() and dist.is_initialized():
            dist.barrier()  # rank 0 may still be writing the weights
        load_weights(self.network, self.weights, self.name)
        epoch = self.evaluator.state.best_metric_epoch
        self.evaluator.run(engine.state.epoch)
        if self.show:
            rows = self.metrics.rows
            title = f"Validation with the best weights (epoch {epoch}){over_subjects(rows, 'held-out subjects')}"
            print(f"\n{format_table(rows, title)}\n\nweights: {self.weights}", flush=True)
