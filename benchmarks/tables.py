"""The paper's tables from a folder of subjects: every row trained and evaluated alike, the published numbers beside.

python benchmarks/tables.py table1 --dataset_dir DATA --output_dir OUT --scale 2 --seeds 0,1,2
python benchmarks/tables.py table2 --dataset_dir DATA --output_dir OUT --scales 2,4 --folds all
python benchmarks/tables.py table4 --device cuda

A command that was stopped goes on where it stopped when it is given again. With several GPUs, --jobs trains side by
side.
"""

from __future__ import annotations

import csv
import io
import json
import os
import queue
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import IO, Any

import fire
import torch
from ignite.engine import Engine
from monai.bundle import ConfigParser
from scipy import stats
from timing import Stopwatch, Training, allow_tf32, milliseconds, names, numbers, print_heading
from torch import Tensor

from glmamba_monai.data.datalist import find_items, patient_of, split_subjects
from glmamba_monai.engines import SubjectMetrics
from glmamba_monai.engines.checkpoint import CHECKPOINT_FILE, read_checkpoint
from glmamba_monai.engines.evaluation import BASELINES, METRICS_FILE, SUMMARY_FILE, Row, rows_of
from glmamba_monai.engines.progress import format_duration
from glmamba_monai.files import require_writable, write_atomically, write_csv, write_json
from glmamba_monai.metrics import CONVENTIONS
from glmamba_monai.networks import NETWORKS, build_network, find_network, upsampling_of
from glmamba_monai.networks.cost import count_cost
from glmamba_monai.transforms import KSpaceDataConsistency, KSpaceLowResolution, KSpaceUpsample

FOLDER = Path(__file__).resolve().parent
CONFIGS = FOLDER.parent / "bundle" / "configs"
TRAIN, EVALUATE = CONFIGS / "train.json", CONFIGS / "evaluate.json"
RUN_FILE, SLICES_FILE, LOG_FILE = "run.json", "slices.csv", "log.txt"
COMPARED = "srcnn,srcnn_ref,glmamba_light,glmamba_paper,glmamba"  # every evaluation brings the interpolations

# --- what the paper prints, PSNR / SSIM ----------------------------------------------------------------------------

TABLE1 = {
    "table1_lr_local": "41.75 / .9899",
    "table1_lr_global": "41.91 / .9902",
    "table1_modulator": "42.06 / .9904",
    "table1_ref_global": "42.25 / .9908",
    "table1_ref_local": "42.35 / .9909",
    "table1_fusion": "42.43 / .9910",
    "table1_edge_loss": "42.58 / .9912",
    "table1_guided": "–",  # ours
}
TABLE2_COLUMNS = {2: (0, 2), 4: (1, 3)}  # of the rows below, at each factor
TABLE2_SETS = ("BraTS2021", "IXI")
TABLE2 = {  # BraTS2021 2x, BraTS2021 4x, IXI 2x, IXI 4x
    "SRCNN": ("37.88 / .9794", "30.44 / .9130", "29.23 / .8649", "28.12 / .8357"),
    "T2Net": ("39.72 / .9850", "32.48 / .9262", "31.31 / .9035", "29.73 / .8773"),
    "DiVANet": ("41.05 / .9886", "34.31 / .9498", "33.15 / .9320", "30.46 / .8946"),
    "MSHTNet": ("39.45 / .9841", "33.83 / .9442", "32.77 / .9276", "30.44 / .8963"),
    "McMRSR": ("40.28 / .9884", "34.72 / .9557", "36.08 / .9624", "33.51 / .9511"),
    "MINet": ("41.07 / .9887", "34.83 / .9563", "36.22 / .9618", "35.99 / .9607"),
    "WavTrans": ("42.02 / .9904", "35.74 / .9655", "38.77 / .9740", "37.99 / .9708"),
    "SANet": ("41.39 / .9893", "34.94 / .9577", "37.20 / .9683", "36.01 / .9604"),
    "GLMamba": ("42.58 / .9912", "36.75 / .9696", "39.47 / .9763", "38.23 / .9717"),
}
TABLE4 = {  # parameters (M) / FLOPs (G), by the paper's way of counting
    "MINet": "5.828 / 327.05",
    "WavTrans": "2.04 / 63.89",
    "SANet": "7.187 / 404.7",
    "GLMamba": "1.187 / 32.27",
}
TABLE4_SCALE = 2  # of its low-resolution slices; a network costs the same at any factor
PUBLISHED_AS = {"srcnn": "SRCNN", "glmamba_paper": "GLMamba"}

