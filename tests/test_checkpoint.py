"""Weights that fit or are refused, checkpoints that survive a full disk, and random generators put back."""

from __future__ import annotations

import errno
import logging
import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events

from glmamba_monai.engines import (
    LossCurve,
    TrainingState,
    WeightAverage,
    WeightsLoader,
    find_weights,
    load_weights,
)
from glmamba_monai.engines.checkpoint import random_state, set_random_state
from glmamba_monai.engines.weights import read_checkpoint
from glmamba_monai.networks import build_network


def different_weights(name, seed=0):
    """A network whose every weight differs from a freshly built one's."""
    network = build_network(name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return network


def state_of(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def files_in(folder):
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- loading weights


@pytest.mark.parametrize("form", ["state_dict", "checkpoint"])
def test_weights_are_loaded_from_both_kinds_of_file(tmp_path, form):
    expected = state_of(different_weights("srcnn_ref"))
    torch.save(expected if form == "state_dict" else {"network": expected, "epoch": 3}, tmp_path / "w.pt")
    network = build_network("srcnn_ref")
    load_weights(network, tmp_path / "w.pt", "srcnn_ref")
    assert_same(network.state_dict(), expected)


@pytest.mark.parametrize("change", ["missing", "extra", "other shape"])
def test_weights_are_loaded_all_or_none(tmp_path, change):
    weights = state_of(different_weights("srcnn_ref"))
    if change == "missing":
        weights.pop("reconstruction.bias")
    elif change == "extra":
        weights["reconstruction.scale"] = torch.ones(1)
    else:
        weights["reconstruction.bias"] = torch.ones(2)
    torch.save(weights, tmp_path / "w.pt")
    network = build_network("srcnn_ref")
    before = state_of(network)
    with pytest.raises(ValueError) as error:
        load_weights(network, tmp_path / "w.pt", "srcnn_ref")
    assert str(error.value).startswith(f"{tmp_path / 'w.pt'}: the weights do not fit network 'srcnn_ref'")
    assert "they fit no known network" in str(error.value)
    assert_same(network.state_dict(), before)


@pytest.mark.parametrize(
    ("made_for", "loaded_into"), [("srcnn", "srcnn_ref"), ("srcnn_ref", "srcnn"), ("glmamba_light", "srcnn")]
)
@pytest.mark.parametrize("form", ["state_dict", "checkpoint"])
def test_weights_of_another_network_name_the_one_they_fit(tmp_path, made_for, loaded_into, form):
    weights = build_network(made_for).state_dict()
    torch.save(weights if form == "state_dict" else {"network": weights}, tmp_path / "w.pt")
    network = build_network(loaded_into)
    before = state_of(network)
    with pytest.raises(ValueError) as error:
        load_weights(network, tmp_path / "w.pt", loaded_into)
    message = str(error.value)
    assert str(tmp_path / "w.pt") in message and repr(loaded_into) in message
    assert f"they fit {made_for}: name it with --network" in message
    assert_same(network.state_dict(), before)


def test_presets_of_glmamba_are_told_apart(tmp_path):
    torch.save(build_network("glmamba").state_dict(), tmp_path / "w.pt")
    with torch.device("meta"):
        light = build_network("glmamba_light")
    # The whole method of Table 1 has the same weights under another name.
    with pytest.raises(ValueError, match=r"fit glmamba or .*table1_guided.*: name it with --network"):
        load_weights(light, tmp_path / "w.pt", "glmamba_light")


def truncated(path):
    torch.save(build_network("srcnn").state_dict(), path)
    path.write_bytes(path.read_bytes()[:20000])


@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.write_bytes(b""),
        lambda p: p.write_text("these are notes, not weights\n"),
        lambda p: p.write_bytes(np.random.default_rng(0).bytes(5000)),
        lambda p: p.write_bytes(b"PK\x03\x04" + bytes(100)),
        lambda p: p.write_bytes(b"\x80\x02" + bytes(100)),
        lambda p: p.write_bytes(b"\x1f\x8b" + bytes(100)),
        truncated,
    ],
    ids=["empty", "text", "noise", "zip", "pickle", "gzip", "truncated"],
)
def test_what_is_no_file_of_weights_is_refused_by_name(tmp_path, write):
    write(tmp_path / "w.pt")
    network = build_network("srcnn")
    before = state_of(network)
    with pytest.raises(ValueError) as error:
        load_weights(network, tmp_path / "w.pt", "srcnn")
    assert str(error.value).startswith(f"{tmp_path / 'w.pt'}: is no file of weights, or a damaged one")
    assert "\n" not in str(error.value)
    assert_same(network.state_dict(), before)


