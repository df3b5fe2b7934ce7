"""The bundle as MONAI's own tools see and run it: train, resume, evaluate, verify, export, track, distribute."""

import csv
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser, ConfigWorkflow, ckpt_export, verify_metadata, verify_net_in_out
from monai.engines import SupervisedTrainer
from torch.utils._python_dispatch import TorchDispatchMode

import glmamba_monai
from glmamba_monai.bundle import locate_bundle, require_known_options, weights_folders
from glmamba_monai.engines import Muon, SliceTrainer, load_weights, stacked_items, super_resolved_items
from glmamba_monai.errors import root_cause
from glmamba_monai.networks import build_network

BUNDLE = Path(__file__).resolve().parent.parent / "bundle"
CONFIGS = BUNDLE / "configs"
TRAIN, EVALUATE, INFERENCE, MULTI_GPU, GENERAL, CONTRASTS, MUON = (
    str(CONFIGS / f"{name}.json")
    for name in ("train", "evaluate", "inference", "multi_gpu_train", "train_general", "train_contrasts", "train_muon")
)
# Seconds instead of minutes; everything else as it is.
SHORT = {
    "network": "srcnn_ref",
    "device": "$torch.device('cpu')",  # where equal bits are promised
    "epochs": 2,
    "iterations_per_epoch": 3,
    "batch_size": 2,
    "crop_size": 16,
    "warmup_steps": 1,
    "val_interval": 1,
    "val_slices": 3,
}


@pytest.fixture
def dataset_dir(tmp_path, make_subject_folder):
    make_subject_folder(tmp_path / "data", n=4)
    return str(tmp_path / "data")


@pytest.fixture
def results(tmp_path):
    return tmp_path / "results"


def workflow(files, kind="train", **overrides):
    """A workflow of the bundle, initialised; its logging is left alone, since it would reset pytest's."""
    made = ConfigWorkflow(config_file=files, workflow_type=kind, logging_file=False, **overrides)
    made.initialize()
    return made


def train(dataset_dir, results, files=TRAIN, **overrides):
    made = workflow(files, **{**SHORT, "dataset_dir": dataset_dir, "output_dir": str(results), **overrides})
    made.run()
    made.finalize()
    return made