# --- how the rows are trained --------------------------------------------------------------------------------------

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
MIN_SUBJECTS = 5  # below, no test over subjects can find anything
MAX_LISTED = 40  # held-out subjects that a table names one by one
NOTHING = "–"
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
        per_slice = {f"{metric}#_target_": "tables.SliceMetrics", f"{metric}#file": str(folder / SLICES_FILE)}
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
    # The evaluation imports this file.
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
        raise RuntimeError(f"{run_id} ended with {code}: {cause.group() if cause else NOTHING} (see {log})")


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


# --- statistics ----------------------------------------------------------------------------------------------------


def split_method(method: str) -> tuple[str, str]:
    """Registered name and variant of a method: ``srcnn_ref + dc`` is ``srcnn_ref`` in the variant `` + dc``."""
    name = max((n for n in NETWORKS.names if n in method), key=len, default="")
    return name, method.replace(name, "", 1)


def read_rows(runs_dir: Path, runs: Iterable[Run], file: str) -> list[Row]:
    """The rows of a result file of all runs that are finished, each with ``scale``, ``fold`` and ``seed``."""
    rows = []
    for run in runs:
        folder = runs_dir / run.folder
        if is_finished(folder):
            with (folder / file).open(encoding="utf-8", newline="") as content:
                for row in csv.DictReader(content):
                    values = {name: float(row[name]) for name in ("psnr", "ssim")}
                    place = {name: row[name] for name in ("subject", "method", "slice") if name in row}
                    rows.append({**place, **values, "scale": run.scale, "fold": run.fold, "seed": run.seed})
    return rows


def unit_means(rows: Iterable[Row], method: str, metric: str = "psnr") -> dict[tuple[str, ...], float]:
    """Mean over seeds for every unit, which is a held-out subject or one of its slices."""
    values: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        if row["method"] == method:
            values.setdefault((row["fold"], row["subject"], row.get("slice", "")), []).append(row[metric])
    return {unit: statistics.fmean(v) for unit, v in values.items()}


def mean_sd(values: Iterable[float], digits: int) -> str:
    """Mean ± SD (n - 1); a single value has no SD."""
    values = list(values)
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def seed_sd(rows: Iterable[Row], method: str) -> float | None:
    """SD over seeds of the mean PSNR over those subjects that every seed has; None for a single seed."""
    by_seed: dict[int, dict[tuple[str, str], float]] = {}
    for row in rows:
        if row["method"] == method:
            by_seed.setdefault(row["seed"], {})[row["fold"], row["subject"]] = row["psnr"]
    common = set.intersection(*(set(values) for values in by_seed.values())) if len(by_seed) > 1 else set()
    if not common:
        return None
    return statistics.stdev(statistics.fmean(values[unit] for unit in common) for values in by_seed.values())


@dataclass(frozen=True)
class Comparison:
    """One method against another: mean difference of PSNR over subjects, and its test.

    Attributes:
        difference: in dB.
        p: two-sided; NaN where there is nothing to test.
        over_slices: whether the test took slices for units, since there are too few subjects.
    """

    difference: float
    p: float
    over_slices: bool

    def __str__(self) -> str:
        if self.p != self.p:
            return f"{self.difference:+.2f}"
        p = "p < 0.001" if self.p < 0.001 else f"p = {self.p:.3f}"
        return f"{self.difference:+.2f} ({p}{', slices' if self.over_slices else ''})"


