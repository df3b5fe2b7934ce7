"""A real MONAI Label server in an environment of its own, asked over HTTP.

Making the environment takes minutes and 4 GB. ``GLMAMBA_LABEL_VENV`` names the folder of one that is there already.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from glmamba_monai.inference import pair, simulate

requests = pytest.importorskip("requests")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
# What MONAI Label 0.8.5 installs and imports with; docs/monailabel.md has the same.
MONAI_LABEL, TORCH = "monailabel==0.8.5", "torch==2.13.0"
CONSTRAINTS = [
    TORCH,
    "monai==1.6.1",
    "numpy==1.26.4",
    "pydicom==2.4.4",
    "pynetdicom==2.1.1",
    "dicomweb-client==0.59.3",
]
# Equal bits need equal numbers of threads.
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
PATIENCE = 300  # seconds until the server answers, or has trained
SHAPE = (24, 28, 6)


def run(*arguments, **environment):
    line = [str(argument) for argument in arguments]
    return subprocess.run(line, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of an environment with MONAI Label and what this package needs."""
    named = os.environ.get("GLMAMBA_LABEL_VENV")
    if named:
        return Path(named) / "bin" / "python"
    if sys.version_info >= (3, 12):
        pytest.skip("MONAI Label 0.8.5 needs Python 3.10 or 3.11")
    folder = tmp_path_factory.mktemp("label")
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(CONSTRAINTS))
    done = run(sys.executable, "-m", "venv", folder / "venv")
    assert done.returncode == 0, done.stderr
    python = folder / "venv" / "bin" / "python"
    pip = (python, "-m", "pip")
    reached = run(*pip, "download", "--quiet", "--no-deps", "--retries=1", f"--dest={folder}", MONAI_LABEL)
    if reached.returncode:
        pytest.skip(f"the package index does not give {MONAI_LABEL}: {reached.stderr.strip()[-300:]}")
    needed = [r for r in importlib.metadata.requires("glmamba-monai") if "extra ==" not in r]
    settings = {"PIP_CONSTRAINT": str(constraints), "SAM2_BUILD_CUDA": "0", "PIP_QUIET": "1"}
    for packages in ([TORCH], [MONAI_LABEL, *needed]):
        done = run(*pip, "install", *packages, **settings)
        assert done.returncode == 0, done.stderr[-3000:]
    return python


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """Images ``<case>_low``, ``_t1``, ``_t2``, ``_pair`` of subjects that are oblique, LAS, and on different grids."""
    from conftest import brain_volumes, oblique_affine, write_volume

    folder = tmp_path_factory.mktemp("studies")
    for case, affine in (
        ("oblique", oblique_affine()),
        ("las", oblique_affine(degrees=(0, 0, 0), codes="LAS")),
        ("shifted", oblique_affine(codes="RAS")),
    ):
        for contrast, volume in brain_volumes(shape=SHAPE).items():
            write_volume(folder / f"{case}_{contrast}.nii.gz", volume, affine)
        simulate(folder / f"{case}_t2.nii.gz", folder / f"{case}_low.nii.gz", 2)
    # Another field of view, fewer slices, and another order of the axes.
    cut = nib.load(folder / "shifted_t1.nii.gz").slicer[2:, :, 1:]
    voxels = cut.get_fdata(dtype=np.float32).transpose(1, 2, 0)
    nib.save(nib.Nifti1Image(voxels, cut.affine[:, [1, 2, 0, 3]]), folder / "shifted_t1.nii.gz")
    for case in ("oblique", "las"):
        pair(folder / f"{case}_low.nii.gz", folder / f"{case}_t1.nii.gz", folder / f"{case}_pair.nii.gz")
    return folder


@pytest.fixture(scope="module")
def app(python, tmp_path_factory):
    """The app folder, and the environment variables and words of the command that label-app prints."""
    folder = tmp_path_factory.mktemp("server")
    done = run(python, "-m", "glmamba_monai", "label-app", folder / "app", **ENVIRONMENT)
    if done.returncode == 0:  # the weights for 2x, disturbed: any training makes better ones
        file = folder / "app" / "model" / "glmamba" / "models" / "model_2x.pt"
        weights = torch.load(file, weights_only=True)
        torch.manual_seed(0)
        for name in ("lr_head.2.weight", "lr_head.2.bias"):
            weights[name] = weights[name] + torch.randn_like(weights[name])
        torch.save(weights, file)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    variables = dict(word.split("=", 1) for word in words if word.startswith("PYTHONPATH="))
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([*variables.values(), str(ROOT)])}
    return folder / "app", environment, words[len(variables) :]


