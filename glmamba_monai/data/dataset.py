"""Volumes, cached once prepared, and the random slices that training draws from them; and those of inference."""

from __future__ import annotations

import errno
import logging
import os
import pickle
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import deepcopy
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.data import CacheDataset, DataLoader, Dataset, MetaTensor, PersistentDataset, get_track_meta, set_track_meta
from monai.data.utils import pickle_hashing
from monai.transforms import Compose, MapTransform, Randomizable, Transform
from monai.utils import convert_to_tensor
from torch.utils.data import DistributedSampler, get_worker_info

from glmamba_monai import __version__
from glmamba_monai.errors import root_cause

logger = logging.getLogger(__name__)

SLICE_KEYS = ("image", "target")  # what a training slice consists of
LEFT_OUT_KEY = "left_out"  # why a volume could not be prepared, in the item that stands for it


class LenientDataset(Dataset):
    """MONAI's ``Dataset``, of which an item that cannot be prepared does not cost the others.

    Its error is logged, and ``{"subject", "left_out": why}`` stands for it
    (:class:`~glmamba_monai.engines.VolumeEvaluator` passes that by). An only item raises its error, and what is not the
    item's fault, memory or a full disk, is raised always.
    """

    def _transform(self, index: int) -> Any:
        try:
            return super()._transform(index)
        except Exception as error:
            cause = root_cause(error)
            if len(self.data) == 1 or isinstance(cause, MemoryError) or getattr(cause, "errno", None) == errno.ENOSPC:
                raise  # it is not this volume
            subject = self.data[index]["subject"]
            ours = isinstance(cause, (ValueError, OSError))  # such a message says what is wrong
            reason = str(cause) if ours else f"{type(cause).__name__}: {cause}"
            logger.error("%s: left out: %s", subject, reason, exc_info=None if ours else error)
            return {"subject": subject, LEFT_OUT_KEY: reason}


def volume_dataset(
    data: Sequence[dict[str, str]],
    transform: Callable[..., Any],
    cache_dir: str | os.PathLike[str] | None = None,
    cache_rate: float = 1.0,
) -> Dataset:
    """Volumes after their deterministic transforms, each prepared once; see :class:`SliceMajor` for their layout.

    Args:
        data: items of a datalist.
        transform: deterministic transforms.
        cache_dir: keep the prepared volumes in this folder, across runs. They are mapped into memory, where the
            system keeps as many of them as fit; so this is the way for data larger than the memory.
        cache_rate: share of the volumes to keep at hand: in memory, or mapped. The others are prepared (or mapped)
            whenever they are asked for.
    """
    transform = Compose([transform, SliceMajor()]).flatten()  # a Compose inside a Compose passes for random
    if cache_dir is not None:
        data, transform = _MappedDataset(data, transform, cache_dir), Compose([])
    # Nothing after the cache changes a cached volume in place, so it need not be copied at every access.
    return CacheDataset(data, transform, cache_rate=cache_rate, num_workers=None, copy_cache=False, as_contiguous=False)