@pytest.mark.parametrize("content", [[1, 2], "text", 3, {}, {"network": {}}, {"epoch": 3}, {"network": 3}], ids=str)
def test_a_file_of_something_else_fits_no_network(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt: the weights do not fit network 'srcnn'; they fit no known network"):
        load_weights(build_network("srcnn"), tmp_path / "w.pt", "srcnn")


class Malicious:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return (os.mkdir, (str(self.witness),))


@pytest.mark.parametrize("zip_format", [True, False])
def test_code_in_a_checkpoint_is_not_run(tmp_path, zip_format):
    content = {"network": Malicious(tmp_path / "witness")}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=zip_format)
    with pytest.raises(ValueError, match=r"w\.pt: is no file of weights, or a damaged one"):
        load_weights(build_network("srcnn"), tmp_path / "w.pt", "srcnn")
    assert not (tmp_path / "witness").exists()
    torch.save(build_network("srcnn"), tmp_path / "module.pt")  # a pickled module is code, too
    with pytest.raises(ValueError, match=r"module\.pt: is no file of weights"):
        read_checkpoint(tmp_path / "module.pt")


# --- finding weights


def test_weights_are_looked_for_in_order(tmp_path):
    network = build_network("srcnn")
    folders = [str(tmp_path / name) for name in ("results", "models")]
    for folder in folders:
        os.mkdir(folder)
    (tmp_path / "models" / "model.pt").write_bytes(b"1")
    assert find_weights(None, folders, network) == str(tmp_path / "models" / "model.pt")
    (tmp_path / "results" / "model.pt").write_bytes(b"2")
    assert find_weights(None, folders, network) == str(tmp_path / "results" / "model.pt")
    (tmp_path / "mine.pt").write_bytes(b"3")
    assert find_weights(str(tmp_path / "mine.pt"), folders, network) == str(tmp_path / "mine.pt")


@pytest.mark.parametrize("weights", [None, "mine.pt"])
def test_without_weights_it_says_how_to_get_them(tmp_path, weights):
    folders = [str(tmp_path / name) for name in ("results", "models")]
    if weights is not None:  # a file that is named is meant: no other is taken in its place
        weights = str(tmp_path / weights)
        (tmp_path / "models").mkdir()
        torch.save(build_network("srcnn").state_dict(), tmp_path / "models" / "model.pt")
    with pytest.raises(FileNotFoundError) as error:
        WeightsLoader(build_network("srcnn"), "srcnn", folders, weights)
    message = str(error.value)
    looked = [weights] if weights else [f"{folder}/model.pt" for folder in folders]
    assert message.startswith(f"no weights: there is no {' nor '.join(looked)}. ")
    assert "python -m monai.bundle run training" in message and "--weights" in message


@pytest.mark.parametrize(
    ("factor", "file"),
    [
        (None, "general/model.pt"),
        (2, "general/model_2x.pt"),
        ([2, 2], "general/model_2x.pt"),
        ([1.99, 2], "general/model_2x.pt"),
        ([2, 2.5], "general/model.pt"),
        (3, "general/model.pt"),  # the file for 3 lies in a later folder, and the search goes folder by folder
        (1, "general/model.pt"),
    ],
    ids=str,
)
def test_weights_for_one_factor_go_before_those_for_all(tmp_path, factor, file):
    folders = [tmp_path / name for name in ("empty", "general", "last")]
    for folder in folders:
        folder.mkdir()
    for name in ("general/model.pt", "general/model_2x.pt", "last/model.pt", "last/model_2x.pt", "last/model_3x.pt"):
        (tmp_path / name).touch()
    network = build_network("srcnn")
    assert find_weights(None, list(map(str, folders)), network, factor) == str(tmp_path / file)
    (tmp_path / "mine.pt").touch()
    assert find_weights(str(tmp_path / "mine.pt"), list(map(str, folders)), network, factor) == str(
        tmp_path / "mine.pt"
    )
    (tmp_path / "empty" / "model.pt").touch()  # of a training of one's own
    assert find_weights(None, list(map(str, folders)), network, factor) == str(tmp_path / "empty" / "model.pt")


def test_weights_for_another_factor_are_not_taken(tmp_path):
    """A folder with weights for 2x alone serves 2x; for anything else it is said what is there."""
    (tmp_path / "model_2x.pt").touch()
    (tmp_path / "model_big.pt").touch()
    network, folders = build_network("srcnn"), [str(tmp_path)]
    assert find_weights(None, folders, network, 2) == str(tmp_path / "model_2x.pt")
    looked = {3: ["model_3x.pt", "model.pt"], (2, 2.5): ["model.pt"], None: ["model.pt"]}
    said = {3: "no weights for the factor 3", (2, 2.5): "no weights for the factor 2 x 2.5", None: "no weights"}
    for factor, words in said.items():
        with pytest.raises(FileNotFoundError) as error:
            find_weights(None, folders, network, factor)
        files = " nor ".join(str(tmp_path / name) for name in looked[factor])
        there = f"there is {tmp_path / 'model_2x.pt'} for 2x alone. Train first (python -m monai.bundle run training "
        assert str(error.value).startswith(f"{words}: there is no {files}; {there}")
        assert "--weights" in str(error.value)


