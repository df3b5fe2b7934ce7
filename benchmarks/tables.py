"""The paper's tables from a folder of subjects: every row trained and evaluated alike, the published numbers beside.

python benchmarks/tables.py table1 --dataset_dir DATA --output_dir OUT --scale 2 --seeds 0,1,2
python benchmarks/tables.py table2 --dataset_dir DATA --output_dir OUT --scales 2,4 --folds all
python benchmarks/tables.py table4 --device cuda

A command that was stopped goes on where it stopped when it is given again. With several GPUs, --jobs trains side by
side.
"""

from __future__ import annotations

import io
import queue
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import redirect_stdout
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import fire
import torch
from comparison import MIN_SUBJECTS, compare, differences, mean_sd, read_rows, seed_sd, split_method, unit_means
from published import PUBLISHED_AS, TABLE1, TABLE2, TABLE2_COLUMNS, TABLE2_SETS, TABLE4
from runs import (
    LOG_FILE,
    SLICES_FILE,
    Place,
    Protocol,
    Run,
    Stopped,
    is_finished,
    places,
    plan,
    read_record,
)
from timing import Stopwatch, Training, allow_tf32, milliseconds, names, numbers, print_heading
from torch import Tensor

from glmamba_monai.engines.evaluation import BASELINES, METRICS_FILE, Row
from glmamba_monai.engines.progress import format_duration
from glmamba_monai.files import write_atomically, write_csv
from glmamba_monai.networks import build_network, upsampling_of
from glmamba_monai.networks.cost import count_cost
from glmamba_monai.transforms import KSpaceDataConsistency, KSpaceLowResolution, KSpaceUpsample

COMPARED = "srcnn,srcnn_ref,glmamba_light,glmamba_paper,glmamba"  # every evaluation brings the interpolations
MAX_LISTED = 40  # held-out subjects that a table names one by one
NOTHING = "–"
TABLE4_SCALE = 2  # of its low-resolution slices; a network costs the same at any factor


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
        gain = differences(subjects, method, "zero_filling")
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
        return f"{psnr:.2f} dB, {statistics.fmean(differences(rows, run.network, 'zero_filling')):+.2f}"

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
