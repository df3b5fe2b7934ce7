"""Random slices for weights of every factor: what inference would see, aligned, and a function of the draw alone."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset, MetaTensor, get_track_meta
from monai.transforms import Compose
from scipy.ndimage import center_of_mass

from glmamba_monai.data import ContrastPairs, ContrastVolume, SliceDraw, SliceSampler, contrast_items, volume_dataset
from glmamba_monai.errors import root_cause
from glmamba_monai.transforms import FACTORS, RandFunctiond, RandLowResolutiond, RandPixelSized, inverted_contrast

CONFIGS = Path(__file__).parent.parent / "bundle" / "configs"
# How often something happens to a sample after it is drawn, by the names in train_general.json.
CHANCES = (
    "missing_reference_prob",
    "pixel_size_prob",
    "move_prob",
    "gamma_prob",
    "histogram_prob",
    "invert_prob",
    "intensity_prob",
    "reference_noise_prob",
    "zero_fill_prob",
    "kspace_noise_prob",
)


def configured(*overlays, **overrides):
    """train.json with train_general.json over it; of the transforms, those of the overlay as dictionaries."""
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / f"{name}.json") for name in ("train", "train_general", *overlays)])
    for name, value in {"network": "srcnn_ref", "num_workers": 0, **overrides}.items():
        parser[name] = value
    return parser


def augmentation(calm=False, only=None, **overrides):
    """That of train_general.json; ``calm``: nothing random is done but the factor; ``only``: one transform alone."""
    parser = configured(**{**(dict.fromkeys(CHANCES, 0) if calm else {}), **overrides})
    steps = parser["train#augmentation#transforms"]
    if calm:
        steps = [step for step in steps if not step["_target_"].endswith("RandOrientedCropd")]
    if only is not None:
        steps = [{**the_step(parser, only), "prob": 1}]
    parser["train#augmentation#transforms"] = steps
    return parser.get_parsed_content("train#augmentation")


def the_step(parser, name):
    """The one transform of that class, as a dictionary."""
    (step,) = (s for s in parser["train#augmentation#transforms"] if s["_target_"].endswith(name))
    return step


def degradation(**changes):
    """That of train_general.json, with other arguments."""
    parser = configured()
    parser["arguments"] = {**the_step(parser, "RandLowResolutiond"), **changes}
    del parser["arguments"]["_target_"]
    return RandLowResolutiond(**parser.get_parsed_content("arguments"))


def augmented_pairs(volumes, **overrides):
    """Samples of train_general.json in small crops."""
    parser = configured(crop_size=24, **overrides)
    parser["train#dataset"] = volumes
    return parser.get_parsed_content("train#slices")


def blob(size, centre, width=4.0):
    """A Gaussian spot ``(1, X, Y)``; ``centre`` in units of the field of view."""
    x, y = (((np.arange(n) + 0.5) - c * n) / width for n, c in zip(size, centre))
    return torch.tensor(np.exp(-0.5 * (x[:, None] ** 2 + y[None] ** 2)), dtype=torch.float32)[None]


def place(image):
    """Centre of mass in units of the field of view."""
    return (np.array(center_of_mass(image[0].numpy() ** 2)) + 0.5) / np.array(image.shape[1:])


@pytest.fixture
def subjects(tmp_path, make_subject_folder):
    """Three subjects of four contrasts, as items."""
    made = make_subject_folder(tmp_path / "data", n=3, contrasts=("t1", "t2", "flair", "pd", "seg"), shape=(48, 40, 8))
    items = [{"subject": s, "target": str(f["t2"]), "reference": str(f["t1"])} for s, f in made.items()]
    return items, str(tmp_path / "data")


@pytest.fixture
def volumes(subjects):
    items, folder = subjects
    return volume_dataset(contrast_items(items, folder, "t2", "t1"), ContrastVolume())


# --- what inference would see


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_without_chance_a_slice_is_that_of_the_single_scale_training(subjects, volumes, factor):
    """The same file through the volume's transforms of train.json, which are those of inference."""
    items, _ = subjects
    whole = configured(scale=factor).get_parsed_content("train#deterministic_transforms")
    transform = augmentation(calm=True)
    degrade = next(t for t in transform.transforms if isinstance(t, RandLowResolutiond))
    pairs = ContrastPairs(volumes, transform, first_pair=1, wrong_reference=0)
    compared = 0
    expected = Compose(whole)(items[1])
    for seed in range(12):
        found = pairs[SliceDraw(1, 0.4, seed)]
        if degrade.factor != factor:
            continue
        index = 3  # no slice of these subjects is left out
        for key, tolerance in (("image", 2e-6), ("target", 2e-6)):
            difference = found[key] - expected[key].as_tensor()[..., index]
            assert difference.abs().max() < tolerance, key
        compared += 1
    assert compared