@pytest.mark.parametrize("name", ["zero_filling", "bicubic"])
def test_interpolations_need_no_weights(tmp_path, name):
    loader = WeightsLoader(build_network(name), name, [str(tmp_path)])
    assert loader.path is None
    loader()  # and nothing is loaded


def test_weights_are_there_before_the_first_batch(tmp_path):
    expected = state_of(different_weights("srcnn"))
    torch.save(expected, tmp_path / "model.pt")
    network = build_network("srcnn")
    engine = Engine(lambda engine, batch: assert_same(network.state_dict(), expected))
    WeightsLoader(network, "srcnn", [str(tmp_path)]).attach(engine)
    engine.run([{"image": None}])


def batch_of(subject, *factor):
    """What a data loader makes of a volume, as far as it matters here."""
    return {"subject": [subject], **({"factor": torch.tensor([factor])} if factor else {})}


@pytest.fixture
def by_factor(tmp_path, monkeypatch):
    """Weights for 2, 3 and all factors in a folder; what is loaded, and what the network holds at each volume."""
    network, files, loaded, held = build_network("srcnn"), {}, [], {}
    for seed, name in enumerate(("model.pt", "model_2x.pt", "model_3x.pt")):
        files[name] = state_of(different_weights("srcnn", seed))
        torch.save(files[name], tmp_path / name)

    def load(network, path, name):
        loaded.append(os.path.basename(path))
        load_weights(network, path, name)

    def step(engine, batch):
        weight = network.state_dict()["reconstruction.weight"]
        (held[batch["subject"][0]],) = (n for n, f in files.items() if torch.equal(f["reconstruction.weight"], weight))

    monkeypatch.setattr("glmamba_monai.engines.weights.load_weights", load)
    return SimpleNamespace(folder=tmp_path, network=network, loaded=loaded, held=held, engine=Engine(step))


def test_each_volume_gets_the_weights_of_its_factor(by_factor, caplog):
    loader = WeightsLoader(by_factor.network, "srcnn", [str(by_factor.folder)])
    assert loader.path is None  # no volume has come
    loader.attach(by_factor.engine)
    volumes = {
        "a": ((2.0, 2.0), "model_2x.pt"),
        "b": ((1.99, 2.01), "model_2x.pt"),
        "c": ((3.0, 3.0), "model_3x.pt"),
        "d": ((2.0, 3.0), "model.pt"),
        "e": ((1.0, 1.0), "model.pt"),
        "f": ((), "model.pt"),  # of a preprocessing that says nothing
        "g": ((2.0, 2.0), "model_2x.pt"),
    }
    with caplog.at_level(logging.INFO):
        by_factor.engine.run([batch_of(subject, *factor) for subject, (factor, _) in volumes.items()])
    assert by_factor.held == {subject: name for subject, (_, name) in volumes.items()}
    assert by_factor.loaded == ["model_2x.pt", "model_3x.pt", "model.pt", "model_2x.pt"]  # no file twice in a row
    assert loader.path == str(by_factor.folder / "model_2x.pt")
    of_loader = [record for record in caplog.records if record.name == "glmamba_monai.engines.weights"]
    warned = [record.getMessage() for record in of_loader if record.levelno == logging.WARNING]
    assert len(warned) == 1 and warned[0].startswith("d: ") and "the factor is 2 x 3; " in warned[0]  # not trained for
    said = [record.getMessage() for record in of_loader if record.levelno == logging.INFO]
    assert said == [
        f"weights of srcnn {how} {by_factor.folder / volumes[subject][1]} for {subject}{words}"
        for subject, how, words in (
            ("a", "loaded from", " (factor 2 x 2)"),
            ("b", "kept, those of", " (factor 1.99 x 2.01)"),
            ("c", "loaded from", " (factor 3 x 3)"),
            ("d", "loaded from", " (factor 2 x 3)"),
            ("e", "kept, those of", " (factor 1 x 1)"),
            ("f", "kept, those of", ""),
            ("g", "loaded from", " (factor 2 x 2)"),
        )
    ]
    by_factor.loaded.clear()
    different = state_of(different_weights("srcnn", 9))
    by_factor.network.load_state_dict(different)  # what has happened between two runs is not known
    by_factor.engine.run([batch_of("a", 2.0, 2.0)])
    assert by_factor.held["a"] == "model_2x.pt" and by_factor.loaded == ["model_2x.pt"]


