"""Intensity scaling against sorted float64 values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch
from monai.transforms import Compose

from glmamba_monai.transforms.intensity import (
    DEFAULT_PERCENTILE,
    RestoreIntensityd,
    ScaleByPercentile,
    ScaleByPercentiled,
)


def sorted_percentile(values, percentile):
    ordered = sorted(np.asarray(values, dtype=np.float64).ravel().tolist())
    rank = (len(ordered) - 1) * percentile / 100
    below = int(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (rank - below) * (ordered[above] - ordered[below])


@pytest.mark.parametrize("percentile", [50, DEFAULT_PERCENTILE, 100])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16, np.uint16])
def test_divisor_is_the_percentile_of_the_volume(percentile, dtype):
    volume = (np.random.default_rng(0).gamma(2.0, 200.0, (1, 17, 13, 9))).astype(dtype)
    scaler = ScaleByPercentile(percentile)
    expected = sorted_percentile(volume, percentile)
    divisor = scaler.divisor(volume)
    assert type(divisor) is float and divisor == pytest.approx(expected, rel=1e-12)
    scaled = scaler(volume)
    assert scaled.dtype == (torch.float64 if dtype == np.float64 else torch.float32)
    np.testing.assert_allclose(scaled.numpy(), volume / expected, rtol=1e-6)
    assert percentile == 100 or scaled.max() > 1  # not clipped
    np.testing.assert_allclose(scaler.inverse(scaled, divisor).numpy(), volume, rtol=1e-6)


def test_default_percentile():
    assert DEFAULT_PERCENTILE == 99.9 == ScaleByPercentile().percentile
    assert ScaleByPercentiled("lr", "lr", "divisor").scaler.percentile == DEFAULT_PERCENTILE


def test_volume_beyond_the_limit_of_torch_quantile():
    """torch.quantile refuses more numbers than that before torch 2.14."""
    ramp = torch.arange(2**24 + 1, dtype=torch.float32).flip(0)
    assert ScaleByPercentile().divisor(ramp) == pytest.approx(0.999 * 2**24, rel=1e-12)


def test_tiny_object_falls_back_to_the_maximum():
    volume = torch.zeros(1, 50, 50, 10)
    volume[0, 25, 25, 5] = 7.0
    assert ScaleByPercentile().divisor(volume) == 7.0


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_unusable_volumes_are_named(value):
    volume = torch.zeros(1, 8, 8, 4)
    volume[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"^img: "):
        ScaleByPercentile().divisor(volume)
    named = MetaTensor(volume, meta={"filename_or_obj": "IXI002-T2.nii.gz"})
    with pytest.raises(ValueError, match=r"^IXI002-T2\.nii\.gz: "):
        ScaleByPercentile()(named)


@pytest.mark.parametrize("percentile", [0, -1, 100.1, float("nan")])
def test_refused_percentile(percentile):
    with pytest.raises(ValueError, match="percentile"):
        ScaleByPercentile(percentile)


def test_meta_survives():
    volume = MetaTensor(torch.rand(1, 6, 5), affine=torch.diag(torch.tensor([2.0, 3, 4, 1])), meta={"site": "HH"})
    scaler = ScaleByPercentile()
    for out in (scaler(volume), scaler.inverse(volume, 3.0)):
        assert isinstance(out, MetaTensor) and out.meta["site"] == "HH"
        assert torch.equal(out.affine, volume.affine)
    assert not isinstance(scaler(volume.as_tensor()), MetaTensor)


def test_dictionary_twins_share_the_divisor_of_the_source():
    rng = np.random.default_rng(1)
    data = {
        "hr": rng.random((1, 12, 12)),
        "lr": MetaTensor(rng.random((1, 6, 6)) * 3),
        "t1": rng.random((1, 12, 12)),
    }
    scale = ScaleByPercentiled(["hr", "lr"], source_key="lr", divisor_key="divisor", percentile=95)
    scaled = scale(data)
    divisor = sorted_percentile(data["lr"], 95)
    assert type(scaled["divisor"]) is float and scaled["divisor"] == pytest.approx(divisor, rel=1e-12)
    for key in ("hr", "lr"):
        np.testing.assert_allclose(scaled[key].numpy(), np.asarray(data[key]) / divisor, rtol=1e-12)
    assert scaled["t1"] is data["t1"] and "divisor" not in data
    assert isinstance(scaled["lr"], MetaTensor)

    # the way of a MONAI evaluator: collate, network, decollate, postprocess
    loader = DataLoader(Dataset([data, data], transform=Compose([scale])), batch_size=2)
    for item in decollate_batch(next(iter(loader))):
        restored = RestoreIntensityd(["hr", "lr"], "divisor")(item)
        for key in ("hr", "lr"):
            np.testing.assert_allclose(restored[key].numpy(), np.asarray(data[key]), rtol=1e-12)


def test_dictionary_twins_and_missing_keys():
    lr = torch.rand(1, 6, 6)
    deployed = ScaleByPercentiled(["hr", "lr"], "lr", "divisor", allow_missing_keys=True)({"lr": lr})
    assert deployed.keys() == {"lr", "divisor"}
    back = RestoreIntensityd(["sr", "lr"], "divisor", allow_missing_keys=True)(deployed)
    torch.testing.assert_close(back["lr"], lr)
    with pytest.raises(KeyError, match="source_key 'lr'"):
        ScaleByPercentiled("hr", "lr", "divisor")({"hr": lr})
    with pytest.raises(KeyError, match="divisor_key 'divisor'"):
        RestoreIntensityd("sr", "divisor")({"sr": lr})
    with pytest.raises(KeyError, match="hr"):
        ScaleByPercentiled("hr", "lr", "divisor")({"lr": lr})
