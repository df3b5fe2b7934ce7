"""A report one can look at: a super-resolved volume beside what it was made of, in one HTML file without a network."""

from __future__ import annotations

import base64
import csv
import datetime
import hashlib
import html
import io
import json
import math
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import monai
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.transforms import Orientation
from nibabel import aff2axcodes
from PIL import Image

import glmamba_monai
from glmamba_monai import registration as registering
from glmamba_monai.engines.evaluation import SubjectMetrics, summarise
from glmamba_monai.files import require_writable, write_atomically
from glmamba_monai.metrics import CONVENTIONS, GAUSSIAN_SIZE, slice_metrics
from glmamba_monai.transforms import KSpaceUpsample, KSpaceUpsampled, LoadVolume, MatchReferenced
from glmamba_monai.transforms.grid import (
    PLANES,
    SAME_GRID_TOLERANCE,
    Display,
    Grid,
    OtherGridError,
    find_display,
    find_slice_axis,
    match_grids,
    require_same_grid,
)
from glmamba_monai.transforms.volume import KEPT_SLICES_KEY, SLICE_AXIS_KEY, cut, record_prefix, slices_last

PathLike = str | os.PathLike[str]

DARKEST, BRIGHTEST = 0.5, 99.5  # percentiles at the ends of a gray window; of the input's error, at the top of its own
INFERNO = ("000004", "1b0c41", "4a0c6b", "781c6d", "a52c60", "cf4446", "ed6925", "fb9b06", "f7d13d", "fcffa4")
OPPOSITE = dict(zip("LRAPIS", "RLPASI"))
WORDS = {"L": "left", "R": "right", "A": "front", "P": "back", "S": "head", "I": "feet"}
TITLES = {
    "input": "Input, zero-filled",
    "output": "Output",
    "reference": "Reference",
    "truth": "Truth",
    "input_error": "Error of the input",
    "output_error": "Error of the output",
}


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
    sections = "" if metrics is None else _metrics_of_file(Path(metrics))
    further = {} if provenance is None else _read_object(Path(provenance), "provenance")
    digest = None if weights is None else _digest(Path(weights))

    files = {"input": low_resolution, "output": super_resolved, "reference": reference, "truth": truth}
    loaded = {name: LoadVolume()(file) for name, file in files.items() if file is not None}
    sources = {name: (tuple(v.shape[1:]), v.affine.numpy(), str(files[name])) for name, v in loaded.items()}
    matrix = np.eye(4)
    if registration is not None:
        matrix, section = _registration_section(Path(registration))
        sections = section + sections
    volumes = _on_one_grid(loaded, sources, matrix, slice_axis)
    if "truth" in loaded:
        require_same_grid(sources["truth"], sources["output"])
    facts = {
        "Weights": digest or "not stated",
        "Command of this report": command or "called from Python",
        **{name: value if isinstance(value, str) else json.dumps(value) for name, value in further.items()},
    }
    numbers = list(range(volumes["output"].shape[-1]))
    measured, affine = loaded["input"].as_tensor(), volumes["output"].affine.numpy()
    return _write(output, volumes, affine, numbers, len(numbers), measured, sources, sections, facts, max_slices)


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
        volumes = {"input": item["zero_filling"], "output": found, "reference": item["image"][1:2], "truth": truth}
        volumes = {name: torch.as_tensor(volume).as_subclass(torch.Tensor).cpu() for name, volume in volumes.items()}
        file = str(truth.meta.get("filename_or_obj", "truth"))
        shape = (*truth.shape[1:3], len(kept))
        sources = {"output": (shape, affine, subject), "truth": (shape, affine, file)}
        rows = [row for row in self.metrics.rows if row["subject"] == subject]
        weights = self.description.get("weights")
        facts = {
            "Weights": "none" if weights is None else _digest(Path(weights)),
            "Command": _bundle_command(),
            **{name: str(value) for name, value in self.description.items() if name != "weights"},
            "Intensities": "divided by the 99.9th percentile of the low-resolution volume, the reference by its own",
        }
        name = re.sub(r"[^\w.+-]+", "_", subject)
        measured, numbers = item["low_resolution"].cpu(), torch.nonzero(kept).flatten().tolist()
        sections = _metrics_section(rows, subject)
        if self.registrations is not None:
            sections = _registration_section(Path(record_prefix(self.registrations, item) + ".json"))[1] + sections
        arguments = (measured, sources, sections, facts, self.max_slices)
        range_ = float(item["data_range"])
        _write(self.folder / f"{name}.html", volumes, affine, numbers, len(kept), *arguments, data_range=range_)


def _bundle_command() -> str:
    if Path(sys.argv[0]).parts[-2:] != ("bundle", "__main__.py"):
        return "called from Python"
    return shlex.join(["python", "-m", "monai.bundle", *sys.argv[1:]])