@pytest.mark.parametrize(
    ("factor", "warns"),
    [((1, 1), False), ((1.5, 1.5), True), ((1.95, 1.96), False), ((3.5, 3.5), False), ((4.1, 4.1), False),
     ((5, 5), False), ((6, 6), True), ((2, 2.03), False), ((2, 4), True)],
)  # fmt: skip
def test_a_factor_that_no_weights_are_trained_for_is_said(by_factor, caplog, factor, warns):
    WeightsLoader(by_factor.network, "srcnn", [str(by_factor.folder)]).attach(by_factor.engine)
    (by_factor.folder / "model_5x.pt").symlink_to("model_3x.pt")  # somebody's own, for 5 alone
    by_factor.engine.run([batch_of("a", *map(float, factor))])
    assert any("trained for 2 to 4, the same along both axes" in message for message in caplog.messages) == warns


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"weights": "{folder}/model_3x.pt"}, "model_3x.pt"),
        ({"weights": "{folder}/model_3x.pt", "scale": 4}, "model_3x.pt"),
        ({"scale": 3}, "model_3x.pt"),
        ({"scale": [2, 2]}, "model_2x.pt"),
        ({"scale": [2, 4]}, "model.pt"),
    ],
    ids=str,
)
def test_named_weights_or_a_named_factor_decide_at_once(by_factor, options, expected, caplog):
    options = {k: v.format(folder=by_factor.folder) if isinstance(v, str) else v for k, v in options.items()}
    loader = WeightsLoader(by_factor.network, "srcnn", [str(by_factor.folder)], **options)
    assert loader.path == str(by_factor.folder / expected)
    loader.attach(by_factor.engine)
    with caplog.at_level(logging.INFO):
        by_factor.engine.run([batch_of("a", 2.0, 2.0), batch_of("b", 3.0, 3.0)])
    assert by_factor.held == {"a": expected, "b": expected} and by_factor.loaded == [expected]
    assert f"weights of srcnn loaded from {by_factor.folder / expected}" in caplog.messages


def test_volumes_of_a_batch_must_need_the_same_weights(by_factor):
    WeightsLoader(by_factor.network, "srcnn", [str(by_factor.folder)]).attach(by_factor.engine)
    same = {"subject": ["a", "b"], "factor": torch.tensor([[2.0, 2.0], [1.99, 2.0]])}
    by_factor.engine.run([same])
    assert by_factor.held == {"a": "model_2x.pt"}
    both = {"subject": ["a", "b"], "factor": torch.tensor([[2.0, 2.0], [3.0, 3.0]])}
    with pytest.raises(ValueError, match=r"a, b: .*model_2x\.pt.*model_3x\.pt.* one volume a batch"):
        by_factor.engine.run([both])


def test_what_does_not_fit_is_refused_before_the_first_volume(by_factor):
    """Though it is for a factor that only a later volume has."""
    torch.save(build_network("srcnn_ref").state_dict(), by_factor.folder / "model_3x.pt")
    WeightsLoader(by_factor.network, "srcnn", [str(by_factor.folder)]).attach(by_factor.engine)
    with pytest.raises(ValueError, match=r"model_3x\.pt: the weights do not fit network 'srcnn'; they fit srcnn_ref"):
        by_factor.engine.run([batch_of("a", 2.0, 2.0), batch_of("b", 3.0, 3.0)])
    assert by_factor.held == {}


def test_a_volume_without_weights_for_its_factor_is_named(by_factor):
    (by_factor.folder / "model.pt").unlink()
    (by_factor.folder / "model_3x.pt").unlink()
    WeightsLoader(by_factor.network, "srcnn", [str(by_factor.folder)]).attach(by_factor.engine)
    by_factor.engine.run([batch_of("a", 2.0, 2.0)])
    with pytest.raises(FileNotFoundError) as error:
        by_factor.engine.run([batch_of("b", 4.0, 4.0)])
    assert str(error.value).startswith(
        f"b: no weights for the factor 4 x 4: there is no {by_factor.folder}/model_4x.pt"
    )
    assert f"there is {by_factor.folder}/model_2x.pt for 2x alone. " in str(error.value)
    assert by_factor.held == {"a": "model_2x.pt"}
    with pytest.raises(FileNotFoundError, match=r"no weights for the factor 4: there is no .*model_4x\.pt"):
        WeightsLoader(by_factor.network, "srcnn", [str(by_factor.folder)], scale=4)  # before anything is loaded


# --- random generators


def draws():
    return (
        [random.random() for _ in range(3)],
        random.gauss(0, 1),
        np.random.random_sample(3).tolist(),
        np.random.standard_normal(),
        torch.rand(3).tolist(),
    )


@pytest.mark.parametrize("through_a_file", [False, True])
def test_random_generators_are_put_back(tmp_path, through_a_file):
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    random.gauss(0, 1)  # leaves a second normal draw behind, in Python and in numpy
    np.random.standard_normal()
    state = random_state()
    expected = draws()
    assert draws() != expected
    if through_a_file:
        torch.save(state, tmp_path / "state.pt")
        state = read_checkpoint(tmp_path / "state.pt")
    set_random_state(state)
    assert draws() == expected


# --- checkpoints of a training


TINY = {"channels": 8, "n_mamba": 1, "d_state": 2, "attention_reduction": 4, "mix_channels": 4}
SPLIT = {"made_with": {}, "training": [], "validation": []}


