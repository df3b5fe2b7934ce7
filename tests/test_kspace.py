"""The k-space transforms against explicit Fourier sums in float64, SimpleITK and scikit-image."""

from __future__ import annotations

import math

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from monai.transforms import Compose
from skimage.data import shepp_logan_phantom
from skimage.metrics import peak_signal_noise_ratio
from skimage.registration import phase_cross_correlation

from glmamba_monai.transforms.kspace import (
    KSpaceDataConsistency,
    KSpaceDataConsistencyd,
    KSpaceLowResolution,
    KSpaceLowResolutiond,
    KSpaceUpsample,
    KSpaceUpsampled,
    RequireKSpaceCropd,
)

# matrix, scale: 2x, 3x and 4x, odd, rectangular, fractional, one factor per axis
PLANES = [
    ((32, 32), 2),
    ((33, 47), 2),
    ((36, 24), 3),
    ((35, 31), 3),
    ((64, 48), 4),
    ((63, 50), 4),
    ((40, 30), 2.5),
    ((41, 30), (2, 4)),
    ((30, 41), (1, 3)),
]


def low_matrix(full, scale):
    scale = scale if isinstance(scale, tuple) else (scale,) * len(full)
    return [math.ceil(size / s) for size, s in zip(full, scale)]


def centres(size, n):
    """HR positions of the n LR pixel centres along an axis of ``size`` HR pixels."""
    edges = np.linspace(-0.5, size - 0.5, n + 1)
    return (edges[:-1] + edges[1:]) / 2


def waves(positions, frequencies, size):
    return np.exp(2j * np.pi * np.outer(positions, frequencies) / size)


def apply_along(matrices, img):
    """One matrix per axis of ``img``."""
    for axis, matrix in enumerate(matrices):
        img = np.moveaxis(np.tensordot(matrix, img, axes=(1, axis)), 0, axis)
    return img


