"""MONAI Label without its server: the pair as requests pass it, the app folder, and what its training does."""

from __future__ import annotations

import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.data import MetaTensor

from glmamba_monai import label_app
from glmamba_monai.__main__ import main
from glmamba_monai.inference import pair, simulate, super_resolve
from glmamba_monai.networks import build_network
from glmamba_monai.transforms import GatherPaird, KSpaceUpsample, LoadVolumed, MatchReferenced, RecordGridd
from glmamba_monai.transforms.pair import read_pair, volume_name

KEYS = ["image", "reference"]
BUNDLE = Path(__file__).resolve().parent.parent / "bundle"


@pytest.fixture
def studies(tmp_path, make_subject_folder, monkeypatch):
    """A studies folder of MONAI Label with ``low``, ``t1``, ``t2`` and the 4-D ``both``."""
    folder = tmp_path / "studies"
    files = make_subject_folder(tmp_path / "data", n=1)["sub00"]
    folder.mkdir()
    for name, file in files.items():
        file.rename(folder / f"{name}.nii.gz")
    simulate(folder / "t2.nii.gz", folder / "low.nii.gz", 2)
    pair(folder / "low.nii.gz", folder / "t1.nii.gz", folder / "both.nii.gz")
    monkeypatch.setenv("MONAI_LABEL_STUDIES", str(folder))
    return folder


def data(path):
    return nib.load(path).get_fdata(dtype=np.float32)


# --- one file of two volumes


def test_a_pair_is_a_4d_nifti_with_the_target_zero_filled(studies):
    both = nib.load(studies / "both.nii.gz")
    assert both.shape == (24, 28, 6, 2) and both.get_data_dtype() == np.float32
    np.testing.assert_allclose(both.affine, nib.load(studies / "t1.nii.gz").affine, atol=1e-5)
    np.testing.assert_array_equal(both.dataobj[..., 1], data(studies / "t1.nii.gz"))
    upsampled = KSpaceUpsample()(torch.from_numpy(data(studies / "low.nii.gz"))[None], (24, 28, 6))
    np.testing.assert_allclose(both.dataobj[..., 0], upsampled[0], rtol=1e-5, atol=1e-2)


def test_a_target_of_the_same_matrix_stays_as_it_is(studies):
    pair(studies / "t2.nii.gz", studies / "t1.nii.gz", studies / "out.nii.gz")
    target, reference = read_pair(studies / "out.nii.gz")
    np.testing.assert_array_equal(target[0], data(studies / "t2.nii.gz"))
    np.testing.assert_array_equal(reference[0], data(studies / "t1.nii.gz"))


def test_the_two_volumes_may_be_a_fifth_axis(studies):
    """As ITK writes them, and 3D Slicer."""
    both = nib.load(studies / "both.nii.gz")
    nib.save(nib.Nifti1Image(both.get_fdata(dtype=np.float32)[:, :, :, None], both.affine), studies / "itk.nii.gz")
    for found, expected in zip(read_pair(studies / "itk.nii.gz"), read_pair(studies / "both.nii.gz")):
        assert torch.equal(found.as_tensor(), expected.as_tensor()) and torch.equal(found.affine, expected.affine)


def test_a_pair_is_super_resolved_like_its_volumes(studies, tmp_path):
    """Zero-filling: the pair's target comes out as it is, and nearly so do the two files."""
    made = ConfigWorkflow(
        config_file=str(BUNDLE / "configs" / "inference.json"),
        workflow_type="infer",
        logging_file=False,
        bundle_root=str(BUNDLE),
        image=str(studies / "both.nii.gz"),
        network="zero_filling",
        output_dir=str(tmp_path / "out"),
    )
    made.initialize()
    made.run()
    result = nib.load(tmp_path / "out" / "both_sr.nii.gz")
    expected = nib.load(studies / "both.nii.gz")
    np.testing.assert_allclose(result.affine, expected.affine, atol=1e-5)
    np.testing.assert_allclose(result.get_fdata(), expected.dataobj[..., 0], rtol=1e-5, atol=1e-2)
    of_two = super_resolve(studies / "low.nii.gz", studies / "t1.nii.gz", network="zero_filling")
    np.testing.assert_allclose(result.get_fdata(), of_two[0], rtol=1e-4, atol=1e-1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.b.nii.gz", "a.b"), ("a.NII.GZ", "a"), ("a.nii", "a"), ("a.nrrd", "a"), ("folder/a.v1", "a.v1")],
)
def test_names_of_volumes(name, expected):
    assert volume_name(name) == expected


# --- the pair of a request


