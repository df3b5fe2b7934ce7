"""The downstream experiment: the segmenter's training, the chain of two evaluators, its metrics and tables."""

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.bundle import ConfigWorkflow
from monai.engines import SupervisedEvaluator
from monai.metrics import DiceMetric
from PIL import Image
from scipy import stats
from scipy.ndimage import binary_erosion, distance_transform_edt
from torch.utils._python_dispatch import TorchDispatchMode

from glmamba_monai.data import LabelledSlices, SliceDraw, labelled_items, split_folder
from glmamba_monai.dice import format_dice, interval, merged_rows, read_rows, summarise_dice
from glmamba_monai.engines import MethodVolumes, SelfEnsembleInferer, SliceDice, mask_of, prepare_mask_batch
from glmamba_monai.engines.downstream import mask_metrics
from glmamba_monai.errors import root_cause
from glmamba_monai.experiments import require_held_out, segmentation_evaluator, trained_network, trained_segmenter
from glmamba_monai.files import write_checkpoint, write_json
from glmamba_monai.networks import build_network
from glmamba_monai.networks.segmentation import SliceSwinUNETR
from glmamba_monai.pictures import PREDICTION_COLOUR, TRUTH_COLOUR
from glmamba_monai.transforms import LargeComponents, LoadLabeld, ScaleByMedian

BUNDLE = Path(__file__).resolve().parent.parent / "bundle"
TRAIN, SEGMENTATION, DOWNSTREAM = (
    str(BUNDLE / "configs" / f"{name}.json") for name in ("train", "segmentation_train", "downstream")
)
PAIR = {"target": "t1", "reference": "t2", "device": "$torch.device('cpu')"}
SHORT = {"epochs": 2, "iterations_per_epoch": 2, "batch_size": 2, "warmup_steps": 1, "val_interval": 2}


@pytest.fixture
def dataset_dir(tmp_path, make_subject_folder):
    """Four subjects whose label is what is bright in T1; the last has none."""
    written = make_subject_folder(tmp_path / "data", n=4, contrasts=("t1", "t2", "seg"), seed=3)
    written["sub03"]["seg"].unlink()
    return str(tmp_path / "data")


def run(files, **overrides):
    made = ConfigWorkflow(files, workflow_type="train", logging_file=False, **{**PAIR, **overrides})
    made.initialize()
    made.run()
    made.finalize()
    return made


# --- The chain, with a segmenter that needs no training ---


class Bright(torch.nn.Module):
    """A segmenter: what is brighter than the label's border."""

    def forward(self, x):
        return x - 1.3


@pytest.fixture
def chain(dataset_dir, tmp_path):
    """Runs the chain with what an SR network returns being made of the truth by ``change``; returns Dice by method."""

    def made(change, network="srcnn", scale=2, output_dir=tmp_path / "out", **overrides):
        volumes = MethodVolumes(network)
        segmenter = SupervisedEvaluator(
            device=torch.device("cpu"),
            val_data_loader=volumes,
            network=Bright(),
            prepare_batch=prepare_mask_batch,
            inferer=SelfEnsembleInferer(self_ensemble=True, spatial_dim=2, roi_size=[-1, -1], sw_batch_size=4),
            postprocessing=lambda data: {**data, "pred": mask_of(data["pred"])},
        )
        weights = tmp_path / f"{network}.pt"
        write_checkpoint(weights, build_network(network).state_dict())
        (tmp_path / "segmenter.pt").write_bytes(b"the chain takes its hash")
        run(
            [TRAIN, DOWNSTREAM],
            **{
                "dataset_dir": dataset_dir,
                "output_dir": str(output_dir),
                "network": network,
                "scale": scale,
                "evaluate_on": "all",
                "weights": str(weights),
                "segmentation_weights": str(tmp_path / "segmenter.pt"),
                "volumes": volumes,
                "segmentation_evaluator": segmenter,
                "validate#evaluator#postprocessing": lambda data: {**data, "pred": change(data["label"][:1])},
                **overrides,
            },
        )
        rows = read_rows(output_dir / "dice.csv")
        return {
            name: [row["dice"] for row in rows if row["method"] == name] for name in {row["method"] for row in rows}
        }

    return made


