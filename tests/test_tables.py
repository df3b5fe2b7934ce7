"""The paper's tables: statistics against closed forms, what is run and what is not run again, one real run."""

import csv
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.bundle import ConfigParser

from glmamba_monai.networks import NETWORKS

FOLDER = Path(__file__).parent.parent / "benchmarks"
# Seconds instead of hours.
SHORT = {
    "epochs": 2,
    "iterations_per_epoch": 2,
    "batch_size": 2,
    "crop_size": 16,
    "warmup_steps": 1,
    "val_interval": 1,
    "val_slices": 2,
}


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    threads, tf32 = torch.get_num_threads(), (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    yield importlib.import_module("tables")
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32


@pytest.fixture
def runs(tables):
    return importlib.import_module("runs")


@pytest.fixture
def comparison(tables):
    return importlib.import_module("comparison")


@pytest.fixture
def published(tables):
    return importlib.import_module("published")


@pytest.fixture
def dataset_dir(tmp_path, make_subject_folder):
    make_subject_folder(tmp_path / "data", names=["sub00", "sub01", "sub02_study1", "sub02_study2"])
    return str(tmp_path / "data")


def cells(text):
    """The rows of all Markdown tables, by their first cell."""
    rows = [[c.strip() for c in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def rows_of(method, values, fold="split", seed=0, **more):
    return [
        {"fold": fold, "subject": f"s{i}", "method": method, "seed": seed, "psnr": v, "ssim": v / 100, **more}
        for i, v in enumerate(values)
    ]


# --- what stands in the file


def test_all_rows_of_table_1_are_there_with_rates_and_published_numbers(runs, published):
    assert list(published.TABLE1) == [name for name in NETWORKS.names if name.startswith("table1_")]
    trained = {name for name in NETWORKS.names if runs.has_parameters(name)}
    assert trained == runs.LEARNING_RATES.keys()
    assert {len(row) for row in published.TABLE2.values()} == {4}
    for ours, theirs in published.PUBLISHED_AS.items():
        assert ours in NETWORKS.names and theirs in published.TABLE2


# --- statistics


def test_names_and_variants_of_methods(comparison):
    assert comparison.split_method("srcnn_ref + dc") == ("srcnn_ref", " + dc")
    assert comparison.split_method("srcnn + dc") == ("srcnn", " + dc")
    assert comparison.split_method("glmamba_light") == ("glmamba_light", "")
    assert comparison.split_method("dc of glmamba") == ("glmamba", "dc of ")
    assert comparison.split_method("nothing known") == ("", "nothing known")


def test_means_and_deviations(comparison):
    assert comparison.mean_sd([1.0, 2.0, 4.5], 2) == "2.50 ± 1.80"  # sum of squares 6.5, n - 1 = 2
    assert comparison.mean_sd([0.98765], 4) == "0.9877"
    rows = rows_of("a", [1.0, 2.0]) + rows_of("a", [3.0, 6.0], seed=1) + rows_of("b", [9.0])
    assert comparison.unit_means(rows, "a") == {("split", "s0", ""): 2.0, ("split", "s1", ""): 4.0}
    assert comparison.unit_means(rows, "a", "ssim")["split", "s1", ""] == pytest.approx(0.04)
    # Means of the seeds are 1.5 and 4.5: sqrt(2 * 1.5**2).
    assert comparison.seed_sd(rows, "a") == pytest.approx(math.sqrt(4.5))
    assert comparison.seed_sd(rows, "b") is None
    # What one seed has not reached yet does not count: 1 and 3 are left.
    assert comparison.seed_sd(rows[:3] + rows[4:], "a") == pytest.approx(math.sqrt(2))
    assert comparison.seed_sd(rows[:2] + rows_of("a", [1.0], fold="other", seed=1), "a") is None


def test_subjects_are_tested_where_there_are_enough(tables, comparison):
    """All of n differences positive: two of 2**n signs are as extreme."""
    for n in (5, 6, 8):
        better = [30 + 0.1 * i * i for i in range(1, n + 1)]
        rows = rows_of("a", better) + rows_of("b", [30.0] * n)
        found = comparison.compare(rows, [], "a", "b")
        assert not found.over_slices and found.p == pytest.approx(2 / 2**n)
        assert found.difference == pytest.approx(statistics.fmean(better) - 30)
    assert str(found) == "+2.55 (p = 0.008)"
    assert "smallest that 8 subjects can give is 0.0078" in tables.note_on_test(rows)


def test_slices_are_tested_and_said_to_be_where_subjects_are_few(tables, comparison):
    """Three differences: t has two degrees of freedom, and p is 1 - t / sqrt(2 + t^2)."""
    differences = [0.2, 0.5, 1.1]
    subjects = rows_of("a", [31.0, 32.0]) + rows_of("b", [30.0, 30.5])
    slices = rows_of("a", [30 + d for d in differences]) + rows_of("b", [30.0] * 3)
    found = comparison.compare(subjects, slices, "a", "b")
    t = np.mean(differences) / (np.std(differences, ddof=1) / math.sqrt(3))
    assert found.over_slices and found.difference == pytest.approx(1.25)
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert str(found) == f"+1.25 (p = {found.p:.3f}, slices)"
    assert "not independent" in tables.note_on_test(subjects)
    assert str(comparison.Comparison(0.3, 1e-9, True)) == "+0.30 (p < 0.001, slices)"


def test_pairs_are_of_the_same_subject_slice_and_fold(comparison):
    slices = [
        {"fold": fold, "subject": "s", "slice": i, "method": m, "seed": seed, "psnr": value + seed, "ssim": 0.9}
        for m, values in (("a", {("x", "0"): 5.0, ("x", "1"): 7.0, ("y", "0"): 1.0}), ("b", {("x", "0"): 4.0}))
        for (fold, i), value in values.items()
        for seed in (0, 2)
    ]
    assert comparison.differences(slices, "a", "b") == [1.0]
    assert comparison.compare(slices[:2], [], "a", "b") is None


@pytest.mark.parametrize("n", [2, 6])
def test_methods_that_are_equal_have_no_p(tables, n, comparison):
    rows = rows_of("a", [30.0] * n) + rows_of("b", [30.0] * n)
    assert str(comparison.compare(rows, rows, "a", "b")) == "+0.00"


# --- tables


def result_rows():
    """Three methods, each with its variant; 'srcnn' is the best."""
    rows = []
    for seed in (0, 1):
        for method, base in (("srcnn", 33.0), ("glmamba", 32.0), ("zero_filling", 30.0)):
            shift = 0.0 if method == "zero_filling" else 0.5 * seed
            rows += rows_of(method, [base + shift, base + 1 + shift], seed=seed)
            rows += rows_of(f"{method} + dc", [base + 0.4, base + 1.4], seed=seed)
    return rows


def test_rows_stand_from_worst_to_best_one_variant_after_the_other(tables):
    plain = ["zero_filling", "glmamba", "srcnn"]
    expected = plain + [f"{m} + dc" for m in plain]
    assert tables.ordered(result_rows(), None) == expected
    order = ["srcnn", "zero_filling", "glmamba"]
    assert tables.ordered(result_rows(), order) == order + [f"{m} + dc" for m in order]


def test_table_of_results(tables):
    rows = result_rows()
    trainings = {"srcnn": ("0.001", "17"), "glmamba": ("0.0008", "192")}
    found = cells(tables.results_table(rows, [], None, trainings, {"A": {"glmamba": "42.58 / .9912"}}))
    assert found["method"] == [
        "subjects",
        "PSNR (dB)",
        "SSIM",
        "over zero-filling (dB)",
        "over the row above (dB)",
        "SD over seeds (dB)",
        "learning rate",
        "training (s)",
        "published, another protocol: A",
    ]
    nothing = tables.NOTHING
    assert found["zero_filling"] == ["2", "30.50 ± 0.71", "0.3050 ± 0.0071", "+0.00", *[nothing] * 5]
    assert found["glmamba"][:4] == ["2", "32.75 ± 0.71", "0.3275 ± 0.0071", "+2.25"]
    assert found["glmamba"][4:] == ["+2.25", "0.354", "0.0008", "192", "42.58 / .9912"]
    assert found["glmamba + dc"][3] == "+2.40" and found["glmamba + dc"][-1] == nothing
    assert found["zero_filling + dc"][4] == nothing  # the row above is of the other variant
    one_seed = [row for row in rows if row["seed"] == 0]
    assert "SD over seeds (dB)" not in cells(tables.results_table(one_seed, [], None, trainings, {}))["method"]


def test_table_of_subjects(tables):
    rows = rows_of("zero_filling", [30.0, 31.0]) + rows_of("srcnn", [32.5], fold="s0")
    rows[0]["fold"] = "s0"
    found = cells(tables.subjects_table(rows, None))
    assert found["s0"] == ["30.00 / 0.3000 (+0.00)", "32.50 / 0.3250 (+2.50)"]
    assert found["s1"] == ["31.00 / 0.3100 (+0.00)", tables.NOTHING]


def test_curve_and_its_picture(tables, tmp_path, monkeypatch):
    (tmp_path / "runs" / "something else").mkdir(parents=True)
    assert "nothing has been trained" in tables.write_curve(tmp_path)
    for name, scale in (("srcnn", 2), ("srcnn", 4), ("srcnn_ref", 2)):
        run = {"network": name, "scale": scale, "fold": "split", "seed": 0}
        history = [
            {"epoch": e, "iteration": 5 * e, "seconds": 1.5 * e, "val_psnr": 30.0 + e, "zero_filling_psnr": 29.0}
            for e in (1, 2)
        ]
        record = {"run": run, "settings": {"learning_rate": 1e-3}, "history": history if scale == 2 else None}
        folder = tmp_path / "runs" / f"{name}_{scale}"
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps(record))
    assert "curve.png" in tables.write_curve(tmp_path)
    rows = read_csv(tmp_path / "curve.csv")
    assert [(r["network"], r["scale"], r["epoch"], r["seconds"]) for r in rows] == [
        (name, "2", str(e), f"{1.5 * e:.6f}") for name in ("srcnn", "srcnn_ref") for e in (1, 2)
    ]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "curve.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "matplotlib is not installed" in tables.write_curve(tmp_path)
    assert not (tmp_path / "curve.png").exists()


NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_CUDA)])


