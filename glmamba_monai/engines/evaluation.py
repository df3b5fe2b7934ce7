"""Metrics of whole subjects, as an Ignite metric, and the tables made of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from ignite.metrics import Metric

from glmamba_monai.engines.ensemble import consistent_sd, mean_and_sd
from glmamba_monai.files import finite, write_csv, write_json
from glmamba_monai.metrics import CONVENTIONS, SD_METRICS, gradient_magnitude, sd_metrics, slice_metrics
from glmamba_monai.transforms import KSpaceDataConsistency

Row = dict[str, Any]
BASELINES = ("zero_filling", "bicubic")
ENSEMBLE, DATA_CONSISTENT = " + ensemble", " + dc"  # appended to the name of a method, in this order
METRICS_FILE, SUMMARY_FILE = "metrics.csv", "summary.json"
UNFINISHED_FILE = "unfinished-metrics.csv"


def prepare_batch(
    batch: Mapping[str, torch.Tensor], device: Any = None, non_blocking: bool = False, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ``(B, 2, ...)`` of the network, and what it should return: target and reference, ``(B, 2, ...)``."""
    # As plain tensors: with a MetaTensor every operation of the network takes longer.
    image, target = (
        batch[key].as_subclass(torch.Tensor).to(device=device, non_blocking=non_blocking, **kwargs)
        for key in ("image", "target")
    )
    return image, torch.cat((target, image[:, 1:2]), dim=1)


def super_resolved(output: torch.Tensor) -> torch.Tensor:
    """Channel 0 of ``(2, ...)``: the super-resolved image without the reconstructed reference."""
    return output[0:1]


