"""Random transforms of single slices for weights that serve every factor (docs/training.md): k-space and contrast.

What MONAI has (gamma, histogram, noise, misalignment, intensity) is taken from there, in ``train_general.json``, which
alone says how often and how much: here nothing of that has a default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, Randomizable, RandomizableTransform, Transform
from torch import Tensor

from glmamba_monai.transforms.kspace import KSpaceLowResolution, KSpaceUpsample

__all__ = ["FACTORS", "RandFunctiond", "RandLowResolutiond", "RandPixelSized", "inverted_contrast"]

FACTORS = (2, 3, 4)  # the factors one set of weights is for; those between them are trained, too


class RandPixelSized(RandomizableTransform, MapTransform):
    """Coarser pixels, as of a scan of a smaller matrix: the centre of k-space of all images alike.

    Args:
        keys: slices ``(1, X, Y)`` of one size and type, magnitude images.
        size_key: holds the pixel size in mm; what it becomes is written back.
        largest: pixel size in mm. It is drawn between the slice's own and this one, with equal odds for equal ratios;
            a slice whose pixels are larger already stays as it is.
        prob: how often the pixels are changed.
    """

    def __init__(self, keys: KeysCollection, size_key: Hashable, largest: float, prob: float) -> None:
        RandomizableTransform.__init__(self, prob)
        MapTransform.__init__(self, keys)
        self.size_key = size_key
        self.largest = largest

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        self.randomize(None)
        coarsest = self.largest / d[self.size_key]
        factor = coarsest ** self.R.random_sample()
        if self._do_transform and coarsest > 1:
            images = KSpaceLowResolution(factor)(torch.cat([d[key] for key in self.keys]))
            d.update(zip(self.keys, images.split([len(d[key]) for key in self.keys])))
            d[self.size_key] *= factor
        return d


class RandLowResolutiond(Randomizable, Transform):
    """What inference would make of a slice: degraded at a random factor, upsampled, in units of the low resolution.

    The steps are those of inference, on one slice instead of a volume: :class:`KSpaceLowResolution`, division by the
    99.9th percentile of the low-resolution volume, :class:`KSpaceUpsample`. The target is divided, too.

    Args:
        target_key: the sharp slice ``(1, X, Y)``.
        output_key: where the upsampled slice ``(1, X, Y)`` goes.
        divisors_key: holds the divisor of the low-resolution volume at each of :data:`FACTORS`, in the units of the
            slice; between these factors it is interpolated.
        upsampling: mode of :class:`KSpaceUpsample`.
        factors: smallest and largest factor, two numbers of at least 1; both axes have the same factor.
        whole: how often the factor is one of :data:`FACTORS` instead of any number between the limits.
        shares: how these draws are shared out among :data:`FACTORS`, such as (3, 1, 1) for three of five at the first;
            what lies outside the limits gets none.
        zero_fill: how often the low resolution is what a scanner has interpolated to the full matrix (mode
            ``"zero_fill"`` of :class:`KSpaceLowResolution`) instead of a smaller matrix.
        noisy: how often there is noise in k-space.
        noise_std: largest standard deviation of that noise, in units of the divisor.

    Raises:
        ValueError: the factors are no such numbers; the shares are not as many as :data:`FACTORS`, negative, or leave
            no factor to draw.
    """

    def __init__(
        self,
        target_key: Hashable,
        output_key: Hashable,
        divisors_key: Hashable,
        upsampling: str,
        factors: Sequence[float],
        whole: float,
        shares: Sequence[float],
        zero_fill: float,
        noisy: float,
        noise_std: float,
    ) -> None:
        self.target_key = target_key
        self.output_key = output_key
        self.divisors_key = divisors_key
        self.upsample = KSpaceUpsample(upsampling)
        two = isinstance(factors, Sequence) and len(factors) == 2 and all(isinstance(f, Real) for f in factors)
        if not two or not 1 <= factors[0] <= factors[1] < math.inf:
            raise ValueError(
                f"factors={factors!r}: expected two numbers from 1 on, the smallest and the largest factor; both axes "
                "have the same, so a factor is not one number per axis"
            )
        self.factors = factors
        self.whole = whole
        if len(shares) != len(FACTORS) or min(shares) < 0:
            raise ValueError(
                f"shares={shares!r}: expected {len(FACTORS)} numbers, none negative, of the factors {FACTORS}"
            )
        drawn = {f: share for f, share in zip(FACTORS, shares) if share > 0 and factors[0] <= f <= factors[-1]}
        if whole > 0 and not drawn:
            raise ValueError(
                f"whole={whole!r}: expected 0, or one of the factors {FACTORS} within factors={factors!r} with a share "
                f"above 0, found shares={shares!r}"
            )
        self.among = list(drawn)
        # None is "equal": for numpy another way to draw, that of all trainings so far.
        equal = len(set(drawn.values())) <= 1
        self.chances = None if equal else [share / sum(drawn.values()) for share in drawn.values()]
        self.zero_fill = zero_fill
        self.noisy = noisy
        self.noise_std = noise_std

    def randomize(self, data: Any = None) -> None:
        smallest, largest = self.factors
        whole = self.R.rand() < self.whole
        self.factor = float(self.R.choice(self.among, p=self.chances) if whole else self.R.uniform(smallest, largest))
        self.mode = "zero_fill" if self.R.rand() < self.zero_fill else "crop"
        self.noise = self.R.uniform(0, self.noise_std) if self.R.rand() < self.noisy else 0.0
        self.noise_seed = int(self.R.randint(2**31))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        self.randomize()
        target = d[self.target_key]
        divisor = float(np.interp(self.factor, FACTORS, d[self.divisors_key]))
        degrade = KSpaceLowResolution(self.factor, self.mode, noise_std=self.noise * divisor, seed=self.noise_seed)
        d[self.output_key] = self.upsample(degrade(target) / divisor, target.shape[1:])
        d[self.target_key] = target / divisor
        return d


class RandFunctiond(RandomizableTransform, MapTransform):
    """Applies a function to images, with a probability.

    MONAI's ``RandLambdad`` does this, too, but makes every image a ``MetaTensor``, changed or not, with which all later
    transforms take longer.

    Args:
        keys: images.
        func: of an image; what it returns takes the image's place.
        prob: how often, all images alike.
    """

    def __init__(self, keys: KeysCollection, func: Callable[[Tensor], Tensor], prob: float) -> None:
        RandomizableTransform.__init__(self, prob)
        MapTransform.__init__(self, keys)
        self.func = func

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        self.randomize(None)
        if self._do_transform:
            d.update({key: self.func(d[key]) for key in self.key_iterator(d)})
        return d


def inverted_contrast(image: Tensor) -> Tensor:
    """Dark tissue bright and bright tissue dark, in an image whose brightest tissue is near 1; the air stays dark.

    Args:
        image: any shape, air at 0.
    """
    air = (image / 0.1).clamp(0, 1)  # a ramp, so that the border of the head does not become a line
    return air * (1.1 - image).clamp(min=0)