def command_line(*arguments, folder=None, launcher=(sys.executable, "-m")):
    """Arguments of ``monai.bundle run`` in a process of its own, with the repository's package."""
    environment = {**os.environ, "PYTHONPATH": str(BUNDLE.parent), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {
        "args": [*launcher, "monai.bundle", "run", *arguments],
        "cwd": folder,
        "env": environment,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }


def options(**values):
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


# --- Training and evaluation ---


def test_training_writes_what_it_promises(dataset_dir, results, capsys):
    train(dataset_dir, results)
    printed = capsys.readouterr().out
    for pattern in (
        r"epoch 2/2, loss 0\.\d+, train PSNR .* dB, validation PSNR .* images/s, 0:00:00 left",
        r"Validation with the best weights \(epoch \d\)\n",  # of one subject: no spread
        r"\| zero_filling \| \d+\.\d\d \| ",
        r"\| srcnn_ref \| \d+\.\d\d \| ",
        r"\| srcnn_ref \+ dc \| \d+\.\d\d \| ",
    ):
        assert re.search(pattern, printed), printed
    weights = torch.load(results / "model.pt", weights_only=True)
    assert weights.keys() == build_network("srcnn_ref").state_dict().keys()
    checkpoint = torch.load(results / "checkpoint.pt", weights_only=True)
    assert checkpoint["epoch"] == 2 and checkpoint["name"] == "srcnn_ref"
    split = json.loads((results / "datalist.json").read_text())
    assert len(split["training"]) == 3 and len(split["validation"]) == 1


def test_tensorboard_shows_pictures_and_curves(dataset_dir, results):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(dataset_dir, results)
    events = EventAccumulator(str(results / "tensorboard")).Reload()
    pictures = {"target", "zero_filling", "super_resolved", "zero_filling_error_x5", "super_resolved_error_x5"}
    assert {f"validation/{name}" for name in pictures} <= set(events.Tags()["images"])
    assert {"train_loss", "epoch_loss", "train_psnr", "val_psnr"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("val_psnr")][:2] == [1, 2]
    losses = {e.step: e.value for e in events.Scalars("train_loss")}  # of every iteration, read together
    assert list(losses) == [1, 2, 3, 4, 5, 6] and len(set(losses.values())) == 6
    means = [e.value for e in events.Scalars("epoch_loss")]
    assert means == pytest.approx([np.mean([losses[i] for i in epoch]) for epoch in ((1, 2, 3), (4, 5, 6))], rel=1e-5)


def test_glmamba_learns_the_phantom_like_data(dataset_dir, results):
    """The default network, a few steps: better than zero-filling on a subject it has not seen."""
    made = train(dataset_dir, results, network="glmamba", epochs=2, iterations_per_epoch=6, warmup_steps=3)
    metrics = made.parser.get_parsed_content("validate#evaluator").state.metrics
    assert metrics["val_psnr"] > metrics["zero_filling_psnr"] + 0.1


@pytest.mark.parametrize("crop_size", [None, 40])
def test_whole_slices_and_crops_larger_than_the_slice(dataset_dir, results, crop_size):
    train(dataset_dir, results, crop_size=crop_size, epochs=1)
    assert (results / "model.pt").is_file()


def test_evaluation_of_a_trained_network(dataset_dir, results):
    train(dataset_dir, results)
    evaluation = workflow(
        [TRAIN, EVALUATE], dataset_dir=dataset_dir, output_dir=str(results), network="srcnn_ref", evaluate_on="all"
    )
    evaluation.run()
    rows = list(csv.DictReader((results / "metrics.csv").open()))
    methods = [m + dc for dc in ("", " + dc") for m in ("zero_filling", "bicubic", "srcnn_ref")]
    assert {(r["subject"], r["method"]) for r in rows} == {(f"sub{i:02d}", m) for i in range(4) for m in methods}
    assert list(rows[0])[:5] == ["subject", "method", "slices", "psnr", "ssim"]
    summary = json.loads((results / "summary.json").read_text())
    assert summary["methods"].keys() == set(methods)
    for method in methods:
        values = [float(r["psnr"]) for r in rows if r["method"] == method]
        assert summary["methods"][method]["psnr"]["mean"] == pytest.approx(np.mean(values), abs=1e-5)
        assert summary["methods"][method]["psnr"]["sd"] == pytest.approx(np.std(values, ddof=1), abs=1e-5)
    assert summary["weights"] == str(results / "model.pt") and summary["scale"] == 2


@pytest.mark.parametrize(
    ("scale", "own", "expected"),
    [
        (2, [], "bundle/models/model_2x.pt"),
        (3, [], "bundle/models/model.pt"),
        ([2, 3], [], "bundle/models/model.pt"),
        (2, ["model.pt"], "results/model.pt"),  # of a training of one's own
        (2, ["mine.pt"], "mine.pt"),
    ],
    ids=str,
)
def test_an_evaluation_takes_the_weights_of_its_factor(tmp_path, dataset_dir, results, scale, own, expected):
    """And the summary and the reports say which."""
    files = [f"bundle/models/{name}" for name in ("model.pt", "model_2x.pt")]
    files += ["mine.pt" if name == "mine.pt" else f"results/{name}" for name in own]
    weights = {}
    for seed, name in enumerate(files):
        torch.manual_seed(seed)
        network = build_network("srcnn_ref")
        torch.nn.init.normal_(network.reconstruction.weight, std=0.05)
        weights[name] = network.state_dict()
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(weights[name], tmp_path / name)
    options = {"weights": str(tmp_path / "mine.pt")} if "mine.pt" in own else {}
    options.update(bundle_root=str(tmp_path / "bundle"), dataset_dir=dataset_dir, output_dir=str(results))
    options.update(network="srcnn_ref", scale=scale, val_slices=1, validation=["sub00"], report=True)
    evaluation = workflow([TRAIN, EVALUATE], **options)
    evaluation.run()
    found = evaluation.parser.get_parsed_content("net").state_dict()
    assert all(torch.equal(found[name].cpu(), value) for name, value in weights[expected].items())
    assert json.loads((results / "summary.json").read_text())["weights"] == str(tmp_path / expected)
    digest = hashlib.sha256((tmp_path / expected).read_bytes()).hexdigest()
    assert f"{Path(expected).name}, SHA-256 {digest}" in (results / "reports" / "sub00.html").read_text()


def test_early_stop_ends_a_training_that_does_not_improve(dataset_dir, results):
    made = train(dataset_dir, results, epochs=6, patience=1, learning_rate=0.0)
    assert made.parser.get_parsed_content("train#trainer").state.epoch < 6


def test_a_network_without_parameters_is_evaluated_but_not_trained(dataset_dir, results):
    with pytest.raises(RuntimeError) as error:
        train(dataset_dir, results, network="bicubic")
    assert "nothing to train" in str(root_cause(error.value))
    evaluation = workflow([TRAIN, EVALUATE], dataset_dir=dataset_dir, output_dir=str(results), network="bicubic")
    evaluation.run()
    rows = list(csv.DictReader((results / "metrics.csv").open()))
    assert [r["method"] for r in rows] == ["zero_filling", "bicubic", "zero_filling + dc", "bicubic + dc"]


class ValuesRead(TorchDispatchMode):
    """Counts how often a number is read out of a tensor. On a GPU each time is a wait for everything before it."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("files", "overrides"),
    [
        # Adam counts its steps in tensors of the CPU, whatever the device of the weights.
        ([TRAIN], {"optimizer": {"_target_": "torch.optim.SGD", "params": "$@train_net.parameters()", "lr": 1e-3}}),
        ([TRAIN, MUON], {"optimizer#fused": True}),  # as on a GPU, where Adam counts there
    ],
    ids=["sgd", "muon"],
)
def test_no_iteration_waits_for_a_value(dataset_dir, results, files, overrides):
    """As many values are read in an epoch of nine steps as in one of three."""
    counts = []
    for iterations in (3, 9):
        with ValuesRead() as read:
            train(dataset_dir, results, files, iterations_per_epoch=iterations, epochs=1, **overrides)
        counts.append(read.count)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    ("amp", "device", "expected"), [(True, "cuda", True), (True, "cpu", False), (False, "cuda", False)]
)
def test_amp_is_bfloat16_and_for_gpus(amp, device, expected):
    parser = ConfigParser()
    parser.read_config(TRAIN)
    parser.update({"amp": amp, "device": f"$torch.device('{device}')"})
    assert parser.get_parsed_content("autocast") is expected
    assert parser.get_parsed_content("autocast_options") == {"dtype": torch.bfloat16}
    trainer, evaluator = parser["train#trainer"], parser["validate#evaluator"]
    assert (trainer["amp"], trainer["amp_kwargs"]) == ("@autocast", "@autocast_options")
    assert "amp" not in evaluator  # figures are taken in float32


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_gradients_are_not_scaled():
    """MONAI's amp without its scaler; where there is no CUDA there is no autocast, so the steps must be the same."""
    weights = {}
    for trainer, amp in ((SupervisedTrainer, False), (SliceTrainer, False), (SliceTrainer, True)):
        torch.manual_seed(0)
        network = torch.nn.Conv2d(2, 2, 3, padding=1)
        batches = [{"image": torch.rand(2, 2, 8, 8), "label": torch.rand(2, 2, 8, 8)} for _ in range(3)]
        made = trainer(
            device=torch.device("cpu"),
            max_epochs=2,
            train_data_loader=batches,
            network=network,
            optimizer=torch.optim.Adam(network.parameters(), lr=0.01),
            loss_function=torch.nn.MSELoss(),
            amp=amp,
            amp_kwargs={"dtype": torch.bfloat16},
        )
        made.run()
        assert made.scaler is None or not made.scaler.is_enabled()
        weights[trainer, amp] = network.weight.detach()
        item = made.state.output[0]
        assert len(made.state.output) == 2 and item["pred"].shape == (2, 8, 8) and not item["pred"].requires_grad
    first, *others = weights.values()
    assert all(torch.equal(first, other) for other in others)


def test_items_become_batches_again():
    pred, label = torch.rand(3, 2, 5, 6), torch.rand(3, 2, 5, 6)
    items = [
        super_resolved_items({"image": i, "pred": p.bfloat16(), "label": y})
        for i, (p, y) in enumerate(zip(pred, label))
    ]
    found = stacked_items(items)
    assert [x.dtype for x in found] == [torch.float32] * 2
    assert torch.equal(found[0], pred.bfloat16()[:, :1].float()) and torch.equal(found[1], label[:, :1])
    assert [item["image"] for item in items] == [0, 1, 2]


@pytest.mark.slow
def test_the_throughput_of_a_training_is_compared_with_its_bare_step(dataset_dir, tmp_path):
    script = BUNDLE.parent / "benchmarks" / "training_throughput.py"
    arguments = options(
        network="srcnn_ref",
        batch=2,
        epochs=2,
        iterations=2,
        amp=True,
        crop_size=16,
        dataset_dir=dataset_dir,
        overlays="train_general",
    )
    command = {**command_line(folder=tmp_path), "args": [sys.executable, str(script), *arguments]}
    done = subprocess.run(**command, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "srcnn_ref, batch (2, 2, 16, 16), float32\ntrain, train_general\n" in done.stdout
    values = [float(v) for v in re.findall(r"^\| [^|]+ \| ([\d.]+) \|", done.stdout, re.MULTILINE)]
    assert len(values) == 3 and values[2] == pytest.approx(values[1] / values[0], abs=0.02)


# --- Beginning with weights that there are ---


@pytest.mark.parametrize("files", [[TRAIN], [TRAIN, GENERAL]], ids=["train", "with an average"])
def test_a_training_begins_with_weights_that_there_are(dataset_dir, tmp_path, files):
    """A rate of nothing leaves them as they are, in the average, too, and so shows what it began with."""
    given = build_network("srcnn_ref")
    torch.nn.init.normal_(next(given.parameters()))
    torch.save({name: tensor.half() for name, tensor in given.state_dict().items()}, tmp_path / "given.pt")
    setup = {"files": files, "learning_rate": 0.0, "initial_weights": str(tmp_path / "given.pt"), "num_workers": 0}
    made = train(dataset_dir, tmp_path / "results", **setup)
    expected = {name: tensor.half().float() for name, tensor in given.state_dict().items()}
    found = torch.load(tmp_path / "results" / "model.pt", weights_only=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(torch.equal(v.cpu(), expected[k]) for k, v in made.parser.get_parsed_content("net").state_dict().items())


def test_a_resumed_training_goes_on_with_its_own_weights(dataset_dir, results, tmp_path):
    torch.save(build_network("srcnn_ref").state_dict(), tmp_path / "given.pt")
    setup = {"initial_weights": str(tmp_path / "given.pt")}
    train(dataset_dir, results, epochs=1, **setup)
    checkpoint = weights_of(results)
    train(dataset_dir, results, epochs=2, resume=True, learning_rate=0.0, **setup)
    assert all(torch.equal(tensor, checkpoint[name]) for name, tensor in weights_of(results).items())


@pytest.mark.parametrize(
    ("file", "message"), [("none.pt", "there is no such file"), ("other.pt", "they fit srcnn: name it with --network")]
)
def test_initial_weights_that_cannot_be_used_are_refused_before_anything_is_done(dataset_dir, results, file, message):
    folder = Path(dataset_dir).parent
    torch.save(build_network("srcnn").state_dict(), folder / "other.pt")
    with pytest.raises(RuntimeError) as raised:
        train(dataset_dir, results, initial_weights=str(folder / file))
    assert message in str(root_cause(raised.value)) and str(folder / file) in str(root_cause(raised.value))
    assert not (results / "checkpoint.pt").exists()


# --- Crash and resume ---


def weights_of(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["network"]


@pytest.mark.parametrize(
    ("network", "files"), [("srcnn_ref", [TRAIN]), ("glmamba_light", [TRAIN]), ("srcnn_ref", [TRAIN, MUON])]
)
def test_a_resumed_training_ends_with_the_same_bits(dataset_dir, tmp_path, network, files):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    setup = {"network": network, "epochs": 3, "iterations_per_epoch": 2, "files": files}
    train(dataset_dir, whole, **setup)
    stopped = workflow(**{**SHORT, **setup, "dataset_dir": dataset_dir, "output_dir": str(parts)})
    assert isinstance(stopped.parser.get_parsed_content("optimizer"), Muon) == (MUON in files)
    stopped.parser.get_parsed_content("train#trainer").add_event_handler(
        Events.ITERATION_COMPLETED(once=3), lambda engine: engine.terminate()
    )
    stopped.run()
    torch.manual_seed(1234)  # whatever the new process draws before it resumes must not matter
    train(dataset_dir, parts, resume=True, **setup)
    expected, found = weights_of(whole), weights_of(parts)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("seen", [pytest.param("epoch 1/", marks=pytest.mark.slow), "epoch 2/"])
def test_kill_9_and_resume_equals_an_uninterrupted_training(dataset_dir, tmp_path, seen):
    """SIGKILL as soon as a line of progress appears: while the checkpoint is written, or in the next epoch."""
    setup = {"epochs": 4, "val_interval": 2}
    killed = tmp_path / "killed"
    paths = {"dataset_dir": dataset_dir, "output_dir": killed}
    command = command_line("training", "--config_file", TRAIN, *options(**{**SHORT, **setup}, **paths), folder=tmp_path)
    command["env"]["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # as here: it may decide over the last bits
    process = subprocess.Popen(**command)
    for line in process.stdout:
        if line.startswith(seen):
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    train(dataset_dir, tmp_path / "whole", **setup)
    train(dataset_dir, killed, resume=True, **setup)
    expected, found = weights_of(tmp_path / "whole"), weights_of(killed)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    best, best_found = (torch.load(f / "model.pt", weights_only=True) for f in (tmp_path / "whole", killed))
    assert all(torch.equal(best_found[name], best[name]) for name in best)


def test_a_training_may_be_resumed_to_last_longer(dataset_dir, results):
    train(dataset_dir, results, epochs=1)
    train(dataset_dir, results, epochs=3, resume=True)
    assert torch.load(results / "checkpoint.pt", weights_only=True)["epoch"] == 3


# --- One set of weights for every factor ---


def test_training_for_every_factor(tmp_path, make_subject_folder, results):
    """The overlay on subjects of different contrasts; killed by the wall clock, resumed, evaluated at each factor."""
    make_subject_folder(tmp_path / "data", n=3, contrasts=("t1", "t2", "flair", "seg"))
    make_subject_folder(tmp_path / "data", names=["other"], contrasts=("t1", "t2", "pd"), shape=(30, 22, 5), seed=7)
    both, data = [TRAIN, GENERAL], str(tmp_path / "data")
    setup = {"num_workers": 0, "validation": ["sub00"], "val_slices": 2, "epochs": 3}
    made = train(data, results, both, **setup)
    rows = made.parser.get_parsed_content("validate#key_metric#val_psnr").rows
    assert {row["subject"] for row in rows} == {f"sub00 at {factor}x" for factor in (2, 3, 4)}
    zero_filling = [row["psnr"] for row in rows if row["method"] == "zero_filling"]
    assert zero_filling == sorted(zero_filling, reverse=True) and len(set(zero_filling)) == 3
    drawn = made.parser.get_parsed_content("train#dataset")
    assert [len(volume["images"]) for volume in drawn] == [3, 3, 3]

    # the average is what is validated and shipped
    checkpoint = torch.load(results / "checkpoint.pt", weights_only=True)
    shipped = torch.load(results / "model.pt", weights_only=True)
    assert all(not torch.equal(value, shipped[name]) for name, value in checkpoint["network"].items())
    validated = made.parser.get_parsed_content("validate#evaluator").network.state_dict()
    assert all(torch.equal(value, shipped[name]) for name, value in validated.items())

    parts = tmp_path / "parts"
    stopped = workflow(both, **{**SHORT, **setup, "dataset_dir": data, "output_dir": str(parts)})
    stopped.parser.get_parsed_content("train#trainer").add_event_handler(
        Events.ITERATION_COMPLETED(once=5), lambda engine: engine.terminate()
    )
    stopped.run()
    torch.manual_seed(1234)
    train(data, parts, both, **{**setup, "num_workers": 1}, resume=True)
    again = torch.load(parts / "checkpoint.pt", weights_only=True)
    for found, expected in ((again, checkpoint), (again["average"], checkpoint["average"])):
        assert all(torch.equal(found["network"][name], value) for name, value in expected["network"].items())

    evaluation = workflow([TRAIN, EVALUATE], dataset_dir=data, output_dir=str(results), network="srcnn_ref", scale=3)
    evaluation.run()
    found = {row["method"]: row for row in csv.DictReader((results / "metrics.csv").open())}
    assert {row["subject"] for row in found.values()} == {"sub00"}


def test_training_for_one_factor_on_all_contrasts(tmp_path, make_subject_folder, results):
    make_subject_folder(tmp_path / "data", n=3, contrasts=("t1", "t2", "flair", "seg"))
    setup = {"num_workers": 0, "validation": ["sub00"], "scale": 4}
    made = train(str(tmp_path / "data"), results, [TRAIN, GENERAL, CONTRASTS], **setup)
    rows = made.parser.get_parsed_content("validate#key_metric#val_psnr").rows
    assert {row["subject"] for row in rows} == {"sub00 at 4x"}
    assert [len(volume["images"]) for volume in made.parser.get_parsed_content("train#dataset")] == [3, 3]
    assert (results / "model.pt").is_file()


# --- Checks of the model zoo ---


@pytest.mark.parametrize(
    ("files", "kind"),
    [(TRAIN, "train"), ([TRAIN, EVALUATE], "train"), ([TRAIN, GENERAL, CONTRASTS], "train"), (INFERENCE, "infer")],
    ids=str,
)
def test_every_property_of_a_bundle_is_there(files, kind, dataset_dir, results, tmp_path):
    overrides = {"dataset_dir": dataset_dir, "output_dir": str(results), "network": "srcnn_ref"}
    if files != TRAIN:
        torch.save(build_network("srcnn_ref").state_dict(), tmp_path / "model.pt")
        overrides.update(reference="t1", weights=str(tmp_path / "model.pt"))
    made = workflow(files, kind, **overrides)
    assert made.check_properties() == []


def test_metadata_follows_the_schema(tmp_path):
    """MONAI's command, with the fields that its schema of 2024-07-25 asks for; the schema itself needs a network."""
    text, mapping = {"type": "string", "minLength": 1}, {"type": "object"}
    tensor = {
        "type": "object",
        "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range", "channel_def"],
        "properties": {"num_channels": {"type": "integer"}, "spatial_shape": {"type": "array"}, "format": text},
    }
    strings = ("schema", "version", "monai_version", "pytorch_version", "numpy_version", "task", "description")
    mappings = ("changelog", "required_packages_version", "network_data_format", "eval_metrics")
    schema = {
        "type": "object",
        "required": [*strings, *mappings, "authors", "copyright"],
        "properties": {
            **dict.fromkeys((*strings, "authors", "copyright"), text),
            **dict.fromkeys(mappings, mapping),
            "network_data_format": {
                "required": ["inputs", "outputs"],
                "properties": {
                    "inputs": {"required": ["image"], "properties": {"image": tensor}},
                    "outputs": {"required": ["pred"], "properties": {"pred": tensor}},
                },
            },
        },
    }
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(schema))
    verify_metadata(meta_file=str(CONFIGS / "metadata.json"), filepath=str(path))
    metadata = json.loads((CONFIGS / "metadata.json").read_text())
    assert metadata["version"] in metadata["changelog"]
    assert "mamba-ssm" not in metadata["required_packages_version"]


def test_metadata_states_the_pinned_versions():
    metadata = json.loads((CONFIGS / "metadata.json").read_text())
    text = (BUNDLE.parent / "requirements.txt").read_text()
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)(?!.*<)", text, re.MULTILINE))
    stated = {
        "monai": metadata["monai_version"],
        "torch": metadata["pytorch_version"],
        "numpy": metadata["numpy_version"],
        **metadata["required_packages_version"],
    }
    assert stated == pins
    assert metadata["version"] == glmamba_monai.__version__ == next(iter(metadata["changelog"]))


@pytest.mark.parametrize("n", [1, 5])
def test_network_keeps_what_the_metadata_says(n):
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(CONFIGS / "metadata.json"),
        config_file=INFERENCE,
        device="cpu",
        n=n,
        bundle_root=str(BUNDLE),
    )


def test_exported_torchscript_equals_eager(tmp_path):
    torch.manual_seed(0)
    network = build_network("glmamba_light").eval()
    torch.nn.init.normal_(network.lr_head[-1].weight, std=0.05)
    torch.save(network.state_dict(), tmp_path / "model.pt")
    ckpt_export(
        net_id="network_def",
        filepath=str(tmp_path / "model.ts"),
        ckpt_file=str(tmp_path / "model.pt"),
        meta_file=str(CONFIGS / "metadata.json"),
        config_file=INFERENCE,
        network="glmamba_light",
    )
    scripted = torch.jit.load(str(tmp_path / "model.ts"))
    x = torch.rand(1, 2, 18, 25)
    with torch.no_grad():
        torch.testing.assert_close(scripted(x), network(x), rtol=1e-5, atol=1e-5)


def test_mlflow_tracks_a_training(dataset_dir, results):
    mlflow = pytest.importorskip("mlflow")
    made = ConfigWorkflow(
        config_file=TRAIN,
        workflow_type="train",
        logging_file=False,
        tracking="mlflow",
        **{**SHORT, "dataset_dir": dataset_dir, "output_dir": str(results)},
    )
    made.initialize()
    made.run()
    made.finalize()
    client = mlflow.MlflowClient(made.parser.get_parsed_content("tracking_uri"))
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments() if e.name != "Default"])
    assert {"train_loss"} <= set(run.data.metrics)