class Training:
    """A trainer and a validator of a real network, on numbers; ``psnr`` lists what each validation finds."""

    def __init__(self, folder, psnr=(1.0, 2.0, 3.0), epochs=3, name="srcnn", **options):
        torch.manual_seed(0)
        self.network = build_network(name)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=0.01)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 0.5)
        self.validated = []
        self.weights = {}  # after every epoch
        self.psnr = psnr
        self.evaluator = SimpleNamespace(
            state=SimpleNamespace(best_metric=-1, best_metric_epoch=-1, epoch=0, metrics={}), run=self.validate
        )
        self.state = TrainingState(
            self.network, self.optimizer, self.schedule, self.evaluator, folder, name, SPLIT, **options
        )
        self.trainer = Engine(self.step)
        self.loss_factor = 1.0
        LossCurve(None).attach(self.trainer)
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, self.end_of_epoch)
        self.state.attach(self.trainer)
        self.trainer.add_event_handler(Events.STARTED, lambda engine: None)
        self.epochs = epochs

    def step(self, engine, batch):
        self.optimizer.zero_grad()
        x = torch.rand(1, 2, 8, 8)
        loss = (self.network(x) - batch).square().mean()
        loss.backward()
        self.optimizer.step()
        return [{"loss": loss.detach() * self.loss_factor}]

    def end_of_epoch(self, engine):
        self.schedule.step()
        self.validate(engine.state.epoch)
        self.weights[engine.state.epoch] = state_of(self.network)

    def validate(self, epoch):
        state = self.evaluator.state
        state.epoch = epoch
        self.validated.append(epoch)
        state.metrics = {"val_psnr": self.psnr[epoch - 1]}
        if self.psnr[epoch - 1] > state.best_metric:
            state.best_metric, state.best_metric_epoch = self.psnr[epoch - 1], epoch

    def run(self):
        self.trainer.run([0.3, 0.7], max_epochs=self.epochs)
        return self


def test_the_checkpoint_is_of_the_last_epoch_and_the_weights_of_the_best(tmp_path):
    training = Training(tmp_path, psnr=(1.0, 3.0, 2.0)).run()
    assert sorted(files_in(tmp_path)) == ["checkpoint.pt", "datalist.json", "model.pt"]
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert checkpoint["epoch"] == 3 and checkpoint["iteration"] == 6 and checkpoint["name"] == "srcnn"
    assert checkpoint["best_metric"] == 3.0 and checkpoint["best_metric_epoch"] == 2
    assert_same(checkpoint["network"], training.weights[3])
    assert_same(torch.load(tmp_path / "model.pt", weights_only=True), training.weights[2])


def test_other_processes_do_not_write(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"of rank 0")
    Training(tmp_path, write=False).run()
    assert files_in(tmp_path) == {"model.pt": b"of rank 0"}


@pytest.mark.parametrize("stop_after", [1, 2])
def test_a_resumed_training_goes_on_where_it_stopped(tmp_path, stop_after):
    whole = Training(tmp_path / "whole").run()
    Training(tmp_path / "parts", epochs=stop_after).run()
    torch.manual_seed(99)
    resumed = Training(tmp_path / "parts", resume=True).run()
    assert resumed.validated == list(range(stop_after + 1, 4))
    for name in ("network", "optimizer"):
        expected, found = (
            torch.load(tmp_path / folder / "checkpoint.pt", weights_only=True)[name] for folder in ("whole", "parts")
        )
        assert str(found) == str(expected)
    assert_same(state_of(resumed.network), whole.weights[3])
    assert resumed.schedule.get_last_lr() == whole.schedule.get_last_lr()


def test_the_checkpoint_keeps_the_learning_curve(tmp_path):
    """One point a validation, with the seconds of the steps of both processes."""
    spent = {}

    def seconds_are(trainer, scale):  # before the state's own handler, as the engine measures them
        def measured(engine):
            spent[engine.state.epoch] = engine.state.times["EPOCH_COMPLETED"] = scale * engine.state.epoch

        trainer._event_handlers[Events.EPOCH_COMPLETED].insert(0, (measured, (trainer,), {}))

    for epochs, scale in ((2, 1.0), (4, 10.0)):
        training = Training(tmp_path, psnr=(1.0, 3.0, 2.0, 2.5), epochs=epochs, resume=True)
        seconds_are(training.trainer, scale)
        training.run()
    assert spent == {1: 1.0, 2: 2.0, 3: 30.0, 4: 40.0}
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert checkpoint["history"] == [
        {"epoch": epoch, "iteration": 2 * epoch, "seconds": seconds, "val_psnr": psnr}
        for epoch, seconds, psnr in ((1, 1.0, 1.0), (2, 3.0, 3.0), (3, 33.0, 2.0), (4, 73.0, 2.5))
    ]


def test_epochs_without_validation_are_no_points_of_the_curve_but_take_their_time(tmp_path):
    training = Training(tmp_path)
    training.trainer.remove_event_handler(training.end_of_epoch, Events.EPOCH_COMPLETED)
    training.run()  # the state validates the last epoch
    (point,) = training.state.history
    assert point["epoch"] == 3 and point["seconds"] == training.state.seconds > 0


