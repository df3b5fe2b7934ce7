"""Grids: what agrees, which axis is across the slices, what the factor is, and what every refusal says."""

from __future__ import annotations

import math
import re

import nibabel as nib
import numpy as np
import pytest

from glmamba_monai.transforms.grid import (
    find_slice_axis,
    low_resolution_size,
    match_grids,
    matrix_factor,
    require_same_grid,
    slice_axes,
    whole_factor,
)

SHAPE = (24, 28, 6)
ORDERS = ["RAS", "LPS", "ASL", "SRA", "PIR", "LIA"]


@pytest.fixture
def affine(make_affine):
    return make_affine()


def shifted(affine, voxels):
    """The same grid, moved by so many voxels along its axes."""
    moved = affine.copy()
    moved[:3, 3] = nib.affines.apply_affine(affine, voxels)
    return moved


def coarser(shape, affine, factors, matrix=None):
    """Low-resolution grid over the same field of view: the outer faces of the outer voxels stay where they are."""
    matrix = [math.ceil(n / f) for n, f in zip(shape, factors)] if matrix is None else matrix
    ratios = np.array(shape) / np.array(matrix)
    low = affine.copy()
    low[:3, :3] = affine[:3, :3] * ratios
    face = nib.affines.apply_affine(affine, [-0.5] * 3)
    low[:3, 3] = face + low[:3, :3] @ np.full(3, 0.5)
    return tuple(matrix), low


def low_and_high(affine, factors=(2, 2, 1), shape=SHAPE):
    return (*coarser(shape, affine, factors), "lr.nii.gz"), (shape, affine, "t1.nii.gz")


# --- the same grid


def test_same_grid_within_a_tenth_of_a_voxel(affine):
    grid = (SHAPE, affine, "t2.nii.gz")
    require_same_grid(grid, (list(SHAPE), affine.astype(np.float32), "t1.nii.gz"))
    require_same_grid(grid, (SHAPE, shifted(affine, (0.09, 0, 0)), "t1.nii.gz"))
    with pytest.raises(ValueError, match="in world space"):
        require_same_grid(grid, (SHAPE, shifted(affine, (0.11, 0, 0)), "t1.nii.gz"))


def test_another_matrix_is_refused(affine):
    with pytest.raises(ValueError, match=r"t2\.nii\.gz .*\(24, 28, 6\).*t1\.nii\.gz .*\(24, 28, 7\).*register"):
        require_same_grid((SHAPE, affine, "t2.nii.gz"), ((24, 28, 7), affine, "t1.nii.gz"))


def test_a_shift_is_refused_with_its_size(affine):
    with pytest.raises(ValueError, match=r"t2\.nii\.gz and t1\.nii\.gz .* up to 9\.00 mm apart.*register"):
        require_same_grid((SHAPE, affine, "t2.nii.gz"), (SHAPE, shifted(affine, (0, 0, 3)), "t1.nii.gz"))


def test_a_rotation_is_refused_with_its_size(make_affine):
    """Turned by 2 degrees about z: the corner farthest from the axis moves by the chord."""
    plain, turned = (make_affine(degrees=(0, 0, d), origin=(0, 0, 0), codes="RAS") for d in (0, 2))
    far = np.hypot((SHAPE[0] - 0.5) * 0.9, (SHAPE[1] - 0.5) * 0.9)
    chord = 2 * far * math.sin(math.radians(1))
    with pytest.raises(ValueError, match=f"up to {chord:.2f} mm apart"):
        require_same_grid((SHAPE, plain, "a"), (SHAPE, turned, "b"))


def test_a_mirrored_copy_of_the_same_box_is_refused(affine):
    """The box is the same, but voxel (i, j, k) of the one is not voxel (i, j, k) of the other."""
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = SHAPE[0] - 1
    with pytest.raises(ValueError, match=rf"up to {SHAPE[0] * 0.9:.2f} mm apart"):
        require_same_grid((SHAPE, affine, "a"), (SHAPE, affine @ flip, "b"))


# --- the slice axis


@pytest.mark.parametrize("thick", [0, 1, 2])
@pytest.mark.parametrize("codes", ["RAS", "LPS", "ASL"])
def test_thick_slices_tell_the_axis(make_affine, thick, codes):
    spacing = np.full(3, 0.9)
    spacing[thick] = 4.0
    assert find_slice_axis(make_affine(spacing, codes=codes)) == thick


@pytest.mark.parametrize("codes", ORDERS)
def test_isotropic_volumes_are_axial(make_affine, codes):
    along_the_body = next(i for i, code in enumerate(codes) if code in "IS")
    for spacing in ((1, 1, 1), (1, 1, 1.4), (1.4, 1, 1)):
        assert find_slice_axis(make_affine(spacing, codes=codes)) == along_the_body