def test_identity_noise_and_mirror(chain, caplog):
    """The truth as result gives the Dice of the originals exactly; noise lowers it; a mirrored result is caught."""
    with caplog.at_level(logging.WARNING):
        identity = chain(lambda truth: truth)
    assert identity["srcnn"] == identity["original"] and min(identity["original"]) > 0.8
    assert len(identity["original"]) == 3 and "subject sub03 has no label (seg): left out" in caplog.text
    assert np.mean(identity["zero_filling"]) < np.mean(identity["original"]) - 0.01

    torch.manual_seed(0)
    noisy = chain(lambda truth: truth + 0.2 * torch.randn(truth.shape))
    assert noisy["original"] == identity["original"]
    assert all(a < b - 0.02 for a, b in zip(noisy["srcnn"], identity["srcnn"]))

    mirrored = chain(lambda truth: truth.flip(1))
    assert all(a < b - 0.3 for a, b in zip(mirrored["srcnn"], identity["srcnn"]))


def test_results_of_networks_and_factors_stand_in_one_table(chain, tmp_path, capsys):
    chain(lambda truth: truth)
    chain(lambda truth: truth + 0.1, network="srcnn_ref")
    chain(lambda truth: truth, scale=4)
    out = tmp_path / "out"
    rows = read_rows(out / "dice.csv")
    assert {(row["scale"], row["method"]) for row in rows} == {
        *((scale, name) for scale in ("2x", "4x") for name in ("original", "zero_filling", "bicubic", "srcnn")),
        ("2x", "srcnn_ref"),
    }
    assert len(rows) == 3 * 9
    summary = json.loads((out / "dice_summary.json").read_text())
    assert summary["scales"]["2x"]["srcnn"]["difference"]["mean"] == 0 and summary["target"] == "t1"
    assert "| srcnn_ref |" in capsys.readouterr().out

    picture = np.asarray(Image.open(out / "pictures" / "sub00_srcnn_2x.png"))
    assert (picture == TRUTH_COLOUR).all(-1).any() or (picture == PREDICTION_COLOUR).all(-1).any()

    # Of another segmenter: the old rows do not belong with the new ones.
    text = (out / "dice.csv").read_text()
    (out / "dice.csv").write_text(text.replace(rows[0]["segmenter"], "another"))
    chain(lambda truth: truth)
    assert read_rows(out / "previous-dice.csv")[0]["segmenter"] == "another"  # left out, not lost
    assert {(row["scale"], row["method"]) for row in read_rows(out / "dice.csv")} == {
        ("2x", name) for name in ("original", "zero_filling", "bicubic", "srcnn")
    }


def fail_at(number, chain, change=lambda truth: truth, **options):
    """Run the chain, which fails at one of the subjects."""
    calls = iter(range(1, number + 1))

    def changed(truth):
        if next(calls) == number:
            raise ValueError("a bad subject")
        return change(truth)

    with pytest.raises(RuntimeError) as raised:
        chain(changed, **options)
    assert str(root_cause(raised.value)) == "a bad subject"


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def test_a_run_that_fails_leaves_the_subjects_before(chain, tmp_path):
    """In a file of their own: what a complete run has written stays as it is until the next one is complete."""
    out, methods = tmp_path / "out", ["original", "zero_filling", "bicubic", "srcnn"]
    fail_at(2, chain)
    assert contents(out).keys() == {"unfinished-dice_srcnn_2x.csv"}
    rows = read_rows(out / "unfinished-dice_srcnn_2x.csv")
    assert [(row["subject"], row["method"]) for row in rows] == [("sub00", m) for m in methods]
    whole = chain(lambda truth: truth)
    assert len(whole["srcnn"]) == 3
    assert contents(out).keys() == {"dice.csv", "dice_summary.json"}

    before = contents(out)
    fail_at(3, chain, lambda truth: truth.flip(1))
    assert contents(out).items() > before.items()
    rows = read_rows(out / "unfinished-dice_srcnn_2x.csv")
    assert [(row["subject"], row["method"]) for row in rows] == [(f"sub0{i}", m) for i in (0, 1) for m in methods]
    assert rows[3]["dice"] < whole["srcnn"][0] - 0.3
    assert chain(lambda truth: truth.flip(1))["srcnn"][0] == rows[3]["dice"]
    assert contents(out).keys() == before.keys()  # made anew with the same subjects: nothing to set aside