def compare(subjects: Sequence[Row], slices: Sequence[Row], method: str, other: str) -> Comparison | None:
    """Compare two methods on the subjects that both have; None if there are none.

    Wilcoxon's signed-rank test over subjects. With fewer than :data:`MIN_SUBJECTS`, a paired t-test over slices, which
    takes neighbours for independent, so that its p is too small.
    """
    differences = _differences(subjects, method, other)
    if not differences:
        return None
    over_slices = len(differences) < MIN_SUBJECTS
    tested = _differences(slices, method, other) if over_slices else differences
    p = float("nan")
    if len(tested) > 1 and any(tested):
        p = float(stats.ttest_1samp(tested, 0.0).pvalue if over_slices else stats.wilcoxon(tested).pvalue)
    return Comparison(statistics.fmean(differences), p, over_slices)


def _differences(rows: Sequence[Row], method: str, other: str) -> list[float]:
    a, b = unit_means(rows, method), unit_means(rows, other)
    return [a[unit] - b[unit] for unit in sorted(a.keys() & b.keys())]


# --- tables --------------------------------------------------------------------------------------------------------


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ordered(subjects: Sequence[Row], order: Sequence[str] | None) -> list[str]:
    """The methods, one variant after the other: in the given order of networks, or from worst to best PSNR."""
    methods = list(dict.fromkeys(row["method"] for row in subjects))
    variants = sorted({split_method(method)[1] for method in methods}, key=lambda v: (v != "", v))

    def rank(method: str) -> tuple[int, float]:
        name, variant = split_method(method)
        value = order.index(name) if order else statistics.fmean(unit_means(subjects, method).values())
        return variants.index(variant), value

    return sorted(methods, key=rank)


def results_table(
    subjects: Sequence[Row],
    slices: Sequence[Row],
    order: Sequence[str] | None,
    trainings: Mapping[str, tuple[str, str]],
    published: Mapping[str, Mapping[str, str]],
) -> str:
    """The table of one factor.

    Args:
        subjects: rows of :func:`read_rows`, a row a subject, method and seed.
        slices: the same, a row a slice.
        order: networks from top to bottom; None for worst to best PSNR.
        trainings: learning rate and seconds of training of each network.
        published: columns of published numbers, by network.
    """
    several_seeds = len({row["seed"] for row in subjects}) > 1
    head = ["method", "subjects", "PSNR (dB)", "SSIM", "over zero-filling (dB)", "over the row above (dB)"]
    head += ["SD over seeds (dB)"] if several_seeds else []
    head += ["learning rate", "training (s)", *(f"published, another protocol: {name}" for name in published)]
    methods = ordered(subjects, order)
    lines = []
    for above, method in zip([None, *methods], methods):
        name, variant = split_method(method)
        psnr = unit_means(subjects, method)
        gain = _differences(subjects, method, "zero_filling")
        same = above is not None and split_method(above)[1] == variant
        step = compare(subjects, slices, method, above) if same else None
        cells = [
            method,
            str(len(psnr)),
            mean_sd(psnr.values(), 2),
            mean_sd(unit_means(subjects, method, "ssim").values(), 4),
            f"{statistics.fmean(gain):+.2f}" if gain else NOTHING,
            NOTHING if step is None else str(step),
        ]
        if several_seeds:
            sd = seed_sd(subjects, method) if name in trainings else None
            cells.append(NOTHING if sd is None else f"{sd:.3f}")
        cells += trainings.get(name, (NOTHING, NOTHING))
        cells += [column.get(name, NOTHING) if variant == "" else NOTHING for column in published.values()]
        lines.append(cells)
    return markdown(head, lines)


