"""Volumes in, volumes out: on the reference's grid, in the units of the low-resolution volume, never mirrored."""

from __future__ import annotations

import errno
import logging
import re
import shutil
from itertools import combinations
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.data import MetaTensor

import glmamba_monai
from glmamba_monai import simulate, super_resolve
from glmamba_monai.errors import root_cause
from glmamba_monai.files import save_volume
from glmamba_monai.inference import pair
from glmamba_monai.networks import build_network

BUNDLE = Path(__file__).parent.parent / "bundle"
LOGGER = "glmamba_monai.engines.weights"


def make_pair(tmp_path, make_subject_folder, make_affine, axis=2, scale=2, **affine):
    """A subject with ``axis`` across its slices: files of T1 and T2, and the simulated LR of the T2."""
    shape, spacing = [26, 30, 22], [0.9, 0.9, 0.9]
    shape[axis], spacing[axis] = 6, 3.0
    written = make_subject_folder(
        tmp_path / "data", n=1, shape=tuple(shape), affine=make_affine(spacing, **affine), seed=5
    )["sub00"]
    lr = tmp_path / "lr.nii.gz"
    simulate(written["t2"], lr, scale)
    return {"lr": lr, **written}


def reoriented(path, codes, out):
    """The file with its axes stored along ``codes``, by nibabel; no voxel moves in the world."""
    image = nib.load(path)
    target = nib.orientations.axcodes2ornt(tuple(codes))
    nib.save(image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), target)), out)
    return out


def correlation(a, b):
    return np.corrcoef(np.ravel(a), np.ravel(b))[0, 1]


def files_in(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def check_output(path, reference, truth, least=0.98):
    """The file lies on the reference's grid and shows the truth, not its mirror image, in the truth's units."""
    written, reference, truth = nib.load(path), nib.load(reference), nib.load(truth).get_fdata()
    found = written.get_fdata()
    assert written.shape == reference.shape and written.get_data_dtype() == np.float32
    np.testing.assert_allclose(written.affine, reference.affine, atol=1e-4)
    assert written.header["sform_code"] == written.header["qform_code"] == 1
    np.testing.assert_allclose(written.get_qform(), reference.affine, atol=1e-3)
    np.testing.assert_allclose(written.header.get_zooms(), reference.header.get_zooms(), atol=1e-4)
    assert written.header.get_xyzt_units()[0] == "mm"
    straight = correlation(found, truth)
    assert straight > least
    for count in (1, 2, 3):
        for axes in combinations(range(3), count):
            assert correlation(found, np.flip(truth, axes)) < straight - 0.02, axes
    # The magnitude of a low-resolution volume adds its ringing to the background: a little above the truth.
    assert found.mean() == pytest.approx(truth.mean(), rel=0.05)
    return found


# --- where the result lies


@pytest.mark.parametrize(
    ("axis", "affine", "stored"),
    [
        (2, {"codes": "LPS"}, None),  # axial, oblique
        (2, {"codes": "RAS", "degrees": (0, 0, 0)}, None),
        (2, {"codes": "LAS", "degrees": (0, 0, 0)}, None),
        (1, {"codes": "LAS"}, None),  # coronal
        (0, {"codes": "RAS"}, None),  # sagittal
        (0, {"codes": "PSR"}, None),  # sagittal, the slices stored first
        (2, {"codes": "PSR", "degrees": (11, -7, 4)}, None),  # sagittal, the slices stored last
        (2, {"codes": "LIA", "degrees": (-9, 3, 0)}, None),  # coronal, the slices stored last
        (2, {"codes": "LPS"}, "RAS"),  # the LR is stored otherwise than the reference
        (2, {"codes": "RAS"}, "SLP"),
        (1, {"codes": "LSA"}, "PIR"),
        (0, {"codes": "RAS", "degrees": (0, 0, 0)}, "IAL"),
    ],
    ids=str,
)
def test_the_result_lies_on_the_reference_and_is_not_mirrored(
    tmp_path, make_subject_folder, make_affine, axis, affine, stored
):
    files = make_pair(tmp_path, make_subject_folder, make_affine, axis, **affine)
    lr = files["lr"] if stored is None else reoriented(files["lr"], stored, tmp_path / "stored.nii.gz")
    result = super_resolve(lr, files["t1"], tmp_path / "sr.nii.gz", network="zero_filling")
    found = check_output(tmp_path / "sr.nii.gz", files["t1"], files["t2"], least=0.97)
    assert found.mean() == pytest.approx(nib.load(lr).get_fdata().mean(), rel=1e-5)
    assert isinstance(result, MetaTensor) and result.dtype == torch.float32 and result.shape == (1, *found.shape)
    np.testing.assert_array_equal(result[0].numpy(), found)
    np.testing.assert_allclose(result.affine, nib.load(files["t1"]).affine, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 2])
