"""Volumes on their way in and out: what is refused, where voxels lie, and that training and inference agree."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import DataLoader, MetaTensor, decollate_batch
from monai.transforms import Compose

from glmamba_monai.files import AtomicNibabelWriter, SaveVolumed
from glmamba_monai.inference import simulate
from glmamba_monai.transforms import (
    DataRanged,
    ForegroundSlicesd,
    KSpaceLowResolution,
    LoadVolume,
    LoadVolumed,
    MatchReferenced,
    NameOutputd,
    PairOnGridd,
    SlicesBackd,
)
from glmamba_monai.transforms.volume import foreground, slices_back, slices_last

SHAPE = (24, 28, 6)
CONFIGS = Path(__file__).parent.parent / "bundle" / "configs"


def reoriented(path, codes, out):
    """The NIfTI file with its axes stored along ``codes``, by nibabel; no voxel moves in the world."""
    image = nib.load(path)
    target = nib.orientations.axcodes2ornt(tuple(codes))
    moved = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), target))
    nib.save(moved, out)
    return out


def in_world(data, affine):
    """``(positions (N, 3) in mm, values (N,))``, ordered by position: the volume without its storage."""
    data = np.asarray(data)
    positions = nib.affines.apply_affine(np.asarray(affine), np.indices(data.shape).reshape(3, -1).T)
    order = np.lexsort(np.round(positions, 2).T)
    return positions[order], data.ravel()[order]


def assert_same_in_world(found, expected, atol=1e-3):
    for a, b in zip(in_world(*found), in_world(*expected)):
        np.testing.assert_allclose(a, b, atol=atol)


# --- loading


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32, np.float64])
def test_good_files_are_loaded(tmp_path, make_affine, suffix, dtype):
    data = np.random.default_rng(0).integers(0, 200, SHAPE).astype(dtype)
    path = tmp_path / f"t2{suffix}"
    nib.save(nib.Nifti1Image(data, make_affine()), path)
    for source in (path, str(path)):
        volume = LoadVolume()(source)
        assert isinstance(volume, MetaTensor) and volume.dtype == torch.float32
        np.testing.assert_array_equal(volume[0].numpy(), data)
        np.testing.assert_allclose(volume.affine.numpy(), make_affine(), atol=1e-5)
        assert volume.meta["filename_or_obj"] == str(path)


def test_scaled_integers_are_loaded_in_their_units(tmp_path):
    image = nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4))
    image.header.set_slope_inter(0.5, 10)
    nib.save(image, tmp_path / "t2.nii.gz")
    expected = nib.load(tmp_path / "t2.nii.gz").get_fdata()
    assert expected.max() == 23 * 0.5 + 10
    np.testing.assert_array_equal(LoadVolume()(tmp_path / "t2.nii.gz")[0].numpy(), expected)


def test_tensors_and_arrays_pass_the_same_checks(make_brain):
    array = make_brain()["t2"][None]
    for source in (array, torch.from_numpy(array), MetaTensor(array, affine=2 * np.eye(4)), array.astype(np.float64)):
        volume = LoadVolume()(source)
        assert isinstance(volume, MetaTensor) and volume.dtype == torch.float32
        np.testing.assert_array_equal(volume.numpy(), array)
    assert LoadVolume()(MetaTensor(array, affine=torch.diag(torch.tensor([2.0, 2, 2, 1])))).affine[0, 0] == 2
    for wrong in (array[0], array[..., 0], np.zeros_like(array), np.where(array > 100, np.nan, array)):
        with pytest.raises(ValueError, match="image: "):
            LoadVolume()(wrong)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda a: np.stack([a, a], -1), ["one 3-D volume", "(2, 24, 28, 6)", "single volume"]),
        (lambda a: a[..., 3], ["one 3-D volume", "(1, 24, 28)"]),
        (lambda a: np.where(a == a.max(), np.nan, a), ["1 of 4032 voxels are NaN or infinite", "repair"]),
        (lambda a: np.where(a > 500, np.inf, a), ["voxels are NaN or infinite"]),
        (lambda a: np.where(a > 500, -np.inf, a), ["voxels are NaN or infinite"]),
        (lambda a: np.where(a > 500, 1e300, a.astype(np.float64)), ["voxels are NaN or infinite"]),
        (lambda a: 0 * a, ["every voxel is zero"]),
        (lambda a: (a - a.mean()) / a.std(), ["% of the voxels are clearly below 0", "z-score"]),
        (lambda a: (a + 1j).astype(np.complex64), ["holds complex numbers", "the magnitude"]),
        (lambda a: np.zeros(a.shape, [(c, "u1") for c in "RGB"]), ["such as colours"]),
    ],
    ids=["4-D", "2-D", "NaN", "inf", "-inf", "beyond float32", "zero", "z-score", "complex", "colours"],
)
def test_unusable_volumes_are_named(tmp_path, make_brain, make_volume, change, words):
    path = make_volume(tmp_path / "sub00" / "t2.nii.gz", change(make_brain()["t2"]))
    with pytest.raises(ValueError) as error:
        LoadVolumed("image")({"image": path})
    # MapTransform adds nothing of its own here: the message starts with the file
    assert str(error.value).startswith(f"{path}: ")
    for word in words:
        assert word in str(error.value)


def test_a_little_undershoot_is_no_harm(tmp_path, make_brain, make_volume):
    """As of resampling at edges."""
    brain = make_brain()["t2"]
    path = make_volume(tmp_path / "t2.nii.gz", np.where(brain == 0, -0.02 * brain.max(), brain))
    assert LoadVolume()(path).min() < 0


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_header_that_does_not_say_where_the_volume_lies(tmp_path, make_brain, value):
    path = tmp_path / "t2.nii"
    image = nib.Nifti1Image(make_brain()["t2"], np.eye(4))
    image.header["qform_code"], image.header["sform_code"] = 0, 1
    nib.save(image, path)
    content = bytearray(path.read_bytes())
    content[280:328] = np.full(12, value, "<f4").tobytes()  # srow_x, srow_y, srow_z
    path.write_bytes(content)
    for load in (LoadVolume(), lambda file: simulate(file, tmp_path / "low.nii.gz")):
        with pytest.raises(ValueError, match=r"the affine in its header is .* repair the header") as error:
            load(path)
        assert str(error.value).startswith(f"{path}: ")


def test_an_empty_name_is_not_the_folder_one_is_in():
    with pytest.raises(ValueError, match="found an empty name of a file"):
        LoadVolume()("")


@pytest.mark.parametrize("suffix, cut", [(".nii.gz", 0.5), (".nii.gz", 0.005), (".nii.gz", 0), (".nii", 0.5)])
def test_truncated_files_are_named(tmp_path, make_brain, make_volume, suffix, cut):
    path = make_volume(tmp_path / f"t2{suffix}", make_brain()["t2"])
    content = path.read_bytes()
    path.write_bytes(content[: int(cut * len(content))])
    with pytest.raises(ValueError) as error:
        LoadVolume()(path)
    assert str(error.value).startswith(f"{path}: cannot be read as NIfTI")
    assert "truncated: copy it again" in str(error.value)
    assert "\n" not in str(error.value) and "Traceback" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("notes.nii", "cannot be read as NIfTI"),
        ("notes.nii.gz", "cannot be read as NIfTI"),
        ("notes.txt", "found a name that ends in '.txt', expected NIfTI"),
    ],
)
def test_other_files_are_named(tmp_path, name, words):
    (tmp_path / name).write_text("these are notes, not a volume\n")
    with pytest.raises(ValueError) as error:
        LoadVolume()(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}: {words}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["t2.nii.gz", "t2.nii", "no/such/folder/t2.nii.gz"])
def test_missing_files_are_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=r"there is no such file") as error:
        LoadVolume()(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_load_volumed_and_missing_keys(tmp_path, make_subject_folder):
    files = make_subject_folder(tmp_path, n=1)["sub00"]
    loaded = LoadVolumed(["t1", "t2", "pd"], allow_missing_keys=True)({**files, "subject": "sub00"})
    assert loaded.keys() == {"t1", "t2", "subject"} and loaded["t1"].shape == (1, *SHAPE)
    with pytest.raises(KeyError, match="pd"):
        LoadVolumed("pd")(files)


# --- slices last, and back


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("codes", ["RAS", "LPS", "ASL"])
def test_no_voxel_moves_in_the_world(make_affine, axis, codes):
    data = np.random.default_rng(axis).random((2, 4, 5, 6)).astype(np.float32)
    affine = make_affine((1, 2, 3), codes=codes)
    image = MetaTensor(data, affine=torch.from_numpy(affine), meta={"filename_or_obj": "t2.nii.gz"})
    moved = slices_last(image, axis)
    np.testing.assert_array_equal(moved.numpy(), np.moveaxis(data, axis + 1, -1))
    assert moved.meta["filename_or_obj"] == "t2.nii.gz"
    for channel in range(2):
        assert_same_in_world((moved[channel], moved.affine), (data[channel], affine), atol=1e-6)
    back = slices_back(moved, axis)
    np.testing.assert_array_equal(back.numpy(), data)
    np.testing.assert_array_equal(back.affine.numpy(), affine)
    np.testing.assert_array_equal(image.affine.numpy(), affine)  # the argument is left as it was


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_backd_after_a_data_loader(make_affine, axis):
    image = MetaTensor(torch.rand(1, 4, 5, 6), affine=torch.from_numpy(make_affine()))
    batch = next(iter(DataLoader([{"pred": slices_last(image, axis), "slice_axis": axis}], batch_size=1)))
    back = SlicesBackd("pred")(decollate_batch(batch)[0])["pred"]
    assert torch.equal(back.as_tensor(), image.as_tensor())
    torch.testing.assert_close(back.affine, image.affine)


# --- pairs


def load_pair(files, keys=("target", "reference"), names=("t2", "t1")):
    return LoadVolumed(keys)({key: files[name] for key, name in zip(keys, names)})


@pytest.mark.parametrize("slice_axis, expected", [("auto", 2), (0, 0), ("axial", 2), ("coronal", 1), ("sagittal", 0)])
def test_pair_on_grid(tmp_path, make_subject_folder, slice_axis, expected):
    files = make_subject_folder(tmp_path, n=1)["sub00"]
    data = load_pair(files)
    paired = PairOnGridd(["target", "reference"], slice_axis)(data)
    assert paired["slice_axis"] == expected
    for key, contrast in (("target", "t2"), ("reference", "t1")):
        original = nib.load(files[contrast])
        assert paired[key].shape[-1] == SHAPE[expected]
        assert_same_in_world((paired[key][0], paired[key].affine), (original.get_fdata(), original.affine))


def test_pair_on_different_grids_names_both(tmp_path, make_subject_folder, make_affine):
    a = make_subject_folder(tmp_path / "a", n=1)["sub00"]
    b = make_subject_folder(tmp_path / "b", n=1, affine=make_affine(origin=(0, 0, 0)))["sub00"]
    with pytest.raises(ValueError) as error:
        PairOnGridd(["target", "reference"])(load_pair({"t2": a["t2"], "t1": b["t1"]}))
    assert str(a["t2"]) in str(error.value) and str(b["t1"]) in str(error.value)


def write_low_resolution(files, out, scale=2, axis=2):
    """Simulate the LR of the T2 and write it as float32 NIfTI with nibabel."""
    hr = slices_last(LoadVolume()(files["t2"]), axis)
    low = slices_back(KSpaceLowResolution(scale)(hr), axis)
    nib.save(nib.Nifti1Image(low[0].numpy(), low.affine.numpy()), out)
    return out


@pytest.mark.parametrize("stored", ["LPS", "RAS", "SAR", "IPR", "ALS", "RSP"])
@pytest.mark.parametrize("reference_codes, axis", [("LPS", 2), ("ASL", 1)])
def test_low_resolution_in_another_orientation(
    tmp_path, make_subject_folder, make_affine, stored, reference_codes, axis
):
    """Flipped and permuted storage ends up in the reference's order, with every voxel where it was."""
    spacing = [0.9, 0.9, 0.9]
    spacing[axis] = 3.0
    shape = [24, 28, 20]
    shape[axis] = 6
    affine = make_affine(spacing, codes=reference_codes)
    files = make_subject_folder(tmp_path, n=1, affine=affine, shape=shape)["sub00"]
    plain = write_low_resolution(files, tmp_path / "lr.nii.gz", axis=axis)
    other = reoriented(plain, stored, tmp_path / "other.nii.gz")
    assert nib.aff2axcodes(nib.load(other).affine) == tuple(stored)

    expected, found = (
        MatchReferenced(["image", "reference"])(
            load_pair({"lr": lr, "t1": files["t1"]}, ("image", "reference"), ("lr", "t1"))
        )
        for lr in (plain, other)
    )
    assert found["slice_axis"] == axis
    np.testing.assert_array_equal(found["image"].numpy(), expected["image"].numpy())
    np.testing.assert_allclose(found["image"].affine, expected["image"].affine, atol=1e-4)
    stored_image, reference = nib.load(other), nib.load(files["t1"])
    assert_same_in_world((found["image"][0], found["image"].affine), (stored_image.get_fdata(), stored_image.affine))
    assert_same_in_world((found["reference"][0], found["reference"].affine), (reference.get_fdata(), reference.affine))
    back = SlicesBackd("reference")(found)["reference"]
    np.testing.assert_array_equal(back[0].numpy(), reference.get_fdata(dtype=np.float32))
    np.testing.assert_allclose(back.affine, reference.affine, atol=1e-6)


