"""Volumes on their way to the network and back: loaded and checked, slices last, and put back on their grid."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor, NibabelReader
from monai.transforms import EnsureChannelFirst, MapTransform, Orientation, Transform
from monai.transforms.io.array import switch_endianness
from monai.utils import ensure_tuple

from glmamba_monai.files import file_stem
from glmamba_monai.formats import file_format, read_volume
from glmamba_monai.transforms.augmentation import FACTORS
from glmamba_monai.transforms.grid import (
    OtherGridError,
    find_slice_axis,
    match_grids,
    matrix_factor,
    plan_common_grid,
    require_same_grid,
)

logger = logging.getLogger(__name__)

FOREGROUND_LEVEL = 0.05  # of the volume's 99.9th percentile: above the noise of a head scan, below its tissue
MIN_FOREGROUND = 0.05  # of a slice (docs/data.md, metrics)
CLEARLY_NEGATIVE, MANY = 0.05, 0.05  # of the volume's maximum; share of its voxels
SLICE_AXIS_KEY = "slice_axis"
KEPT_SLICES_KEY = "kept_slices"  # of the whole volume: which of its slices were selected
COMMON_KEY = "common_rows"  # what a reference on another grid covers in plane: where the result is cut
REGISTER = (False, True, "affine", "auto")
# With "auto": a smaller move is no misalignment that a header check should mend, and a smaller volume no head.
CLEAR_MOVE = 1.0  # mm
SMALLEST_HEAD = 50.0  # mm, the shortest side of the field of view
FACTOR_KEY = "factor"  # of a deployment pair, (2,): the reference's matrix in plane over that of the stack
INTERPOLATED_KEY = "interpolated"  # true of a pair in one file: the target has the reference's matrix


def _name(image: torch.Tensor, fallback: str) -> str:
    """The file a volume came from, for messages."""
    return str(image.meta.get("filename_or_obj", fallback)) if isinstance(image, MetaTensor) else fallback


def _grid(image: MetaTensor, fallback: str) -> tuple[Sequence[int], np.ndarray, str]:
    return image.shape[1:], image.affine.cpu().numpy(), _name(image, fallback)


def record_prefix(record: str, item: Mapping[Hashable, Any]) -> str:
    """Where to keep the registration of an item: ``{subject}`` in ``record`` is the item's."""
    return record.replace("{subject}", file_stem(item.get("subject", "pair")))


def require_volume(image: torch.Tensor, name: str) -> None:
    """Make sure that ``(1, X, Y, Z)`` holds a usable volume.

    Raises:
        ValueError: it has other dimensions, NaN or infinite voxels, only zeros, or so many voxels below 0 that it is no
            magnitude image.
    """
    if image.dim() != 4 or image.shape[0] != 1:
        raise ValueError(
            f"{name}: expected one 3-D volume, found the shape {tuple(image.shape)} (channels first); "
            "extract a single volume from it"
        )
    bad = int((~torch.isfinite(image)).sum())
    if bad:
        raise ValueError(
            f"{name}: {bad} of {image.numel()} voxels are NaN or infinite; repair or mask the file before using it"
        )
    if not bool((image != 0).any()):
        raise ValueError(f"{name}: every voxel is zero; the file was exported or masked wrongly")
    # Resampling and data consistency undershoot at edges; a simulation would fold what was shifted to a mean of 0.
    below = (image < -CLEARLY_NEGATIVE * image.max()).float().mean().item()
    if below > MANY:
        raise ValueError(
            f"{name}: {below:.0%} of the voxels are clearly below 0; expected a magnitude image, without "
            "normalisation to a mean of 0 (z-score)"
        )


def require_affine(affine: np.ndarray, name: str) -> None:
    """Make sure that an affine says where the voxels lie.

    Raises:
        ValueError: it has NaN or infinite values, or no volume.
    """
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise ValueError(
            f"{name}: the affine in its header is {np.round(affine[:3], 3).tolist()}; expected finite numbers and "
            "three directions: repair the header (sform and qform)"
        )


