"""MONAI's trainer without what makes a GPU wait in every iteration, for the host or for the next launch."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from monai.engines import IterationEvents, SupervisedTrainer, Workflow
from monai.inferers import SimpleInferer
from monai.transforms import Decollated
from torch import Tensor, nn

from glmamba_monai.engines.evaluation import super_resolved
from glmamba_monai.ops import expect_other_streams, forgo_streams

logger = logging.getLogger(__name__)


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
        nn.utils.clip_grad_norm_(self.parameters, self.longest)


class GraphInferer(SimpleInferer):
    """The network's forward and backward pass as CUDA graphs: one launch each in place of more than a thousand.

    A network is captured once for each shape of batch (and for autocast), the first `MAX_GRAPHS` of them, in training
    on a CUDA device; it runs as it is in all other cases, under DistributedDataParallel too, and where it cannot be
    captured. The kernels and their results are the same. A graph keeps its memory.
    """

    MAX_GRAPHS = 3

    def __init__(self) -> None:
        super().__init__()
        self._graphs: dict[tuple[Any, ...], Callable[[Tensor], Tensor]] = {}

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Run the network on ``inputs`` ``(B, 2, H, W)``."""
        graphed = (
            inputs.is_cuda
            and torch.is_grad_enabled()
            and isinstance(network, nn.Module)
            and network.training
            and not isinstance(network, nn.parallel.DistributedDataParallel)
        )
        autocast = torch.is_autocast_enabled("cuda")
        key = (id(network), inputs.shape, inputs.dtype, autocast)
        if not graphed or (key not in self._graphs and len(self._graphs) >= self.MAX_GRAPHS):
            return super().__call__(inputs, network, *args, **kwargs)
        # A cast that is kept between steps would not see the weights change.
        with torch.autocast("cuda", torch.get_autocast_dtype("cuda"), enabled=autocast, cache_enabled=False):
            if key not in self._graphs:
                self._graphs[key] = _captured(network, inputs)
            return self._graphs[key](inputs)


class _Alias(nn.Module):
    """A module of its own with another's parameters, since capturing replaces a module's forward method."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def _captured(network: nn.Module, inputs: Tensor) -> Callable[[Tensor], Tensor]:
    expect_other_streams()  # a graph's gradients come on the stream of its capture
    # A graph that the collector frees meanwhile, one of an earlier network, would end the capture.
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        # A capture that fails would leave its own stream as the current one.
        with torch.cuda.stream(torch.cuda.current_stream() if inputs.is_cuda else None):
            return torch.cuda.make_graphed_callables(_Alias(network), (inputs.clone(),))
    except RuntimeError as error:  # an operation that waits for the GPU, for example
        forgo_streams()
        logger.warning("The network cannot be captured as a CUDA graph and runs as it is: %s", error)
        return network
    finally:
        if collecting:
            gc.enable()


def super_resolved_items(data: Mapping[str, Any]) -> dict[str, Any]:
    """The training's postprocessing: :func:`super_resolved` of ``pred`` and ``label``, without the meta of Lambdad."""
    return {**data, **{key: super_resolved(data[key]) for key in ("pred", "label")}}


def stacked_items(output: Sequence[Mapping[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """``pred`` and ``label`` of an iteration as batches: a metric computes a batch as fast as one item."""
    pred, label = (torch.stack([item[key] for item in output]) for key in ("pred", "label"))
    return pred.float(), label