def test_a_checkpoint_from_before_the_curve_is_resumed(tmp_path):
    Training(tmp_path, epochs=1).run()
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del checkpoint["history"], checkpoint["seconds"]
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    assert [point["epoch"] for point in Training(tmp_path, epochs=2, resume=True).run().state.history] == [2]


class FullDisk:
    """``torch.save`` on a disk that fills up: some bytes arrive, then the error that torch or the system raises."""

    def __init__(self, error, after=0):
        self.save, self.error, self.after = torch.save, error, after

    def __call__(self, content, path):
        self.after -= 1
        if self.after >= 0:
            return self.save(content, path)
        path.write_bytes(b"half a file")
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("[enforce fail at inline_container.cc:783] . PytorchStreamWriter failed writing file data/0"),
    ],
    ids=["OSError", "RuntimeError"],
)
@pytest.mark.parametrize(("saved_before", "failing"), [(2, "model.pt"), (3, "checkpoint.pt")])
def test_a_disk_that_fills_stops_with_what_was_saved_intact(tmp_path, monkeypatch, error, saved_before, failing):
    """Epoch 1 saves model.pt and checkpoint.pt; the disk fills at the first or second file of epoch 2."""
    whole = Training(tmp_path / "whole").run()
    training = Training(tmp_path / "full")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", FullDisk(error, saved_before))
        with pytest.raises(OSError) as raised:
            training.run()
    message = str(raised.value)
    assert message.startswith(f"{tmp_path / 'full' / failing}: cannot be written")
    assert str(error) in message and "Free space or choose another output folder" in message
    assert sorted(files_in(tmp_path / "full")) == ["checkpoint.pt", "datalist.json", "model.pt"]
    checkpoint = torch.load(tmp_path / "full" / "checkpoint.pt", weights_only=True)
    assert checkpoint["epoch"] == 1
    assert_same(checkpoint["network"], training.weights[1])
    saved = training.weights[1 if failing == "model.pt" else 2]
    assert_same(torch.load(tmp_path / "full" / "model.pt", weights_only=True), saved)

    # Space has been made: the training goes on and ends as if nothing had happened.
    resumed = Training(tmp_path / "full", resume=True).run()
    assert_same(state_of(resumed.network), whole.weights[3])
    assert_same(torch.load(tmp_path / "full" / "model.pt", weights_only=True), whole.weights[3])


def test_a_full_disk_in_the_first_epoch_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", FullDisk(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="cannot be written"):
        Training(tmp_path).run()
    assert list(files_in(tmp_path)) == ["datalist.json"]


def test_a_training_that_diverges_stops_and_keeps_what_it_had(tmp_path):
    Training(tmp_path, epochs=1).run()
    saved = files_in(tmp_path)
    diverging = Training(tmp_path, epochs=2, resume=True)
    diverging.loss_factor = float("nan")
    with pytest.raises(ValueError, match=r"the loss is nan at iteration 3: .* lower --learning_rate"):
        diverging.run()
    assert files_in(tmp_path) == saved and diverging.validated == []


def over_zero_filling(training, monkeypatch):
    """Give the validations of a training a zero-filling of 30 dB."""
    validate = training.validate

    def validated(epoch):
        validate(epoch)
        training.evaluator.state.metrics["zero_filling_psnr"] = 30.0

    monkeypatch.setattr(training, "validate", validated)
    training.evaluator.run = validated
    return training


@pytest.mark.parametrize("write", [True, False])
def test_a_training_that_collapses_stops_and_keeps_its_best_weights(tmp_path, monkeypatch, write):
    """Also in the processes that do not write, which would wait for the others; and after a resumption."""
    psnr = (31.0, 33.0, 30.1, 30.1, 33.0)
    over_zero_filling(Training(tmp_path, psnr, epochs=3), monkeypatch).run()
    training = over_zero_filling(Training(tmp_path, psnr, epochs=5, resume=True, write=write), monkeypatch)
    message = rf"up to 3\.00 dB above zero-filling and are now 0\.10 dB.*{tmp_path / 'model.pt'}.*lower --learning_rate"
    with pytest.raises(RuntimeError, match=message):
        training.run()
    assert training.validated == [4]
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["epoch"] == (4 if write else 3)
    best = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["best_metric_epoch"]
    assert best == 2 and (tmp_path / "model.pt").is_file()
    if write:
        again = over_zero_filling(Training(tmp_path, psnr, epochs=4, resume=True), monkeypatch)
        with pytest.raises(RuntimeError, match="collapsed"):  # else it would pass for a training that has ended
            again.run()
        assert again.validated == []


@pytest.mark.parametrize("psnr", [(31.0, 33.0, 30.1, 32.0), (30.1, 30.2, 30.0, 30.0), (29.0, 33.0, 31.0, 30.7)])
def test_a_training_that_stumbles_or_never_learns_goes_on(tmp_path, monkeypatch, psnr):
    assert over_zero_filling(Training(tmp_path, psnr, epochs=4), monkeypatch).run().validated == [1, 2, 3, 4]