def test_a_smooth_volume_comes_back(tmp_path, make_volume, make_affine, axis):
    """Almost nothing lies beyond the frequencies kept, so zero-filling returns the volume itself."""
    shape, spacing = [48, 56, 40], [0.9, 0.9, 0.9]
    shape[axis], spacing[axis] = 5, 3.0
    grids = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    centres = [0.1 if n == 5 else c for n, c in zip(shape, (-0.1, 0.12, 0.05))]
    truth = 3000 * np.exp(-8 * sum((g - c) ** 2 for g, c in zip(grids, centres))) + 20
    affine = make_affine(spacing)
    files = {
        "t2": make_volume(tmp_path / "t2.nii.gz", truth.astype(np.float32), affine),
        "t1": make_volume(tmp_path / "t1.nii.gz", (4000 - truth).astype(np.float32), affine),
    }
    simulate(files["t2"], tmp_path / "lr.nii.gz", 2)
    super_resolve(tmp_path / "lr.nii.gz", files["t1"], tmp_path / "sr.nii.gz", network="zero_filling")
    found = check_output(tmp_path / "sr.nii.gz", files["t1"], files["t2"], least=0.999)
    np.testing.assert_allclose(found, truth, atol=0.01 * truth.max())
    assert found.mean() == pytest.approx(truth.mean(), rel=0.001)


def test_headers_that_differ_a_little_do_not_move_the_result(tmp_path, make_subject_folder, make_affine):
    """The LR's header is 0.3 voxel off, which is allowed: the result takes the reference's."""
    files = make_pair(tmp_path, make_subject_folder, make_affine)
    lr, reference = nib.load(files["lr"]), nib.load(files["t1"])
    expected = super_resolve(files["lr"], files["t1"], network="zero_filling")
    affine = lr.affine.copy()
    affine[:3, 3] += 0.3 * reference.affine[:3, 0]
    nib.save(nib.Nifti1Image(lr.get_fdata(dtype=np.float32), affine), tmp_path / "off.nii.gz")
    result = super_resolve(tmp_path / "off.nii.gz", files["t1"], tmp_path / "sr.nii.gz", network="zero_filling")
    np.testing.assert_allclose(result.affine, reference.affine, atol=1e-6)
    torch.testing.assert_close(result.as_tensor(), expected.as_tensor())
    check_output(tmp_path / "sr.nii.gz", files["t1"], files["t2"])


@pytest.mark.parametrize("scale", [2, 3, [2, 3], [1, 2]], ids=str)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_factors(tmp_path, make_subject_folder, make_affine, scale, suffix):
    files = make_pair(tmp_path, make_subject_folder, make_affine, scale=scale)
    for i, named in enumerate(("auto", scale)):
        output = tmp_path / f"sr{i}{suffix}"
        super_resolve(files["lr"], files["t1"], output, scale=named, network="zero_filling")
        check_output(output, files["t1"], files["t2"], least=0.95)


def test_isotropic_volumes_take_the_slice_axis_that_is_named(tmp_path, make_subject_folder, make_affine):
    """Nothing tells the slices of the original: axial is assumed, another plane has to be named."""
    files = make_subject_folder(tmp_path / "d", n=1, shape=(24, 26, 28), affine=make_affine((1, 1, 1)))["sub00"]
    for plane, expected in (("auto", (12, 13, 28)), ("sagittal", (24, 13, 14)), (1, (12, 26, 14))):
        lr = tmp_path / "lr.nii.gz"
        assert simulate(files["t2"], lr, 2, slice_axis=plane).shape == (1, *expected)
        super_resolve(lr, files["t1"], tmp_path / "sr.nii.gz", network="zero_filling")  # the unchanged axis tells
        check_output(tmp_path / "sr.nii.gz", files["t1"], files["t2"], least=0.95)


# --- what the network does to it