@pytest.mark.parametrize("scale", [2.5, 3])
def test_the_overlay_for_one_factor_leaves_out_what_serves_generality(scale):
    parser = configured("train_contrasts", scale=scale)
    steps = parser.get_parsed_content("train#augmentation").transforms
    assert [(type(s).__name__, s.prob) for s in steps if hasattr(s, "prob")] == [
        ("RandPixelSized", 0),
        ("RandAffined", 0.2),
        ("RandAdjustContrastd", 0.15),
        ("RandHistogramShiftd", 0),
        ("RandFunctiond", 0.02),
        ("RandScaleIntensityd", 0.5),
        ("RandRicianNoised", 0),
        ("RandFunctiond", 0),
        ("RandScaleIntensityd", 0.5),
    ]
    assert [s.func for s in steps if isinstance(s, RandFunctiond)] == [inverted_contrast, torch.zeros_like]
    (degrade,) = (s for s in steps if isinstance(s, RandLowResolutiond))
    for seed in range(50):
        degrade.set_random_state(seed=seed)
        degrade.randomize()
        assert (degrade.factor, degrade.mode, degrade.noise) == (scale, "crop", 0)
    assert parser.get_parsed_content("validation_scales") == [scale]
    parser["pairs"] = {name: parser[f"train#slices#{name}"] for name in ("first_pair", "wrong_reference")}
    assert parser.get_parsed_content("pairs") == {"first_pair": 0.7, "wrong_reference": 0}


@pytest.mark.parametrize(
    "factors", [[[2, 4], [2, 4]], [2, 4, 3], [4, 2], [0.5, 2], [2, np.inf], [2, np.nan], ["2", "4"], 2], ids=str
)
def test_factors_that_are_no_limits_are_refused(factors):
    found = re.escape(f"factors={factors!r}")
    with pytest.raises(ValueError, match=rf"^{found}: expected two numbers from 1 on, the smallest and the largest"):
        degradation(factors=factors)


def test_a_factor_per_axis_is_refused_before_the_volumes_are_prepared(subjects, monkeypatch, tmp_path):
    """--scale "[2,4]", which train.json takes, with train_contrasts.json over it."""
    monkeypatch.setattr(ContrastVolume, "__call__", lambda *_: pytest.fail("a volume is prepared"))
    parser = configured("train_contrasts", scale=[2, 4], dataset_dir=subjects[1], output_dir=str(tmp_path / "out"))
    with pytest.raises(RuntimeError, match=r"Failed to instantiate .*\.RandLowResolutiond") as error:
        parser.get_parsed_content("train#trainer")
    assert re.match(r"factors=\[\[2, 4\], \[2, 4\]\]: expected two numbers", str(root_cause(error.value)))