def _write(
    output: Path,
    volumes: Mapping[str, torch.Tensor],
    affine: np.ndarray,
    numbers: Sequence[int],
    size: int,
    measured: torch.Tensor,
    sources: Mapping[str, Grid],
    sections: str,
    facts: Mapping[str, str],
    max_slices: int,
    data_range: float | None = None,
) -> Path:
    """Write the page.

    Args:
        output: HTML file.
        volumes: ``(1, X, Y, S)`` each: input, output, reference and perhaps truth.
        affine: voxel-to-world matrix of the whole volume, slices last.
        numbers: which slices of the whole volume the ``S`` are.
        size: how many slices that has.
        measured: the low-resolution volume, whose percentiles are black and white.
        sources: what to state in the table of volumes.
        sections: HTML that stands below the images.
        facts: the provenance but for what every report states.
        max_slices: at most so many are shown.
        data_range: of PSNR and SSIM; None for the truth's maximum.
    """
    panels = {name: torch.as_tensor(v).as_subclass(torch.Tensor)[0] for name, v in volumes.items()}
    # Magnitude images, but another contrast may be signed.
    panels = {name: panel if name == "reference" else panel.abs() for name, panel in panels.items()}
    shape = tuple(panels["reference"].shape)
    picked = np.unique(np.linspace(0, shape[2] - 1, min(max_slices, shape[2])).round().astype(int)).tolist()
    shown = [numbers[n] for n in picked]
    windows = _windows(panels, torch.as_tensor(measured).as_subclass(torch.Tensor))
    notes = {name: f"window {low:.4g} to {high:.4g}" for name, (low, high) in windows.items()}
    figures = {}
    if "truth" in panels:
        data_range = float(panels["truth"].max()) if data_range is None else data_range
        for name in ("input", "output"):
            panels[f"{name}_error"] = (panels[name] - panels["truth"]).abs()
            figures[name] = _figures(panels[name][..., picked], panels["truth"][..., picked], data_range)
        top = float(np.percentile(panels["input_error"].numpy(), BRIGHTEST))
        top = top or float(panels["output_error"].max()) or 1.0  # the input may be the truth
        for name in ("input_error", "output_error"):
            windows[name] = (0.0, top)
            share = f"{top / data_range:.1%} of the truth's maximum"
            notes[name] = f"|difference to the truth|, 0 to {top:.4g} ({share})"

    display = find_display(affine)
    plane = _plane(affine)
    order = [name for name in TITLES if name in panels]
    extent = np.array(shape[:2]) * np.linalg.norm(affine[:3, :2], axis=0)
    width, height = extent if display.transpose else extent[::-1]
    spread = ", evenly spaced" if len(picked) < len(numbers) else ""
    content = {
        "slices": [
            {
                "index": index,
                "text": f"Slice {index + 1} of {size}, {_place(affine, shape, index)}",
                "figures": {name: values[n] for name, values in figures.items()},
            }
            for n, index in enumerate(shown)
        ],
        "titles": {name: TITLES[name] for name in order},
        "orientation": f"{plane}, patient's {WORDS[OPPOSITE[display.right]]} on the left, {WORDS[display.top]} up",
        "count": f"all {size} slices" if len(shown) == size else f"{len(shown)} of {size} slices{spread}",
        "ratio": f"{width:.6g} / {height:.6g}",
        "panels": {
            name: [_png(panels[name][..., n].numpy(), windows[name], display, name.endswith("error")) for n in picked]
            for name in order
        },
    }
    stated = {
        "Package": f"glmamba_monai {glmamba_monai.__version__}",
        "Libraries": f"MONAI {monai.__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "Date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        **facts,
    }
    text = _page(content, display, notes, sections, stated, sources)
    return write_atomically(output, lambda p: p.write_text(text, encoding="utf-8"))


def _on_one_grid(
    loaded: Mapping[str, MetaTensor], sources: Mapping[str, Grid], matrix: np.ndarray, slice_axis: str | int
) -> dict[str, MetaTensor]:
    """Everything on the output's grid with its slices last; the input as the network gets it."""
    image, reference = loaded["input"], loaded["reference"]
    axis_codes = "".join(aff2axcodes(sources["reference"][1]))
    turned = Orientation(axcodes=axis_codes, labels=None)(image)
    # Of a volume on the reference's matrix nothing can be read off, but there it needs no factor either.
    scale = 1 if turned.shape == reference.shape else "auto"
    grid = tuple(turned.shape[1:]), turned.affine.numpy(), sources["input"][2]
    try:
        match_grids(grid, sources["reference"], scale, slice_axis)
    except OtherGridError as error:
        return _on_common_grid(loaded, matrix, slice_axis, error)
    require_same_grid(sources["output"], sources["reference"])
    if not np.array_equal(matrix, np.eye(4)):
        reference = registering.apply(reference, matrix)
    pair = MatchReferenced(["input", "reference"], scale, slice_axis)({"input": image, "reference": reference})
    pair = KSpaceUpsampled("input", "reference")(pair)
    axis = pair[SLICE_AXIS_KEY]
    others = {name: slices_last(loaded[name], axis) for name in ("output", "truth") if name in loaded}
    return {"input": pair["input"], "reference": pair["reference"], **others}