def test_losses_are_read_together_and_the_bad_one_is_named(monkeypatch):
    monkeypatch.setattr(LossCurve, "INTERVAL", 3)
    losses = [[1.0, 2.0, 4.0, 8.0], [3.0, 5.0, 1.0, float("inf")]]
    engine = Engine(lambda engine, batch: [{"loss": torch.tensor(losses[engine.state.epoch - 1][batch])}])
    LossCurve(None).attach(engine)
    means = []
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: means.append(e.state.metrics["epoch_loss"]))
    with pytest.raises(ValueError, match="the loss is inf at iteration 8: the training has diverged"):
        engine.run(range(4), max_epochs=2)
    assert means == [3.75]


def test_a_checkpoint_of_another_row_of_table_1_is_refused_though_every_shape_fits(tmp_path):
    network = build_network("table1_lr_local", **TINY)
    torch.save({"name": "table1_lr_local", "network": network.state_dict()}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="is of network 'table1_lr_local', not 'table1_lr_global'"):
        load_weights(build_network("table1_lr_global", **TINY), tmp_path / "checkpoint.pt", "table1_lr_global")
    torch.save({"name": "table1_fusion", "network": network.state_dict()}, tmp_path / "same.pt")
    load_weights(network, tmp_path / "same.pt", "glmamba_paper")  # one layout under two names


def test_a_new_training_sets_the_last_one_aside(tmp_path, caplog):
    Training(tmp_path, epochs=2).run()
    first = files_in(tmp_path)
    with caplog.at_level(logging.WARNING):
        Training(tmp_path, epochs=1).run()
    second = files_in(tmp_path)
    assert {f"previous-{name}": content for name, content in first.items()} == {
        name: content for name, content in second.items() if name.startswith("previous-")
    }
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["epoch"] == 1
    for name in ("checkpoint.pt", "model.pt"):
        assert f"{tmp_path / name} is of an earlier training; kept as previous-{name}" in caplog.text
    for prefix in ("previous-2-", "previous-3-"):  # --resume forgotten again: what is kept stays
        former, present = second, {name: c for name, c in second.items() if not name.startswith("previous-")}
        Training(tmp_path, epochs=1).run()
        second = files_in(tmp_path)
        assert {name: content for name, content in second.items() if name in former and name not in present} == {
            name: content for name, content in former.items() if name not in present
        }
        assert {f"{prefix}{name}" for name in present} == second.keys() - former.keys()
        assert all(second[f"{prefix}{name}"] == content for name, content in present.items())


def test_resume_with_fewer_epochs_than_there_are(tmp_path):
    Training(tmp_path, epochs=3).run()
    before = files_in(tmp_path)
    with pytest.raises(ValueError) as error:
        Training(tmp_path, epochs=2, resume=True).run()
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'checkpoint.pt'}: ") and "epoch 3" in message and "epoch 2" in message
    assert "--epochs" in message
    assert files_in(tmp_path) == before


def test_resume_without_a_checkpoint_starts_from_the_beginning(tmp_path, caplog):
    whole = Training(tmp_path / "whole").run()
    with caplog.at_level(logging.WARNING):
        resumed = Training(tmp_path / "other", resume=True).run()
    assert f"there is no {tmp_path / 'other' / 'checkpoint.pt'} yet; starting from the beginning" in caplog.text
    assert_same(state_of(resumed.network), whole.weights[3])


def test_resume_from_another_network(tmp_path):
    Training(tmp_path, epochs=1).run()
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint\.pt: .* 'srcnn_ref'; they fit srcnn: name it with --network"):
        Training(tmp_path, name="srcnn_ref", resume=True).run()
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("scale", 4, "--scale 2, this one has 4"),
        ("scale", [2, 4], r"--scale 2, this one has \[2, 4\]"),
        ("reference", "pd", "--reference t1, this one has pd"),
    ],
)
def test_resume_of_a_training_of_something_else(tmp_path, name, value, said):
    settings = {"target": "t2", "reference": "t1", "scale": 2}
    Training(tmp_path, epochs=1, settings=settings).run()
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match=rf"checkpoint\.pt: is of a training with {said}; resume it with the options"):
        Training(tmp_path, resume=True, settings={**settings, name: value}).run()
    assert files_in(tmp_path) == before
    assert Training(tmp_path, epochs=2, resume=True, settings={**settings, "scale": 2.0}).run().validated == [2]


def test_resume_from_a_checkpoint_that_does_not_say_what_it_is_of(tmp_path):
    Training(tmp_path, epochs=1).run()
    assert Training(tmp_path, epochs=2, resume=True, settings={"scale": 2}).run().validated == [2]


def test_a_folder_in_the_place_of_a_file_of_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is a folder, expected a file such as .*model\.pt"):
        find_weights(str(tmp_path), [], build_network("srcnn"), 2)


