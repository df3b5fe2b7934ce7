"""Registration against moves that are known, made by SciPy in our world coordinates."""

from __future__ import annotations

import json
import logging
from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose
from PIL import Image
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from glmamba_monai.data import ContrastVolume
from glmamba_monai.data.phantom import make_subject
from glmamba_monai.registration import Registration, apply, read_transform, register
from glmamba_monai.transforms import KSpaceLowResolution, LoadVolumed, MatchReferenced, RegisterReferenced
from glmamba_monai.transforms.volume import find_move, foreground

CONFIGS = Path(__file__).parent.parent / "bundle" / "configs"
SPACING = 2.5


@cache
def phantom(seed=3):
    """T1 and T2 of a small phantom on its own RAS grid, ``(1, X, Y, Z)``."""
    images = make_subject(seed, spacing=SPACING)
    return {
        name: MetaTensor(
            torch.from_numpy(images[name].get_fdata(dtype=np.float32))[None],
            affine=torch.from_numpy(images[name].affine),
        )
        for name in ("t1", "t2")
    }


def head_points(volume):
    """World coordinates (N, 3) of points in the head."""
    return nib.affines.apply_affine(volume.affine.numpy(), np.argwhere(foreground(volume)[0].numpy())[::37])


def rigid(millimetres, degrees, centre, seed=0):
    """World matrix (4, 4): a turn about a random axis through ``centre``, then a shift in a random direction."""
    random = np.random.default_rng(seed)
    axis, shift = random.normal(size=(2, 3))
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_rotvec(np.deg2rad(degrees) * axis / np.linalg.norm(axis)).as_matrix()
    matrix[:3, 3] = centre - matrix[:3, :3] @ centre + millimetres * shift / np.linalg.norm(shift)
    return matrix


def resampled(volume, matrix, affine=None, shape=None):
    """The volume moved by a world matrix and sampled on a grid, by SciPy; its own grid where none is given."""
    affine = volume.affine.numpy() if affine is None else affine
    shape = tuple(volume.shape[1:]) if shape is None else shape
    voxels = np.linalg.inv(volume.affine.numpy()) @ np.linalg.inv(matrix) @ affine
    at = nib.affines.apply_affine(voxels, np.indices(shape).reshape(3, -1).T).T
    values = map_coordinates(volume[0].numpy().astype(np.float64), at, order=3, mode="grid-constant")
    values = np.maximum(values, 0).reshape(1, *shape).astype(np.float32)
    return MetaTensor(torch.from_numpy(values), affine=torch.from_numpy(np.asarray(affine, dtype=np.float64)))


def centred(affine, shape, centre):
    """The affine with its origin such that the grid's middle lies at ``centre``."""
    affine = affine.copy()
    affine[:3, 3] = centre - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def errors(found, truth, points):
    """How far two world matrices take the same points apart, in mm."""
    return np.linalg.norm(nib.affines.apply_affine(found, points) - nib.affines.apply_affine(truth, points), axis=1)


def in_head(moving, fixed, **options) -> Registration:
    return register(moving, fixed, foreground(moving), foreground(fixed), **options)


@pytest.mark.parametrize("millimetres, degrees, seed", [(2, 1, 0), (10, 0, 1), (0, 10, 2), (10, 10, 3), (10, 10, 4)])
def test_a_known_move_is_found_between_contrasts(millimetres, degrees, seed):
    t1, t2 = phantom()["t1"], phantom()["t2"]
    points = head_points(t1)
    truth = rigid(millimetres, degrees, points.mean(axis=0), seed)
    found = in_head(resampled(t1, truth), t2)
    assert found.used and not found.failed and found.after > found.before
    assert np.median(errors(found.matrix @ truth, np.eye(4), points)) <= 0.5
    assert np.median(errors(truth, np.eye(4), points)) == pytest.approx(found.move, abs=0.7)
    assert found.degrees == pytest.approx(degrees, abs=0.7)


