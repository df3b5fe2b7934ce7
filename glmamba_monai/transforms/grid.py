"""Where voxels lie: which grids agree, which axis is the slice axis, what the factor between two grids is.

A grid is ``(shape, affine, name)``: spatial shape, 4x4 voxel-to-world matrix in mm, and what to call it in errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import nibabel as nib
import numpy as np

Grid = tuple[Sequence[int], np.ndarray, str]

SAME_GRID_TOLERANCE = 0.1  # voxels at the corners; headers are rounded, and a tenth of a voxel is no misalignment
# Voxels of the reference at the corners. A tool that shrinks 2x and keeps the place of voxel 0 is 0.5 off: refused.
FIELD_OF_VIEW_TOLERANCE = 0.45
THICK_SLICES = 1.5  # spacing across slices over spacing in plane from which a stack counts as thick
PLANES = {"sagittal": "LR", "coronal": "AP", "axial": "IS"}  # the plane, and the direction across its slices


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
    if slice_axis not in PLANES:
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
        ValueError: they do not overlap, are rotated against each other, cover different fields of view, have other
            slices, or do not have the factor that was named.
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
        raise ValueError(
            f"{name} and {ref_name} do not cover the same field of view: their corners lie up to {apart:.2f} voxels of "
            f"the reference apart (allowed {FIELD_OF_VIEW_TOLERANCE}). Register and crop one to the other first"
        )
    ratios = np.asarray(ref_shape) / np.asarray(shape)
    if np.any(ratios < 1):
        raise ValueError(
            f"{name} has the matrix {tuple(shape)}, finer than {ref_name} with {tuple(ref_shape)}: "
            "image must be the low-resolution volume and reference the sharp one; are they swapped?"
        )
    unchanged = [axis for axis in range(3) if shape[axis] == ref_shape[axis]]
    axis = unchanged[0] if slice_axis == "auto" and len(unchanged) == 1 else find_slice_axis(ref_affine, slice_axis)
    if axis not in unchanged:
        raise ValueError(
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
    factors = [scale, scale] if isinstance(scale, (int, float)) else list(scale)
    if len(factors) != 2 or not all(isinstance(f, (int, float)) and f >= 1 for f in factors):
        raise ValueError(f"scale must be auto, a number >= 1 or one such number per in-plane axis, got {scale!r}")
    wanted = [low_resolution_size(ref_shape[a], f) for a, f in zip(in_plane, factors)]
    if wanted != [shape[a] for a in in_plane]:
        raise ValueError(
            f"scale {scale} does not fit: {ref_name} is {ref_shape[in_plane[0]]} x {ref_shape[in_plane[1]]} in plane, "
            f"so {name} should be {wanted[0]} x {wanted[1]}, but it is {shape[in_plane[0]]} x {shape[in_plane[1]]} "
            f"(factors {found[0]:.3g} and {found[1]:.3g}); leave scale at auto to take it from the files"
        )
    return axis


def _box(corners: np.ndarray) -> str:
    return " x ".join(f"[{a:.0f}, {b:.0f}]" for a, b in zip(corners.min(0), corners.max(0)))
