"""A reference of any orientation, spacing and field of view, brought onto the slices of the low-resolution volume."""

from __future__ import annotations

import logging

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader, MetaTensor, decollate_batch

from glmamba_monai import simulate, super_resolve
from glmamba_monai.networks import build_network
from glmamba_monai.registration import average
from glmamba_monai.transforms import MatchReferenced, SlicesBackd
from glmamba_monai.transforms.grid import plan_common_grid, sampling_along

SHAPE = (20, 22, 8)


def corners(shape, affine):
    ends = np.array(np.meshgrid(*([-0.5, n - 0.5] for n in shape), indexing="ij")).reshape(3, -1).T
    return nib.affines.apply_affine(affine, ends)


def centred(affine, shape, centre):
    """The affine with its origin such that the grid's middle lies at ``centre``."""
    affine = affine.copy()
    affine[:3, 3] = centre - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def middle(shape, affine):
    return nib.affines.apply_affine(affine, (np.array(shape) - 1) / 2)


def around(low_affine, reference_affine, size=64, shape=SHAPE):
    """A low-resolution grid, and one of ``size`` voxels a side about its middle."""
    affine = centred(reference_affine, (size,) * 3, middle(shape, low_affine))
    return (shape, low_affine, "lr.nii.gz"), ((size,) * 3, affine, "t1.nii.gz")


def scene(points):
    """A smooth intensity at world points (..., 3)."""
    x, y, z = np.moveaxis(np.asarray(points), -1, 0)
    return 500 + 100 * np.sin(x / 7 + 1) * np.cos(y / 9) + 60 * np.sin(z / 8 + x / 20)


def sampled(shape, affine, function=scene):
    values = function(nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1)))
    return MetaTensor(torch.from_numpy(values[None].astype(np.float32)), affine=torch.from_numpy(affine))


# --- the grid


@pytest.mark.parametrize("codes, degrees", [("RAS", (0, 0, 0)), ("PSR", (0, 0, 0)), ("SLA", (15, -10, 8))])
@pytest.mark.parametrize("low_codes, axis", [("LPS", 2), ("SAR", 0), ("ASL", 1)])
def test_the_grid_has_the_target_s_slices_and_field_of_view(make_affine, codes, degrees, low_codes, axis):
    spacing, shape = [2.0, 2.0, 2.0], list(np.roll(SHAPE, axis - 2))
    spacing[axis] = 5.0
    low, reference = around(
        make_affine(spacing, codes=low_codes), make_affine((1, 1, 1), degrees, codes=codes), 96, shape
    )
    plan = plan_common_grid(low, reference)
    expected = [n if a == axis else 2 * n for a, n in enumerate(shape)]
    assert plan.slice_axis == axis and list(plan.shape) == expected and plan.slices == (0, shape[axis])
    in_plane = [n for a, n in enumerate(expected) if a != axis]
    assert plan.common == (0, in_plane[0], 0, in_plane[1]) and plan.notes == []
    np.testing.assert_allclose(corners(plan.shape, plan.affine), corners(shape, low[1]), atol=1e-6)


def test_spacing_is_that_along_the_other_s_axes(make_affine):
    plain, other = make_affine((1, 2, 4), (0, 0, 0), codes="RAS"), make_affine((3, 3, 3), (0, 0, 0), codes="SRA")
    np.testing.assert_allclose(sampling_along(plain, other), (4, 1, 2))
    turned = make_affine((1, 1, 5), (0, 0, 45), codes="RAS")
    np.testing.assert_allclose(sampling_along(turned, plain), (1, 1, 5))
    tilted = make_affine((1, 1, 5), (90, 0, 0), codes="RAS")
    np.testing.assert_allclose(sampling_along(tilted, plain), (1, 5, 1))


