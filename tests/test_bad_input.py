"""Bad input, through the bundle's own configs: one clear error, nothing written, nothing lost."""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow

from glmamba_monai import simulate, super_resolve
from glmamba_monai.data import prepare_datalist, write_datalist
from glmamba_monai.errors import root_cause
from glmamba_monai.networks import build_network

CONFIGS = Path(__file__).resolve().parent.parent / "bundle" / "configs"
TRAIN, EVALUATE, INFERENCE = (str(CONFIGS / f"{name}.json") for name in ("train", "evaluate", "inference"))
FILES = {"train": TRAIN, "evaluate": [TRAIN, EVALUATE], "infer": INFERENCE}
SHORT = {"epochs": 1, "iterations_per_epoch": 2, "batch_size": 2, "crop_size": 16, "val_slices": 2}
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def run(kind, **overrides):
    options = {**SHORT, "network": "srcnn_ref"} if kind == "train" else {"network": "srcnn_ref"}
    workflow = ConfigWorkflow(
        config_file=FILES[kind],
        workflow_type="infer" if kind == "infer" else "train",
        logging_file=False,
        **{**options, **{k: str(v) if isinstance(v, Path) else v for k, v in overrides.items()}},
    )
    workflow.initialize()
    workflow.run()
    return workflow