@pytest.mark.parametrize("scale", [4, [2, 2], 2.0])
def test_weights_of_a_training_at_another_factor(tmp_path, caplog, scale):
    Training(tmp_path, epochs=1, settings={"target": "t2", "scale": 2}).run()
    loader = WeightsLoader(build_network("srcnn"), "srcnn", [str(tmp_path)], scale=scale)
    with caplog.at_level(logging.WARNING):
        loader()
    said = f"{tmp_path / 'model.pt'}: is of a training with --scale 2, used with --scale {scale}" in caplog.text
    assert said == (scale == 4)
    caplog.clear()
    (tmp_path / "model.pt").rename(tmp_path / "previous-model.pt")  # of another training than the checkpoint
    WeightsLoader(build_network("srcnn"), "srcnn", [], str(tmp_path / "previous-model.pt"), scale=scale)()
    assert "is of a training" not in caplog.text
    (tmp_path / "previous-model.pt").rename(tmp_path / "model.pt")
    (tmp_path / "checkpoint.pt").write_text("damaged")
    loader()


def test_resume_from_weights_alone(tmp_path):
    torch.save(build_network("srcnn").state_dict(), tmp_path / "checkpoint.pt")
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint\.pt: is no checkpoint of a training .*--resume"):
        Training(tmp_path, resume=True).run()
    assert files_in(tmp_path) == before


def test_resume_from_a_damaged_checkpoint(tmp_path):
    Training(tmp_path, epochs=1).run()
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:10000])
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint\.pt: is no file of weights, or a damaged one"):
        Training(tmp_path, resume=True).run()
    assert files_in(tmp_path) == before


# --- average of the weights


class AveragedTraining(Training):
    """A training whose average is kept and shipped."""

    def __init__(self, folder, **options):
        super().__init__(folder, **options)
        self.average = self.state.average = WeightAverage(self.network, self.optimizer, decay=0.3)
        self.by_hand = None

    def step(self, engine, batch):
        output = super().step(engine, batch)
        now = {name: value.detach().double().clone() for name, value in self.network.named_parameters()}
        kept = (0, 1 / 10, 2 / 11, 3 / 12, 0.3, 0.3)[engine.state.iteration - 1]
        before = self.by_hand or now
        self.by_hand = {name: kept * before[name] + (1 - kept) * value for name, value in now.items()}
        return output


def test_the_average_is_that_of_all_steps_and_is_what_is_shipped(tmp_path):
    training = AveragedTraining(tmp_path).run()
    shipped = torch.load(tmp_path / "model.pt", weights_only=True)
    assert shipped.keys() == training.network.state_dict().keys()
    for name, expected in training.by_hand.items():
        assert torch.allclose(shipped[name].double(), expected, atol=1e-6)
        assert not torch.equal(shipped[name], training.network.state_dict()[name])
    # the network itself is trained as without an average
    assert_same(state_of(training.network), Training(tmp_path / "plain").run().weights[3])


@pytest.mark.parametrize("stop_after", [1, 2])
def test_a_resumed_average_goes_on_where_it_stopped(tmp_path, stop_after):
    AveragedTraining(tmp_path / "whole").run()
    AveragedTraining(tmp_path / "parts", epochs=stop_after).run()
    AveragedTraining(tmp_path / "parts", resume=True).run()
    for file in ("model.pt", "checkpoint.pt"):
        whole, parts = (torch.load(tmp_path / f / file, weights_only=True) for f in ("whole", "parts"))
        if file == "checkpoint.pt":
            assert parts["average"]["steps"] == whole["average"]["steps"] == 6
            whole, parts = whole["average"]["network"], parts["average"]["network"]
        assert_same(parts, whole)


@pytest.mark.parametrize(
    ("started", "resumed", "says"), [(Training, AveragedTraining, "without"), (AveragedTraining, Training, "with")]
)
def test_an_average_is_neither_begun_nor_dropped_in_the_middle(tmp_path, started, resumed, says):
    started(tmp_path, epochs=1).run()
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match=rf"checkpoint\.pt: is of a training {says} an average"):
        resumed(tmp_path, resume=True).run()
    assert files_in(tmp_path) == before


def test_a_checkpoint_of_another_optimiser_is_refused(tmp_path):
    Training(tmp_path, epochs=1).run()
    before = files_in(tmp_path)
    resumed = Training(tmp_path, resume=True)
    *most, last = resumed.network.parameters()
    resumed.state.optimizer = torch.optim.Adam([{"params": most}, {"params": [last]}])
    weights = state_of(resumed.network)
    expected = rf"checkpoint\.pt: its optimiser has groups of \[{len(most) + 1}\] parameters, that of this training of"
    with pytest.raises(ValueError, match=expected + rf" \[{len(most)}, 1\]; resume it with the configs it was started"):
        resumed.run()
    assert files_in(tmp_path) == before
    assert_same(state_of(resumed.network), weights)


def test_a_checkpoint_from_before_there_were_averages_is_resumed(tmp_path):
    Training(tmp_path, epochs=1).run()
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert checkpoint.pop("average") is None
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    Training(tmp_path, epochs=2, resume=True).run()
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["epoch"] == 2