def test_match_reference_names_both_files(tmp_path, make_subject_folder):
    files = make_subject_folder(tmp_path, n=1)["sub00"]
    lr = write_low_resolution(files, tmp_path / "lr.nii.gz")
    pair = load_pair({"lr": lr, "t1": files["t1"]}, ("image", "reference"), ("lr", "t1"))
    with pytest.raises(ValueError) as error:
        MatchReferenced(["image", "reference"], scale=4)(pair)
    assert str(lr) in str(error.value) and str(files["t1"]) in str(error.value)
    with pytest.raises(ValueError, match="swapped"):
        MatchReferenced(["reference", "image"])(pair)


@pytest.mark.parametrize(
    ("matrix", "scale", "factors"),
    [
        ((24, 28), 2, (2, 2)),
        ((24, 28), [2, 3], (2, 2.8)),
        ((24, 28), 1.5, (1.5, 28 / 19)),
        ((199, 201), 2, (2, 2)),
        ((33, 29), 4, (4, 4)),
        ((24, 28), 1, (1, 1)),
    ],
    ids=str,
)
def test_the_factor_of_a_pair_is_recorded(tmp_path, make_subject_folder, matrix, scale, factors):
    files = make_subject_folder(tmp_path, n=1, shape=(*matrix, 2))["sub00"]
    lr = write_low_resolution(files, tmp_path / "lr.nii.gz", scale)
    pair = load_pair({"lr": lr, "t1": files["t1"]}, ("image", "reference"), ("lr", "t1"))
    for interpolated in (False, True):  # in one file with its reference: nothing tells how much was measured
        if interpolated == (scale == 1):
            found = MatchReferenced(["image", "reference"])({**pair, "interpolated": interpolated})["factor"]
            assert found.shape == (2,) and found.tolist() == pytest.approx(factors)
    if scale == 1:
        found = MatchReferenced(["image", "reference"], scale=1)(pair)["factor"]
        assert found.tolist() == [1, 1]


