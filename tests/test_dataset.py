"""Cached volumes, and slices drawn from them as a function of seed and epoch alone."""

from __future__ import annotations

import threading
from collections import Counter
from itertools import chain
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import Dataset, MetaTensor
from monai.data.utils import pad_list_data_collate
from monai.transforms import Compose, OneOf, Transform

from glmamba_monai.data import (
    BackgroundDataLoader,
    RandOrientedCropd,
    SliceDataset,
    SliceDraw,
    SliceSampler,
    batch_of_rank,
    collate_slices,
    share_of_rank,
    volume_dataset,
)
from glmamba_monai.transforms import KSpaceLowResolutiond, LoadVolumed, PairOnGridd

CONFIG = Path(__file__).parent.parent / "bundle" / "configs" / "train.json"


def augmentation(crop_size=None):
    """That of train.json."""
    parser = ConfigParser()
    parser.read_config(str(CONFIG))
    parser["crop_size"] = crop_size
    return parser.get_parsed_content("train#augmentation")


def volume(shape=(20, 24, 5), seed=0):
    """Both channels of the image equal the target, so that whatever is done to one must be done to all."""
    target = torch.rand(1, *shape, generator=torch.Generator().manual_seed(seed))
    return {"image": MetaTensor(torch.cat([target, target])), "target": MetaTensor(target)}


def plan(volumes, draws, seed=0, epoch=0, num_replicas=1):
    """The draws of every rank."""
    ranks = []
    for rank in range(num_replicas):
        sampler = SliceSampler(Dataset(list(range(volumes))), draws, seed, num_replicas, rank)
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler)
    return ranks


# --- whole volumes


class Count(Transform):
    """Counts how often a volume is prepared."""

    calls = 0

    def __call__(self, data):
        type(self).calls += 1
        return {**data, "image": torch.full((2, 4, 4, 3), float(data["number"]))}


@pytest.mark.parametrize("cached", [True, False])
def test_volumes_in_memory_are_prepared_once(cached):
    Count.calls = 0
    volumes = volume_dataset([{"number": i} for i in range(4)], Compose([Count()]), cache_rate=1.0 if cached else 0.5)
    for _ in range(3):
        assert [v["image"].mean().item() for v in volumes] == [0, 1, 2, 3]
    assert Count.calls == (4 if cached else 2 + 3 * 2)


@pytest.mark.parametrize("cache_rate", [0.0, 0.5, 1.0])
def test_volumes_on_disk_are_prepared_once(tmp_path, cache_rate):
    Count.calls = 0
    for _ in range(2):  # runs
        items = [{"number": i} for i in range(4)]
        volumes = volume_dataset(items, Compose([Count()]), cache_dir=tmp_path, cache_rate=cache_rate)
        for _ in range(3):
            assert [v["image"].mean().item() for v in volumes] == [0, 1, 2, 3]
    assert Count.calls == 4


def test_half_a_file_of_the_disk_cache_is_prepared_again(tmp_path):
    def run():
        return [
            v["image"].mean().item() for v in volume_dataset([{"number": 7}], Compose([Count()]), cache_dir=tmp_path)
        ]

    Count.calls = 0
    assert run() == [7]
    (file,) = tmp_path.glob("*.pt")
    file.write_bytes(file.read_bytes()[:100])
    assert run() == [7] and run() == [7]
    assert Count.calls == 2


def test_a_file_of_the_disk_cache_is_never_seen_half_written(tmp_path, monkeypatch):
    """Trainings side by side prepare the same volumes at the same time; each may find the other's files."""
    save = torch.save

    def slow_save(content, file):
        save(content, file)
        names = [f.name for f in tmp_path.iterdir()]
        assert names == [Path(file.name).name] and names[0].startswith(".partial-")

    monkeypatch.setattr(torch, "save", slow_save)
    (volume,) = volume_dataset([{"number": 7}], Compose([Count()]), cache_dir=tmp_path)
    assert volume["image"].mean().item() == 7
    (file,) = tmp_path.iterdir()
    assert file.suffix == ".pt"

    def full_disk(content, file):
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        volume_dataset([{"number": 8}], Compose([Count()]), cache_dir=tmp_path)[0]
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_slice_of_a_volume_lies_in_one_piece(tmp_path, on_disk):
    volumes = volume_dataset([{"number": 3}], Compose([_ToVolume()]), cache_dir=tmp_path if on_disk else None)
    for _ in range(2):  # as prepared, as read
        for key, expected in volume(seed=3).items():
            found = volumes[0][key]
            assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))
            assert found[..., 1].is_contiguous()


def prepared(files, cache_dir, scale):
    transform = Compose(
        [
            LoadVolumed(["target", "reference"]),
            PairOnGridd(["target", "reference"]),
            KSpaceLowResolutiond("target", scale=scale, output_keys="low_resolution"),
        ]
    )
    return volume_dataset(files, transform, cache_dir=cache_dir)


