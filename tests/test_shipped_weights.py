"""The weights in the bundle: they load anywhere, are the documented ones, and do what they are for."""

from __future__ import annotations

import functools
import hashlib
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from glmamba_monai.bundle import weights_folders
from glmamba_monai.data import demo_data
from glmamba_monai.engines import find_weights, load_weights
from glmamba_monai.networks import build_network
from glmamba_monai.transforms import KSpaceLowResolution, KSpaceUpsample, ScaleByPercentile

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "bundle" / "models"
GENERAL, FOR_ONE = "model.pt", {2: "model_2x.pt"}
LIGHT = "glmamba_light/model.pt"
NAMES = [GENERAL, *FOR_ONE.values(), LIGHT]  # the first is what the plain MONAI Label takes
# dB over zero-filling on one slice of a phantom that no training has seen, T1 guides T2
GAINS = {(GENERAL, 2): 11.28, (GENERAL, 4): 10.96, (LIGHT, 2): 9.45, (LIGHT, 4): 9.88, (FOR_ONE[2], 2): 12.55}


def network_of(name):
    return Path(name).parent.name or "glmamba"


@functools.cache
def shipped(name):
    network = build_network(network_of(name)).eval()
    load_weights(network, FOLDER / name, network_of(name))
    return network


def test_there_is_no_other_file():
    assert sorted(p.relative_to(FOLDER).as_posix() for p in FOLDER.rglob("*.pt")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_is_found_for_its_network_and_factor(name):
    factor = next((factor for factor, file in FOR_ONE.items() if file == name), 2.5)
    network = network_of(name)
    found = find_weights(None, weights_folders(FOLDER.parent, network), build_network(network), factor)
    assert Path(found) == FOLDER / name


@pytest.mark.parametrize("factor", [None, 2, 3, 4])
def test_the_light_network_has_one_file_for_every_factor(factor):
    folders = weights_folders(FOLDER.parent, "glmamba_light")
    assert Path(find_weights(None, folders, build_network("glmamba_light"), factor)) == FOLDER / LIGHT


def test_all_of_them_are_a_small_download():
    assert sum((FOLDER / name).stat().st_size for name in NAMES) < 25e6


@pytest.mark.parametrize("name", NAMES)
def test_they_load_without_a_gpu_and_without_running_code(name):
    weights = torch.load(FOLDER / name, weights_only=True)  # no map_location: tensors go back to where they were saved
    assert {tensor.device.type for tensor in weights.values()} == {"cpu"}
    assert all(tensor.isfinite().all() for tensor in weights.values())  # also where half precision holds them


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("page", ["bundle/docs/README.md", "docs/results.md"])
def test_the_documented_checksum_is_theirs(name, page):
    assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() in (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "scale"),
    [*((name, scale) for name in (GENERAL, LIGHT) for scale in (2, 4)), *((name, s) for s, name in FOR_ONE.items())],
)
@pytest.mark.parametrize("reference", ["right", "of another head", "none"])
def test_they_super_resolve_and_a_wrong_reference_does_no_harm(name, scale, reference):
    folder = Path(demo_data())
    heads = [
        {name: ScaleByPercentile()(plain_slice(folder / subject / f"{name}.nii.gz")) for name in ("t1", "t2")}
        for subject in ("subject-005", "subject-004")
    ]
    target = heads[0]["t2"]
    guide = {"right": heads[0]["t1"], "of another head": heads[1]["t1"], "none": torch.zeros_like(target)}[reference]
    upsampled = KSpaceUpsample("zero_fill")(KSpaceLowResolution(scale)(target), target.shape[1:])
    with torch.inference_mode():
        result = shipped(name)(torch.cat((upsampled, guide))[None])[0, :1]

    def error(image):
        return (image - target).square().mean().item()

    gain = 10 * math.log10(error(upsampled) / error(result))
    if reference == "right":  # what one slice gains tells other weights, and other preparation, from those shipped
        assert gain == pytest.approx(GAINS[name, scale], abs=0.05)
    else:
        assert gain > 0


def plain_slice(path):
    """The middle axial slice ``(1, X, Y)``."""
    volume = torch.from_numpy(nib.as_closest_canonical(nib.load(path)).get_fdata(dtype=np.float32))
    return volume[None, :, :, volume.shape[-1] // 2]
