"""Fixtures shared by the tests: tiny synthetic data sets on disk, in every layout."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

# Before torch is imported: threads that spin while they wait make a shared machine several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

torch.set_num_threads(2)

SHAPE = (24, 28, 6)
CONTRASTS = ("t1", "t2")
# Intensity of grey-like and white-like tissue: every contrast shows the same borders, each in its own way.
TISSUE = {
    "t1": (400.0, 900.0),
    "t2": (1100.0, 600.0),
    "pd": (950.0, 700.0),
    "flair": (800.0, 500.0),
    "t1c": (450.0, 950.0),
}
FILE_NAMES = {
    "plain": {},
    "brats2021": {"t1c": "t1ce"},
    "brats2023": {"t1": "t1n", "t1c": "t1c", "t2": "t2w", "flair": "t2f"},
    "ixi": {"t1": "T1", "t2": "T2", "pd": "PD"},
}
PATHS = {
    "plain": "{subject}/{contrast}",
    "brats2021": "{subject}/{subject}_{contrast}",
    "brats2023": "{subject}/{subject}-{contrast}",
    "ixi": "IXI-{contrast}/{subject}-{contrast}",
}
SUBJECT_NAMES = {
    "plain": "sub{:02d}",
    "brats2021": "BraTS2021_{:05d}",
    "brats2023": "BraTS-GLI-{:05d}-000",
    "ixi": "IXI{:03d}-Guys-0828",
}


def oblique_affine(spacing=(0.9, 0.9, 3.0), degrees=(8.0, 0.0, 5.0), origin=(31.0, 40.0, -17.0), codes="LPS"):
    """Voxel-to-world matrix (4, 4) in mm: axes stored along ``codes``, then turned about the three world axes."""
    rotation = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        turn = np.eye(3)
        a, b = [i for i in range(3) if i != axis]
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        rotation = turn @ rotation
    storage = np.zeros((3, 3))
    for column, code in enumerate(codes):
        row = next(i for i, pair in enumerate(("LR", "PA", "IS")) if code in pair)
        storage[row, column] = 1 if code in "RAS" else -1
    affine = np.eye(4)
    affine[:3, :3] = rotation @ storage * np.asarray(spacing)
    affine[:3, 3] = origin
    return affine


def brain_volumes(contrasts=CONTRASTS, shape=SHAPE, seed=0):
    """Smooth random brain-like blobs ``{contrast: (X, Y, Z) float32}``: positive inside an ellipsoid, 0 far outside.

    The contrasts share the anatomy, which the seed chooses; "seg" is a label 0 / 1.
    """
    rng = np.random.default_rng(seed)
    centred = np.meshgrid(*(np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape), indexing="ij")
    # The head is no box and no circle, and lies off the centre, so that a flip or a turn cannot go unseen.
    radius = np.sqrt(((centred[0] - 0.06) / 0.8) ** 2 + ((centred[1] + 0.04) / 0.9) ** 2 + (centred[2] / 1.6) ** 2)
    head = 1 / (1 + np.exp((radius - 1) * 25))
    head[head < 1e-3] = 0
    width = [1.6 if n > 8 else 0.8 for n in shape]
    field = gaussian_filter(rng.standard_normal(shape), width)
    white = 1 / (1 + np.exp(-4 * field / field.std()))
    volumes = {}
    for contrast in contrasts:
        if contrast == "seg":
            volumes[contrast] = (white * head > 0.7).astype(np.float32)
        else:
            grey_level, white_level = TISSUE[contrast]
            volumes[contrast] = (head * (grey_level + (white_level - grey_level) * white)).astype(np.float32)
    return volumes


def write_volume(path, volume, affine=None):
    """Write an array as NIfTI, folders included; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(volume), oblique_affine() if affine is None else affine), path)
    return path


def write_dataset(
    root, n=3, layout="plain", contrasts=CONTRASTS, shape=SHAPE, affine=None, suffix=".nii.gz", names=None, seed=0
):
    """Write a data set of brain-like subjects.

    Args:
        root: folder, made if need be.
        n: number of subjects.
        layout: "plain", "brats2021", "brats2023" or "ixi".
        contrasts: our names of the contrasts to write; "seg" may be among them (not in "ixi").
        shape: matrix of every volume.
        affine: voxel-to-world matrix; oblique, LPS, 0.9 x 0.9 x 3 mm by default.
        suffix: ".nii.gz" or ".nii".
        names: subject names, instead of ``n`` names in the manner of the layout.
        seed: of the anatomies; subject i has ``seed + i``.

    Returns:
        ``{subject: {contrast: path}}``.
    """
    names = [SUBJECT_NAMES[layout].format(i) for i in range(n)] if names is None else list(names)
    written = {}
    for i, subject in enumerate(names):
        volumes = brain_volumes(contrasts, shape, seed + i)
        for contrast, volume in volumes.items():
            name = PATHS[layout].format(subject=subject, contrast=FILE_NAMES[layout].get(contrast, contrast))
            path = write_volume(root / (name + suffix), volume, affine)
            written.setdefault(subject, {})[contrast] = path
    return written


@pytest.fixture
def make_subject_folder():
    """:func:`write_dataset`, as a fixture."""
    return write_dataset


@pytest.fixture
def make_volume():
    """:func:`write_volume`, as a fixture."""
    return write_volume


@pytest.fixture
def make_affine():
    """:func:`oblique_affine`, as a fixture."""
    return oblique_affine


@pytest.fixture
def make_brain():
    """:func:`brain_volumes`, as a fixture."""
    return brain_volumes


# --- Triton's interpreter ----------------------------------------------------------------------------------------


class InterpreterRuns:
    """Whole test files in Triton's interpreter, one after the other in a second process, beside the other tests.

    The interpreter must be chosen before Triton is imported, and takes minutes of one core.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._executor = ThreadPoolExecutor(1)
        self._runs = {file: self._executor.submit(self._run, file) for file in files}

    def _run(self, file: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, env=environment, text=True, **streams) as self._process:
            output = self._process.communicate()
        return subprocess.CompletedProcess(command, self._process.returncode, *output)

    def result(self, file: str) -> subprocess.CompletedProcess[str]:
        """What came of a file, once it has ended."""
        return self._runs[file].result()

    def stop(self) -> None:
        """End what is under way, and what has not begun."""
        for run in self._runs.values():
            run.cancel()
        if self._process is not None:
            self._process.kill()
        self._executor.shutdown()


RUNS = pytest.StashKey[InterpreterRuns]()


def pytest_collection_finish(session):
    files = dict.fromkeys(str(item.path) for item in session.items if "interpreter_run" in item.fixturenames)
    here = find_spec("triton") and not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
    if files and here and not session.config.option.collectonly:
        session.config.stash[RUNS] = InterpreterRuns(list(files))


def pytest_sessionfinish(session):
    if RUNS in session.config.stash:
        session.config.stash[RUNS].stop()


@pytest.fixture
def interpreter_run(request):
    """What came of the test's own file in Triton's interpreter, a ``subprocess.CompletedProcess``."""
    pytest.importorskip("triton", reason="needs the package triton")
    return request.config.stash[RUNS].result(str(request.path))
