"""Segmentation: labels, intensities that mean the same in every volume, and what is done to a mask."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from scipy import ndimage

from glmamba_monai.transforms.volume import foreground


class LoadLabeld(MapTransform):
    """Load label volumes as masks ``(1, X, Y, Z)`` float32: 1 where the label is above 0, whatever its number.

    A mask may be empty, in contrast to an image of :class:`~glmamba_monai.transforms.LoadVolumed`.

    Raises:
        ValueError: the file cannot be read, or holds no 3-D volume.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            path = d[key]
            try:
                image = nib.load(path)
                mask = np.asarray(image.dataobj) > 0
            except Exception as error:  # whatever nibabel, gzip or zlib happen to raise on a damaged file
                raise ValueError(f"{path}: cannot be read as NIfTI ({error}); copy or convert it again") from error
            if mask.ndim != 3:
                raise ValueError(f"{path}: expected one 3-D label volume, found the shape {mask.shape}")
            meta = {"filename_or_obj": str(path)}
            d[key] = MetaTensor(torch.from_numpy(mask[None]).float(), affine=image.affine, meta=meta)
        return d


class ScaleByMedian(Transform):
    """Divide a volume ``(1, X, Y, S)``, or each of a batch, by the median of its foreground.

    Background stays 0 and the median of the brain becomes 1, in originals and results alike. A median changes little
    with the size of a lesion, in contrast to a mean and a standard deviation. Negative values, which no magnitude image
    has, become positive.
    """

    def __call__(self, volume: torch.Tensor) -> torch.Tensor:
        magnitude = volume.abs()
        return magnitude / magnitude[foreground(magnitude)].median()


class ScaleByMediand(MapTransform):
    """Dictionary form of :class:`ScaleByMedian`."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = ScaleByMedian()(d[key])
        return d


class LargeComponents(Transform):
    """Keep the connected components of a mask ``(1, X, Y, S)`` that are not much smaller than its largest.

    Args:
        share: of the largest component's voxels, below which a component is removed; 0 keeps all, 1 the largest alone.
    """

    def __init__(self, share: float) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"share must lie between 0 and 1, got {share!r}")
        self.share = share

    def __call__(self, mask: torch.Tensor) -> torch.Tensor:
        labelled, count = ndimage.label(mask[0].cpu().numpy())
        if self.share == 0 or count < 2:
            return mask
        sizes = np.bincount(labelled.ravel())
        sizes[0] = 0
        kept = torch.from_numpy((sizes >= self.share * sizes.max()) & (sizes > 0))
        return mask * kept[torch.from_numpy(labelled).long()].to(mask)