@pytest.mark.parametrize(
    "pixel, scale, matrix, words",
    [
        (0.5, "auto", (80, 88), []),
        (0.4, "auto", (80, 88), ["5 x 5 times finer", "2 to 4: 4 x 4 is used"]),
        (0.8, "auto", (50, 55), []),
        (1.3, "auto", (40, 44), ["1.54 x 1.54 times finer", "2 x 2 is used"]),
        (0.5, 2, (40, 44), []),
        (0.5, [2, 3], (40, 66), []),
    ],
)
def test_the_factor_is_one_that_networks_are_trained_for(make_affine, pixel, scale, matrix, words):
    low, reference = around(make_affine((2, 2, 5)), make_affine((pixel, pixel, 1)), 140)
    plan = plan_common_grid(low, reference, scale, limits=(2, 4))
    assert plan.shape == (*matrix, 8)
    assert len(plan.notes) == bool(words) and all(word in plan.notes[0] for word in words)


def test_pixels_become_square(make_affine):
    low, reference = around(make_affine((2, 3, 5)), make_affine((1, 1, 1)), 100)
    plan = plan_common_grid(low, reference)
    assert plan.shape == (40, 66, 8)
    np.testing.assert_allclose(np.linalg.norm(plan.affine[:3, :3], axis=0), (1, 1, 5))


def test_the_slice_axis_is_where_the_spacing_agrees(make_affine):
    """At 4x, isotropic voxels are thicker in plane than across, and nothing else tells the slices."""
    low, reference = around(make_affine((1, 4, 4)), make_affine((1, 1, 1)), 90)
    assert plan_common_grid(low, reference).slice_axis == 0
    assert plan_common_grid(low, reference, slice_axis="coronal").slice_axis == 1


@pytest.mark.parametrize(
    "spacing, words", [((1, 1, 4), ["slices are 4 mm apart"]), ((1, 5, 1), ["voxels are up to 5 mm apart"])]
)
def test_thick_slices_of_the_reference_are_told(make_affine, spacing, words):
    low, reference = around(make_affine((2, 2, 5)), make_affine(spacing), 100)
    notes = plan_common_grid(low, reference).notes
    assert len(notes) == len(words) and all(word in note for word, note in zip(words, notes))


def test_what_the_reference_does_not_cover_is_left_out(make_affine):
    affine = make_affine((2, 2, 5), (0, 0, 0), codes="RAS")
    fine = affine @ np.diag([0.5, 0.5, 0.2, 1])
    fine[:3, 3] = affine[:3, 3] + [3.5, -0.5, 8]  # the first two rows and slices end before it begins
    plan = plan_common_grid((SHAPE, affine, "lr"), ((60, 30, 60), fine, "t1"))
    assert plan.slices == (2, 8) and plan.shape == (40, 44, 6) and plan.common == (4, 40, 0, 30)
    np.testing.assert_allclose(nib.affines.apply_affine(plan.affine, (0, 0, 0)), affine[:3, 3] + [-0.5, -0.5, 10])
    assert "6 of 8 slices are kept, from number 3 on" in plan.notes[0]
    assert "36 x 30 of 40 x 44 pixels" in plan.notes[1]


def test_too_little_in_common_is_refused(make_affine):
    low, (shape, affine, name) = around(make_affine((2, 2, 5)), make_affine((1, 1, 1)), 30)
    affine[:3, 3] += 15
    with pytest.raises(ValueError, match=r"t1\.nii\.gz covers \d+% of the field of view of lr\.nii\.gz, expected"):
        plan_common_grid(low, (shape, affine, name))


def test_a_reference_that_is_no_finer_is_refused(make_affine):
    low, reference = around(make_affine((1, 1, 5)), make_affine((1, 1, 1)), 64)
    with pytest.raises(ValueError, match=r"hardly coarser than the 1 mm of t1\.nii\.gz.*swapped"):
        plan_common_grid(low, reference)
    assert plan_common_grid(low, reference, 1).shape == SHAPE  # interpolated by the scanner, as the user says


# --- the voxels


