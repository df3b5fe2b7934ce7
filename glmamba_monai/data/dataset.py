"""Volumes, cached once prepared, and the random slices that training draws from them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.data import CacheDataset, Dataset, MetaTensor, PersistentDataset
from monai.data.utils import pickle_hashing
from torch.utils.data import DistributedSampler

SLICE_KEYS = ("image", "target")  # what a training slice consists of


def volume_dataset(
    data: Sequence[dict[str, str]],
    transform: Callable[..., Any],
    cache_dir: str | os.PathLike[str] | None = None,
    cache_rate: float = 1.0,
) -> Dataset:
    """Volumes after their deterministic transforms, each prepared once.

    Args:
        data: items of a datalist.
        transform: deterministic transforms.
        cache_dir: keep the prepared volumes in this folder, across runs; None keeps them in memory.
        cache_rate: share of the volumes to keep in memory.
    """
    if cache_dir is not None:
        # Without the hash, volumes prepared for one scale would be taken for those of another.
        return PersistentDataset(data, transform, cache_dir=cache_dir, hash_transform=pickle_hashing)
    # Nothing after the cache changes a cached volume in place, so it need not be copied at every access.
    return CacheDataset(data, transform, cache_rate=cache_rate, num_workers=None, copy_cache=False)


class SliceDraw(NamedTuple):
    """One training sample: which volume, how far through its slices (0 to 1), and the seed of its augmentation."""

    volume: int
    position: float
    seed: int


class SliceSampler(DistributedSampler):
    """Draws the slices of an epoch as a pure function of seed and epoch.

    Neither a restart nor the number of workers changes the draws; ranks share them out. The volumes take equal
    parts, and the slices of each are spread over its length. MONAI's trainer calls ``set_epoch``, as it does for any
    ``DistributedSampler``.

    Args:
        dataset: volumes.
        draws: slices per epoch, over all ranks; rounded up so that every rank gets the same number.
        seed: of all draws.
        num_replicas: number of processes that train together.
        rank: of this process.
    """

    def __init__(self, dataset: Dataset, draws: int, seed: int = 0, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, seed=seed)
        self.num_samples = -(-draws // num_replicas)

    def __iter__(self) -> Iterator[SliceDraw]:
        random = np.random.RandomState((self.seed, self.epoch))
        total, volumes = self.num_samples * self.num_replicas, len(self.dataset)
        drawn = np.resize(random.permutation(volumes), total)
        strata = np.arange(total) // volumes
        draws_of_volume = np.bincount(drawn, minlength=volumes)  # two values where the parts cannot be equal
        positions = (strata + random.random_sample(total)) / draws_of_volume[drawn]
        seeds = random.randint(0, 2**31, size=total)
        order = random.permutation(total)[self.rank :: self.num_replicas]
        return (SliceDraw(int(drawn[i]), float(positions[i]), int(seeds[i])) for i in order)


class SliceDataset(Dataset):
    """Random slices of prepared volumes, augmented.

    Args:
        volumes: items with ``image (2, X, Y, S)`` and ``target (1, X, Y, S)``.
        transform: random transforms of a slice ``image (2, X, Y)``, ``target (1, X, Y)``; seeded for every draw.
    """

    def __init__(self, volumes: Dataset, transform: Callable[..., Any]) -> None:
        super().__init__(volumes, transform)

    def __getitem__(self, draw: SliceDraw) -> dict[str, torch.Tensor]:
        volume = self.data[draw.volume]
        index = int(draw.position * volume[SLICE_KEYS[0]].shape[-1])
        self.transform.set_random_state(seed=draw.seed)
        augmented = self.transform({key: _plain(volume[key])[..., index] for key in SLICE_KEYS})
        return {key: _plain(augmented[key]) for key in SLICE_KEYS}


def _plain(image: torch.Tensor) -> torch.Tensor:
    """Without meta: a training slice has no place in the world, and collating meta costs more than the slice."""
    return image.as_tensor() if isinstance(image, MetaTensor) else image


def batch_of_rank(batch_size: int, num_replicas: int = 1) -> int:
    """Slices that each of several processes takes of a batch.

    Raises:
        ValueError: they cannot share it equally.
    """
    if batch_size < 1 or batch_size % num_replicas:
        raise ValueError(
            f"batch_size {batch_size} must be a positive multiple of the number of processes, {num_replicas}"
        )
    return batch_size // num_replicas


def share_of_rank(data: Sequence[Any], num_replicas: int = 1, rank: int = 0) -> list[Any]:
    """Items of a data list that one of several processes evaluates.

    With fewer items than processes some items are evaluated twice, since an empty share would stall the others;
    :class:`~glmamba_monai.engines.SubjectMetrics` counts each subject once.
    """
    return list(data[rank::num_replicas]) or [data[rank % len(data)]]