@pytest.fixture(scope="module")
def server(app, studies, tmp_path_factory):
    """Address of a server that answers."""
    folder, environment, command = app
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [{"STUDIES": str(studies), "8000": port}.get(word, word) for word in command]
    log = tmp_path_factory.mktemp("log") / "server.log"
    address = f"http://127.0.0.1:{port}"

    def answers():
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            return requests.get(f"{address}/info/", timeout=60).ok
        except requests.ConnectionError:
            return False

    with log.open("w") as stream:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, cwd=folder.parent, stdout=stream, stderr=subprocess.STDOUT
        )
        try:
            poll(answers, log)
            yield address
        finally:
            process.terminate()
            process.wait(60)


def poll(done, log):
    until = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < until, log.read_text()[-3000:]
        time.sleep(0.5)


def infer(server, image="", params=None, **uploads):
    """Ask for a result; ``uploads`` are files by the names of the form's fields."""
    files = {name: (file.name, file.read_bytes()) for name, file in uploads.items()}
    return requests.post(
        f"{server}/infer/glmamba",
        params={"image": image, "output": "image"},
        data={"params": json.dumps(params or {})},
        files=files or None,
        timeout=PATIENCE,
    )


@pytest.fixture(scope="module")
def bundle_run(python, app, tmp_path_factory):
    """What ``monai.bundle run inferring`` makes of the same files."""
    folder, environment, _ = app
    made = {}

    def result(**files):
        weights = (folder / "model" / "glmamba" / "models").iterdir()
        key = (*files.values(), *sorted((file.name, file.stat().st_mtime_ns) for file in weights))
        if key not in made:
            out = tmp_path_factory.mktemp("bundle")
            options = [word for name, file in files.items() for word in (f"--{name}", file)]
            config = folder / "model" / "glmamba" / "configs" / "inference.json"
            line = ["-m", "monai.bundle", "run", "inferring", "--config_file", config, "--output_dir", out, *options]
            done = run(python, *line, **environment)
            assert done.returncode == 0, done.stderr[-3000:]
            made[key] = nib.load(next(out.glob("*_sr.nii.gz")))
        return made[key]

    return result


def assert_equal(response, expected, folder):
    assert response.status_code == 200, response.text
    (folder / "result.nii.gz").write_bytes(response.content)
    found = nib.load(folder / "result.nii.gz")
    assert found.get_data_dtype() == np.float32
    np.testing.assert_array_equal(found.get_fdata(dtype=np.float32), expected.get_fdata(dtype=np.float32))
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-5)
    assert nib.aff2axcodes(found.affine) == nib.aff2axcodes(expected.affine)


def test_the_model_is_listed(server):
    info = requests.get(f"{server}/info/", timeout=60).json()
    assert info["models"].keys() == info["trainers"].keys() == {"glmamba"}
    assert info["models"]["glmamba"]["type"] == "others"  # a segmentation would be turned into segments
    assert info["labels"] == []
    assert info["models"]["glmamba"]["config"]["model_filename"] == ["by factor", "model.pt", "model_2x.pt"]
    assert info["trainers"]["glmamba"]["config"]["model_filename"] == ["by factor", "model.pt", "model_2x.pt"]


@pytest.mark.parametrize("case", ["oblique", "las"])
def test_the_three_ways_give_what_the_bundle_gives(server, studies, bundle_run, tmp_path, case):
    low, t1, both = (studies / f"{case}_{name}.nii.gz" for name in ("low", "t1", "pair"))
    expected = bundle_run(image=low, reference=t1)
    assert expected.shape == nib.load(t1).shape and nib.load(low).shape[:2] == (12, 14)
    for answer in (
        infer(server, f"{case}_low", {"reference": str(t1)}),
        infer(server, f"{case}_low", {"reference": f"{case}_t1"}),
        infer(server, params={"reference": f"{case}_t1"}, file=low),
        infer(server, f"{case}_low", label=t1),
        infer(server, file=low, label=t1),
    ):
        assert_equal(answer, expected, tmp_path)
    expected = bundle_run(image=both)
    assert_equal(infer(server, f"{case}_pair"), expected, tmp_path)
    assert_equal(infer(server, file=both), expected, tmp_path)