def write_weights(path, seed=0):
    network = build_network("srcnn_ref")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    torch.save(network.state_dict(), path)
    return network.eval()


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_the_network_sees_every_slice_once_with_both_contrasts(tmp_path, make_subject_folder, make_affine, batch_size):
    """srcnn_ref by hand: divisors of LR and reference, slice by slice, and the LR's units again."""
    files = make_pair(tmp_path, make_subject_folder, make_affine)
    network = write_weights(tmp_path / "w.pt")
    found = super_resolve(
        files["lr"], files["t1"], network="srcnn_ref", weights=tmp_path / "w.pt", batch_size=batch_size, device="cpu"
    )
    lr, reference = (nib.load(files[k]).get_fdata(dtype=np.float32) for k in ("lr", "t1"))
    up = super_resolve(files["lr"], files["t1"], network="zero_filling")[0].as_tensor()
    divisor, reference_divisor = np.percentile(lr, 99.9), np.percentile(reference, 99.9)
    x = torch.stack([up / divisor, torch.from_numpy(reference) / reference_divisor]).float()  # (2, X, Y, S)
    with torch.no_grad():
        expected = torch.stack([network(x[None, ..., s])[0, 0] for s in range(x.shape[-1])], -1) * divisor
    torch.testing.assert_close(found[0].as_tensor(), expected.float(), rtol=1e-4, atol=1e-2)
    assert not torch.allclose(found[0].as_tensor(), up, rtol=1e-2)  # the weights do something


def test_intensities_keep_their_units(tmp_path, make_subject_folder, make_affine):
    files = make_pair(tmp_path, make_subject_folder, make_affine)
    write_weights(tmp_path / "w.pt")
    lr = nib.load(files["lr"])
    nib.save(nib.Nifti1Image(1000 * lr.get_fdata(dtype=np.float32), lr.affine), tmp_path / "bright.nii.gz")
    options = {"network": "srcnn_ref", "weights": tmp_path / "w.pt"}
    one = super_resolve(files["lr"], files["t1"], **options)
    thousand = super_resolve(tmp_path / "bright.nii.gz", files["t1"], **options)
    torch.testing.assert_close(thousand.as_tensor(), 1000 * one.as_tensor(), rtol=1e-4, atol=1)


def test_bicubic_is_another_interpolation(tmp_path, make_subject_folder, make_affine):
    files = make_pair(tmp_path, make_subject_folder, make_affine)
    bicubic, sinc = (
        super_resolve(files["lr"], files["t1"], tmp_path / f"{n}.nii.gz", network=n)
        for n in ("bicubic", "zero_filling")
    )
    check_output(tmp_path / "bicubic.nii.gz", files["t1"], files["t2"], least=0.95)
    assert not torch.allclose(bicubic, sinc, rtol=1e-3)


@pytest.mark.parametrize("stored", [None, "RAS", "SLP"])
@pytest.mark.parametrize(("axis", "scale"), [(2, 2), (0, 2), (1, 3), (2, 1.5), (2, [2, 3]), (2, [1, 2])], ids=str)
def test_a_consistent_result_gives_the_low_resolution_again(
    tmp_path, make_subject_folder, make_affine, axis, scale, stored
):
    files = make_pair(tmp_path, make_subject_folder, make_affine, axis, scale)
    write_weights(tmp_path / "w.pt")
    lr = files["lr"] if stored is None else reoriented(files["lr"], stored, tmp_path / "stored.nii.gz")
    measured, errors = nib.load(files["lr"]).get_fdata(), []
    for data_consistency in (True, False):
        super_resolve(
            lr,
            files["t1"],
            tmp_path / "sr.nii.gz",
            network="srcnn_ref",
            weights=tmp_path / "w.pt",
            data_consistency=data_consistency,
            device="cpu",
        )
        again = simulate(tmp_path / "sr.nii.gz", tmp_path / "again.nii.gz", scale, slice_axis=axis)
        errors.append(np.abs(again[0].numpy() - measured).max() / measured.max())
    assert errors[0] <= 1e-5 and errors[1] > 1e-2