def test_volumes_on_disk_outlive_the_run_but_not_what_they_were_made_of(tmp_path, make_subject_folder, monkeypatch):
    """Another scale, file or version, with the same folder for the cache, must not get the volumes of the first."""
    written = make_subject_folder(tmp_path / "data", n=2)
    files = [{"target": str(f["t2"]), "reference": str(f["t1"])} for f in written.values()]
    first = [v["low_resolution"].shape for v in prepared(files, tmp_path / "cache", 2)]
    assert first == [(1, 12, 14, 6)] * 2 and len(list((tmp_path / "cache").iterdir())) == 2
    fresh = prepared(files, None, 2)
    for cached, computed in zip(prepared(files, tmp_path / "cache", 2), fresh):
        for key, value in computed.items():
            if torch.is_tensor(value):
                assert torch.equal(torch.as_tensor(cached[key]), value.as_tensor())
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert [v["low_resolution"].shape for v in prepared(files, tmp_path / "cache", 4)] == [(1, 6, 7, 6)] * 2
    with monkeypatch.context() as cached_only:
        cached_only.setattr(LoadVolumed, "__call__", lambda *_: pytest.fail("prepared again"))
        assert [v["low_resolution"].shape for v in prepared(files, tmp_path / "cache", 2)] == first

    before = [v["target"].max().item() for v in prepared(files, tmp_path / "cache", 2)]
    image = nib.load(files[0]["target"])
    nib.save(nib.Nifti1Image(3 * image.get_fdata(dtype=np.float32), image.affine, image.header), files[0]["target"])
    after = [v["target"].max().item() for v in prepared(files, tmp_path / "cache", 2)]
    assert after == pytest.approx([3 * before[0], before[1]], rel=1e-5)

    monkeypatch.setattr("glmamba_monai.data.dataset.__version__", "another")
    number = len(list((tmp_path / "cache").iterdir()))
    assert [v["low_resolution"].shape for v in prepared(files, tmp_path / "cache", 2)] == first
    assert len(list((tmp_path / "cache").iterdir())) == number + 2


# --- the plan of an epoch