# --- Where it is run from, and on how many processes ---


def test_weights_of_a_network_go_before_those_of_glmamba_where_there_are_any(tmp_path):
    assert weights_folders(tmp_path, "srcnn") == [str(tmp_path / "models")]
    (tmp_path / "models" / "srcnn").mkdir(parents=True)
    assert weights_folders(tmp_path, "srcnn") == [str(tmp_path / "models" / "srcnn"), str(tmp_path / "models")]
    assert weights_folders(tmp_path, "glmamba") == [str(tmp_path / "models")]


def test_the_bundle_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["monai.bundle", "run"])
    assert Path(locate_bundle()) == BUNDLE
    other = tmp_path / "copy" / "configs"
    other.mkdir(parents=True)
    (other / "metadata.json").write_text("{}")
    for value in ("copy/configs/train.json", "['copy/configs/train.json', 'copy/configs/evaluate.json']"):
        for arguments in (["--config_file", value], [f"--config-file={value}"]):
            monkeypatch.setattr(sys, "argv", ["monai.bundle", "run", "training", *arguments])
            assert Path(locate_bundle()) == other.parent
    monkeypatch.setattr(sys, "argv", ["x", "--config_file", "nowhere/configs/train.json"])
    assert Path(locate_bundle()) == BUNDLE