@DEVICES
def test_table_of_costs(tables, tmp_path, capsys, monkeypatch, device):
    timed, medians = {}, tables.Stopwatch.medians
    monkeypatch.setattr(tables.Stopwatch, "medians", lambda self, calls: timed.update(calls) or medians(self, calls))
    networks = "srcnn,bicubic,srcnn_ref"  # an interpolation has its row already
    tables.table4(str(tmp_path), networks, size=16, batch=2, seconds=0, threads=1, device=device)
    text = (tmp_path / "table4.md").read_text()
    assert text == capsys.readouterr().out
    found = cells(text)
    assert len({len(row) for row in found.values()}) == 1
    steps, published = ["zero_filling", "bicubic", "+ data consistency"], ["MINet", "WavTrans", "SANet"]
    expected = [*steps[:2], "srcnn", "srcnn_ref", steps[2], *(f"{name} (published)" for name in published)]
    assert [name for name in found if name not in ("method", "---")] == expected
    # 9x9 to 64 channels, 5x5 to 32, 5x5 to 1, with biases.
    assert found["srcnn"][0] == found["srcnn"][3].split(" / ")[0] == f"{(5248 + 51232 + 801) / 1e6:.3f}"
    assert all(float(cell) > 0 for cell in found["srcnn_ref"][5 :: 1 if device == "cuda" else 2])
    assert found["SANet (published)"][4] == "7.187 / 404.7"
    nothing = tables.NOTHING
    for name in steps:
        assert found[name][:5] == ["0", *[nothing] * 4] and float(found[name][5]) > 0
        assert float(found[name][6]) > 0 if device == "cuda" else found[name][6] == nothing
        assert set(found[name][7:]) <= {nothing}  # there is no bf16 of them
        image = timed[name]()
        assert image.shape == (1, 16, 16, 2) and image.device.type == device