@pytest.mark.parametrize(
    "spacing, codes, degrees",
    [
        ((2.0, 2.0, 5.0), "LPS", (0, 0, 0)),
        ((2.5, 2.5, 2.5), "RAS", (20, -15, 10)),
        ((5.0, 2.0, 2.5), "PIR", (10, 5, -30)),
    ],
)
def test_every_grid_has_its_place_in_the_world(make_affine, spacing, codes, degrees):
    """The moving volume on a grid that is mirrored, oblique or coarse; the fixed one on the phantom's own."""
    t1, t2 = phantom()["t1"], phantom()["t2"]
    points = head_points(t1)
    shape = tuple(int(n) for n in np.ceil(260 / np.array(spacing)))
    affine = centred(make_affine(spacing, degrees, codes=codes), shape, points.mean(axis=0))
    truth = rigid(6, 5, points.mean(axis=0), 5)
    moved = resampled(t1, truth, affine, shape)
    found = in_head(moved, t2)
    assert np.median(errors(found.matrix @ truth, np.eye(4), points)) <= 0.5
    back = in_head(t2, moved)  # either may be the one that moves
    assert np.median(errors(back.matrix, truth, points)) <= 0.5


def test_a_low_resolution_target_is_enough():
    t1, t2 = phantom()["t1"], phantom()["t2"]
    points = head_points(t1)
    truth = rigid(5, 4, points.mean(axis=0), 6)
    found = in_head(resampled(t1, truth), KSpaceLowResolution(2)(t2))
    assert found.used and np.median(errors(found.matrix @ truth, np.eye(4), points)) <= 0.5


def test_a_slab_thinner_than_the_moves_that_are_compared():
    """4 mm further on no point of it lies in the other volume, which SimpleITK takes for an error."""
    t1, t2 = (
        MetaTensor(volume[..., 20:24].as_tensor(), affine=volume.affine)
        for volume in (phantom()["t1"], phantom()["t2"])
    )
    for volume in (t1, t2):
        volume.affine = torch.from_numpy(volume.affine.numpy() @ np.diag([1, 1, 0.4, 1]))  # four slices of 1 mm
    found = register(t1, t2)
    assert isinstance(found, Registration) and np.isfinite([found.before, found.after]).all()


def test_the_centres_of_mass_are_a_start_where_the_headers_are_wrong():
    t1, t2 = phantom()["t1"], phantom()["t2"]
    truth = np.eye(4)
    truth[:3, 3] = (20, -15, 10)
    astray = MetaTensor(t1.as_tensor(), affine=torch.from_numpy(truth) @ t1.affine)
    found = in_head(astray, t2, start="centre")
    assert found.used and np.median(errors(found.matrix @ truth, np.eye(4), head_points(t1))) <= 0.5


def test_what_lies_right_stays(caplog):
    t1, t2 = phantom()["t1"], phantom()["t2"]
    found = in_head(t1, t2)
    assert not found.used and not found.failed
    np.testing.assert_array_equal(found.matrix, np.eye(4))
    assert found.move < 0.25
    with caplog.at_level(logging.WARNING):
        assert RegisterReferenced(["t2", "t1"])({"t1": t1, "t2": t2})["t1"] is t1
    assert not caplog.records


def test_what_does_not_fit_stays_and_is_told(caplog):
    t2 = phantom()["t2"]
    noise = MetaTensor(torch.rand(t2.shape, generator=torch.Generator().manual_seed(0)), affine=t2.affine)
    noise.meta["filename_or_obj"] = "noise.nii.gz"
    with caplog.at_level(logging.WARNING):
        result = RegisterReferenced(["t2", "noise"])({"t2": t2, "noise": noise})
    assert result["noise"] is noise
    assert len(caplog.records) == 1 and "noise.nii.gz onto t2" in caplog.text


def test_another_head_stays_and_is_told():
    t1, t2 = phantom(4)["t1"], phantom()["t2"]
    found = in_head(MetaTensor(t1.as_tensor().flip(2), affine=t1.affine), t2)  # one template: turned, to be another
    assert found.failed and not found.used
    np.testing.assert_array_equal(found.matrix, np.eye(4))


def test_volumes_without_a_point_in_common_are_told():
    t1, t2 = phantom()["t1"], phantom()["t2"]
    away = torch.eye(4, dtype=torch.float64)
    away[0, 3] = 1000
    found = in_head(MetaTensor(t1.as_tensor(), affine=away @ t1.affine), t2)
    assert found.failed and not found.used


def test_an_implausible_move_is_not_made():
    t1, t2 = phantom()["t1"], phantom()["t2"]
    shape = tuple(n + 40 for n in t1.shape[1:])
    centre = head_points(t1).mean(axis=0)
    truth = rigid(0, 25, centre, 2)
    found = in_head(resampled(t1, truth, centred(t1.affine.numpy(), shape, centre), shape), t2)
    assert found.failed and not found.used and found.degrees > 20