class LoadVolume(Transform):
    """Load one volume as ``(1, X, Y, Z)`` float32, and refuse what is not a usable volume.

    It is a NIfTI, NRRD or MetaImage file or the folder of one DICOM series (docs/data.md, formats). A tensor or array
    ``(1, X, Y, Z)`` is passed through the same checks.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another format, cannot be read (truncated, say), holds complex numbers or colours, or is
            refused by :func:`require_volume` or :func:`require_affine`.
    """

    def __init__(self) -> None:
        # MONAI's LoadImage hides nibabel's reason, and warns about its DICOM readers where pydicom is installed.
        self.reader = NibabelReader()
        self.channel_first = EnsureChannelFirst()

    def __call__(self, source: Any) -> MetaTensor:
        if isinstance(source, (torch.Tensor, np.ndarray)):
            image = source if isinstance(source, MetaTensor) else MetaTensor(torch.as_tensor(source))
            image = image.to(torch.float32)
        elif file_format(source) != "NIfTI":
            image = read_volume(source)
        else:
            try:
                path = Path(source).expanduser()
                affine = nib.load(path).affine  # MONAI's reader puts the identity in the place of one with NaN
                array, meta = self.reader.get_data(self.reader.read(path))
            except Exception as error:  # whatever nibabel, gzip or zlib happen to raise on a damaged file
                reason = " ".join(str(error).split())
                raise ValueError(
                    f"{source}: cannot be read as NIfTI ({reason}); the file is damaged or truncated: copy it again"
                ) from error
            if array.dtype.kind not in "fiub":
                found = "complex numbers" if array.dtype.kind == "c" else f"{array.dtype}, such as colours"
                raise ValueError(f"{source}: holds {found}, expected one real number a voxel, the magnitude")
            require_affine(affine, str(source))
            meta = {**switch_endianness(meta, "<"), "filename_or_obj": str(path)}
            with np.errstate(over="ignore"):  # what is beyond float32 becomes infinite, which is refused below
                image = MetaTensor.ensure_torch_and_prune_meta(array.astype(np.float32), meta)
            image = self.channel_first(image, meta_dict=meta)
        require_volume(image, _name(image, "image"))
        return image


class LoadVolumed(MapTransform):
    """Dictionary form of :class:`LoadVolume`."""

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.load = LoadVolume()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.load(d[key])
        return d


def slices_last(image: MetaTensor, axis: int) -> MetaTensor:
    """Move spatial axis ``axis`` of ``(C, X, Y, Z)`` to the end; the affine follows, so no voxel moves in the world."""
    return _permute(image, [a for a in range(3) if a != axis] + [axis])


def slices_back(image: MetaTensor, axis: int) -> MetaTensor:
    """Undo :func:`slices_last`."""
    order = [0, 1]
    order.insert(axis, 2)
    return _permute(image, order)


def _permute(image: MetaTensor, order: list[int]) -> MetaTensor:
    affine = image.affine.clone()
    affine[:, :3] = affine[:, order]
    moved = image.as_tensor().permute(0, *(a + 1 for a in order)).contiguous()
    result = MetaTensor(moved, meta=image.meta)
    result.affine = affine
    return result


class PairOnGridd(MapTransform):
    """Training pairs: make sure that target and reference lie on one grid, and bring their slices last.

    Args:
        keys: the volumes, all of one subject.
        slice_axis: see :func:`~glmamba_monai.transforms.grid.find_slice_axis`.

    Raises:
        ValueError: the volumes lie on different grids.
    """

    def __init__(self, keys: KeysCollection, slice_axis: str | int = "auto") -> None:
        super().__init__(keys)
        self.slice_axis = slice_axis

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        first, *others = self.keys
        for other in others:
            require_same_grid(_grid(d[first], str(first)), _grid(d[other], str(other)))
        axis = find_slice_axis(d[first].affine.cpu().numpy(), self.slice_axis)
        for key in self.keys:
            d[key] = slices_last(d[key], axis)
        d[SLICE_AXIS_KEY] = axis
        return d


