"""A report one can look at: a super-resolved volume beside what it was made of, in one HTML file without a network."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events

from glmamba_monai.engines.evaluation import SubjectMetrics
from glmamba_monai.files import require_writable
from glmamba_monai.report.page import (
    metrics_of_file,
    metrics_section,
    read_object,
    registration_section,
    weights_digest,
    write_page,
)
from glmamba_monai.report.panels import INFERNO, Volumes, draw_panels, on_one_grid
from glmamba_monai.transforms.grid import require_same_grid
from glmamba_monai.transforms.volume import KEPT_SLICES_KEY, LoadVolume, record_prefix

__all__ = ["INFERNO", "EvaluationReports", "write_report"]

PathLike = str | os.PathLike[str]


def write_report(
    super_resolved: PathLike,
    low_resolution: PathLike,
    reference: PathLike,
    output: PathLike,
    truth: PathLike | None = None,
    metrics: PathLike | None = None,
    weights: PathLike | None = None,
    registration: PathLike | None = None,
    provenance: PathLike | None = None,
    command: str | None = None,
    max_slices: int = 40,
    slice_axis: str | int = "auto",
) -> Path:
    """Write one self-contained HTML file that shows a super-resolved volume beside what it was made of.

    Args:
        super_resolved: volume on the reference's grid, or where that was resampled on a grid with the slices of the
            low-resolution volume.
        low_resolution: the low-resolution volume it was made of, on its own grid.
        reference: volume of the other contrast.
        output: HTML file to write.
        truth: the high-resolution volume on the grid of the output, where it is known; adds maps of the error.
        metrics: ``metrics.csv`` of an evaluation, shown as a table.
        weights: file of the weights that were used; its name and SHA-256 are stated.
        registration: JSON file that a registration of the reference has left
            (:func:`~glmamba_monai.registration.write_record`); the reference is moved alike, and the overlay shown.
        provenance: JSON file with an object of further facts to state, such as the command that made the volume.
        command: the command that makes this report.
        max_slices: show at most so many, evenly spaced.
        slice_axis: "auto", an axis, or "axial", "coronal", "sagittal".

    Raises:
        FileNotFoundError, ValueError, OSError: a file is missing, unfit or cannot be written.
    """
    output = Path(output)
    if output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"output {output}: the name must end in .html")
    if max_slices < 1:
        raise ValueError(f"max_slices: {max_slices} found, at least 1 expected")
    require_writable(output.absolute().parent)
    sections = "" if metrics is None else metrics_of_file(Path(metrics))
    further = {} if provenance is None else read_object(Path(provenance), "provenance")
    digest = None if weights is None else weights_digest(Path(weights))

    files = {"input": low_resolution, "output": super_resolved, "reference": reference, "truth": truth}
    loaded = {name: LoadVolume()(file) for name, file in files.items() if file is not None}
    sources = {name: (tuple(v.shape[1:]), v.affine.numpy(), str(files[name])) for name, v in loaded.items()}
    matrix = np.eye(4)
    if registration is not None:
        matrix, section = registration_section(Path(registration))
        sections = section + sections
    images = on_one_grid(loaded, sources, matrix, slice_axis)
    if "truth" in loaded:
        require_same_grid(sources["truth"], sources["output"])
    facts = {
        "Weights": digest or "not stated",
        "Command of this report": command or "called from Python",
        **{name: value if isinstance(value, str) else json.dumps(value) for name, value in further.items()},
    }
    size = images["output"].shape[-1]
    volumes = Volumes(images, images["output"].affine.numpy(), range(size), size, loaded["input"].as_tensor())
    return write_page(output, draw_panels(volumes, max_slices), sources, sections, facts)


class EvaluationReports:
    """During an evaluation, a report of each subject: ``FOLDER/SUBJECT.html``.

    It shows the slices that are evaluated, as the network has got and given them, in units of the divisor of the
    low-resolution volume.

    Args:
        metrics: the evaluator's metric.
        folder: where to write.
        description: what is evaluated; ``weights`` in it is the file that is used, or None.
        registrations: where the evaluation's :class:`~glmamba_monai.transforms.RegisterReferenced` keeps its records,
            which are shown; None where nothing is registered.
        max_slices: of a report.
    """

    def __init__(
        self,
        metrics: SubjectMetrics,
        folder: PathLike,
        description: Mapping[str, Any],
        registrations: str | None = None,
        max_slices: int = 40,
    ) -> None:
        self.metrics = metrics
        self.folder = Path(folder)
        self.description = dict(description)
        self.registrations = registrations
        self.max_slices = max_slices

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        for item, result in zip(engine.state.batch, engine.state.output):
            self._write(item, result["pred"])

    def _write(self, item: Mapping[str, Any], found: torch.Tensor) -> None:
        subject, truth, kept = str(item["subject"]), item["target"], item[KEPT_SLICES_KEY]
        affine = truth.affine.cpu().numpy()
        images = {"input": item["zero_filling"], "output": found, "reference": item["image"][1:2], "truth": truth}
        volumes = Volumes(
            images={name: torch.as_tensor(image).as_subclass(torch.Tensor).cpu() for name, image in images.items()},
            affine=affine,
            numbers=torch.nonzero(kept).flatten().tolist(),
            size=len(kept),
            measured=item["low_resolution"].cpu(),
            data_range=float(item["data_range"]),
        )
        file = str(truth.meta.get("filename_or_obj", "truth"))
        shape = (*truth.shape[1:3], len(kept))
        sources = {"output": (shape, affine, subject), "truth": (shape, affine, file)}
        rows = [row for row in self.metrics.rows if row["subject"] == subject]
        weights = self.description.get("weights")
        facts = {
            "Weights": "none" if weights is None else weights_digest(Path(weights)),
            "Command": _bundle_command(),
            **{name: str(value) for name, value in self.description.items() if name != "weights"},
            "Intensities": "divided by the 99.9th percentile of the low-resolution volume, the reference by its own",
        }
        sections = metrics_section(rows, subject)
        if self.registrations is not None:
            sections = registration_section(Path(record_prefix(self.registrations, item) + ".json"))[1] + sections
        name = re.sub(r"[^\w.+-]+", "_", subject)
        write_page(self.folder / f"{name}.html", draw_panels(volumes, self.max_slices), sources, sections, facts)


def _bundle_command() -> str:
    if Path(sys.argv[0]).parts[-2:] != ("bundle", "__main__.py"):
        return "called from Python"
    return shlex.join(["python", "-m", "monai.bundle", *sys.argv[1:]])
