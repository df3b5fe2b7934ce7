"""Files: complete or not there, and what stood there before is never lost."""

from __future__ import annotations

import csv
import errno
import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import SaveImage

from glmamba_monai.files import (
    AtomicNibabelWriter,
    file_stem,
    require_writable,
    write_atomically,
    write_checkpoint,
    write_csv,
    write_json,
)


def everything_under(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def fill_the_disk(path, error):
    """A writer that gets half of its content out, and then fails."""
    path.write_text("half of the new con")
    raise error


@pytest.mark.parametrize("before", [None, "the old content"])
def test_a_file_is_written_with_its_folders(tmp_path, before):
    path = tmp_path / "a" / "b" / "result.txt"
    if before:
        write_atomically(path, lambda p: p.write_text(before) and None)
    seen = []

    def write(temporary):
        seen.append(temporary)
        assert path.is_file() == bool(before)  # nobody sees the file before it is complete
        temporary.write_text("the new content")

    assert write_atomically(str(path), write) == path
    assert path.read_text() == "the new content"
    assert seen[0].parent == path.parent and seen[0].suffix == path.suffix
    assert everything_under(tmp_path) == ["a", "a/b", "a/b/result.txt"]


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file data/0")],
)
@pytest.mark.parametrize("before", [None, "the old content"])
def test_a_full_disk_costs_nothing_that_was_there(tmp_path, error, before):
    path = tmp_path / "result.txt"
    if before:
        path.write_text(before)
    with pytest.raises(OSError) as raised:
        write_atomically(path, lambda p: fill_the_disk(p, error))
    for part in (f"{path}: cannot be written", str(error), "Free space or choose another output folder"):
        assert part in str(raised.value)
    assert raised.value.__cause__ is error
    assert everything_under(tmp_path) == (["result.txt"] if before else [])
    assert not before or path.read_text() == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a defect of the writer"), SystemExit(1)])
def test_other_errors_pass_and_leave_no_traces(tmp_path, error):
    path = tmp_path / "result.txt"
    path.write_text("the old content")
    with pytest.raises(type(error)) as raised:
        write_atomically(path, lambda p: fill_the_disk(p, error))
    assert raised.value is error
    assert everything_under(tmp_path) == ["result.txt"] and path.read_text() == "the old content"