def test_rows_of_another_segmenter_stay_until_the_end(chain, tmp_path):
    out = tmp_path / "out"
    chain(lambda truth: truth)
    ours = read_rows(out / "dice.csv")[0]["segmenter"]
    others = []
    for name in ("first", "second"):  # what is left out gathers
        others.append((out / "dice.csv").read_text().replace(ours, name))
        (out / "dice.csv").write_text(others[-1])
        fail_at(2, chain)
        assert (out / "dice.csv").read_text() == others[-1]
        assert len(read_rows(out / "unfinished-dice_srcnn_2x.csv")) == 4
        chain(lambda truth: truth)
        assert {row["segmenter"] for row in read_rows(out / "dice.csv")} == {ours}
    assert contents(out).keys() == {"dice.csv", "dice_summary.json", "previous-dice.csv"}
    assert [row["segmenter"] for row in read_rows(out / "previous-dice.csv")] == ["first"] * 12 + ["second"] * 12


def test_what_is_no_table_is_refused_before_the_first_subject(chain, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "dice.csv").write_text("a,b\n1,2\n")
    with pytest.raises(RuntimeError) as raised:
        chain(lambda truth: pytest.fail("a subject was begun"))
    assert "dice.csv: has the columns" in str(root_cause(raised.value))


def test_a_picture_stays_in_its_folder(dataset_dir, tmp_path, chain):
    """Whatever a datalist calls its subjects."""
    items = [
        {"subject": name, **{key: f"{dataset_dir}/sub0{i}/{key}.nii.gz" for key in ("t1", "t2", "seg")}}
        for i, name in enumerate(["site1/01", "../x"])
    ]
    datalist = write_json(tmp_path / "list.json", {"training": items})
    assert len(chain(lambda truth: truth, dataset_dir=str(datalist))["original"]) == 2
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png")}
    assert found == {"pictures/site1_01_srcnn_2x.png", "pictures/.._x_srcnn_2x.png"}
    assert {row["subject"] for row in read_rows(tmp_path / "out" / "dice.csv")} == {"site1/01", "../x"}


# --- Metrics and tables ---


def test_dice_and_distance_against_their_definitions():
    random = np.random.RandomState(0)
    spacing = (0.9, 1.1, 3.0)
    true, predicted = np.zeros((2, 20, 24, 8), bool)
    true[4:12, 5:15, 2:6] = True
    predicted[6:15, 4:14, 1:5] = True
    predicted ^= random.rand(*true.shape) > 0.995
    found = mask_metrics(*(torch.from_numpy(m[None].astype(np.float32)) for m in (predicted, true)), spacing)

    assert found["dice"] == pytest.approx(2 * (true & predicted).sum() / (true.sum() + predicted.sum()), rel=1e-6)
    edges = [m & ~binary_erosion(m) for m in (predicted, true)]
    away = [distance_transform_edt(~e, sampling=spacing) for e in edges]
    expected = max(np.percentile(away[1][edges[0]], 95), np.percentile(away[0][edges[1]], 95))
    assert found["hd95_mm"] == pytest.approx(expected, rel=1e-5)
    assert found["true_ml"] == pytest.approx(true.sum() * 0.9 * 1.1 * 3 / 1000)


