"""PSNR and SSIM of every convention against scikit-image in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from glmamba_monai.metrics import CONVENTIONS, slice_metrics

BORDER = 5  # half of the 11x11 window: scikit-image's mean leaves it out


def stack(make_brain, shape=(40, 33, 5), noise=40.0):
    """Prediction, truth (S, 1, X, Y) in float64, and the maximum of the truth."""
    hr = np.moveaxis(make_brain(["t2"], shape, seed=3)["t2"].astype(np.float64), -1, 0)[:, None]
    sr = hr + np.random.default_rng(0).normal(0, noise, hr.shape)
    return sr, hr, float(hr.max())


def tensors(*arrays):
    return [torch.from_numpy(a) for a in arrays]


def gaussian_ssim(sr, hr, data_range, full=False):
    return structural_similarity(
        sr, hr, data_range=data_range, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=full
    )


def expected_metrics(sr, hr, data_range, mask):
    """One slice (X, Y), every convention."""
    sr = np.abs(sr)
    slice_range = hr.max()
    _, similarity = gaussian_ssim(sr, hr, data_range, full=True)
    inside = mask[BORDER:-BORDER, BORDER:-BORDER]
    uniform = structural_similarity(sr, hr, data_range=data_range, win_size=7, use_sample_covariance=False)
    return {
        "psnr": peak_signal_noise_ratio(hr, sr, data_range=data_range),
        "ssim": gaussian_ssim(sr, hr, data_range),
        "psnr_slice_range": peak_signal_noise_ratio(hr, sr, data_range=slice_range),
        "ssim_slice_range": gaussian_ssim(sr, hr, slice_range),
        "psnr_foreground": peak_signal_noise_ratio(hr[mask], sr[mask], data_range=data_range),
        "ssim_foreground": similarity[BORDER:-BORDER, BORDER:-BORDER][inside].mean(),
        "ssim_uniform7": uniform,
    }


@pytest.mark.parametrize("shape", [(40, 33, 5), (11, 11, 3), (12, 64, 2)])
def test_every_convention_is_scikit_image(make_brain, shape):
    sr, hr, data_range = stack(make_brain, shape)
    mask = hr > 0.05 * data_range
    found = slice_metrics(*tensors(sr, hr), data_range, torch.from_numpy(mask))
    assert list(found) == list(CONVENTIONS)
    for i in range(len(hr)):
        expected = expected_metrics(sr[i, 0], hr[i, 0], data_range, mask[i, 0])
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            tolerance = 2e-4 if name.startswith("psnr") else 2e-5
            assert found[name][i].item() == pytest.approx(value, abs=tolerance), name
    assert all(values.shape == (len(hr),) for values in found.values())


def test_without_a_mask_the_foreground_is_everything(make_brain):
    sr, hr, data_range = stack(make_brain)
    found = slice_metrics(*tensors(sr, hr), data_range)
    torch.testing.assert_close(found["psnr_foreground"], found["psnr"], atol=1e-4, rtol=0)
    torch.testing.assert_close(found["ssim_foreground"], found["ssim"], atol=1e-5, rtol=0)


def test_volume_and_slice_range_differ_where_the_slice_is_darker(make_brain):
    sr, hr, data_range = stack(make_brain)
    found = slice_metrics(*tensors(sr, hr), 2 * data_range)
    lost = 20 * np.log10(2 * data_range / hr.max(axis=(1, 2, 3)))
    np.testing.assert_allclose((found["psnr"] - found["psnr_slice_range"]).numpy(), lost, atol=1e-3)
    assert (found["ssim"] > found["ssim_slice_range"]).all()


def test_units_do_not_matter(make_brain):
    sr, hr, data_range = stack(make_brain)
    found = slice_metrics(*tensors(sr, hr), data_range)
    scaled = slice_metrics(*tensors(sr * 1e-3, hr * 1e-3), data_range * 1e-3)
    for name in CONVENTIONS:
        torch.testing.assert_close(found[name], scaled[name], atol=2e-4, rtol=1e-5)


def test_negative_predictions_enter_with_their_magnitude(make_brain):
    sr, hr, data_range = stack(make_brain)
    assert (sr < 0).any()
    signed, magnitude = (slice_metrics(*tensors(x, hr), data_range) for x in (-sr, np.abs(sr)))
    for name in CONVENTIONS:
        assert torch.equal(signed[name], magnitude[name])
    clipped = slice_metrics(*tensors(sr.clip(0), hr), data_range)
    assert not torch.allclose(signed["psnr"], clipped["psnr"], atol=1e-3)


def test_only_the_masked_pixels_count(make_brain):
    sr, hr, data_range = stack(make_brain)
    mask = torch.zeros(hr.shape, dtype=torch.bool)
    mask[..., 15:20, 15:20] = True
    before = slice_metrics(*tensors(sr, hr), data_range, mask)
    sr[..., 0, :] += 500  # farther from the mask than the window reaches
    after = slice_metrics(*tensors(sr, hr), data_range, mask)
    for name in CONVENTIONS:
        assert torch.allclose(before[name], after[name], atol=1e-5) == name.endswith("foreground"), name


def test_the_same_image(make_brain):
    _, hr, data_range = stack(make_brain)
    found = slice_metrics(*tensors(hr, hr), data_range)
    assert torch.isinf(found["psnr"]).all()
    torch.testing.assert_close(found["ssim"], torch.ones(len(hr)))


@pytest.mark.parametrize(
    "prediction, target, data_range, word",
    [
        ((2, 1, 16, 16), (2, 1, 16, 17), 1.0, r"got \(2, 1, 16, 16\) and \(2, 1, 16, 17\)"),
        ((2, 2, 16, 16), (2, 2, 16, 16), 1.0, r"\(S, 1, H, W\)"),
        ((1, 16, 16), (1, 16, 16), 1.0, r"\(S, 1, H, W\)"),
        ((2, 1, 10, 16), (2, 1, 10, 16), 1.0, r"11x11, got \(10, 16\)"),
        ((2, 1, 16, 16), (2, 1, 16, 16), 0.0, "data_range must be positive, got 0.0"),
        ((2, 1, 16, 16), (2, 1, 16, 16), float("nan"), "data_range"),
    ],
)
def test_refused(prediction, target, data_range, word):
    with pytest.raises(ValueError, match=word):
        slice_metrics(torch.rand(prediction), torch.rand(target), data_range)