def subjects_table(subjects: Sequence[Row], order: Sequence[str] | None) -> str:
    """PSNR, SSIM and gain over zero-filling of every held-out subject."""
    methods = ordered(subjects, order)
    psnr, ssim = ({m: unit_means(subjects, m, metric) for m in methods} for metric in ("psnr", "ssim"))
    base = unit_means(subjects, "zero_filling")
    lines = []
    for unit in sorted({unit for values in psnr.values() for unit in values}):
        fold, subject, _ = unit
        cells = [
            f"{psnr[m][unit]:.2f} / {ssim[m][unit]:.4f} ({psnr[m][unit] - base.get(unit, float('nan')):+.2f})"
            if unit in psnr[m]
            else NOTHING
            for m in methods
        ]
        lines.append([subject if fold in (subject, "split") else f"{subject} ({fold})", *cells])
    return markdown(["held out: PSNR / SSIM (over zero-filling)", *methods], lines)


def note_on_test(subjects: Sequence[Row]) -> str:
    """Which test the table has."""
    n = len({(row["fold"], row["subject"]) for row in subjects})
    if n >= MIN_SUBJECTS:
        return (
            f"p: Wilcoxon's signed-rank test over {n} subjects, two-sided; the smallest that {n} subjects can give is "
            f"{2 / 2**n:.2g}."
        )
    return (
        f"p, slices: {n} subject(s) are too few for a test over subjects. This is a paired t-test over their slices, "
        "which are not independent of each other: it says nothing about other subjects, and its p is too small."
    )