def test_weights_by_the_factor_or_by_name(server, app, studies, bundle_run, tmp_path):
    low, t1 = (studies / f"oblique_{name}.nii.gz" for name in ("low", "t1"))
    models = app[0] / "model" / "glmamba" / "models"
    named = {name: bundle_run(image=low, reference=t1, weights=models / name) for name in ("model.pt", "model_2x.pt")}
    assert not np.array_equal(*(volume.get_fdata() for volume in named.values()))
    for _ in range(2):  # both are held by now
        for name, params in (("model_2x.pt", {}), *((name, {"model_filename": name}) for name in named)):
            answer = infer(server, "oblique_low", {"reference": "oblique_t1", **params})
            assert_equal(answer, named[name], tmp_path)
    answer = infer(server, "oblique_low", {"reference": "oblique_t1", "model_filename": "none.pt"})
    assert answer.status_code == 400
    assert answer.json()["detail"].endswith("it has model.pt, model_2x.pt")


def test_a_device_is_no_python(server, tmp_path):
    device = f"$open({str(tmp_path / 'run')!r}, 'w')"
    answer = infer(server, "oblique_low", {"reference": "oblique_t1", "device": device})
    assert answer.status_code == 400 and answer.json()["detail"].startswith("device ")
    assert not (tmp_path / "run").exists()


def test_a_reference_on_another_grid(server, studies, bundle_run, tmp_path):
    """The result lies on a grid that no file has."""
    expected = bundle_run(image=studies / "shifted_low.nii.gz", reference=studies / "shifted_t1.nii.gz")
    assert expected.shape != nib.load(studies / "shifted_t1.nii.gz").shape
    assert_equal(infer(server, "shifted_low", {"reference": "shifted_t1"}), expected, tmp_path)


@pytest.mark.parametrize(
    ("image", "params", "words"),
    [
        ("oblique_low", {}, ["oblique_low.nii.gz: found one volume and no reference", "three ways"]),
        ("oblique_low", {"reference": "nobody"}, ["reference nobody", "las_t1, las_t2"]),
        ("oblique_low", {"reference": "las_t1"}, ["las_t1.nii.gz", "same patient"]),
        ("oblique_low", {"reference": "oblique_pair"}, ["oblique_pair.nii.gz: expected one 3-D volume"]),
        ("nobody", {"reference": "oblique_t1"}, ["no such image in the studies folder"]),
        ("oblique_t1", {"reference": "oblique_low"}, ["swapped"]),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_an_unfit_pair_is_answered_with_the_reason(server, image, params, words):
    response = infer(server, image, params)
    assert response.status_code == 400
    for word in words:
        assert word in response.json()["detail"]


def test_training_on_submitted_labels(server, app, studies, bundle_run, tmp_path):
    """Last, since it may change the weights: high-resolution targets are submitted as labels of their references."""
    request = {"device": "cpu", "max_epochs": 1, "val_split": 0.5, "pretrained": False}
    short = {"iterations_per_epoch": 2, "batch_size": 2, "crop_size": 16, "val_slices": 2}

    def train(**options):
        answer = requests.post(f"{server}/train/glmamba", json={**request, **short, **options}, timeout=60)
        assert answer.ok, answer.text
        log = tmp_path / "none"
        log.touch()
        poll(lambda: status()["status"] not in ("SUBMITTED", "RUNNING"), log)
        return status()

    def status():
        return requests.get(f"{server}/train/", timeout=60).json()

    assert train()["status"] == "ERROR"
    assert any("found 0 image(s) with a final label" in line for line in status()["details"])
    for case in ("oblique", "las"):
        label = studies / f"{case}_t2.nii.gz"
        put = requests.put(
            f"{server}/datastore/label",
            params={"image": f"{case}_t1", "tag": "final"},
            data={"params": "{}"},
            files={"label": (label.name, label.read_bytes())},
            timeout=60,
        )
        assert put.ok, put.text
    done = train()
    assert done["status"] == "DONE", done["details"]
    bundle = app[0] / "model" / "glmamba"
    trained = (bundle / "results" / "model.pt").read_bytes()
    datalist = json.loads((bundle / "results" / "datalist.json").read_text())
    assert {item["subject"] for part in ("training", "validation") for item in datalist[part]} == {
        "oblique_t1",
        "las_t1",
    }
    assert (bundle / "models" / "model_2x.pt").read_bytes() == trained
    assert (bundle / "models" / "previous-model_2x.pt").is_file()
    assert any("server uses the trained weights" in line for line in done["details"])
    log = app[0] / "logs" / "app.log"
    assert "begins with the weights of" not in log.read_text()
    assert train(pretrained=True, model_filename="by factor")["status"] == "DONE"
    assert f"begins with the weights of {bundle / 'models' / 'model_2x.pt'}" in log.read_text()
    low, t1 = studies / "oblique_low.nii.gz", studies / "oblique_t1.nii.gz"
    assert_equal(infer(server, file=low, label=t1), bundle_run(image=low, reference=t1), tmp_path)