@pytest.mark.parametrize("codes, degrees", [("RAS", (0, 0, 0)), ("PSR", (20, -10, 15))])
def test_a_thick_slice_shows_the_mean_of_the_reference_over_it(make_affine, codes, degrees):
    low, (shape, affine, _) = around(make_affine((2, 2, 4)), make_affine((1, 1, 1), degrees, codes=codes), 80)
    plan = plan_common_grid(low, (shape, affine, "t1"))
    like = MetaTensor(torch.zeros(1, *plan.shape), affine=torch.from_numpy(plan.affine))
    parts = plan.affine @ nib.affines.from_matvec(np.diag([1, 1, 1 / 16]), (0, 0, -0.5 + 1 / 32))
    profile = sampled((*plan.shape[:2], 16 * plan.shape[2]), parts)[0].numpy()
    expected = profile.reshape(*plan.shape, 16).mean(-1)
    found = average(sampled(shape, affine), np.eye(4), like)
    np.testing.assert_allclose(found[0].numpy(), expected, atol=0.6)
    np.testing.assert_array_equal(found.affine, like.affine)
    # Of a pattern finer than a slice, nothing is left; single points would show it at full strength.
    normal = plan.affine[:3, 2] / 4
    stripes = sampled(shape, affine, lambda points: 100 + 50 * np.cos(2 * np.pi * (points @ normal) / 4))
    assert np.abs(average(stripes, np.eye(4), like)[0].numpy() - 100).max() < 5


def test_a_move_and_the_grid_take_one_interpolation(make_affine):
    low, (shape, affine, _) = around(make_affine((2, 2, 4)), make_affine((1, 1, 1)), 80)
    plan = plan_common_grid(low, (shape, affine, "t1"))
    like = MetaTensor(torch.zeros(1, *plan.shape), affine=torch.from_numpy(plan.affine))
    move = nib.affines.from_matvec(np.eye(3), (1.3, -0.7, 2.1))
    moved = sampled(shape, np.linalg.inv(move) @ affine)
    found = average(MetaTensor(moved.as_tensor(), affine=torch.from_numpy(np.linalg.inv(move) @ affine)), move, like)
    straight = average(MetaTensor(moved.as_tensor(), affine=torch.from_numpy(affine)), np.eye(4), like)
    np.testing.assert_allclose(found.numpy(), straight.numpy(), atol=1e-2)


# --- pairs


@pytest.fixture
def pair(tmp_path, make_subject_folder, make_affine):
    """Files of a pair that fits, ``lr`` and ``t1``, and the T2 that the first was made of."""
    shape, affine = (28, 32, 6), make_affine((0.9, 0.9, 3.0))
    files = make_subject_folder(tmp_path / "data", n=1, shape=shape, affine=affine, seed=5)["sub00"]
    simulate(files["t2"], tmp_path / "lr.nii.gz", 2)
    return {"lr": tmp_path / "lr.nii.gz", **files}


def changed(path, out, margin, codes="PSR"):
    """The file with zeros added (or slices cut off) at every side, and its axes stored along ``codes``."""
    image = nib.load(path)
    data, affine = image.get_fdata(dtype=np.float32), image.affine.copy()
    data = np.pad(data, [(max(0, m),) * 2 for m in margin])
    data = data[tuple(slice(max(0, -m), n - max(0, -m)) for m, n in zip(margin, data.shape))]
    affine[:3, 3] = nib.affines.apply_affine(image.affine, [-m for m in margin])
    image = nib.Nifti1Image(data, affine)
    order = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(tuple(codes)))
    nib.save(image.as_reoriented(order), out)
    return out