def state_of(folder):
    """Every file with its bytes, every folder with None; an empty output folder is no harm."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
        if p.is_file() or (p.is_dir() and any(p.iterdir()))
    }


def refused(kind, folder, **overrides):
    """The message of the error that a run ends with, having left everything under ``folder`` as it was."""
    before = state_of(folder)
    with pytest.raises(Exception) as error:
        run(kind, **overrides)
    cause = root_cause(error.value)
    assert isinstance(cause, (ValueError, OSError)), repr(cause)
    after = state_of(folder)
    for name in [name for name in after if Path(name).name == "unfinished-metrics.csv"]:
        del after[name]  # the subjects before
    assert after == before
    return str(cause)


@pytest.fixture
def data(tmp_path, make_subject_folder):
    """Three subjects for training and evaluation: ``{subject: {contrast: path}}`` in tmp_path / "data"."""
    return make_subject_folder(tmp_path / "data", n=3)


@pytest.fixture
def pair(tmp_path, data):
    """A low-resolution volume and its reference: what inference takes."""
    simulate(data["sub00"]["t2"], tmp_path / "lr.nii.gz", 2)
    return {"image": tmp_path / "lr.nii.gz", "reference": data["sub00"]["t1"]}


@pytest.fixture
def results(tmp_path, data):
    """Output folder with the results of an earlier run, among them weights that fit srcnn_ref."""
    folder = tmp_path / "results"
    write_datalist(prepare_datalist(tmp_path / "data", folder, "t2", "t1", seed=0), folder)
    torch.save(build_network("srcnn_ref").state_dict(), folder / "model.pt")
    for name in ("checkpoint.pt", "metrics.csv", "summary.json", "sub00_sr.nii.gz", "lr_sr.nii.gz"):
        (folder / name).write_text("of an earlier run")
    return folder


def write(path, array):
    nib.save(nib.Nifti1Image(array, nib.load(path).affine), path)


def break_volume(path, how):
    content = path.read_bytes()
    array = nib.load(path).get_fdata(dtype=np.float32)
    if how == "4-D":
        write(path, np.stack([array, array], -1))
    elif how == "2-D":
        write(path, array[..., 2])
    elif how in ("nan", "inf"):
        array[5, 6, 2] = float(how)
        write(path, array)
    elif how == "zero":
        write(path, 0 * array)
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("these are notes")


BROKEN = {
    "4-D": ["expected one 3-D volume", "extract a single volume"],
    "2-D": ["expected one 3-D volume"],
    "nan": ["1 of ", "NaN or infinite", "repair or mask"],
    "inf": ["1 of ", "NaN or infinite", "repair or mask"],
    "zero": ["every voxel is zero", "exported or masked wrongly"],
    "truncated": ["cannot be read as NIfTI", "copy it again"],
    "empty": ["cannot be read as NIfTI", "copy"],
    "text": ["cannot be read as NIfTI", "copy"],
}


# --- broken volumes


@pytest.mark.parametrize("kind", ["train", "evaluate"])
@pytest.mark.parametrize("contrast", ["t2", "t1"])
@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_volume_stops_the_run_and_what_there_was_stays(tmp_path, data, results, kind, contrast, how):
    path = data["sub01"][contrast]
    break_volume(path, how)
    more = {"evaluate_on": "all"} if kind == "evaluate" else {}
    message = refused(kind, tmp_path, dataset_dir=tmp_path / "data", output_dir=results, **more)
    assert message.startswith(f"{path}: ") and "\n" not in message
    for words in BROKEN[how]:
        assert words in message


@pytest.mark.parametrize("held_out", ["sub01", "sub02"])
def test_training_and_held_out_volumes_are_read_before_the_first_step(tmp_path, data, results, held_out):
    """Whichever part of the split the broken volume falls into."""
    break_volume(data["sub01"]["t2"], "nan")
    message = refused(
        "train", tmp_path, dataset_dir=tmp_path / "data", output_dir=results, validation=[held_out], seed=3
    )
    assert str(data["sub01"]["t2"]) in message


@pytest.mark.parametrize("role", ["image", "reference"])
@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_volume_is_not_super_resolved(tmp_path, pair, results, role, how):
    break_volume(pair[role], how)
    message = refused("infer", tmp_path, **pair, output_dir=results, network="zero_filling")
    assert message.startswith(f"{pair[role]}: ") and "\n" not in message
    for words in BROKEN[how]:
        assert words in message
    before = state_of(tmp_path)
    with pytest.raises(ValueError) as error:
        super_resolve(pair["image"], pair["reference"], results / "lr_sr.nii.gz", network="zero_filling")
    assert str(error.value) == message
    assert state_of(tmp_path) == before


# --- data sets


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("name", ["nowhere", "empty", "lr.nii.gz"])
def test_a_data_set_that_is_not_there(tmp_path, pair, results, kind, name):
    (tmp_path / "empty").mkdir()
    more = {"reference": "t1"} if kind == "infer" else {}
    message = refused(kind, tmp_path, dataset_dir=tmp_path / name, output_dir=results, **more)
    assert message.startswith(f"dataset_dir {tmp_path / name}: ")
    remedy = "expected files are\n" if name == "empty" else "there is no such folder"
    assert remedy in message


def test_a_subject_without_its_reference_is_left_out_of_a_training(tmp_path, data, caplog):
    data["sub01"]["t1"].unlink()
    with caplog.at_level(logging.WARNING):
        run("train", dataset_dir=tmp_path / "data", output_dir=tmp_path / "new")
    assert "subject sub01 has no reference (t1); it has t2: left out" in caplog.text
    split = json.loads((tmp_path / "new" / "datalist.json").read_text())
    assert sorted(item["subject"] for part in ("training", "validation") for item in split[part]) == ["sub00", "sub02"]


def test_a_subject_without_its_reference_is_an_error_of_inference(tmp_path, data, results):
    data["sub01"]["t1"].unlink()
    message = refused(
        "infer", tmp_path, dataset_dir=tmp_path / "data", reference="t1", output_dir=results, network="zero_filling"
    )
    assert message.startswith("subject sub01 has no reference (t1); it has t2")


@pytest.mark.parametrize("kind", FILES)
def test_an_unknown_contrast(tmp_path, data, results, kind):
    message = refused(kind, tmp_path, dataset_dir=tmp_path / "data", target="t7", reference="t1", output_dir=results)
    assert "t7" in message and "t1, t2" in message


def test_target_and_reference_on_different_grids(tmp_path, data, make_affine, results):
    path = data["sub02"]["t1"]
    nib.save(nib.Nifti1Image(nib.load(path).get_fdata(dtype=np.float32), make_affine(origin=(0, 0, 0))), path)
    for kind in ("train", "evaluate"):
        message = refused(kind, tmp_path, dataset_dir=tmp_path / "data", output_dir=results)
        assert str(path) in message and str(data["sub02"]["t2"]) in message and "register" in message


@pytest.mark.parametrize("given", [{}, {"reference": "t1"}, {"image": "x", "dataset_dir": "y"}], ids=str)
def test_inference_without_its_input(tmp_path, results, given):
    message = refused("infer", tmp_path, output_dir=results, **given)
    assert "--image LR.nii.gz --reference REFERENCE.nii.gz" in message and "--dataset_dir" in message


def test_one_volume_without_a_reference(tmp_path, pair, results):
    message = refused("infer", tmp_path, output_dir=results, image=pair["image"], network="zero_filling")
    assert str(pair["image"]) in message and "reference" in message and "4-D" in message


# --- grids and factors


def test_volumes_that_do_not_overlap(tmp_path, pair, make_volume, make_brain, make_affine, results):
    other = make_volume(tmp_path / "other.nii.gz", make_brain()["t1"], make_affine(origin=(900, 40, -17)))
    message = refused("infer", tmp_path, **{**pair, "reference": other}, output_dir=results, network="zero_filling")
    assert str(pair["image"]) in message and str(other) in message
    assert "do not overlap in world space" in message and "same patient" in message


@pytest.mark.parametrize("scale", [4, 1.5, [2, 3], "two", 0, -2], ids=str)
def test_a_scale_that_the_volumes_do_not_have(tmp_path, pair, results, scale):
    message = refused("infer", tmp_path, **pair, output_dir=results, network="zero_filling", scale=scale)
    if isinstance(scale, str) or (not isinstance(scale, list) and scale < 1):
        assert f"scale must be auto, a number >= 1 or one such number per in-plane axis, got {scale!r}" in message
    else:
        assert f"scale {scale} does not fit" in message and "auto" in message
        assert str(pair["image"]) in message and str(pair["reference"]) in message


@pytest.mark.parametrize("scale", [0.5, "two", [2, 2, 2, 2]], ids=str)
def test_a_scale_that_cannot_be_trained(tmp_path, data, results, scale):
    message = refused("train", tmp_path, dataset_dir=tmp_path / "data", output_dir=results, scale=scale)
    assert "scale must" in message


@pytest.mark.parametrize("kind", FILES)
def test_a_slice_axis_that_does_not_exist(tmp_path, data, pair, results, kind):
    source = pair if kind == "infer" else {"dataset_dir": tmp_path / "data"}
    more = {"network": "zero_filling"} if kind == "infer" else {}
    message = refused(kind, tmp_path, **source, output_dir=results, slice_axis="diagonal", **more)
    assert "slice_axis must be auto, 0, 1, 2, sagittal, coronal, axial; got 'diagonal'" in message


# --- networks, backends, weights


@pytest.mark.parametrize("kind", FILES)
def test_an_unknown_network(tmp_path, pair, results, kind):
    source = pair if kind == "infer" else {"dataset_dir": tmp_path / "data"}
    message = refused(kind, tmp_path, **source, output_dir=results, network="gan")
    assert message.startswith("network 'gan' is unknown; known are glmamba, glmamba_paper, glmamba_light, ")


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("variable", ["GLMAMBA_SCAN_BACKEND", "GLMAMBA_DEFORM_BACKEND"])
def test_an_unknown_backend(tmp_path, pair, results, monkeypatch, kind, variable):
    monkeypatch.setenv(variable, "fast")
    torch.save(build_network("glmamba_light").state_dict(), tmp_path / "light.pt")
    source = pair if kind == "infer" else {"dataset_dir": tmp_path / "data"}
    more = {} if kind == "train" else {"weights": tmp_path / "light.pt"}
    message = refused(kind, tmp_path, **source, output_dir=results, network="glmamba_light", **more)
    assert message.startswith(f"{variable}: found 'fast', expected one of ") and "'torch'" in message


@pytest.mark.parametrize("kind", ["evaluate", "infer"])
def test_no_weights(tmp_path, pair, results, kind):
    source = pair if kind == "infer" else {"dataset_dir": tmp_path / "data"}
    message = refused(kind, tmp_path, **source, output_dir=results, weights=tmp_path / "nowhere.pt")
    assert str(tmp_path / "nowhere.pt") in message and "Train first" in message and "--weights" in message
    (tmp_path / "bundle").mkdir()
    (results / "model.pt").unlink()
    message = refused(kind, tmp_path, **source, output_dir=results, bundle_root=tmp_path / "bundle")
    assert str(tmp_path / "bundle" / "models" / "model.pt") in message and "Train first" in message
    other = tmp_path / "bundle" / "models" / "model_3x.pt"  # and the factor is 2
    other.parent.mkdir()
    torch.save(build_network("srcnn_ref").state_dict(), other)
    message = refused(kind, tmp_path, **source, output_dir=results, bundle_root=tmp_path / "bundle")
    assert f"model_2x.pt nor {other.with_name('model.pt')}; there is {other} for 3x alone" in message


@pytest.mark.parametrize("kind", ["evaluate", "infer"])
@pytest.mark.parametrize("content", ["other network", "other preset", "text", "truncated", "code"])
def test_weights_that_do_not_fit(tmp_path, pair, results, kind, content):
    path, network = tmp_path / "w.pt", "srcnn_ref"
    if content == "text":
        path.write_text("these are notes")
    elif content == "truncated":
        path.write_bytes((results / "model.pt").read_bytes()[:10000])
    elif content == "code":
        torch.save(build_network(network), path)
    else:
        made_for, network = {
            "other network": ("srcnn", "srcnn_ref"),
            "other preset": ("glmamba", "glmamba_light"),
        }[content]
        torch.save({"network": build_network(made_for).state_dict(), "epoch": 3}, path)
    source = pair if kind == "infer" else {"dataset_dir": tmp_path / "data"}
    message = refused(kind, tmp_path, **source, output_dir=results, network=network, weights=path)
    assert message.startswith(f"{path}: ") and "\n" not in message
    if content.startswith("other"):
        assert f"they fit {made_for}" in message and "name it with --network" in message
    else:
        assert "is no file of weights, or a damaged one" in message


@pytest.mark.parametrize("content", ["other network", "damaged"])
def test_a_training_is_not_resumed_from_a_checkpoint_that_does_not_fit(tmp_path, data, content):
    """TensorBoard has opened its log by then, and nothing else has been written."""
    common = {"dataset_dir": tmp_path / "data", "output_dir": tmp_path / "results"}
    run("train", **common)
    if content == "damaged":
        path = tmp_path / "results" / "checkpoint.pt"
        path.write_bytes(path.read_bytes()[:10000])
    before = {k: v for k, v in state_of(tmp_path).items() if "tensorboard" not in k}
    network = {"network": "srcnn"} if content == "other network" else {}
    with pytest.raises((RuntimeError, ValueError)) as error:
        run("train", **common, resume=True, **network)
    message = str(root_cause(error.value))
    assert message.startswith(f"{tmp_path / 'results' / 'checkpoint.pt'}: ")
    assert ("they fit srcnn_ref: name it with --network" if network else "a damaged one") in message
    assert {k: v for k, v in state_of(tmp_path).items() if "tensorboard" not in k} == before


# --- output folders and disks


@pytest.mark.parametrize("kind", FILES)
def test_an_output_folder_that_cannot_be_written(tmp_path, pair, kind):
    """Said before any volume is read: not after the hours of a training."""
    (tmp_path / "file").write_text("no folder")
    break_volume(pair["reference"], "nan")
    source = pair if kind == "infer" else {"dataset_dir": tmp_path / "data"}
    message = refused(kind, tmp_path, **source, output_dir=tmp_path / "file" / "out", network="srcnn_ref")
    assert f"output folder {tmp_path / 'file' / 'out'}: cannot be written" in message and "output_dir" in message
    if kind == "infer":
        with pytest.raises(OSError, match=r"output folder .*file/out: cannot be written"):
            super_resolve(pair["image"], pair["reference"], tmp_path / "file" / "out" / "x.nii.gz")


def filling_disk(save):
    """A writer on a disk that fills up: half of the file arrives."""

    def write(content, path, *arguments, **options):
        save(content, path, *arguments, **options)
        path = Path(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        raise FULL

    return write


def test_a_disk_that_fills_while_a_training_saves(tmp_path, data, monkeypatch):
    """The earlier training is set aside, not lost, and no half file stands there as a checkpoint."""
    common = {"dataset_dir": tmp_path / "data", "output_dir": tmp_path / "results"}
    run("train", **common)
    earlier = {n: (tmp_path / "results" / n).read_bytes() for n in ("model.pt", "checkpoint.pt", "datalist.json")}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", filling_disk(torch.save))
        with pytest.raises((RuntimeError, OSError)) as error:
            run("train", **common)
    cause = root_cause(error.value)
    assert isinstance(cause, OSError) and str(cause).startswith(
        f"{tmp_path / 'results' / 'model.pt'}: cannot be written"
    )
    assert "No space left on device" in str(cause) and "Free space" in str(cause)
    left = {
        p.name: p.read_bytes() for p in (tmp_path / "results").iterdir() if p.is_file() and p.name != "datalist.json"
    }
    assert left == {f"previous-{name}": content for name, content in earlier.items()}


def test_a_disk_that_fills_while_a_result_is_saved(tmp_path, pair, results, monkeypatch):
    monkeypatch.setattr(nib, "save", filling_disk(nib.save))
    message = refused("infer", tmp_path, **pair, output_dir=results, network="zero_filling")
    assert message.startswith(f"{results / 'lr_sr.nii.gz'}: cannot be written") and "No space left" in message
    before = state_of(tmp_path)
    for make in (
        lambda: super_resolve(*pair.values(), results / "lr_sr.nii.gz", network="zero_filling"),
        lambda: simulate(pair["reference"], results / "lr_sr.nii.gz"),
    ):
        with pytest.raises(OSError, match=r"lr_sr\.nii\.gz: cannot be written .*No space left.*Free space"):
            make()
        assert state_of(tmp_path) == before


def test_a_disk_that_fills_while_an_evaluation_writes(tmp_path, data, results, monkeypatch):
    write_text = Path.write_text

    def fill(path, text, *arguments, **options):
        write_text(path, text[: len(text) // 2], *arguments, **options)
        raise FULL

    monkeypatch.setattr(Path, "write_text", fill)
    message = refused("evaluate", tmp_path, dataset_dir=tmp_path / "data", output_dir=results)
    assert message.startswith(f"{results / 'unfinished-metrics.csv'}: cannot be written") and "No space left" in message