def find_move(
    moving: MetaTensor, fixed: MetaTensor, mode: bool | str, names: tuple[str, str], tell: bool = False
) -> Any:
    """Register one volume to another and say in the log what was found, as a warning where the user must know.

    Args:
        moving: volume ``(1, X, Y, Z)`` to move.
        fixed: volume ``(1, X', Y', Z')`` that stays.
        mode: False does not look; True, rigidly; "affine", affinely where that is better still; "auto" looks, and uses
            a rigid move of 1 mm or more only.
        names: what to call the two.
        tell: the user must know in any case.

    Returns:
        A :class:`~glmamba_monai.registration.Registration`, or None where nothing was looked for.

    Raises:
        ValueError: ``mode`` is none of these.
    """
    from glmamba_monai import registration

    if mode not in REGISTER:
        raise ValueError(f"register must be one of {', '.join(map(str, REGISTER))}, got {mode!r}")
    asked = mode != "auto"
    sides = np.array(fixed.shape[1:]) * np.linalg.norm(fixed.affine[:3, :3].cpu().numpy(), axis=0)
    if not mode or (not asked and sides.min() < SMALLEST_HEAD):
        return None
    found = registration.register(moving, fixed, foreground(moving), foreground(fixed), affine=mode == "affine")
    if not asked and found.used and found.move < CLEAR_MOVE:
        reason = f"they lie {found.move:.2f} mm apart, which --register True would mend"
        found = dataclasses.replace(found, matrix=np.eye(4), used=False, reason=reason)
    warned = tell or found.failed or found.doubtful or (found.used and not asked)
    level = logging.WARNING if warned else logging.INFO
    pair = f"{names[0]} onto {names[1]}"
    if found.used:
        moved = f"moved by {found.move:.2f} mm and {found.degrees:.2f} degrees ({found.kind})"
        gain = f"mutual information {found.after:.3f}, was {found.before:.3f}"
        doubt = "; that is far for one session: are both of one patient?" if found.doubtful else ""
        logger.log(level, "registered %s: %s, %s%s", pair, moved, gain, doubt)
    else:
        logger.log(level, "not registered %s: %s; it stays where it is", pair, found.reason)
    return found


class RegisterReferenced(MapTransform):
    """Move volumes onto the first one, where that shows the two to lie on each other better.

    See :mod:`glmamba_monai.registration`. A volume keeps its grid; what has been found is logged, as a warning where
    nothing fits.

    Args:
        keys: the volume that stays, of any resolution, then those to move onto it.
        record: of one volume to move; see :class:`MatchReferenced`.
    """

    def __init__(self, keys: KeysCollection, record: str | None = None) -> None:
        super().__init__(keys)
        self.record = record

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        from glmamba_monai import registration

        d = dict(data)
        first, *others = self.keys
        for other in others:
            found = find_move(d[other], d[first], True, (_name(d[other], str(other)), _name(d[first], str(first))))
            if self.record is not None:
                registration.write_record(record_prefix(self.record, d), found, d[other], d[first])
            if found.used:
                d[other] = registration.apply(d[other], found.matrix)
        return d