def test_a_path_under_a_regular_file(tmp_path):
    (tmp_path / "file").write_text("I am no folder")
    for path in (tmp_path / "file" / "result.json", tmp_path / "file" / "sub" / "result.json"):
        with pytest.raises(OSError) as raised:
            write_json(path, {})
        assert str(raised.value).startswith(f"{path}: cannot be written")
        assert "choose another output folder" in str(raised.value)
    assert everything_under(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "I am no folder"


def test_a_folder_in_the_place_of_the_file(tmp_path):
    (tmp_path / "result.json" / "kept").mkdir(parents=True)
    with pytest.raises(OSError, match="cannot be written"):
        write_json(tmp_path / "result.json", {})
    assert everything_under(tmp_path) == ["result.json", "result.json/kept"]


def test_a_subject_names_files_in_their_folder():
    """Names without a separator, which all of the layouts give, are their own stems."""
    for name in ("sub00", "BraTS-GLI-00012-000", "IXI012-HH-1211", "Patient 1 (a).2", "µ", ".hidden"):
        assert file_stem(name) == name
    assert file_stem(7) == "7"
    assert [file_stem(name) for name in ("site1/01", "../x", "/a", r"..\x")] == ["site1_01", ".._x", "_a", ".._x"]


def test_json_is_indented_and_ends_with_a_newline(tmp_path):
    content = {"training": [{"subject": "sub00", "dice": 0.5}], "scale": [2, 2], "none": None}
    path = write_json(tmp_path / "datalist.json", content)
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == content
    assert text.endswith("}\n") and '\n  "training"' in text


def test_json_that_cannot_be_written_leaves_the_old(tmp_path):
    path = write_json(tmp_path / "summary.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1} and everything_under(tmp_path) == ["summary.json"]


def test_a_table_keeps_the_columns_that_are_asked_for(tmp_path):
    rows = [{"name": 'odd, "name"', "value": 1 / 3, "other": 1}, {"name": "µ", "slices": 4}]
    path = write_csv(tmp_path / "new" / "rows.csv", rows, ["name", "slices", "value"])
    with path.open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert found == [
        {"name": 'odd, "name"', "slices": "", "value": "0.333333"},
        {"name": "µ", "slices": "4", "value": ""},
    ]


def test_checkpoints_round_trip(tmp_path):
    state = {"weights": torch.arange(6.0).reshape(2, 3), "epoch": 3, "random": {"cpu": torch.get_rng_state()}}
    loaded = torch.load(write_checkpoint(tmp_path / "checkpoint.pt", state), weights_only=True)
    assert loaded["epoch"] == 3 and torch.equal(loaded["weights"], state["weights"])


def test_a_disk_that_fills_within_a_checkpoint(tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path / "checkpoint.pt", {"epoch": 1, "weights": torch.ones(100_000)})
    save = torch.save

    def full(content, file):
        save(content, file)
        os.truncate(file, Path(file).stat().st_size // 2)
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 192 vs 86")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"checkpoint\.pt: cannot be written .*Free space"):
        write_checkpoint(path, {"epoch": 2, "weights": torch.zeros(100_000)})
    assert everything_under(tmp_path) == ["checkpoint.pt"]
    kept = torch.load(path, weights_only=True)
    assert kept["epoch"] == 1 and torch.equal(kept["weights"], torch.ones(100_000))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_disk(tmp_path):
    """The kernel's own ENOSPC, through Python's buffered writes and through torch.save."""
    path = tmp_path / "checkpoint.pt"
    path.write_text("the old content")

    def write(temporary):
        temporary.symlink_to("/dev/full")
        torch.save({"weights": torch.ones(100_000)}, temporary)

    for writer in (write, lambda p: p.symlink_to("/dev/full") or (p.write_text("x" * 100_000) and None)):
        with pytest.raises(OSError, match="cannot be written"):
            write_atomically(path, writer)
        assert everything_under(tmp_path) == ["checkpoint.pt"] and path.read_text() == "the old content"


# --- the output folder


def test_a_writable_folder_is_made_and_left_empty(tmp_path):
    folder = tmp_path / "a" / "results"
    assert require_writable(str(folder)) == folder == require_writable(folder)
    assert folder.is_dir() and everything_under(folder) == []


@pytest.mark.parametrize("below", ["", "results", "results/deeper"])
def test_an_output_folder_under_a_regular_file_is_refused(tmp_path, below):
    (tmp_path / "file").write_text("I am no folder")
    folder = tmp_path / "file" / below
    with pytest.raises(OSError) as raised:
        require_writable(folder)
    assert str(raised.value).startswith(f"output folder {folder}: cannot be written (")
    assert "output_dir" in str(raised.value)
    assert everything_under(tmp_path) == ["file"]


def test_an_output_folder_without_space_or_permission_is_refused(tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "write_bytes", refuse)  # by hand: root may write anywhere
    with pytest.raises(OSError, match=r"output folder .*\(Permission denied\); choose another output or output_dir"):
        require_writable(tmp_path)


# --- NIfTI


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("codes", ["RAS", "LPS", "ASL"])
def test_volumes_keep_their_grid_and_values(tmp_path, make_affine, suffix, codes):
    affine = make_affine(codes=codes)
    data = np.random.default_rng(0).normal(0, 500, (5, 7, 3)).astype(np.float64)
    writer = AtomicNibabelWriter()
    writer.set_data_array(torch.from_numpy(data)[None])
    writer.set_metadata({"affine": torch.from_numpy(affine)}, resample=False)
    writer.write(tmp_path / "out" / f"sr{suffix}")
    image = nib.load(tmp_path / "out" / f"sr{suffix}")
    assert image.shape == data.shape and image.get_data_dtype() == np.float32
    np.testing.assert_array_equal(image.get_fdata(dtype=np.float32), data.astype(np.float32))
    header = image.header
    assert header.get_slope_inter() in ((1, 0), (None, None))
    assert header.get_xyzt_units()[0] == "mm"
    for form, code in (header.get_sform(coded=True), header.get_qform(coded=True)):
        assert code == 1
        np.testing.assert_allclose(form, affine, atol=1e-4)
    np.testing.assert_allclose(header.get_zooms(), np.linalg.norm(affine[:3, :3], axis=0), rtol=1e-6)
    assert everything_under(tmp_path) == ["out", f"out/sr{suffix}"]


@pytest.mark.parametrize("shape", [(5, 7, 3), (5, 7, 1), (1, 7, 1), (1, 1, 1)])
@pytest.mark.parametrize("codes", ["LPS", "ASL", "PIR", "SRA"])
@pytest.mark.parametrize("degrees", [(0, 0, 0), (8, 0, 5)])
def test_save_image_neither_resamples_nor_squeezes(tmp_path, make_affine, shape, codes, degrees):
    """As inference.json calls it, but of a volume made in memory, which MONAI's own writer garbles or refuses."""
    affine = make_affine(codes=codes, degrees=degrees)
    volume = MetaTensor(torch.rand(1, *shape), affine=torch.from_numpy(affine))
    volume.meta["filename_or_obj"] = "sub00.nii.gz"
    save = SaveImage(
        output_dir=tmp_path,
        output_postfix="sr",
        separate_folder=False,
        resample=False,
        output_dtype=np.float32,
        writer=AtomicNibabelWriter,
        print_log=False,
    )
    save(volume)
    image = nib.load(tmp_path / "sub00_sr.nii.gz")
    assert image.shape == shape
    np.testing.assert_array_equal(image.get_fdata(dtype=np.float32), volume[0].numpy())
    np.testing.assert_allclose(image.affine, affine, atol=1e-5)


def test_a_disk_that_fills_within_a_volume(tmp_path, monkeypatch):
    path = tmp_path / "sr.nii.gz"
    path.write_bytes(b"the old volume")
    monkeypatch.setattr(nib, "save", lambda image, p: fill_the_disk(p, OSError(errno.ENOSPC, "No space left")))
    writer = AtomicNibabelWriter()
    writer.set_data_array(torch.rand(1, 4, 5, 6))
    writer.set_metadata({"affine": torch.eye(4)}, resample=False)
    with pytest.raises(OSError, match=r"sr\.nii\.gz: cannot be written .*No space left"):
        writer.write(path)
    assert path.read_bytes() == b"the old volume" and everything_under(tmp_path) == ["sr.nii.gz"]