def test_the_same_volumes_give_the_same_move():
    t1, t2 = phantom()["t1"], phantom()["t2"]
    moved = resampled(t1, rigid(3, 2, np.zeros(3), 1))
    first, second = in_head(moved, t2), in_head(moved, t2)
    assert first.used
    np.testing.assert_array_equal(first.matrix, second.matrix)
    assert (first.before, first.after) == (second.before, second.after)


@pytest.mark.parametrize("codes, degrees", [("RAS", (0, 0, 0)), ("LPS", (8, 0, 5)), ("SPL", (-20, 10, 30))])
def test_a_volume_is_moved_as_scipy_moves_it(make_affine, codes, degrees):
    random = np.random.default_rng(0)
    data = torch.from_numpy(random.uniform(1, 2, size=(1, 14, 12, 10)).astype(np.float32))
    volume = MetaTensor(data, affine=torch.from_numpy(make_affine((1.0, 1.5, 2.0), degrees, codes=codes)))
    volume.meta["filename_or_obj"] = "t1.nii.gz"
    matrix = rigid(0.7, 3, volume.affine.numpy()[:3, 3], 8)
    moved = apply(volume, matrix)
    assert moved.dtype == torch.float32 and moved.shape == volume.shape
    assert moved.meta["filename_or_obj"] == "t1.nii.gz"
    np.testing.assert_array_equal(moved.affine, volume.affine)
    voxels = np.linalg.inv(volume.affine.numpy()) @ np.linalg.inv(matrix) @ volume.affine.numpy()
    at = nib.affines.apply_affine(voxels, np.indices(data.shape[1:]).reshape(3, -1).T).T
    expected = map_coordinates(data[0].double().numpy(), at, order=3, mode="mirror").reshape(data.shape)
    inside = np.all((at >= 0) & (at <= np.array(data.shape[1:])[:, None] - 1), axis=0).reshape(data.shape)
    assert inside.mean() > 0.4
    np.testing.assert_allclose(moved.numpy()[inside], expected[inside], atol=1e-4)
    outside = np.any((at < -0.6) | (at > np.array(data.shape[1:])[:, None] - 0.4), axis=0).reshape(data.shape)
    assert outside.any() and not moved.numpy()[outside].any()


def test_between_two_slices_the_way_is_straight():
    """ITK's splines read beyond the two, whatever lies there."""
    data = torch.rand(1, 12, 10, 2) + 1
    volume = MetaTensor(data, affine=torch.diag(torch.tensor([1.0, 1.0, 3.0, 1.0], dtype=torch.float64)))
    matrix = np.eye(4)
    matrix[:3, 3] = 1, 0, 0.9  # a pixel, and 0.3 of the way between the slices
    moved = apply(volume, matrix).as_tensor()
    expected = 0.7 * data[:, :-1, :, 1] + 0.3 * data[:, :-1, :, 0]
    assert torch.allclose(moved[:, 1:, :, 1], expected, atol=1e-5) and not moved[:, 0].any()


def test_a_turn_that_is_far_for_one_session_is_asked_about(caplog):
    t1 = phantom()["t1"]
    t2, centre = phantom()["t2"], head_points(t1).mean(axis=0)
    for degrees, asked in ((8, True), (3, False)):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            found = find_move(resampled(t1, rigid(0, degrees, centre)), t2, True, ("T1", "T2"))
        assert found.used and found.doubtful == asked and ("are both of one patient?" in caplog.text) == asked
        assert any(record.levelno == logging.WARNING for record in caplog.records) == asked


def test_splines_do_not_fall_below_zero_where_the_volume_does_not():
    step = torch.zeros(1, 16, 16, 16)
    step[:, :8] = 100
    half = np.eye(4)
    half[0, 3] = 0.5
    volume = MetaTensor(step, affine=torch.eye(4, dtype=torch.float64))
    assert apply(volume, half).min() == 0
    assert apply(volume - 50, half).min() < -50  # of a volume with negative values they are left as they are
    assert apply(volume.to(torch.int16), half).dtype == torch.int16