# --- training and inference


def parse(config, overrides, item):
    parser = ConfigParser()
    parser.read_config(str(CONFIGS / config))
    parser.update(overrides)
    return parser.get_parsed_content(item)


@pytest.mark.parametrize("upsampling", ["zero_fill", "bicubic"])
@pytest.mark.parametrize(
    "scale, shape, axis, stored",
    [
        (2, (24, 28, 6), 2, None),
        (3, (25, 29, 5), 2, "RAS"),
        (4, (31, 6, 26), 1, "SPL"),
        ([1, 2], (24, 28, 6), 2, None),
        ([4, 2], (6, 31, 22), 0, "PSR"),
    ],
)
def test_training_and_inference_give_identical_network_inputs(
    tmp_path, make_subject_folder, make_affine, upsampling, scale, shape, axis, stored
):
    """The transforms of the bundle's own configs, with the LR as a float32 NIfTI file in between."""
    spacing = [0.9, 0.9, 0.9]
    spacing[axis] = 3.0
    files = make_subject_folder(tmp_path, n=1, shape=shape, affine=make_affine(spacing))["sub00"]
    settings = {"scale": scale, "upsampling": upsampling}
    training = Compose(parse("train.json", settings, "train#deterministic_transforms"))
    trained = training({"subject": "sub00", "target": str(files["t2"]), "reference": str(files["t1"])})

    lr = write_low_resolution(files, tmp_path / "lr.nii.gz", scale, axis)
    if stored is not None:
        lr = reoriented(lr, stored, tmp_path / "stored.nii.gz")
    for named in ("auto", scale):
        inference = parse("inference.json", {**settings, "scale": named}, "preprocessing")
        deployed = inference({"subject": "sub00", "image": str(lr), "reference": str(files["t1"])})
        assert deployed["slice_axis"] == trained["slice_axis"] == axis
        assert deployed["image"].shape == (2, *np.delete(shape, axis), shape[axis])
        assert deployed["image"].dtype == trained["image"].dtype == torch.float32
        assert deployed["divisor"] == trained["divisor"]
        assert torch.equal(deployed["image"].as_tensor(), trained["image"].as_tensor())
        np.testing.assert_allclose(deployed["image"].affine, trained["image"].affine, atol=1e-4)