@DEVICES
def test_what_is_timed_beside_the_networks_is_what_the_configs_do(tables, make_brain, device, runs):
    def transforms(config, name, kind, **options):
        """The transforms of one class in a list of a config, built as the bundle builds them."""
        parser = ConfigParser()
        parser.read_config(str(runs.CONFIGS / f"{config}.json"))
        parser.update(options)
        return [made for made in parser.get_parsed_content(name) if type(made).__name__ == kind]

    target = torch.from_numpy(make_brain()["t2"][None]).to(device)
    steps = tables.steps_beside_networks(target)
    item = {"target": target, "reference": target}
    for transform in (
        *transforms("train", "train#deterministic_transforms", "KSpaceLowResolutiond", scale=2),
        *transforms("train", "validate#interpolations", "KSpaceUpsampled"),
    ):
        item = transform(item)
    options = {"data_consistency": True, "output_dir": None}
    (make_consistent,) = transforms("inference", "postprocessing#transforms", "KSpaceDataConsistencyd", **options)
    consistent = make_consistent({**item, "pred": item["bicubic"]})["pred"]
    assert not torch.allclose(consistent, item["bicubic"], rtol=0.01)  # there was something to do
    expected = {"zero_filling": item["zero_filling"], "bicubic": item["bicubic"], "+ data consistency": consistent}
    assert list(steps) == list(expected)
    for name, image in expected.items():
        assert torch.equal(steps[name](), image) and image.device == target.device


# --- slices


