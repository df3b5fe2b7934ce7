"""The runs behind a table: each a training and its evaluation by the bundle, in a folder and processes of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from ignite.engine import Engine
from monai.bundle import ConfigParser
from published import TABLE1
from timing import names

from glmamba_monai.data.datalist import find_items, patient_of, split_subjects
from glmamba_monai.engines import SubjectMetrics
from glmamba_monai.engines.evaluation import METRICS_FILE, SUMMARY_FILE, Row, rows_of
from glmamba_monai.engines.weights import CHECKPOINT_FILE, read_checkpoint
from glmamba_monai.files import require_writable, write_csv, write_json
from glmamba_monai.metrics import CONVENTIONS
from glmamba_monai.networks import build_network, find_network

FOLDER = Path(__file__).resolve().parent
CONFIGS = FOLDER.parent / "bundle" / "configs"
TRAIN, EVALUATE = CONFIGS / "train.json", CONFIGS / "evaluate.json"
RUN_FILE, SLICES_FILE, LOG_FILE = "run.json", "slices.csv", "log.txt"
# The best of those that were tried on subjects that are not in our tables (docs/training.md), or starting points: for
# figures to publish, let each network try several rates (--learning_rates) on subjects that are not in the table.
LEARNING_RATES = {
    "srcnn": 1e-3,
    "srcnn_ref": 1e-3,
    "glmamba_light": 1.5e-3,
    "glmamba_paper": 8e-4,
    "glmamba": 8e-4,
    **dict.fromkeys(TABLE1, 8e-4),
}
# Options that say where a run happens. It may go on elsewhere; every other option must stay as it was.
PLACES = ("dataset_dir", "cache_dir", "cache_rate", "num_workers", "device")
OWN = ("network", "scale", "seed", "learning_rate", "output_dir", "resume", "weights")  # each run has its own
LENGTH = ("epochs", "iterations_per_epoch", "batch_size", "crop_size", "warmup_steps")
POLL = 0.2  # s between two looks at whether a process has ended or shall end


@dataclass(frozen=True)
class Run:
    """One training and its evaluation."""

    network: str
    scale: int
    fold: str
    seed: int

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return f"{self.network}_{self.scale}x_{re.sub(r'[^A-Za-z0-9._-]', '_', self.fold)}_seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.network} {self.scale}x, {self.fold}, seed {self.seed}"


class Stopped(Exception):
    """A run was ended because the command ends: neither a result nor a failure."""


@dataclass(frozen=True)
class Place:
    """Where a run happens.

    Attributes:
        environment: variables of its processes that differ from this one's.
        stop: once set, its processes are ended.
    """

    environment: Mapping[str, str]
    stop: threading.Event


def places(jobs: int, device: object, stop: threading.Event) -> list[Place]:
    """One place for each of the runs that go side by side, spread over the GPUs that this process sees.

    Args:
        jobs: how many.
        device: the bundle's option, None for its default.
        stop: of all of them.

    Raises:
        ValueError: ``jobs`` is no number from 1 on, or the device is one GPU by its number.
    """
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise ValueError(f"jobs={jobs!r}: expected a number of at least 1")
    if jobs == 1:  # as this process is: nothing is to be shared out
        return [Place({}, stop)]
    if re.search(r"cuda:\d", str(device)):
        raise ValueError(
            f"device={device}: with several jobs each gets its GPU; write cuda, or set CUDA_VISIBLE_DEVICES"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    gpus = [str(i) for i in range(count)] if visible is None else visible.split(",")[:count]
    # Without this each process would start a thread for every core.
    threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs))}
    return [
        Place({**threads, **({"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)].strip()} if gpus else {})}, stop)
        for i in range(jobs)
    ]


class Protocol:
    """What all rows of a table share: data, split, length of the training.

    Args:
        dataset_dir: folder of subjects in one of the layouts, or a JSON datalist.
        output_dir: folder of the tables; each run has its own in ``runs`` below it.
        folds: whom to hold out. None: the split of the bundle (``--validation``; a datalist's own, if it has one), as
            one fold; "all": each patient in turn; or names of subjects, each in turn, those joined by "+" together.
        learning_rates: those that differ from :data:`LEARNING_RATES`.
        overlays: names of configs of the bundle that are laid over ``train.json`` in every training.
        options: further arguments of the bundle, for every training and evaluation.

    Raises:
        FileNotFoundError, ValueError: the data cannot be used, or an argument is wrong.
    """

    def __init__(
        self,
        dataset_dir: str,
        output_dir: str,
        folds: object = None,
        learning_rates: Mapping[str, float] | None = None,
        overlays: str | Sequence[str] = (),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.runs_dir = require_writable(Path(output_dir) / "runs")
        self.options = {**(options or {}), "dataset_dir": str(dataset_dir)}
        if self.options.get("device") in ("cpu", "cuda"):
            self.options["device"] = f"$torch.device('{self.options['device']}')"
        self.learning_rates = {**LEARNING_RATES, **(learning_rates or {})}
        for name in self.learning_rates:
            find_network(name)
        self.overlays = names(overlays) if overlays else []
        self.training = [TRAIN, *(CONFIGS / f"{name}.json" for name in self.overlays)]
        for config in self.training:
            if not config.is_file():
                raise FileNotFoundError(f"overlays={overlays!r}: there is no {config}")
        parser = ConfigParser()
        parser.read_config([str(config) for config in (*self.training, EVALUATE)])
        for name in self.options:
            if name in OWN or name.partition("#")[0] not in parser:
                raise ValueError(f"--{name}: is no argument of this command, nor one of the bundle that it passes on")
        parser.update(self.options)
        evaluation = ConfigParser()
        evaluation.read_config([str(TRAIN), str(EVALUATE)])
        # An option of what only an overlay has would be an error there.
        self.of_trainings = {name for name in self.options if (name.rpartition("#")[0] or name) not in evaluation}
        self.length = {name: parser.get_parsed_content(name) for name in LENGTH}
        self.pair = {name: parser[name] for name in ("target", "reference")}
        datalist, split = find_items(dataset_dir, **self.pair, layout=parser["layout"])
        self.subjects = {name: [item["subject"] for item in items] for name, items in datalist.items()}
        validation = self.options.pop("validation", parser["validation"])
        self.held_out = self._held_out(folds, validation, split)

    def _held_out(self, folds: object, validation: Any, split: bool) -> dict[str, list[str] | None]:
        """Who is held out in each fold; None where the datalist says it."""
        if split:
            if folds is not None:
                raise ValueError(f"folds={folds!r}: the datalist has a split of its own; leave --folds out")
            return {"split": None}
        present = self.subjects["training"]
        if folds is None:  # seed 0, whatever the seed of the training is
            return {"split": split_subjects(present, validation, 0)[1]}
        chosen = sorted({patient_of(s) for s in present}) if folds == "all" else names(folds)
        known = {*present, *map(patient_of, present)}
        return {fold: split_subjects(present, [fold] if fold in known else fold.split("+"))[1] for fold in chosen}

    def settings(self, run: Run) -> dict[str, Any]:
        """What the result of a run depends on, as JSON returns it.

        Raises:
            ValueError: its network has no learning rate.
        """
        trained = has_parameters(run.network)
        if trained and run.network not in self.learning_rates:
            raise ValueError(
                f"network {run.network!r} has no learning rate here; name one: --learning_rates "
                f"\"{{'{run.network}': 8e-4}}\""
            )
        settings = {
            **{name: value for name, value in self.options.items() if name not in PLACES},
            **self.pair,
            **({**self.length, "overlays": self.overlays} if trained else {}),
            "learning_rate": self.learning_rates[run.network] if trained else None,
            "subjects": self.subjects,
            "held_out": self.held_out[run.fold],
        }
        return json.loads(json.dumps(settings, default=str))

    def perform(self, run: Run, place: Place) -> bool:
        """Train and evaluate, as far as that has not been done. Several runs may be performed at the same time.

        Returns:
            Whether there was anything to do.

        Raises:
            RuntimeError: it fails, or its folder holds a run with other settings.
            Stopped: its place was told to stop.
        """
        folder = self.runs_dir / run.folder
        settings = self.settings(run)
        record = read_record(folder) or {"run": asdict(run), "settings": settings, "history": None}
        differing = sorted(
            name for name in settings | record["settings"] if settings.get(name) != record["settings"].get(name)
        )
        if differing:
            raise RuntimeError(
                f"{folder}: holds a run with another {', '.join(differing)}; "
                "remove that folder or use another output_dir"
            )
        if is_finished(folder):
            return False
        write_json(folder / RUN_FILE, record)
        checkpoint = folder / CHECKPOINT_FILE
        options = {**self.options, "network": run.network, "scale": run.scale, "seed": run.seed, "output_dir": folder}
        if self.held_out[run.fold] is not None:
            options["validation"] = self.held_out[run.fold]
        if record["history"] is None:
            record["history"] = []
            if has_parameters(run.network):
                rate = {"learning_rate": settings["learning_rate"], "resume": True}
                run_bundle("training", self.training, {**options, **rate}, folder / LOG_FILE, place)
                record["history"] = read_checkpoint(checkpoint)["history"]
            write_json(folder / RUN_FILE, record)
        # The last epoch's weights: those of the best one, model.pt, were chosen on the subjects of the table.
        weights = {"weights": str(checkpoint)} if has_parameters(run.network) else {}
        metric = "validate#key_metric#val_psnr"
        per_slice = {f"{metric}#_target_": "runs.SliceMetrics", f"{metric}#file": str(folder / SLICES_FILE)}
        options.pop("val_slices", None)  # those of the validations between epochs; the table is of all slices
        options = {name: value for name, value in options.items() if name not in self.of_trainings}
        options |= {**weights, **per_slice}
        run_bundle("evaluating", [TRAIN, EVALUATE], options, folder / LOG_FILE, place)
        return True


def has_parameters(network: str) -> bool:
    """Whether there is anything to train."""
    with torch.device("meta"):
        return any(True for _ in build_network(network).parameters())


def read_record(folder: Path) -> dict[str, Any] | None:
    """What is known of a run: ``run``, ``settings`` and, once it is trained, its learning curve ``history``."""
    file = folder / RUN_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def is_finished(folder: Path) -> bool:
    """Whether an evaluation has ended here; it writes its summary last."""
    return all((folder / name).is_file() for name in (METRICS_FILE, SLICES_FILE, SUMMARY_FILE))


def run_bundle(run_id: str, configs: Sequence[Path], options: Mapping[str, Any], log: Path, place: Place) -> None:
    """``python -m monai.bundle run``, with all that it prints in a log file.

    Raises:
        RuntimeError: it fails; with the reason.
        Stopped: the place was told to stop; the process has ended.
    """
    arguments = ["--config_file", str([str(config) for config in configs])]
    for name, value in options.items():
        arguments += [f"--{name}", "$None" if value is None else str(value)]  # "None" would leave the default
    # The evaluation imports this file, for its metrics.
    path = os.pathsep.join([str(FOLDER), str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("a", encoding="utf-8") as file:
        begin = file.tell()
        code = run_process(
            [sys.executable, "-m", "monai.bundle", "run", run_id, *arguments],
            {**os.environ, **place.environment, "PYTHONPATH": path},
            file,
            place.stop,
        )
    if code:
        text = log.read_bytes()[begin:].decode("utf-8", errors="replace")
        # Of a chain of exceptions the first is the cause; MONAI wraps it in its own.
        cause = re.search(r"^[\w.]+(?:Error|Exception|Interrupt)\b.*", text, re.MULTILINE)
        reason = cause.group() if cause else "no error is named"
        raise RuntimeError(f"{run_id} ended with {code}: {reason} (see {log})")


def run_process(command: Sequence[str], environment: Mapping[str, str], output: IO[str], stop: threading.Event) -> int:
    """Run a command with all that it prints in a file; returns its exit code.

    Raises:
        Stopped: ``stop`` was set; the process has been killed.
    """
    if stop.is_set():
        raise Stopped(command[0])
    process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=dict(environment))
    try:
        while True:
            # A thread that waits hears of no signal: whoever does sets `stop`, which is looked at between two waits.
            try:
                return process.wait(POLL)
            except subprocess.TimeoutExpired:
                if stop.is_set():
                    raise Stopped(command[0]) from None
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


class SliceMetrics(SubjectMetrics):
    """The evaluation's metrics, with those of each slice written into a file when it ends.

    Args:
        file: the CSV file, a row a subject, method and slice.
        arguments: see :class:`SubjectMetrics`.
    """

    def __init__(self, file: str, **arguments: Any) -> None:
        self.file = file
        super().__init__(**arguments)

    def reset(self) -> None:
        super().reset()
        self.slice_rows: list[Row] = []

    def update(self, output: tuple[Mapping[str, Any], Mapping[str, Any]]) -> None:
        super().update(output)
        item, result = output
        for i in range(item["target"].shape[-1]):
            rows = rows_of(self.network, _one_slice(item, i), _one_slice(result, i))
            self.slice_rows += [{**row, "slice": i} for row in rows]

    def completed(self, engine: Engine, name: str) -> None:
        super().completed(engine, name)
        write_csv(self.file, self.slice_rows, ("subject", "method", "slice", *CONVENTIONS))


def _one_slice(item: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The same item with one slice of each volume ``(1, X, Y, S)``."""
    return {
        key: value.as_subclass(torch.Tensor)[..., index : index + 1]
        if isinstance(value, torch.Tensor) and value.dim() == 4
        else value
        for key, value in item.items()
    }


def plan(protocol: Protocol, network_names: Sequence[str], scales: Sequence[int], seeds: Sequence[int]) -> list[Run]:
    """All runs, so that a table without gaps is there as early as possible.

    An interpolation has neither seed nor training, and stands in the results of every network beside it: it has a run
    of its own only where no network is trained.
    """
    trained = [name for name in network_names if has_parameters(name)]
    chosen, seeds = (trained, seeds) if trained else (network_names, seeds[:1])
    return [
        Run(network, scale, fold, seed)
        for seed in seeds
        for fold in protocol.held_out
        for scale in scales
        for network in chosen
    ]
