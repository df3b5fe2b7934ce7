"""Where voxels lie: which grids agree, the slice axis, the factor between two grids, how slices are shown.

A grid is ``(shape, affine, name)``: spatial shape, 4x4 voxel-to-world matrix in mm, and what to call it in errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import nibabel as nib
import numpy as np

Grid = tuple[Sequence[int], np.ndarray, str]

SAME_GRID_TOLERANCE = 0.1  # voxels at the corners; headers are rounded, and a tenth of a voxel is no misalignment
# Voxels of the reference at the corners. A tool that shrinks 2x and keeps the place of voxel 0 is 0.5 off: refused.
FIELD_OF_VIEW_TOLERANCE = 0.45
THICK_SLICES = 1.5  # spacing across slices over spacing in plane from which a stack counts as thick
MIN_FACTOR = 1.25  # pixels of a low-resolution volume over those of its reference
ABOUT = 0.05  # a factor this little beyond what networks are trained for is as good
WHOLE = 0.02  # of a whole factor, at most, that a factor may differ from it
MIN_COMMON = 0.25  # of the low-resolution field of view: less shows two different parts of the body
PLANES = {"sagittal": "LR", "coronal": "AP", "axial": "IS"}  # the plane, and the direction across its slices


class OtherGridError(ValueError):
    """Two volumes that overlap, but not slice by slice over one field of view."""


class CommonGrid(NamedTuple):
    """Where a low-resolution stack and a reference on another grid meet; see :func:`plan_common_grid`.

    Axes are those of the low-resolution volume.

    Attributes:
        slice_axis: across the slices.
        slices: first slice to keep, and the one after the last.
        shape: of the grid for the reference: the slices to keep, the whole field of view in plane.
        affine: of that grid.
        common: first row and the one after the last, for both in-plane axes of that grid: what the reference covers.
        notes: what was done, a sentence each.
    """

    slice_axis: int
    slices: tuple[int, int]
    shape: tuple[int, int, int]
    affine: np.ndarray
    common: tuple[int, int, int, int]
    notes: list[str]


def _corners(shape: Sequence[int], affine: np.ndarray) -> np.ndarray:
    """World coordinates ``(8, 3)`` of the outer corners of the corner voxels."""
    ends = np.array(np.meshgrid(*([-0.5, n - 0.5] for n in shape), indexing="ij")).reshape(3, -1)
    return (affine[:3, :3] @ ends + affine[:3, 3:]).T


def _spacing(affine: np.ndarray) -> np.ndarray:
    return np.linalg.norm(affine[:3, :3], axis=0)


def require_same_grid(grid: Grid, other: Grid) -> None:
    """Make sure that two volumes have the same matrix at the same place.

    Raises:
        ValueError: they do not; the message names both and says by how much.
    """
    (shape, affine, name), (other_shape, other_affine, other_name) = grid, other
    if tuple(shape) != tuple(other_shape):
        raise ValueError(
            f"{name} has the matrix {tuple(shape)} and {other_name} has {tuple(other_shape)}; target and reference "
            "must lie on one grid: register and resample one onto the other first"
        )
    distance = np.linalg.norm(_corners(shape, affine) - _corners(other_shape, other_affine), axis=1).max()
    if distance > SAME_GRID_TOLERANCE * _spacing(affine).min():
        raise ValueError(
            f"{name} and {other_name} have the same matrix but lie up to {distance:.2f} mm apart in world space; "
            "target and reference must lie on one grid: register and resample one onto the other first"
        )


def find_slice_axis(affine: np.ndarray, slice_axis: str | int = "auto") -> int:
    """The array axis across the slices.

    Args:
        affine: 4x4 voxel-to-world matrix.
        slice_axis: an axis 0, 1 or 2; "axial", "coronal" or "sagittal"; or "auto": the axis of thick slices, and
            for (nearly) isotropic voxels the one closest to the body's long axis (axial slices).

    Raises:
        ValueError: ``slice_axis`` is none of these.
    """
    if slice_axis in (0, 1, 2):
        return int(slice_axis)
    if slice_axis == "auto":
        spacing = _spacing(affine)
        thickest = int(np.argmax(spacing))
        if spacing[thickest] > THICK_SLICES * np.delete(spacing, thickest).max():
            return thickest
        slice_axis = "axial"
    if not isinstance(slice_axis, str) or slice_axis not in PLANES:
        raise ValueError(f"slice_axis must be auto, 0, 1, 2, {', '.join(PLANES)}; got {slice_axis!r}")
    codes = nib.aff2axcodes(affine)
    return next(axis for axis, code in enumerate(codes) if code in PLANES[slice_axis])


def slice_axes(affine: np.ndarray, slice_axis: str | int = "auto") -> list[int]:
    """Every axis across which a volume has slices to train on.

    Args:
        affine: 4x4 voxel-to-world matrix.
        slice_axis: see :func:`find_slice_axis`, which gives the one axis of anything but "auto". "auto" is all three
            axes of (nearly) isotropic voxels, and otherwise the axis of thick slices.
    """
    spacing = np.sort(_spacing(affine))
    if slice_axis == "auto" and spacing[-1] <= THICK_SLICES * spacing[0]:
        return [0, 1, 2]
    return [find_slice_axis(affine, slice_axis)]


def low_resolution_size(size: int, scale: float) -> int:
    """Matrix size ``ceil(size / scale)`` that an axis keeps in low resolution (docs/data.md, preprocessing)."""
    return math.ceil(size / scale - 1e-9)  # the tolerance keeps rounding of a fractional factor from adding a line


def matrix_factor(fine: Sequence[int], coarse: Sequence[int]) -> list[float]:
    """How many times more rows and columns one matrix has than another, over the same field of view.

    Where the coarse matrix is what a whole factor leaves of the fine one (33 of 129 rows at a factor of 4), it is that
    factor, although 129 / 33 is 3.91.
    """
    whole = round(fine[0] / coarse[0])
    if whole >= 1 and all(low_resolution_size(f, whole) == c for f, c in zip(fine, coarse)):
        return [float(whole)] * len(coarse)
    return [f / c for f, c in zip(fine, coarse)]


def whole_factor(scale: float | Sequence[float]) -> int | None:
    """The whole number that a factor in plane is, along every axis that is named and to 2 %.

    Args:
        scale: a number, or one per axis.

    Returns:
        2 or more; None for any other factor, and for 1: such a volume is not low-resolution, or has been interpolated,
        and nothing tells how much of it was measured.
    """
    factors = [scale] if isinstance(scale, Real) else list(scale)
    if not factors or not all(isinstance(f, Real) and math.isfinite(f) for f in factors):
        return None
    whole = round(factors[0])
    return whole if whole >= 2 and all(abs(f - whole) <= WHOLE * whole for f in factors) else None


def match_grids(
    low_resolution: Grid,
    reference: Grid,
    scale: str | float | Sequence[float] = "auto",
    slice_axis: str | int = "auto",
) -> int:
    """Check that a low-resolution stack and a reference cover the same field of view, slice by slice.

    Both must have their array axes in the same anatomical order.

    Args:
        low_resolution: the coarse grid.
        reference: the fine grid.
        scale: "auto" reads the factor off the two grids; a number (or one per in-plane axis) is checked against them.
            1 says that the volume has the reference's matrix already (the scanner interpolated it).
        slice_axis: see :func:`find_slice_axis`; "auto" takes the axis along which the spacing is the same, and where
            several are, the slice axis of the reference.

    Returns:
        The slice axis.

    Raises:
        OtherGridError: they are rotated against each other, cover different fields of view, or have other slices.
        ValueError: they do not overlap, or do not have the factor that was named.
    """
    (shape, affine, name), (ref_shape, ref_affine, ref_name) = low_resolution, reference
    low, high = _corners(shape, affine), _corners(ref_shape, ref_affine)
    if np.any(low.max(0) <= high.min(0)) or np.any(high.max(0) <= low.min(0)):
        raise ValueError(
            f"{name} and {ref_name} do not overlap in world space (they cover {_box(low)} and {_box(high)} mm): "
            "are they of the same patient and session?"
        )
    apart = np.abs(np.linalg.solve(ref_affine[:3, :3], (low - high).T)).max()
    if apart > FIELD_OF_VIEW_TOLERANCE:
        raise OtherGridError(
            f"{name} and {ref_name} do not cover the same field of view: their corners lie up to {apart:.2f} voxels of "
            f"the reference apart (allowed {FIELD_OF_VIEW_TOLERANCE}). Register and crop one to the other first"
        )
    ratios = np.asarray(ref_shape) / np.asarray(shape)
    if np.any(ratios < 1):
        raise OtherGridError(
            f"{name} has the matrix {tuple(shape)}, finer than {ref_name} with {tuple(ref_shape)}: "
            "image must be the low-resolution volume and reference the sharp one; are they swapped?"
        )
    unchanged = [axis for axis in range(3) if shape[axis] == ref_shape[axis]]
    axis = unchanged[0] if slice_axis == "auto" and len(unchanged) == 1 else find_slice_axis(ref_affine, slice_axis)
    if axis not in unchanged:
        raise OtherGridError(
            f"{name} has {shape[axis]} slices along axis {axis} and {ref_name} has {ref_shape[axis]}: super-resolution "
            "is in plane, so the slices must be the same; name the slice axis with slice_axis if it is another"
        )
    in_plane = [a for a in range(3) if a != axis]
    found = [float(ratios[a]) for a in in_plane]
    if scale == "auto":
        if all(r == 1 for r in found):
            raise ValueError(
                f"{name} has the same matrix as {ref_name}, {tuple(shape)}: it is not low-resolution. If the scanner "
                "has interpolated it, say so with scale 1"
            )
        return axis
    factors = _in_plane_factors(scale)
    wanted = [low_resolution_size(ref_shape[a], f) for a, f in zip(in_plane, factors)]
    if wanted != [shape[a] for a in in_plane]:
        raise ValueError(
            f"scale {scale} does not fit: {ref_name} is {ref_shape[in_plane[0]]} x {ref_shape[in_plane[1]]} in plane, "
            f"so {name} should be {wanted[0]} x {wanted[1]}, but it is {shape[in_plane[0]]} x {shape[in_plane[1]]} "
            f"(factors {found[0]:.3g} and {found[1]:.3g}); leave scale at auto to take it from the files"
        )
    return axis


def _in_plane_factors(scale: float | Sequence[float]) -> list[float]:
    factors = [scale, scale] if isinstance(scale, (int, float)) else list(scale) if isinstance(scale, Sequence) else []
    if len(factors) != 2 or not all(isinstance(f, (int, float)) and f >= 1 for f in factors):
        raise ValueError(f"scale must be auto, a number >= 1 or one such number per in-plane axis, got {scale!r}")
    return factors


def sampling_along(affine: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How far apart in mm the voxels of one grid are along each axis of another, for any angle between the two."""
    directions = other[:3, :3] / _spacing(other)
    return 1 / np.linalg.norm(np.linalg.solve(affine[:3, :3], directions), axis=0)