class SliceMajor(Transform):
    """Stores each slice of a volume in one piece, in place of one value of every slice beside the other.

    Shapes stay as they are. A slice ``volume[..., i]`` of ``(C, X, Y, S)`` is then read forty times faster, and reads
    from a mapped file what it needs and no more.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        return {
            key: value.movedim(-1, 0).contiguous().movedim(0, -1)
            if isinstance(value, torch.Tensor) and value.dim() == 4
            else value
            for key, value in data.items()
        }


class _MappedDataset(PersistentDataset):
    """Prepared volumes in files, which are mapped into memory instead of being read from end to end.

    A file's name tells what it was made of: the item with size and time of the files that it names, the transforms with
    their settings, and the version of this package.
    """

    def __init__(self, data: Sequence[Any], transform: Callable[..., Any], cache_dir: str | os.PathLike[str]) -> None:
        # Without the hash, volumes prepared for one scale would be taken for those of another.
        super().__init__(data, transform, cache_dir=cache_dir, hash_func=_hash_with_files, hash_transform=_hash_of)

    def _cachecheck(self, item_transformed: Any) -> Any:
        file = self.cache_dir / f"{self.hash_func(item_transformed).decode()}{self.transform_hash}.pt"
        if file.is_file():
            try:
                return torch.load(file, weights_only=True, mmap=True)
            except (RuntimeError, OSError, EOFError, pickle.UnpicklingError):  # half a file: the disk was full, ...
                file.unlink(missing_ok=True)
        prepared = self._pre_transform(deepcopy(item_transformed))
        # Several processes may prepare the same volume at the same time: each writes a file of its own in the same
        # folder, and a rename shows it whole. (MONAI's own moves it from the temporary folder: from another disk that
        # is a copy, of which another process reads half.)
        partial = file.with_name(f".partial-{uuid4().hex}-{file.name}")
        try:
            with partial.open("wb") as content:
                torch.save(convert_to_tensor(prepared, convert_numeric=False, track_meta=self.track_meta), content)
            os.replace(partial, file)
        except BaseException as error:
            with suppress(OSError):  # the error that brought us here counts
                partial.unlink(missing_ok=True)
            # A folder that may only be read is no reason to stop.
            if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                return prepared
            raise
        return torch.load(file, weights_only=True, mmap=True)


def _hash_of(transforms: Any) -> bytes:
    return pickle_hashing((__version__, transforms))


def _hash_with_files(item: Mapping[str, Any]) -> bytes:
    """Of an item and the state of its files: one that was written anew is prepared anew."""
    found = [os.stat(v) for v in item.values() if isinstance(v, (str, os.PathLike)) and os.path.isfile(v)]
    return pickle_hashing((dict(item), [(status.st_size, status.st_mtime_ns) for status in found]))


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


class RandOrientedCropd(Randomizable, MapTransform):
    """A random window of a slice in a random one of the eight orientations of its grid, the same for every key.

    What ``SpatialPadd``, ``RandSpatialCropd``, ``RandFlipd`` and ``RandRotate90d`` do together. Those took 3.4 ms a
    slice of 240x240, most of it to record affine and operations, which nobody reads; this takes 0.4 ms.

    Args:
        keys: images ``(C, X, Y)`` of one size.
        crop_size: side of the square window in pixels, smaller slices being padded with zeros on both sides; None for
            the whole slice.
    """

    def __init__(self, keys: KeysCollection, crop_size: int | None = None) -> None:
        super().__init__(keys)
        self.crop_size = crop_size

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        result = dict(data)
        size = data[self.keys[0]].shape[1:]
        window = size if self.crop_size is None else (self.crop_size, self.crop_size)
        start = [self.R.randint(max(n - w, 0) + 1) for n, w in zip(size, window)]
        orientation = self.R.randint(8)
        flipped = [axis for axis in (1, 2) if orientation & axis]
        for key in self.keys:
            image = data[key][:, start[0] : start[0] + window[0], start[1] : start[1] + window[1]]
            image = _padded(image, window).flip(flipped)
            result[key] = image.transpose(1, 2) if orientation & 4 else image
        return result


class SliceDataset(Dataset):
    """Random slices of prepared volumes, augmented.

    Args:
        volumes: items with ``image (2, X, Y, S)`` and ``target (1, X, Y, S)``.
        transform: random transforms of a slice ``image (2, X, Y)``, ``target (1, X, Y)``; seeded for every draw.
    """

    def __init__(self, volumes: Dataset, transform: Callable[..., Any]) -> None:
        super().__init__(volumes, transform)

    def __getitem__(self, draw: SliceDraw) -> dict[str, torch.Tensor]:
        _share_random_state(self.transform, np.random.RandomState(draw.seed))
        sample = self.sample(draw)  # with meta: a volume that is not cached may be prepared for it
        with _without_meta():
            augmented = self.transform(sample)
        return {key: plain_tensor(augmented[key]) for key in SLICE_KEYS}

    def sample(self, draw: SliceDraw) -> dict[str, Any]:
        """The slice that is drawn, as the transforms get it."""
        volume = self.data[draw.volume]
        index = int(draw.position * volume[SLICE_KEYS[0]].shape[-1])
        return {key: plain_tensor(volume[key])[..., index] for key in SLICE_KEYS}


def _share_random_state(transform: Compose, state: np.random.RandomState) -> None:
    """Let a ``Compose`` (or ``OneOf``, ...) and all its transforms draw from one random state, one after the other.

    ``Compose.set_random_state`` makes a state for each, which for a dozen transforms takes a quarter of their time.
    """
    transform.R = state
    for each in transform.transforms:
        if isinstance(each, Randomizable):
            each.set_random_state(state=state)


@contextmanager
def _without_meta() -> Iterator[None]:
    """In a process of a data loader, MONAI's transforms do without ``MetaTensor``, which takes a third of their time.

    Elsewhere the switch, which holds for the whole process, might be seen by a thread that needs meta.
    """
    tracked = get_track_meta()
    if get_worker_info() is not None:
        set_track_meta(False)
    try:
        yield
    finally:
        set_track_meta(tracked)


def plain_tensor(image: torch.Tensor) -> torch.Tensor:
    """Without meta: a training slice has no place in the world, and collating meta costs more than the slice."""
    return image.as_tensor() if isinstance(image, MetaTensor) else image


def _padded(image: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """``(C, X, Y)`` with zeros on both sides, up to a size."""
    pad = [(n - m) // 2 for n, m in zip(size, image.shape[1:])]
    after = [n - m - p for n, m, p in zip(size, image.shape[1:], pad)]
    return F.pad(image, (pad[1], after[1], pad[0], after[0])) if any(pad + after) else image


def collate_slices(items: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Slices as a batch, the smaller ones padded with zeros on both sides.

    MONAI's ``pad_list_data_collate`` does this, too, but returns what it has padded as ``MetaTensor``, with which every
    operation of the network takes longer.
    """
    size = [max(item[SLICE_KEYS[0]].shape[axis] for item in items) for axis in (1, 2)]
    return {key: torch.stack([_padded(item[key], size) for item in items]) for key in SLICE_KEYS}


class BackgroundDataLoader(DataLoader):
    """MONAI's DataLoader with the next batch being made, and pinned, in a thread while the last one is in use.

    MONAI's ``ThreadDataLoader`` does this, too, but where a slice cannot be made it ends the epoch without a word; here
    the error arrives.
    """

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        batches = super().__iter__()
        with ThreadPoolExecutor(1) as thread:
            coming = thread.submit(next, batches, None)
            while (batch := coming.result()) is not None:
                coming = thread.submit(next, batches, None)
                yield batch


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