@pytest.mark.parametrize("axis, codes", [(0, "LPS"), (2, "RAS"), (2, "PSR"), (1, "RIP"), (0, "SRA")])
def test_the_way_back_ends_on_the_reference_grid(tmp_path, make_subject_folder, make_affine, axis, codes):
    """inference.json without a network: what goes out is the upsampled LR, in its units, on the reference's grid."""
    shape, spacing = np.array([31, 28, 22]), np.full(3, 0.9)
    shape[axis], spacing[axis] = 6, 3.0
    affine = make_affine(spacing, degrees=(0, 0, 0), codes=codes)
    files = make_subject_folder(tmp_path, n=1, shape=tuple(shape), affine=affine)["sub00"]
    lr = write_low_resolution(files, tmp_path / "lr.nii.gz", 2, axis)
    overrides = {"upsampling": "zero_fill", "output_dir": str(tmp_path / "out")}
    data = parse("inference.json", overrides, "preprocessing")(
        {"subject": "sub00", "image": str(lr), "reference": str(files["t1"])}
    )
    batch = next(iter(DataLoader([data], batch_size=1)))
    batch["pred"] = batch["image"]
    item = parse("inference.json", overrides, "postprocessing")(decollate_batch(batch)[0])
    reference, truth = nib.load(files["t1"]), nib.load(files["t2"]).get_fdata()
    written = nib.load(tmp_path / "out" / "sub00_sr.nii.gz")
    assert written.shape == reference.shape and written.get_data_dtype() == np.float32
    np.testing.assert_allclose(written.affine, reference.affine, atol=1e-4)
    np.testing.assert_array_equal(written.get_fdata(dtype=np.float32), item["pred"][0].numpy())

    def correlation(a, b):
        return np.corrcoef(a.ravel(), b.ravel())[0, 1]

    found = written.get_fdata()
    assert correlation(found, truth) > 0.98
    assert all(correlation(found, np.flip(truth, a)) < 0.95 for a in range(3))
    assert found.mean() == pytest.approx(truth.mean(), rel=0.02)