def test_every_slice_has_its_row_and_their_mean_is_the_subjects(tmp_path, make_brain, runs):
    rng = np.random.default_rng(0)
    metric = runs.SliceMetrics(str(tmp_path / "slices.csv"), network="net")
    for seed in range(2):
        target = torch.from_numpy(make_brain(seed=seed)["t2"][None])
        noisy = {
            name: target + torch.from_numpy(rng.normal(0, sd, target.shape).astype(np.float32))
            for name, sd in (("zero_filling", 30), ("bicubic", 40), ("net", 10))
        }
        item = {
            "subject": f"s{seed}",
            "target": target,
            "data_range": torch.tensor(1200.0),
            "foreground_level": torch.tensor(50.0),
        }
        item.update(zero_filling=noisy["zero_filling"], bicubic=noisy["bicubic"])
        metric.update((item, {"pred": noisy["net"]}))
    engine = Engine(lambda engine, _: None)
    metric.completed(engine, "val_psnr")
    assert engine.state.metrics["val_psnr"] == pytest.approx(metric.compute())
    slices = read_csv(tmp_path / "slices.csv")
    assert len(metric.rows) == 6 and len(slices) == 6 * 6
    for row in metric.rows:
        own = [s for s in slices if (s["subject"], s["method"]) == (row["subject"], row["method"])]
        assert [s["slice"] for s in own] == [str(i) for i in range(6)]
        for name in ("psnr", "ssim"):
            values = [float(s[name]) for s in own]
            assert np.mean(values) == pytest.approx(row[name], rel=1e-5) and np.std(values) > 0
    metric.reset()
    assert metric.slice_rows == []


# --- what is run


class FakeBundle:
    """In place of the bundle: keeps what it was asked for, writes what it would write; may be told to fail."""

    def __init__(self, runs, monkeypatch):
        self.runs = runs
        self.calls = []
        self.configs = []
        self.environments = []
        self.failing = {}
        self.meeting = None
        monkeypatch.setattr(runs, "run_bundle", self)

    def __call__(self, run_id, configs, options, log, place):
        self.calls.append((run_id, options))
        self.configs.append([config.stem for config in configs])
        self.environments.append(place.environment)
        if self.meeting is not None:  # all runs at the same time, or none
            self.meeting.wait(timeout=30)
        if run_id in self.failing:
            raise self.failing[run_id]
        folder = Path(options["output_dir"])
        if run_id == "training":
            point = {"epoch": 2, "iteration": 4, "seconds": 3.0, "val_psnr": 31.0, "zero_filling_psnr": 30.0}
            torch.save({"history": [point]}, folder / "checkpoint.pt")
            return
        rows = [
            {"subject": "s", "method": method, "slice": i, "psnr": psnr + i * psnr / 99, "ssim": 0.9}
            for method, psnr in {"zero_filling": 30.0, "bicubic": 29.0, options["network"]: 31.0}.items()
            for i in range(2)
        ]
        self.runs.write_csv(folder / "metrics.csv", rows[::2], ["subject", "method", "psnr", "ssim"])
        self.runs.write_csv(folder / "slices.csv", rows, ["subject", "method", "slice", "psnr", "ssim"])
        (folder / "summary.json").write_text("{}")

    def made(self):
        """Calls since the last time."""
        calls, self.calls = self.calls, []
        return [(run_id, Path(options["output_dir"]).name) for run_id, options in calls]


@pytest.fixture
def bundle(runs, monkeypatch):
    return FakeBundle(runs, monkeypatch)


@pytest.fixture
def arguments(tmp_path, dataset_dir):
    return {"dataset_dir": dataset_dir, "output_dir": str(tmp_path / "out"), "scales": 2, "folds": "sub01", **SHORT}


def test_folds(dataset_dir, tmp_path, runs):
    def held_out(folds=None, data=dataset_dir, **options):
        return runs.Protocol(data, str(tmp_path / "out"), folds, options=options).held_out

    both = ["sub02_study1", "sub02_study2"]
    assert held_out("all") == {"sub00": ["sub00"], "sub01": ["sub01"], "sub02": both}
    assert held_out(["sub01", "sub02_study2"]) == {"sub01": ["sub01"], "sub02_study2": both}  # never half a patient
    assert held_out("sub01,sub00") == held_out(("sub01", "sub00")) == {"sub01": ["sub01"], "sub00": ["sub00"]}
    assert held_out("sub00+sub01,sub02") == {"sub00+sub01": ["sub00", "sub01"], "sub02": both}
    assert held_out(validation=["sub01", "sub02"]) == {"split": ["sub01", *both]}
    assert len(held_out()["split"]) in (1, 2)
    with pytest.raises(ValueError, match="validation names sub7; the subjects are sub00"):
        held_out("sub7")
    with pytest.raises(ValueError, match="validation names sub7; the subjects are sub00"):
        held_out("sub00+sub7")

    pair = {"t2": "data/sub00/t2.nii.gz", "t1": "data/sub00/t1.nii.gz"}
    sections = {"training": [pair], "validation": [{k: v.replace("00", "01") for k, v in pair.items()}]}
    datalist = tmp_path / "datalist.json"
    datalist.write_text(json.dumps(sections))
    assert held_out(data=str(datalist)) == {"split": None}
    with pytest.raises(ValueError, match="has a split of its own; leave --folds out"):
        held_out("all", data=str(datalist))