@pytest.mark.parametrize(
    ("start", "configs"),
    [
        pytest.param(BUNDLE.parent, "bundle/configs", id="repository"),
        pytest.param(BUNDLE, "configs", id="bundle", marks=pytest.mark.slow),
        pytest.param(None, str(CONFIGS), id="elsewhere", marks=pytest.mark.slow),
    ],
)
def test_the_commands_as_typed_from_any_folder(dataset_dir, results, tmp_path, start, configs):
    """All three configs, each in a process of its own; nothing is left where it was started."""
    folder = tmp_path / "elsewhere" if start is None else start
    folder.mkdir(exist_ok=True)
    before = sorted(folder.iterdir())
    common = options(dataset_dir=dataset_dir, network="srcnn_ref")
    short = options(**{k: v for k, v in SHORT.items() if k != "network"}, output_dir=results)
    weights = options(weights=results / "model.pt", output_dir=tmp_path / "sr", scale=1, reference="t1")
    both = f"['{configs}/train.json','{configs}/evaluate.json']"
    for arguments in (
        ["training", "--config_file", f"{configs}/train.json", *common, *short],
        ["evaluating", "--config_file", both, *common, *options(output_dir=results)],
        ["inferring", "--config_file", f"{configs}/inference.json", *common, *weights],
    ):
        done = subprocess.run(**command_line(*arguments, folder=folder), check=False)
        assert done.returncode == 0, done.stdout[-3000:]
    assert sorted(folder.iterdir()) == before
    assert (results / "summary.json").is_file()
    assert len(list((tmp_path / "sr").iterdir())) == 4