def test_data_consistency_wants_the_matrix_that_was_measured(tmp_path, make_subject_folder, make_affine):
    files = make_pair(tmp_path, make_subject_folder, make_affine)
    lr, reference = nib.load(files["lr"]), nib.load(files["t1"])
    affine = lr.affine.copy()
    affine[:3, 3] += 0.3 * reference.affine[:3, 0]  # of a voxel: as much as is allowed without
    nib.save(nib.Nifti1Image(lr.get_fdata(dtype=np.float32), affine), tmp_path / "off.nii.gz")
    for image, options, words in (
        (files["t2"], {"scale": 1}, f"{files['t2']} has the matrix (26, 30, 6)"),
        (tmp_path / "off.nii.gz", {}, f"off.nii.gz does not cover the field of view of {files['t1']}"),
    ):
        output = tmp_path / "sr.nii.gz"
        super_resolve(image, files["t1"], network="zero_filling", **options)
        with pytest.raises(ValueError, match="leave data_consistency off") as error:
            super_resolve(image, files["t1"], output, network="zero_filling", data_consistency=True, **options)
        assert words in str(error.value)
        assert not output.exists()


def test_weights_of_the_bundle_are_taken(tmp_path, make_subject_folder, make_affine):
    """A copy of the bundle elsewhere, with its own models/model.pt."""
    files = make_pair(tmp_path, make_subject_folder, make_affine)
    bundle = tmp_path / "bundle"
    for folder in ("configs", "models"):
        (bundle / folder).mkdir(parents=True)
    (bundle / "configs" / "inference.json").write_text((BUNDLE / "configs" / "inference.json").read_text())
    with pytest.raises(FileNotFoundError, match="Train first") as error:
        super_resolve(files["lr"], files["t1"], tmp_path / "o.nii.gz", network="srcnn_ref", bundle_root=bundle)
    assert str(bundle / "models" / "model.pt") in str(error.value)
    assert not (tmp_path / "o.nii.gz").exists()
    write_weights(bundle / "models" / "model.pt")
    found = super_resolve(files["lr"], files["t1"], network="srcnn_ref", bundle_root=bundle)
    named = super_resolve(files["lr"], files["t1"], network="srcnn_ref", weights=bundle / "models" / "model.pt")
    assert torch.equal(found.as_tensor(), named.as_tensor())


# --- which weights


@pytest.fixture
def bundle(tmp_path):
    """A bundle with weights of srcnn_ref for 2 and for 3 alone, and for every factor."""
    for folder in ("configs", "models"):
        (tmp_path / "bundle" / folder).mkdir(parents=True)
    shutil.copy(BUNDLE / "configs" / "inference.json", tmp_path / "bundle" / "configs")
    for seed, name in enumerate(("model.pt", "model_2x.pt", "model_3x.pt")):
        write_weights(tmp_path / "bundle" / "models" / name, seed)
    return tmp_path / "bundle"


def low_resolution(tmp_path, make_subject_folder, scale, name="sub00", shape=(24, 36, 4), **options):
    """Files of a subject whose T2 has been simulated at that factor."""
    files = make_subject_folder(tmp_path / "hr", names=[name], shape=shape)[name]
    lr = tmp_path / "data" / name / "t2.nii.gz"
    lr.parent.mkdir(parents=True)
    simulate(files["t2"], lr, scale, **options)
    shutil.copy(files["t1"], lr.parent)
    return {"lr": lr, "t1": lr.parent / "t1.nii.gz"}


def said_of_weights(caplog):
    return [r.getMessage() for r in caplog.records if r.name == LOGGER and r.levelno == logging.INFO]


@pytest.mark.parametrize(
    ("scale", "options", "expected"),
    [
        (2, {}, "model_2x.pt"),
        (2, {"scale": 2, "self_ensemble": True, "data_consistency": True}, "model_2x.pt"),
        (3, {}, "model_3x.pt"),
        (4, {}, "model.pt"),  # there are none for 4 alone
        ([2, 3], {}, "model.pt"),
        (1.5, {}, "model.pt"),
        (1.99, {"shape": (199, 199, 2)}, "model_2x.pt"),
        (2, {"mode": "zero_fill", "scale": 1}, "model.pt"),  # interpolated by the scanner
        (2, {"weights": "model_3x.pt"}, "model_3x.pt"),
    ],
    ids=str,
)
def test_the_factor_chooses_the_weights(tmp_path, make_subject_folder, bundle, caplog, scale, options, expected):
    options = dict(options)  # the parametrisation's own stays as it is
    made = {name: options.pop(name) for name in ("shape", "mode") if name in options}
    files = low_resolution(tmp_path, make_subject_folder, scale, **made)
    if "weights" in options:
        options["weights"] = bundle / "models" / options["weights"]
    options = {"network": "srcnn_ref", "device": "cpu", **options}
    with caplog.at_level(logging.INFO):
        found = super_resolve(files["lr"], files["t1"], bundle_root=bundle, **options)
    said = said_of_weights(caplog)
    assert len(said) == 1 and said[0].startswith(f"weights of srcnn_ref loaded from {bundle / 'models' / expected}")
    named = super_resolve(files["lr"], files["t1"], **{**options, "weights": bundle / "models" / expected})
    found, named = (volumes if isinstance(volumes, tuple) else (volumes,) for volumes in (found, named))
    assert all(torch.equal(a.as_tensor(), b.as_tensor()) for a, b in zip(found, named))


