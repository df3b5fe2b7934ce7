"""Metrics of subjects against scikit-image, statistics against numpy, and result files read back."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from glmamba_monai.engines import ResultsWriter, SubjectMetrics, prepare_batch, super_resolved
from glmamba_monai.engines.evaluation import format_table, over_subjects, summarise, write_results
from glmamba_monai.metrics import CONVENTIONS, slice_metrics
from glmamba_monai.transforms import ForegroundLeveld, KSpaceDataConsistency, KSpaceLowResolution

TRAIN = Path(__file__).parent.parent / "bundle" / "configs" / "train.json"
SHAPE = (24, 28, 6)
BORDER = 5  # of a Gaussian window of 11 pixels


def evaluation_item(make_brain, seed=0, slices=slice(None), meta=False):
    """What an evaluator sees of a subject, and the arrays behind it; "whole" is the target before selection."""
    whole = make_brain(seed=seed)["t2"][None]
    target = whole[..., slices].copy()
    rng = np.random.default_rng(seed)
    arrays = {
        "target": target,
        "zero_filling": gaussian_filter(target, (0, 1.0, 1.0, 0)),
        "bicubic": gaussian_filter(target, (0, 1.3, 1.3, 0)),
        "pred": target + rng.normal(0, 20, target.shape).astype(np.float32),
        "whole": whole,
    }
    tensors = {
        k: MetaTensor(v, affine=np.diag([2.0, 2, 3, 1])) if meta else torch.from_numpy(v) for k, v in arrays.items()
    }
    item = {"subject": f"sub{seed:02d}", **{k: tensors[k] for k in ("target", "zero_filling", "bicubic")}}
    # As decollated from a data loader: numbers have become tensors.
    item["data_range"] = torch.tensor(float(whole.max()), dtype=torch.float64)
    item.update({"foreground_level": torch.tensor(0.05 * float(np.percentile(whole, 99.9)), dtype=torch.float64)})
    return item, {"pred": tensors["pred"]}, arrays


def expected_row(volume, target, whole):
    """Means over slices, by scikit-image, in float64."""
    volume, target, whole = (np.abs(a[0]).astype(np.float64) for a in (volume, target, whole))
    data_range, level = whole.max(), 0.05 * np.percentile(whole, 99.9)
    values = {name: [] for name in CONVENTIONS}
    gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    for i in range(target.shape[-1]):
        sr, hr = volume[..., i], target[..., i]
        mask = hr > level
        inner = (slice(BORDER, -BORDER),) * 2
        _, similarity = structural_similarity(sr, hr, data_range=data_range, full=True, **gaussian)
        _, similarity_slice = structural_similarity(sr, hr, data_range=hr.max(), full=True, **gaussian)
        values["psnr"].append(peak_signal_noise_ratio(hr, sr, data_range=data_range))
        values["ssim"].append(similarity[inner].mean())
        values["psnr_slice_range"].append(peak_signal_noise_ratio(hr, sr, data_range=hr.max()))
        values["ssim_slice_range"].append(similarity_slice[inner].mean())
        values["psnr_foreground"].append(peak_signal_noise_ratio(hr[mask], sr[mask], data_range=data_range))
        values["ssim_foreground"].append(similarity[inner][mask[inner]].mean())
        values["ssim_uniform7"].append(
            structural_similarity(sr, hr, data_range=data_range, win_size=7, use_sample_covariance=False)
        )
    return {name: np.mean(v) for name, v in values.items()}


# --- rows


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("slices", [slice(None), slice(1, 4)])
def test_rows_equal_scikit_image(make_brain, meta, slices):
    metric = SubjectMetrics("net")
    arrays = {}
    for seed in range(2):
        item, output, arrays[f"sub{seed:02d}"] = evaluation_item(make_brain, seed, slices, meta)
        metric.update((item, output))
    assert [(r["subject"], r["method"]) for r in metric.rows] == [
        (f"sub{seed:02d}", method) for seed in range(2) for method in ("zero_filling", "bicubic", "net")
    ]
    for row in metric.rows:
        found = arrays[row["subject"]]
        volume = found["pred" if row["method"] == "net" else row["method"]]
        assert row["slices"] == found["target"].shape[-1]
        assert list(row) == ["subject", "method", "slices", *CONVENTIONS]
        for name, value in expected_row(volume, found["target"], found["whole"]).items():
            assert type(row[name]) is float
            assert row[name] == pytest.approx(value, abs=2e-3 if name.startswith("psnr") else 2e-5), name


def test_the_value_is_the_mean_psnr_over_subjects(make_brain):
    metric = SubjectMetrics("net")
    for seed, slices in enumerate((slice(None), slice(2, 4), slice(0, 5))):
        metric.update(evaluation_item(make_brain, seed, slices)[:2])
    psnr = [row["psnr"] for row in metric.rows if row["method"] == "net"]
    assert metric.compute() == pytest.approx(np.mean(psnr))  # a subject counts once, however many slices it has
    metric.reset()
    assert metric.rows == []


def test_what_no_training_changes_is_computed_once(make_brain, monkeypatch):
    computed = []

    def counted(slices, *args):
        computed.append(slices)
        return slice_metrics(slices, *args)

    monkeypatch.setattr("glmamba_monai.engines.evaluation.slice_metrics", counted)
    metric, degrade = SubjectMetrics("net"), KSpaceLowResolution(2)
    rows = []
    for gain in (1, 1.01):  # validations of one training
        metric.reset()
        for seed in range(2):
            item, output, _ = evaluation_item(make_brain, seed, slice(1, 4))
            item["low_resolution"] = degrade(item["target"])
            metric.update((item, {"pred": gain * output["pred"]}))
        rows.append(metric.rows)
    assert len(computed) == 2 * 6 + 2 * 2  # each with what was measured; then the network alone
    for before, after in zip(*rows, strict=True):
        assert (before == after) == (not before["method"].startswith("net"))
        assert (before["subject"], before["method"]) == (after["subject"], after["method"])

    # Another volume, or another factor, under the same name.
    for other in ({"data_range": 2 * item["data_range"]}, {"low_resolution": KSpaceLowResolution(3)(item["target"])}):
        metric.reset()
        metric.update(({**item, **other}, output))
        consistent = [row["psnr"] for row in metric.rows if row["method"] == "bicubic + dc"]
        assert consistent != [row["psnr"] for row in rows[1][6:] if row["method"] == "bicubic + dc"]
    assert len(computed) == 16 + 2 * 6


@pytest.mark.parametrize("meta", [False, True])
def test_what_was_measured_gives_each_method_a_second_row(make_brain, meta):
    degrade = KSpaceLowResolution(2)
    metric = SubjectMetrics("net")
    for seed in range(2):
        item, output, arrays = evaluation_item(make_brain, seed, slice(1, 4), meta)
        item["low_resolution"] = degrade(item["target"])
        assert isinstance(item["low_resolution"], MetaTensor) == meta
        metric.update((item, output))
    methods = ["zero_filling", "bicubic", "net"]
    assert [row["method"] for row in metric.rows] == 2 * (methods + [f"{m} + dc" for m in methods])
    for row in metric.rows[6:]:  # of the last subject
        method = row["method"].removesuffix(" + dc")
        volume = arrays["pred" if method == "net" else method]
        if method != row["method"]:
            volume = KSpaceDataConsistency()(volume, item["low_resolution"]).numpy()
        for name, value in expected_row(volume, arrays["target"], arrays["whole"]).items():
            assert row[name] == pytest.approx(value, abs=2e-3 if name.startswith("psnr") else 2e-5), name
    plain = [row["psnr"] for row in metric.rows if row["method"] == "net"]
    consistent = [row["psnr"] for row in metric.rows if row["method"] == "net + dc"]
    assert metric.compute() == pytest.approx(np.mean(plain))  # the key metric is that of the network alone
    assert min(np.abs(np.subtract(consistent, plain))) > 0.1

    engine = Engine(lambda engine, _: None)
    engine.state.metrics = {}
    metric.completed(engine, "val_psnr")
    found = engine.state.metrics
    assert found["val_psnr"] == pytest.approx(np.mean(plain))
    assert found["val_dc_psnr"] == pytest.approx(np.mean(consistent))
    assert {"zero_filling_psnr", "zero_filling_dc_psnr", "bicubic_dc_ssim"} <= found.keys()
    assert all(re.fullmatch(r"\w+", name) for name in found)


@pytest.mark.parametrize("name", ["zero_filling", "bicubic"])
def test_a_network_named_like_a_baseline_has_one_row(make_brain, name):
    metric = SubjectMetrics(name)
    item, output, arrays = evaluation_item(make_brain)
    metric.update((item, output))
    assert [row["method"] for row in metric.rows] == ["zero_filling", "bicubic"]
    (row,) = [row for row in metric.rows if row["method"] == name]
    expected = expected_row(arrays["pred"], arrays["target"], arrays["whole"])
    assert row["psnr"] == pytest.approx(expected["psnr"], abs=2e-3)  # of what the network gave


def test_the_foreground_does_not_depend_on_the_slices_selected(make_brain):
    """Dim slices among bright ones: their mask comes from the level of the whole volume."""
    item, output, _ = evaluation_item(make_brain)
    dim = torch.tensor([1.0, 1, 1, 0.12, 0.12, 0.12])
    item = {**item, **{k: item[k] * dim for k in ("target", "zero_filling", "bicubic")}}
    output = {"pred": output["pred"] * dim}
    level = ForegroundLeveld("target", "level")(item)["level"]
    item["foreground_level"], item["data_range"] = level, float(item["target"].max())

    def rows(selected):
        metric = SubjectMetrics("net")
        cut = {k: item[k][..., selected] for k in ("target", "zero_filling", "bicubic")}
        metric.update(({**item, **cut}, {"pred": output["pred"][..., selected]}))
        return metric.rows

    together, alone = rows([0, 1, 2, 3, 4, 5]), [rows([i]) for i in range(6)]
    for method in range(3):
        for name in CONVENTIONS:
            mean = np.mean([row[method][name] for row in alone])
            assert together[method][name] == pytest.approx(mean, rel=1e-5), name


def test_the_config_measures_the_whole_volume(tmp_path, make_subject_folder):
    """train.json, whose validation keeps two slices here: range and foreground level are those of the volume."""
    files = make_subject_folder(tmp_path, n=1)["sub00"]
    parser = ConfigParser()
    parser.read_config(str(TRAIN))
    parser.update({"network": "zero_filling", "val_slices": 2, "scale": 2})
    preprocess = parser.get_parsed_content("validate#preprocessing")
    item = preprocess({"subject": "sub00", "target": str(files["t2"]), "reference": str(files["t1"])})
    assert item["target"].shape == (1, 24, 28, 2)
    parser = ConfigParser()
    parser.read_config(str(TRAIN))
    parser.update({"network": "zero_filling", "val_slices": None, "scale": 2})
    before = parser.get_parsed_content("train#deterministic_transforms")
    whole = {"subject": "sub00", "target": str(files["t2"]), "reference": str(files["t1"])}
    for transform in before:
        whole = transform(whole)
    volume = np.asarray(whole["target"])
    assert item["data_range"] == pytest.approx(float(volume.max()))
    assert item["foreground_level"] == pytest.approx(0.05 * float(np.percentile(volume, 99.9)))
    assert type(item["foreground_level"]) is float


def test_a_slice_without_foreground_does_not_count(make_brain):
    item, output, arrays = evaluation_item(make_brain)
    for volume in (item["target"], item["zero_filling"], item["bicubic"], output["pred"]):
        volume[..., 5] *= 1e-3  # of which nothing is above the level
    metric = SubjectMetrics("net")
    metric.update((item, output))
    for row in metric.rows:
        volume = arrays["pred" if row["method"] == "net" else row["method"]]
        expected = expected_row(volume[..., :5], arrays["target"][..., :5], arrays["whole"])
        assert row["psnr_foreground"] == pytest.approx(expected["psnr_foreground"], abs=2e-3)
        assert row["ssim_foreground"] == pytest.approx(expected["ssim_foreground"], abs=2e-5)
        assert all(math.isfinite(row[name]) for name in CONVENTIONS)


def test_foreground_metrics_of_a_slice_without_foreground_do_not_exist():
    sr, hr = torch.rand(2, 1, 16, 16), torch.rand(2, 1, 16, 16)
    mask = torch.ones(2, 1, 16, 16, dtype=torch.bool)
    mask[0] = False
    mask[1, :, 6:10, 6:10] = False
    found = slice_metrics(sr, hr, 1.0, mask)
    for name, values in found.items():
        assert values.isnan().tolist() == [name.endswith("foreground"), False], name
    mask[0, :, 0, 0] = True  # in the border, where SSIM has no value
    found = slice_metrics(sr, hr, 1.0, mask)
    assert found["psnr_foreground"].isfinite().all() and found["ssim_foreground"].isnan().tolist() == [True, False]


# --- statistics


def make_rows(psnr, **changes):
    """Rows of made-up numbers: ``{method: [PSNR of each subject]}``, the other metrics derived from it."""
    return [
        {
            "subject": f"sub{i:02d}",
            "method": method,
            "slices": 4,
            **{name: value + k for k, name in enumerate(CONVENTIONS)},
            **changes,
        }
        for method, values in psnr.items()
        for i, value in enumerate(values)
    ]


def test_summary_equals_numpy():
    rng = np.random.default_rng(0)
    psnr = {"zero_filling": rng.normal(30, 3, 7), "net": rng.normal(35, 2, 7)}
    summary = summarise(make_rows(psnr))
    assert list(summary) == ["zero_filling", "net"]
    for method, values in psnr.items():
        assert list(summary[method]) == list(CONVENTIONS)
        for k, found in enumerate(summary[method].values()):
            assert found["mean"] == pytest.approx(np.mean(values + k), rel=1e-12)
            assert found["sd"] == pytest.approx(np.std(values + k, ddof=1), rel=1e-9)
            assert found["subjects"] == 7


def test_a_single_subject_has_no_spread():
    summary = summarise(make_rows({"net": [31.5]}))
    assert summary["net"]["psnr"] == {"mean": 31.5, "sd": 0.0, "subjects": 1}


def test_a_metric_that_a_subject_lacks_is_averaged_over_the_others():
    rows = make_rows({"net": [30.0, 32.0, 37.0]})
    rows[1]["psnr_foreground"] = math.nan
    found = summarise(rows)["net"]
    values = [rows[i]["psnr_foreground"] for i in (0, 2)]
    assert found["psnr_foreground"] == pytest.approx(
        {"mean": np.mean(values), "sd": np.std(values, ddof=1), "subjects": 2}
    )
    assert found["psnr"]["subjects"] == 3


def test_the_table_goes_from_worst_to_best():
    rows = make_rows({"zero_filling": [30.0, 32.0], "net": [36.5, 34.5], "bicubic": [28.0, 29.0]})
    lines = format_table(rows, "A title").splitlines()
    assert lines[0] == "A title" and lines[1] == ""
    assert [line.split("|")[1].strip() for line in lines[4:]] == ["bicubic", "zero_filling", "net"]
    assert lines[4].split("|")[2].strip() == "28.50 ± 0.71" and lines[4].split("|")[4].strip() == "-2.50"
    assert lines[5].split("|")[4].strip() == "+0.00" and lines[6].split("|")[4].strip() == "+4.50"
    assert lines[6].split("|")[3].strip() == "36.5000 ± 1.4142"
    assert len({line.count("|") for line in lines[2:]}) == 1


def test_one_subject_has_no_spread():
    one, two = (make_rows({"zero_filling": values, "net": values}) for values in ([30.0], [30.0, 32.0]))
    assert format_table(one, "").splitlines()[-1].split("|")[2].strip() == "30.00"
    assert (over_subjects(one), over_subjects(two, "patients")) == ("", ", mean ± SD over patients")


# --- files


DESCRIPTION = {"network": "net", "scale": [2, 3], "weights": None}


def read_back(folder):
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return rows, json.loads((folder / "summary.json").read_text(encoding="utf-8"), parse_constant=refuse)


def test_results_read_back_as_they_were(tmp_path):
    rng = np.random.default_rng(1)
    rows = make_rows({"zero_filling": rng.normal(30, 3, 3), "net": rng.normal(35, 2, 3)})
    rows[0]["subject"] = 'odd, "name" µ'
    write_results(rows, tmp_path / "new" / "folder", DESCRIPTION)
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["metrics.csv", "summary.json"]
    found, summary = read_back(tmp_path / "new" / "folder")
    assert len(found) == len(rows)
    for row, expected in zip(found, rows):
        assert list(row) == list(expected)
        assert (row["subject"], row["method"], row["slices"]) == (expected["subject"], expected["method"], "4")
        for name in CONVENTIONS:
            assert float(row[name]) == pytest.approx(expected[name], abs=1e-6)
    assert {k: summary[k] for k in DESCRIPTION} == DESCRIPTION
    assert summary["conventions"] == CONVENTIONS
    assert summary["methods"] == summarise(rows)


def test_infinite_and_missing_values_stay_readable(tmp_path, make_brain):
    """A result equal to the target has an infinite PSNR."""
    metric = SubjectMetrics("net")
    for seed in range(2):
        item, _, _ = evaluation_item(make_brain, seed)
        metric.update((item, {"pred": item["target"].clone()}))
    metric.rows[0]["ssim_foreground"] = math.nan
    assert metric.compute() == math.inf
    write_results(metric.rows, tmp_path, DESCRIPTION)
    rows, summary = read_back(tmp_path)
    assert [float(row["psnr"]) for row in rows if row["method"] == "net"] == [math.inf, math.inf]
    assert [row["psnr"] for row in rows if row["method"] == "net"] == ["inf", "inf"]
    assert rows[0]["ssim_foreground"] == "nan"
    methods = summary["methods"]
    assert methods["net"]["psnr"] == {"mean": None, "sd": None, "subjects": 2}
    assert methods["net"]["ssim"]["mean"] == pytest.approx(1.0)
    assert methods["zero_filling"]["ssim_foreground"]["subjects"] == 1
    assert methods["zero_filling"]["psnr"]["mean"] == pytest.approx(np.mean([metric.rows[i]["psnr"] for i in (0, 3)]))
    assert format_table(metric.rows, "t").splitlines()[-1].startswith("| net | inf ")


@pytest.mark.parametrize("failing", ["metrics.csv", "summary.json"])
def test_results_are_written_whole_or_not_at_all(tmp_path, monkeypatch, failing):
    write_results(make_rows({"zero_filling": [1.0]}), tmp_path, DESCRIPTION)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    write_text = Path.write_text

    def fill(path, text, **options):
        if path.name.endswith(failing):
            write_text(path, text[: len(text) // 2], **options)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_text(path, text, **options)

    monkeypatch.setattr(Path, "write_text", fill)
    with pytest.raises(OSError, match=rf"{failing}: cannot be written .*No space left"):
        write_results(make_rows({"zero_filling": [2.0]}), tmp_path, DESCRIPTION)
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert after.keys() == before.keys() and after[failing] == before[failing]


# --- as handlers of an engine


def test_an_evaluation_writes_and_shows_its_results(tmp_path, make_brain, capsys):
    metric = SubjectMetrics("net")
    items = [evaluation_item(make_brain, seed)[:2] for seed in range(3)]

    def step(engine, index):
        engine.state.batch = [items[index][0]]  # as MONAI's evaluator leaves them: lists of decollated items
        return [items[index][1]]

    engine = Engine(step)
    metric.attach(engine, "val_psnr")
    ResultsWriter(metric, tmp_path, DESCRIPTION).attach(engine)
    for _ in range(2):  # a second run starts anew
        engine.run(range(3))
    rows, summary = read_back(tmp_path)
    assert len(rows) == 9
    expected = {m: [float(r["psnr"]) for r in rows if r["method"] == m] for m in ("zero_filling", "bicubic", "net")}
    metrics = engine.state.metrics
    assert metrics["val_psnr"] == pytest.approx(np.mean(expected["net"]), abs=1e-5)
    assert metrics["zero_filling_psnr"] == pytest.approx(np.mean(expected["zero_filling"]), abs=1e-5)
    assert metrics["bicubic_ssim"] == pytest.approx(summary["methods"]["bicubic"]["ssim"]["mean"])
    assert summary["methods"]["net"]["psnr"]["sd"] == pytest.approx(np.std(expected["net"], ddof=1), abs=1e-5)
    printed = capsys.readouterr().out
    assert "Evaluation of 3 subjects, mean" in printed and str(tmp_path / "metrics.csv") in printed
    assert f"scale {DESCRIPTION['scale']}" in printed
    assert not (tmp_path / "unfinished-metrics.csv").exists()


def test_an_evaluation_that_fails_keeps_what_it_has_and_what_there_was(tmp_path, make_brain):
    metric = SubjectMetrics("net")
    items = [evaluation_item(make_brain, seed)[:2] for seed in range(3)]
    broken = []

    def step(engine, index):
        if index in broken:
            raise OSError("a damaged file")
        engine.state.batch = [items[index][0]]
        return [items[index][1]]

    engine = Engine(step)
    metric.attach(engine, "val_psnr")
    ResultsWriter(metric, tmp_path, DESCRIPTION).attach(engine)
    engine.run(range(3))
    complete = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    broken.append(2)
    with pytest.raises(OSError, match="a damaged file"):
        engine.run(range(3))
    assert {name: (tmp_path / name).read_bytes() for name in complete} == complete
    lines = complete["metrics.csv"].decode().splitlines(keepends=True)
    assert (tmp_path / "unfinished-metrics.csv").read_text() == "".join(lines[: 1 + 2 * 3])


@pytest.mark.parametrize("spatial", [(8, 9), (8, 9, 3)])
def test_batches_for_the_network(spatial):
    """Target and reference, in the order in which the network returns them."""
    batch = {"image": torch.rand(2, 2, *spatial), "target": torch.rand(2, 1, *spatial)}
    image, label = prepare_batch(batch, device="cpu", dtype=torch.float64)
    assert image.dtype == label.dtype == torch.float64 and label.shape == image.shape
    assert torch.equal(image.float(), batch["image"])
    assert torch.equal(label[:, :1].float(), batch["target"]) and torch.equal(label[:, 1], image[:, 1])
    assert torch.equal(super_resolved(batch["image"][0]), batch["image"][0, :1])
