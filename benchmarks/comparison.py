"""Statistics of a table: means over subjects and seeds, and whether one method is better than another."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from runs import Run, is_finished
from scipy import stats

from glmamba_monai.engines.evaluation import Row
from glmamba_monai.networks import NETWORKS

MIN_SUBJECTS = 5  # below, no test over subjects can find anything


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
    of_subjects = differences(subjects, method, other)
    if not of_subjects:
        return None
    over_slices = len(of_subjects) < MIN_SUBJECTS
    tested = differences(slices, method, other) if over_slices else of_subjects
    p = float("nan")
    if len(tested) > 1 and any(tested):
        p = float(stats.ttest_1samp(tested, 0.0).pvalue if over_slices else stats.wilcoxon(tested).pvalue)
    return Comparison(statistics.fmean(of_subjects), p, over_slices)


def differences(rows: Sequence[Row], method: str, other: str) -> list[float]:
    """How far the first method is above the other, in dB, on each unit that both have."""
    a, b = unit_means(rows, method), unit_means(rows, other)
    return [a[unit] - b[unit] for unit in sorted(a.keys() & b.keys())]