def test_the_divisor_between_factors_is_that_of_the_volume(volumes, subjects):
    items, _ = subjects
    for factor in FACTORS:
        prepared = Compose(configured(scale=factor).get_parsed_content("train#deterministic_transforms"))(items[0])
        # images are in units of their own percentile, so that the ratio of the divisors remains
        target = prepared["target"].as_tensor() * prepared["divisor"]
        own = np.percentile(target.double().numpy(), 99.9)
        assert volumes[0]["divisors"][0][FACTORS.index(factor)] == pytest.approx(prepared["divisor"] / own, rel=1e-5)


def test_every_draw_of_the_degradation_is_within_its_limits():
    degrade = degradation()
    seen = Counter()
    draws = 1500
    for seed in range(draws):
        degrade.set_random_state(seed=seed)
        degrade.randomize()
        assert 2 <= degrade.factor <= 4 and 0 <= degrade.noise <= 0.03
        seen.update([degrade.mode, "noisy" if degrade.noise else "clean", degrade.factor in FACTORS])
    share = {key: n / draws for key, n in seen.items()}
    assert share["zero_fill"] == pytest.approx(0.1, abs=0.03)
    assert share["noisy"] == pytest.approx(0.2, abs=0.05)
    assert share[True] == pytest.approx(0.7, abs=0.05)


@pytest.mark.parametrize(
    ("shares", "factors", "expected"),
    [
        ((1, 1, 1), (2, 4), {2: 1 / 3, 3: 1 / 3, 4: 1 / 3}),
        ((3, 1, 1), (2, 4), {2: 0.6, 3: 0.2, 4: 0.2}),
        ((3, 1, 1), (2.5, 4), {3: 0.5, 4: 0.5}),
        ((0, 0, 1), (2, 4), {4: 1}),
    ],
    ids=str,
)
def test_the_shares_of_the_whole_factors(shares, factors, expected):
    degrade = degradation(factors=factors, whole=1, shares=shares)
    degrade.set_random_state(seed=0)
    draws = 2000
    seen = Counter()
    for _ in range(draws):
        degrade.randomize()
        seen[degrade.factor] += 1
    assert {factor: n / draws for factor, n in seen.items()} == pytest.approx(expected, abs=0.04)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": (1, 1)}, r"shares=\(1, 1\): expected 3 numbers, none negative"),
        ({"shares": (2, -1, 1)}, r"shares=\(2, -1, 1\): expected 3 numbers, none negative"),
        ({"shares": (0, 0, 0)}, r"whole=0\.7: expected 0, or one of the factors .* found shares=\(0, 0, 0\)"),
        ({"shares": (0, 1, 1), "factors": (2, 2)}, r"whole=0\.7: .* within factors=\(2, 2\)"),
        ({"factors": (2.2, 2.8)}, r"whole=0\.7: .* within factors=\(2\.2, 2\.8\)"),
    ],
    ids=str,
)
def test_shares_that_fit_no_factor_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        degradation(**options)


@pytest.mark.parametrize("factors", [(2, 4), (2, 2)])
def test_equal_shares_are_drawn_as_ever(factors):
    """A training that was begun before there were shares goes on with the same draws."""
    degrade = degradation(factors=factors)
    among = [f for f in (2, 3, 4) if factors[0] <= f <= factors[1]]
    for seed in range(40):
        degrade.set_random_state(seed=seed)
        degrade.randomize()
        chance = np.random.RandomState(seed)
        assert degrade.factor == (chance.choice(among) if chance.rand() < 0.7 else chance.uniform(*factors))
        assert degrade.mode == ("zero_fill" if chance.rand() < 0.1 else "crop")


def test_without_whole_factors_the_shares_do_not_matter():
    degrade = degradation(factors=(2.2, 2.8), whole=0)
    degrade.randomize()
    assert 2.2 <= degrade.factor <= 2.8