@pytest.mark.parametrize("num_replicas", [2, 3, 4])
def test_ranks_share_the_plan_of_one(num_replicas):
    (whole,) = plan(7, 48, seed=3, epoch=2)
    ranks = plan(7, 48, seed=3, epoch=2, num_replicas=num_replicas)
    assert {len(r) for r in ranks} == {48 // num_replicas}
    # step by step: the batches of all ranks together are the batch of the one
    assert [draw for step in zip(*ranks) for draw in step] == whole


def test_ranks_get_equally_many_draws():
    ranks = plan(5, 10, num_replicas=4)
    assert [len(r) for r in ranks] == [3] * 4
    assert len({draw for r in ranks for draw in r}) == 12


def test_seed_and_epoch_decide_and_nothing_else():
    (first,) = plan(7, 40, seed=1, epoch=4)
    np.random.seed(0)
    torch.manual_seed(0)
    assert plan(7, 40, seed=1, epoch=4) == [first]
    sampler = SliceSampler(Dataset(list(range(7))), 40, seed=1)
    for epoch in (0, 9, 4):  # a resumed training jumps
        sampler.set_epoch(epoch)
    assert list(sampler) == first == list(sampler)
    others = [plan(7, 40, seed=s, epoch=e)[0] for s, e in ((1, 5), (4, 1), (2, 4), (0, 0))]
    assert len({tuple(p) for p in [first, *others]}) == 5


@pytest.mark.parametrize("volumes, draws", [(1, 10), (4, 40), (7, 10), (9, 10), (10, 10), (30, 10), (7, 100)])
def test_volumes_take_equal_parts(volumes, draws):
    seen = Counter()
    for epoch in range(30):
        (drawn,) = plan(volumes, draws, epoch=epoch)
        counts = Counter(d.volume for d in drawn)
        assert len(drawn) == draws and set(counts) <= set(range(volumes))
        assert set(counts.values()) <= {draws // volumes, -(-draws // volumes)}
        seen.update(counts)
    assert set(seen) == set(range(volumes))


@pytest.mark.parametrize("volumes, draws", [(1, 10), (4, 40), (7, 10), (9, 10), (10, 10), (30, 10), (7, 100)])
def test_slices_are_spread_over_every_volume(volumes, draws):
    """Each of a volume's n draws lies in its own n-th of the volume; over epochs all parts come up alike."""
    positions = []
    for epoch in range(60):
        (drawn,) = plan(volumes, draws, epoch=epoch)
        for v in range(volumes):
            mine = [d.position for d in drawn if d.volume == v]
            assert sorted(int(p * len(mine)) for p in mine) == list(range(len(mine)))
        positions += [d.position for d in drawn]
    assert min(positions) >= 0 and max(positions) < 1
    quarters = np.histogram(positions, bins=4, range=(0, 1))[0] / len(positions)
    # five standard deviations of independent draws; stratified ones vary less
    np.testing.assert_allclose(quarters, 0.25, atol=5 * np.sqrt(0.25 * 0.75 / len(positions)))


def test_the_order_of_an_epoch_is_mixed():
    """A batch is not one volume, and not one part of the volumes."""
    (drawn,) = plan(10, 400)
    half = drawn[:200]
    assert min(Counter(d.volume for d in half).values()) > 5
    assert abs(np.mean([d.position for d in half]) - 0.5) < 0.1
    assert len({d.seed for d in drawn}) == 400


# --- slices


def test_a_position_is_a_slice():
    data = volume((4, 5, 5))
    slices = SliceDataset(Dataset([data]), Compose([]))
    for position, index in ((0.0, 0), (0.19, 0), (0.2, 1), (0.5, 2), (0.99, 4), (1 - 2**-53, 4)):
        drawn = slices[SliceDraw(0, position, 0)]
        assert torch.equal(drawn["target"], data["target"].as_tensor()[..., index])
        assert torch.equal(drawn["image"], data["image"].as_tensor()[..., index])
        assert not any(isinstance(x, MetaTensor) for x in drawn.values())


@pytest.mark.parametrize("crop_size", [None, 16, 22, 40])
def test_augmentation_treats_image_and_target_alike(crop_size):
    data = volume()
    slices = SliceDataset(Dataset([data]), augmentation(crop_size))
    results = set()
    for seed in range(40):
        drawn = slices[SliceDraw(0, 0.5, seed)]
        image, target = drawn["image"], drawn["target"]
        assert image.shape == (2, *target.shape[1:]) and target.shape[0] == 1
        assert torch.equal(image[:1], target) and torch.equal(image[1:], target)
        if crop_size is not None:
            assert target.shape == (1, crop_size, crop_size)
        results.add(target.numpy().tobytes())
    # eight ways of lying, all of them to be seen, times 1, 45 and 3 places of the crop
    ways, at_least = {None: (8, 8), 16: (360, 30), 22: (24, 15), 40: (8, 8)}[crop_size]
    assert at_least <= len(results) <= ways


def test_flips_and_right_angles_are_all_there_is():
    data = volume()
    slices = SliceDataset(Dataset([data]), augmentation())
    original = data["target"][0, :, :, 2].numpy()
    expected = {np.rot90(m, k).tobytes() for m in (original, original.T) for k in range(4)}
    found = {slices[SliceDraw(0, 0.5, seed)]["target"][0].numpy().tobytes() for seed in range(60)}
    assert found == expected


def test_crops_come_from_everywhere():
    """Every pixel is numbered: each crop is a window of the slice, and the windows cover it."""
    numbers = torch.arange(20.0 * 24).reshape(1, 20, 24, 1)
    slices = SliceDataset(Dataset([{"image": torch.cat([numbers] * 2), "target": numbers}]), augmentation(12))
    seen = set()
    for seed in range(600):
        crop = slices[SliceDraw(0, 0.5, seed)]["target"][0].numpy().astype(int)
        rows, columns = crop // 24, crop % 24
        assert np.ptp(rows) == np.ptp(columns) == 11 and len(np.unique(crop)) == 144
        seen |= set(crop.ravel().tolist())
    assert seen == set(range(20 * 24))


def test_a_choice_between_transforms_is_reproducible():
    choice = OneOf([RandOrientedCropd(["image", "target"], size) for size in (4, 5, 6, 7)])
    slices = SliceDataset(Dataset([volume()]), choice)
    for seed in range(10):
        assert len({tuple(slices[SliceDraw(0, 0.5, seed)]["image"].shape) for _ in range(5)}) == 1
    assert len({tuple(slices[SliceDraw(0, 0.5, seed)]["image"].shape) for seed in range(40)}) == 4


def test_draws_are_reproducible_in_any_order():
    slices = SliceDataset(Dataset([volume(seed=i) for i in range(3)]), augmentation(16))
    (draws,) = plan(3, 24, seed=5)
    expected = {d: slices[d] for d in draws}
    np.random.seed(1)
    for d in [draws[i] for i in np.random.permutation(24)]:
        for key, value in slices[d].items():
            assert torch.equal(value, expected[d][key])
    other = slices[draws[0]._replace(seed=draws[0].seed + 1)]
    assert not torch.equal(other["image"], expected[draws[0]]["image"])


def test_the_cached_volumes_stay_as_they_are():
    items = [{"number": i} for i in range(2)]
    volumes = volume_dataset(items, Compose([_ToVolume()]))
    before = [{k: volumes[i][k].clone() for k in ("image", "target")} for i in range(2)]
    slices = SliceDataset(volumes, augmentation())
    for draw in plan(2, 40)[0]:
        for value in collate_slices([slices[draw]]).values():
            value += 1  # as an in-place operation of a training step might
    for i in range(2):
        for key, value in before[i].items():
            assert torch.equal(torch.as_tensor(volumes[i][key]), torch.as_tensor(value))


class _ToVolume(Transform):
    def __call__(self, data):
        return volume(seed=data["number"])


def batches(volumes, num_workers, crop_size, draws=24, batch_size=4):
    slices = SliceDataset(Dataset(volumes), augmentation(crop_size))
    sampler = SliceSampler(slices.data, draws, seed=2)
    sampler.set_epoch(3)
    loader = BackgroundDataLoader(
        slices,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        collate_fn=collate_slices,
    )
    result = list(loader)
    sampler.set_epoch(4)
    return result + list(loader)


@pytest.mark.parametrize("crop_size", [None, 16])
def test_workers_make_the_same_batches(crop_size):
    volumes = [volume(seed=i) for i in range(3)]
    torch.manual_seed(0)
    expected = batches(volumes, 0, crop_size)
    torch.manual_seed(1)
    found = batches(volumes, 2, crop_size)
    assert len(expected) == len(found) == 12
    assert not torch.equal(expected[0]["image"], expected[6]["image"])
    for a, b in zip(expected, found):
        assert a.keys() == b.keys() == {"image", "target"}
        for key in a:
            assert torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key]))