@pytest.mark.parametrize("codes", ORDERS)
def test_planes_by_name_and_axes_by_number(make_affine, codes):
    affine = make_affine(codes=codes)
    for plane, across in (("axial", "IS"), ("coronal", "AP"), ("sagittal", "LR")):
        assert codes[find_slice_axis(affine, plane)] in across
    assert [find_slice_axis(affine, axis) for axis in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("wrong", ["transverse", 3, -1, "0", None])
def test_unknown_slice_axis_is_named(affine, wrong):
    with pytest.raises(ValueError, match=f"axial.*got {re.escape(repr(wrong))}"):
        find_slice_axis(affine, wrong)


# --- the factor


@pytest.mark.parametrize("shape", [SHAPE, (25, 27, 6), (23, 31, 1), (48, 30, 7)])
@pytest.mark.parametrize("factor", [2, 3, 4, 2.5])
def test_auto_finds_every_factor(affine, shape, factor):
    low, high = low_and_high(affine, (factor, factor, 1), shape)
    assert match_grids(low, high) == 2
    assert match_grids(low, high, factor) == 2
    assert match_grids(low, high, [factor, factor]) == 2


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("codes", ["RAS", "LPS", "ASL"])
def test_the_unchanged_axis_is_the_slice_axis(make_affine, axis, codes):
    """Also against the spacing: at 4x, isotropic voxels become thicker in plane than across."""
    factors = np.full(3, 4)
    factors[axis] = 1
    low, high = low_and_high(make_affine((1, 1, 1), codes=codes), factors, (24, 28, 20))
    assert match_grids(low, high) == axis == match_grids(low, high, 4)


@pytest.mark.parametrize("spacing, expected", [((0.9, 0.9, 3.0), 2), ((1, 1, 1), 2), ((3.0, 0.9, 0.9), 0)])
def test_one_factor_per_axis(make_affine, spacing, expected):
    """With a factor of 1 in plane two axes are unchanged; the reference, which is not stretched, tells which."""
    in_plane = [a for a in range(3) if a != expected]
    for pair in ((1, 2), (2, 1), (1, 4), (4, 2)):
        factors = np.ones(3)
        factors[in_plane] = pair
        low, high = low_and_high(make_affine(spacing), factors, (24, 28, 20))
        assert match_grids(low, high) == expected
        assert match_grids(low, high, pair) == expected
        with pytest.raises(ValueError, match="does not fit"):
            match_grids(low, high, pair[::-1])


def test_a_slice_axis_can_be_named(make_affine):
    affine = make_affine((1, 1, 1))
    low, high = low_and_high(affine, (2, 1, 1))
    assert match_grids(low, high, slice_axis=1) == 1 == match_grids(low, high, slice_axis="coronal")
    with pytest.raises(ValueError, match="slice_axis"):
        match_grids(low, high, slice_axis=0)
    with pytest.raises(ValueError, match="slice_axis"):
        match_grids(low, high, slice_axis="oblique")


def test_wrong_scale_says_what_would_fit(affine):
    low, high = low_and_high(affine)
    with pytest.raises(ValueError) as error:
        match_grids(low, high, 4)
    for part in ("scale 4 does not fit", "lr.nii.gz should be 6 x 7", "it is 12 x 14", "factors 2 and 2", "24 x 28"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match=r"t1\.nii\.gz is 24 x 28"):
        match_grids(low, high, 1)


@pytest.mark.parametrize("scale", ["2", "fourfold", 0.5, 0, (2, 2, 1), [2], (2, "2"), float("nan")])
def test_nonsense_scale_is_named(affine, scale):
    low, high = low_and_high(affine)
    with pytest.raises(ValueError, match=f"scale must be auto, .* got {re.escape(repr(scale))}"):
        match_grids(low, high, scale)


def test_swapped_files_are_recognised(affine):
    low, high = low_and_high(affine)
    with pytest.raises(
        ValueError, match=r"t1\.nii\.gz .*\(24, 28, 6\), finer than lr\.nii\.gz .*\(12, 14, 6\).*swapped"
    ):
        match_grids(high, low)


def test_no_overlap_names_both_files_and_boxes(make_affine):
    straight = make_affine((1, 1, 3), degrees=(0, 0, 0), origin=(0, 0, 0), codes="RAS")
    low, high = low_and_high(straight)
    low = (low[0], low[1] + np.array([[0, 0, 0, 500.0], *np.zeros((3, 4))]), low[2])
    with pytest.raises(ValueError, match=r"lr\.nii\.gz and t1\.nii\.gz do not overlap in world space") as error:
        match_grids(low, high)
    assert "[500, 524] x [-0, 28] x [-2, 16]" in str(error.value)
    assert "same patient" in str(error.value)


def test_shifted_field_of_view_is_refused_with_its_size(affine):
    (shape, low, name), high = low_and_high(affine)
    match_grids((shape, shifted(low, (0.2, 0, 0)), name), high)  # 0.4 voxels of the reference
    with pytest.raises(ValueError, match=r"lr\.nii\.gz and t1\.nii\.gz .*field of view.* up to 6\.00 voxels"):
        match_grids((shape, shifted(low, (3, 0, 0)), name), high)


@pytest.mark.parametrize("codes", ORDERS)
def test_an_uncorrected_half_pixel_is_always_refused(make_affine, codes):
    """Tools that keep the place of voxel 0 displace a 2x grid by 0.5 voxels; rounding must not decide about them."""
    for degrees in [(0, 0, 0), *np.random.default_rng(0).uniform(-20, 20, (9, 3))]:
        (shape, low, name), high = low_and_high(make_affine((1, 1, 3), degrees, codes=codes))
        low[:3, 3] = high[1][:3, 3]
        with pytest.raises(ValueError, match=r"up to 0\.50 voxels"):
            match_grids((shape, low.astype(np.float32), name), high)


def test_rotated_volumes_are_refused(make_affine):
    low, _ = low_and_high(make_affine(degrees=(0, 0, 0)))
    _, high = low_and_high(make_affine(degrees=(0, 0, 10)))
    with pytest.raises(ValueError, match="voxels of the reference apart"):
        match_grids(low, high)


def test_other_slices_are_refused(affine):
    low, high = low_and_high(affine, (2, 2, 2))
    with pytest.raises(ValueError, match=r"lr\.nii\.gz has 3 slices along axis 2 and t1\.nii\.gz has 6"):
        match_grids(low, high)
    # the same spacing, but two slices fewer: another field of view
    (_, low, name), high = low_and_high(affine)
    with pytest.raises(ValueError, match=r"up to 2\.00 voxels"):
        match_grids(((12, 14, 4), low, name), high)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (2, 2),
        (3.0, 3),
        ([2, 2], 2),
        ((4.0, 4), 4),
        (1.99, 2),
        ([1.97, 2.03], 2),
        (3.05, 3),
        (1.95, None),
        ([2, 2.05], None),
        (1.5, None),
        ([2, 3], None),
        ([2, 2.5], None),
        (1, None),  # a volume that is not low-resolution, or was interpolated
        ([1, 1.01], None),
        (0.01, None),
        ([], None),
        (float("nan"), None),
        (float("inf"), None),
        ("auto", None),
    ],
    ids=str,
)
def test_a_factor_that_is_one_whole_number(scale, expected):
    assert whole_factor(scale) == expected


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_every_matrix_that_a_whole_factor_leaves_is_of_that_factor(factor):
    for size in range(32, 400):
        coarse = low_resolution_size(size, factor)
        assert matrix_factor([size, 240], [coarse, 240 // factor]) == [factor, factor]
    assert matrix_factor([240, 240], [160, 160]) == [1.5, 1.5]
    assert matrix_factor([200, 240], [100, 60]) == [2, 4]
    assert matrix_factor([200, 200], [101, 101]) == pytest.approx([200 / 101] * 2)


def test_interpolated_volumes_need_scale_1(affine):
    same = (SHAPE, affine, "lr.nii.gz")
    high = (SHAPE, affine, "t1.nii.gz")
    with pytest.raises(ValueError, match=r"lr\.nii\.gz has the same matrix as t1\.nii\.gz.*scale 1"):
        match_grids(same, high)
    assert match_grids(same, high, 1) == 2
    assert match_grids(same, high, 1, "sagittal") == 0
    with pytest.raises(ValueError, match="scale 2 does not fit"):
        match_grids(same, high, 2)


@pytest.mark.parametrize("size", range(1, 60))
def test_low_resolution_size_is_the_ceiling(size):
    for scale in (1, 2, 3, 4):
        assert low_resolution_size(size, scale) == -(-size // scale)
    # fractional factors: exactly divisible sizes must not gain a line by rounding
    for tenths in (11, 13, 14, 15, 17, 25):
        assert low_resolution_size(size * tenths, tenths / 10) == size * 10


@pytest.mark.parametrize(
    ("spacing", "slice_axis", "expected"),
    [
        ((1.0, 1.0, 1.0), "auto", [0, 1, 2]),
        ((1.0, 1.2, 1.4), "auto", [0, 1, 2]),
        ((0.5, 0.5, 3.0), "auto", [2]),
        ((4.0, 1.0, 1.0), "auto", [0]),
        ((1.0, 1.0, 1.0), "axial", [2]),
        ((1.0, 1.0, 1.0), 1, [1]),
    ],
)
def test_axes_with_slices_to_train_on(make_affine, spacing, slice_axis, expected):
    assert slice_axes(make_affine(spacing=spacing), slice_axis) == expected