def run_on_folder(tmp_path, bundle, **options):
    workflow = ConfigWorkflow(
        config_file=str(bundle / "configs" / "inference.json"),
        workflow_type="infer",
        logging_file=False,
        bundle_root=str(bundle),
        dataset_dir=str(tmp_path / "data"),
        reference="t1",
        network="srcnn_ref",
        output_dir=str(tmp_path / "out"),
        device="cpu",
        **options,
    )
    workflow.initialize()
    workflow.run()


def test_volumes_of_different_factors_in_one_run(tmp_path, make_subject_folder, bundle, caplog):
    chosen = ((2, "model_2x.pt"), (3, "model_3x.pt"), (3, "model_3x.pt"), (4, "model.pt"))
    scales = {f"sub{i:02d}": choice for i, choice in enumerate(chosen)}
    files = {name: low_resolution(tmp_path, make_subject_folder, scale, name) for name, (scale, _) in scales.items()}
    with caplog.at_level(logging.INFO):
        run_on_folder(tmp_path, bundle)
    assert said_of_weights(caplog) == [
        f"weights of srcnn_ref {'kept, those of' if name == 'sub02' else 'loaded from'} {bundle / 'models' / file} for "
        f"{name} (factor {scale} x {scale})"
        for name, (scale, file) in scales.items()
    ]
    for name, (_, file) in scales.items():
        options = {"network": "srcnn_ref", "weights": bundle / "models" / file, "device": "cpu"}
        expected = super_resolve(files[name]["lr"], files[name]["t1"], **options)
        written = nib.load(tmp_path / "out" / f"{name}_sr.nii.gz").get_fdata(dtype=np.float32)
        np.testing.assert_array_equal(written, expected[0].numpy())


@pytest.mark.parametrize("content", ["of another network", "damaged"])
def test_unfit_weights_for_a_later_volume_are_refused_first(tmp_path, make_subject_folder, bundle, content):
    for name, scale in (("sub00", 2), ("sub01", 3)):
        low_resolution(tmp_path, make_subject_folder, scale, name)
    unfit = bundle / "models" / "model_3x.pt"
    if content == "damaged":
        unfit.write_bytes(unfit.read_bytes()[:5000])
    else:
        torch.save(build_network("srcnn").state_dict(), unfit)
    with pytest.raises(RuntimeError) as error:
        run_on_folder(tmp_path, bundle)
    cause = root_cause(error.value)
    assert isinstance(cause, ValueError) and str(cause).startswith(f"{unfit}: ")
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("named", ["auto", 3])
def test_weights_for_2x_alone(tmp_path, make_subject_folder, bundle, monkeypatch, named):
    """They serve 2x; at any other factor the network never runs."""
    for name in ("model.pt", "model_3x.pt"):
        (bundle / "models" / name).unlink()
    two, three = (low_resolution(tmp_path, make_subject_folder, n, f"sub0{n}") for n in (2, 3))
    options = {"network": "srcnn_ref", "bundle_root": bundle, "device": "cpu"}
    super_resolve(two["lr"], two["t1"], **options)

    def never(*_):
        raise AssertionError("the network has run")

    monkeypatch.setattr("glmamba_monai.networks.baselines.SRCNN.forward", never)
    with pytest.raises(FileNotFoundError) as error:
        super_resolve(three["lr"], three["t1"], tmp_path / "sr.nii.gz", scale=named, **options)
    cause, models = error.value, bundle / "models"
    where = "t2: no weights for the factor 3 x 3" if named == "auto" else "no weights for the factor 3"
    looked = f"there is no {models / 'model_3x.pt'} nor {models / 'model.pt'}"
    assert str(cause).startswith(f"{where}: {looked}; there is {models / 'model_2x.pt'} for 2x alone. Train first (")
    assert not (tmp_path / "sr.nii.gz").exists()