PROGRAM = "/somewhere/monai/bundle/__main__.py"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epoch", "3"], r"--epoch: there is no such option in .*train\.json; did you mean --epochs\?"),
        (["--epoch=3"], r"--epoch: .* did you mean --epochs\?"),
        (["--epochs", "3", "--val-slice", "2"], r"--val_slice: .* did you mean --val_slices\?"),
        (["--trian#sampler#seed", "7"], r"--trian#sampler#seed: .* did you mean --train\?"),
        (["--trian::sampler::seed", "7"], r"--trian::sampler::seed: .* did you mean --train\?"),
        (["--weights", "model.pt"], r"--weights: there is no such option in "),  # of evaluate.json
        (["--experiment_name", "one"], r"--experiment_name: there is no such option in "),
        (["--frequency", "3"], r"--frequency: there is no such option in [^;]*$"),  # nothing is like it
    ],
    ids=str,
)
def test_a_misspelt_option_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        require_known_options([PROGRAM, "run", "training", "--config_file", TRAIN, *arguments])


@pytest.mark.parametrize(
    ("files", "arguments"),
    [
        (TRAIN, ["--epochs", "3", "--train#sampler#seed", "7", "--run_id=training"]),
        (TRAIN, ["--val-slices", "-3", "--optimizer", "@mine", "--mine", "{'_target_': 'torch.optim.SGD'}"]),
        (TRAIN, ["--tracking", "mlflow", "--experiment_name", "one"]),
        (f"['{TRAIN}','{EVALUATE}']", ["--weights", "model.pt"]),
        (f"{TRAIN},{GENERAL}", ["--validation_scales", "[2]", "--move_prob", "0.2", "--train::augmentation", "None"]),
        (INFERENCE, ["--image", "a.nii.gz"]),
    ],
    ids=str,
)
def test_options_that_mean_something_are_taken(files, arguments):
    require_known_options([PROGRAM, "run", "--config_file", files, *arguments])
    require_known_options([PROGRAM, "run", f"--config_file={files}", *arguments])