class MatchReferenced(MapTransform):
    """Deployment pairs: bring a low-resolution stack and a reference onto grids that fit, and both their slices last.

    A reference over the same field of view with the same slices keeps its grid, and the stack takes its axis order.
    Any other is brought onto a grid with the slices of the stack
    (:func:`~glmamba_monai.transforms.grid.plan_common_grid`), each voxel the mean of the reference over its extent, and
    a warning says what was done. Then ``common_rows`` holds what it covers in plane, for :class:`SlicesBackd`.

    ``factor (2,)`` of the item says how many times finer the reference is in plane, which chooses the weights
    (:class:`~glmamba_monai.engines.WeightsLoader`); 1 of a stack that the scanner has interpolated.

    Args:
        keys: the low-resolution volume, then the reference.
        scale: see :func:`~glmamba_monai.transforms.grid.match_grids`.
        slice_axis: see :func:`~glmamba_monai.transforms.grid.match_grids`.
        register: see :func:`find_move`.
        record: where to keep what a registration has found, by
            :func:`~glmamba_monai.registration.write_record`: folder and beginning of the names, in which ``{subject}``
            is the item's; None to keep nothing.

    Raises:
        ValueError: the two do not fit; see the functions of :mod:`glmamba_monai.transforms.grid`.
    """

    def __init__(
        self,
        keys: KeysCollection,
        scale: str | float | Sequence[float] = "auto",
        slice_axis: str | int = "auto",
        register: bool | str = False,
        record: str | None = None,
    ) -> None:
        super().__init__(keys)
        self.scale = scale
        self.slice_axis = slice_axis
        self.register = register
        self.record = record

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        from glmamba_monai import registration

        d = dict(data)
        image_key, reference_key = self.keys
        image, reference = d[image_key], d[reference_key]
        name, reference_name = _name(image, str(image_key)), _name(reference, str(reference_key))
        axis_codes = "".join(nib.aff2axcodes(reference.affine.cpu().numpy()))
        turned = Orientation(axcodes=axis_codes, labels=None)(image)
        grid = turned.shape[1:], turned.affine.cpu().numpy(), name
        scale = 1 if self.scale == "auto" and d.get(INTERPOLATED_KEY) else self.scale
        try:
            axis = match_grids(grid, _grid(reference, reference_name), scale, self.slice_axis)
            image, reference = slices_last(turned, axis), slices_last(reference, axis)
        except OtherGridError:
            axis = None
        found = find_move(reference, image, self.register, (reference_name, name), tell=self.register != "auto")
        if found is not None and self.record is not None:
            registration.write_record(record_prefix(self.record, d), found, reference, image)
        matrix = np.eye(4) if found is None else found.matrix
        if axis is None:
            # Moved in the world before it is sampled, once.
            moved = reference.shape[1:], matrix @ reference.affine.cpu().numpy(), reference_name
            plan = plan_common_grid(
                _grid(image, name), moved, self.scale, self.slice_axis, (min(FACTORS), max(FACTORS))
            )
            axis = plan.slice_axis
            like = MetaTensor(torch.empty(()).expand(1, *plan.shape), affine=torch.from_numpy(plan.affine))
            reference = slices_last(registration.average(reference, matrix, like), axis)
            image = cut(slices_last(image, axis), 2, plan.slices)
            d[COMMON_KEY] = torch.tensor(plan.common)
            pixel = " x ".join(f"{v:.3g}" for v in np.linalg.norm(plan.affine[:3, :3], axis=0))
            done = "; ".join([f"it is resampled to voxels of {pixel} mm", *plan.notes])
            logger.warning("%s does not lie on a grid that fits %s: %s", reference_name, name, done)
        elif found is not None and found.used:
            reference = registration.apply(reference, matrix)
        d[image_key], d[reference_key] = image, reference
        d[SLICE_AXIS_KEY] = axis
        # Over one field of view by now, slices last.
        d[FACTOR_KEY] = torch.tensor(matrix_factor(reference.shape[1:3], image.shape[1:3]))
        return d


def cut(image: MetaTensor, axis: int, ends: Sequence[int]) -> MetaTensor:
    """``(C, X, Y, Z)`` from one index to before another along a spatial axis; no voxel moves in the world."""
    first, end = (int(v) for v in ends)
    result = MetaTensor(image.as_tensor().narrow(axis + 1, first, end - first).contiguous(), meta=image.meta)
    affine = image.affine.clone()
    affine[:3, 3] += first * affine[:3, axis]
    result.affine = affine
    return result