class Table:
    """A table in the making: performs the runs and writes the table after each.

    Args:
        title: its heading.
        file: of the Markdown table, in the output folder.
        protocol: how the runs are made.
        runs: all of them.
        order: see :func:`results_table`.
        published: columns of published numbers of a factor, by network.
        appendix: what follows the tables.
        jobs: runs at the same time, spread over the GPUs.

    Raises:
        ValueError: a network has no learning rate, or ``jobs`` cannot be.
    """

    def __init__(
        self,
        title: str,
        file: Path,
        protocol: Protocol,
        runs: Sequence[Run],
        order: Sequence[str] | None,
        published: Callable[[int], dict[str, dict[str, str]]],
        appendix: str = "",
        jobs: int = 1,
    ) -> None:
        self.title = title
        self.file = file
        self.protocol = protocol
        self.runs = list(dict.fromkeys(runs))  # a run named twice would write its folder twice at the same time
        self.order = order
        self.published = published
        self.appendix = appendix
        self.failures: dict[Run, str] = {}
        self.stop = threading.Event()
        self.places = places(jobs, protocol.options.get("device"), self.stop)
        self.lock = threading.Lock()  # of the failures, of what is printed and of the files of the table
        for run in self.runs:
            protocol.settings(run)  # refuse now what cannot be trained

    def make(self) -> None:
        """Perform all runs, write and print the table and the curve.

        Raises:
            SystemExit: a run has failed; the others are in the table.
        """
        free: queue.SimpleQueue[Place] = queue.SimpleQueue()
        for place in self.places:
            free.put(place)

        def perform(number: int, run: Run) -> None:
            place = free.get()
            try:
                if not self.stop.is_set():
                    self._perform(f"[{number}/{len(self.runs)}] {run}", run, place)
            except BaseException:
                self.stop.set()  # no further run begins, also before the main thread hears of this
                raise
            finally:
                free.put(place)

        with ThreadPoolExecutor(len(self.places)) as pool:
            try:
                for future in as_completed([pool.submit(perform, i, run) for i, run in enumerate(self.runs, 1)]):
                    future.result()
            except BaseException:  # a signal, or a mistake in this file: the pool waits for the runs that it ends
                self.stop.set()
                raise
        self.write()
        print(f"\n{self.text()}\n\nwritten to {self.file}", flush=True)
        picture = write_curve(self.protocol.runs_dir.parent)
        print(picture, flush=True)
        if self.failures:
            raise SystemExit(f"{len(self.failures)} of {len(self.runs)} runs failed; the same command tries them again")

    def _perform(self, title: str, run: Run, place: Place) -> None:
        """Perform one run, say so, and write the table; a failure is kept."""
        begin = time.perf_counter()
        log = self.protocol.runs_dir / run.folder / LOG_FILE
        if not is_finished(log.parent):
            with self.lock:
                print(f"{title}: running, log in {log}", flush=True)
        try:
            done = self.protocol.perform(run, place)
        except Stopped:
            return
        except (RuntimeError, OSError, ValueError) as error:
            with self.lock:
                self.failures[run] = str(error)
                print(f"{title}: FAILED: {error}", flush=True)
            return
        spent = format_duration(time.perf_counter() - begin) if done else "was there already"
        with self.lock:
            print(f"{title}: {self._result(run)}, {spent}", flush=True)
            self.write()

    def _result(self, run: Run) -> str:
        rows = read_rows(self.protocol.runs_dir, [run], METRICS_FILE)
        psnr = statistics.fmean(unit_means(rows, run.network).values())
        return f"{psnr:.2f} dB, {statistics.fmean(_differences(rows, run.network, 'zero_filling')):+.2f}"

    def write(self) -> None:
        """Write the table of what is finished by now."""
        write_atomically(self.file, lambda p: p.write_text(self.text() + "\n", encoding="utf-8"))

    def text(self) -> str:
        """The table of what is finished by now, as Markdown."""
        protocol = self.protocol
        length = protocol.length
        crops = "whole slices" if length["crop_size"] is None else f"crops of {length['crop_size']} pixels"
        machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        fold_names = ", ".join(f"{f} ({', '.join(h)})" if h and [f] != h else f for f, h in protocol.held_out.items())
        parts = [
            f"# {self.title}",
            f"{date.today()}, {machine}, torch {torch.__version__}. "
            f"Target {protocol.pair['target']}, reference {protocol.pair['reference']}. Every network: "
            f"{' + '.join(config.stem for config in protocol.training)}; "
            f"{length['epochs']} x {length['iterations_per_epoch']} steps of {length['batch_size']} {crops}, the same "
            f"subjects, the weights of the last epoch. Held out: {fold_names}; "
            f"seed {', '.join(map(str, sorted({run.seed for run in self.runs})))}.",
            "Mean ± SD over held-out subjects; PSNR and SSIM over all foreground slices, data range = maximum of the "
            "HR volume. Published numbers are those of the paper, whose protocol is another: not to be ranked with "
            "ours.",
        ]
        trainings = self._trainings()
        for scale in dict.fromkeys(run.scale for run in self.runs):
            subjects, slices = (self._rows(scale, file) for file in (METRICS_FILE, SLICES_FILE))
            parts.append(f"## {scale}x")
            if not subjects:
                parts.append("Nothing is finished yet.")
                continue
            published = self.published(scale)
            parts.append(results_table(subjects, slices, self.order, trainings[scale], published))
            parts.append(note_on_test(subjects))
            if 1 < len(units := {(row["fold"], row["subject"]) for row in subjects}) <= MAX_LISTED:
                parts.append(subjects_table(subjects, self.order))
            elif len(units) > MAX_LISTED:
                parts.append(f"The {len(units)} subjects one by one: {METRICS_FILE} in the folders of the runs.")
        missing = [run for run in self.runs if not is_finished(protocol.runs_dir / run.folder) or run in self.failures]
        if missing:
            lines = (f"- {run}: {self.failures.get(run, 'not run yet')}" for run in missing)
            parts.append("\n".join(["Missing:", "", *lines]))
        return "\n\n".join([*parts, *filter(None, [self.appendix])])

    def _rows(self, scale: int, file: str) -> list[Row]:
        runs = [run for run in self.runs if run.scale == scale and run not in self.failures]
        wanted = {*BASELINES, *(run.network for run in runs)}
        rows = read_rows(self.protocol.runs_dir, runs, file)
        return [row for row in rows if split_method(row["method"])[0] in wanted]

    def _trainings(self) -> dict[int, dict[str, tuple[str, str]]]:
        """Learning rate and mean seconds of training of every network, at each factor."""
        seconds: dict[int, dict[str, list[float]]] = {run.scale: {} for run in self.runs}
        for run in self.runs:
            record = read_record(self.protocol.runs_dir / run.folder)
            if record and record["history"]:
                seconds[run.scale].setdefault(run.network, []).append(record["history"][-1]["seconds"])
        rates = self.protocol.learning_rates
        return {
            scale: {name: (f"{rates[name]:g}", f"{statistics.fmean(spent):.0f}") for name, spent in of_scale.items()}
            for scale, of_scale in seconds.items()
        }