@pytest.mark.parametrize(
    "request_",
    [
        {"reference": "{studies}/t1.nii.gz"},
        {"reference": "t1"},
        {"reference": "t1.nii.gz"},
        {"label": "{studies}/t1.nii.gz"},
        {"label": "{studies}/t2.nii.gz", "reference": "t1"},
    ],
    ids=lambda r: " ".join(r),
)
def test_a_reference_is_found(studies, request_):
    request_ = {key: value.format(studies=studies) for key, value in request_.items()}
    image = str(studies / "low.nii.gz")
    found = GatherPaird(KEYS)({"image": image, **request_})
    assert found["image"] == image and found["subject"] == "low" and not found.get("interpolated")
    assert found["reference"] == str(studies / "t1.nii.gz")


def test_a_pair_in_one_file_needs_no_reference(studies):
    found = GatherPaird(KEYS)({"image": str(studies / "both.nii.gz"), "subject": "named"})
    matched = MatchReferenced(KEYS)(LoadVolumed(KEYS)(found))
    assert matched["subject"] == "named" and matched["image"].shape == matched["reference"].shape == (1, 24, 28, 6)
    np.testing.assert_array_equal(matched["reference"][0], data(studies / "t1.nii.gz"))


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        (
            {"image": "{studies}/low.nii.gz"},
            ValueError,
            ["low.nii.gz: found one volume and no reference"],
        ),
        ({"image": ""}, FileNotFoundError, ["no such image in the studies folder {studies}"]),
        ({"image": "{studies}/gone.nii.gz"}, FileNotFoundError, ["gone.nii.gz: there is no such file"]),
        ({"image": "x", "reference": "t9"}, FileNotFoundError, ["reference t9", "it has both, cut, low, t1, t2, text"]),
        ({"image": "x", "reference": 7}, ValueError, ["reference must be a path or an image id, got 7"]),
        ({"image": "{studies}/text.nii.gz"}, ValueError, ["text.nii.gz: cannot be read as NIfTI"]),
        ({"image": "{studies}/three.nii.gz"}, ValueError, ["found 3 volumes, the shape (24, 28, 6, 3), expected two"]),
        ({"image": "{studies}/cut.nii.gz"}, ValueError, ["cut.nii.gz: cannot be read as NIfTI", "copy or convert"]),
    ],
    ids=lambda value: "",
)
def test_what_is_missing_or_unfit_is_said(studies, make_volume, request_, error, words):
    (studies / "text.nii.gz").write_text("no volume")
    (studies / "cut.nii.gz").write_bytes((studies / "both.nii.gz").read_bytes()[:9000])
    make_volume(studies / "three.nii.gz", np.ones((24, 28, 6, 3), np.float32))
    request_ = {k: v.format(studies=studies) if isinstance(v, str) else v for k, v in request_.items()}
    with pytest.raises(error) as found:
        GatherPaird(KEYS)(request_)
    for word in words:
        assert word.format(studies=studies) in str(found.value)


def test_the_grid_of_the_result_is_left_for_monai_label(make_affine):
    """MONAI Label resizes a result to the image's spatial_shape and writes it with its original_affine."""
    coarse, fine = (torch.from_numpy(make_affine(spacing)) for spacing in ((2.0, 2.0, 3.0), (1.0, 1.0, 3.0)))
    image = MetaTensor(torch.zeros(2, 8, 8, 3), affine=fine, meta={"spatial_shape": (4, 4, 3)})
    image.meta["original_affine"] = coarse.numpy()
    pred = MetaTensor(torch.zeros(1, 8, 8, 3), affine=fine)
    meta = RecordGridd("pred", "image")({"image": image, "pred": pred})["image"].meta
    assert tuple(meta["spatial_shape"]) == (8, 8, 3)
    np.testing.assert_array_equal(meta["original_affine"], fine.numpy())


# --- the app folder