def _on_common_grid(
    loaded: Mapping[str, MetaTensor], matrix: np.ndarray, slice_axis: str | int, otherwise: ValueError
) -> dict[str, MetaTensor]:
    """The same, of an output whose reference was resampled (:func:`~glmamba_monai.transforms.grid.plan_common_grid`).

    Raises:
        ValueError: ``otherwise``, where the output does not have such a grid.
    """
    output = loaded["output"]
    low = Orientation(axcodes="".join(aff2axcodes(output.affine.numpy())), labels=None)(loaded["input"])
    # Where the output's first voxel lies, and how large its voxels are, in voxels of the low-resolution volume.
    voxels = np.linalg.inv(low.affine.numpy()) @ output.affine.numpy()
    steps = np.diag(voxels)[:3]
    sizes = np.rint(np.array(low.shape[1:]) / steps).astype(int)
    starts = (voxels[:3, 3] - (steps - 1) / 2) / steps
    first = np.rint(starts).astype(int)
    ends = first + np.array(output.shape[1:])
    off = max(np.abs(voxels[:3, :3] - np.diag(steps)).max() * max(output.shape[1:]), np.abs(starts - first).max())
    if steps.min() > 0.99 or off > SAME_GRID_TOLERANCE or first.min() < 0 or np.any(ends > sizes):
        raise otherwise
    kept = [a for a in range(3) if abs(steps[a] - 1) < 1e-3]
    axis = kept[0] if slice_axis == "auto" and len(kept) == 1 else find_slice_axis(output.affine.numpy(), slice_axis)
    if axis not in kept:
        raise otherwise
    up = KSpaceUpsample()(slices_last(low, axis), [*np.delete(sizes, axis), sizes[axis]])
    for place, a in enumerate([*(a for a in range(3) if a != axis), axis]):
        up = cut(up, place, (first[a], ends[a]))
    reference = registering.average(loaded["reference"], matrix, output)
    others = {name: slices_last(loaded[name], axis) for name in ("output", "truth") if name in loaded}
    return {"input": up, "reference": slices_last(reference, axis), **others}


def _windows(panels: Mapping[str, torch.Tensor], low_resolution: torch.Tensor) -> dict[str, tuple[float, float]]:
    """Black and white of every gray panel; one window for all of the target contrast, that of the measured volume."""
    measured = _window(low_resolution.abs())
    return {name: _window(panel) if name == "reference" else measured for name, panel in panels.items()}


def _window(volume: torch.Tensor) -> tuple[float, float]:
    low, high = (float(v) for v in np.percentile(volume.numpy(), (DARKEST, BRIGHTEST)))
    if not high > low:  # nearly empty, or constant
        low, high = min(0.0, float(volume.min())), max(0.0, float(volume.max()))
    return low, high


def _figures(images: torch.Tensor, truth: torch.Tensor, data_range: float) -> list[str]:
    """PSNR and SSIM of every slice of ``(X, Y, S)`` in words."""
    if min(truth.shape[:2]) < GAUSSIAN_SIZE:
        return [""] * truth.shape[-1]
    found = slice_metrics(*(v.permute(2, 0, 1)[:, None] for v in (images, truth)), data_range)
    return [
        f"PSNR {psnr:.2f} dB, SSIM {ssim:.4f}" if math.isfinite(psnr) else "equal to the truth"  # outside the head
        for psnr, ssim in zip(found["psnr"].tolist(), found["ssim"].tolist())
    ]


def _plane(affine: np.ndarray) -> str:
    return next(plane for plane, pair in PLANES.items() if aff2axcodes(affine)[2] in pair)


def _place(affine: np.ndarray, shape: Sequence[int], index: int) -> str:
    """Where the middle of a slice lies along the body axis closest to the slice's normal, such as "S 12.0 mm"."""
    middle = affine @ [(shape[0] - 1) / 2, (shape[1] - 1) / 2, index, 1]
    axis = next(i for i, pair in enumerate(("LR", "PA", "IS")) if aff2axcodes(affine)[2] in pair)
    return f"{('LR', 'PA', 'IS')[axis][int(middle[axis] >= 0)]} {abs(middle[axis]):.1f} mm"