# --- curve ---------------------------------------------------------------------------------------------------------

CURVE_COLUMNS = (*Run.__dataclass_fields__, "learning_rate", "epoch", "iteration", "seconds", "val_psnr")
CURVE_COLUMNS += ("zero_filling_psnr",)


def curve_rows(output_dir: Path) -> list[Row]:
    """The learning curves of all trainings that have ended, a row a validation."""
    rows: list[Row] = []
    for folder in sorted((output_dir / "runs").iterdir()):
        record = read_record(folder)
        for point in (record or {}).get("history") or []:
            rows.append({**record["run"], "learning_rate": f"{record['settings']['learning_rate']:g}", **point})
    return rows


def write_curve(output_dir: Path) -> str:
    """Write ``curve.csv`` and ``curve.png``, PSNR over the seconds of training; says what was written."""
    rows = curve_rows(output_dir)
    if not rows:
        return "no curve: nothing has been trained"
    write_csv(output_dir / "curve.csv", rows, CURVE_COLUMNS)
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
    except ImportError:
        return f"curve: {output_dir / 'curve.csv'}; no picture, since matplotlib is not installed"
    scales, networks = (sorted({row[key] for row in rows}) for key in ("scale", "network"))
    figure = Figure(figsize=(6 * len(scales), 4.5), layout="constrained")
    for axes, scale in zip(figure.subplots(1, len(scales), squeeze=False)[0], scales):
        curves: dict[tuple[str, str, int], list[Row]] = {}
        for row in rows:
            if row["scale"] == scale:
                curves.setdefault((row["network"], row["fold"], row["seed"]), []).append(row)
        labelled: set[str] = set()
        for (network, _, _), points in curves.items():
            axes.plot(
                [point["seconds"] for point in points],
                [point["val_psnr"] - point["zero_filling_psnr"] for point in points],
                color=f"C{networks.index(network)}",
                label=None if network in labelled else network,
            )
            labelled.add(network)
        axes.set(title=f"{scale}x", xlabel="training (s)", ylabel="PSNR over zero-filling (dB)", xscale="log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        axes.legend()
    write_atomically(output_dir / "curve.png", lambda p: figure.savefig(p, dpi=150))
    return f"curve: {output_dir / 'curve.csv'}, {output_dir / 'curve.png'}"


# --- commands ------------------------------------------------------------------------------------------------------


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


def table1(
    dataset_dir: str,
    output_dir: str,
    scale: int = 2,
    seeds: int | tuple[int, ...] = 0,
    folds: str | list[str] | None = None,
    learning_rates: dict[str, float] | None = None,
    overlays: str | tuple[str, ...] = (),
    jobs: int = 1,
    **options: Any,
) -> None:
    """The ablation: the seven rows of Table 1 in the paper's order, and ours.

    Args:
        dataset_dir: folder of subjects in one of the layouts, or a JSON datalist.
        output_dir: folder of table1.md, curve.csv and curve.png, and of all runs.
        scale: factor.
        seeds: of the trainings, one or several numbers.
        folds: whom to hold out: nothing for the bundle's split (--validation), "all" for each patient in turn, or names
            of subjects, each in turn, those joined by "+" together, such as "A+B,C".
        learning_rates: those that differ from the ones in this file, such as "{'table1_fusion': 4e-4}".
        overlays: configs of the bundle to lay over train.json in every training, separated by commas, such as
            "train_general,train_contrasts" (docs/training.md).
        jobs: trainings side by side, spread over the visible GPUs by CUDA_VISIBLE_DEVICES. Several on one GPU, or more
            than the processor's cores can feed, lengthen the seconds that the table and the curve show.
        options: further arguments of the bundle, such as --epochs, --crop_size, --cache_dir, --amp or --device.
    """
    protocol = Protocol(dataset_dir, output_dir, folds, learning_rates, overlays, options)
    Table(
        "Table 1: what each part of the network brings",
        Path(output_dir) / "table1.md",
        protocol,
        plan(protocol, list(TABLE1), numbers(scale), numbers(seeds)),
        [*BASELINES, *TABLE1],
        lambda scale: {"BraTS2021": TABLE1} if scale == 2 else {},
        jobs=jobs,
    ).make()


def table2(
    dataset_dir: str,
    output_dir: str,
    scales: int | tuple[int, ...] = (2, 4),
    networks: str | tuple[str, ...] = COMPARED,
    seeds: int | tuple[int, ...] = 0,
    folds: str | list[str] | None = None,
    learning_rates: dict[str, float] | None = None,
    overlays: str | tuple[str, ...] = (),
    jobs: int = 1,
    **options: Any,
) -> None:
    """The comparison: the interpolations, the baselines and GLMamba, from worst to best.

    Args:
        dataset_dir: folder of subjects in one of the layouts, or a JSON datalist.
        output_dir: folder of table2.md, curve.csv and curve.png, and of all runs.
        scales: factors, one or several numbers.
        networks: registered names, separated by commas; the interpolations are always there.
        seeds: of the trainings, one or several numbers.
        folds: whom to hold out: nothing for the bundle's split (--validation), "all" for each patient in turn, or names
            of subjects, each in turn, those joined by "+" together, such as "A+B,C".
        learning_rates: those that differ from the ones in this file, such as "{'srcnn_ref': 2e-3}".
        overlays: configs of the bundle to lay over train.json in every training, separated by commas, such as
            "train_general,train_contrasts" (docs/training.md).
        jobs: trainings side by side, spread over the visible GPUs by CUDA_VISIBLE_DEVICES. Several on one GPU, or more
            than the processor's cores can feed, lengthen the seconds that the table and the curve show.
        options: further arguments of the bundle, such as --epochs, --crop_size, --cache_dir, --amp or --device.
    """
    protocol = Protocol(dataset_dir, output_dir, folds, learning_rates, overlays, options)

    def published(scale: int) -> dict[str, dict[str, str]]:
        columns = zip(TABLE2_SETS, TABLE2_COLUMNS.get(scale, ()))
        return {name: {ours: TABLE2[theirs][i] for ours, theirs in PUBLISHED_AS.items()} for name, i in columns}

    head = ["published (PSNR / SSIM)", *(f"{name} {factor}x" for name in TABLE2_SETS for factor in TABLE2_COLUMNS)]
    Table(
        "Table 2: comparison of networks",
        Path(output_dir) / "table2.md",
        protocol,
        plan(protocol, names(networks), numbers(scales), numbers(seeds)),
        None,
        published,
        f"## What the paper prints, under its own protocol\n\n{markdown(head, ([k, *v] for k, v in TABLE2.items()))}",
        jobs,
    ).make()


def table4(
    output_dir: str | None = None,
    networks: str | tuple[str, ...] = COMPARED,
    size: int = 240,
    batch: int = 1,
    seconds: float = 0.5,
    threads: int = torch.get_num_threads(),
    device: str = "cpu",
) -> None:
    """The cost of one slice: parameters and multiply-adds, truly and as the paper counts; time and memory.

    Args:
        output_dir: folder of table4.md; none for printing alone.
        networks: registered names, separated by commas; the interpolations are always there.
        size: side of the square slice in pixels.
        batch: slices at once.
        seconds: time spent on each figure.
        threads: CPU threads.
        device: cpu or cuda; memory is measured on cuda.
    """
    allow_tf32()
    stopwatch = Stopwatch(device, seconds, threads)
    heading = io.StringIO()
    with redirect_stdout(heading):
        print_heading(
            stopwatch,
            f"Inference of {batch} slice(s) of {size}x{size} on {device}, tf32 allowed in fp32. A network's row is the "
            "network alone: the upsampling of its low-resolution slice comes on top, as in the row zero_filling. "
            "'+ data consistency' is what that adds to any row where it is switched on; memory is each row's own peak, "
            f"not to be added. The interpolations and data consistency are of {TABLE4_SCALE}x and always in fp32. All "
            "rows are of this device; the bundle itself upsamples on the CPU.",
        )
    precisions = {"fp32": False, "bf16 autocast": True} if device == "cuda" else {"fp32": False}
    head = ["method", "parameters (M)", "GMAC", "scan (GFLOP)", "paper's count: parameters (M) / GMAC"]
    head += ["published: parameters (M) / FLOPs (G)"]
    head += [f"{what}, {name}" for name in precisions for what in ("ms a slice", "memory (MB)")]

    def measured(spent: float, call: Callable[[], object], inputs: Iterable[Tensor]) -> list[str]:
        return [milliseconds(spent / batch), peak_memory(call, inputs) if device == "cuda" else NOTHING]

    steps = steps_beside_networks(torch.rand(1, size, size, batch, device=device))
    lines = []
    for name, spent in stopwatch.medians(steps).items():
        inputs = [x for x in steps[name].args if isinstance(x, Tensor)]
        cells = [name, "0", *[NOTHING] * 4, *measured(spent, steps[name], inputs)]
        lines.append(cells + [NOTHING] * (len(head) - len(cells)))
    consistency = lines.pop()
    for name in names(networks):
        if name in BASELINES:
            continue
        cost = count_cost(build_network(name), size, size)
        cells = [
            name,
            f"{cost.parameters / 1e6:.3f}",
            f"{cost.macs / 1e9:.2f}",
            f"{cost.scan_flops / 1e9:.2f}",
            f"{cost.paper_parameters / 1e6:.3f} / {cost.paper_macs / 1e9:.2f}",
            TABLE4.get(PUBLISHED_AS.get(name, ""), NOTHING),
        ]
        for bf16 in precisions.values():
            slices = torch.rand(batch, 2, size, size, device=device)
            network = build_network(name).to(device).eval()
            forward = Training(network, torch.nn.functional.l1_loss, slices, bf16).forward
            spent = stopwatch.medians({name: forward})[name]
            cells += measured(spent, forward, (*network.parameters(), *network.buffers(), slices))
        lines.append(cells)
    lines.append(consistency)
    others = [name for name in TABLE4 if name not in PUBLISHED_AS.values()]
    empty = [NOTHING] * (len(head) - 6)
    lines += [[f"{name} (published)", *[NOTHING] * 4, TABLE4[name], *empty] for name in others]
    text = f"# Table 4: cost of a slice\n\n{heading.getvalue()}\n{markdown(head, lines)}"
    print(text, flush=True)
    if output_dir is not None:
        write_atomically(Path(output_dir) / "table4.md", lambda p: p.write_text(text + "\n", encoding="utf-8"))


def steps_beside_networks(target: Tensor) -> dict[str, partial[Tensor]]:
    """What a result costs beside a network: each interpolation, then data consistency.

    Args:
        target: slices ``(1, X, Y, S)``, whose low-resolution image is made and used on their device.
    """
    low = KSpaceLowResolution(TABLE4_SCALE)(target)
    steps = {name: partial(KSpaceUpsample(upsampling_of(name)), low, target.shape[1:]) for name in BASELINES}
    return {**steps, "+ data consistency": partial(KSpaceDataConsistency(), steps["bicubic"](), low)}


def peak_memory(call: Callable[[], object], inputs: Iterable[Tensor]) -> str:
    """Peak megabytes on the GPU of a call, with its inputs, which are there already."""
    own = sum(x.nbytes for x in inputs)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    megabytes = (torch.cuda.max_memory_allocated() - before + own) / 1e6
    return f"{megabytes:.0f}" if megabytes >= 10 else f"{megabytes:.2g}"


if __name__ == "__main__":
    # A run in progress is ended with this command, not left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    fire.Fire({"table1": table1, "table2": table2, "table4": table4})
