"""One table from the dice.csv of several runs of the downstream experiment: folds, networks, factors.

python benchmarks/downstream.py fold0/dice.csv fold1/dice.csv --output_dir OUT

Each subject must be held out in one fold only, or have the same figures wherever it stands. --against NAME adds the
paired differences to another method than the originals.
"""

from __future__ import annotations

from pathlib import Path

import fire

from glmamba_monai.dice import (
    COLUMNS,
    DICE_FILE,
    DICE_SUMMARY_FILE,
    ORIGINAL,
    format_dice,
    merged_rows,
    summarise_dice,
)
from glmamba_monai.files import finite, write_csv, write_json


def main(*files: str, output_dir: str | None = None, against: str = ORIGINAL) -> None:
    """Print the table of all rows, and write dice.csv and dice_summary.json.

    Args:
        files: each a dice.csv.
        output_dir: folder to write; none for printing alone.
        against: the method that the others are compared to, subject by subject.
    """
    rows = merged_rows(files)
    summary = summarise_dice(rows, against)
    if output_dir is not None:
        described = {"files": list(files), "against": against, "scales": finite(summary)}
        write_csv(Path(output_dir) / DICE_FILE, rows, COLUMNS)
        write_json(Path(output_dir) / DICE_SUMMARY_FILE, described)
    print(format_dice(summary, against))


if __name__ == "__main__":
    fire.Fire(main)
