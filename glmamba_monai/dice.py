"""Tables of the downstream experiment: the rows of a ``dice.csv``, their summary and its paired differences."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

Row = dict[str, Any]
ORIGINAL = "original"  # the method that is none: the images as they were
DICE_FILE, DICE_SUMMARY_FILE = "dice.csv", "dice_summary.json"
COLUMNS = ("scale", "method", "subject", "dice", "hd95_mm", "true_ml", "predicted_ml", "segmenter")
CONFIDENCE = 0.95


def scale_name(scale: Any) -> str:
    """``4x`` of 4, ``2_4x`` of [2, 4]."""
    return "_".join(f"{factor:g}" for factor in np.atleast_1d(scale)) + "x"


def read_rows(file: str | os.PathLike[str]) -> list[Row]:
    """The rows of a ``dice.csv``.

    Raises:
        ValueError: it is none.
    """
    with Path(file).open(encoding="utf-8", newline="") as text:
        reader = csv.DictReader(text)
        rows: list[Row] = list(reader)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{file}: has the columns {reader.fieldnames}, expected {list(COLUMNS)}; remove the file")
    return [
        {k: v if k in ("scale", "method", "subject", "segmenter") else float(v) for k, v in r.items()} for r in rows
    ]


def merged_rows(files: Sequence[str | os.PathLike[str]]) -> list[Row]:
    """The rows of several ``dice.csv``, of other folds or networks, each subject, method and factor once.

    Raises:
        ValueError: no file is given, or one says of a subject's method what another does not.
    """
    if not files:
        raise ValueError("no dice.csv is given; name at least one")
    merged: dict[tuple[str, str, str], Row] = {}
    for file in files:
        for row in read_rows(file):
            key = (row["scale"], row["method"], row["subject"])
            if merged.setdefault(key, row)["segmenter"] != row["segmenter"]:
                raise ValueError(
                    f"{file}: has {row['subject']}, {row['method']} at {row['scale']} of segmenter {row['segmenter']}, "
                    f"another file of {merged[key]['segmenter']}; merge runs that hold different subjects out"
                )
    return list(merged.values())


def summarise_dice(rows: Sequence[Row], against: str = ORIGINAL) -> dict[str, dict[str, dict[str, Any]]]:
    """``{scale: {method: figures}}``, methods from worst to best mean Dice.

    The figures are the mean and SD (n - 1) over subjects of Dice and HD95 (mm), with the number of subjects; ``kept``,
    the mean Dice over that of the originals of the same subjects; and ``difference``, the mean of the paired
    differences of Dice to the method ``against``, with the interval of Student's t. A subject without a value (NaN)
    does not count; one subject has neither SD nor interval (NaN).

    Args:
        rows: of :func:`read_rows` or :func:`merged_rows`. Not every method needs to have every subject.
        against: the method that the others are compared to.

    Raises:
        ValueError: at one of the factors there are no rows of ``against``.
    """
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for scale in dict.fromkeys(row["scale"] for row in rows):
        of_scale = [row for row in rows if row["scale"] == scale]
        original, other = (
            {row["subject"]: row["dice"] for row in of_scale if row["method"] == name} for name in (ORIGINAL, against)
        )
        if not other:
            found = ", ".join(dict.fromkeys(row["method"] for row in of_scale))
            raise ValueError(f"against: there are no rows of {against!r} at {scale}, expected one of {found}")
        methods = {}
        for method in dict.fromkeys(row["method"] for row in of_scale):
            of_method = [row for row in of_scale if row["method"] == method]
            dice, hd95 = (_mean_sd([row[name] for row in of_method]) for name in ("dice", "hd95_mm"))
            differences = [row["dice"] - other[row["subject"]] for row in of_method if row["subject"] in other]
            whole = _mean_sd([original.get(row["subject"], math.nan) for row in of_method])["mean"]
            methods[method] = {
                "dice": dice,
                "hd95_mm": hd95,
                "kept": dice["mean"] / whole if whole else math.nan,
                "difference": {**_mean_sd(differences), "interval": list(interval(differences))},
            }
        summary[scale] = dict(sorted(methods.items(), key=lambda entry: entry[1]["dice"]["mean"]))
    return summary


def _mean_sd(values: Sequence[float]) -> dict[str, float]:
    there = [v for v in values if not math.isnan(v)]
    mean, sd = (float(np.mean(there)) if there else math.nan), float(np.std(there, ddof=1)) if there[1:] else math.nan
    return {"mean": mean, "sd": sd, "subjects": len(there)}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The confidence interval of the mean by Student's t; NaN of fewer than two values."""
    figures = _mean_sd(values)
    n = figures["subjects"]
    if n < 2:
        return math.nan, math.nan
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * figures["sd"] / math.sqrt(n)
    return figures["mean"] - half, figures["mean"] + half


def format_dice(summary: Mapping[str, Mapping[str, Mapping[str, Any]]], against: str = ORIGINAL) -> str:
    """A Markdown table for each factor; a mean over fewer subjects than the others says of how many.

    Args:
        summary: of :func:`summarise_dice`.
        against: the method that it compares the others to.
    """
    tables = []
    for scale, methods in summary.items():
        subjects = max(figures["dice"]["subjects"] for figures in methods.values())
        lines = [
            f"Segmentation at {scale}, {subjects} held-out subject(s), mean ± SD over subjects",
            "",
            f"| method | Dice | of the originals' | HD95 (mm) | Dice minus that of {against} (95 % interval) |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for method, figures in methods.items():
            difference, (low, high) = figures["difference"], figures["difference"]["interval"]
            bounds = f" ({low:+.4f} to {high:+.4f})" if math.isfinite(low) else ""
            cells = [
                method,
                _mean_and_sd(figures["dice"], 4, subjects),
                f"{100 * figures['kept']:.1f} %" if math.isfinite(figures["kept"]) else "",
                _mean_and_sd(figures["hd95_mm"], 2, subjects),
                "" if method == against else f"{difference['mean']:+.4f}{bounds}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _mean_and_sd(figures: Mapping[str, float], digits: int, subjects: int) -> str:
    if not figures["subjects"]:
        return ""
    sd = f" ± {figures['sd']:.{digits}f}" if math.isfinite(figures["sd"]) else ""
    fewer = f" (of {figures['subjects']})" if figures["subjects"] < subjects else ""
    return f"{figures['mean']:.{digits}f}{sd}{fewer}"
