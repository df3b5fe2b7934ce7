"""MONAI's trainer without what makes a GPU wait in every iteration, for the host or for the next launch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.engines import IterationEvents, SupervisedTrainer, Workflow
from monai.transforms import Decollated
from torch import nn

from glmamba_monai.engines.evaluation import super_resolved
from glmamba_monai.engines.graphs import flat_gradient


class SliceTrainer(SupervisedTrainer):
    """MONAI's ``SupervisedTrainer``; see there for the arguments. A GPU is never waited for between two steps.

    An iteration's output is MONAI's list of items, but their ``loss`` is a tensor that stays on the device: MONAI reads
    it in every iteration. With ``amp`` the gradients are not scaled, so ``amp_kwargs`` should ask for bfloat16, which
    has the range of float32: MONAI's ``GradScaler`` waits in every step to learn whether a gradient has overflowed.
    """

    def run(self) -> None:
        self.scaler = torch.amp.GradScaler(self.state.device.type, enabled=False) if self.amp else None
        self.network.train()
        self.network.__dict__["train"] = _Train(self.network)  # MONAI calls it before every step
        try:
            Workflow.run(self)  # Trainer.run makes its own scaler
        finally:
            del self.network.__dict__["train"]

    def _register_decollate(self) -> None:
        decollate = Decollated(keys=None, detach=False)

        @self.on(IterationEvents.MODEL_COMPLETED)
        def _decollate_data(engine: SliceTrainer) -> None:
            state = engine.state
            state.batch = decollate(state.batch)
            output = {key: value.detach() for key, value in state.output.items()}
            loss = {"loss": output.pop("loss")}  # Decollated would copy it for each item, which takes most of its time
            state.output = [{**item, **loss} for item in decollate(output)]


class _Train:
    """A network's method ``train`` without a walk through all its modules where it is in that mode already."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def __call__(self, mode: bool = True) -> nn.Module:
        network = self.network
        return network if network.training == mode else type(network).train(network, mode)


class GradientLimit:
    """Shortens the gradient of a step that is longer than a limit, so that one odd batch cannot throw the weights away.

    The fusion block multiplies two feature maps, so a large value makes a far larger gradient: at a high learning rate
    the loss of a training without a limit once rose to a million times its value. The GPU is not waited for.

    Args:
        network: the network that is trained.
        longest: limit of the norm over all its parameters.
    """

    def __init__(self, network: nn.Module, longest: float) -> None:
        self.parameters = list(network.parameters())  # listed once: in every step that was a quarter of the time
        self.longest = longest

    def attach(self, engine: Workflow) -> None:
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Workflow) -> None:
        flat = flat_gradient(self.parameters)
        if flat is None:
            nn.utils.clip_grad_norm_(self.parameters, self.longest)
        else:  # the same as one norm and one product in place of one for each parameter
            flat.mul_((self.longest / (torch.linalg.vector_norm(flat) + 1e-6)).clamp(max=1.0))


def super_resolved_items(data: Mapping[str, Any]) -> dict[str, Any]:
    """The training's postprocessing: :func:`super_resolved` of ``pred`` and ``label``, without the meta of Lambdad."""
    return {**data, **{key: super_resolved(data[key]) for key in ("pred", "label")}}


def stacked_items(output: Sequence[Mapping[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """``pred`` and ``label`` of an iteration as batches: a metric computes a batch as fast as one item."""
    pred, label = (torch.stack([item[key] for item in output]) for key in ("pred", "label"))
    return pred.float(), label