def plan_common_grid(
    low_resolution: Grid,
    reference: Grid,
    scale: str | float | Sequence[float] = "auto",
    slice_axis: str | int = "auto",
    limits: tuple[float, float] = (1, math.inf),
) -> CommonGrid:
    """A grid for a reference of any orientation, spacing and field of view: the slices of the low-resolution volume.

    In plane it covers the field of view of the low-resolution volume, so that this is upsampled in k-space and stays
    as it was measured.

    Args:
        low_resolution: the coarse grid.
        reference: the fine grid.
        scale: "auto" makes square pixels of the finest spacing that the reference has in plane, within ``limits``; a
            number (or one per in-plane axis) is the factor.
        slice_axis: see :func:`find_slice_axis`; "auto" takes the one axis along which both have the same spacing, and
            where that is none or several, the slice axis of the low-resolution volume.
        limits: the smallest and the largest factor of "auto".

    Raises:
        ValueError: the reference is hardly finer in plane, or covers too little of the low-resolution volume.
    """
    (shape, affine, name), (ref_shape, ref_affine, ref_name) = low_resolution, reference
    spacing, available = _spacing(affine), sampling_along(ref_affine, affine)
    same = [axis for axis in range(3) if math.isclose(spacing[axis], available[axis], rel_tol=0.01)]
    axis = same[0] if slice_axis == "auto" and len(same) == 1 else find_slice_axis(affine, slice_axis)
    in_plane = [a for a in range(3) if a != axis]
    notes = []
    if scale == "auto":
        pixel = available[in_plane].min()
        found = spacing[in_plane] / pixel
        if found.max() < MIN_FACTOR:
            raise ValueError(
                f"{name} has pixels of {spacing[in_plane[0]]:.3g} x {spacing[in_plane[1]]:.3g} mm, hardly coarser than "
                f"the {pixel:.3g} mm of {ref_name}: image must be the low-resolution volume and reference the sharp "
                "one; are they swapped? Name slice_axis if it is another, or scale if the scanner has interpolated"
            )
        limited = np.clip(found, *limits)
        factors = np.where(np.abs(limited - found) <= ABOUT, found, limited).tolist()
        if factors != found.tolist():
            ratios, kept = (" x ".join(f"{f:.3g}" for f in values) for values in (found, factors))
            notes.append(
                f"the reference is {ratios} times finer in plane, and networks are trained for {limits[0]:g} to "
                f"{limits[1]:g}: {kept} is used"
            )
    else:
        factors = _in_plane_factors(scale)

    covered = _covered(shape, np.linalg.inv(ref_affine) @ affine, ref_shape)
    share = float(covered.mean())
    if share < MIN_COMMON:
        raise ValueError(
            f"{ref_name} covers {share:.0%} of the field of view of {name}, expected at least {MIN_COMMON:.0%}: "
            "are they of the same patient, session and part of the body?"
        )
    ranges = [_well_covered(covered, a) for a in range(3)]
    first, end = ranges[axis]
    if end - first < shape[axis]:
        notes.append(f"{end - first} of {shape[axis]} slices are kept, from number {first + 1} on, which it covers")
    matrix, unit, common = list(shape), np.eye(4), []
    matrix[axis], unit[axis, 3] = end - first, first
    for a, factor in zip(in_plane, factors):
        matrix[a] = round(shape[a] * factor)
        ratio = shape[a] / matrix[a]
        unit[a, a], unit[a, 3] = ratio, (ratio - 1) / 2
        common += [round(edge / ratio) for edge in ranges[a]]
    if [common[1] - common[0], common[3] - common[2]] != [matrix[a] for a in in_plane]:
        notes.append(
            f"the result is {common[1] - common[0]} x {common[3] - common[2]} of {matrix[in_plane[0]]} x "
            f"{matrix[in_plane[1]]} pixels, which it covers"
        )
    grid = affine @ unit
    coarse = [a for a in in_plane if available[a] > THICK_SLICES * _spacing(grid)[a]]
    if coarse:
        worst = available[coarse].max()
        notes.append(
            f"in plane, its voxels are up to {worst:.3g} mm apart: it is interpolated, and adds no detail there"
        )
    if available[axis] > max(THICK_SLICES * available[in_plane].min(), spacing[axis] / 2):
        notes.append(f"its slices are {available[axis]:.3g} mm apart: those between are interpolated, and blurred")
    return CommonGrid(axis, (first, end), tuple(matrix), grid, tuple(common), notes)