def test_arguments_that_would_be_lost_are_refused(tables, bundle, arguments):
    for name in ("epoch", "network", "seed", "learning_rate", "train_slices"):
        with pytest.raises(ValueError, match=f"--{name}: is no argument"):
            tables.table2(**arguments, **{name: 1})
    with pytest.raises(ValueError, match="network 'srcn' is unknown"):
        tables.table2(**arguments, learning_rates={"srcn": 1e-3})
    with pytest.raises(ValueError, match="network 'srcn' is unknown"):
        tables.table2(**arguments, networks="srcn")
    assert bundle.calls == []


def test_a_network_without_a_rate_is_refused_before_anything_runs(tables, runs, bundle, arguments, monkeypatch):
    monkeypatch.delitem(runs.LEARNING_RATES, "srcnn_ref")
    with pytest.raises(ValueError, match=r"'srcnn_ref' has no learning rate here; name one: --learning_rates"):
        tables.table2(**arguments, networks="srcnn,srcnn_ref")
    assert bundle.calls == []


def test_every_row_is_trained_alike_at_its_own_rate(tables, runs, bundle, arguments):
    rates = {"srcnn_ref": 2e-3}
    tables.table2(**arguments, networks=("srcnn", "srcnn_ref"), learning_rates=rates, device="cpu")
    options = {(run_id, o["network"]): dict(o) for run_id, o in bundle.calls}
    assert list(options) == [(r, n) for n in ("srcnn", "srcnn_ref") for r in ("training", "evaluating")]
    for network, rate in (("srcnn", runs.LEARNING_RATES["srcnn"]), ("srcnn_ref", 2e-3)):
        training, evaluation = options["training", network], options["evaluating", network]
        assert training["learning_rate"] == rate and training["resume"] is True
        assert training["device"] == "$torch.device('cpu')" and training["validation"] == ["sub01"]
        # All slices, the last weights; not those that did best on the subjects of the table.
        assert "val_slices" in training and "val_slices" not in evaluation
        assert evaluation["weights"] == str(Path(evaluation["output_dir"]) / "checkpoint.pt")
        assert evaluation["output_dir"] == training["output_dir"] and evaluation["scale"] == 2
    own = ("network", "output_dir", "learning_rate")
    alike = [{k: v for k, v in o.items() if k not in own} for (r, _), o in options.items() if r == "training"]
    assert alike[0] == alike[1] and SHORT.items() <= alike[0].items()


def test_overlays_are_of_the_trainings_alone_and_part_of_the_protocol(tables, bundle, arguments, capsys):
    more = {"networks": "srcnn", "overlays": "train_general,train_contrasts"}
    tables.table2(**arguments, **more)
    assert bundle.configs == [["train", "train_general", "train_contrasts"], ["train", "evaluate"]]
    text = (Path(arguments["output_dir"]) / "table2.md").read_text()
    assert "Every network: train + train_general + train_contrasts; 2 x 2 steps" in text
    with pytest.raises(SystemExit):
        tables.table2(**arguments, **{**more, "overlays": "train_general"})
    assert "holds a run with another overlays" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"overlays='train_genera': there is no .*train_genera\.json"):
        tables.table2(**arguments, **{**more, "overlays": "train_genera"})


def test_an_option_of_an_overlay_alone_is_no_option_of_the_evaluation(tables, bundle, arguments):
    own = {
        "kspace_noise_prob": 0.5,
        "average#decay": 0.99,
        "train#slices#first_pair": 0.9,
        "validation_scales": [2, 3],
        "val_batch_size": 2,
    }
    tables.table2(
        **arguments, networks="srcnn", overlays="train_general", **own, **{"train#augmentation#keys": "image"}
    )
    training, evaluation = (options for _, options in bundle.calls)
    assert own.items() <= training.items()
    assert not {"kspace_noise_prob", "average#decay", "validation_scales"} & evaluation.keys()
    assert evaluation["val_batch_size"] == 2
    assert evaluation["train#augmentation#keys"] == "image"  # train.json has it, too