def test_options_from_a_file_are_looked_at_too(tmp_path):
    (tmp_path / "args.json").write_text(json.dumps({"config_file": [TRAIN], "epochs": 3, "batchsize": 4}))
    with pytest.raises(ValueError, match=r"--batchsize: .* did you mean --batch_size\?"):
        require_known_options([PROGRAM, "run", "training", "--args_file", str(tmp_path / "args.json")])


def test_the_options_of_another_program_are_left_alone():
    for program, command in ((PROGRAM, "ckpt_export"), ("/bin/pytest", "run"), ("/monai/bundle/other.py", "run")):
        require_known_options([program, command, "--config_file", TRAIN, "--epoch", "3"])
    require_known_options([PROGRAM])


def test_whoever_asks_where_the_bundle_lies_does_not_load_torch():
    code = "import sys, glmamba_monai.bundle as b; b.locate_bundle(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=BUNDLE.parent, check=False).returncode == 0


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.json")), ids=lambda file: file.stem)
def test_every_config_looks_at_its_options_first(file):
    steps = json.loads(file.read_text()).get("initialize")
    assert steps is None or steps[0] == "$glmamba_monai.bundle.require_known_options()"


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.json")), ids=lambda file: file.stem)
def test_no_config_names_an_item_by_its_position(file):
    """One more in a list would make it another item; what other configs change has a name."""

    def texts_of(content):
        if isinstance(content, str):
            yield content
        elif isinstance(content, (dict, list)):
            for part in [*content, *content.values()] if isinstance(content, dict) else content:
                yield from texts_of(part)

    by_position = re.compile(r"(#|::)\d|@[\w#:]+\[\d")
    assert [text for text in texts_of(json.loads(file.read_text())) if by_position.search(text)] == []