def test_a_larger_field_of_view_makes_no_difference(tmp_path, pair, caplog):
    larger = changed(pair["t1"], tmp_path / "larger.nii.gz", (5, 3, 2))
    options = {"network": "srcnn_ref", "weights": tmp_path / "w.pt", "device": "cpu"}
    torch.manual_seed(0)
    torch.save(build_network("srcnn_ref").state_dict(), tmp_path / "w.pt")
    expected = super_resolve(pair["lr"], pair["t1"], **options)
    assert not [r for r in caplog.records if r.name.startswith("glmamba_monai.transforms")]
    with caplog.at_level(logging.WARNING):
        found = super_resolve(pair["lr"], larger, **options)
    assert "larger.nii.gz does not lie on a grid that fits" in caplog.text and "0.9 x 0.9 x 3 mm" in caplog.text
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-5)
    # The percentile of the reference's intensities, its divisor, is of more voxels.
    difference = (found - expected).abs().max() / expected.max()
    assert found.shape == expected.shape and difference < 0.05


def test_a_smaller_field_of_view_cuts_the_result(tmp_path, pair):
    smaller = changed(pair["t1"], tmp_path / "smaller.nii.gz", (-4, -6, -1))
    whole = nib.load(pair["t2"])
    found = super_resolve(pair["lr"], smaller, tmp_path / "sr.nii.gz", network="zero_filling")
    expected = super_resolve(pair["lr"], pair["t1"], network="zero_filling")
    cut = tuple(slice(m, -m) for m in (4, 6, 1))
    np.testing.assert_allclose(found[0].numpy(), expected[0].numpy()[cut], atol=1e-3)
    np.testing.assert_allclose(found.affine[:3, 3], nib.affines.apply_affine(whole.affine, (4, 6, 1)), atol=1e-4)
    written = nib.load(tmp_path / "sr.nii.gz")
    assert written.shape == (20, 20, 4)


def test_data_consistency_holds_on_the_common_grid(tmp_path, pair):
    larger = changed(pair["t1"], tmp_path / "larger.nii.gz", (5, 3, 2), "SAL")
    super_resolve(pair["lr"], larger, tmp_path / "sr.nii.gz", network="bicubic", data_consistency=True)
    again = simulate(tmp_path / "sr.nii.gz", tmp_path / "again.nii.gz", 2)[0].numpy()
    measured = nib.load(pair["lr"]).get_fdata()
    assert np.abs(again - measured).max() <= 1e-5 * measured.max()


def test_the_reference_is_brought_to_the_slices(tmp_path, pair, make_affine):
    """A fine isotropic reference, sagittal and oblique, against the function that it samples."""
    low = nib.load(pair["lr"])
    affine = centred(make_affine((0.6, 0.6, 0.6), (10, 5, -8), codes="PIR"), (90,) * 3, middle(low.shape, low.affine))
    image = MetaTensor(torch.from_numpy(low.get_fdata(dtype=np.float32))[None], affine=torch.from_numpy(low.affine))
    data = {"subject": "a", "image": image, "reference": sampled((90,) * 3, affine)}
    found = MatchReferenced(["image", "reference"])(data)
    assert found["image"].shape == (1, 14, 16, 6) and found["reference"].shape == (1, 42, 48, 6)
    assert found["factor"].tolist() == [3, 3]  # of the grid made for it
    expected = sampled((42, 48, 6), found["reference"].affine.numpy())
    np.testing.assert_allclose(found["reference"].numpy(), expected.numpy(), atol=6)  # the mean over 3 mm
    batch = next(iter(DataLoader([{**found, "pred": found["reference"]}], batch_size=1)))
    back = SlicesBackd("pred")(decollate_batch(batch)[0])["pred"]
    torch.testing.assert_close(back.as_tensor(), found["reference"].as_tensor())


def test_other_parts_of_the_body_are_refused(tmp_path, pair):
    image = nib.load(pair["t1"])
    affine = image.affine.copy()
    affine[:3, 3] += 0.9 * affine[:3, :3] @ image.shape
    nib.save(nib.Nifti1Image(image.get_fdata(dtype=np.float32), affine), tmp_path / "off.nii.gz")
    with pytest.raises(ValueError) as error:
        super_resolve(pair["lr"], tmp_path / "off.nii.gz", tmp_path / "sr.nii.gz", network="zero_filling")
    assert "off.nii.gz covers " in str(error.value) and not (tmp_path / "sr.nii.gz").exists()