def _tilt(affine: np.ndarray) -> float:
    """Largest angle in degrees between an axis of the volume and the body axis that it is named after."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return max(math.degrees(math.acos(min(1.0, float(v)))) for v in np.abs(directions).max(axis=0))


def _png(image: np.ndarray, window: tuple[float, float], display: Display, coloured: bool) -> str:
    """A slice ``(X, Y)`` as an 8-bit PNG, in base64."""
    low, high = window
    shares = (display.rows(image).astype(np.float64) - low) / (high - low)
    values = (np.clip(shares, 0, 1) * 255).round().astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(values))
    if coloured:
        picture.putpalette(_palette())
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _palette() -> bytes:
    """256 colours through :data:`INFERNO`, as red, green and blue."""
    anchors = np.array([list(bytes.fromhex(colour)) for colour in INFERNO])
    places = np.linspace(0, len(INFERNO) - 1, 256)
    channels = [np.interp(places, range(len(INFERNO)), channel) for channel in anchors.T]
    return np.stack(channels, axis=1).round().astype(np.uint8).tobytes()


def _digest(path: Path) -> str:
    """Name and SHA-256 of a file of weights."""
    if not path.is_file():
        raise FileNotFoundError(f"weights {path}: there is no such file")
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return f"{path.name}, SHA-256 {digest.hexdigest()}"


def _read_text(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name} {path}: there is no such file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} {path}: is no text in UTF-8 ({error.reason})") from error


def _read_object(path: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads(_read_text(path, name))
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} {path}: is no JSON ({error}); expected an object of facts") from error
    if not isinstance(found, dict):
        raise ValueError(f"{name} {path}: found a {type(found).__name__}, expected a JSON object of facts")
    return found


def _registration_section(path: Path) -> tuple[np.ndarray, str]:
    """The world matrix of a registration, and its figures and overlay."""
    facts = _read_object(path, "registration")
    try:
        used, move = bool(facts["used"]), f"{facts['move']:.2f} mm (median over the head), {facts['degrees']:.2f}°"
        gain = f"{facts['before']:.3f} before, {facts['after']:.3f} after"
        listed = {"Move": f"{move}, {facts['kind']}", "Mutual information": gain, "Used": facts["reason"]}
        listed["Used"] = f"{'yes' if used else 'no'}: {listed['Used']}"
        names = [path.parent / facts[name] for name in ("transform", "overlay")] if used else None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"registration {path}: found {', '.join(map(str, facts))}; expected the JSON file that a registration has "
            "left beside its result"
        ) from error
    matrix, picture = np.eye(4), ""
    if names is not None:
        matrix = registering.read_transform(names[0])
        if not names[1].is_file():
            raise FileNotFoundError(f"registration {path}: there is no {names[1].name} beside it")
        source = base64.b64encode(names[1].read_bytes()).decode("ascii")
        picture = (
            f'<img class="overlay" alt="Edges of the reference over the low-resolution volume, before and after the'
            f' registration" src="data:image/png;base64,{source}"><p class="hint">The low-resolution volume, and in'
            " red the edges of the reference: above as it lay, below as it was moved.</p>"
        )
    text = "".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in listed.items())
    return matrix, f'<section id="registration"><h2>Registration</h2>{picture}<dl>{text}</dl></section>'


def _metrics_of_file(path: Path) -> str:
    """The table of an evaluation; mean and SD where it holds several subjects."""
    rows: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(_read_text(path, "metrics"))))
    missing = [name for name in ("subject", "method", *CONVENTIONS) if not rows or rows[0].get(name) is None]
    if missing:
        found = ", ".join(map(str, rows[0])) if rows else "no row"
        raise ValueError(
            f"metrics {path}: found {found}; expected metrics.csv of an evaluation, also with {', '.join(missing)}"
        )
    for line, row in enumerate(rows, start=2):
        for name in CONVENTIONS:
            try:
                row[name] = float(row[name])
            except (TypeError, ValueError) as error:
                raise ValueError(f"metrics {path}, line {line}: {name} is {row[name]!r}, expected a number") from error
    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    of = subjects[0] if len(subjects) == 1 else f"mean ± SD over {len(subjects)} subjects"
    return _metrics_section(rows, f"{path.name}, {of}")


def _metrics_section(rows: Sequence[Mapping[str, Any]], caption: str) -> str:
    several = len({row["subject"] for row in rows}) > 1
    head = "".join(f'<th scope="col">{name}</th>' for name in CONVENTIONS)
    body = ""
    for method, summary in summarise(rows).items():
        cells = ""
        for name in CONVENTIONS:
            digits = 2 if name.startswith("psnr") else 4
            spread = f" ± {summary[name]['sd']:.{digits}f}" if several else ""
            cells += f"<td>{summary[name]['mean']:.{digits}f}{spread}</td>"
        body += f'<tr><th scope="row">{html.escape(method)}</th>{cells}</tr>'
    legend = "".join(f"<dt>{name}</dt><dd>{html.escape(text)}</dd>" for name, text in CONVENTIONS.items())
    return (
        f'<section id="metrics"><h2>Metrics</h2><div class="wide" tabindex="0" role="region" aria-label="Metrics">'
        f"<table><caption>{html.escape(caption)}</caption><thead>"
        f'<tr><th scope="col">method</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f"<details><summary>What the columns are</summary><dl>{legend}</dl></details></section>"
    )


def _page(
    content: Mapping[str, Any],
    display: Display,
    notes: Mapping[str, str],
    sections: str,
    facts: Mapping[str, str],
    sources: Mapping[str, Grid],
) -> str:
    """The HTML; everything that came from a file's name or content is escaped."""
    start = len(content["slices"]) // 2
    first = content["slices"][start]
    letters = "".join(
        f'<span class="letter {side}" aria-hidden="true">{letter}</span>'
        for side, letter in (
            ("left", OPPOSITE[display.right]),
            ("right", display.right),
            ("top", display.top),
            ("bottom", OPPOSITE[display.top]),
        )
    )

    def image(name: str) -> str:
        alt = html.escape(f"{TITLES[name]}, {first['text']}, {content['orientation']}")
        source = content["panels"][name][start]
        return f'<img data-panel="{name}" alt="{alt}" draggable="false" src="data:image/png;base64,{source}">'

    figures = ""
    for name, title in content["titles"].items():
        values = f'<span class="figures" data-figures="{name}">{first["figures"].get(name, "")}</span>'
        scale = '<span class="scale" aria-hidden="true"></span>' if name.endswith("error") else ""
        source = f'<span class="file">{html.escape(Path(sources[name][2]).name)}</span>' if name in sources else ""
        figures += (
            f'<figure id="{name}"><div class="view" tabindex="0" role="group" aria-label="{title}">{image(name)}'
            f"{letters}</div><figcaption><strong>{title}</strong>{source}{values}{scale}"
            f'<span class="note">{html.escape(notes[name])}</span></figcaption></figure>'
        )
    inputs = "".join(
        f'<tr><th scope="row">{TITLES[name].split(",")[0]}</th><td>{html.escape(Path(file).name)}</td>'
        f"<td>{' × '.join(map(str, matrix))}</td>"
        f"<td>{' × '.join(f'{v:.4g}' for v in np.linalg.norm(grid[:3, :3], axis=0))}</td>"
        f"<td>{''.join(aff2axcodes(grid))}</td><td>{_tilt(grid):.1f}°</td></tr>"
        for name, (matrix, grid, file) in sources.items()
    )
    listed = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in facts.items())
    return PAGE.substitute(
        style=STYLE.replace("INFERNO", ", ".join(f"#{colour}" for colour in INFERNO)),
        script=SCRIPT,
        data=json.dumps(content),  # nothing in it comes from outside
        name=html.escape(Path(sources["output"][2]).name),
        summary=f"{content['orientation'].capitalize()}; {content['count']}.",
        ratio=content["ratio"],
        last=len(content["slices"]) - 1,
        start=start,
        where=first["text"],
        lower=image("input"),
        upper=image("output"),
        letters=letters,
        figures=figures,
        percentiles=f"{DARKEST} and {BRIGHTEST}",
        error=ERROR_NOTE if "truth" in sources else "",
        sections=sections,
        inputs=inputs,
        facts=listed,
    )