def test_the_noise_is_that_of_the_magnitude_of_the_low_resolution():
    """In the air a Rician magnitude has the mean sqrt(pi / 2) sigma, in units of the divisor."""
    degrade = degradation(noisy=1, zero_fill=1, noise_std=0.03)
    air = torch.zeros(1, 96, 96)
    for seed in range(4):
        degrade.set_random_state(seed=seed)
        upsampled = degrade({"target": air, "divisors": torch.tensor([0.9, 0.8, 0.7])})["upsampled"]
        assert upsampled.mean() == pytest.approx(np.sqrt(np.pi / 2) * degrade.noise, rel=0.05)


# --- alignment


@pytest.mark.parametrize("size", [(120, 96), (121, 75)])
@pytest.mark.parametrize("centre", [(0.3, 0.6), (0.52, 0.41)])
def test_coarser_pixels_do_not_move_the_image(size, centre):
    spot = blob(size, centre)
    coarser = RandPixelSized(["target", "reference"], "pixel_size", largest=1.25, prob=1)
    sizes = []
    for seed in range(30):
        coarser.set_random_state(seed=seed)
        made = coarser({"target": spot, "reference": 2 * spot, "pixel_size": 0.5})
        assert torch.allclose(made["reference"], 2 * made["target"])
        assert 0.5 <= made["pixel_size"] <= 1.25
        np.testing.assert_allclose(made["target"].shape[1:], np.array(size) * 0.5 / made["pixel_size"], atol=1)
        np.testing.assert_allclose(place(made["target"]), place(spot), atol=0.01 / min(size))
        sizes.append(made["pixel_size"])
    # equal odds for equal ratios: half of them below the geometric mean
    assert 0.25 < np.mean(np.array(sizes) < np.sqrt(0.5 * 1.25)) < 0.75


def test_large_pixels_stay_as_they_are():
    spot = blob((20, 24), (0.5, 0.5))
    made = RandPixelSized("target", "pixel_size", largest=1.25, prob=1)({"target": spot, "pixel_size": 2.0})
    assert made["target"] is spot and made["pixel_size"] == 2.0


def test_the_reference_is_moved_by_two_pixels_and_three_degrees_at_most():
    move = augmentation(only="RandAffined")
    middle, edge = (blob((101, 101), c, 3) for c in ((0.5, 0.5), (0.5, 0.9)))
    shifts, angles = [], []
    for seed in range(60):
        found = []
        for spot in (middle, edge):
            move.set_random_state(seed=seed)
            found.append(place(torch.as_tensor(move({"reference": spot})["reference"])) * 101)
        shifts.append(found[0] - 50.5)
        along = found[1] - found[0]
        angles.append(np.degrees(np.arctan2(along[0], along[1])))
    assert np.abs(shifts).max() < 2.1 and np.abs(angles).max() < 3.1
    for values in (*np.transpose(shifts) / 2, np.array(angles) / 3):
        assert values.min() < -0.7 and values.max() > 0.7 and abs(values.mean()) < 0.25


def test_a_reference_that_is_not_moved_is_not_resampled():
    parser = configured()
    step = {**the_step(parser, "RandAffined"), "prob": 1, "rotate_range": 0, "translate_range": [0, 0]}
    parser["train#augmentation#transforms"] = [step]
    image = torch.rand(1, 31, 40, generator=torch.Generator().manual_seed(0))
    moved = parser.get_parsed_content("train#augmentation")({"reference": image})["reference"]
    assert torch.allclose(torch.as_tensor(moved), image, atol=1e-4)


# --- contrast


def test_inverted_contrast_swaps_tissues_and_keeps_the_air():
    image = torch.tensor([0.0, 0.3, 0.9, 1.6])
    air, dark, bright, brightest = inverted_contrast(image).tolist()
    assert air == 0 == brightest and dark == pytest.approx(0.8) and bright == pytest.approx(0.2)
    fine = inverted_contrast(torch.linspace(0, 2, 2001))
    assert fine.min() >= 0 and fine.diff().abs().max() < 0.02