def _covered(shape: Sequence[int], voxels: np.ndarray, other: Sequence[int]) -> np.ndarray:
    """Which voxels ``(X, Y, Z)`` have their centre in another matrix, to whose indices ``voxels`` takes theirs."""
    indices = np.ogrid[tuple(slice(n) for n in shape)]
    inside = np.ones(shape, dtype=bool)
    for row, size in zip(voxels, other):
        place = sum(step * index for step, index in zip(row, indices)) + row[3]
        inside &= (place > -0.5 - SAME_GRID_TOLERANCE) & (place < size - 0.5 + SAME_GRID_TOLERANCE)
    return inside


def _well_covered(covered: np.ndarray, axis: int) -> tuple[int, int]:
    """From where to where along an axis at least half as much is covered as where it is most."""
    shares = covered.mean(axis=tuple(a for a in range(3) if a != axis))
    kept = np.flatnonzero(shares >= shares.max() / 2)
    return int(kept[0]), int(kept[-1]) + 1


def _box(corners: np.ndarray) -> str:
    return " x ".join(f"[{a:.0f}, {b:.0f}]" for a, b in zip(corners.min(0), corners.max(0)))


class Display(NamedTuple):
    """How slices ``(X, Y)`` become rows and columns: see :func:`find_display`."""

    transpose: bool
    flip_rows: bool
    flip_columns: bool
    right: str
    top: str

    def rows(self, image: np.ndarray) -> np.ndarray:
        """Rows and columns of a slice ``(X, Y)``."""
        rows = image.T if self.transpose else image
        return rows[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]


def find_display(affine: np.ndarray) -> Display:
    """Radiological convention: the front or the head up, the patient's left or back on the right of the screen.

    Args:
        affine: 4x4 voxel-to-world matrix of a volume whose slices are last.
    """
    pairs = ("LR", "AP", "IS")
    codes = nib.aff2axcodes(affine)[:2]
    across, up = sorted(codes, key=lambda code: next(i for i, pair in enumerate(pairs) if code in pair))
    return Display(
        transpose=across == codes[0],
        flip_rows=up in "AS",
        flip_columns=across in "RA",
        right="L" if across in "LR" else "P",
        top="A" if up in "AP" else "S",
    )