# --- files


def test_nothing_but_the_output_is_touched(tmp_path, make_subject_folder, make_affine):
    files = make_pair(tmp_path, make_subject_folder, make_affine)
    (tmp_path / "notes.txt").write_text("mine")
    before = files_in(tmp_path)
    result = super_resolve(files["lr"], files["t1"], network="zero_filling")  # no output named
    assert files_in(tmp_path) == before
    super_resolve(files["lr"], files["t1"], tmp_path / "new" / "folder" / "sr.nii", network="zero_filling")
    after = files_in(tmp_path)
    assert after.keys() - before.keys() == {"new/folder/sr.nii"}
    assert {name: after[name] for name in before} == before
    save_volume(result, tmp_path / "new" / "folder" / "sr.nii")  # over an old result
    np.testing.assert_array_equal(nib.load(tmp_path / "new/folder/sr.nii").get_fdata(), result[0].numpy())


def write_low_resolution_dataset(tmp_path, make_subject_folder, names):
    """A data set whose T2 are low-resolution, and the original T2 beside it."""
    written = make_subject_folder(tmp_path / "hr", names=names)
    for subject, files in written.items():
        lr = tmp_path / "data" / subject / "t2.nii.gz"
        lr.parent.mkdir(parents=True)
        simulate(files["t2"], lr, 2)
        (lr.parent / "t1.nii.gz").write_bytes(files["t1"].read_bytes())
    return written


def test_a_data_set_gives_a_file_a_subject(tmp_path, make_subject_folder):
    names = ["sub00", "case.1", "patient_2-x"]
    written = write_low_resolution_dataset(tmp_path, make_subject_folder, names)
    (tmp_path / "out" / "older").mkdir(parents=True)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "older" / "x_sr.nii.gz").write_bytes(b"of an earlier run")
    before = files_in(tmp_path)
    workflow = ConfigWorkflow(
        config_file=str(BUNDLE / "configs" / "inference.json"),
        workflow_type="infer",
        logging_file=False,
        dataset_dir=str(tmp_path / "data"),
        reference="t1",
        network="zero_filling",
        output_dir=str(tmp_path / "out"),
    )
    workflow.initialize()
    workflow.run()
    after = files_in(tmp_path)
    assert after.keys() - before.keys() == {f"out/{name}_sr.nii.gz" for name in names}
    assert {name: after[name] for name in before} == before
    for name in names:
        check_output(tmp_path / "out" / f"{name}_sr.nii.gz", written[name]["t1"], written[name]["t2"], least=0.95)


def cut_off(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])  # the header is whole


def empty(path):
    path.write_bytes(b"")


def no_volume(path):
    nib.save(nib.Nifti1Image(np.ones((8, 8, 4, 3), np.float32), np.eye(4)), path)


def not_finite(path):
    volume = nib.load(path)
    nib.save(nib.Nifti1Image(np.full(volume.shape, np.nan, np.float32), volume.affine), path)


def elsewhere(path):
    volume = nib.load(path)
    affine = volume.affine.copy()
    affine[:3, 3] += 1000
    nib.save(nib.Nifti1Image(volume.get_fdata(dtype=np.float32), affine), path)


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("spoil", [empty, no_volume, cut_off, not_finite, elsewhere])
@pytest.mark.parametrize("weights", ["by factor", "named"])
def test_a_bad_volume_does_not_cost_the_others(tmp_path, make_subject_folder, bundle, caplog, spoil, position, weights):
    names = ["sub00", "sub01", "sub02"]
    files = {name: low_resolution(tmp_path, make_subject_folder, 2, name) for name in names}
    bad = names.pop(position)
    spoil(Path(files[bad]["t1"]))
    options = {"weights": str(bundle / "models" / "model_2x.pt")} if weights == "named" else {}
    with pytest.raises(RuntimeError) as error:
        run_on_folder(tmp_path, bundle, **options)
    message = str(root_cause(error.value))
    assert re.match(rf"1 of 3 volumes left out; .*:\n  {bad}: ", message) and str(files[bad]["t1"]) in message
    assert next(r.getMessage() for r in caplog.records if "left out" in r.getMessage()).startswith(f"{bad}: left out: ")
    written = {f.name.removesuffix("_sr.nii.gz") for f in (tmp_path / "out").glob("*_sr.nii.gz")}
    assert written == set(names)
    for name in names:
        options = {"network": "srcnn_ref", "weights": bundle / "models" / "model_2x.pt", "device": "cpu"}
        expected = super_resolve(files[name]["lr"], files[name]["t1"], **options)
        found = nib.load(tmp_path / "out" / f"{name}_sr.nii.gz").get_fdata(dtype=np.float32)
        np.testing.assert_array_equal(found, expected[0].numpy())