@pytest.fixture
def weights(tmp_path):
    file = tmp_path / "weights.pt"
    torch.save(build_network("glmamba").state_dict(), file)
    return file


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A MONAI Label of which there is as much as label-app looks at."""
    site = tmp_path / "site"
    info, app = site / "monailabel-0.8.5.dist-info", site / "share" / "sample-apps" / "monaibundle"
    for folder in (info, app / "lib", app / "logs"):
        folder.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: monailabel\nVersion: 0.8.5\n")
    (info / "RECORD").write_text("share/sample-apps/radiology/main.py,,\nshare/sample-apps/monaibundle/main.py,,\n")
    (app / "main.py").write_text("class MyApp: ...\n")
    (app / "lib" / "__init__.py").write_text("")
    (app / "logs" / "app.log").write_text("of someone else")
    monkeypatch.syspath_prepend(str(site))


@pytest.mark.parametrize("cpu_build", [False, True])
def test_the_app_folder(tmp_path, installed, weights, monkeypatch, cpu_build):
    monkeypatch.setattr(label_app, "_torchvision_imports", lambda: not cpu_build)
    folder = tmp_path / "the app"
    folder.mkdir()
    command = label_app.set_up_app(folder, weights)
    assert f"-m monailabel.main start_server --app '{folder}' --studies STUDIES --conf models glmamba" in command
    assert command.startswith(f"PYTHONPATH='{folder}/torchvision_stub' ") == cpu_build
    assert (folder / "torchvision_stub" / "sitecustomize.py").is_file() == cpu_build
    assert (folder / "sample_app.py").read_text() == "class MyApp: ...\n" and not (folder / "logs").exists()
    for file in ("main.py", "torchvision_stub/sitecustomize.py")[: 1 + cpu_build]:
        compile((folder / file).read_text(), file, "exec")
    bundle = folder / "model" / "glmamba"
    assert not bundle.is_symlink() and [f.name for f in (bundle / "models").iterdir()] == ["model.pt"]
    assert (bundle / "models" / "model.pt").read_bytes() == weights.read_bytes()
    configs = {f.name: f.read_bytes() for f in (BUNDLE / "configs").iterdir()}
    assert {f.name: f.read_bytes() for f in (bundle / "configs").iterdir()} == configs


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_without_a_name_the_app_gets_all_weights_of_its_network(tmp_path, installed, weights):
    bundle = tmp_path / "bundle"
    (bundle / "models" / "glmamba_light").mkdir(parents=True)
    (bundle / "configs").symlink_to(BUNDLE / "configs")
    weights.rename(bundle / "models" / "model.pt")
    of_light = bundle / "models" / "glmamba_light" / "model.pt"
    torch.save(build_network("glmamba_light").state_dict(), of_light)
    for seed, name in enumerate(("model_2x.pt", "model_3x.pt")):
        torch.manual_seed(seed)
        torch.save(build_network("glmamba").state_dict(), bundle / "models" / name)
    label_app.set_up_app(tmp_path / "app", bundle_root=bundle)
    found = contents(tmp_path / "app" / "model" / "glmamba" / "models")
    of_light.unlink()
    of_light.parent.rmdir()
    assert found == contents(bundle / "models") and len(found) == 3

    torch.save(build_network("srcnn").state_dict(), bundle / "models" / "model_2x.pt")
    with pytest.raises(ValueError, match=r"model_2x\.pt: the weights do not fit network 'glmamba'"):
        label_app.set_up_app(tmp_path / "another", bundle_root=bundle)
    (bundle / "models" / "model.pt").unlink()
    with pytest.raises(FileNotFoundError, match="no weights"):
        label_app.set_up_app(tmp_path / "another", bundle_root=bundle)
    assert not (tmp_path / "another").exists()


def test_a_folder_in_use_is_refused(tmp_path, installed, weights):
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="app exists and is not an empty folder"):
        label_app.set_up_app(tmp_path / "app", weights)
    assert [f.name for f in (tmp_path / "app").iterdir()] == ["notes.txt"]


def test_without_monai_label_it_says_how_to_get_it(tmp_path, weights, monkeypatch, capsys):
    def nothing(name):
        raise label_app.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(label_app.metadata, "files", nothing)
    monkeypatch.setattr(sys, "argv", ["glmamba_monai", "label-app", str(tmp_path / "app"), "--weights", str(weights)])
    with pytest.raises(SystemExit) as exit:
        main()
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1
    assert f"MONAI Label is not installed for {sys.executable}" in error
    assert "monailabel==0.8.5" in error and "docs/monailabel.md" in error
    assert not (tmp_path / "app").exists()


def test_without_fitting_weights_there_is_no_app(tmp_path, installed):
    other = tmp_path / "other.pt"
    torch.save(build_network("srcnn").state_dict(), other)
    with pytest.raises(ValueError, match="the weights do not fit network 'glmamba'"):
        label_app.set_up_app(tmp_path / "app", other)
    with pytest.raises(FileNotFoundError, match="no weights"):
        label_app.set_up_app(tmp_path / "app", tmp_path / "none.pt")
    assert not (tmp_path / "app").exists()


def test_pair_as_typed(studies, monkeypatch, capsys):
    output = studies.parent / "pair.nii.gz"
    monkeypatch.setattr(
        sys, "argv", ["glmamba_monai", "pair", str(studies / "low.nii.gz"), str(studies / "t1.nii.gz"), str(output)]
    )
    main()
    assert capsys.readouterr().out == f"{output}: 24 x 28 x 6, target and reference\n"
    assert output.is_file()


# --- training


@pytest.fixture
def app_bundle(tmp_path):
    """The bundle of an app whose network is srcnn_ref, for speed."""
    root = tmp_path / "model" / "glmamba"
    (root / "models").mkdir(parents=True)
    (root / "configs").symlink_to(BUNDLE / "configs")
    torch.manual_seed(0)
    torch.save(build_network("srcnn_ref").state_dict(), root / "models" / "model.pt")
    return root


def labelled(make_subject_folder, folder, n):
    subjects = make_subject_folder(folder, n=n)
    return [{"image": str(files["t1"]), "label": str(files["t2"])} for files in subjects.values()]


def named(items):
    """Items whose images have names of their own, as in a studies folder."""
    return [{**item, "image": str(Path(item["image"]).rename(f"{item['image'][:-7]}_{i}.nii.gz"))} for i, item in items]


REQUEST = {"iterations_per_epoch": 3, "batch_size": 2, "crop_size": 16, "val_slices": 3, "val_split": 0.34}
FROM_MONAI_LABEL = {"train#trainer#max_epochs": 2, "device": "cpu", "train#handlers": [{}], "bundle_root": "..."}


def test_training_in_the_app(tmp_path, make_subject_folder, app_bundle):
    """The overrides that the server hands over train the bundle; better weights take the place of the former."""
    items = named(enumerate(labelled(make_subject_folder, tmp_path / "data", 3)))
    long_enough = {**REQUEST, "iterations_per_epoch": 30}  # to be better than weights that are zero-filling
    overrides = label_app.training_overrides(app_bundle, items, long_enough, FROM_MONAI_LABEL)
    overrides.update(network="srcnn_ref", warmup_steps=1)
    made = ConfigWorkflow(
        config_file=str(app_bundle / "configs" / "train.json"), workflow_type="train", logging_file=False, **overrides
    )
    made.initialize()
    made.run()
    assert made.parser.get_parsed_content("train#trainer").state.epoch == 2
    assert made.parser.get_parsed_content("validation") == 0.34
    models = app_bundle / "models"
    former, trained = (models / "model.pt").read_bytes(), (app_bundle / "results" / "model.pt").read_bytes()
    said = label_app.use_trained_weights(app_bundle, overrides)
    assert said.startswith(
        f"the server uses the trained weights from now on, {models / 'model_2x.pt'}, for volumes of "
    )
    assert "for volumes of 2x (PSNR " in said and said.endswith(f"the former are in {models / 'model.pt'}")
    best = made.parser.get_parsed_content("validate#evaluator").state.best_metric
    assert f"PSNR {best:.2f} dB" in said
    assert contents(models) == {"model.pt": former, "model_2x.pt": trained} and trained != former
    said = label_app.use_trained_weights(app_bundle, overrides)  # of the same weights
    assert said.startswith("the trained weights are no better")
    assert contents(models) == {"model.pt": former, "model_2x.pt": trained}


@pytest.mark.parametrize(
    ("there", "scale", "expected"),
    [
        (["model.pt"], 2, {"model.pt": "model.pt", "model_2x.pt": "trained"}),
        (
            ["model.pt", "model_2x.pt"],
            [2, 2],
            {"model.pt": "model.pt", "model_2x.pt": "trained", "previous-model_2x.pt": "model_2x.pt"},
        ),
        (
            ["model.pt", "model_2x.pt"],
            4,
            {"model.pt": "model.pt", "model_2x.pt": "model_2x.pt", "model_4x.pt": "trained"},
        ),
        (
            ["model.pt", "model_2x.pt"],
            2.5,
            {"model.pt": "trained", "model_2x.pt": "model_2x.pt", "previous-model.pt": "model.pt"},
        ),
        (["model.pt"], [2, 4], {"model.pt": "trained", "previous-model.pt": "model.pt"}),
    ],
    ids=str,
)
def test_where_better_weights_go(tmp_path, monkeypatch, there, scale, expected):
    models, results = tmp_path / "models", tmp_path / "results"
    for folder in (models, results):
        folder.mkdir()
    for name in there:
        (models / name).write_text(name)
    (results / "model.pt").write_text("trained")
    compared = []

    def psnr(root, file, overrides):
        compared.append(file.read_text())
        return float(len(compared))

    monkeypatch.setattr(label_app, "_held_out_psnr", psnr)
    said = label_app.use_trained_weights(tmp_path, {"scale": scale})
    used = next(name for name, content in expected.items() if content == "trained")
    former = next((name for name in expected if name.startswith("previous-")), "model.pt")
    assert {name: content.decode() for name, content in contents(models).items()} == expected
    assert compared == [used if used in there else "model.pt", "trained"]  # with those that served that factor
    assert f"from now on, {models / used}, " in said and said.endswith(f"the former are in {models / former}")
    whose = f"every factor without a file of its own, though they were judged at {scale} alone ("
    assert f"for volumes of {whose if used == 'model.pt' else f'{used[6]}x ('}" in said


def test_weights_without_a_figure_take_no_place(tmp_path, monkeypatch):
    """A PSNR that is no number is not a better one."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "model.pt").touch()
    monkeypatch.setattr(
        label_app, "_held_out_psnr", lambda root, file, _: float("nan") if "results" in str(file) else 30.0
    )
    assert "no better" in label_app.use_trained_weights(tmp_path, {"scale": 2})
    assert contents(tmp_path / "models") == {"model.pt": b""}