# --- foreground, data range, names


def test_foreground_is_above_a_twentieth_of_the_high_percentile(make_brain):
    volume = torch.from_numpy(make_brain()["t2"][None])
    expected = volume.numpy() > 0.05 * np.percentile(volume.numpy(), 99.9)
    for form in (volume, MetaTensor(volume), volume.numpy()):
        np.testing.assert_array_equal(np.asarray(foreground(form)), expected)


def stack_with_fractions(fractions, side=20):
    """Slices of which exactly these fractions are bright; the rest is faint noise below the level."""
    volume = torch.rand(1, side, side, len(fractions), generator=torch.Generator().manual_seed(0))
    for i, fraction in enumerate(fractions):
        flat = volume[0, :, :, i].reshape(-1)
        flat[: round(fraction * side**2)] = 100.0
        volume[0, :, :, i] = flat.reshape(side, side)
    return volume


def test_slices_with_little_foreground_are_dropped():
    source = MetaTensor(stack_with_fractions([0, 0.0475, 0.05, 0.5, 0.04, 1.0, 0]))
    other = torch.arange(7.0).expand(2, 20, 20, 7)
    data = ForegroundSlicesd(["target", "image"], "target")({"target": source, "image": other, "subject": "s"})
    assert data["image"][0, 0, 0].tolist() == [2, 3, 5]
    np.testing.assert_array_equal(data["target"].numpy(), source.numpy()[..., [2, 3, 5]])
    assert data["subject"] == "s"
    only_image = ForegroundSlicesd("image", "target")({"target": source, "image": other})
    assert only_image["image"].shape[-1] == 3 and only_image["target"].shape[-1] == 7