class SubjectMetrics(Metric):
    """Mean over a subject's slices of every metric, for the network and for the baselines.

    Its value is the mean PSNR of the network over subjects (docs/data.md, metrics). ``rows`` holds one row per
    subject and method. In distributed evaluation every process ends up with the rows of all.

    An item of the evaluator's batch needs ``subject``, ``target (1, X, Y, S)``, ``data_range`` and
    ``foreground_level`` of the whole target, and one volume ``(1, X, Y, S)`` for each of :data:`BASELINES`; its output
    needs ``pred`` of the target's shape. A slice in which a metric does not exist does not count in its mean.
    Where the output has ``ensemble (8, X, Y, S)`` (:class:`~glmamba_monai.engines.SelfEnsembleInferer`), its mean has a
    row, with the metrics of its standard deviation, too.
    Where the item has ``low_resolution (1, x, y, S)``, what was measured, each method has a second row: its result
    after :class:`~glmamba_monai.transforms.KSpaceDataConsistency`.
    The rows of the baselines, which no training changes, are computed in the first validation and kept: they are four
    of six, and on a CPU most of its time.

    Args:
        network: what to call the network's rows.
    """

    def __init__(self, network: str) -> None:
        self.network = network
        self.rows: list[Row] = []
        self._kept: dict[tuple[Any, ...], dict[str, Row]] = {}  # of a volume, by method
        super().__init__()

    def reset(self) -> None:
        self.rows = []

    def iteration_completed(self, engine: Engine) -> None:
        for item, output in zip(engine.state.batch, engine.state.output):
            self.update((item, output))

    def update(self, output: tuple[Mapping[str, Any], Mapping[str, Any]]) -> None:
        item, result = output
        levels = float(item["data_range"]), float(item["foreground_level"])
        low_resolution = item["low_resolution"].shape if "low_resolution" in item else None
        volume = (str(item["subject"]), item["target"].shape, *levels, low_resolution)
        rows = rows_of(self.network, item, result, self._kept.get(volume))
        self._kept[volume] = {row["method"]: row for row in rows if row["method"].split(" + ")[0] in BASELINES}
        self.rows += rows

    def compute(self) -> float:
        if dist.is_available() and dist.is_initialized():
            gathered: list[list[Row]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(gathered, self.rows)
            # A subject may have been evaluated by two processes; see share_of_rank.
            unique = {(row["subject"], row["method"]): row for rows in gathered for row in rows}
            self.rows = [unique[key] for key in sorted(unique)]
        return summarise(self.rows)[self.network]["psnr"]["mean"]

    def completed(self, engine: Engine, name: str) -> None:
        super().completed(engine, name)
        for method, summary in summarise(self.rows).items():
            plain, *additions = method.split(" + ")  # MLflow takes no plus sign
            prefix = "_".join(["val" if plain == self.network else plain, *additions])
            engine.state.metrics.update({f"{prefix}_{metric}": summary[metric]["mean"] for metric in ("psnr", "ssim")})


def rows_of(
    network: str, item: Mapping[str, Any], result: Mapping[str, Any], known: Mapping[str, Row] | None = None
) -> list[Row]:
    """The rows of one item and its result; see :class:`SubjectMetrics`, for what is in them, too.

    Args:
        network: what to call the network's rows.
        item: of the evaluator's batch.
        result: of its output.
        known: rows of this very item, by method, that need not be computed again.
    """
    volumes = {method: item[method] for method in BASELINES} | {network: result["pred"]}
    sds = {}
    if "ensemble" in result:
        ensemble = network + ENSEMBLE
        volumes[ensemble], sds[ensemble] = mean_and_sd(result["ensemble"])
    methods: list[tuple[str, str]] = [(method, "") for method in volumes]
    if "low_resolution" in item:
        methods += [(method, DATA_CONSISTENT) for method in volumes]
    # Where the network has computed: on a CPU, SSIM alone would take longer than the network on a GPU.
    target = _slices(item["target"]).to(result["pred"].device)
    mask = target > float(item["foreground_level"])
    rows = []
    for method, addition in methods:
        if known and method + addition in known:
            rows.append(known[method + addition])
            continue
        volume, sd = volumes[method], sds.get(method)
        if addition:
            measured = item["low_resolution"].to(target.device)
            volume = KSpaceDataConsistency()(volume.to(target.device), measured)
            sd = None if sd is None else consistent_sd(result["ensemble"], measured)
        slices = _slices(volume).to(target.device)
        metrics = slice_metrics(slices, target, float(item["data_range"]), mask)
        row = {
            "subject": str(item["subject"]),
            "method": method + addition,
            "slices": len(target),
            **{name: float(values.nanmean()) for name, values in metrics.items()},
        }
        if sd is not None:
            maps = _slices(sd), (slices.abs() - target).abs(), gradient_magnitude(slices)
            row |= sd_metrics(*(values[mask] for values in maps))
        rows.append(row)
    return rows


def _slices(volume: torch.Tensor) -> torch.Tensor:
    """``(1, X, Y, S)`` as a batch of slices ``(S, 1, X, Y)``, without meta."""
    return torch.as_tensor(volume).as_subclass(torch.Tensor).permute(3, 0, 1, 2)


def summarise(rows: Sequence[Row], metrics: Iterable[str] = CONVENTIONS) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and standard deviation over subjects: ``{method: {metric: {"mean", "sd", "subjects"}}}``.

    The standard deviation is that of the sample (n - 1), and 0 for a single subject. A subject for which a metric does
    not exist (NaN) is not counted; one that was hit exactly has an infinite PSNR, and then so has the mean.
    """
    summary: dict[str, dict[str, dict[str, float]]] = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        summary[method] = {}
        for metric in metrics:
            values = torch.tensor([row[metric] for row in rows if row["method"] == method], dtype=torch.float64)
            values = values[~values.isnan()]
            sd = values.std().item() if len(values) > 1 else 0.0
            summary[method][metric] = {"mean": values.mean().item(), "sd": sd, "subjects": len(values)}
    return summary


def _several(rows: Sequence[Row]) -> bool:
    """Whether the rows are of more than one subject, so that there is a spread."""
    return len({row["subject"] for row in rows}) > 1


def over_subjects(rows: Sequence[Row], which: str = "subjects") -> str:
    """What a table of these rows says of its figures, for the end of its title."""
    return f", mean ± SD over {which}" if _several(rows) else ""


def _mean(figures: Mapping[str, float], digits: int, with_sd: bool) -> str:
    return f"{figures['mean']:.{digits}f}" + (f" ± {figures['sd']:.{digits}f}" if with_sd else "")


def format_table(rows: Sequence[Row], title: str) -> str:
    """Mean of PSNR and SSIM, and SD over several subjects, as a Markdown table, methods from worst to best PSNR."""
    summary, several = summarise(rows), _several(rows)
    best = sorted(summary, key=lambda method: summary[method]["psnr"]["mean"])
    zero_filling = summary["zero_filling"]["psnr"]["mean"]
    lines = [
        title,
        "",
        "| method | PSNR (dB) | SSIM | PSNR over zero-filling (dB) |",
        "| --- | ---: | ---: | ---: |",
    ]
    for method in best:
        psnr, ssim = summary[method]["psnr"], summary[method]["ssim"]
        lines.append(
            f"| {method} | {_mean(psnr, 2, several)} | {_mean(ssim, 4, several)} | {psnr['mean'] - zero_filling:+.2f} |"
        )
    return "\n".join(lines)


def with_sd(rows: Sequence[Row]) -> list[Row]:
    """The rows of ensembles, which have :data:`~glmamba_monai.metrics.SD_METRICS`, too."""
    return [row for row in rows if SD_METRICS.keys() <= row.keys()]


def format_sd_table(rows: Sequence[Row]) -> str:
    """Mean, and SD over several subjects, of how well the SD of an ensemble tells its error, as a Markdown table."""
    lines = [
        "SD of the self-ensemble against the absolute error, over foreground voxels",
        "",
        "| method | Spearman | of edges | Pearson | error of the 10 % with the largest SD, over the mean "
        "| a perfect map | within 2 SD |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    several = _several(rows)
    for method, summary in summarise(with_sd(rows), SD_METRICS).items():
        cells = [_mean(values, 2, several) for values in summary.values()]
        lines.append(f"| {' | '.join([method, *cells])} |")
    return "\n".join(lines)


def write_results(rows: Sequence[Row], output_dir: str | os.PathLike[str], description: Mapping[str, Any]) -> None:
    """Write ``metrics.csv`` (a row a subject and method) and ``summary.json`` (mean and SD over subjects).

    A value that is no finite number reads ``inf`` or ``nan`` in the CSV and null in the JSON, which knows neither. The
    columns for the SD of an ensemble are empty in the rows of other methods.

    Args:
        rows: of :class:`SubjectMetrics`.
        output_dir: folder.
        description: what was evaluated; stands in the summary.

    Raises:
        OSError: the folder cannot be written.
    """
    ensembles = with_sd(rows)
    _write_rows(Path(output_dir) / METRICS_FILE, rows)
    of_sd = summarise(ensembles, SD_METRICS)
    methods = finite({method: {**found, **of_sd.get(method, {})} for method, found in summarise(rows).items()})
    conventions = {**CONVENTIONS, **(SD_METRICS if ensembles else {})}
    write_json(Path(output_dir) / SUMMARY_FILE, {**description, "conventions": conventions, "methods": methods})


def _write_rows(file: Path, rows: Sequence[Row]) -> None:
    columns = dict.fromkeys(name for row in rows for name in row)  # those of an ensemble stand last
    write_csv(file, rows, list(columns))


class ResultsWriter:
    """At the end of an evaluation, write its results and show the table.

    Until then ``unfinished-metrics.csv`` has the rows of the subjects that are done, so that a damaged file among the
    last of a thousand does not cost those before it. It is a file of its own: ``metrics.csv`` and ``summary.json``
    are always of one evaluation, and a complete one.

    Args:
        metrics: the evaluator's metric.
        output_dir: folder for ``metrics.csv`` and ``summary.json``.
        description: what was evaluated; stands in the summary.
    """

    def __init__(
        self, metrics: SubjectMetrics, output_dir: str | os.PathLike[str], description: Mapping[str, Any]
    ) -> None:
        self.metrics = metrics
        self.output_dir = output_dir
        self.description = dict(description)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.subject_completed)
        engine.add_event_handler(Events.COMPLETED, self)

    def subject_completed(self, engine: Engine) -> None:
        _write_rows(Path(self.output_dir) / UNFINISHED_FILE, self.metrics.rows)

    def __call__(self, engine: Engine) -> None:
        rows = self.metrics.rows
        write_results(rows, self.output_dir, self.description)
        (Path(self.output_dir) / UNFINISHED_FILE).unlink(missing_ok=True)
        subjects = len({row["subject"] for row in rows})
        title = f"Evaluation of {subjects} subject{'s' * (subjects > 1)}{over_subjects(rows)}"
        tables = [format_table(rows, title), *([format_sd_table(rows)] if with_sd(rows) else [])]
        described = ", ".join(f"{name} {value}" for name, value in self.description.items())
        written = f"({described})\n\nwritten to {Path(self.output_dir) / METRICS_FILE}"
        print("\n" + "\n\n".join([*tables, written]), flush=True)