def test_weights_that_are_gone(app_bundle):
    (app_bundle / "models" / "model.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"models/model\.pt: the weights are gone; put them back"):
        label_app.choose_weights(app_bundle, factor=[2, 2])


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({}, {"weights": "model_2x.pt"}),
        ({"scale": 3}, {"weights": "model.pt", "scale": 3}),
        ({"scale": [2, 4]}, {"weights": "model.pt", "scale": [2, 4]}),
        ({"model_filename": "previous-model.pt"}, {"weights": "previous-model.pt"}),
        ({"model_filename": "model.pt"}, {"weights": "model.pt"}),
        ({"model_filename": label_app.BY_FACTOR}, {"weights": "model_2x.pt"}),
        ({"model_filename": ["model.pt"], "val_split": -1}, {"weights": "model_2x.pt"}),
        ({"pretrained": False}, {"weights": None}),
        ({"pretrained": False, "scale": 4, "val_split": 0.5}, {"weights": None, "scale": 4, "validation": 0.5}),
    ],
    ids=str,
)
def test_a_training_request(tmp_path, app_bundle, request_, expected):
    for name in ("previous-model.pt", "model_2x.pt"):
        (app_bundle / "models" / name).touch()
    items = [{"image": f"{n}.nii.gz", "label": f"final/{n}.nii.gz"} for n in "ab"]
    found = label_app.training_overrides(app_bundle, items, request_, FROM_MONAI_LABEL)
    begins_with = found.get("initial_weights")
    assert (begins_with and Path(begins_with)) == (expected["weights"] and app_bundle / "models" / expected["weights"])
    assert found["scale"] == expected.get("scale", 2) and found.get("validation") == expected.get("validation")
    assert found["epochs"] == 2 and found["device"] == "$torch.device('cpu')"