def test_a_volume_is_brought_onto_another_grid():
    volume = phantom()["t1"]
    like = KSpaceLowResolution(2)(phantom()["t2"])
    found = apply(volume, np.eye(4), like)
    assert found.shape == like.shape
    np.testing.assert_array_equal(found.affine, like.affine)
    expected = resampled(volume, np.eye(4), like.affine.numpy(), tuple(like.shape[1:]))
    np.testing.assert_allclose(found.numpy()[:, 2:-2, 2:-2, 2:-2], expected.numpy()[:, 2:-2, 2:-2, 2:-2], atol=0.5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"start": "guess"}, "start must be one of identity, centre, got 'guess'"),
        ({"moving_mask": torch.zeros(1, 2, 2, 2)}, "moving_mask: expected some true voxels and the shape"),
        ({"fixed": MetaTensor(torch.ones(2, 4, 4, 4))}, "fixed: expected one 3-D volume"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        register(**{"moving": phantom()["t1"], "fixed": phantom()["t2"], **change})


@pytest.fixture
def files(tmp_path):
    """A subject whose T1 lies 4 mm off its T2, as files, and the world matrix by which it was moved."""
    t1, t2 = phantom()["t1"], phantom()["t2"]
    truth = rigid(4, 2, head_points(t1).mean(axis=0), 7)
    for name, volume in (("t1", resampled(t1, truth)), ("t2", t2), ("low", KSpaceLowResolution(2)(t2))):
        nib.save(nib.Nifti1Image(volume[0].numpy(), volume.affine.numpy()), tmp_path / f"{name}.nii.gz")
    return {name: str(tmp_path / f"{name}.nii.gz") for name in ("t1", "t2", "low")}


def misfit(found, expected):
    """Mean difference in the head, in units of its mean."""
    found, expected = (np.asarray(v, dtype=np.float64) for v in (found, expected))
    head = expected > 0.05 * np.percentile(expected, 99.9)
    scaled = found * (expected[head].mean() / found[head].mean())
    return np.abs(scaled - expected)[head].mean() / expected[head].mean()


@pytest.mark.parametrize("config, key", [("train.json", "target"), ("inference.json", "image")])
def test_the_configs_register_when_asked(files, config, key):
    parser = ConfigParser()
    parser.read_config(CONFIGS / config)
    transforms = "train#deterministic_transforms" if config == "train.json" else "preprocessing#transforms"
    item = {"subject": "a", key: files["t2" if key == "target" else "low"], "reference": files["t1"]}
    references = {}
    for wanted in (False, True):
        parser["register"] = wanted
        parser.parse(reset=True)
        references[wanted] = Compose(parser.get_parsed_content(transforms))(item)["image"][1].numpy()
    expected = phantom()["t1"][0].numpy()
    assert misfit(references[False], expected) > 0.1
    assert misfit(references[True], expected) < 0.25 * misfit(references[False], expected)


def test_all_contrasts_of_a_volume_are_registered_to_the_first(files):
    item = {"subject": "a", "contrasts": ["t2", "t1"], "files": [files["t2"], files["t1"]], "slice_axis": 2}
    apart, together = (ContrastVolume(register=wanted)(item)["images"] for wanted in (False, True))
    # Outside of the brain both are zero; where it lies on itself, nothing of the one is outside of the other.
    outside = [((images[0] == 0) & (images[1] > 0.1)).float().mean() for images in (apart, together)]
    assert outside[0] > 0.005 and outside[1] < 0.2 * outside[0]


# --- deployment: what is looked for, and what is kept


def stretched(volume, factor):
    """The volume stretched by a factor along x about the middle of its head, and the world matrix of that."""
    centre = head_points(volume).mean(axis=0)
    matrix = nib.affines.from_matvec(np.diag([factor, 1, 1]), [(1 - factor) * centre[0], 0, 0])
    return resampled(volume, matrix), matrix


def test_an_affine_move_is_taken_where_it_is_better():
    t1, t2 = phantom()["t1"], phantom()["t2"]
    points = head_points(t1)
    moved, truth = stretched(t1, 1.05)
    found = in_head(moved, t2, affine=True)
    assert found.kind == "affine" and found.used
    assert np.median(errors(found.matrix @ truth, np.eye(4), points)) <= 0.5
    truth = rigid(4, 3, points.mean(axis=0), 2)
    assert in_head(resampled(t1, truth), t2, affine=True).kind == "rigid"


def matched(files, folder, **options):
    data = LoadVolumed(["image", "reference"])({"subject": "a", "image": files["low"], "reference": files["t1"]})
    before = set(folder.iterdir())
    matched = MatchReferenced(["image", "reference"], record=str(folder / "{subject}_reg"), **options)(data)
    return matched, sorted(path.name for path in set(folder.iterdir()) - before)


def test_what_was_found_is_kept(tmp_path, files, caplog):
    caplog.set_level(logging.WARNING)
    found, kept = matched(files, tmp_path, register="auto")
    assert kept == ["a_reg.json", "a_reg.png", "a_reg.tfm"]
    facts = json.loads((tmp_path / "a_reg.json").read_text())
    assert facts["used"] and facts["after"] > facts["before"] and facts["move"] == pytest.approx(4, abs=0.7)
    assert facts["moving"] == "t1.nii.gz" and facts["transform"] == "a_reg.tfm" and facts["overlay"] == "a_reg.png"
    t1 = phantom()["t1"]
    points = head_points(t1)
    matrix = read_transform(tmp_path / "a_reg.tfm")
    truth = rigid(4, 2, points.mean(axis=0), 7)
    assert np.median(errors(matrix @ truth, np.eye(4), points)) <= 0.5
    assert misfit(found["reference"][0].numpy(), t1[0].numpy()) < 0.1
    with Image.open(tmp_path / "a_reg.png") as picture:
        assert picture.mode == "RGB" and min(picture.size) > 300
    assert "registered" in caplog.text and "t1.nii.gz onto " in caplog.text


def test_the_transform_is_the_one_that_itk_applies(tmp_path, files):
    found, _ = matched(files, tmp_path, register=True)
    moving, fixed = sitk.ReadImage(files["t1"], sitk.sitkFloat32), sitk.ReadImage(files["t2"], sitk.sitkFloat32)
    moved = sitk.Resample(moving, fixed, sitk.ReadTransform(str(tmp_path / "a_reg.tfm")), sitk.sitkBSpline, 0.0)
    expected = np.maximum(sitk.GetArrayFromImage(moved).T, 0)
    np.testing.assert_allclose(found["reference"][0].numpy(), expected, atol=1e-2 * expected.max())


def test_a_pair_that_fits_is_left_as_it_is(tmp_path, files, caplog):
    nib.save(nib.Nifti1Image(phantom()["t1"][0].numpy(), phantom()["t1"].affine.numpy()), files["t1"])
    caplog.set_level(logging.WARNING)
    looked, kept = matched(files, tmp_path, register="auto")
    assert not caplog.records and kept == ["a_reg.json"]
    assert not json.loads((tmp_path / "a_reg.json").read_text())["used"]
    matched(files, tmp_path, register=True)
    assert "not registered" in caplog.text  # who has asked is told
    unlooked, kept = matched(files, tmp_path, register=False)
    assert kept == [] and torch.equal(looked["reference"].as_tensor(), unlooked["reference"].as_tensor())
    with pytest.raises(ValueError, match="register must be one of False, True, affine, auto, got 'rigid'"):
        matched(files, tmp_path, register="rigid")


def test_a_moved_reference_on_another_grid_is_registered_and_resampled(tmp_path, files, make_affine):
    t1 = phantom()["t1"]
    points = head_points(t1)
    shape = (100, 105, 110)
    affine = centred(make_affine((2.5, 2.5, 2.5), (6, -4, 5), codes="PSR"), shape, points.mean(axis=0))
    moved = resampled(t1, rigid(5, 3, points.mean(axis=0), 9), affine, shape)
    nib.save(nib.Nifti1Image(moved[0].numpy(), affine), files["t1"])
    results = {mode: matched(files, tmp_path, register=mode)[0]["reference"] for mode in ("auto", False)}
    assert results["auto"].shape == t1.shape
    np.testing.assert_allclose(results["auto"].affine, t1.affine, atol=1e-4)
    expected = t1[0].numpy()
    assert misfit(results["auto"][0].numpy(), expected) < 0.5 * misfit(results[False][0].numpy(), expected)


@pytest.mark.parametrize("content, words", [("text", "cannot be read as a transform"), (None, "there is no such file")])
def test_a_file_that_is_no_transform_is_named(tmp_path, content, words):
    path = tmp_path / "x.tfm"
    if content is not None:
        path.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"x\.tfm: {words}"):
        read_transform(path)
