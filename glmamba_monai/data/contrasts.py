"""All contrasts of a subject, prepared once, and the random pairs that training draws from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from monai.data import Dataset
from monai.transforms import ResizeWithPadOrCrop, Transform

from glmamba_monai.data.dataset import SliceDataset, SliceDraw, plain_tensor
from glmamba_monai.transforms import (
    FACTORS,
    ForegroundSlicesd,
    KSpaceLowResolution,
    LoadVolume,
    PairOnGridd,
    RegisterReferenced,
    ScaleByPercentile,
)


class ContrastVolume(Transform):
    """All contrasts of a subject as the channels of one volume, each divided by its own 99.9th percentile.

    The input is an item of :func:`~glmamba_monai.data.contrast_items`. The result has

    - ``images (C, X, Y, S)``: the contrasts in the order of the item, slices last; a slice in which one of them shows
      no tissue (its field of view ends earlier, say) is left out;
    - ``divisors (C, len(FACTORS))``: what inference would divide each contrast by if it were the target at each of
      :data:`~glmamba_monai.transforms.FACTORS`, in the units of ``images``;
    - ``pixel_size``: in mm, the mean of both axes.

    Args:
        register: move the other contrasts onto the first one (:class:`~glmamba_monai.transforms.RegisterReferenced`).

    Raises:
        FileNotFoundError, ValueError: a volume is not usable, or lies on another grid than the first.
    """

    def __init__(self, register: bool = False) -> None:
        self.register = register
        self.load = LoadVolume()
        self.scale = ScaleByPercentile()

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        volumes = {name: self.load(path) for name, path in zip(item["contrasts"], item["files"])}
        volumes = PairOnGridd(list(volumes), item["slice_axis"])(volumes)
        if self.register:
            volumes = RegisterReferenced(item["contrasts"])(volumes)
        scaled = {name: self.scale(volumes[name]) for name in item["contrasts"]}
        spacing = np.linalg.norm(volumes[item["contrasts"][0]].affine[:3, :2].numpy(), axis=0)
        images = torch.cat([plain_tensor(image) for image in scaled.values()])
        divisors = [
            [self.scale.divisor(low_resolution) for low_resolution in KSpaceLowResolution(factor)(images)]
            for factor in FACTORS
        ]
        selected = ForegroundSlicesd("images", item["contrasts"])({"images": images, **scaled})
        return {
            "images": selected["images"],
            "divisors": torch.tensor(divisors, dtype=torch.float64).T,
            "pixel_size": float(spacing.mean()),
        }


class ContrastPairs(SliceDataset):
    """Random slices of random pairs of contrasts, augmented.

    Args:
        volumes: what :class:`ContrastVolume` has made of the subjects.
        transform: random transforms of ``target (1, X, Y)``, ``reference (1, X, Y)``, ``divisors (len(FACTORS),)`` of
            the target and ``pixel_size``, which end in ``image (2, X, Y)`` and ``target (1, X, Y)``; seeded for every
            draw.
        first_pair: how often the target is a subject's first contrast and the reference its second. Otherwise all
            pairs of two different contrasts are equally likely.
        wrong_reference: how often the reference is of another volume, or of another place in this one.
    """

    def __init__(
        self,
        volumes: Dataset,
        transform: Callable[..., Any],
        first_pair: float,
        wrong_reference: float,
    ) -> None:
        super().__init__(volumes, transform)
        self.first_pair = first_pair
        self.wrong_reference = wrong_reference

    def sample(self, draw: SliceDraw) -> dict[str, Any]:
        random = np.random.RandomState((draw.seed, 1))  # its own: the transforms have (draw.seed)
        volume = self.data[draw.volume]
        contrasts = len(volume["images"])
        target, reference = (0, 1) if random.rand() < self.first_pair else random.permutation(contrasts)[:2]
        image = _slice(volume, target, draw.position)
        if random.rand() < self.wrong_reference:
            guide = self._unrelated(random, draw, image.shape[1:])
        else:
            guide = _slice(volume, reference, draw.position)
        return {
            "target": image,
            "reference": guide,
            "divisors": volume["divisors"][target],
            "pixel_size": volume["pixel_size"],
        }

    def _unrelated(self, random: np.random.RandomState, draw: SliceDraw, size: torch.Size) -> torch.Tensor:
        """A slice of another volume at the same level, or of the same volume at another level, of any contrast."""
        other = random.randint(len(self.data))
        volume = self.data[other]
        shift = random.uniform(0.25, 0.75) if other == draw.volume else 0.0
        guide = _slice(volume, random.randint(len(volume["images"])), (draw.position + shift) % 1)
        return plain_tensor(ResizeWithPadOrCrop(size)(guide))


def _slice(volume: Mapping[str, Any], contrast: int, position: float) -> torch.Tensor:
    """Slice ``(1, X, Y)`` of one contrast, ``position`` (0 to 1) of the way through the volume."""
    images = plain_tensor(volume["images"])
    return images[contrast : contrast + 1, ..., int(position * images.shape[-1])]