def test_a_full_disk_is_no_bad_volume(tmp_path, make_subject_folder, bundle, monkeypatch):
    for name in ("sub00", "sub01"):
        low_resolution(tmp_path, make_subject_folder, 2, name)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("glmamba_monai.registration.write_record", full)
    with pytest.raises(RuntimeError) as error:
        run_on_folder(tmp_path, bundle, register=True)
    cause = root_cause(error.value)
    assert isinstance(cause, OSError) and cause.errno == errno.ENOSPC


def test_a_missing_contrast_is_refused_before_anything_runs(tmp_path, make_subject_folder, bundle):
    for name in ("sub00", "sub01"):
        files = low_resolution(tmp_path, make_subject_folder, 2, name)
    Path(files["t1"]).unlink()
    with pytest.raises(RuntimeError) as error:
        run_on_folder(tmp_path, bundle)
    assert str(root_cause(error.value)).startswith("subject sub01 has no reference (t1); it has t2")
    assert not list((tmp_path / "out").glob("*"))


def test_where_all_volumes_are_bad_each_is_named(tmp_path, make_subject_folder, bundle):
    for name in ("sub00", "sub01"):
        cut_off(Path(low_resolution(tmp_path, make_subject_folder, 2, name)["t1"]))
    with pytest.raises(RuntimeError) as error:
        run_on_folder(tmp_path, bundle, **{"dataloader#num_workers": 1})
    message = str(root_cause(error.value))
    assert re.match(r"2 of 2 volumes left out; .*:\n  sub00: .+\n  sub01: ", message)
    assert not list((tmp_path / "out").glob("*"))


# --- simulation


@pytest.mark.parametrize("scale", [2, [2, 3], 1.5], ids=str)
def test_a_simulated_volume_covers_the_same_field_of_view(tmp_path, make_subject_folder, make_affine, scale):
    files = make_pair(tmp_path, make_subject_folder, make_affine)
    low = simulate(files["t2"], tmp_path / "low.nii.gz", scale)
    written, high = nib.load(tmp_path / "low.nii.gz"), nib.load(files["t2"])
    factors = [*(scale if isinstance(scale, list) else [scale, scale]), 1]
    assert written.shape == tuple(int(np.ceil(n / f)) for n, f in zip(high.shape, factors)) == low.shape[1:]
    assert written.get_data_dtype() == np.float32
    assert written.header["sform_code"] == written.header["qform_code"] == 1
    for end in (-0.5, 1):  # the outer corners of the volume
        corners = [
            nib.affines.apply_affine(v.affine, [n - 0.5 if end > 0 else end for n in v.shape]) for v in (written, high)
        ]
        np.testing.assert_allclose(*corners, atol=1e-3)
    assert written.get_fdata().mean() == pytest.approx(high.get_fdata().mean(), rel=0.02)
    np.testing.assert_array_equal(written.get_fdata(dtype=np.float32), low[0].numpy())


def test_a_simulation_keeps_its_matrix_when_told_so(tmp_path, make_subject_folder, make_affine):
    """zero_fill: what a scanner gives that interpolates; it is super-resolved with scale 1."""
    files = make_pair(tmp_path, make_subject_folder, make_affine)
    simulate(files["t2"], tmp_path / "low.nii.gz", 2, mode="zero_fill")
    low, high = nib.load(tmp_path / "low.nii.gz"), nib.load(files["t2"])
    assert low.shape == high.shape
    np.testing.assert_allclose(low.affine, high.affine, atol=1e-6)
    data, original = low.get_fdata(), high.get_fdata()
    assert 0.97 < correlation(data, original) < 0.9999
    with pytest.raises(ValueError, match="say so with scale 1"):
        super_resolve(tmp_path / "low.nii.gz", files["t1"], network="zero_filling")
    super_resolve(tmp_path / "low.nii.gz", files["t1"], tmp_path / "sr.nii.gz", scale=1, network="zero_filling")
    np.testing.assert_allclose(nib.load(tmp_path / "sr.nii.gz").get_fdata(), data, rtol=1e-5, atol=1e-3)