def test_whole_slices_of_different_sizes_are_padded_to_one():
    shapes = [(20, 24, 3), (17, 30, 3), (28, 19, 3)]
    for batch in batches([volume(shape, seed=i) for i, shape in enumerate(shapes)], 0, None, batch_size=8):
        image, target = batch["image"], batch["target"]
        assert type(image) is type(target) is torch.Tensor
        assert image.shape == (8, 2, *target.shape[2:]) and target.shape[:2] == (8, 1)
        assert torch.equal(image[:, :1], target) and torch.equal(image[:, 1:], target)
        sizes = sorted(int((t > 0).sum()) for t in target)
        assert set(sizes) <= {np.prod(s[:2]) for s in shapes}  # nothing is cut off


@pytest.mark.parametrize("sizes", [[(6, 7), (6, 7)], [(6, 7), (9, 7), (6, 4)], [(5, 8), (8, 5)]])
def test_batches_are_those_of_monai(sizes):
    items = [{"image": torch.rand(2, *size), "target": torch.rand(1, *size)} for size in sizes]
    found = collate_slices(items)
    expected = pad_list_data_collate([dict(item) for item in items])
    for key in ("image", "target"):
        assert torch.equal(found[key], torch.as_tensor(expected[key]).as_subclass(torch.Tensor))


class Recorded:
    """Numbers, the third of which may be bad; tells when one has been made."""

    def __init__(self, bad=None):
        self.bad = bad
        self.made = [threading.Event() for _ in range(4)]

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == self.bad:
            raise OSError("volume 2 has gone")
        self.made[index].set()
        return torch.tensor(index)


def test_the_next_batch_is_made_while_one_is_in_use():
    numbers = Recorded()
    batches = iter(BackgroundDataLoader(numbers, batch_size=1))
    for index in range(4):
        assert next(batches).tolist() == [index]
        assert all(made.wait(30) for made in numbers.made[: index + 2])
        assert not any(made.is_set() for made in numbers.made[index + 2 :])  # and no more than that one
    assert next(batches, None) is None


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_slice_that_cannot_be_made_ends_the_training(num_workers):
    batches = iter(BackgroundDataLoader(Recorded(bad=2), batch_size=1, num_workers=num_workers))
    assert [next(batches).tolist(), next(batches).tolist()] == [[0], [1]]
    with pytest.raises(OSError, match="volume 2 has gone"):
        next(batches)


# --- ranks in evaluation


def test_shares_of_ranks():
    for items in (1, 2, 5, 8):
        for ranks in (1, 2, 3, 4):
            shares = [share_of_rank(list(range(items)), ranks, rank) for rank in range(ranks)]
            assert all(shares)  # an empty one would stall the others
            assert set().union(*shares) == set(range(items))
            if items >= ranks:
                assert sorted(chain.from_iterable(shares)) == list(range(items))
                assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_batch_is_shared_equally_or_not_at_all():
    assert [batch_of_rank(4, n) for n in (1, 2, 4)] == [4, 2, 1]
    for batch_size, processes in ((4, 3), (2, 4), (0, 1)):
        with pytest.raises(ValueError, match=f"batch_size {batch_size} must be .* {processes}"):
            batch_of_rank(batch_size, processes)