@pytest.mark.parametrize("max_slices", [1, 2, 3, 4, 9, 10, 11, None])
def test_max_slices_are_spread_evenly(max_slices):
    source = stack_with_fractions([0] + [0.5] * 10 + [0])
    data = {"target": source, "image": torch.arange(12.0).expand(2, 20, 20, 12)}
    kept = ForegroundSlicesd(["image"], "target", max_slices)(data)["image"][0, 0, 0].tolist()
    assert len(kept) == min(max_slices or 10, 10) == len(set(kept)) and kept == sorted(kept)
    assert set(kept) <= set(range(1, 11))
    if len(kept) > 1:
        assert kept[0] == 1 and kept[-1] == 10
        assert np.ptp(np.diff(kept)) <= 1


def test_a_volume_without_foreground_slices_is_named():
    source = MetaTensor(stack_with_fractions([0, 0.02, 0.04]), meta={"filename_or_obj": "sub00/t2.nii.gz"})
    with pytest.raises(ValueError, match=r"sub00/t2\.nii\.gz: no slice has 5% foreground \(the fullest has 4\.0%\)"):
        ForegroundSlicesd("target", "target")({"target": source})


def test_no_slices_at_all_are_refused():
    with pytest.raises(ValueError, match="max_slices: 0 found, at least 1 expected, or None for all"):
        ForegroundSlicesd("target", "target", 0)


def test_of_several_sources_each_must_have_foreground():
    first, second = (stack_with_fractions(f) for f in ([0.5, 0.5, 0.04, 0.5], [0.5, 0.04, 0.5, 0.06]))
    data = {"a": first, "b": 100 * second, "image": torch.arange(4.0).expand(1, 20, 20, 4)}
    assert ForegroundSlicesd("image", ["a", "b"])(data)["image"][0, 0, 0].tolist() == [0, 3]
    with pytest.raises(ValueError, match=r"a and b: no slice has 5% foreground \(the fullest has 4\.0%\)"):
        ForegroundSlicesd("image", ["a", "b"])({key: value[..., 1:3] for key, value in data.items()})


def test_data_range_is_the_maximum_of_the_volume(make_brain):
    volume = MetaTensor(make_brain()["t2"][None])
    data = DataRanged("target", "data_range")({"target": volume})
    assert type(data["data_range"]) is float and data["data_range"] == volume.numpy().max()


def test_results_are_saved_under_the_name_of_the_subject(tmp_path):
    pred = MetaTensor(torch.rand(1, 4, 5, 6), meta={"filename_or_obj": "/data/sub.01/t2.nii.gz"})
    named = NameOutputd("pred", "subject")({"pred": pred, "subject": "sub.01"})["pred"]
    assert named.meta["filename_or_obj"] == "sub.01.nii.gz"
    save = SaveVolumed("pred", output_dir=tmp_path, output_postfix="sr", separate_folder=False)
    for subject in ("site1/01", "site2/01"):
        save(NameOutputd("pred", "subject")({"pred": pred, "subject": subject}))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["site1_01_sr.nii.gz", "site2_01_sr.nii.gz"]


def test_a_single_slice_goes_all_the_way(tmp_path, make_subject_folder):
    files = make_subject_folder(tmp_path, n=1, shape=(24, 28, 1))["sub00"]
    lr = write_low_resolution(files, tmp_path / "lr.nii.gz")
    data = MatchReferenced(["image", "reference"])(
        load_pair({"lr": lr, "t1": files["t1"]}, ("image", "reference"), ("lr", "t1"))
    )
    writer = AtomicNibabelWriter()
    writer.set_data_array(SlicesBackd("reference")(data)["reference"])
    writer.set_metadata({"affine": data["reference"].affine}, resample=False)
    writer.write(tmp_path / "out.nii.gz")
    assert nib.load(tmp_path / "out.nii.gz").shape == (24, 28, 1)
    assert LoadVolume()(tmp_path / "out.nii.gz").shape == (1, 24, 28, 1)
