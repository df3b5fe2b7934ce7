"""The figures of docs/results.md: super-resolved slices, zoomed insets, error maps, the truth and the reference.

    python docs/make_results.py --subject_dir DATA/patient07

needs matplotlib (test extra). It draws only data that may be published: the phantom, and the CC-BY sets of multiple
sclerosis patients (Lesjak et al., 2016 and 2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import fire
import matplotlib
import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.transforms import Compose
from nibabel import aff2axcodes
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from glmamba_monai.bundle import weights_folders
from glmamba_monai.data import demo_data
from glmamba_monai.engines.weights import find_weights, load_weights
from glmamba_monai.files import write_atomically
from glmamba_monai.metrics import slice_metrics
from glmamba_monai.networks import build_network
from glmamba_monai.transforms import ForegroundSlicesd
from glmamba_monai.transforms.volume import foreground_level

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

BUNDLE = Path(__file__).resolve().parent.parent / "bundle"
CONFIG = BUNDLE / "configs" / "train.json"
PUBLISHABLE = ("openms_long", "openms_mni")  # names of the data sets' folders, beside the phantom's
INSET = 0.25  # side of the zoomed square over the shorter side of the head
MARGIN = 4  # pixels around the head
INSIDE = 0.95  # of the zoomed square must be head: at its border every method errs
BRIGHTEST = 99.5  # percentile of the truth, and of the error of zero-filling, at the top of their scales
WIDTH = 1.9  # of a slice, in inches
BOX = "#ffd400"


class Slice(NamedTuple):
    """One slice of a subject, ``(X, Y)``; the maximum of its target volume, and the level of its foreground."""

    upsampled: Tensor
    target: Tensor
    reference: Tensor
    data_range: float
    level: float
    axis_codes: tuple[str, ...]


def require_publishable(folder: Path) -> None:
    """Make sure that pictures of a subject may be published.

    Raises:
        ValueError: the folder is of no such data set.
    """
    if folder.parent.name not in PUBLISHABLE and folder.parent != Path(demo_data()):
        raise ValueError(
            f"subject_dir {folder}: expected a subject of {' or '.join(PUBLISHABLE)}, or of the phantom "
            f"{demo_data()}: of other data no picture may be published"
        )


def load_slice(folder: Path, target: str, reference: str, scale: float, index: int | None) -> Slice:
    """A slice as an evaluation prepares it; the middle one of those with enough foreground if ``index`` is None."""
    parser = ConfigParser()
    parser.read_config(str(CONFIG))
    parser.update({"network": "zero_filling", "scale": scale})
    files = {"target": str(folder / f"{target}.nii.gz"), "reference": str(folder / f"{reference}.nii.gz")}
    item = Compose(parser.get_parsed_content("train#deterministic_transforms"))(files)
    codes = aff2axcodes(item["target"].affine.numpy())
    whole = item["target"].as_tensor()
    if index is None:
        item = ForegroundSlicesd(["image", "target"], "target")(item)
        index = item["target"].shape[-1] // 2
    image, hr = (item[key].as_tensor()[..., index].contiguous() for key in ("image", "target"))
    return Slice(image[0], hr[0], image[1], float(whole.max()), foreground_level(whole), codes)


@torch.inference_mode()
def super_resolve(weights: dict[str, str | None], pair: Slice, scale: float) -> dict[str, Tensor]:
    """``{network: (X, Y)}``, zero-filling first."""
    found = {"zero_filling": pair.upsampled}
    for name, named in weights.items():
        network = build_network(name).eval()
        file = find_weights(named, weights_folders(BUNDLE, name), network, scale)
        if file is not None:
            load_weights(network, file, name)
        found[name] = network(torch.stack((pair.upsampled, pair.reference))[None])[0, 0]
    return found


def upright(image: Tensor, axis_codes: Sequence[str]) -> np.ndarray:
    """``(X, Y)`` as rows from the top: the front or the head up, the patient's left or back to the right."""
    rows, (across, up) = image.numpy().T, axis_codes[:2]
    if ["LR", "AP", "IS"].index(_direction(across)) > ["LR", "AP", "IS"].index(_direction(up)):
        rows, across, up = rows.T, up, across
    rows = rows if across in "LP" else rows[:, ::-1]
    return rows[::-1] if up in "AS" else rows


def _direction(code: str) -> str:
    return next(pair for pair in ("LR", "AP", "IS") if code in pair)


