"""One positive intensity divisor per volume, kept with the data so that the output can be multiplied back."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends, convert_to_numpy, convert_to_tensor
from torch import Tensor

__all__ = ["DEFAULT_PERCENTILE", "RestoreIntensityd", "ScaleByPercentile", "ScaleByPercentiled"]

DEFAULT_PERCENTILE = 99.9


class ScaleByPercentile(Transform):
    """
    Divide a volume by one of its percentiles, without clipping (docs/data.md, preprocessing).

    Args:
        percentile: in percent, above 0 and at most 100, over all voxels of the volume, background included.

    Raises:
        ValueError: percentile outside that range; when called, a volume without positive voxels or with
            values that are not finite.

    Example::

        scaler = ScaleByPercentile()
        divisor = scaler.divisor(low_resolution)
        restored = scaler.inverse(network(low_resolution / divisor), divisor)
    """

    backend = (TransformBackends.TORCH,)

    def __init__(self, percentile: float = DEFAULT_PERCENTILE) -> None:
        if not 0 < percentile <= 100:
            raise ValueError(f"percentile must lie in (0, 100], got {percentile!r}.")
        self.percentile = percentile

    def __call__(self, img: NdarrayOrTensor) -> Tensor:
        """
        Args:
            img: volume of any shape; array, tensor or ``MetaTensor``.

        Returns:
            ``img`` divided by its own percentile; a ``MetaTensor`` if ``img`` is one.
        """
        return _as_tensor(img) / self.divisor(img)

    def divisor(self, img: NdarrayOrTensor) -> float:
        """
        Args:
            img: volume of any shape.

        Returns:
            The percentile (linear interpolation between order statistics), or the maximum where the
            percentile is not positive because the object fills too few voxels.
        """
        # float64 keeps the rank among millions of voxels exact; torch.quantile refuses 16 million before torch 2.14
        values = convert_to_numpy(img).astype(np.float64).ravel()
        if values.size == 0 or not np.isfinite(values).all():
            bad = np.count_nonzero(~np.isfinite(values))
            raise ValueError(f"{_file_name(img)}: {bad} of {values.size} voxels are not finite.")
        value = np.percentile(values, self.percentile)
        if value <= 0:
            value = values.max()
        if value <= 0:
            raise ValueError(f"{_file_name(img)}: no voxel is above 0; expected a magnitude image.")
        return float(value)

    @staticmethod
    def inverse(img: NdarrayOrTensor, divisor: float) -> Tensor:
        """
        Args:
            img: scaled image of any shape.
            divisor: what :py:meth:`divisor` gave for the volume.

        Returns:
            ``img`` in the volume's own intensity units.
        """
        return _as_tensor(img) * divisor


def _as_tensor(img: NdarrayOrTensor) -> Tensor:
    return convert_to_tensor(img, track_meta=isinstance(img, MetaTensor))


def _file_name(img: NdarrayOrTensor) -> str:
    return str(img.meta.get("filename_or_obj", "img")) if isinstance(img, MetaTensor) else "img"


class ScaleByPercentiled(MapTransform):
    """
    Divide volumes by the percentile of one of them: HR and LR by that of LR, as there is no HR at deployment.

    Args:
        keys: keys of the volumes to divide.
        source_key: key of the volume the divisor is computed from. It is divided only if it is one of
            ``keys``.
        divisor_key: key to write the divisor (a ``float``) to, for :py:class:`RestoreIntensityd`.
        percentile: see :py:class:`ScaleByPercentile`.
        allow_missing_keys: do not raise if one of ``keys`` is missing; ``source_key`` is always needed.

    Raises:
        ValueError: whatever :py:class:`ScaleByPercentile` refuses.
        KeyError: when called without ``source_key``.
    """

    backend = ScaleByPercentile.backend

    def __init__(
        self,
        keys: KeysCollection,
        source_key: Hashable,
        divisor_key: Hashable,
        percentile: float = DEFAULT_PERCENTILE,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.source_key = source_key
        self.divisor_key = divisor_key
        self.scaler = ScaleByPercentile(percentile)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        if self.source_key not in d:
            raise KeyError(f"source_key {self.source_key!r} is missing, found {list(d)}.")
        divisor = self.scaler.divisor(d[self.source_key])
        for key in self.key_iterator(d):
            d[key] = _as_tensor(d[key]) / divisor
        d[self.divisor_key] = divisor
        return d


class RestoreIntensityd(MapTransform):
    """
    Multiply images by the divisor of :py:class:`ScaleByPercentiled`, back to the volume's intensity units.

    Args:
        keys: keys of the images to multiply.
        divisor_key: key of the divisor: a ``float``, or the one-element tensor a data loader made of it.
        allow_missing_keys: do not raise if one of ``keys`` is missing; ``divisor_key`` is always needed.

    Raises:
        KeyError: when called without ``divisor_key``.
    """

    backend = ScaleByPercentile.backend

    def __init__(self, keys: KeysCollection, divisor_key: Hashable, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.divisor_key = divisor_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        if self.divisor_key not in d:
            raise KeyError(f"divisor_key {self.divisor_key!r} is missing, found {list(d)}.")
        divisor = float(d[self.divisor_key])
        for key in self.key_iterator(d):
            d[key] = ScaleByPercentile.inverse(d[key], divisor)
        return d