def test_empty_masks():
    some, none = torch.zeros(2, 1, 6, 6, 4)
    some[:, 2:4, 2:4, 1:3] = 1
    missed = mask_metrics(none, some, (1, 1, 1))
    assert missed["dice"] == 0 and math.isnan(missed["hd95_mm"])
    assert math.isnan(mask_metrics(some, none, (1, 1, 1))["dice"])


def rows_of(scale="4x", segmenter="a", **dice):
    return [
        {"scale": scale, "method": method, "subject": f"s{i}", "dice": value, "hd95_mm": 1.0, "segmenter": segmenter}
        for method, values in dice.items()
        for i, value in enumerate(values)
    ]


def test_summary_against_scipy():
    original, result = [0.9, 0.8, 0.85, 0.7], [0.88, 0.79, 0.80, 0.71]
    summary = summarise_dice(rows_of(original=original, net=result))["4x"]
    expected = stats.ttest_rel(result, original).confidence_interval(0.95)
    assert summary["net"]["difference"]["interval"] == pytest.approx([expected.low, expected.high])
    assert summary["net"]["kept"] == pytest.approx(np.mean(result) / np.mean(original))
    assert summary["original"]["dice"]["sd"] == pytest.approx(np.std(original, ddof=1))
    assert list(summary) == ["net", "original"]  # from worst to best
    assert "| net | 0.7950 ± 0.0695 | 97.8 % |" in format_dice({"4x": summary})


def test_a_subject_alone_has_no_interval():
    assert all(map(math.isnan, interval([0.1])))
    assert "nan" not in format_dice(summarise_dice(rows_of(original=[0.0], net=[0.0])))


def test_a_method_is_compared_on_its_own_subjects():
    """A fold that lacks a network, or a subject in which nothing is found, does not shift the comparison."""
    rows = rows_of(original=[0.9, 0.5, 0.7], net=[0.9, 0.4], other=[0.8, 0.4, 0.5])
    rows[-1]["hd95_mm"] = math.nan
    summary = summarise_dice(rows)["4x"]
    assert summary["net"]["kept"] == pytest.approx(0.65 / 0.7) and summary["net"]["dice"]["subjects"] == 2
    assert summary["other"]["kept"] == pytest.approx(1.7 / 2.1)
    table = format_dice({"4x": summary})
    assert "| net | 0.6500 ± 0.3536 (of 2) |" in table and "| 1.00 ± 0.00 (of 2) |" in table

    against = summarise_dice(rows, "other")["4x"]
    assert against["net"]["difference"]["mean"] == pytest.approx(0.05)
    assert against["net"]["kept"] == summary["net"]["kept"]
    assert "Dice minus that of other" in format_dice({"4x": against}, "other")
    with pytest.raises(ValueError, match="no rows of 'nothing' at 4x, expected one of original, net, other"):
        summarise_dice(rows, "nothing")


def test_merged_folds(tmp_path, chain):
    chain(lambda truth: truth)
    file = tmp_path / "out" / "dice.csv"
    other = tmp_path / "fold1.csv"
    other.write_text(file.read_text().replace("sub0", "sub1"))
    assert len(merged_rows([file, file, other])) == 2 * len(read_rows(file))
    other.write_text(file.read_text().replace(read_rows(file)[0]["segmenter"], "another"))
    with pytest.raises(ValueError, match="of segmenter another"):
        merged_rows([file, other])
    with pytest.raises(ValueError, match=r"no dice\.csv is given"):
        merged_rows([])
    other.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has the columns"):
        read_rows(other)


