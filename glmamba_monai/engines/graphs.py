"""A network's training step as two CUDA graphs, and its gradients in one piece of memory."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from monai.inferers import SimpleInferer
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from glmamba_monai.ops import expect_other_streams, forgo_streams

logger = logging.getLogger(__name__)

WARM_UP_PASSES = 3  # before a capture: kernels are compiled and chosen, workspaces allocated


class GraphInferer(SimpleInferer):
    """The network's forward and backward pass as CUDA graphs: one launch each in place of more than a thousand.

    A network is captured once for each shape of batch (and for autocast), the first `MAX_GRAPHS` of them, in training
    on a CUDA device, and again when a parameter has been frozen or moved; it runs as it is in all other cases, under
    DistributedDataParallel too, where its input wants a gradient, and where it cannot be captured. The kernels and
    their results are the same; the backward pass is recorded under the forward pass's autocast.

    A graph keeps its memory: what the network returns is overwritten by its next call, and the gradients, all parts of
    one tensor (:func:`flat_gradient`), by the next backward pass, which adds to those that are still there. A backward
    pass belongs to the last call. Hooks that are given to a parameter after the capture are not called.
    """

    MAX_GRAPHS = 3

    def __init__(self) -> None:
        super().__init__()
        self._graphs: dict[tuple[Any, ...], Callable[[Tensor], Tensor]] = {}

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Run the network on ``inputs`` ``(B, 2, H, W)``."""
        graphed = (
            inputs.is_cuda
            and not inputs.requires_grad
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
            if key in self._graphs and _outdated(self._graphs[key]):
                del self._graphs[key]  # its memory is free for the next
            if key not in self._graphs:
                self._graphs[key] = captured(network, inputs)
            return self._graphs[key](inputs)


def _outdated(run: Callable[[Tensor], Tensor]) -> bool:
    return isinstance(run, Graphs) and run.outdated()


def flat_gradient(parameters: Sequence[nn.Parameter]) -> Tensor | None:
    """The one tensor ``(N,)`` of which the gradients of all these parameters are parts, or None if there is no such."""
    gradients = [parameter.grad for parameter in parameters if parameter.requires_grad]
    base = gradients[0]._base if gradients and gradients[0] is not None else None
    if base is None or any(gradient is None or gradient._base is not base for gradient in gradients):
        return None
    return base if base.numel() == sum(gradient.numel() for gradient in gradients) else None


def captured(network: nn.Module, inputs: Tensor) -> Callable[[Tensor], Tensor]:
    """The network as CUDA graphs for batches like ``inputs``; where that cannot be, the network, with a warning."""
    expect_other_streams()
    try:
        with capturing(inputs):
            return Graphs(network, inputs)
    except RuntimeError as error:  # an operation that waits for the GPU, for example
        logger.warning("The network cannot be captured as a CUDA graph and runs as it is: %s", error)
        return network


@contextmanager
def capturing(tensor: Tensor) -> Iterator[None]:
    """Where CUDA graphs are recorded on the device of ``tensor``; if that fails, what can be put right in torch is."""
    # A graph that the collector frees meanwhile, one of an earlier network, would end the capture.
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        # A capture that fails would leave its own stream as the current one.
        with torch.cuda.device_of(tensor), torch.cuda.stream(torch.cuda.current_stream() if tensor.is_cuda else None):
            yield
    except RuntimeError:
        forgo_streams()
        _draw_random_numbers_again(tensor.device)
        raise
    finally:
        if collecting:
            gc.enable()


def _draw_random_numbers_again(device: torch.device) -> None:
    """After a capture that failed torch (2.11 at least) refuses to draw any, as if it were still capturing."""
    if device.type == "cuda":
        generator = torch.cuda.default_generators[device.index]
        generator.graphsafe_set_state(generator.clone_state())


class Graphs:
    """Forward and backward pass of a network, recorded once and replayed.

    ``torch.cuda.make_graphed_callables`` does the same, but hands every gradient to autograd, which copies them one by
    one into memory of their own: 230 launches of the host, which the GPU waited for. Here the graph itself gathers them
    in one tensor, of which the parameters' ``grad`` are parts.

    Args:
        network: all its parameters that are trained must have a part in its result, a tensor.
        inputs: `(B, C, H, W)`, a batch like those to come.

    Raises:
        RuntimeError: the network cannot be captured, or a gradient comes for another call than the last.
    """

    def __init__(self, network: nn.Module, inputs: Tensor) -> None:
        self._network = network
        self._inputs = inputs.detach().clone()
        self._all_parameters = list(network.parameters())
        self._captured_state = self._state()
        self._parameters = parameters = [p for p in self._all_parameters if p.requires_grad]
        if not parameters or any(p.dtype != parameters[0].dtype or not p.is_contiguous() for p in parameters):
            raise RuntimeError(
                "its gradients do not fit into one tensor: parameters of one dtype, contiguous, expected"
            )
        with torch.no_grad():
            self._output = network(self._inputs)
        if not isinstance(self._output, Tensor):
            raise RuntimeError(f"its result is a {type(self._output).__name__}, expected a tensor")
        # Not of the graphs' own memory: there a next forward pass may write where a gradient has been.
        self._flat = parameters[0].new_zeros(sum(p.numel() for p in parameters))
        pieces = self._flat.split([p.numel() for p in parameters])
        self._gradients = [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]
        self._output_gradient = torch.zeros_like(self._output)
        self._wants_gradient = self._flat.new_zeros(()).requires_grad_()  # makes autograd call the backward pass
        self._waiting: object = None  # the last call, as long as its backward pass has not run
        self._replay_forward, self._replay_backward = recorded((self._forward, self._backward))

    def outdated(self) -> bool:
        """Whether a parameter has been frozen, unfrozen or moved since the capture."""
        return self._state() != self._captured_state

    def _state(self) -> list[tuple[bool, int]]:
        return [(p.requires_grad, p.data_ptr()) for p in self._all_parameters]

    def __call__(self, inputs: Tensor) -> Tensor:
        return _Replayed.apply(inputs, self._wants_gradient, self)

    def _forward(self) -> None:
        self._output = self._network(self._inputs)

    def _backward(self) -> None:
        gradients = torch.autograd.grad(self._output, self._parameters, self._output_gradient)
        torch.cat([gradient.reshape(-1) for gradient in gradients], out=self._flat)
        self._output = self._output.detach()  # nothing of one pass, on another stream perhaps, is left for the next

    def forward(self, inputs: Tensor) -> tuple[Tensor, object]:
        """The result, and what stands for this call."""
        self._inputs.copy_(inputs)
        self._replay_forward()
        self._waiting = call = object()
        return self._output.detach(), call

    def backward(self, output_gradient: Tensor, call: object) -> None:
        """Sets the parameters' gradients, or adds to those that are there."""
        if call is not self._waiting:
            raise RuntimeError(
                "a network that runs as CUDA graphs can be differentiated once a call, before it is called again"
            )
        self._waiting = None
        earlier = [parameter.grad for parameter in self._parameters]
        earlier = [None if gradient is None else gradient.clone() for gradient in earlier]  # may be parts of the tensor
        self._output_gradient.copy_(output_gradient)
        self._replay_backward()
        for parameter, gradient, before in zip(self._parameters, self._gradients, earlier, strict=True):
            parameter.grad = gradient if before is None else gradient.add_(before)


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, inputs: Tensor, wants_gradient: Tensor, graphs: Graphs) -> Tensor:
        output, ctx.call = graphs.forward(inputs)
        ctx.graphs = graphs
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, output_gradient: Tensor) -> tuple[None, None, None]:
        ctx.graphs.backward(output_gradient, ctx.call)
        return None, None, None


def recorded(work: Sequence[Callable[[], None]]) -> list[Callable[[], None]]:
    """Each piece of work as a CUDA graph's ``replay``; they follow one another and share memory."""
    torch.cuda.synchronize()
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(WARM_UP_PASSES):
                for piece in work:
                    piece()
    finally:
        torch.cuda.synchronize()  # after an error too: the caller may put right what the work has changed
    pool = torch.cuda.graph_pool_handle()
    graphs = [torch.cuda.CUDAGraph() for _ in work]
    for graph, piece in zip(graphs, work, strict=True):
        with torch.cuda.graph(graph, pool=pool):
            piece()
    return [graph.replay for graph in graphs]
