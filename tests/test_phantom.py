"""The embedded brain phantom: anatomy, contrasts, orientation, and files that appear whole or not at all."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nilearn import datasets

from glmamba_monai.data import phantom

SMALL = {"spacing": (4.0, 4.0, 8.0), "shape": (48, 56, 10)}
TINY_DEMO = {"subjects": 2, "spacing": (12.0, 12.0, 24.0), "slices": 2, "seed": 0}


def voxels(image: nib.Nifti1Image) -> np.ndarray:
    return np.asarray(image.dataobj)


@pytest.fixture(scope="module")
def subject() -> dict[str, nib.Nifti1Image]:
    return phantom.make_subject(1, spacing=2.0, shape=(96, 112, 30), tumour=True)


@pytest.fixture(scope="module")
def healthy() -> dict[str, nib.Nifti1Image]:
    return phantom.make_subject(2, spacing=2.0, shape=(96, 112, 30))


def atlas_on(image: nib.Nifti1Image, load, seed: int) -> np.ndarray:
    """The nilearn template, deformed for the subject of that `seed`, at the voxel centres: by nearest voxel."""
    template = load(resolution=1)
    world = nib.affines.apply_affine(image.affine, np.moveaxis(np.indices(image.shape), 0, -1))
    displacement = phantom._deformation(np.random.default_rng(seed))  # the first thing that is drawn
    world += np.moveaxis(phantom._displacement_at(displacement, np.moveaxis(world, -1, 0)), 0, -1)
    index = np.rint(nib.affines.apply_affine(np.linalg.inv(template.affine), world)).astype(int)
    inside = np.all((index >= 0) & (index < template.shape), axis=-1)
    values = np.asarray(template.dataobj)[tuple(np.moveaxis(np.where(inside[..., None], index, 0), -1, 0))]
    return np.where(inside, values, 0)


def test_same_seed_same_voxels_and_other_seed_other_voxels():
    first, again, other = (phantom.make_subject(seed, **SMALL, tumour=True) for seed in (5, 5, 6))
    for name in first:
        np.testing.assert_array_equal(voxels(first[name]), voxels(again[name]))
        assert not np.array_equal(voxels(first[name]), voxels(other[name]))


def test_images_share_one_grid_and_a_clean_background(subject, healthy):
    assert set(subject) == {"t1", "t2", "pd", "flair", "seg"}
    assert set(healthy) == {"t1", "t2", "pd", "flair"}
    brain = voxels(subject["t1"]) > 0
    assert 0.3 < brain.mean() < 0.6
    for name, image in subject.items():
        assert image.get_data_dtype() == np.int16
        np.testing.assert_array_equal(image.affine, subject["t1"].affine)
        if name != "seg":
            np.testing.assert_array_equal(voxels(image) > 0, brain)
            assert 300 < voxels(image).max() < 4000


def test_affine_is_ras_with_the_asked_spacing_around_the_centre():
    image = phantom.make_subject(0, spacing=(4.0, 5.0, 9.0), shape=(30, 31, 4))["t2"]
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    np.testing.assert_allclose(image.header.get_zooms(), (4, 5, 9))
    middle = nib.affines.apply_affine(image.affine, (np.array(image.shape) - 1) / 2)
    np.testing.assert_allclose(middle, phantom.CENTRE)


def test_whole_head_is_covered_by_default():
    image = voxels(phantom.make_subject(0, spacing=8.0)["pd"])
    assert image.shape == (24, 28, 24)
    for face in (image[0], image[-1], image[:, 0], image[:, -1], image[..., -1]):  # the stem may leave below
        assert not face.any()
    assert 1000 < (image > 0).sum() * 0.512 < 2300  # ml of brain


def test_tissue_contrasts(healthy):
    grey = atlas_on(healthy["t1"], datasets.load_mni152_gm_template, seed=2)
    white = atlas_on(healthy["t1"], datasets.load_mni152_wm_template, seed=2)
    brain = voxels(healthy["t1"]) > 0
    mean = {
        name: [
            np.median(voxels(image)[brain & where]) for where in (grey + white < 0.15, (grey > 0.95), (white > 0.98))
        ]
        for name, image in healthy.items()
    }
    csf, grey_matter, white_matter = (dict(zip(mean, column)) for column in zip(*mean.values()))
    assert csf["t1"] < 0.6 * grey_matter["t1"] and 1.1 * grey_matter["t1"] < white_matter["t1"]
    assert csf["t2"] > 1.5 * grey_matter["t2"] and grey_matter["t2"] > 1.2 * white_matter["t2"]
    assert grey_matter["pd"] > 1.05 * white_matter["pd"]
    assert csf["flair"] < 0.6 * white_matter["flair"] and white_matter["flair"] < 0.95 * grey_matter["flair"]


def test_tumour_is_labelled_inside_the_brain_and_has_its_contrast(subject):
    label = voxels(subject["seg"])
    brain = voxels(subject["t1"]) > 0
    assert set(np.unique(label)) == {0, 1, 2}
    assert not np.any(label[~brain])
    assert 2 < (label > 0).sum() * 0.008 < 120  # ml
    median = {
        name: [np.median(voxels(subject[name])[where]) for where in (brain & (label == 0), label == 1, label == 2)]
        for name in phantom.CONTRASTS
    }
    rest, core, oedema = range(3)
    assert median["t1"][core] < 0.85 * median["t1"][rest] and median["t1"][oedema] < median["t1"][rest]
    for name in ("t2", "flair"):
        assert median[name][core] > 1.2 * median[name][rest]
        assert median[name][oedema] > 1.2 * median[name][rest]


@pytest.mark.parametrize("seed", range(4))
def test_tumour_lies_within_a_thin_slab(seed):
    label = voxels(phantom.make_subject(seed, spacing=4.0, shape=(48, 56, 8), tumour=True)["seg"])
    assert (label == 1).any() and (label == 2).any()


def test_orientation_agrees_with_the_atlas(healthy):
    image = voxels(healthy["t1"]).astype(float)
    template = atlas_on(healthy["t1"], datasets.load_mni152_template, seed=2)

    def agreement(candidate: np.ndarray) -> float:
        return np.corrcoef(candidate[template > 0], template[template > 0])[0, 1]

    assert agreement(image) > 0.75
    for axis in range(3):
        assert agreement(image) > agreement(np.flip(image, axis)) + 0.15


def test_left_and_right_differ(healthy):
    image = voxels(healthy["t1"]).astype(float)
    assert np.abs(image - image[::-1]).mean() > 0.1 * image.mean()


def test_deformation_is_invertible_and_a_few_mm():
    for seed in range(10):
        displacement = phantom._deformation(np.random.default_rng(seed)).astype(float)
        gradient = np.stack(np.gradient(displacement, phantom.LATTICE, axis=(1, 2, 3)), axis=1)
        jacobian = np.linalg.det(np.moveaxis(gradient, (0, 1), (-2, -1)) + np.eye(3))
        assert jacobian.min() > 0.1
        assert 2 < np.sqrt((displacement**2).sum(0).mean()) < 12


def test_zero_filling_leaves_errors_to_recover(healthy):
    image = voxels(healthy["t2"]).astype(float)
    spectrum = np.fft.fftshift(np.fft.fft2(image, axes=(0, 1)), axes=(0, 1))
    kept = np.zeros_like(spectrum)
    kept[24:72, 28:84] = spectrum[24:72, 28:84]
    blurred = np.abs(np.fft.ifft2(np.fft.ifftshift(kept, axes=(0, 1)), axes=(0, 1)))
    psnr = 20 * np.log10(image.max() / np.sqrt(((blurred - image) ** 2).mean()))
    assert 25 < psnr < 34


@pytest.mark.parametrize("spacing", [0, -1.0, (1.0, 2.0), (1.0, 1.0, float("nan"))])
def test_bad_spacing_is_named(spacing):
    with pytest.raises(ValueError, match="spacing"):
        phantom.make_subject(0, spacing=spacing)


@pytest.mark.parametrize("shape", [(4, 4), (4, 0, 4)])
def test_bad_shape_is_named(shape):
    with pytest.raises(ValueError, match="shape"):
        phantom.make_subject(0, shape=shape)


def write_tiny(out: Path, **changes) -> Path:
    return phantom.write_demo_data(out, **{**TINY_DEMO, **changes})


def test_written_layout_and_reproducible_subjects(tmp_path):
    (tmp_path / "two").mkdir()  # an empty folder is taken
    assert write_tiny(tmp_path / "two") == tmp_path / "two"
    write_tiny(tmp_path / "deep" / "one", subjects=1)
    files = sorted(p.relative_to(tmp_path / "two").as_posix() for p in (tmp_path / "two").rglob("*.*"))
    names = [f"subject-00{i}/{name}.nii.gz" for i in (0, 1) for name in ("flair", "pd", "seg", "t1", "t2")]
    names.remove("subject-000/seg.nii.gz")
    assert files == ["README.txt", *names]
    assert {p.name for p in tmp_path.iterdir()} == {"two", "deep"}
    for text in ("synthetic", "ICBM 152", "Copyright (C) 1993-2004 Louis Collins", "nilearn"):
        assert text in (tmp_path / "two" / "README.txt").read_text(encoding="utf-8")
    both = [nib.load(tmp_path / out / "subject-000" / "t2.nii.gz") for out in ("two", "deep/one")]
    np.testing.assert_array_equal(voxels(both[0]), voxels(both[1]))
    assert voxels(both[0]).max() > 300


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_existing_output_is_left_alone(tmp_path, kind):
    out = tmp_path / "out"
    mine = out
    if kind == "folder":
        out.mkdir()
        mine = out / "mine.txt"
    mine.write_text("keep")
    with pytest.raises(FileExistsError, match="out"):
        write_tiny(out)
    assert mine.read_text() == "keep"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["subjects", "slices"])
def test_counts_below_one_are_named(tmp_path, name):
    with pytest.raises(ValueError, match=name):
        write_tiny(tmp_path / "out", **{name: 0})
    assert not any(tmp_path.iterdir())


def test_failure_half_way_leaves_nothing(tmp_path, monkeypatch):
    save, calls = nib.save, []

    def full_disk(image, path):
        calls.append(path)
        if len(calls) == 6:
            raise OSError(28, "No space left on device")
        save(image, path)

    monkeypatch.setattr(phantom.nib, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_tiny(tmp_path / "out")
    assert len(calls) == 6
    assert not any(tmp_path.iterdir())


def test_cache_dir_order(monkeypatch, tmp_path):
    monkeypatch.setenv("GLMAMBA_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert phantom.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("GLMAMBA_CACHE")
    assert phantom.cache_dir() == tmp_path / "xdg" / "glmamba_monai"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert phantom.cache_dir() == Path.home() / ".cache" / "glmamba_monai"


def test_demo_data_is_built_once_and_renewed_with_its_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("GLMAMBA_CACHE", str(tmp_path))
    monkeypatch.setattr(phantom, "DEMO", {**TINY_DEMO, "subjects": 1})
    folder = phantom.demo_data()
    stamps = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert len(stamps) == 6 and nib.load(folder / "subject-000" / "t1.nii.gz").shape == (16, 19, 2)
    assert phantom.demo_data() == folder
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == stamps

    monkeypatch.setattr(phantom, "DEMO", {**TINY_DEMO, "subjects": 1, "seed": 1})
    assert phantom.demo_data() != folder


def test_two_builders_at_once_share_one_copy(tmp_path, monkeypatch):
    """Two threads stand for two processes: they meet in the file system only."""
    monkeypatch.setenv("GLMAMBA_CACHE", str(tmp_path))
    monkeypatch.setattr(phantom, "DEMO", {**TINY_DEMO, "subjects": 1})
    both_have_built, rename = threading.Barrier(2, timeout=60), Path.rename

    def rename_together(source, target):
        both_have_built.wait()
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", rename_together)
    with ThreadPoolExecutor(2) as pool:
        folders = {f.result() for f in [pool.submit(phantom.demo_data) for _ in range(2)]}
    assert folders == set(tmp_path.iterdir()) and len(folders) == 1
    assert len(list(folders.pop().rglob("*.nii.gz"))) == 4