@pytest.mark.slow
def test_a_misspelt_option_ends_the_command_before_anything_is_done(dataset_dir, tmp_path):
    arguments = options(dataset_dir=dataset_dir, output_dir=tmp_path / "results", epoch=1)
    done = subprocess.run(**command_line("training", "--config_file", TRAIN, *arguments, folder=tmp_path), check=False)
    errors = [line for line in done.stdout.splitlines() if "Error:" in line]
    assert done.returncode and "did you mean --epochs?" in errors[0]
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_two_processes_train_as_one(dataset_dir, tmp_path):
    """torchrun with gloo: both ranks end with the same weights, and the draws of an epoch are those of one process."""
    results = tmp_path / "two"
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m")
    files = f"['{TRAIN}','{MULTI_GPU}']"
    arguments = options(**SHORT, dataset_dir=dataset_dir, output_dir=results)
    done = subprocess.run(
        **command_line("training", "--config_file", files, *arguments, folder=tmp_path, launcher=launcher), check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert len(re.findall(r"^epoch 2/2", done.stdout, re.MULTILINE)) == 1  # rank 0 alone reports
    network = build_network("srcnn_ref")
    load_weights(network, results / "model.pt", "srcnn_ref")
    train(dataset_dir, tmp_path / "one")
    one, two = weights_of(tmp_path / "one"), weights_of(results)
    # Mean of the two half batches is the mean of the batch, up to the order of additions.
    assert all(torch.allclose(two[name], one[name], rtol=1e-3, atol=1e-5) for name in one)