ERROR_NOTE = (
    f" Both maps of the error have one scale, whose top is the {BRIGHTEST}th percentile of the input's error."
    " PSNR and SSIM under a panel are of the slice, with the maximum of the truth's volume as data range."
)

STYLE = """
:root { color-scheme: light dark; --ground: #fbfaf7; --card: #fff; --ink: #1d1d1f; --soft: #5d5d63; --line: #d9d6cf;
  --accent: #0b5cad; --warn: #7a2e00; --warn-ground: #fff1e0; }
@media (prefers-color-scheme: dark) { :root { --ground: #131416; --card: #1c1e21; --ink: #ececee; --soft: #a6a8ad;
  --line: #36393e; --accent: #7db8f5; --warn: #ffd3a8; --warn-ground: #3a2410; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 90rem; padding: 1.5rem clamp(.75rem, 3vw, 2.5rem) 3rem; background: var(--ground);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
h1, h2 { font-family: Georgia, "Times New Roman", serif; font-weight: 500; line-height: 1.2; margin: 0; }
h1 { font-size: clamp(1.5rem, 4vw, 2.25rem); overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; margin: 2.5rem 0 .75rem; border-top: 1px solid var(--line); padding-top: 1rem; }
.over { margin: 0; color: var(--soft); font-size: .8rem; letter-spacing: .1em; text-transform: uppercase; }
.summary { margin: .4rem 0 0; color: var(--soft); }
.banner { margin: 1rem 0; padding: .6rem .9rem; border-left: 4px solid currentColor; color: var(--warn);
  background: var(--warn-ground); }
.bar { position: sticky; top: 0; z-index: 2; display: flex; flex-wrap: wrap; align-items: center; gap: .5rem 1rem;
  padding: .6rem 0; background: var(--ground); border-bottom: 1px solid var(--line); }
.buttons { display: flex; align-items: center; gap: .35rem; }
.slices { flex: 1 1 16rem; }
.slices input { flex: 1; min-width: 6rem; height: 2rem; margin: 0 .35rem; accent-color: var(--accent); }
#where { min-width: 14rem; }
#magnification { min-width: 3.2rem; text-align: center; }
button { min-width: 2.5rem; height: 2.5rem; padding: 0 .7rem; border: 1px solid var(--line); border-radius: .4rem;
  background: var(--card); color: inherit; font: inherit; cursor: pointer; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
.stage { display: grid; gap: 1.25rem; margin-top: 1rem; grid-template-columns: minmax(0, 5fr) minmax(0, 6fr);
  align-items: start; }
.panels { display: grid; gap: 1.25rem 1rem; grid-template-columns: repeat(auto-fill, minmax(min(13rem, 45%), 1fr)); }
@media (max-width: 60rem) { .stage { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 40rem) { .panels { gap: 1rem .6rem; } .slices { flex-basis: 100%; } #magnification { display: none; }
  #where { flex: 1; min-width: 0; font-size: .9rem; } }
figure { margin: 0; min-width: 0; }
.view { position: relative; overflow: hidden; background: #000; aspect-ratio: var(--ratio); border-radius: .3rem;
  touch-action: pan-y; user-select: none; -webkit-user-select: none; }
.zoomed .view { touch-action: none; cursor: grab; }
.view img { display: block; position: absolute; inset: 0; width: 100%; height: 100%; pointer-events: none;
  transform-origin: 0 0; transform: translate(var(--x, 0%), var(--y, 0%)) scale(var(--zoom, 1)); }
.layer { position: absolute; inset: 0; overflow: hidden; pointer-events: none;
  clip-path: inset(0 0 0 var(--swipe, 50%)); }
.handle { position: absolute; top: 0; bottom: 0; left: var(--swipe, 50%); width: 44px; margin-left: -22px;
  cursor: ew-resize; touch-action: none; }
.handle::before { content: ""; position: absolute; inset: 0 21px; background: #ffd400; }
.handle::after { content: "\\2194"; position: absolute; top: 50%; left: 4px; width: 36px; height: 36px;
  margin-top: -18px; border-radius: 50%; background: #ffd400; color: #000; text-align: center; font-size: 22px;
  line-height: 36px; }
.handle:focus-visible { outline-offset: -4px; }
.letter, .tag { position: absolute; pointer-events: none; color: #fff; text-shadow: 0 0 3px #000, 0 0 3px #000; }
.letter { font-weight: 600; font-size: .85rem; line-height: 1; }
.left { left: .35rem; top: 50%; transform: translateY(-50%); } .right { right: .35rem; top: 50%;
  transform: translateY(-50%); }
.top { top: .35rem; left: 50%; transform: translateX(-50%); } .bottom { bottom: .35rem; left: 50%;
  transform: translateX(-50%); }
#compare :is(.top, .bottom) { left: calc(50% + 1rem); }
.tag { bottom: .5rem; font-size: .8rem; } .tag.before { left: .6rem; } .tag.after { right: .6rem; }
figcaption { margin-top: .35rem; font-size: .85rem; line-height: 1.4; }
figcaption > * { display: block; overflow-wrap: anywhere; }
.file, .note, .hint { color: var(--soft); }
.note { font-size: .78rem; }
.hint { font-size: .85rem; max-width: 44rem; }
kbd { padding: 0 .3em; border: 1px solid var(--line); border-radius: .25em; background: var(--card);
  font: .9em ui-monospace, monospace; }
.scale { height: .5rem; margin: .3rem 0 .1rem; border-radius: .25rem;
  background: linear-gradient(to right, INFERNO); }
.wide { overflow-x: auto; }
.overlay { max-width: 100%; border-radius: .3rem; }
table { border-collapse: collapse; font-size: .9rem; }
caption { text-align: left; color: var(--soft); padding-bottom: .4rem; }
th, td { padding: .35rem 1.1rem .35rem 0; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th { font-weight: 600; } th:first-child, #inputs :is(th, td) { text-align: left; }
thead th { color: var(--soft); font-weight: 500; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .3rem 1.25rem; margin: 0;
  font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) { dl { display: block; } dd { margin-bottom: .5rem; } }
details { margin-top: .75rem; font-size: .9rem; } summary { cursor: pointer; margin-bottom: .4rem; }
@media print { .bar, .handle, .hint { display: none; } .layer { clip-path: none; } }
"""

SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const one = (name) => document.getElementById(name);
const every = (selector) => [...document.querySelectorAll(selector)];
const limit = (value, low, high) => Math.min(Math.max(value, low), high);
const slider = one("slice"), handle = one("handle"), stage = one("stage"), swiped = one("compare");
const last = data.slices.length - 1;
const look = { zoom: 1, x: 0, y: 0 };  // x and y: where the left upper corner lies, in sides of a view
let shown = Number(slider.dataset.start), swipe = 50;

function show(number) {
  shown = limit(Math.round(number), 0, last);
  const slice = data.slices[shown];
  slider.value = shown;
  slider.setAttribute("aria-valuetext", slice.text);
  one("where").textContent = slice.text;
  for (const image of every("img[data-panel]")) {
    const name = image.dataset.panel;
    image.src = "data:image/png;base64," + data.panels[name][shown];
    image.alt = [data.titles[name], slice.text, data.orientation].join(", ");
  }
  for (const text of every("[data-figures]")) text.textContent = slice.figures[text.dataset.figures] || "";
}

function place(zoom, x, y) {
  look.zoom = limit(zoom, 1, 12);
  look.x = limit(x, 1 - look.zoom, 0);
  look.y = limit(y, 1 - look.zoom, 0);
  stage.style.setProperty("--zoom", look.zoom);
  stage.style.setProperty("--x", 100 * look.x + "%");
  stage.style.setProperty("--y", 100 * look.y + "%");
  stage.classList.toggle("zoomed", look.zoom > 1);
  one("magnification").textContent = look.zoom.toFixed(1) + "×";
}