def test_order_of_the_runs(dataset_dir, tmp_path, runs):
    protocol = runs.Protocol(dataset_dir, str(tmp_path / "out"), ["sub00", "sub01"])
    planned = runs.plan(protocol, ["zero_filling", "srcnn", "glmamba"], [2, 4], [0, 1])
    assert len(planned) == 2 * 2 * 2 * 2 and {run.network for run in planned} == {"srcnn", "glmamba"}
    assert [run.folder for run in planned[:3]] == [
        "srcnn_2x_sub00_seed0",
        "glmamba_2x_sub00_seed0",
        "srcnn_4x_sub00_seed0",
    ]
    assert [run.seed for run in planned] == [0] * 8 + [1] * 8
    interpolations = runs.plan(protocol, ["zero_filling", "bicubic"], [2], [0, 1])
    assert [(run.network, run.fold, run.seed) for run in interpolations] == [
        (name, fold, 0) for fold in ("sub00", "sub01") for name in ("zero_filling", "bicubic")
    ]
    assert runs.Run("srcnn", 2, "a b/c", 0).folder == "srcnn_2x_a_b_c_seed0"


def test_an_interpolation_is_evaluated_alone(tables, bundle, arguments, capsys):
    tables.table2(**arguments, networks="bicubic")
    ((run_id, options),) = bundle.calls
    assert run_id == "evaluating" and "weights" not in options
    assert "bicubic" in cells(capsys.readouterr().out)