def band_limited(full, low, seed=0):
    """A positive image without frequencies at or above the LR Nyquist limit: on the HR and on the LR grid."""
    rng = np.random.default_rng(seed)
    frequencies = [np.arange(-((n - 1) // 2), (n - 1) // 2 + 1) for n in low]
    shape = [len(f) for f in frequencies]
    spectrum = rng.normal(size=shape) + 1j * rng.normal(size=shape)
    spectrum = spectrum + np.flip(spectrum).conj()
    on = [
        apply_along([waves(p(N, n), f, N) for N, n, f in zip(full, low, frequencies)], spectrum).real
        for p in (lambda N, n: np.arange(N), centres)
    ]
    offset = np.abs(spectrum).sum()
    return [(img + offset)[None] / (2 * offset) for img in on]


@pytest.mark.parametrize("full, scale", PLANES)
def test_low_resolution_samples_the_image_at_low_resolution_pixel_centres(full, scale):
    hr, expected = band_limited(full, low_matrix(full, scale))
    lr = KSpaceLowResolution(scale)(hr)
    assert lr.dtype == torch.float64
    np.testing.assert_allclose(lr.numpy(), expected, atol=1e-12)
    single = KSpaceLowResolution(scale)(torch.from_numpy(hr).float())
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("full, scale", [*PLANES, ((20, 15, 12), (2, 1, 3))])
def test_low_resolution_is_the_literal_formula_on_any_image(full, scale):
    """With content on every line of k-space, the unpaired -n/2 line of even n included."""
    img = np.random.default_rng(1).random(full)
    expected = img
    for axis, (size, n) in enumerate(zip(full, low_matrix(full, scale))):
        if n == size:
            continue
        every, kept = np.arange(size) - size // 2, (np.arange(size) - size // 2)[size // 2 - n // 2 :][:n]
        assert kept[0] == -(n // 2)
        spectrum = np.tensordot(waves(np.arange(size), every, size).conj().T, expected, axes=(1, axis))
        window = spectrum[size // 2 - n // 2 :][:n]
        sampled = np.tensordot(waves(centres(size, n), kept, size), window, axes=(1, 0)) / size
        expected = np.moveaxis(sampled, 0, axis)
    np.testing.assert_allclose(KSpaceLowResolution(scale)(img[None])[0].numpy(), np.abs(expected), atol=1e-12)


@pytest.mark.parametrize("full, scale", PLANES)
def test_zero_fill_is_a_mask_in_kspace(full, scale):
    img = np.random.default_rng(2).random(full)
    mask = np.zeros(full)
    mask[tuple(slice(N // 2 - n // 2, N // 2 - n // 2 + n) for N, n in zip(full, low_matrix(full, scale)))] = 1
    expected = np.abs(np.fft.ifft2(np.fft.ifftshift(np.fft.fftshift(np.fft.fft2(img)) * mask)))
    affine = torch.diag(torch.tensor([-0.9, 1.1, 2.0, 1.0], dtype=torch.float64))
    out = KSpaceLowResolution(scale, mode="zero_fill")(MetaTensor(img[None], affine=affine))
    np.testing.assert_allclose(out[0].numpy(), expected, atol=1e-12)
    assert torch.equal(out.affine, affine)


@pytest.mark.parametrize("full, scale", PLANES)
def test_band_limited_image_is_recovered(full, scale):
    hr, _ = band_limited(full, low_matrix(full, scale), seed=3)
    recovered = KSpaceUpsample()(KSpaceLowResolution(scale)(hr.astype(np.float32)), full)
    assert recovered.dtype == torch.float32
    np.testing.assert_allclose(recovered.numpy(), hr, atol=1e-5)


@pytest.mark.parametrize("full, scale", PLANES)
def test_mean_and_energy_are_kept(full, scale):
    hr, _ = band_limited(full, low_matrix(full, scale), seed=4)
    lr = KSpaceLowResolution(scale)(hr).numpy()
    up = KSpaceUpsample()(lr, full).numpy()
    for img in (lr, up):
        assert img.mean() == pytest.approx(hr.mean(), rel=1e-13)
        assert (img**2).mean() == pytest.approx((hr**2).mean(), rel=1e-13)


@pytest.mark.parametrize("low, full", [((8, 7), (16, 21)), ((7, 8), (16, 9)), ((1, 6), (5, 6)), ((4, 5, 2), (8, 5, 7))])
def test_zero_fill_upsampling_is_trigonometric_interpolation(low, full):
    """On any image: the +-n/2 pair of an even n has weight one half each."""
    img = np.random.default_rng(5).normal(size=low)  # negative values too: there is no magnitude
    matrices = []
    for n, size in zip(low, full):
        f = np.arange(-(n // 2), n // 2 + 1)
        weight = np.where(np.abs(f) * 2 == n, 0.5, 1.0)
        position = (np.arange(size) + 0.5) * n / size - 0.5  # of the HR pixels, in LR pixels
        matrices.append((waves(position, f, n) * weight @ waves(np.arange(n), f, n).conj().T).real / n)
    out = KSpaceUpsample()(img[None], full)
    np.testing.assert_allclose(out[0].numpy(), apply_along(matrices, img), atol=1e-12)


def test_bicubic_is_cubic_convolution_between_pixel_centres():
    low, full = (7, 6), (14, 18)

    def kernel(x, a=-0.75):
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    matrices = []
    for n, size in zip(low, full):
        matrix = np.zeros((size, n))
        for p in range(size):
            position = (p + 0.5) * n / size - 0.5
            for i in range(math.floor(position) - 1, math.floor(position) + 3):
                matrix[p, min(max(i, 0), n - 1)] += kernel(position - i)
        matrices.append(matrix)
    img = np.random.default_rng(6).random((2, *low, 3))
    out = KSpaceUpsample("bicubic")(img, (*full, 3))
    for c in range(2):
        for s in range(3):
            np.testing.assert_allclose(out[c, ..., s], apply_along(matrices, img[c, ..., s]), atol=1e-12)
    torch.testing.assert_close(KSpaceUpsample("bicubic")(img[..., 1], full), out[..., 1])


def oblique(spacing, flip):
    """RAS affine, rotated about all three axes; ``flip`` = -1 gives a left-handed LAS-like grid."""
    turns = np.eye(3)
    for (i, j), angle in zip(((0, 1), (1, 2), (0, 2)), (0.3, -0.2, 0.1)):
        turn = np.eye(3)
        turn[[i, j], [i, j]] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        turns = turns @ turn
    affine = np.eye(4)
    affine[:3, :3] = turns @ np.diag([flip * spacing[0], *spacing[1:]])
    affine[:3, 3] = (-31.0, 17.5, 8.25)
    return affine


def blobs(shape, width):
    """Smooth random image that vanishes at the borders; ``width`` in pixels per axis."""
    rng = np.random.default_rng(7)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)
    img = np.zeros(shape)
    for _ in range(6):
        centre = np.array(shape) * rng.uniform(0.42, 0.58, 3)
        img += rng.uniform(0.5, 1) * np.exp(-0.5 * (((grid - centre) / width) ** 2).sum(-1))
    return img


def shift_in_voxels(hr, lr, folder):
    """HR against LR resampled onto the HR grid by SimpleITK, both passing through NIfTI files."""
    images = []
    for name, img in (("hr", hr), ("lr", lr)):
        path = folder / f"{name}.nii"
        nib.save(nib.Nifti1Image(img[0].numpy(), img.affine.numpy()), path)
        images.append(sitk.ReadImage(str(path), sitk.sitkFloat64))
    back = sitk.GetArrayFromImage(sitk.Resample(images[1], images[0], sitk.Transform(), sitk.sitkBSpline, 0.0))
    shift, _, _ = phase_cross_correlation(hr[0].numpy(), back.T, upsample_factor=100, normalization=None)
    return shift


@pytest.mark.parametrize("flip", [1, -1])
@pytest.mark.parametrize(
    "shape, scale",
    [
        ((48, 48, 20), (2, 2, 1)),
        ((51, 63, 21), (3, 3, 1)),
        ((64, 80, 20), (4, 4, 1)),
        ((65, 55, 20), (4, 2, 1)),
        ((50, 64, 40), (1, 3, 2)),
        ((61, 60, 20), (2.5, 1.5, 1)),
    ],
)
def test_low_and_high_resolution_agree_in_world_space(shape, scale, flip, tmp_path):
    affine = oblique((0.9, 1.1, 3.0), flip)
    img = blobs(shape, width=1.2 * np.array(scale) + 1)
    hr = MetaTensor(img[None], affine=torch.from_numpy(affine))
    lr = KSpaceLowResolution(scale)(hr)
    assert np.abs(shift_in_voxels(hr, lr, tmp_path)).max() <= 0.02

    r = np.array(shape) / np.array(lr.shape[1:])
    unshifted = lr.clone()  # the affine of a spectrum cropped without ramp, which samples HR at r * i
    unshifted.affine = lr.affine @ torch.from_numpy(nib.affines.from_matvec(np.eye(3), (1 - r) / (2 * r)))
    np.testing.assert_allclose(shift_in_voxels(hr, unshifted, tmp_path), (r - 1) / 2, atol=0.03)

    up = KSpaceUpsample()(lr, shape)
    np.testing.assert_allclose(up.affine, affine, atol=1e-12)
    np.testing.assert_allclose(up, hr, atol=1e-4 * img.max())


@pytest.mark.parametrize("scale", [2, 4])
def test_ramp_is_worth_decibels(scale):
    """The order of the numbers in docs/data.md, preprocessing, on a phantom: the half-pixel trap costs over 1 dB."""
    hr = shepp_logan_phantom()[None]
    size = hr.shape[1]
    n = size // scale
    window = np.fft.fftshift(np.fft.fft2(hr[0]))[size // 2 - n // 2 :, size // 2 - n // 2 :][:n, :n]
    naive = np.abs(np.fft.ifft2(np.fft.ifftshift(window)))[None] / scale**2
    lr = KSpaceLowResolution(scale)(hr)

    def psnr(img, mode):
        up = KSpaceUpsample(mode)(img, (size, size)).numpy()
        return peak_signal_noise_ratio(hr, up, data_range=hr.max())

    assert psnr(naive, "bicubic") + 1 < psnr(lr, "bicubic") < psnr(lr, "zero_fill")


@pytest.mark.parametrize("mode", ["crop", "zero_fill"])
def test_a_stack_equals_its_slices(mode):
    stack = torch.rand(2, 21, 16, 5, generator=torch.Generator().manual_seed(0))
    low = KSpaceLowResolution(2, mode=mode)
    torch.testing.assert_close(low(stack), torch.stack([low(stack[..., s]) for s in range(5)], -1))
    up = KSpaceUpsample()
    torch.testing.assert_close(up(stack, (30, 32, 5))[..., 3], up(stack[..., 3], (30, 32)))


@pytest.mark.parametrize("mode", ["crop", "zero_fill"])
@pytest.mark.parametrize("scale", [1, 2, (2, 3, 1)])
def test_noise_has_the_stated_standard_deviation(mode, scale):
    sigma = 2.0
    flat = torch.full((1, 96, 96, 24), 500.0)
    signal = KSpaceLowResolution(scale, mode=mode, noise_std=sigma)(flat)
    assert float(signal.mean()) == pytest.approx(500, abs=0.05)
    assert float(signal.std()) == pytest.approx(sigma, rel=0.02)
    background = KSpaceLowResolution(scale, mode=mode, noise_std=sigma)(torch.zeros_like(flat))
    assert float(background.mean()) == pytest.approx(sigma * math.sqrt(math.pi / 2), rel=0.02)
    assert float(background.std()) == pytest.approx(sigma * math.sqrt(2 - math.pi / 2), rel=0.02)
    between_slices = np.corrcoef(signal[0, ..., 0].flatten(), signal[0, ..., 1].flatten())[0, 1]
    assert abs(between_slices) < 0.1


def test_noise_belongs_to_seed_and_image():
    img = torch.rand(1, 32, 32, generator=torch.Generator().manual_seed(1))
    noisy = KSpaceLowResolution(2, noise_std=0.1, seed=5)
    torch.manual_seed(0)
    first = noisy(img)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(first, noisy(img))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, KSpaceLowResolution(2, noise_std=0.1, seed=5)(img.numpy()))
    assert not torch.allclose(first, KSpaceLowResolution(2, noise_std=0.1, seed=6)(img), atol=1e-3)
    flat = [noisy(torch.full((1, 64, 64), value)).flatten() - value for value in (50.0, 60.0)]
    assert abs(np.corrcoef(*flat)[0, 1]) < 0.1


def test_meta_survives_and_the_input_is_left_alone():
    affine = torch.from_numpy(oblique((0.9, 1.1, 3.0), -1))
    meta = {"filename_or_obj": "t2.nii.gz", "site": "Guys"}
    hr = MetaTensor(torch.rand(1, 12, 10), affine=affine.clone(), meta=dict(meta))
    lr = KSpaceLowResolution((3, 2))(hr)
    assert isinstance(lr, MetaTensor) and lr.shape == (1, 4, 5)
    assert {key: lr.meta[key] for key in meta} == meta
    corner = torch.tensor([-0.5, -0.5, 0, 1], dtype=torch.float64)  # of the field of view
    opposite = [torch.tensor([x - 0.5, y - 0.5, 0, 1], dtype=torch.float64) for x, y in ((12, 10), (4, 5))]
    torch.testing.assert_close(lr.affine @ corner, affine @ corner)
    torch.testing.assert_close(lr.affine @ opposite[1], affine @ opposite[0])
    torch.testing.assert_close(lr.affine[:, 2], affine[:, 2])
    assert torch.equal(hr.affine, affine) and hr.meta["filename_or_obj"] == "t2.nii.gz"
    for mode in ("zero_fill", "bicubic"):
        up = KSpaceUpsample(mode)(lr, (12, 10))
        assert isinstance(up, MetaTensor) and up.meta["filename_or_obj"] == "t2.nii.gz"
        torch.testing.assert_close(up.affine, affine)
        assert lr.shape == (1, 4, 5) and not torch.allclose(lr.affine, affine)


def test_arrays_and_tensors_agree():
    img = np.random.default_rng(8).integers(0, 1000, (1, 20, 18, 3)).astype(np.int16)
    reference = KSpaceLowResolution(2)(torch.from_numpy(img).float())
    for other in (img, np.asfortranarray(img), torch.from_numpy(img), MetaTensor(img)):
        lr = KSpaceLowResolution(2)(other)
        assert lr.dtype == torch.float32 and isinstance(lr, MetaTensor) == isinstance(other, MetaTensor)
        assert torch.equal(torch.as_tensor(lr), reference)
        assert torch.equal(KSpaceUpsample()(np.asarray(lr), (20, 18, 3)), KSpaceUpsample()(reference, (20, 18, 3)))


def test_small_axes_and_factor_one():
    img = torch.rand(1, 1, 5, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(KSpaceLowResolution(8)(img), img.mean(dim=(1, 2), keepdim=True))
    assert torch.equal(KSpaceLowResolution(1)(img), img)
    assert torch.equal(KSpaceUpsample()(img, (1, 5)), img)
    torch.testing.assert_close(KSpaceUpsample()(img, (4, 5)), img.expand(1, 4, 5))
    assert 21 / 1.4 > 15  # rounding must not add a line
    assert KSpaceLowResolution(1.4)(torch.ones(1, 21, 28)).shape == (1, 15, 20)


def test_dictionary_twins():
    hr = MetaTensor(torch.rand(1, 20, 18, 3), meta={"filename_or_obj": "t2.nii.gz"})
    ref = torch.rand(1, 20, 18, 3)
    pipeline = Compose(
        [
            KSpaceLowResolutiond("t2", scale=2, noise_std=0.1, seed=3, output_keys="lr"),
            KSpaceUpsampled("lr", like_key="t1", output_keys=["up"]),
        ]
    )
    data = pipeline({"t2": hr, "t1": ref})
    lr = KSpaceLowResolution(2, noise_std=0.1, seed=3)(hr)
    assert torch.equal(data["t2"], hr) and torch.equal(data["lr"], lr)
    assert torch.equal(data["lr"].affine, lr.affine)
    assert torch.equal(data["up"], KSpaceUpsample()(lr, (20, 18, 3)))
    assert data["up"].meta["filename_or_obj"] == "t2.nii.gz"
    torch.testing.assert_close(data["up"].affine, hr.affine)

    in_place = KSpaceLowResolutiond(["t2", "pd"], 2, mode="zero_fill", allow_missing_keys=True)({"t2": hr})
    assert in_place.keys() == {"t2"}
    assert torch.equal(in_place["t2"], KSpaceLowResolution(2, mode="zero_fill")(hr))
    bicubic = KSpaceUpsampled("lr", like_key="t1", mode="bicubic")(data)["lr"]
    assert torch.equal(bicubic, KSpaceUpsample("bicubic")(lr, (20, 18, 3)))
    with pytest.raises(KeyError, match="like_key 't1'"):
        KSpaceUpsampled("lr", like_key="t1")({"lr": lr})
    with pytest.raises(KeyError, match="pd"):
        KSpaceLowResolutiond("pd", 2)({"t2": hr})
    for twin in (
        lambda: KSpaceLowResolutiond(["t2", "pd"], 2, output_keys="lr"),
        lambda: KSpaceUpsampled("lr", "t1", output_keys=["a", "b"]),
    ):
        with pytest.raises(ValueError, match="output_keys"):
            twin()


@pytest.mark.parametrize(
    "kwargs, word",
    [
        ({"scale": 0.5}, "scale"),
        ({"scale": float("nan")}, "scale"),
        ({"scale": float("inf")}, "scale"),
        ({"scale": (2, 0)}, "scale"),
        ({"scale": ()}, "scale"),
        ({"scale": "2"}, "scale"),
        ({"scale": 2, "mode": "pad"}, "mode"),
        ({"scale": 2, "noise_std": -1.0}, "noise_std"),
        ({"scale": 2, "noise_std": float("nan")}, "noise_std"),
    ],
)
def test_low_resolution_refuses_arguments(kwargs, word):
    with pytest.raises(ValueError, match=word):
        KSpaceLowResolution(**kwargs)


def test_refused_images_and_sizes():
    img = torch.rand(1, 8, 8, 4)
    with pytest.raises(ValueError, match="mode"):
        KSpaceUpsample("nearest")
    with pytest.raises(ValueError, match=r"scale must have .*\(8, 8, 4\)"):
        KSpaceLowResolution((2, 2, 2, 2))(img)
    assert torch.equal(KSpaceLowResolution((2, 4))(img), KSpaceLowResolution((2, 4, 1))(img))
    for transform in (KSpaceLowResolution(2), lambda x: KSpaceUpsample()(x, (8, 8))):
        with pytest.raises(TypeError, match="real"):
            transform(img[..., 0] + 1j)
        for wrong in (img[0, 0], img[None]):
            with pytest.raises(ValueError, match="channel-first"):
                transform(wrong)
    for size in ((8, 8), (8, 8, 3), (7, 16, 4)):
        with pytest.raises(ValueError, match="spatial_size"):
            KSpaceUpsample()(img, size)
    with pytest.raises(ValueError, match="keep the 4 slices"):
        KSpaceUpsample("bicubic")(img, (16, 16, 8))


def test_an_item_may_name_its_own_scale():
    image = torch.rand(1, 24, 20, 3, generator=torch.Generator().manual_seed(0))
    degrade = KSpaceLowResolutiond("hr", 2, noise_std=0.1, seed=5, output_keys="lr", scale_key="scale")
    for scale in (2, 3, 2.5):
        expected = KSpaceLowResolution(scale, noise_std=0.1, seed=5)(image)
        assert torch.equal(degrade({"hr": image, "scale": scale})["lr"], expected)
    assert torch.equal(degrade({"hr": image})["lr"], KSpaceLowResolution(2, noise_std=0.1, seed=5)(image))


# --- data consistency


def super_resolved(full, low, seed=9):
    """A band-limited HR image, its LR, and a wrong SR with content on every frequency; LR and SR nonnegative."""
    hr, lr = band_limited(full, low, seed)
    wrong = hr + 0.2 * np.random.default_rng(seed + 1).normal(size=hr.shape)
    return hr, lr, np.abs(wrong)


def beyond(low, full):
    """Frequencies of the HR spectrum (FFT order) of which the LR holds neither itself nor its twin."""
    outside = np.zeros(full, dtype=bool)
    for axis, (n, size) in enumerate(zip(low, full)):
        far = np.abs(np.fft.fftfreq(size, 1 / size)) > (n / 2 if n < size else size)
        outside |= far.reshape([-1 if a == axis else 1 for a in range(len(full))])
    return outside


@pytest.mark.parametrize("magnitude", [True, False])
@pytest.mark.parametrize("full, scale", [*PLANES, ((20, 15, 12), (2, 1, 3))])
def test_what_is_consistent_gives_the_low_resolution_again(full, scale, magnitude):
    low = low_matrix(full, scale)
    _, lr, wrong = super_resolved(full, low)
    degrade = KSpaceLowResolution(scale)
    out = KSpaceDataConsistency(magnitude)(wrong, lr)
    assert out.dtype == torch.float64 and out.shape == wrong.shape
    np.testing.assert_allclose(degrade(out).numpy(), lr, atol=1e-13)
    assert np.abs(degrade(wrong).numpy() - lr).max() > 0.05  # it was not
    single = KSpaceDataConsistency(magnitude)(torch.from_numpy(wrong).float(), torch.from_numpy(lr).float())
    assert single.dtype == torch.float32
    assert np.abs(degrade(single).numpy() - lr).max() <= 1e-5 * lr.max()
    # What was not measured stays.
    spectra = [np.fft.fftn(np.asarray(x)[0])[beyond(low, full)] for x in (wrong, out)]
    assert len(spectra[0]) and np.abs(spectra[0]).max() > 1
    np.testing.assert_allclose(*spectra, atol=1e-10)


@pytest.mark.parametrize("full, scale", PLANES)
def test_data_consistency_measures_magnitudes_of_any_image(full, scale):
    """Also where the LR is the magnitude of ringing, and where pixels of it are zero."""
    rng = np.random.default_rng(11)
    hr = rng.random(full)[None] * (np.arange(full[-1]) > full[-1] // 2)
    degrade = KSpaceLowResolution(scale)
    lr = degrade(hr).numpy()
    np.testing.assert_allclose(KSpaceDataConsistency()(hr, lr).numpy(), hr, atol=1e-7)  # it is consistent already
    lr[:, 1, 1:3] = 0
    out = KSpaceDataConsistency()(rng.normal(size=hr.shape), lr)
    np.testing.assert_allclose(degrade(out).numpy(), lr, atol=1e-12)
    again = KSpaceDataConsistency()(out, lr)
    np.testing.assert_allclose(again.numpy(), out.numpy(), atol=1e-7)


@pytest.mark.parametrize("full, scale", PLANES)
def test_data_consistency_is_the_nearest_real_image(full, scale):
    """Without magnitude: the projection, by least squares over all pixels, onto the images that have this LR."""
    small = [min(size, 12) - size % 2 for size in full]
    low = low_matrix(small, scale)
    rng = np.random.default_rng(12)
    img, lr = rng.normal(size=small), rng.normal(size=low)
    crops = []
    for size, n in zip(small, low):
        kept = np.arange(-(n // 2), -(n // 2) + n)
        matrix = waves(centres(size, n), kept, size) @ waves(np.arange(size), kept, size).conj().T / size
        crops.append(np.eye(size) if n == size else matrix)
    operator = np.kron(*crops)
    found = operator @ img.ravel() - lr.ravel()
    stacked, residual = (np.concatenate([a.real, a.imag]) for a in (operator, found))
    expected = img - (np.linalg.pinv(stacked) @ residual).reshape(small)
    out = KSpaceDataConsistency(magnitude=False)(img[None], lr[None])
    np.testing.assert_allclose(out[0].numpy(), expected, atol=1e-10)


def test_a_true_image_comes_back_from_its_low_resolution():
    """Wrong only in what was measured: data consistency takes all of the error away."""
    hr, lr, _ = super_resolved((48, 40), (24, 20))
    wrong = KSpaceUpsample()(0.8 * lr + 0.1, (48, 40)).numpy()
    np.testing.assert_allclose(KSpaceDataConsistency()(wrong, lr).numpy(), hr, atol=1e-12)


def test_data_consistency_of_volumes():
    """float32 with slices last: as slice by slice, with the meta and the device of the image, the inputs untouched."""
    full, scale = (33, 40, 5), 2
    rng = np.random.default_rng(13)
    affine = torch.from_numpy(oblique((0.9, 1.1, 3.0), -1))
    hr = MetaTensor(rng.random((2, *full)).astype(np.float32), affine=affine)
    lr = KSpaceLowResolution(scale)(hr)
    sr = MetaTensor(rng.random((2, *full)).astype(np.float32), affine=affine, meta={"filename_or_obj": "sr.nii"})
    before = sr.clone(), lr.clone()
    out = KSpaceDataConsistency()(sr, lr)
    assert isinstance(out, MetaTensor) and out.dtype == torch.float32 and out.meta["filename_or_obj"] == "sr.nii"
    torch.testing.assert_close(out.affine, affine)
    assert float((KSpaceLowResolution(scale)(out) - lr).abs().max()) <= 1e-5 * float(lr.max())
    slices = [KSpaceDataConsistency()(sr[..., i], lr[..., i]) for i in range(5)]
    torch.testing.assert_close(out.as_tensor(), torch.stack([s.as_tensor() for s in slices], -1))
    assert torch.equal(sr, before[0]) and torch.equal(lr, before[1])

    data = KSpaceDataConsistencyd("pred", low_resolution_key="lr")({"pred": sr, "lr": lr.numpy()})
    assert torch.equal(data["pred"], out)
    signed = KSpaceDataConsistencyd(["pred", "none"], "lr", magnitude=False, allow_missing_keys=True)(data)
    assert torch.equal(signed["pred"], KSpaceDataConsistency(magnitude=False)(out, lr))
    with pytest.raises(KeyError, match="low_resolution_key 'lr'"):
        KSpaceDataConsistencyd("pred", "lr")({"pred": sr})


@pytest.mark.parametrize(
    "low, words",
    [
        ((1, 8, 8, 4), "smaller than img"),
        ((1, 9, 4, 4), "larger along none"),
        ((2, 4, 4, 4), "channels and axes"),
        ((1, 4, 4), "channels and axes"),
    ],
)
def test_data_consistency_refuses_what_does_not_fit(low, words):
    with pytest.raises(ValueError, match=f"low_resolution must .*{words}"):
        KSpaceDataConsistency()(torch.rand(1, 8, 8, 4), torch.rand(low))
    with pytest.raises(TypeError, match="real"):
        KSpaceDataConsistency()(torch.rand(1, 8, 8) + 0j, torch.rand(1, 4, 4))


@pytest.mark.parametrize("scale", [2, 2.5, (1, 4)])
def test_grids_that_are_no_crop_are_refused(scale):
    affine = torch.from_numpy(oblique((0.9, 1.1, 3.0), -1))
    hr = MetaTensor(torch.rand(1, 33, 40, 5), affine=affine, meta={"filename_or_obj": "t1.nii"})
    lr = KSpaceLowResolution(scale)(hr)
    require = RequireKSpaceCropd("lr", like_key="t1")
    data = require({"lr": lr, "t1": hr})
    assert data["lr"] is lr and data["t1"] is hr
    with pytest.raises(ValueError, match=r"data consistency: t1\.nii has the matrix \(33, 40, 5\).*leave"):
        require({"lr": hr, "t1": hr})
    moved = lr.clone()
    moved.affine = hr.affine @ torch.diag(
        torch.tensor([*(a / b for a, b in zip(hr.shape[1:], lr.shape[1:])), 1]).double()
    )
    with pytest.raises(ValueError, match=r"data consistency: t1\.nii does not cover the field of view of t1\.nii"):
        require({"lr": moved, "t1": hr})  # the corner of voxel 0 kept: half a voxel off