class Reads(TorchDispatchMode):
    """Refuses what makes a GPU wait: to read a value, or to count what is kept."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in ("_local_scalar_dense", "nonzero", "masked_select")), func
        return func(*args, **(kwargs or {}))


def test_dice_of_the_training_waits_for_no_gpu():
    """It is MONAI's Dice, which waits."""
    predicted, true = (torch.rand(2, 6, 1, 8, 9) > 0.5).float()
    true[2], predicted[3], true[4], predicted[4] = 0, 0, 0, 0
    metric, expected = SliceDice(), DiceMetric(reduction="mean")
    with Reads():
        metric(predicted, true)
        metric(predicted[:2], true[:2])
    for items in (predicted, true), (predicted[:2], true[:2]):
        expected(*items)
    torch.testing.assert_close(metric.aggregate(), expected.aggregate())
    with pytest.raises(AssertionError, match="_local_scalar_dense"), Reads():
        expected(predicted, true)


# --- Transforms, data, network ---


def test_intensity_scale_is_that_of_the_foreground_median():
    volume = torch.zeros(1, 10, 10, 4)
    volume[:, 2:8, 2:8] = torch.rand(1, 6, 6, 4) + 1
    scaled = ScaleByMedian()(volume)
    assert scaled[:, 2:8, 2:8].median() == 1 and scaled[:, :2].abs().max() == 0
    torch.testing.assert_close(ScaleByMedian()(-7 * volume), scaled)


def test_small_components_are_removed():
    mask = torch.zeros(1, 12, 12, 6)
    mask[:, :4, :4, :4] = 1  # 64 voxels
    mask[:, 8:10, 8:10, 2:4] = 1  # 8
    mask[:, 11, 0, 5] = 1  # 1
    assert [int(LargeComponents(share)(mask).sum()) for share in (0, 0.1, 0.5, 1)] == [73, 72, 64, 64]
    assert LargeComponents(0.1)(torch.zeros(1, 4, 4, 2)).sum() == 0
    with pytest.raises(ValueError, match="share must lie between 0 and 1"):
        LargeComponents(2)


def test_labels_become_masks(make_volume, tmp_path):
    label = np.zeros((5, 6, 4), np.uint8)
    label[1, 2, 3], label[4, 5, 0] = 1, 4
    path = make_volume(tmp_path / "seg.nii.gz", label)
    loaded = LoadLabeld("seg")({"seg": str(path)})["seg"]
    assert loaded.shape == (1, 5, 6, 4) and loaded.sum() == 2 and loaded.max() == 1
    (tmp_path / "bad.nii.gz").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"bad\.nii\.gz: cannot be read as NIfTI"):
        LoadLabeld("seg")({"seg": str(tmp_path / "bad.nii.gz")})


def test_slices_with_label_have_their_share():
    image, target = torch.ones(1, 4, 4, 20), torch.zeros(1, 4, 4, 20)
    image[..., :4] = 0  # outside the head
    image += torch.arange(20.0) * (image > 0)
    target[..., 10:12] = 1
    slices = LabelledSlices([{"image": image, "target": target}], lambda sample: sample, labelled=0.75)
    drawn = [slices.sample(SliceDraw(0, position, 0)) for position in (np.arange(400) + 0.5) / 400]
    assert np.mean([bool(s["target"].any()) for s in drawn]) == pytest.approx(0.75, abs=0.01)
    numbers = [int(s["image"][0, 0, 0]) - 1 for s in drawn]
    assert set(numbers) == set(range(4, 20)) and numbers == sorted(numbers)


@torch.no_grad()
def test_the_segmenter_takes_any_size():
    """A turned slice is padded to the same square, so that both orientations are seen alike."""
    network = SliceSwinUNETR(12).eval()
    image = torch.zeros(1, 1, 70, 90)
    image[..., 10:60, 20:70] = torch.rand(50, 50)
    logits = network(image)
    assert logits.shape == image.shape
    torch.testing.assert_close(network(F.pad(image, (3, 3, 13, 13)))[..., 13:-13, 3:-3], logits)
    assert network(image[..., :24, :28]).shape == (1, 1, 24, 28)