def test_missing_and_wrong_references_come_up_as_often_as_said(volumes):
    pairs = augmented_pairs(volumes, wrong_reference_prob=0)
    draws = [SliceDraw(i % 3, 0.5, i) for i in range(600)]
    empty = np.mean([bool((pairs[d]["image"][1] == 0).all()) for d in draws])
    assert empty == pytest.approx(0.05, abs=0.03)


def test_a_function_is_applied_as_often_as_said_and_to_the_named_images_alone():
    change = RandFunctiond("reference", torch.negative, prob=0.3)
    image = torch.rand(1, 3, 4)
    changed = []
    for seed in range(400):
        change.set_random_state(seed=seed)
        made = change({"target": image, "reference": image})
        assert made["target"] is image
        changed.append(made["reference"] is not image)
        assert torch.equal(made["reference"], -image if changed[-1] else image)
    assert np.mean(changed) == pytest.approx(0.3, abs=0.07)


# --- in processes of a data loader


def test_workers_make_the_same_samples_though_they_do_without_meta(volumes):
    """All transforms of the overlay, each of them in some of the draws."""
    slices = augmented_pairs(volumes)
    draws = [SliceDraw(i % 3, (i % 7) / 7, i) for i in range(120)]
    loader = DataLoader(slices, batch_size=8, sampler=draws, num_workers=2)
    assert get_track_meta()
    for i, batch in enumerate(loader):
        for key, made in batch.items():
            assert not isinstance(made, MetaTensor)
            expected = torch.stack([slices[draw][key] for draw in draws[8 * i : 8 * i + 8]])
            # not the same bits: an FFT of one thread, which a worker has, rounds in another way
            assert torch.allclose(made, expected, rtol=0, atol=1e-6), key