def test_simulated_noise(tmp_path, make_volume):
    """Rician: where the signal is strong, its standard deviation is the one asked for."""
    flat = make_volume(tmp_path / "flat.nii.gz", np.full((64, 64, 8), 1000.0, np.float32))
    volumes = {
        seed: simulate(flat, tmp_path / f"{seed}.nii.gz", 2, noise_std=20.0, seed=seed)[0].numpy() for seed in (0, 1)
    }
    assert volumes[0].std() == pytest.approx(20, rel=0.05) and volumes[0].mean() == pytest.approx(1000, rel=0.01)
    assert abs(correlation(volumes[0], volumes[1])) < 0.1
    again = simulate(flat, tmp_path / "again.nii.gz", 2, noise_std=20.0)[0].numpy()
    np.testing.assert_array_equal(again, volumes[0])
    assert simulate(flat, tmp_path / "clean.nii.gz", 2)[0].numpy().std() < 1e-2


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"scale": 0.5}, "scale"),
        ({"scale": "two"}, "scale"),
        ({"mode": "nearest"}, "mode"),
        ({"noise_std": -1.0}, "noise_std"),
        ({"slice_axis": "diagonal"}, "slice_axis"),
    ],
)
def test_a_simulation_that_cannot_be_writes_nothing(tmp_path, make_subject_folder, options, word):
    files = make_subject_folder(tmp_path / "data", n=1)["sub00"]
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match=word):
        simulate(files["t2"], tmp_path / "out.nii.gz", **options)
    with pytest.raises(ValueError, match=r"out\.mha: the name must end in \.nii or \.nii\.gz"):
        simulate(files["t2"], tmp_path / "out.mha")
    assert files_in(tmp_path) == before


# --- errors


def test_an_override_that_no_config_has_is_refused(tmp_path):
    """Before the files are looked at: here there are none."""
    refused = r"batchsize: there is no such option in .*inference\.json; did you mean batch_size\?"
    with pytest.raises(ValueError, match=refused):
        super_resolve(tmp_path / "t2.nii.gz", tmp_path / "t1.nii.gz", batchsize=3)


def test_an_output_that_is_an_input_is_refused(tmp_path, make_subject_folder, make_affine):
    files = make_pair(tmp_path, make_subject_folder, make_affine)
    link = tmp_path / "link.nii.gz"
    link.symlink_to(files["t1"])
    (tmp_path / "t1_sd.nii.gz").hardlink_to(files["t1"])
    before = files_in(tmp_path)
    sr = {"scale": 2, "network": "zero_filling"}
    for name, write in {
        "image": lambda: super_resolve(files["lr"], files["t1"], files["lr"], **sr),
        "reference": lambda: super_resolve(files["lr"], files["t1"], link, **sr),
        "reference itself": lambda: super_resolve(
            files["lr"], files["t1"], tmp_path / "t1.nii.gz", self_ensemble=True, **sr
        ),
        "image itself": lambda: simulate(files["t2"], files["t2"]),
        "target": lambda: pair(files["lr"], files["t1"], files["lr"]),
        "reference ": lambda: pair(files["lr"], files["t1"], files["t1"]),
    }.items():
        with pytest.raises(ValueError, match=rf"is the {name}.* would be lost; name another file"):
            write()
        assert files_in(tmp_path) == before


def test_root_cause_is_what_names_the_file():
    try:
        try:
            try:
                raise EOFError("Compressed file ended")
            except EOFError as error:
                raise ValueError("lr.nii.gz: cannot be read") from error
        except ValueError as error:
            raise RuntimeError("applying transform") from error
    except RuntimeError as error:
        assert str(root_cause(error)) == "lr.nii.gz: cannot be read"
    alone = RuntimeError("on its own")
    assert root_cause(alone) is alone


def test_the_functions_are_at_the_top_of_the_package():
    assert glmamba_monai.super_resolve is super_resolve and glmamba_monai.simulate is simulate
    with pytest.raises(AttributeError, match="super_duper"):
        _ = glmamba_monai.super_duper
