"""Registration of two contrasts of one subject, rigid or affine, by SimpleITK; what is kept of it, and a picture.

World coordinates are those of our affines, RAS in mm; SimpleITK's, LPS, are used inside this file only.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from PIL import Image, ImageDraw
from torch.nn import functional as F

from glmamba_monai.files import write_atomically, write_json
from glmamba_monai.transforms.grid import sampling_along

PathLike = str | os.PathLike[str]

# Smoothing in mm, first step and last step in mm of each level of the search, and the points at which it looks.
LEVELS = ((4.0, 2.0, 0.05, 20_000), (2.0, 1.0, 0.02, 40_000), (1.0, 0.25, 0.005, 80_000))
METRIC_POINTS = 200_000
BINS = 32
SEED = 1
# Skull stripping cuts all contrasts of a subject along one border, wherever their anatomy lies: it must not be seen.
BORDER = 4.0  # mm
MIN_INTERIOR = 0.2  # of the mask; where less is left without its border, the border is kept
MASK_SPACING = 2.0  # mm
SAME_PLACE = 0.1  # voxels; see SAME_GRID_TOLERANCE of transforms/grid.py
MIN_GAIN = 0.01  # of the metric before
# Moved on by so many mm, two contrasts of one brain keep 41 to 61 % of their mutual information, those of two brains 84
# to 97 % (four patients), but those of two on one atlas 58 to 59 % after a turn of 10 to 12 degrees (openms_mni); its
# value alone does not tell them apart. With whole heads it is 18 to 20 % and 57 to 59 %.
BEYOND = 4.0
MAX_BEYOND = 0.7
MAX_DEGREES = 20.0
DOUBTFUL_DEGREES = 5.0  # see Registration.doubtful
MAX_MOVE = 30.0  # mm
MAX_ITERATIONS = 200  # of a level
RELAXATION = 0.7  # of the step where the slope turns: 0.5 leaves turns of 10 degrees half a millimetre off
STARTS = ("identity", "centre")
MAX_STRETCH = 0.1  # of an affine move, along any direction: gradient errors of a scanner are below
OVERLAY_PIXEL = 0.5  # mm
EDGE_COLOUR = (255, 70, 60)
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Registration:
    """What :func:`register` has found.

    Attributes:
        matrix: ``(4, 4)``, world to world in mm (RAS): where the moving volume's points belong; the identity unless
            ``used``.
        before: mutual information of the two volumes as they lie, in nats.
        after: the same, at the same points, with what was found.
        move: how far that moves the points of the head, median in mm.
        degrees: by how much it turns them.
        used: whether to move at all.
        reason: why, or why not.
        failed: it is not used although the two do not, or cannot be seen to, lie on each other.
        kind: "rigid" or "affine".
    """

    matrix: np.ndarray
    before: float
    after: float
    move: float
    degrees: float
    used: bool
    reason: str
    failed: bool
    kind: str = "rigid"

    @property
    def doubtful(self) -> bool:
        """Whether a head seldom moves so far between two scans of one session."""
        return self.used and self.degrees > DOUBTFUL_DEGREES


def register(
    moving: MetaTensor,
    fixed: MetaTensor,
    moving_mask: torch.Tensor | None = None,
    fixed_mask: torch.Tensor | None = None,
    start: str = "identity",
    affine: bool = False,
) -> Registration:
    """Find the move that brings one volume onto another of the same head, of any contrast and on any grid.

    Mattes mutual information at random points, from smooth to sharp. One thread and a fixed seed: the same volumes
    give the same move.

    Args:
        moving: volume ``(1, X, Y, Z)`` to move.
        fixed: volume ``(1, X', Y', Z')`` that stays.
        moving_mask: where the head is in ``moving``, same shape; None for everywhere.
        fixed_mask: where the head is in ``fixed``, same shape; None for everywhere.
        start: "identity" trusts the headers; "centre" starts with the centres of mass on each other.
        affine: try an affine move after the rigid one. It is taken where it raises the mutual information by as much
            again as a move must to be used at all.

    Raises:
        ValueError: a volume is not ``(1, X, Y, Z)``, a mask has another shape than its volume or is empty, or
            ``start`` is none of these.
    """
    if start not in STARTS:
        raise ValueError(f"start must be one of {', '.join(STARTS)}, got {start!r}")
    still, still_masks = _to_sitk(fixed, "fixed"), _masks(fixed, fixed_mask, "fixed_mask")
    other, other_masks = _to_sitk(moving, "moving"), _masks(moving, moving_mask, "moving_mask")
    points = _points(still_masks[0] if fixed_mask is not None else still)

    transform = sitk.Euler3DTransform()  # takes points of the fixed volume to where they are in the moving one
    transform.SetCenter(points.mean(axis=0).tolist())
    if start == "centre":
        moments = sitk.CenteredTransformInitializerFilter.MOMENTS
        transform = sitk.Euler3DTransform(sitk.CenteredTransformInitializer(still, other, transform, moments))
    images, masks = (still, other), (still_masks, other_masks)
    try:
        smooth = _search(transform, images, masks, 0)
    except RuntimeError as error:  # too few points of one lie in the other
        reason = " ".join(str(error).split())[-200:]
        return Registration(np.eye(4), 0.0, 0.0, 0.0, 0.0, False, f"the search ended: {reason}", True)
    compared = _mutual_information(still, still_masks[1], None, METRIC_POINTS)
    before, after = (_value(compared, t, smooth) for t in (sitk.Euler3DTransform(), transform))
    kind = "rigid"
    if affine:
        with contextlib.suppress(RuntimeError):  # it has left the volume: the rigid move stays
            wider = sitk.AffineTransform(transform.GetMatrix(), transform.GetTranslation(), transform.GetCenter())
            _search(wider, images, masks, 1)
            stretch = np.abs(np.linalg.svd(_matrix(wider)[:3, :3], compute_uv=False) - 1).max()
            value = _value(compared, wider, smooth)
            if stretch <= MAX_STRETCH and value >= (1 + MIN_GAIN) * after:
                transform, after, kind = wider, value, "affine"
    matrix = _matrix(transform)
    moved = np.linalg.norm(points - np.array([transform.TransformPoint(p) for p in points.tolist()]), axis=1)
    left, _, right = np.linalg.svd(matrix[:3, :3])
    degrees = float(np.rad2deg(np.arccos(np.clip((np.trace(left @ right) - 1) / 2, -1, 1))))
    voxel = float(min(fixed.pixdim.min(), moving.pixdim.min()))
    beyond = float(np.mean([_value(compared, t, smooth) for t in _moved_on(transform, BEYOND)]))
    used, failed, reason = _judged(before, after, beyond, moved, degrees, voxel)
    return Registration(
        matrix if used else np.eye(4), before, after, float(np.median(moved)), degrees, used, reason, failed, kind
    )


def _search(
    transform: sitk.Transform,
    images: tuple[sitk.Image, sitk.Image],
    masks: tuple[list[sitk.Image | None], list[sitk.Image | None]],
    first: int,
) -> tuple[sitk.Image, sitk.Image]:
    """Improve a transform in place, from the ``first`` of :data:`LEVELS` on; the images of the last level."""
    for level, (sigma, first_step, last_step, count) in list(enumerate(LEVELS))[first:]:
        smooth = _smoothed(images[0], sigma), _smoothed(images[1], sigma)
        method = _mutual_information(images[0], *(mask[level > 0] for mask in masks), count)
        method.SetOptimizerAsRegularStepGradientDescent(first_step, last_step, MAX_ITERATIONS, RELAXATION)
        method.SetOptimizerScalesFromPhysicalShift()
        method.SetInitialTransform(transform, inPlace=True)
        method.Execute(*smooth)
    return smooth


def _judged(
    before: float, after: float, beyond: float, moved: np.ndarray, degrees: float, voxel: float
) -> tuple[bool, bool, str]:
    """Whether to use a move, whether it is a failure, and why."""
    if beyond > MAX_BEYOND * after:
        reason = f"their mutual information, {after:.3f}, is hardly lower {BEYOND:g} mm further on ({beyond:.3f})"
        return False, True, f"they do not look like one head: {reason}"
    if degrees > MAX_DEGREES or moved.max() > MAX_MOVE:
        return False, True, f"a move by up to {moved.max():.1f} mm and {degrees:.1f} degrees is not plausible"
    if np.median(moved) < SAME_PLACE * voxel:
        return False, False, "they lie on each other"
    if after < (1 + MIN_GAIN) * before:
        return False, False, f"no move is better (mutual information {before:.3f} before, {after:.3f} after)"
    return True, False, "it brings them onto each other"


def apply(moving: MetaTensor, matrix: np.ndarray, like: MetaTensor | None = None) -> MetaTensor:
    """Move a volume in the world and sample it on a grid, by cubic B-splines; linearly, if it has two slices only.

    Args:
        moving: volume ``(1, X, Y, Z)``.
        matrix: ``(4, 4)``, world to world in mm (RAS), such as :attr:`Registration.matrix`.
        like: volume whose grid the result has; None for that of ``moving``.

    Returns:
        ``(1, X, Y, Z)`` with the type and meta of ``moving``. It is zero outside the field of view of ``moving``, and
        nowhere below zero if ``moving`` is not: splines overshoot at sharp edges.
    """
    like = moving if like is None else like
    image, size = _to_sitk(moving, "moving"), list(like.shape[1:])
    # On an axis of two ITK's splines read before the beginning of their coefficients.
    sampling = sitk.sitkLinear if 2 in image.GetSize() else sitk.sitkBSpline
    resampled = sitk.Resample(image, size, _transform(matrix), sampling, *_place(like), 0.0)
    values = torch.from_numpy(sitk.GetArrayFromImage(resampled).T.copy())[None]
    if moving.min() >= 0:
        values = values.clamp(min=0)
    if not moving.is_floating_point():
        values = values.round()
    result = MetaTensor(values.to(moving.device, moving.dtype), meta=dict(moving.meta))
    result.affine = like.affine.clone()
    return result


def average(moving: MetaTensor, matrix: np.ndarray, like: MetaTensor) -> MetaTensor:
    """Like :func:`apply`, with each voxel of a coarser grid the mean over its extent, as a thick slice shows it.

    Args:
        moving: volume ``(1, X, Y, Z)``.
        matrix: ``(4, 4)``, world to world in mm (RAS).
        like: volume whose grid the result has; its values are not read.
    """
    affine = like.affine.cpu().numpy()
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    parts = np.maximum(1, np.rint(spacing / sampling_along(matrix @ moving.affine.cpu().numpy(), affine))).astype(int)
    finer = torch.as_tensor(affine @ np.block([[np.diag(1 / parts), (1 / parts[:, None] - 1) / 2], [np.eye(4)[3:]]]))
    shape = [int(n * k) for n, k in zip(like.shape[1:], parts)]
    fine = apply(moving, matrix, MetaTensor(torch.empty(()).expand(1, *shape), affine=finer))
    result = MetaTensor(F.avg_pool3d(fine.as_tensor(), parts.tolist()), meta=dict(moving.meta))
    result.affine = like.affine.clone()
    return result


def _place(volume: MetaTensor) -> tuple[list[float], list[float], list[float]]:
    """Origin, spacing and direction of SimpleITK."""
    affine = _LPS @ volume.affine.cpu().numpy().astype(np.float64)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    return affine[:3, 3].tolist(), spacing.tolist(), (affine[:3, :3] / spacing).ravel().tolist()


def _transform(matrix: np.ndarray) -> sitk.AffineTransform:
    """From the points of the fixed volume to those of the moving one (LPS), as ITK's tools take it."""
    inverse = _LPS @ np.linalg.inv(matrix) @ _LPS
    return sitk.AffineTransform(inverse[:3, :3].ravel().tolist(), inverse[:3, 3].tolist())


def _to_sitk(volume: MetaTensor, name: str) -> sitk.Image:
    """``(1, X, Y, Z)`` as a SimpleITK image of float32 at the same place."""
    if volume.dim() != 4 or volume.shape[0] != 1:
        raise ValueError(f"{name}: expected one 3-D volume (1, X, Y, Z), found the shape {tuple(volume.shape)}")
    image = sitk.GetImageFromArray(volume[0].as_tensor().cpu().numpy().astype(np.float32).T)
    for put, value in zip((image.SetOrigin, image.SetSpacing, image.SetDirection), _place(volume)):
        put(value)
    return image


def _masks(volume: MetaTensor, mask: torch.Tensor | None, name: str) -> list[sitk.Image | None]:
    """The mask without its holes, coarser, and what of it lies away from its border."""
    if mask is None:
        return [None, None]
    if mask.shape != volume.shape or not bool(mask.any()):
        raise ValueError(
            f"{name}: expected some true voxels and the shape {tuple(volume.shape)}, found {int(mask.sum())} and "
            f"{tuple(mask.shape)}"
        )
    values = torch.from_numpy(mask.cpu().numpy().astype(np.float32))  # a plain tensor: the mask may have meta
    image = _to_sitk(MetaTensor(values, affine=volume.affine), name)
    image = sitk.Shrink(image, [max(1, round(MASK_SPACING / s)) for s in image.GetSpacing()])
    image = sitk.BinaryFillhole(sitk.Cast(image > 0.5, sitk.sitkUInt8))
    depth = sitk.SignedMaurerDistanceMap(image, insideIsPositive=True, squaredDistance=False, useImageSpacing=True)
    interior = depth > BORDER
    enough = sitk.GetArrayViewFromImage(interior).sum() >= MIN_INTERIOR * sitk.GetArrayViewFromImage(image).sum()
    return [depth > -BORDER, interior if enough else image]


def _points(image: sitk.Image) -> np.ndarray:
    """World coordinates ``(N, 3)``, LPS, of some thousand positive voxels."""
    indices = np.argwhere(sitk.GetArrayViewFromImage(image) > 0)[:, ::-1]
    indices = indices[:: max(1, len(indices) // 2000)]
    return np.array([image.TransformIndexToPhysicalPoint(i) for i in indices.tolist()])


def _smoothed(image: sitk.Image, sigma: float) -> sitk.Image:
    """Smoothed by ``sigma`` mm along each axis that is sampled finely enough to need it."""
    for axis, spacing in enumerate(image.GetSpacing()):
        if sigma > spacing / 2:
            image = sitk.RecursiveGaussian(image, sigma, direction=axis)
    return image


def _mutual_information(
    still: sitk.Image, still_mask: sitk.Image | None, other_mask: sitk.Image | None, count: int
) -> sitk.ImageRegistrationMethod:
    """Mutual information at about ``count`` points. They lie off the voxels' centres, where interpolation does not
    blur, so that it would be a move by whole voxels that looks best."""
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(BINS)
    method.SetMetricSamplingStrategy(method.RANDOM)
    share = 1.0
    if still_mask is not None:
        method.SetMetricFixedMask(still_mask)
        share = float(sitk.GetArrayViewFromImage(still_mask).mean())
    if other_mask is not None:
        method.SetMetricMovingMask(other_mask)
    method.SetMetricSamplingPercentage(min(1.0, count / (share * still.GetNumberOfPixels())), SEED)
    method.SetMetricUseFixedImageGradientFilter(False)
    method.SetMetricUseMovingImageGradientFilter(False)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetNumberOfWorkUnits(1)  # several add up in an order that changes
    return method


def _value(method: sitk.ImageRegistrationMethod, transform: sitk.Transform, images: tuple[sitk.Image, ...]) -> float:
    """The mutual information; 0 where the transform takes all points out of the other volume, such as a thin slab."""
    method.SetInitialTransform(transform)
    try:
        return -method.MetricEvaluate(*images)
    except RuntimeError:
        return 0.0


def _moved_on(transform: sitk.Transform, distance: float) -> list[sitk.Transform]:
    """The transform, and then ``distance`` mm further in each of the six directions."""
    shifts = distance * np.concatenate([np.eye(3), -np.eye(3)])
    moved = [type(transform)(transform) for _ in shifts]
    for each, shift in zip(moved, shifts):
        each.SetTranslation((np.array(transform.GetTranslation()) + shift).tolist())
    return moved


def _matrix(transform: sitk.Transform) -> np.ndarray:
    """Where points of the moving volume belong (RAS), of a linear transform that takes the fixed ones there (LPS)."""
    matrix = np.eye(4)
    matrix[:3, 3] = transform.TransformPoint((0.0, 0.0, 0.0))
    matrix[:3, :3] = np.transpose([transform.TransformPoint(axis) for axis in np.eye(3).tolist()]) - matrix[:3, 3:]
    return np.linalg.inv(_LPS @ matrix @ _LPS)


def write_record(prefix: PathLike, found: Registration, moving: MetaTensor, fixed: MetaTensor) -> Path:
    """Keep what has been found: ``PREFIX.json``, and where it is used ``PREFIX.tfm`` and ``PREFIX.png``.

    The transform is ITK's, from the points of the fixed volume to those of the moving one (LPS), which is what
    ``antsApplyTransforms``, 3D Slicer and :func:`read_transform` take. The picture is :func:`draw_overlay`'s.

    Args:
        prefix: folder and beginning of the names.
        found: of :func:`register`.
        moving: volume ``(1, X, Y, Z)`` as it lay.
        fixed: volume ``(1, X', Y', Z')`` that stayed.

    Returns:
        The JSON file.

    Raises:
        OSError: a file cannot be written.
    """
    files = {name: Path(f"{prefix}.{suffix}") for name, suffix in (("transform", "tfm"), ("overlay", "png"))}
    facts: dict[str, Any] = asdict(found)
    del facts["matrix"]
    for role, volume in (("moving", moving), ("fixed", fixed)):
        facts[role] = Path(volume.meta.get("filename_or_obj", role)).name
    facts |= {name: file.name if found.used else None for name, file in files.items()}
    if found.used:
        write_atomically(files["transform"], lambda p: sitk.WriteTransform(_transform(found.matrix), str(p)))
        picture = draw_overlay(moving, fixed, found.matrix)
        write_atomically(files["overlay"], lambda p: picture.save(p, optimize=True))
    return write_json(f"{prefix}.json", facts)


def read_transform(path: PathLike) -> np.ndarray:
    """The world matrix ``(4, 4)``, RAS in mm, of a linear transform in a file of ITK, such as ``PREFIX.tfm``.

    It is the inverse of what the file holds: where the reference's points belong, as :class:`Registration` has it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no linear transform.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"transform {path}: there is no such file")
    try:
        transform = sitk.ReadTransform(str(path))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"transform {path}: cannot be read as a transform of ITK ({reason})") from error
    if not transform.IsLinear():
        raise ValueError(f"transform {path}: found {transform.GetName()}, expected a rigid or affine transform")
    return _matrix(transform)


def draw_overlay(moving: MetaTensor, fixed: MetaTensor, matrix: np.ndarray) -> Image.Image:
    """The fixed volume with the edges of the moving one in red, before (above) and after (below) it is moved.

    Three planes through the middle of the head, axial, coronal and sagittal in world axes; the patient's left, in
    the sagittal plane the back, is on the right.

    Args:
        moving: volume ``(1, X, Y, Z)`` as it lies.
        fixed: volume ``(1, X', Y', Z')``.
        matrix: ``(4, 4)``, world to world in mm (RAS).
    """
    still, other = _smoothed(_to_sitk(fixed, "fixed"), 0.5), _smoothed(_to_sitk(moving, "moving"), 1.0)
    points = _points(sitk.OtsuThreshold(still, 0, 1))
    low, high = points.min(axis=0) - 10, points.max(axis=0) + 10
    middle = (low + high) / 2
    black, white = np.percentile(sitk.GetArrayViewFromImage(still), (0.5, 99.5))
    rows = []
    for transform in (sitk.AffineTransform(3), _transform(matrix)):
        row = []
        for across, up in ((0, 1), (0, 2), (1, 2)):  # towards the left or the back; from the head or the front (LPS)
            down = 1.0 if up == 1 else -1.0
            plane = _plane(still, sitk.AffineTransform(3), middle, low, high, across, up, down)
            edges = _edges(_plane(other, transform, middle, low, high, across, up, down))
            gray = np.clip((plane - black) / max(white - black, 1e-6) * 255, 0, 255).astype(np.uint8)
            row.append(np.where(edges[..., None], np.uint8(EDGE_COLOUR), gray[..., None]))
        height = max(image.shape[0] for image in row)
        row = [np.pad(image, ((0, height - image.shape[0]), (0, 6), (0, 0))) for image in row]
        rows.append(np.concatenate(row, axis=1))
    picture = Image.fromarray(np.concatenate([np.pad(row, ((18, 0), (0, 0), (0, 0))) for row in rows]))
    draw = ImageDraw.Draw(picture)
    for number, word in enumerate(("before", "after")):
        draw.text((6, 3 + number * rows[0].shape[0] + number * 18), word, fill=(255, 255, 255))
    return picture


def _plane(
    image: sitk.Image,
    transform: sitk.Transform,
    middle: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    across: int,
    up: int,
    down: float,
) -> np.ndarray:
    """Rows and columns ``(H, W)`` of a plane through ``middle``, from ``low`` to ``high`` (LPS)."""
    direction = np.zeros((3, 3))
    direction[across, 0], direction[up, 1] = 1, down
    direction[:, 2] = np.cross(direction[:, 0], direction[:, 1])
    origin = middle.copy()
    origin[across], origin[up] = low[across], low[up] if down > 0 else high[up]
    size = [max(1, round((high[a] - low[a]) / OVERLAY_PIXEL)) for a in (across, up)]
    place = (origin.tolist(), [OVERLAY_PIXEL] * 3, direction.ravel().tolist())
    return sitk.GetArrayFromImage(sitk.Resample(image, [*size, 1], transform, sitk.sitkLinear, *place, 0.0))[0]


def _edges(plane: np.ndarray) -> np.ndarray:
    """Thin edges of ``(H, W)``."""
    strongest = float(np.percentile(np.hypot(*np.gradient(plane)), 98))
    found = sitk.CannyEdgeDetection(sitk.GetImageFromArray(plane), strongest / 3, strongest, [2.0, 2.0])
    return sitk.GetArrayFromImage(found) > 0