def test_what_is_finished_is_not_repeated_and_what_was_stopped_goes_on(tables, bundle, arguments, capsys):
    srcnn, ref = "srcnn_2x_sub01_seed0", "srcnn_ref_2x_sub01_seed0"
    arguments["networks"] = "srcnn,srcnn_ref"
    bundle.failing = {"training": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        tables.table2(**arguments)
    assert bundle.made() == [("training", srcnn)]
    bundle.failing = {"evaluating": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        tables.table2(**arguments)
    assert bundle.made() == [("training", srcnn), ("evaluating", srcnn)]
    bundle.failing = {}
    tables.table2(**arguments)
    assert bundle.made() == [("evaluating", srcnn), ("training", ref), ("evaluating", ref)]
    first = capsys.readouterr().out
    # On another machine, with the data elsewhere: nothing is left to do.
    tables.table2(**{**arguments, "cache_dir": "elsewhere"}, device="cpu")
    second = capsys.readouterr().out
    assert bundle.made() == [] and second.count("was there already") == 2
    assert first[first.index("# Table") :] == second[second.index("# Table") :]
    # A seed more: only that.
    tables.table2(**arguments, seeds=(0, 1))
    assert {folder for _, folder in bundle.made()} == {"srcnn_2x_sub01_seed1", "srcnn_ref_2x_sub01_seed1"}
    assert "SD over seeds (dB)" in cells(capsys.readouterr().out)["method"]


def test_results_of_another_protocol_are_not_mixed_in(tables, bundle, arguments, capsys):
    arguments["networks"] = "srcnn"
    tables.table2(**arguments)
    bundle.made()
    for change, names in (
        ({"epochs": 3}, "epochs"),
        ({"learning_rates": {"srcnn": 5e-4}}, "learning_rate"),
        ({"target": "t1", "reference": "t2"}, "reference, target"),
        ({"amp": True}, "amp"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit, match="1 of 1 runs failed"):
            tables.table2(**{**arguments, **change})
        text = capsys.readouterr().out
        assert f"holds a run with another {names}; remove that folder or use another output_dir" in text
        assert "srcnn" not in cells(text[text.index("# Table") : text.index("## What")])
    assert bundle.calls == []


def test_table_1_in_the_papers_order(tables, bundle, arguments, published):
    del arguments["scales"]
    tables.table1(**arguments, seeds=(0, 1))
    text = (Path(arguments["output_dir"]) / "table1.md").read_text()
    head, *rows = [[c.strip() for c in line.strip("|").split(" | ")] for line in text.splitlines() if "| " in line]
    assert [row[0] for row in rows[1:]] == ["zero_filling", "bicubic", *published.TABLE1]
    assert dict(zip(head, rows[-2]))["published, another protocol: BraTS2021"] == "42.58 / .9912"
    assert dict(zip(head, rows[-1]))["published, another protocol: BraTS2021"] == "–"  # ours
    assert len(bundle.calls) == 2 * 2 * 8


# --- side by side


@pytest.mark.parametrize(
    ("visible", "gpus", "expected"),
    [
        (None, 3, ["0", "1", "2", "0"]),
        ("5, 2", 2, ["5", "2", "5", "2"]),
        ("", 0, [None] * 4),
        (None, 0, [None] * 4),
    ],
)
def test_jobs_are_spread_over_the_visible_gpus(monkeypatch, visible, gpus, expected, runs):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = runs.places(4, "cuda", threading.Event())
    assert [place.environment.get("CUDA_VISIBLE_DEVICES") for place in found] == expected
    assert {place.environment["OMP_NUM_THREADS"] for place in found} == {"2"}
    (alone,) = runs.places(1, "$torch.device('cuda:1')", threading.Event())
    assert alone.environment == {}  # as ever
    with pytest.raises(ValueError, match="with several jobs each gets its GPU"):
        runs.places(2, "$torch.device('cuda:1')", threading.Event())


@pytest.mark.parametrize("jobs", [0, -1, 1.5, True, "2"])
def test_jobs_that_cannot_be_are_refused(tables, bundle, arguments, jobs):
    with pytest.raises(ValueError, match="expected a number of at least 1"):
        tables.table2(**arguments, networks="srcnn", jobs=jobs)
    assert bundle.calls == []


def test_runs_side_by_side_give_the_same_table(tables, bundle, arguments, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    arguments.update(networks="srcnn,srcnn_ref", seeds=(0, 1))
    one = Path(arguments["output_dir"])
    tables.table2(**arguments)
    assert bundle.environments == [{}] * 8
    capsys.readouterr()
    bundle.environments.clear()
    several = one.with_name("several")
    bundle.meeting = threading.Barrier(4)
    tables.table2(**{**arguments, "output_dir": str(several)}, jobs=4)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert sorted(lines) == sorted(set(lines)) and len(lines) == 8
    for number in range(1, 5):  # every run begins once and ends once, in this order, each in one line
        begin, end = (line for line in lines if line.startswith(f"[{number}/4] "))
        assert ": running, log in " in begin and ": 31.00 dB, +1.00, " in end
    assert (several / "table2.md").read_text() == (one / "table2.md").read_text()
    assert (several / "curve.csv").read_text() == (one / "curve.csv").read_text()
    used = [environment["CUDA_VISIBLE_DEVICES"] for environment in bundle.environments]
    assert sorted(used) == ["0"] * 4 + ["1"] * 4


def test_a_failure_among_runs_side_by_side_is_kept_with_its_run(tables, runs, bundle, arguments, capsys):
    def fail_one(run_id, configs, options, log, place):
        if options["network"] == "srcnn":
            raise RuntimeError("training ended with 1: no luck")
        bundle(run_id, configs, options, log, place)

    runs.run_bundle = fail_one  # the fixture `bundle` puts the real one back
    with pytest.raises(SystemExit, match="2 of 4 runs failed"):
        tables.table2(**arguments, networks="srcnn,srcnn_ref", seeds=(0, 1), jobs=3)
    printed = capsys.readouterr().out
    text = (Path(arguments["output_dir"]) / "table2.md").read_text()
    for seed in (0, 1):
        assert f"srcnn 2x, sub01, seed {seed}: FAILED: training ended with 1: no luck" in printed
        assert f"- srcnn 2x, sub01, seed {seed}: training ended with 1: no luck" in text
        assert f"srcnn_ref 2x, sub01, seed {seed}: 31.00 dB" in printed
    assert "srcnn_ref" in cells(text[: text.index("Missing")]) and "srcnn" not in cells(text[: text.index("Missing")])


def test_a_run_named_twice_is_performed_once(tables, bundle, arguments):
    tables.table2(**arguments, networks="srcnn,srcnn", seeds=(0, 0), jobs=2)
    assert bundle.made() == [(run_id, "srcnn_2x_sub01_seed0") for run_id in ("training", "evaluating")]


def test_nothing_begins_after_an_interruption(tables, bundle, arguments):
    bundle.failing = {"training": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        tables.table2(**arguments, networks="srcnn", seeds=tuple(range(20)), jobs=2)
    assert 1 <= len(bundle.made()) <= 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no signals there")
@pytest.mark.parametrize("jobs", [1, 2])
def test_the_end_of_the_command_ends_its_runs(arguments, tmp_path, jobs):
    """Real processes: SIGTERM, as a batch system sends it to the command alone."""
    fake = tmp_path / "fake" / "monai"
    fake.mkdir(parents=True)
    (fake / "__init__.py").touch()
    # In place of `python -m monai.bundle` of the runs, not of the command: it says who it is and does not end.
    (fake / "bundle.py").write_text(
        f"import os, pathlib, time\npathlib.Path({str(tmp_path)!r}, f'{{os.getpid()}}.pid').touch()\ntime.sleep(600)\n"
    )
    code = (
        "import signal, sys\n"
        "import runs\n"
        "import tables\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"runs.FOLDER = __import__('pathlib').Path({str(fake.parent)!r})\n"
        f"tables.table2(**{arguments!r}, networks='srcnn', seeds=(0, 1, 2), jobs={jobs})\n"
    )
    path = os.pathsep.join([str(FOLDER), str(FOLDER.parent)])
    with (tmp_path / "printed.txt").open("w") as printed:
        environment = {**os.environ, "PYTHONPATH": path}
        command = subprocess.Popen([sys.executable, "-c", code], stdout=printed, stderr=printed, env=environment)
    try:
        deadline = time.monotonic() + 120
        while len(children := [int(file.stem) for file in tmp_path.glob("*.pid")]) < jobs:
            assert time.monotonic() < deadline and command.poll() is None, (tmp_path / "printed.txt").read_text()
            time.sleep(0.05)
        command.terminate()
        assert command.wait(timeout=60) == 143
        for child in children:
            with pytest.raises(ProcessLookupError):
                os.kill(child, 0)
        assert [int(file.stem) for file in tmp_path.glob("*.pid")] == children  # none began meanwhile
        printed = (tmp_path / "printed.txt").read_text()
        assert printed.count("running, log in") == jobs and "FAILED" not in printed
    finally:
        command.kill()
        command.wait()


@pytest.mark.slow
def test_a_real_run_a_failing_one_and_the_same_again(tables, runs, arguments, capsys, monkeypatch):
    arguments.update(networks="srcnn_ref,srcnn", learning_rates={"srcnn_ref": 1e30}, device="cpu")
    with pytest.raises(SystemExit, match="1 of 2 runs failed; the same command tries them again"):
        tables.table2(**arguments)
    printed = capsys.readouterr().out
    out = Path(arguments["output_dir"])
    failed, srcnn = (out / "runs" / f"{name}_2x_sub01_seed0" for name in ("srcnn_ref", "srcnn"))
    assert "srcnn_ref 2x, sub01, seed 0: FAILED: training ended with 1: ValueError: the loss is " in printed
    assert "lower --learning_rate" in printed and str(failed / "log.txt") in printed

    text = (out / "table2.md").read_text()
    assert text in printed and "- srcnn_ref 2x, sub01, seed 0: training ended with 1" in text
    found = cells(text[text.index("## 2x") : text.index("Missing")])
    metrics = {row["method"]: row for row in read_csv(srcnn / "metrics.csv")}
    assert found.keys() - {"method", "---"} == metrics.keys() >= {"zero_filling", "bicubic", "srcnn"}
    for method, row in metrics.items():
        assert found[method][:3] == ["1", f"{float(row['psnr']):.2f}", f"{float(row['ssim']):.4f}"]
        slices = [float(s["psnr"]) for s in read_csv(srcnn / "slices.csv") if s["method"] == method]
        assert len(slices) == int(row["slices"]) > 1
        assert np.mean(slices) == pytest.approx(float(row["psnr"]), abs=1e-3)
    gain = float(metrics["srcnn"]["psnr"]) - float(metrics["zero_filling"]["psnr"])
    assert found["srcnn"][3] == f"{gain:+.2f}" and found["srcnn"][-2:] == ["37.88 / .9794", "29.23 / .8649"]

    history = torch.load(srcnn / "checkpoint.pt", weights_only=True)["history"]
    curve = read_csv(out / "curve.csv")
    assert [(row["network"], int(row["epoch"])) for row in curve] == [("srcnn", 1), ("srcnn", 2)]
    for row, point in zip(curve, history):
        for name in ("seconds", "val_psnr", "zero_filling_psnr"):
            assert float(row[name]) == pytest.approx(point[name], abs=1e-6)
    assert json.loads((srcnn / "summary.json").read_text())["weights"] == str(srcnn / "checkpoint.pt")

    # Again: only what has failed is tried.
    bundle = FakeBundle(runs, monkeypatch)
    before = {path: path.stat().st_mtime_ns for path in srcnn.rglob("*") if path.is_file()}
    tables.table2(**arguments)
    assert bundle.made() == [(run_id, failed.name) for run_id in ("training", "evaluating")]
    assert before == {path: path.stat().st_mtime_ns for path in srcnn.rglob("*") if path.is_file()}
    assert "Missing" not in (out / "table2.md").read_text()
