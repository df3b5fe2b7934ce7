"""Rigid registration of two contrasts of one subject, by SimpleITK.

World coordinates are those of our affines, RAS in mm; SimpleITK's, LPS, are used inside this file only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
import torch
from monai.data import MetaTensor

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
# to 97 % (four patients); its value alone does not tell them apart. With whole heads it is 18 to 20 % and 57 to 59 %.
BEYOND = 4.0
MAX_BEYOND = 0.7
MAX_DEGREES = 20.0
MAX_MOVE = 30.0  # mm
MAX_ITERATIONS = 200  # of a level
RELAXATION = 0.7  # of the step where the slope turns: 0.5 leaves turns of 10 degrees half a millimetre off
STARTS = ("identity", "centre")
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
    """

    matrix: np.ndarray
    before: float
    after: float
    move: float
    degrees: float
    used: bool
    reason: str
    failed: bool


def register(
    moving: MetaTensor,
    fixed: MetaTensor,
    moving_mask: torch.Tensor | None = None,
    fixed_mask: torch.Tensor | None = None,
    start: str = "identity",
) -> Registration:
    """Find the rigid move that brings one volume onto another of the same head, of any contrast and on any grid.

    Mattes mutual information at random points, from smooth to sharp. One thread and a fixed seed: the same volumes
    give the same move.

    Args:
        moving: volume ``(1, X, Y, Z)`` to move.
        fixed: volume ``(1, X', Y', Z')`` that stays.
        moving_mask: where the head is in ``moving``, same shape; None for everywhere.
        fixed_mask: where the head is in ``fixed``, same shape; None for everywhere.
        start: "identity" trusts the headers; "centre" starts with the centres of mass on each other.

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
    try:
        for level, (sigma, first_step, last_step, count) in enumerate(LEVELS):
            smooth = _smoothed(still, sigma), _smoothed(other, sigma)
            method = _mutual_information(still, still_masks[level > 0], other_masks[level > 0], count)
            method.SetOptimizerAsRegularStepGradientDescent(first_step, last_step, MAX_ITERATIONS, RELAXATION)
            method.SetOptimizerScalesFromPhysicalShift()
            method.SetInitialTransform(transform, inPlace=True)
            method.Execute(*smooth)
    except RuntimeError as error:  # too few points of one lie in the other
        reason = " ".join(str(error).split())[-200:]
        return Registration(np.eye(4), 0.0, 0.0, 0.0, 0.0, False, f"the search ended: {reason}", True)
    compared = _mutual_information(still, still_masks[1], None, METRIC_POINTS)
    before, after = (_value(compared, t, smooth) for t in (sitk.Euler3DTransform(), transform))
    matrix = _matrix(transform)
    moved = np.linalg.norm(points - np.array([transform.TransformPoint(p) for p in points.tolist()]), axis=1)
    degrees = float(np.rad2deg(np.arccos(np.clip((np.trace(matrix[:3, :3]) - 1) / 2, -1, 1))))
    voxel = float(min(fixed.pixdim.min(), moving.pixdim.min()))
    beyond = float(np.mean([_value(compared, t, smooth) for t in _moved_on(transform, BEYOND)]))
    used, failed, reason = _judged(before, after, beyond, moved, degrees, voxel)
    return Registration(
        matrix if used else np.eye(4), before, after, float(np.median(moved)), degrees, used, reason, failed
    )


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
    """Move a volume in the world and sample it on a grid, by cubic B-splines.

    Args:
        moving: volume ``(1, X, Y, Z)``.
        matrix: ``(4, 4)``, world to world in mm (RAS), such as :attr:`Registration.matrix`.
        like: volume whose grid the result has; None for that of ``moving``.

    Returns:
        ``(1, X, Y, Z)`` with the type and meta of ``moving``. It is zero outside the field of view of ``moving``, and
        nowhere below zero if ``moving`` is not: splines overshoot at sharp edges.
    """
    like = moving if like is None else like
    inverse = _LPS @ np.linalg.inv(matrix) @ _LPS
    transform = sitk.AffineTransform(inverse[:3, :3].ravel().tolist(), inverse[:3, 3].tolist())
    resampled = sitk.Resample(_to_sitk(moving, "moving"), _to_sitk(like, "like"), transform, sitk.sitkBSpline, 0.0)
    values = torch.from_numpy(sitk.GetArrayFromImage(resampled).T.copy())[None]
    if moving.min() >= 0:
        values = values.clamp(min=0)
    if not moving.is_floating_point():
        values = values.round()
    result = MetaTensor(values.to(moving.device, moving.dtype), meta=dict(moving.meta))
    result.affine = like.affine.clone()
    return result


def _to_sitk(volume: MetaTensor, name: str) -> sitk.Image:
    """``(1, X, Y, Z)`` as a SimpleITK image of float32 at the same place."""
    if volume.dim() != 4 or volume.shape[0] != 1:
        raise ValueError(f"{name}: expected one 3-D volume (1, X, Y, Z), found the shape {tuple(volume.shape)}")
    affine = _LPS @ volume.affine.cpu().numpy().astype(np.float64)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image = sitk.GetImageFromArray(volume[0].as_tensor().cpu().numpy().astype(np.float32).T)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
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
    method.SetInitialTransform(transform)
    return -method.MetricEvaluate(*images)


def _moved_on(transform: sitk.Euler3DTransform, distance: float) -> list[sitk.Euler3DTransform]:
    """The transform, and then ``distance`` mm further in each of the six directions."""
    shifts = distance * np.concatenate([np.eye(3), -np.eye(3)])
    moved = [sitk.Euler3DTransform(transform) for _ in shifts]
    for each, shift in zip(moved, shifts):
        each.SetTranslation((np.array(transform.GetTranslation()) + shift).tolist())
    return moved


def _matrix(transform: sitk.Euler3DTransform) -> np.ndarray:
    """Where points of the moving volume belong (RAS), of a transform that takes the fixed ones there (LPS)."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.reshape(transform.GetMatrix(), (3, 3))
    matrix[:3, 3] = transform.TransformPoint((0.0, 0.0, 0.0))
    return np.linalg.inv(_LPS @ matrix @ _LPS)
