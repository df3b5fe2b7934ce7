"""The page of a report: what it states, and how that and the images become one HTML file."""

from __future__ import annotations

import base64
import csv
import datetime
import hashlib
import html
import io
import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import monai
import numpy as np
import torch
from nibabel import aff2axcodes

import glmamba_monai
from glmamba_monai import registration as registering
from glmamba_monai.engines.evaluation import summarise
from glmamba_monai.files import write_atomically
from glmamba_monai.metrics import CONVENTIONS
from glmamba_monai.report.panels import BRIGHTEST, DARKEST, INFERNO, OPPOSITE, TITLES, Panels
from glmamba_monai.transforms.grid import Display, Grid

ERROR_NOTE = (
    f" Both maps of the error have one scale, whose top is the {BRIGHTEST}th percentile of the input's error."
    " PSNR and SSIM under a panel are of the slice, with the maximum of the truth's volume as data range."
)


def write_page(
    output: Path, panels: Panels, sources: Mapping[str, Grid], sections: str, facts: Mapping[str, str]
) -> Path:
    """Write the page; everything that came from a file's name or content is escaped.

    Args:
        output: HTML file.
        panels: the images.
        sources: what to state in the table of volumes.
        sections: HTML that stands below the images.
        facts: the provenance but for what every report states.

    Raises:
        OSError: it cannot be written.
    """
    stated = {
        "Package": f"glmamba_monai {glmamba_monai.__version__}",
        "Libraries": f"MONAI {monai.__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "Date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        **facts,
    }
    content = {  # for the script
        "slices": panels.slices,
        "titles": {name: TITLES[name] for name in panels.images},
        "orientation": panels.orientation,
        "count": panels.count,
        "ratio": panels.ratio,
        "panels": panels.images,
    }
    # What starts with $ in page.html is filled in here, and of style.css the colours.
    text = Template(_part("page.html")).substitute(
        style=_part("style.css").replace("INFERNO", ", ".join(f"#{colour}" for colour in INFERNO)),
        script=_part("script.js"),
        data=json.dumps(content),  # nothing in it comes from outside
        name=html.escape(Path(sources["output"][2]).name),
        summary=f"{panels.orientation.capitalize()}; {panels.count}.",
        ratio=panels.ratio,
        last=len(panels.slices) - 1,
        start=panels.start,
        where=panels.slices[panels.start]["text"],
        lower=_image(panels, "input"),
        upper=_image(panels, "output"),
        letters=_letters(panels.display),
        figures="".join(_figure(panels, name, sources) for name in panels.images),
        percentiles=f"{DARKEST} and {BRIGHTEST}",
        error=ERROR_NOTE if "truth" in sources else "",
        sections=sections,
        inputs="".join(_volume_row(name, *source) for name, source in sources.items()),
        facts=_entries(stated),
    )
    return write_atomically(output, lambda p: p.write_text(text, encoding="utf-8"))


def _part(name: str) -> str:
    """Text of a file beside this module, which may lie in an archive."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _letters(display: Display) -> str:
    sides = {
        "left": OPPOSITE[display.right],
        "right": display.right,
        "top": display.top,
        "bottom": OPPOSITE[display.top],
    }
    return "".join(f'<span class="letter {side}" aria-hidden="true">{letter}</span>' for side, letter in sides.items())


def _image(panels: Panels, name: str) -> str:
    alt = html.escape(f"{TITLES[name]}, {panels.slices[panels.start]['text']}, {panels.orientation}")
    source = panels.images[name][panels.start]
    return f'<img data-panel="{name}" alt="{alt}" draggable="false" src="data:image/png;base64,{source}">'


def _figure(panels: Panels, name: str, sources: Mapping[str, Grid]) -> str:
    """A panel with its title, file, figures, scale and note."""
    title, figures = TITLES[name], panels.slices[panels.start]["figures"]
    values = f'<span class="figures" data-figures="{name}">{figures.get(name, "")}</span>'
    scale = '<span class="scale" aria-hidden="true"></span>' if name.endswith("error") else ""
    source = f'<span class="file">{html.escape(Path(sources[name][2]).name)}</span>' if name in sources else ""
    return (
        f'<figure id="{name}"><div class="view" tabindex="0" role="group" aria-label="{title}">{_image(panels, name)}'
        f"{_letters(panels.display)}</div><figcaption><strong>{title}</strong>{source}{values}{scale}"
        f'<span class="note">{html.escape(panels.notes[name])}</span></figcaption></figure>'
    )


def _volume_row(name: str, matrix: Sequence[int], affine: np.ndarray, file: str) -> str:
    """A row of the table of volumes."""
    return (
        f'<tr><th scope="row">{TITLES[name].split(",")[0]}</th><td>{html.escape(Path(file).name)}</td>'
        f"<td>{' × '.join(map(str, matrix))}</td>"
        f"<td>{' × '.join(f'{v:.4g}' for v in np.linalg.norm(affine[:3, :3], axis=0))}</td>"
        f"<td>{''.join(aff2axcodes(affine))}</td><td>{_tilt(affine):.1f}°</td></tr>"
    )


def _tilt(affine: np.ndarray) -> float:
    """Largest angle in degrees between an axis of the volume and the body axis that it is named after."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return max(math.degrees(math.acos(min(1.0, float(v)))) for v in np.abs(directions).max(axis=0))


def _entries(facts: Mapping[str, str]) -> str:
    """Entries of a ``<dl>``."""
    return "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items())


def weights_digest(path: Path) -> str:
    """Name and SHA-256 of a file of weights.

    Raises:
        FileNotFoundError: there is no such file.
    """
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


def read_object(path: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: of the file.
        name: of the argument that names the file, for errors.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or no object in it.
    """
    try:
        found = json.loads(_read_text(path, name))
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} {path}: is no JSON ({error}); expected an object of facts") from error
    if not isinstance(found, dict):
        raise ValueError(f"{name} {path}: found a {type(found).__name__}, expected a JSON object of facts")
    return found


def registration_section(path: Path) -> tuple[np.ndarray, str]:
    """The world matrix ``(4, 4)`` of a registration, and its figures and overlay as HTML.

    Args:
        path: JSON file that the registration has left.

    Raises:
        FileNotFoundError, ValueError: it, its transform or its overlay is missing or unfit.
    """
    facts = read_object(path, "registration")
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
    section = f'<section id="registration"><h2>Registration</h2>{picture}<dl>{_entries(listed)}</dl></section>'
    return matrix, section


def metrics_of_file(path: Path) -> str:
    """The table of an evaluation as HTML; mean and SD where it holds several subjects.

    Args:
        path: its ``metrics.csv``.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is another table.
    """
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
    return metrics_section(rows, f"{path.name}, {of}")


def metrics_section(rows: Sequence[Mapping[str, Any]], caption: str) -> str:
    """The same of rows, one a subject and method, with the metrics by the names in ``CONVENTIONS``."""
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
    return (
        f'<section id="metrics"><h2>Metrics</h2><div class="wide" tabindex="0" role="region" aria-label="Metrics">'
        f"<table><caption>{html.escape(caption)}</caption><thead>"
        f'<tr><th scope="col">method</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f"<details><summary>What the columns are</summary><dl>{_entries(CONVENTIONS)}</dl></details></section>"
    )