function zoomBy(factor, x = 0.5, y = 0.5) {  // what lies at x, y of a view stays there
  const zoom = limit(look.zoom * factor, 1, 12), change = zoom / look.zoom;
  place(zoom, x - (x - look.x) * change, y - (y - look.y) * change);
}

function swipeTo(percent) {
  swipe = limit(percent, 0, 100);
  swiped.style.setProperty("--swipe", swipe + "%");
  handle.setAttribute("aria-valuenow", Math.round(swipe));
  handle.setAttribute("aria-valuetext", Math.round(swipe) + " % input, the rest output");
}

slider.addEventListener("input", () => show(Number(slider.value)));
one("previous").addEventListener("click", () => show(shown - 1));
one("next").addEventListener("click", () => show(shown + 1));
one("closer").addEventListener("click", () => zoomBy(1.5));
one("farther").addEventListener("click", () => zoomBy(1 / 1.5));
one("whole").addEventListener("click", () => place(1, 0, 0));

let dragged = false;
function drag(event) {
  const box = swiped.getBoundingClientRect();
  swipeTo(100 * (event.clientX - box.left) / box.width);
}
handle.addEventListener("pointerdown", (event) => {
  dragged = true;
  handle.setPointerCapture(event.pointerId);
  event.stopPropagation();
});
handle.addEventListener("pointermove", (event) => { if (dragged) drag(event); });
for (const end of ["pointerup", "pointercancel"]) handle.addEventListener(end, () => { dragged = false; });
handle.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -2, ArrowDown: -2, ArrowRight: 2, ArrowUp: 2, Home: -100, End: 100 }[event.key];
  if (step === undefined) return;
  swipeTo(swipe + step * (event.shiftKey ? 5 : 1));
  event.preventDefault();
  event.stopPropagation();
});