class SlicesBackd(MapTransform):
    """Put the slice axis of the result back where the reference has it, or the stack if :class:`MatchReferenced` has
    resampled the reference; then the result is cut to what that covers."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            if COMMON_KEY in d:
                for axis in (0, 1):
                    d[key] = cut(d[key], axis, d[COMMON_KEY].reshape(2, 2)[axis])
            d[key] = slices_back(d[key], int(d[SLICE_AXIS_KEY]))
        return d


class DataRanged(MapTransform):
    """Record the maximum of a volume: the data range of its PSNR and SSIM (docs/data.md, metrics).

    Args:
        keys: the one volume.
        range_key: where the maximum goes.
    """

    def __init__(self, keys: KeysCollection, range_key: str) -> None:
        super().__init__(keys)
        self.range_key = range_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        d[self.range_key] = float(d[self.keys[0]].max())
        return d


class ForegroundLeveld(MapTransform):
    """Record :func:`foreground_level` of a whole volume, for masks of what is left once its slices are selected.

    Args:
        keys: the one volume.
        level_key: where the level goes.
    """

    def __init__(self, keys: KeysCollection, level_key: str) -> None:
        super().__init__(keys)
        self.level_key = level_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        d[self.level_key] = foreground_level(d[self.keys[0]])
        return d


def foreground_level(volume: torch.Tensor) -> float:
    """5 % of the volume's 99.9th percentile."""
    return FOREGROUND_LEVEL * float(np.percentile(torch.as_tensor(volume).cpu().numpy(), 99.9))


def foreground(volume: torch.Tensor) -> torch.Tensor:
    """Mask of the voxels above :func:`foreground_level`, same shape."""
    return torch.as_tensor(volume) > foreground_level(volume)


class ForegroundSlicesd(MapTransform):
    """Keep the slices (last axis) in which at least 5 % of the source volume is foreground.

    ``kept_slices (S,)`` of the item says which of the volume's slices these are.

    Args:
        keys: volumes ``(C, X, Y, S)`` to cut, all with the same slices.
        source_key: the volume whose foreground decides; usually the target. Of several, each must have enough.
        max_slices: keep at most so many, evenly spaced; None for all.

    Raises:
        ValueError: ``max_slices`` is less than 1, or no slice has enough foreground.
    """

    def __init__(self, keys: KeysCollection, source_key: KeysCollection, max_slices: int | None = None) -> None:
        super().__init__(keys)
        if max_slices is not None and max_slices < 1:
            raise ValueError(f"max_slices: {max_slices} found, at least 1 expected, or None for all")
        self.source_keys = ensure_tuple(source_key)
        self.max_slices = max_slices

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        fractions = [foreground(d[key]).float().mean(dim=(0, 1, 2)) for key in self.source_keys]
        fraction = torch.stack([torch.as_tensor(f) for f in fractions]).amin(dim=0)
        kept = torch.nonzero(fraction >= MIN_FOREGROUND).flatten()
        if len(kept) == 0:
            names = " and ".join(_name(d[key], key) for key in self.source_keys)
            raise ValueError(
                f"{names}: no slice has {MIN_FOREGROUND:.0%} foreground "
                f"(the fullest has {float(fraction.max()):.1%}); is the slice axis right?"
            )
        if self.max_slices is not None and len(kept) > self.max_slices:
            kept = kept[torch.linspace(0, len(kept) - 1, self.max_slices).round().long()]
        d[KEPT_SLICES_KEY] = torch.zeros(len(fraction), dtype=torch.bool).index_fill(0, kept, True)
        for key in self.key_iterator(d):
            d[key] = d[key][..., kept]
        return d


class NameOutputd(MapTransform):
    """Give a result the name of its subject, which ``SaveVolumed`` then saves it under.

    Args:
        keys: the results.
        name_key: holds the name.
    """

    def __init__(self, keys: KeysCollection, name_key: str) -> None:
        super().__init__(keys)
        self.name_key = name_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key].meta["filename_or_obj"] = f"{file_stem(d[self.name_key])}.nii.gz"
        return d
