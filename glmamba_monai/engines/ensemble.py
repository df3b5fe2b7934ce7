"""Self-ensemble: what a network makes of a slice in all eight orientations, its mean and its spread."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.inferers import SliceInferer
from monai.transforms import MapTransform
from torch import Tensor

from glmamba_monai.transforms import KSpaceDataConsistency

ORIENTATIONS = 8  # of a slice: four turns by right angles, each also mirrored; those of the training's augmentation


class SelfEnsembleInferer(SliceInferer):
    """MONAI's ``SliceInferer``, which can run the network on each slice in all eight orientations.

    Then it returns not the network's ``(B, 2, X, Y, S)`` but the super-resolved volume of every orientation, turned
    back, ``(B, 8, X, Y, S)``; the first is the network's own result, that of the slices as they are. The network takes
    one orientation at a time: as much memory for it as without, eight times the time.

    Args:
        self_ensemble: run all orientations.
        arguments: see ``SliceInferer``.
    """

    def __init__(self, self_ensemble: bool, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.self_ensemble = self_ensemble

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Run the network on the slices of ``inputs`` ``(B, 2, X, Y, S)``."""
        if self.self_ensemble:
            network = functools.partial(_in_all_orientations, network)
        return super().__call__(inputs, network, *args, **kwargs)


def _in_all_orientations(network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``(B, 2, H, W)`` to the super-resolved ``(B, 8, H, W)``."""
    return torch.cat([_turned_back(network(_turned(x, i))[:, :1], i) for i in range(ORIENTATIONS)], dim=1)


def _turned(x: Tensor, orientation: int) -> Tensor:
    """``(B, C, H, W)`` in an orientation: its bits say which axes are mirrored, and whether they then change places."""
    x = _mirrored(x, orientation)
    return x.transpose(2, 3).contiguous() if orientation & 4 else x


def _turned_back(x: Tensor, orientation: int) -> Tensor:
    return _mirrored(x.transpose(2, 3) if orientation & 4 else x, orientation)


def _mirrored(x: Tensor, orientation: int) -> Tensor:
    return x.flip([axis for axis, bit in ((2, 1), (3, 2)) if orientation & bit])


def mean_and_sd(volumes: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (n - 1) of the volumes ``(8, X, Y, S)`` of an ensemble, both ``(1, X, Y, S)``."""
    # About the first: where all are equal, the mean is that value and the SD is 0, to the last bit.
    first = volumes[:1]
    deviations = volumes - first
    return first + deviations.mean(dim=0, keepdim=True), deviations.std(dim=0, keepdim=True)


def consistent_sd(volumes: Tensor, low_resolution: Tensor) -> Tensor:
    """Standard deviation ``(1, X, Y, S)`` of volumes ``(8, X, Y, S)``, each after data consistency.

    What was measured has hardly any then; what is left is that of the frequencies which the network has added.

    Args:
        volumes: of an ensemble.
        low_resolution: what was measured, ``(1, x, y, S)``.
    """
    make_consistent = KSpaceDataConsistency()
    # One by one: its spectra are complex, and of all at once they would need many times the memory of the volumes.
    return mean_and_sd(torch.cat([make_consistent(volume[None], low_resolution) for volume in volumes]))[1]


class EnsembleMeand(MapTransform):
    """Replace the volumes of a :class:`SelfEnsembleInferer` by their mean, and keep their standard deviation.

    Where the item holds the measured image, the standard deviation is that after data consistency
    (:func:`consistent_sd`); the mean is to be made consistent afterwards, since the mean of consistent images is not.

    Args:
        keys: the one ensemble ``(8, X, Y, S)``.
        sd_key: where the standard deviation goes.
        low_resolution_key: holds what was measured, ``(1, x, y, S)``, in an item whose result is made consistent.
    """

    def __init__(self, keys: KeysCollection, sd_key: Hashable, low_resolution_key: Hashable) -> None:
        super().__init__(keys)
        self.sd_key = sd_key
        self.low_resolution_key = low_resolution_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        volumes = d[self.keys[0]]
        d[self.keys[0]], d[self.sd_key] = mean_and_sd(volumes)
        if self.low_resolution_key in d:
            d[self.sd_key] = consistent_sd(volumes, d[self.low_resolution_key])
        return d