for (const view of every(".view")) {
  const fingers = new Map();
  let turned = 0;
  view.addEventListener("pointerdown", (event) => {
    fingers.set(event.pointerId, event);
    view.setPointerCapture(event.pointerId);
  });
  view.addEventListener("pointermove", (event) => {
    const before = fingers.get(event.pointerId);
    if (!before) return;
    const box = view.getBoundingClientRect();
    const other = [...fingers.values()].find((finger) => finger.pointerId !== event.pointerId);
    if (other) {
      const gap = (finger) => Math.hypot(finger.clientX - other.clientX, finger.clientY - other.clientY) || 1;
      const middle = [(event.clientX + other.clientX) / 2 - box.left, (event.clientY + other.clientY) / 2 - box.top];
      zoomBy(gap(event) / gap(before), middle[0] / box.width, middle[1] / box.height);
    } else {
      const moved = [(event.clientX - before.clientX) / box.width, (event.clientY - before.clientY) / box.height];
      place(look.zoom, look.x + moved[0], look.y + moved[1]);
    }
    fingers.set(event.pointerId, event);
  });
  for (const end of ["pointerup", "pointercancel"]) view.addEventListener(end, (e) => fingers.delete(e.pointerId));
  view.addEventListener("wheel", (event) => {
    if (event.ctrlKey) {  // also how a touchpad reports a pinch
      const box = view.getBoundingClientRect();
      zoomBy(Math.exp(-event.deltaY / 200), (event.clientX - box.left) / box.width,
        (event.clientY - box.top) / box.height);
      event.preventDefault();
      return;
    }
    turned += event.deltaY * (event.deltaMode === 0 ? 1 : 40);
    const steps = Math.trunc(turned / 40);  // a touchpad sends many small turns
    if (shown + Math.sign(turned) >= 0 && shown + Math.sign(turned) <= last) event.preventDefault();
    if (steps === 0) return;
    turned = 0;
    show(shown + Math.sign(steps));
  }, { passive: false });
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const inView = event.target.closest(".view") !== null, scrolls = event.target.closest(".wide") !== null;
  const { key, shiftKey } = event;
  const moves = { ArrowLeft: [0.1, 0], ArrowRight: [-0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1] }[key];
  if (shiftKey && moves && look.zoom > 1) place(look.zoom, look.x + moves[0], look.y + moves[1]);
  else if ((key === "ArrowRight" && !scrolls) || (key === "ArrowUp" && inView)) show(shown + 1);
  else if ((key === "ArrowLeft" && !scrolls) || (key === "ArrowDown" && inView)) show(shown - 1);
  else if (key === "Home" && inView) show(0);
  else if (key === "End" && inView) show(last);
  else if (key === "+" || key === "=") zoomBy(1.5);
  else if (key === "-") zoomBy(1 / 1.5);
  else if (key === "0") place(1, 0, 0);
  else return;
  event.preventDefault();
});

show(shown);
place(1, 0, 0);
swipeTo(50);
"""

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>Super-resolution report: $name</title>
<style>$style</style>
</head>
<body>
<header>
<p class="over">Super-resolution report</p>
<h1>$name</h1>
<p class="summary">$summary</p>
</header>
<p class="banner" role="note"><strong>Research use only.</strong> Not a medical device, not for diagnosis.
Super-resolution adds detail that was not measured: compare with the input.</p>
<main>
<div class="bar" role="group" aria-label="Slice and zoom">
<div class="buttons slices"><button id="previous" type="button" aria-label="Previous slice">‹</button>
<input id="slice" type="range" min="0" max="$last" value="$start" data-start="$start" step="1" autocomplete="off"
  aria-label="Slice" aria-valuetext="$where">
<button id="next" type="button" aria-label="Next slice">›</button></div>
<output id="where" for="slice">$where</output>
<div class="buttons"><button id="farther" type="button" aria-label="Zoom out">−</button>
<output id="magnification" aria-label="Zoom">1.0×</output>
<button id="closer" type="button" aria-label="Zoom in">+</button>
<button id="whole" type="button" aria-label="Show the whole slice">Fit</button></div>
</div>
<div class="stage" id="stage" style="--ratio: $ratio">
<figure><div class="view" id="compare" tabindex="0" role="group" aria-label="Input and output, to swipe">
$lower<div class="layer">$upper</div>$letters
<span class="tag before">input</span><span class="tag after">output</span>
<div class="handle" id="handle" tabindex="0" role="slider" aria-label="Swipe between input and output"
  aria-orientation="horizontal" aria-valuemin="0" aria-valuemax="100" aria-valuenow="50"></div></div>
<figcaption><strong>Input and output</strong>
<span class="hint">Drag the yellow line. Wheel or <kbd>←</kbd> <kbd>→</kbd>: slices. <kbd>Ctrl</kbd> + wheel, pinch or
<kbd>+</kbd> <kbd>−</kbd> <kbd>0</kbd>: zoom; drag or <kbd>Shift</kbd> + arrows: move. All images follow.</span>
</figcaption></figure>
<div class="panels">$figures</div>
</div>
$sections
<section id="reading"><h2>How to read it</h2>
<p class="hint">R and L are the patient's right and left, A and P front and back, S and I head and feet; the patient's
left is on the right, in sagittal slices the back. Input, output and truth have one window, from percentiles
$percentiles of the low-resolution volume; the reference has its own; magnitudes are shown. The input is on the
output's grid by zero-filling its k-space.$error</p></section>
<section id="inputs"><h2>Volumes</h2>
<div class="wide" tabindex="0" role="region" aria-label="Volumes"><table><thead><tr><th scope="col">role</th>
<th scope="col">file</th><th scope="col">matrix</th><th scope="col">spacing (mm)</th><th scope="col">axes run to</th>
<th scope="col">tilt</th></tr></thead><tbody>$inputs</tbody></table></div></section>
<section id="provenance"><h2>Provenance</h2><dl>$facts</dl></section>
</main>
<script type="application/json" id="data">$data</script>
<script>$script</script>
</body>
</html>
""")