@pytest.mark.parametrize(
    ("n", "request_", "error", "words"),
    [
        (1, {}, ValueError, r"found 1 image\(s\) with a final label, expected at least 2"),
        (2, {"scale": "$2"}, ValueError, r"scale '\$2': expected a number"),
        (2, {"scale": "2"}, ValueError, "scale '2': expected a number"),
        (2, {"scale": "$None"}, ValueError, r"scale '\$None': expected a number above 1"),
        (2, {"scale": 1}, ValueError, "scale 1: expected a number above 1"),
        (2, {"scale": [2, 2, 2]}, ValueError, r"scale \[2, 2, 2\]: expected a number above 1, or two"),
        (2, {"max_epochs": "$open('x', 'w')"}, ValueError, "max_epochs .*: expected a number from 1 on"),
        (2, {"max_epochs": [1]}, ValueError, r"max_epochs \[1\]: expected a number from 1 on"),
        (2, {"max_epochs": 0}, ValueError, "max_epochs 0: expected a number from 1 on"),
        (2, {"crop_size": "$open('x', 'w')"}, ValueError, r"crop_size \"\$open\('x', 'w'\)\": expected a number"),
        (
            2,
            {"model_filename": "none.pt"},
            FileNotFoundError,
            "model_filename none.pt: there is no such file in .*; it has model.pt",
        ),
    ],
)
def test_a_training_that_cannot_be(app_bundle, n, request_, error, words):
    items = [{"image": f"{i}.nii.gz", "label": f"final/{i}.nii.gz"} for i in range(n)]
    epochs = request_.get("max_epochs", 2)
    with pytest.raises(error, match=words):
        label_app.training_overrides(
            app_bundle, items, request_, {**FROM_MONAI_LABEL, "train#trainer#max_epochs": epochs}
        )
