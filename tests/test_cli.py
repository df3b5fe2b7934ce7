"""``python -m glmamba_monai``: what it prints, what it refuses, and that a typing error never costs a file."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from glmamba_monai import simulate as simulate_in_python
from glmamba_monai import super_resolve as super_resolve_in_python
from glmamba_monai.__main__ import main
from glmamba_monai.networks import build_network

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def loggers_as_they_were():
    loggers = [
        logging.getLogger(name) for name in ("ignite", "monai.bundle.workflows", "glmamba_monai.engines.weights")
    ]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels):
        logger.setLevel(level)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command line in this process: ``(exit status, stdout, stderr)``."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["glmamba_monai", *map(str, arguments)])
        monkeypatch.setenv("PAGER", "cat")
        capsys.readouterr()
        status = 0
        try:
            main()
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def files(tmp_path, make_subject_folder):
    written = make_subject_folder(tmp_path / "data", n=1)["sub00"]
    simulate_in_python(written["t2"], tmp_path / "lr.nii.gz", 2)
    return {"lr": tmp_path / "lr.nii.gz", **written}


def files_in(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def data(path):
    return nib.load(path).get_fdata(dtype=np.float32)


# --- commands


def test_super_resolve_prints_the_file_it_wrote(tmp_path, files, command):
    output = tmp_path / "sr.nii.gz"
    status, out, _ = command("super-resolve", files["lr"], files["t1"], output, "--network", "zero_filling")
    assert status == 0 and out == f"{output}\n"
    expected = super_resolve_in_python(files["lr"], files["t1"], network="zero_filling")
    np.testing.assert_array_equal(data(output), expected[0].numpy())


@pytest.mark.parametrize(
    "options",
    [
        ["--scale", "2"],
        ["--scale=2.0"],
        ["--scale", "[2,2]"],
        ["--scale", "2,2"],
        ["--scale", "auto"],
        ["--slice_axis", "2"],
        ["--slice-axis=axial"],
        ["--data_consistency", "False"],
    ],
    ids=" ".join,
)
def test_numbers_lists_and_words_arrive_as_meant(tmp_path, files, command, options):
    output = tmp_path / "sr.nii.gz"
    status, _, err = command("super-resolve", files["lr"], files["t1"], output, "--network", "zero_filling", *options)
    assert status == 0, err
    expected = super_resolve_in_python(files["lr"], files["t1"], network="zero_filling")
    np.testing.assert_array_equal(data(output), expected[0].numpy())


@pytest.mark.parametrize("option", [["--data_consistency"], ["--data-consistency=True"]], ids=" ".join)
def test_data_consistency_is_switched_on(tmp_path, files, command, option):
    output = tmp_path / "sr.nii.gz"
    status, _, err = command("super-resolve", files["lr"], files["t1"], output, "--network", "bicubic", *option)
    assert status == 0, err
    expected = super_resolve_in_python(files["lr"], files["t1"], network="bicubic", data_consistency=True)
    np.testing.assert_array_equal(data(output), expected[0].numpy())
    without = super_resolve_in_python(files["lr"], files["t1"], network="bicubic")
    assert not np.allclose(data(output), without[0].numpy(), rtol=1e-2)


def test_super_resolve_says_which_weights_it_takes(tmp_path, files, command, caplog):
    torch.save(build_network("srcnn_ref").state_dict(), tmp_path / "w.pt")
    options = ["--network", "srcnn_ref", "--weights", tmp_path / "w.pt"]
    status, _, err = command("super-resolve", files["lr"], files["t1"], tmp_path / "sr.nii.gz", *options)
    assert status == 0, err
    assert f"weights of srcnn_ref loaded from {tmp_path / 'w.pt'}" in caplog.text


def test_the_self_ensemble_prints_both_files(tmp_path, files, command):
    output = tmp_path / "sr.nii.gz"
    options = ["--network", "bicubic", "--self-ensemble"]
    status, out, err = command("super-resolve", files["lr"], files["t1"], output, *options)
    assert status == 0 and out == f"{output}\n{tmp_path / 'sr_sd.nii.gz'}\n", err
    mean, sd = super_resolve_in_python(files["lr"], files["t1"], network="bicubic", self_ensemble=True)
    np.testing.assert_array_equal(data(output), mean[0].numpy())
    np.testing.assert_array_equal(data(tmp_path / "sr_sd.nii.gz"), sd[0].numpy())


@pytest.mark.parametrize(
    ("options", "arguments", "shape"),
    [
        ([], {}, "12 x 14 x 6"),
        (["--scale", "3"], {"scale": 3}, "8 x 10 x 6"),
        (["--scale", "[2,3]"], {"scale": [2, 3]}, "12 x 10 x 6"),
        (["--scale", "1.5"], {"scale": 1.5}, "16 x 19 x 6"),
        (["2", "sagittal"], {"slice_axis": "sagittal"}, "24 x 14 x 3"),
        (["--mode", "zero_fill"], {"mode": "zero_fill"}, "24 x 28 x 6"),
        (["--noise_std", "30", "--seed", "4"], {"noise_std": 30, "seed": 4}, "12 x 14 x 6"),
    ],
    ids=str,
)
def test_simulate_does_what_the_function_does(tmp_path, files, command, options, arguments, shape):
    output = tmp_path / "out.nii.gz"
    status, out, err = command("simulate", files["t2"], output, *options)
    assert status == 0 and out == f"{output}: {shape}\n", err
    expected = simulate_in_python(files["t2"], tmp_path / "expected.nii.gz", **arguments)
    np.testing.assert_array_equal(data(output), expected[0].numpy())


def test_demo_data_writes_a_new_folder_only(tmp_path, monkeypatch, command):
    import glmamba_monai.data

    def write(out, subjects, seed):
        assert (out, subjects, seed) == (str(tmp_path / "demo"), 3, 5)
        return out

    monkeypatch.setattr(glmamba_monai.data, "write_demo_data", write)  # the brains have tests of their own
    status, out, _ = command("demo-data", tmp_path / "demo", "--subjects", 3, "--seed=5")
    assert status == 0 and out == f"{tmp_path / 'demo'}\n"


def test_demo_data_refuses_a_folder_in_use(tmp_path, command):
    (tmp_path / "notes.txt").write_text("mine")
    status, out, err = command("demo-data", tmp_path)
    assert status == 2 and out == ""
    assert (
        err.startswith(f"glmamba_monai: error: {tmp_path} exists and is not an empty folder") and err.count("\n") == 1
    )
    assert files_in(tmp_path) == {"notes.txt": b"mine"}


def test_cost_prints_the_published_numbers(command):
    status, out, _ = command("cost")
    assert status == 0
    rows = {line.split("|")[1].strip(): line for line in out.splitlines() if line.startswith("| ")}
    columns = [float(value) for value in rows["glmamba_paper"].split("|")[2:-1]]
    assert columns[:2] == pytest.approx([2.24, 74.5], abs=0.06)
    assert columns[3:] == pytest.approx([1.195, 32.42], abs=0.06)
    assert {"glmamba_light", "srcnn", "srcnn_ref", "bicubic", "zero_filling"} <= rows.keys()
    assert "Cost of one slice of 240x240" in out
    _, smaller, _ = command("cost", "--height", 120, "--width", 64)
    assert "Cost of one slice of 120x64" in smaller


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("", "super-resolve"),
        ("super-resolve", "IMAGE REFERENCE OUTPUT"),
        ("simulate", "standard deviation of complex noise"),
        ("demo-data", "must not exist or be empty"),
        ("pair", "TARGET REFERENCE OUTPUT"),
        ("label-app", "--weights"),
        ("cost", "--height"),
    ],
)
def test_help_is_there(command, name, word):
    status, out, err = command(*filter(None, [name]), "--help")
    assert status == 0
    assert word in out + err and "GROUP" not in out + err  # a group would be something of ours that is no option


def test_alone_it_shows_what_there_is(command):
    status, out, _ = command()
    assert status == 0 and "demo-data" in out


# --- errors: one line, status 2, nothing written


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{lr}", "{missing}", "{out}"], ["{missing}: there is no such file"]),
        (["{truncated}", "{t1}", "{out}"], ["{truncated}: cannot be read as NIfTI", "copy it again"]),
        (["{lr}", "{t1}", "{out}", "--scale", "4"], ["scale 4 does not fit", "{lr}", "{t1}", "auto"]),
        (["{lr}", "{t1}", "{out}", "--scale", "two"], ["scale must be auto, a number", "'two'"]),
        (["{lr}", "{t1}", "{out}", "--slice_axis", "up"], ["slice_axis must be", "'up'"]),
        (
            ["{t2}", "{t1}", "{out}", "--scale", "1", "--data_consistency"],
            ["data consistency: {t2} has the matrix (24, 28, 6)", "leave data_consistency off"],
        ),
        (["{lr}", "{t1}", "{out}", "--data_consistency", "some"], ["data_consistency must be True or False", "'some'"]),
        (["{lr}", "{t1}", "{out}", "--network", "gan"], ["network 'gan' is unknown", "glmamba_light"]),
        (["{lr}", "{t1}", "{out}", "--network", "3"], ["network must be text", "got 3"]),
        (["{lr}", "{t1}", "{out}", "--network", "srcnn", "--weights", "{missing}"], ["{missing}", "Train first"]),
        (["{lr}", "{t1}", "{out}", "--network", "srcnn", "--weights", "{lr}"], ["{lr}: is no file of weights"]),
        (["{t1}", "{lr}", "{out}"], ["{t1}", "{lr}", "swapped"]),
        (
            ["{lr}", "{t1}", "{tmp}/out.mhd"],
            ["{tmp}/out.mhd: the name must end in .nii, .nii.gz, .nrrd or .mha, found '.mhd'"],
        ),
        (
            ["{lr}", "{t1}", "{tmp}/out"],
            ["{tmp}/out: the name must end in .nii", "image must be the folder of one, found {lr}"],
        ),
        (["{lr}", "{t1}", "{lr}/out.nii.gz"], ["output folder {lr}: cannot be written"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("{") else "",
)
def test_an_error_is_one_line_that_names_the_file_and_the_remedy(tmp_path, files, command, arguments, words):
    truncated = tmp_path / "truncated.nii.gz"
    truncated.write_bytes(files["lr"].read_bytes()[:2000])
    names = {**files, "truncated": truncated, "missing": tmp_path / "nowhere", "out": tmp_path / "o.nii.gz"}
    names["tmp"] = tmp_path
    arguments, words = ([text.format(**names) for text in texts] for texts in (arguments, words))
    if "--network" not in arguments:
        arguments += ["--network", "zero_filling"]
    before = files_in(tmp_path)
    status, out, err = command("super-resolve", *arguments)
    assert status == 2 and out == ""
    (line,) = [line for line in err.splitlines() if "it/s]" not in line]
    assert line.startswith("glmamba_monai: error: ")
    for word in words:
        assert word in line
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["simulate", "{t2}", "{out}", "--noise_std", "many"], "noise_std must be a number, got 'many'"),
        (["simulate", "{t2}", "{out}", "--noise_std"], "noise_std must be a number, got True"),
        (["simulate", "{t2}", "{out}", "--seed", "1.5"], "seed must be an integer, got 1.5"),
        (["simulate", "{t2}", "{out}", "--scale", "0.5"], "scale must be a finite number >= 1"),
        (["simulate", "{t2}", "{out}", "--mode", "nearest"], "mode must be 'crop' or 'zero_fill', got 'nearest'"),
        (["simulate", "{t2}", "7"], "output must be text"),
        (["demo-data", "2024_01"], "out must be text; write ./NAME for a file whose name is a number, got 202401"),
        (["demo-data", "{out}", "--subjects", "two"], "subjects must be an integer, got 'two'"),
        (["demo-data", "{out}", "--subjects", "0"], "subjects: 0 found, at least 1 expected"),
        (["cost", "--height", "tall"], "height must be an integer, got 'tall'"),
        (["cost", "--height", "4"], "H, W >= 8"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_arguments_of_the_wrong_kind(tmp_path, files, command, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    before = files_in(tmp_path)
    status, out, err = command(*(a.format(out=tmp_path / "o.nii.gz", **files) for a in arguments))
    assert status == 2 and out == ""
    assert err.startswith("glmamba_monai: error: ") and err.count("\n") == 1
    assert words in err
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["simulate", "{t2}", "{out}", "--scales", "2"],
        ["simulate", "{t2}", "{out}", "2", "auto", "crop", "0", "0", "surplus"],
        ["simulate", "{t2}"],
        ["super-resolve", "{lr}", "{t1}", "{out}", "--network", "zero_filling", "--colour", "red"],
        ["upscale", "{t2}", "{out}"],
    ],
    ids=" ".join,
)
def test_a_command_that_cannot_be_understood_is_not_half_done(tmp_path, files, command, arguments):
    """fire runs a command before it finds that an argument is left over; ours waits until all is understood."""
    before = files_in(tmp_path)
    status, _, err = command(*(a.format(out=tmp_path / "o.nii.gz", **files) for a in arguments))
    assert status == 2 and "ERROR: " in err and "Usage: " in err
    assert files_in(tmp_path) == before


# --- a process of its own


@pytest.mark.slow
def test_as_a_process(tmp_path, files):
    """From an unrelated folder: the result, an error without a traceback, and nothing left behind."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(*arguments):
        line = [sys.executable, "-m", "glmamba_monai", *map(str, arguments)]
        return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)

    pair = (os.path.relpath(files["lr"], folder), os.path.relpath(files["t1"], folder))
    done = run("super-resolve", *pair, "../sr.nii.gz", "--network=zero_filling", "--scale=2")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "../sr.nii.gz\n"
    assert nib.load(tmp_path / "sr.nii.gz").shape == nib.load(files["t1"]).shape
    failed = run("super-resolve", *pair, "../other.nii.gz", "--network=zero_filling", "--scale=3")
    assert failed.returncode == 2 and failed.stdout == ""
    assert failed.stderr.count("\n") == 1 and failed.stderr.startswith("glmamba_monai: error: scale 3 does not fit")
    assert not (tmp_path / "other.nii.gz").exists() and list(folder.iterdir()) == []
