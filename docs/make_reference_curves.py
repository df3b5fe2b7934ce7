"""What a moved reference costs: PSNR over zero-filling against its shift and its rotation.

    python docs/make_reference_curves.py --tables "{'2x': 'OUT/reference_safety_2.csv'}" --file reference_safety.png

draws what benchmarks/reference_safety.py --output_dir OUT has written; needs matplotlib (test extra).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import fire
from matplotlib.figure import Figure

from glmamba_monai.files import write_atomically

NAME, GAIN = "reference", "psnr_over_zero_filling"  # the columns that are read
RIGHT, NONE = "right", "none (zeros)"
MOVES = {"shifted": "shift (pixels)", "rotated": "rotation (degrees)"}


class Curves(NamedTuple):
    """PSNR over zero-filling in dB: without a reference, and of each kind of move by how far it goes."""

    none: float
    moved: dict[str, dict[float, float]]


def read_curves(file: str) -> Curves:
    """The curves of a table; they begin with the right reference, at 0.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column or row is missing, or what should be a number is none.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(
            f"{file}: there is no such file, expected a reference_safety_SCALE.csv of benchmarks/reference_safety.py"
        )
    with open(file, newline="", encoding="utf-8") as text:
        reader = csv.DictReader(text)
        columns = reader.fieldnames or []
        if not {NAME, GAIN} <= set(columns):
            raise ValueError(f"{file}: has the columns {', '.join(columns)}, expected {NAME} and {GAIN} among them")
        try:
            gains = {row[NAME]: float(row[GAIN]) for row in reader}
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: expected numbers in {GAIN} ({error})") from error
    for name in (RIGHT, NONE):
        if name not in gains:
            raise ValueError(f"{file}: expected a row {name}, found {', '.join(gains)}")
    moved = {}
    for kind in MOVES:
        found = {re.match(rf"{kind} by ([\d.]+) ", name): gain for name, gain in gains.items()}
        moved[kind] = {0.0: gains[RIGHT], **{float(match[1]): gain for match, gain in found.items() if match}}
        if len(moved[kind]) == 1:
            raise ValueError(f"{file}: expected a row {kind} by ..., found {', '.join(gains)}")
    return Curves(gains[NONE], moved)


def make_figure(curves: Mapping[str, Curves]) -> Figure:
    """A panel a kind of move, a line a label, dashed at what that network reaches without a reference."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, len(MOVES), sharey=True)
    for axes, (kind, step_label) in zip(panels, MOVES.items()):
        for i, (label, found) in enumerate(curves.items()):
            axes.plot(*zip(*sorted(found.moved[kind].items())), "o-", color=f"C{i}", label=label)
            axes.axhline(found.none, color=f"C{i}", linestyle="--", label=f"{label}, no reference")
        axes.axhline(0, color="black", linewidth=1, label="zero-filling")
        axes.set_xticks(sorted({step for found in curves.values() for step in found.moved[kind]}))
        axes.set_title(f"Reference {kind}", fontsize=13)
        axes.set_xlabel(step_label, fontsize=12)
        axes.tick_params(labelsize=11)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("PSNR over zero-filling (dB)", fontsize=12)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=11)
    return figure


def main(tables: dict[str, str], file: str = "docs/reference_safety.png") -> None:
    """Draw the tables into one figure.

    Args:
        tables: of each label in the legend its table, a reference_safety_SCALE.csv.
        file: to write; PNG.

    Raises:
        FileNotFoundError: a table is not there.
        ValueError: a table is not one of those.
    """
    if not isinstance(tables, Mapping):
        raise ValueError(f"tables: expected \"{{'label': 'file.csv'}}\", found {tables}")
    figure = make_figure({str(label): read_curves(table) for label, table in tables.items()})
    print(write_atomically(file, lambda p: figure.savefig(p, dpi=100)))


if __name__ == "__main__":
    fire.Fire(main)