# --- Errors ---


def test_no_label_at_all(dataset_dir, tmp_path):
    for path in Path(dataset_dir).glob("*/seg.nii.gz"):
        path.unlink()
    with pytest.raises(Exception) as raised:
        run([TRAIN, SEGMENTATION], dataset_dir=dataset_dir, output_dir=str(tmp_path / "out"), **SHORT)
    message = str(root_cause(raised.value))
    assert dataset_dir in message and "<subject>/{t1,t2,pd,flair,seg}.nii.gz" in message


def test_one_label_only():
    items = [{"subject": "a", "seg": "a/seg.nii.gz"}, {"subject": "b"}]
    assert labelled_items(items, "data") == items[:1]


def test_subjects_of_the_training_are_refused(tmp_path):
    write_json(tmp_path / "datalist.json", {"training": [{"subject": "b"}], "validation": [{"subject": "a"}]})
    require_held_out([{"subject": "a"}], [str(tmp_path / "model.pt"), None])
    with pytest.raises(ValueError, match=r"b: .*model\.pt was trained on"):
        require_held_out([{"subject": "a"}, {"subject": "b"}], [str(tmp_path / "model.pt")])
    write_json(tmp_path / "datalist.json", {"training": [{"subject": "BraTS-GLI-00012-000"}], "validation": []})
    with pytest.raises(ValueError, match=r"00012-001: .*model\.pt was trained on their patients"):
        require_held_out([{"subject": "BraTS-GLI-00012-001"}], [str(tmp_path / "model.pt")])


def test_weights_of_another_segmenter_are_refused(tmp_path):
    write_checkpoint(tmp_path / "model.pt", SliceSwinUNETR(12).state_dict())
    volumes, arguments = MethodVolumes("bicubic"), {"feature_size": 24, "device": PAIR["device"]}
    with pytest.raises(ValueError, match=r"another feature_size than 24\? Then name it in --segmentation_options"):
        segmentation_evaluator(str(tmp_path / "model.pt"), volumes, str(BUNDLE), arguments)


def test_the_split_of_the_other_training_is_found(tmp_path):
    """A segmenter that is trained for a network's results holds out whom that network has held out."""
    own, other = tmp_path / "segmentation", tmp_path
    assert split_folder([own, other]) == own
    write_json(other / "datalist.json", {})
    assert split_folder([own, other]) == other
    write_json(own / "datalist.json", {})
    assert split_folder([own, other]) == own


def test_weights_that_are_there_are_used(tmp_path):
    """Those of a training in the folder itself are, if they are of the network; an interpolation has none."""
    write_checkpoint(tmp_path / "model.pt", build_network("srcnn").state_dict())
    arguments = (str(tmp_path), str(BUNDLE), [], {})
    assert trained_network(None, "srcnn", 4, *arguments) == str(tmp_path / "model.pt")
    assert trained_network("own.pt", "srcnn", 4, *arguments) == "own.pt"
    assert trained_network(None, "bicubic", 4, *arguments) is None
    own = tmp_path / "srcnn_ref_4x"
    write_checkpoint(own / "model.pt", build_network("srcnn_ref").state_dict())
    assert trained_network(None, "srcnn_ref", 4, *arguments) == str(own / "model.pt")