def head_window(mask: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of the head, with a margin."""
    window = []
    for axis in (1, 0):
        found = np.flatnonzero(mask.any(axis=axis))
        window.append(slice(max(int(found[0]) - MARGIN, 0), int(found[-1]) + MARGIN + 1))
    return window[0], window[1]


def inset_window(error: np.ndarray, mask: np.ndarray, side: int) -> tuple[slice, slice]:
    """Rows and columns of the square inside the head with the largest squared error."""
    squares = [sliding_window_view(image, (side, side)).mean(axis=(2, 3)) for image in (error**2, mask)]
    energy = np.where(squares[1] >= min(INSIDE, squares[1].max()), squares[0], -1)
    row, column = np.unravel_index(int(energy.argmax()), energy.shape)
    return slice(int(row), int(row) + side), slice(int(column), int(column) + side)


def draw(
    axis: Axes, image: np.ndarray, title: str, box: tuple[slice, slice] | None = None, **options: object
) -> object:
    """An image without ticks, and a frame around what is zoomed."""
    shown = axis.imshow(image, interpolation="nearest", **options)
    axis.set_title(title, fontsize=9)
    axis.set_axis_off()
    if box is not None:
        rows, columns = box
        size = columns.stop - columns.start, rows.stop - rows.start
        axis.add_patch(Rectangle((columns.start - 0.5, rows.start - 0.5), *size, fill=False, color=BOX, linewidth=1.2))
    return shown


def make_figure(pair: Slice, results: dict[str, Tensor], heading: str, contrasts: tuple[str, str]) -> plt.Figure:
    """A row a method (slice, inset, error, its inset), and a row of truth and reference."""
    volumes = {"target": pair.target, "reference": pair.reference, **{n: v.abs() for n, v in results.items()}}
    images = {name: upright(volume, pair.axis_codes) for name, volume in volumes.items()}
    mask = images["target"] > pair.level
    window = head_window(mask)
    images = {name: image[window] for name, image in images.items()}
    errors = {name: np.abs(images[name] - images["target"]) / pair.data_range for name in results}
    height, width = images["target"].shape
    box = inset_window(errors["zero_filling"], mask[window], max(int(INSET * min(height, width)), 4))

    def gray(image: np.ndarray) -> dict[str, object]:
        return {"cmap": "gray", "vmin": 0, "vmax": np.percentile(image, BRIGHTEST)}

    figure, axes = plt.subplots(
        len(results) + 1,
        4,
        figsize=(2 * WIDTH * (1 + height / width) + 1, (len(results) + 1) * (WIDTH * height / width + 0.4) + 0.3),
        layout="constrained",
        gridspec_kw={"width_ratios": [1, height / width] * 2},  # so that all images are equally high
    )
    error_scale = {"cmap": "inferno", "vmin": 0, "vmax": np.percentile(errors["zero_filling"], BRIGHTEST)}
    for row, (name, result) in zip(axes, results.items()):
        metrics = slice_metrics(result[None, None], pair.target[None, None], pair.data_range)
        figures = f"{float(metrics['psnr']):.2f} dB, SSIM {float(metrics['ssim']):.4f}"
        draw(row[0], images[name], f"{name}\n{figures}", box, **gray(images["target"]))
        draw(row[1], images[name][box], "zoomed", **gray(images["target"]))
        shown = draw(row[2], errors[name], "error", box, **error_scale)
        draw(row[3], errors[name][box], "zoomed", **error_scale)
    for column, (name, title) in enumerate(zip(("target", "reference"), contrasts)):
        draw(axes[-1, 2 * column], images[name], title, box, **gray(images[name]))
        draw(axes[-1, 2 * column + 1], images[name][box], "zoomed", **gray(images[name]))
    figure.colorbar(shown, ax=axes[:-1], fraction=0.02, label="error over the maximum of the volume", extend="max")
    figure.suptitle(heading, fontsize=10)
    return figure


def main(
    subject_dir: str | None = None,
    weights: dict[str, str | None] | None = None,
    target: str = "t2",
    reference: str = "t1",
    scales: float | Sequence[float] = (2, 4),
    index: int | None = None,
    output_dir: str = "docs",
) -> None:
    """Draw a figure a factor, OUTPUT_DIR/SUBJECT_SCALEx.png.

    Args:
        subject_dir: folder with target and reference; a subject of the phantom if there is none.
        weights: file of weights of each network, in the order of the rows, None for the bundle's for that factor;
            glmamba_light and glmamba with those if there is none.
        target: contrast to super-resolve.
        reference: contrast that guides.
        scales: one factor or several.
        index: of the slice; the middle one if there is none.
        output_dir: folder.
    """
    folder = Path(demo_data()) / "subject-005" if subject_dir is None else Path(subject_dir).resolve()
    require_publishable(folder)
    for scale in scales if isinstance(scales, Sequence) else [scales]:  # fire reads "2" as a number
        pair = load_slice(folder, target, reference, scale, index)
        heading = f"{folder.parent.name}/{folder.name}, {target.upper()} at {scale:g}x"
        contrasts = (f"{target.upper()}, truth", f"{reference.upper()}, reference")
        found = super_resolve(weights or {"glmamba_light": None, "glmamba": None}, pair, scale)
        figure = make_figure(pair, found, heading, contrasts)
        path = Path(output_dir) / f"{folder.name}_{scale:g}x.png"
        write_atomically(path, lambda p, figure=figure: figure.savefig(p, dpi=100))
        plt.close(figure)
        print(path)


if __name__ == "__main__":
    fire.Fire(main)
