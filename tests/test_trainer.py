"""The CUDA graphs of the training against the network as it is."""

import copy
import gc
from pathlib import Path

import pytest
import torch
from ignite.engine import Events
from torch import nn

from glmamba_monai.engines import GradientLimit, GraphInferer, SliceTrainer
from glmamba_monai.engines.plan import training_plan
from glmamba_monai.engines.trainer import _captured
from glmamba_monai.networks import build_network
from glmamba_monai.ops import streams

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TINY = {"channels": 8, "n_mamba": 1, "n_deform": 1, "d_state": 2, "attention_reduction": 4, "mix_channels": 4}


@pytest.fixture(autouse=True)
def _no_streams_forgone(monkeypatch):
    """A capture that fails here shall not change what the tests after it run."""
    monkeypatch.setattr(streams, "_forgone", False)


def losses_of_training(network, inferer, batches, autocast=False):
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    losses = []
    for x in batches:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            loss = (inferer(x, network) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_readme_names_the_default_length():
    plan = training_plan("a data set")
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    assert f"| {plan.epochs}, {plan.iterations_per_epoch}, {plan.batch_size} | length of the training |" in readme
    assert f"| `--crop_size` | {plan.crop_size} | " in readme


@pytest.mark.parametrize(("steps", "expected"), [(24_000, 500), (2_500, 500), (100, 20), (3, 0)])
def test_a_short_training_has_a_short_warm_up(steps, expected):
    assert training_plan("a data set").warmup(steps) == expected


def trainer_of(network, batch, epochs=1, **options):
    """SGD with rate 1, a step an epoch."""
    return SliceTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=[batch],
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
        loss_function=nn.L1Loss(),
        **options,
    )


def step(network, batch, **options):
    """The trainer after one step."""
    trainer = trainer_of(network, batch, **options)
    trainer.run()
    return trainer


@pytest.mark.parametrize(("scale", "expected"), [(1.0, 3.0), (0.01, 0.2)], ids=["shorter", "longer"])
def test_a_long_gradient_is_shortened_and_a_short_one_left(scale, expected):
    """With a rate of 1 the step that is taken is the gradient."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    batch = {"image": torch.tensor([[20.0 * scale]]), "label": torch.tensor([[1.0]])}
    step(network, batch, train_handlers=[GradientLimit(network, longest=3.0)], decollate=False)
    assert network.weight.item() == pytest.approx(expected)


def test_the_items_of_a_batch_share_its_loss():
    network = nn.Conv2d(2, 2, 1)
    batch = {"image": torch.rand(3, 2, 8, 8), "label": torch.rand(3, 2, 8, 8)}
    expected = nn.L1Loss()(network(batch["image"]), batch["label"]).item()
    items = step(network, batch).state.output
    assert [sorted(item) for item in items] == [["image", "label", "loss", "pred"]] * 3
    losses = {id(item["loss"]) for item in items}
    assert len(losses) == 1 and not items[0]["loss"].requires_grad
    assert items[0]["loss"].item() == pytest.approx(expected)
    for i, item in enumerate(items):
        assert torch.equal(item["image"], batch["image"][i]) and item["pred"].shape == (2, 8, 8)


def test_a_network_is_put_into_training_mode_where_it_is_not():
    network = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Dropout(0.5))
    modes, train = [], type(network).train

    class Watched(nn.Sequential):
        def train(self, mode=True):
            modes.append(mode)
            return train(self, mode)

    network.__class__ = Watched
    network.eval()
    copies = []

    def validate(engine):
        if engine.state.iteration == 2:
            network.eval()
        copies.append(copy.deepcopy(network))

    batch = {"image": torch.rand(1, 2, 8, 8), "label": torch.rand(1, 2, 8, 8)}
    trainer = trainer_of(network, batch, epochs=4, decollate=False)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, validate)
    trainer.run()
    assert modes == [False, True, False, True]  # set up, the run, the validation, the step after it
    assert network.training and network[1].training and "train" not in network.__dict__
    copies[0].eval()  # a copy's mode is its own
    assert network.training and not copies[0].training and not copies[0][1].training


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_nothing_is_collected_during_a_capture(monkeypatch, fails, before):
    collecting = []
    monkeypatch.setattr(gc, "collect", lambda: collecting.append("collected"))
    monkeypatch.setattr(gc, "isenabled", lambda: before)
    monkeypatch.setattr(gc, "disable", lambda: collecting.append("off"))
    monkeypatch.setattr(gc, "enable", lambda: collecting.append("on"))

    def capture(network, inputs):
        collecting.append("captured")
        if fails:
            raise RuntimeError("it waits for the GPU")
        return network

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    _captured(nn.Conv2d(2, 2, 3), torch.rand(1, 2, 8, 8))
    assert collecting == ["collected", "off", "captured"] + ["on"] * before
    assert streams._forgone == fails


def test_on_a_cpu_the_network_runs_as_it_is():
    network, x = nn.Conv2d(2, 2, 3), torch.rand(1, 2, 8, 8)
    inferer = GraphInferer()
    assert torch.equal(inferer(x, network), network(x)) and not inferer._graphs


@needs_gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_a_training_by_graphs_is_the_training_without(autocast):
    torch.manual_seed(0)
    network = build_network("glmamba", **TINY).cuda()
    sizes = [24, 32, 24, 32, 40, 48, 24]  # more shapes than graphs
    batches = [torch.rand(2, 2, size, 24, device="cuda") for size in sizes]
    inferer, other = GraphInferer(), copy.deepcopy(network)
    found = losses_of_training(network, inferer, batches, autocast)
    expected = losses_of_training(other, lambda x, network: network(x), batches, autocast)
    assert len(inferer._graphs) == inferer.MAX_GRAPHS and len({round(x, 6) for x in expected}) == len(sizes)
    # Some gradients are summed atomically, so the last bits differ between any two runs.
    assert found == pytest.approx(expected, rel=2e-2 if autocast else 1e-4)


@needs_gpu
def test_validation_runs_the_network_as_it_is():
    network = build_network("glmamba", **TINY).cuda()
    inferer, x = GraphInferer(), torch.rand(1, 2, 24, 24, device="cuda")
    with torch.no_grad():
        inferer(x, network)
    inferer(x, network.eval())
    assert not inferer._graphs


@needs_gpu
def test_what_cannot_be_captured_runs_as_it_is(caplog):
    class Waits(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * float(x.mean())

    network, x = Waits(2, 2, 3).cuda(), torch.rand(1, 2, 8, 8, device="cuda")
    before = torch.cuda.current_stream()
    assert torch.equal(GraphInferer()(x, network), network(x))
    assert "cannot be captured" in caplog.text and torch.cuda.current_stream() == before