def test_a_worker_prepares_volumes_that_are_not_cached(subjects):
    items, folder = subjects
    volumes = volume_dataset(contrast_items(items, folder, "t2", "t1"), ContrastVolume(), cache_rate=0.0)
    slices = augmented_pairs(volumes)
    draws = [SliceDraw(i, 0.5, i) for i in range(3)]
    for draw, found in zip(draws, DataLoader(slices, batch_size=1, sampler=draws, num_workers=1)):
        assert torch.allclose(found["image"][0], slices[draw]["image"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("worker", [False, True])
def test_meta_is_done_without_in_workers_alone_and_comes_back(monkeypatch, volumes, worker):
    monkeypatch.setattr("glmamba_monai.data.dataset.get_worker_info", lambda: object() if worker else None)
    seen = []

    def transform(sample):
        seen.append(get_track_meta())
        raise ValueError("no slice")

    with pytest.raises(RuntimeError, match="applying transform"):
        ContrastPairs(volumes, transform, first_pair=1, wrong_reference=0)[SliceDraw(0, 0.5, 0)]
    assert seen == [not worker] and get_track_meta()


# --- pairs


def numbered(subjects=3, contrasts=3, slices=8, size=(6, 7)):
    """Volumes whose values say what they are: 100 subject + 10 contrast + slice."""
    return Dataset(
        [
            {
                "images": torch.stack(
                    [
                        (100.0 * v + 10 * c + torch.arange(float(slices))).expand(size[0] + v, size[1], -1)
                        for c in range(contrasts)
                    ]
                ),
                "divisors": torch.arange(3.0 * contrasts).reshape(contrasts, 3),
                "pixel_size": 1.0 + v,
            }
            for v in range(subjects)
        ]
    )


def drawn(pairs, volume=1, position=0.5, draws=800):
    """What the samples of many draws consist of: subject, contrast and slice of the target and of the reference."""
    result = []
    for seed in range(draws):
        sample = pairs.sample(SliceDraw(volume, position, seed))
        numbers = [int(sample[key][0, 3, 3]) for key in ("target", "reference")]
        assert sample["target"].shape == sample["reference"].shape
        contrast = numbers[0] // 10 % 10
        assert sample["divisors"].tolist() == [3.0 * contrast, 3.0 * contrast + 1, 3.0 * contrast + 2]
        assert sample["pixel_size"] == 1.0 + volume
        result.append(tuple(divmod(n, 100)[:1] + divmod(n % 100, 10) for n in numbers))
    return result


def test_pairs_are_two_contrasts_of_one_slice():
    found = drawn(ContrastPairs(numbered(), Compose([]), first_pair=0.4, wrong_reference=0))
    assert all(t[0] == r[0] == 1 and t[2] == r[2] == 4 and t[1] != r[1] for t, r in found)
    share = {pair: n / len(found) for pair, n in Counter((t[1], r[1]) for t, r in found).items()}
    assert len(share) == 6 and share.pop((0, 1)) == pytest.approx(0.4 + 0.6 / 6, abs=0.06)
    assert all(value == pytest.approx(0.1, abs=0.04) for value in share.values())


def test_a_wrong_reference_never_shows_the_target():
    found = drawn(ContrastPairs(numbered(), Compose([]), first_pair=0.6, wrong_reference=1))
    assert all((t[0], t[2]) != (r[0], r[2]) for t, r in found)
    assert {r[0] for _, r in found} == {0, 1, 2}
    assert all(r[2] == 4 for _, r in found if r[0] != 1)
    few = drawn(ContrastPairs(numbered(), Compose([]), first_pair=0.6, wrong_reference=0.1))
    assert np.mean([(t[0], t[2]) != (r[0], r[2]) for t, r in few]) == pytest.approx(0.1, abs=0.04)


def test_the_only_subject_serves_as_its_own_wrong_reference():
    pairs = ContrastPairs(numbered(subjects=1), Compose([]), first_pair=0.6, wrong_reference=1)
    found = drawn(pairs, volume=0, draws=100)
    assert all(t[2] != r[2] for t, r in found)


# --- reproducibility


def test_draws_are_reproducible_in_any_order(volumes):
    pairs = augmented_pairs(volumes)
    before = [torch.as_tensor(v["images"]).clone() for v in volumes]
    sampler = SliceSampler(volumes, 40, seed=3)
    expected = {draw: pairs[draw] for draw in sampler}
    np.random.seed(1)
    torch.manual_seed(1)
    fresh = augmented_pairs(volumes)
    for draw in reversed(list(sampler)):
        found = fresh[draw]
        for key, value in expected[draw].items():
            assert not isinstance(value, MetaTensor) and value.shape[1:] == (24, 24)
            assert torch.equal(found[key], value) and torch.isfinite(value).all()
    assert len({value["target"].numpy().tobytes() for value in expected.values()}) == 40
    for v, kept in zip(volumes, before):
        assert torch.equal(torch.as_tensor(v["images"]), kept)


# --- preparation


def test_a_subject_is_prepared_with_all_its_contrasts(subjects, volumes):
    items, _ = subjects
    prepared = volumes[0]
    assert prepared["images"].shape == (4, 48, 40, 8) and prepared["divisors"].shape == (4, 3)
    assert prepared["pixel_size"] == pytest.approx(0.9)
    for channel in torch.as_tensor(prepared["images"]):
        assert np.percentile(channel.double().numpy(), 99.9) == pytest.approx(1, rel=1e-4)
    whole = Compose(configured().get_parsed_content("train#deterministic_transforms"))(items[0])
    assert torch.allclose(torch.as_tensor(prepared["images"][1:2]), whole["reference"].as_tensor())


def test_slices_that_one_contrast_does_not_show_are_left_out(tmp_path, make_brain, make_volume):
    volumes = make_brain(("t1", "t2"), (30, 32, 6))
    volumes["t1"][..., 4:] = 0
    files = [str(make_volume(tmp_path / f"{name}.nii.gz", volumes[name])) for name in ("t2", "t1")]
    item = {"subject": "a", "contrasts": ["t2", "t1"], "files": files, "slice_axis": 2}
    assert ContrastVolume()(item)["images"].shape == (2, 30, 32, 4)
