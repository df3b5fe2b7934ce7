"""The training loop."""

import copy
from pathlib import Path

import pytest
import torch
from ignite.engine import Events
from torch import nn

from glmamba_monai.engines import GradientLimit, SliceTrainer
from glmamba_monai.engines.plan import training_plan


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