@pytest.mark.parametrize(("name", "value"), [("scale", 2), ("reference", "pd"), (None, None)])
def test_weights_of_a_training_of_something_else_are_not_used(tmp_path, monkeypatch, name, value):
    trained = []
    monkeypatch.setattr("glmamba_monai.experiments._train", lambda *arguments: trained.append(arguments[-1]))
    network = build_network("srcnn").state_dict()
    settings = {"target": "t2", "reference": "t1", "scale": 4}
    write_checkpoint(tmp_path / "model.pt", network)
    write_checkpoint(tmp_path / "checkpoint.pt", {"name": "srcnn", "network": network, "settings": settings})
    wanted = {**settings, **({} if name is None else {name: value})}
    pair = {key: wanted[key] for key in ("target", "reference")}
    found = trained_network(None, "srcnn", wanted["scale"], str(tmp_path), str(BUNDLE), [], pair)
    assert [(options["scale"], options["reference"]) for options in trained] == (
        [(wanted["scale"], wanted["reference"])] if name else []
    )
    assert (found == str(tmp_path / "model.pt")) == (name is None)


@pytest.mark.parametrize("other", [False, True])
def test_a_finished_training_of_something_else_is_not_taken_for_the_wanted_one(tmp_path, monkeypatch, other):
    trained = []
    monkeypatch.setattr("glmamba_monai.experiments._train", lambda *arguments: trained.append(arguments[-1]))
    settings = {"target": "t2", "reference": "t1", "scale": 4}
    finished = {"name": "srcnn", "epoch": 3, "max_epochs": 3, "settings": settings}
    for folder in (tmp_path / "srcnn_4x", tmp_path / "segmentation"):
        write_checkpoint(folder / "model.pt", {})
        write_checkpoint(folder / "checkpoint.pt", finished)
    wanted = {"target": "flair" if other else "t2", "reference": "t1"}
    trained_network(None, "srcnn", 4, str(tmp_path), str(BUNDLE), [], wanted)
    trained_segmenter(None, str(tmp_path), str(BUNDLE), wanted)
    assert len(trained) == (2 if other else 0)


def test_an_option_that_the_segmenter_does_not_have_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"featuresize: there is no such option in .*did you mean feature_size\?"):
        trained_segmenter(None, str(tmp_path), str(BUNDLE), {"featuresize": 24})
    with pytest.raises(ValueError, match="featuresize: there is no such option"):
        segmentation_evaluator("model.pt", MethodVolumes("srcnn"), str(BUNDLE), {"featuresize": 24})


# --- Training ---


@pytest.mark.slow
def test_whole_chain_trains_resumes_and_evaluates(dataset_dir, tmp_path, capsys):
    """One command: the segmenter and the network are trained, the table written; what is there is not trained again."""
    out = tmp_path / "out"
    options = {"dataset_dir": dataset_dir, "output_dir": str(out), "validation": ["sub00"]}
    first = run([TRAIN, SEGMENTATION], **options, **{**SHORT, "epochs": 1, "lr_schedule#t_total": 4})
    trainer = first.parser.get_parsed_content("train#trainer")
    assert trainer.state.epoch == 1 and (out / "segmentation" / "model.pt").is_file()
    run([TRAIN, SEGMENTATION], **options, **SHORT, resume=True)
    straight = tmp_path / "straight"
    run([TRAIN, SEGMENTATION], **{**options, "output_dir": str(straight)}, **SHORT)
    resumed, whole = (torch.load(f / "segmentation" / "model.pt", weights_only=True) for f in (out, straight))
    assert all(torch.equal(resumed[k], whole[k]) for k in whole)

    capsys.readouterr()
    chained = {**options, "network": "srcnn", **SHORT, "crop_size": 16, "val_slices": 2, "segmentation_options": SHORT}
    run([TRAIN, DOWNSTREAM], **chained)
    printed = capsys.readouterr().out
    assert "training srcnn first" in printed and "the segmenter first" not in printed
    assert [row["subject"] for row in read_rows(out / "dice.csv")] == ["sub00"] * 4
    before = torch.load(out / "srcnn_2x" / "model.pt", weights_only=True)
    run([TRAIN, DOWNSTREAM], **chained)
    assert "first" not in capsys.readouterr().out
    after = torch.load(out / "srcnn_2x" / "model.pt", weights_only=True)
    assert all(torch.equal(before[k], after[k]) for k in before)
