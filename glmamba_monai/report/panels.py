"""The images of a report: every volume on one grid, its gray window, maps of the error, and a PNG of each slice."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation
from nibabel import aff2axcodes
from PIL import Image

from glmamba_monai import registration as registering
from glmamba_monai.metrics import GAUSSIAN_SIZE, slice_metrics
from glmamba_monai.transforms import KSpaceUpsample, KSpaceUpsampled, MatchReferenced
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
from glmamba_monai.transforms.volume import SLICE_AXIS_KEY, cut, slices_last

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


def on_one_grid(
    loaded: Mapping[str, MetaTensor], sources: Mapping[str, Grid], matrix: np.ndarray, slice_axis: str | int
) -> dict[str, MetaTensor]:
    """Everything on the output's grid with its slices last; the input as the network gets it.

    Args:
        loaded: ``(1, X, Y, Z)`` each: input, output, reference and perhaps truth, as they were read.
        sources: grid and file of each.
        matrix: ``(4, 4)``, world to world in mm: by what the reference is moved.
        slice_axis: "auto", an axis, or "axial", "coronal", "sagittal".

    Raises:
        ValueError: the volumes do not lie on the grids of a super-resolution.
    """
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


@dataclass(frozen=True)
class Volumes:
    """What a report shows.

    Attributes:
        images: ``(1, X, Y, S)`` each: input, output, reference and perhaps truth.
        affine: ``(4, 4)``, voxel to world in mm, of the whole volume, slices last.
        numbers: which slices of the whole volume the ``S`` are.
        size: how many slices that has.
        measured: the low-resolution volume, whose percentiles are black and white.
        data_range: of PSNR and SSIM; None for the truth's maximum.
    """

    images: Mapping[str, torch.Tensor]
    affine: np.ndarray
    numbers: Sequence[int]
    size: int
    measured: torch.Tensor
    data_range: float | None = None


@dataclass(frozen=True)
class Panels:
    """The same, drawn: what a page needs of it.

    Attributes:
        images: by panel, in the order of :data:`TITLES`, a PNG of each slice, in base64.
        slices: of each slice its ``index`` in the whole volume, its place as ``text``, and PSNR and SSIM in words as
            ``figures`` of input and output, where the truth is known.
        notes: by panel, what its darkest and its brightest stand for.
        display: which way round the slices are.
        orientation: the same in words.
        count: how many slices are shown, of how many, in words.
        ratio: of width to height in mm, as CSS has it.
    """

    images: dict[str, list[str]]
    slices: list[dict[str, Any]]
    notes: dict[str, str]
    display: Display
    orientation: str
    count: str
    ratio: str

    @property
    def start(self) -> int:
        """Which of the slices is shown first."""
        return len(self.slices) // 2


def draw_panels(volumes: Volumes, max_slices: int) -> Panels:
    """Draw every volume, and where the truth is known the error of input and output.

    Args:
        volumes: what to show.
        max_slices: at most so many slices of it, evenly spaced.
    """
    shown = {name: torch.as_tensor(v).as_subclass(torch.Tensor)[0] for name, v in volumes.images.items()}
    # Magnitude images, but another contrast may be signed.
    shown = {name: volume if name == "reference" else volume.abs() for name, volume in shown.items()}
    shape = tuple(shown["reference"].shape)
    picked = np.unique(np.linspace(0, shape[2] - 1, min(max_slices, shape[2])).round().astype(int)).tolist()
    windows = _windows(shown, torch.as_tensor(volumes.measured).as_subclass(torch.Tensor))
    notes = {name: f"window {low:.4g} to {high:.4g}" for name, (low, high) in windows.items()}
    figures = {}
    if "truth" in shown:
        data_range = float(shown["truth"].max()) if volumes.data_range is None else volumes.data_range
        for name in ("input", "output"):
            shown[f"{name}_error"] = (shown[name] - shown["truth"]).abs()
            figures[name] = _figures(shown[name][..., picked], shown["truth"][..., picked], data_range)
        top = float(np.percentile(shown["input_error"].numpy(), BRIGHTEST))
        top = top or float(shown["output_error"].max()) or 1.0  # the input may be the truth
        share = f"{top / data_range:.1%} of the truth's maximum"
        for name in ("input_error", "output_error"):
            windows[name] = (0.0, top)
            notes[name] = f"|difference to the truth|, 0 to {top:.4g} ({share})"

    affine, size = volumes.affine, volumes.size
    display = find_display(affine)
    order = [name for name in TITLES if name in shown]
    indices = [volumes.numbers[n] for n in picked]
    extent = np.array(shape[:2]) * np.linalg.norm(affine[:3, :2], axis=0)
    width, height = extent if display.transpose else extent[::-1]
    spread = ", evenly spaced" if len(picked) < len(volumes.numbers) else ""
    return Panels(
        images={
            name: [_png(shown[name][..., n].numpy(), windows[name], display, name.endswith("error")) for n in picked]
            for name in order
        },
        slices=[
            {
                "index": index,
                "text": f"Slice {index + 1} of {size}, {_place(affine, shape, index)}",
                "figures": {name: values[n] for name, values in figures.items()},
            }
            for n, index in enumerate(indices)
        ],
        notes=notes,
        display=display,
        orientation=(
            f"{_plane(affine)}, patient's {WORDS[OPPOSITE[display.right]]} on the left, {WORDS[display.top]} up"
        ),
        count=f"all {size} slices" if len(picked) == size else f"{len(picked)} of {size} slices{spread}",
        ratio=f"{width:.6g} / {height:.6g}",
    )


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
