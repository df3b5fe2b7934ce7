"""The table of wrong references: perturbations by hand, figures against those of an evaluation, and its curves."""

from __future__ import annotations

import csv
import importlib
import importlib.util
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.data import MetaTensor
from scipy.ndimage import gaussian_filter

from glmamba_monai.networks import build_network

ROOT = Path(__file__).parent.parent
CONFIGS = [str(ROOT / "bundle" / "configs" / f"{name}.json") for name in ("train", "evaluate")]
ROWS = [
    "zero-filling",
    "right",
    "of sub01",
    "none (zeros)",
    *(f"shifted by {n}" for n in ("1 pixel", "2 pixels", "4 pixels")),
    *(f"rotated by {n}" for n in ("1 degree", "2 degrees", "5 degrees")),
    "contrast inverted",
    "gamma 1.5",
    "Rician noise of 0.05",
]
COLUMNS = ["reference", "psnr", "ssim", "psnr_over_zero_filling", "ssim_over_zero_filling"]


@pytest.fixture
def safety(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("reference_safety")


@pytest.fixture(scope="module")
def drawing():
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("reference_curves", ROOT / "docs" / "make_reference_curves.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def table(tmp_path):
    """Makes a table of the command: of each reference its PSNR over zero-filling."""

    def make(gains, columns=COLUMNS):
        file = tmp_path / "reference_safety_2.csv"
        rows = [dict(zip(COLUMNS, (name, 30, 0.9, gain, 0.01))) for name, gain in gains.items()]
        with file.open("w", newline="") as text:
            writer = csv.DictWriter(text, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        return str(file)

    return make


def test_a_shift_moves_every_pixel(safety):
    reference = torch.arange(1.0, 2 * 9 * 4 + 1).reshape(1, 9, 4, 2)
    for pixels in (1, 2, 4):
        moved = safety.shifted(reference, pixels)
        assert moved.shape == reference.shape
        assert torch.equal(moved[:, pixels:], reference[:, :-pixels]) and not moved[:, :pixels].any()


def test_a_rotation_turns_every_slice(safety):
    rng = np.random.default_rng(0)
    image = gaussian_filter(rng.random((1, 25, 25, 3)), (0, 2, 2, 0)).astype(np.float32)
    image[:, :4], image[:, -4:], image[:, :, :4], image[:, :, -4:] = 0, 0, 0, 0
    reference = torch.from_numpy(image)
    quarter = safety.rotated(reference, 90)
    assert quarter.dtype == torch.float32
    torch.testing.assert_close(quarter, torch.rot90(reference, 1, (1, 2)), atol=1e-5, rtol=0)
    # A point on the x axis goes the angle that is named, towards y.
    blob = torch.zeros(1, 101, 101, 1)
    blob[0, 88:93, 48:53] = 1
    for degrees in (1, 2, 5):
        turned = safety.rotated(blob, degrees)[0, ..., 0].numpy()
        x, y = ((turned * (np.indices(turned.shape)[i] - 50)).sum() / turned.sum() for i in (0, 1))
        assert np.degrees(np.arctan2(y, x)) == pytest.approx(degrees, abs=0.05)
        assert np.hypot(x, y) == pytest.approx(40, abs=0.05)


def test_another_gamma(safety):
    reference = torch.tensor([-0.1, 0, 0.25, 1, 1.44]).reshape(1, 5, 1, 1)
    found = safety.with_gamma(reference)
    np.testing.assert_allclose(found.flatten().numpy(), [0, 0, 0.125, 1, 1.728], rtol=1e-5)


def test_rician_noise(safety):
    """Magnitude of a complex image: squares grow by twice the variance, and air has Rayleigh's mean."""
    reference = torch.tensor([0, 0.1, 1]).reshape(1, 3, 1, 1).expand(1, 3, 300, 300).contiguous()
    noisy = safety.with_noise(reference)
    assert noisy.dtype == torch.float32 and noisy.shape == reference.shape and noisy.min() >= 0
    assert torch.equal(noisy, safety.with_noise(reference)) and len(noisy[0, 0].unique()) > 10000
    values = noisy[0].flatten(1).double().numpy()
    np.testing.assert_allclose((values**2).mean(axis=1), np.array([0, 0.01, 1]) + 2 * 0.05**2, rtol=0.02)
    assert values[0].mean() == pytest.approx(0.05 * np.sqrt(np.pi / 2), rel=0.02)
    assert values[2].std() == pytest.approx(0.05, rel=0.02)


def test_another_reference_comes_onto_the_grid(safety, tmp_path, make_volume, make_affine):
    """Stored otherwise and of another size: brought into the axis order, padded and cropped about the centre."""
    image = np.random.default_rng(1).random((11, 20, 5)).astype(np.float32)
    image[4, 9, 2] = 900
    file = make_volume(tmp_path / "t1.nii.gz", image, make_affine(codes="RAS", degrees=(0, 0, 0)))
    # The axes of `reference` run to the left, upwards and to the back.
    affine = torch.from_numpy(make_affine(codes="LSP", degrees=(0, 0, 0)))
    reference = MetaTensor(torch.zeros(1, 15, 7, 16), affine=affine)
    found = safety.of_another(str(file), reference)
    expected = np.pad(image[::-1, ::-1].transpose(0, 2, 1), ((2, 2), (1, 1), (0, 0)))[..., 2:-2]
    np.testing.assert_allclose(found[0].numpy(), expected / np.percentile(image, 99.9), rtol=1e-5)


def test_the_other_subject_is_another_patient(safety):
    items = [{"subject": name} for name in ("patient01_study1", "patient01_study2", "patient12_study1")]
    for other, expected in ((None, "patient12_study1"), ("patient01_study2", "patient01_study2")):
        found = safety.find_pair(items, "patient01_study1", other)
        assert [item["subject"] for item in found] == ["patient01_study1", expected]
    with pytest.raises(ValueError, match="subject: there is no subject x, found patient01_study1"):
        safety.find_pair(items, "x", None)
    with pytest.raises(ValueError, match="other: there is no subject of another patient"):
        safety.find_pair(items[:2], "patient01_study1", None)


@pytest.mark.parametrize("scale", [2, 3])
def test_the_right_reference_has_the_figures_of_an_evaluation(safety, tmp_path, make_subject_folder, capsys, scale):
    data, results = str(tmp_path / "data"), tmp_path / "results"
    make_subject_folder(tmp_path / "data", names=["sub00"])
    make_subject_folder(tmp_path / "data", names=["sub01"], shape=(26, 22, 7), seed=4)
    torch.manual_seed(0)
    network = build_network("srcnn_ref")
    torch.nn.init.normal_(network.reconstruction.weight, std=0.05)
    weights = str(tmp_path / "model.pt")
    torch.save(network.state_dict(), weights)
    evaluation = ConfigWorkflow(
        config_file=CONFIGS,
        workflow_type="train",
        logging_file=False,
        dataset_dir=data,
        output_dir=str(results),
        network="srcnn_ref",
        weights=weights,
        evaluate_on="all",
        val_slices=3,
        scale=scale,
    )
    evaluation.initialize()
    evaluation.run()
    with (results / "metrics.csv").open(newline="") as file:
        expected = {row["method"]: row for row in csv.DictReader(file) if row["subject"] == "sub00"}
    capsys.readouterr()

    output = tmp_path / "tables"
    safety.main(weights, data, "sub00", scale, "srcnn_ref", slices=3, batch_size=2, output_dir=str(output))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in lines[2:]}
    assert list(rows) == ROWS
    for name, method in (("zero-filling", "zero_filling"), ("right", "srcnn_ref")):
        assert float(rows[name][0]) == pytest.approx(float(expected[method]["psnr"]), abs=0.006)
        assert float(rows[name][1]) == pytest.approx(float(expected[method]["ssim"]), abs=6e-5)
    for psnr, ssim, over_psnr, over_ssim in rows.values():
        assert float(over_psnr) == pytest.approx(float(psnr) - float(rows["zero-filling"][0]), abs=0.011)
        assert float(over_ssim) == pytest.approx(float(ssim) - float(rows["zero-filling"][1]), abs=2e-4)
    assert all(row != rows["right"] for name, row in rows.items() if name != "right")  # it sees the reference

    assert [file.name for file in output.iterdir()] == [f"reference_safety_{scale}.csv"]
    with (output / f"reference_safety_{scale}.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert list(written[0]) == COLUMNS and [row["reference"] for row in written] == ROWS
    for row in written:
        for column, printed, digits in zip(COLUMNS[1:], rows[row["reference"]], (2, 4, 2, 4)):
            # Both are rounded, one to six digits.
            assert float(row[column]) == pytest.approx(float(printed), abs=0.5 * 10**-digits + 1e-6)


@pytest.mark.parametrize(
    ("scale", "expected", "table"),
    [(2, "model_2x.pt", "reference_safety_2.csv"), ((2, 3), "model.pt", "reference_safety_2_3.csv")],
)
def test_the_factor_names_weights_and_table(
    safety, tmp_path, make_subject_folder, monkeypatch, capsys, scale, expected, table
):
    make_subject_folder(tmp_path / "data", names=["sub00", "sub01"])
    models, files = tmp_path / "bundle" / "models", {}
    models.mkdir(parents=True)
    (tmp_path / "bundle" / "configs").symlink_to(ROOT / "bundle" / "configs")
    for name in ("model.pt", "model_2x.pt"):
        files[name] = build_network("srcnn_ref").state_dict()
        torch.save(files[name], models / name)
    used = []
    monkeypatch.setattr(safety, "BUNDLE", tmp_path / "bundle")
    monkeypatch.setattr(safety, "super_resolve", lambda network, image, *_: used.append(network) or image[:1])
    output = tmp_path / "out"
    safety.main(None, str(tmp_path / "data"), "sub00", scale, "srcnn_ref", slices=1, output_dir=str(output))
    assert f"srcnn_ref ({models / expected})" in capsys.readouterr().out
    assert all(torch.equal(value, files[expected][name]) for name, value in used[0].state_dict().items())
    assert [file.name for file in output.iterdir()] == [table]


def test_a_folder_that_cannot_be_written_is_refused_at_once(safety, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"output folder .*file/out: cannot be written"):
        safety.main(dataset_dir=str(tmp_path / "nowhere"), output_dir=str(tmp_path / "file" / "out"))


def test_what_the_network_gets(safety, tmp_path, make_subject_folder, monkeypatch):
    """The upsampled slices stay; the references are those of the rows, on the slices of the evaluation."""
    files = make_subject_folder(tmp_path / "data", names=["sub00", "sub01"])
    seen = []
    monkeypatch.setattr(safety, "super_resolve", lambda network, image, *_: seen.append(image) or image[:1])
    safety.main(None, str(tmp_path / "data"), "sub00", 2, "zero_filling", slices=3)
    assert len(seen) == len(ROWS) - 1 and all(torch.equal(image[0], seen[0][0]) for image in seen)
    right, other, none, one = (image[1].numpy() for image in seen[:4])
    for found, subject in ((right, "sub00"), (other, "sub01")):
        volume = nib.load(files[subject]["t1"]).get_fdata(dtype=np.float32)
        volume = volume / np.percentile(volume, 99.9)
        kept = [i for i in range(6) if any(np.allclose(found[..., k], volume[..., i], rtol=1e-5) for k in range(3))]
        assert len(kept) == 3
    assert not none.any()
    np.testing.assert_array_equal(one[1:], right[:-1])
    air = np.clip(right / 0.1, 0, 1)
    inverted, gamma, noisy = (image[1].numpy() for image in seen[-3:])
    np.testing.assert_allclose(inverted, air * np.clip(1.1 - right, 0, None), atol=1e-6)
    np.testing.assert_allclose(gamma, np.clip(right, 0, None) ** 1.5, atol=1e-6)
    np.testing.assert_array_equal(noisy, safety.with_noise(seen[0][1:])[0].numpy())
    assert 0 < np.abs(noisy - right).mean() < 0.1


GAINS = {
    "zero-filling": 0,
    "right": 5.5,
    "of sub01": 3.7,
    "none (zeros)": 3.8,
    "shifted by 1 pixel": 4.5,
    "shifted by 2 pixels": 4.2,
    "shifted by 4 pixels": 3.9,
    "rotated by 1 degree": 5,
    "rotated by 2 degrees": 4.4,
    "rotated by 5 degrees": -0.5,
    "gamma 1.5": 5.2,
}


def test_the_figure_of_the_curves(drawing, table, tmp_path, capsys):
    first = Path(table(GAINS)).rename(tmp_path / "first.csv")
    tables = {"2x": str(first), "4x, light": table({name: gain / 2 for name, gain in GAINS.items()})}
    file = tmp_path / "figures" / "curves.png"
    drawing.main(tables, str(file))
    assert capsys.readouterr().out.split() == [str(file)]
    assert list(file.parent.iterdir()) == [file] and file.stat().st_size < 100_000
    assert file.read_bytes().startswith(b"\x89PNG")

    figure = drawing.make_figure({label: drawing.read_curves(name) for label, name in tables.items()})
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        *("2x", "2x, no reference", "4x, light", "4x, light, no reference"),
        "zero-filling",
    ]
    panels = figure.axes
    assert panels[0].get_ylim() == panels[1].get_ylim() and panels[0].get_ylabel() == "PSNR over zero-filling (dB)"
    for axes, steps, ys in zip(panels, ([0, 1, 2, 4], [0, 1, 2, 5]), ([5.5, 4.5, 4.2, 3.9], [5.5, 5, 4.4, -0.5])):
        curve, none, curve_2, none_2, zero = axes.get_lines()
        assert list(axes.get_xticks()) == list(curve.get_xdata()) == steps
        np.testing.assert_allclose([*curve.get_ydata(), *curve_2.get_ydata()], [*ys, *(y / 2 for y in ys)])
        assert set(none.get_ydata()) == {3.8} and set(none_2.get_ydata()) == {1.9} and set(zero.get_ydata()) == {0}
        assert none.get_linestyle() == none_2.get_linestyle() == "--" and curve.get_marker() not in ("", "None")
        assert curve.get_color() == none.get_color() != curve_2.get_color() == none_2.get_color()


def test_tables_that_cannot_be_drawn(drawing, table, tmp_path):
    figure = tmp_path / "curves.png"
    with pytest.raises(FileNotFoundError, match=r"gone\.csv: there is no such file, expected a reference_safety_"):
        drawing.main({"2x": str(tmp_path / "gone.csv")}, str(figure))
    with pytest.raises(ValueError, match=r"safety_2\.csv: has the columns reference, psnr, expected .*psnr_over"):
        drawing.main({"2x": table(GAINS, COLUMNS[:2])}, str(figure))
    for name, expected in (
        ("right", "right"),
        ("none (zeros)", r"none \(zeros\)"),
        ("shifted", r"shifted by \.\.\."),
        ("rotated", r"rotated by \.\.\."),
    ):
        kept = {key: gain for key, gain in GAINS.items() if not key.startswith(name)}
        with pytest.raises(ValueError, match=rf"safety_2\.csv: expected a row {expected}"):
            drawing.main({"2x": table(kept)}, str(figure))
    with pytest.raises(ValueError, match=r"safety_2\.csv: expected numbers in psnr_over_zero_filling .*abc"):
        drawing.main({"2x": table({**GAINS, "right": "abc"})}, str(figure))
    with pytest.raises(ValueError, match=r"tables: expected .*label.*, found"):
        drawing.main("reference_safety_2.csv", str(figure))
    assert not figure.exists()
