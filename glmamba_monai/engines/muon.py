"""An optimiser: for matrices a momentum whose singular values are made equal, Adam for all other parameters."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from glmamba_monai.engines.graphs import capturing, recorded
from glmamba_monai.engines.plan import trainable_parameters

logger = logging.getLogger(__name__)

MIN_SIDE = 4  # rows and columns from which on a weight counts as a matrix
UPDATE_SIZE = 0.6  # about the root mean square of a matrix's update, in learning rates
# The iteration of Newton and Schulz with the coefficients of Muon's author (K. Jordan, 2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def as_matrices(parameter: Tensor) -> Tensor:
    """A weight as matrices ``(..., M, N)``: that of a convolution as ``(out, in * height * width)``."""
    return parameter.flatten(1) if parameter.ndim > 3 else parameter


def parameter_groups(network: nn.Module, name: str) -> list[dict[str, Any]]:
    """The parameters of a network for :class:`Muon`: first the matrices, then all else, without those that are frozen.

    Matrices are what mixes many channels into many. The others are vectors, depthwise convolutions, those from or to
    fewer than `MIN_SIDE` maps, and ``A_log``, which holds a number for each channel and state.

    Raises:
        ValueError: the network, called ``name``, has no parameters.
    """
    trainable_parameters(network, name)  # refuses such a network
    groups: list[dict[str, Any]] = [{"params": [], "matrices": True}, {"params": [], "matrices": False}]
    for path, parameter in network.named_parameters():
        sides = parameter.shape[-2:] if parameter.ndim == 3 else parameter.shape[:2]  # three: a stack of matrices
        is_matrix = parameter.ndim > 1 and min(sides) >= MIN_SIDE and path.rpartition(".")[2] != "A_log"
        if parameter.requires_grad:
            groups[0 if is_matrix else 1]["params"].append(parameter)
    return groups


def orthogonalized(matrices: Tensor) -> Tensor:
    """Matrices ``(B, M, N)``, ``M <= N``, with their singular vectors and with singular values around 1 (0.7 to 1.2).

    Below a thousandth of the matrix's norm a singular value only grows, up to 485 times. Rows and columns of zeros
    change nothing and stay, so smaller matrices may be filled up. In bfloat16 on a GPU, whatever the network runs in.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # no singular value above 1
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum (Muon) for the matrices of a network, Adam for its other parameters.

    ``torch.optim.Muon`` does the same for matrices alone and one by one, thousands of launches a step for `glmamba`;
    here the matrices are orthogonalised in a few stacks (:class:`Stacks`), on a GPU by a CUDA graph: one launch. (Not
    in a distributed training: a capture can fail beside the operations of all processes.)

    Args:
        params: the groups that :func:`parameter_groups` makes.
        lr: learning rate of Adam; the update of a matrix has a root mean square of about `UPDATE_SIZE` times this rate.
        momentum: of the matrices, looking ahead as Nesterov's does.
        betas: of Adam.
        fused: Adam's update as one kernel.

    Raises:
        ValueError: ``params`` are other groups.
    """

    def __init__(
        self,
        params: Sequence[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        fused: bool = False,
    ) -> None:
        found = [group.get("matrices") if isinstance(group, dict) else None for group in params]
        if found != [True, False]:
            raise ValueError(f"params: found groups with matrices={found}, expected those of parameter_groups(network)")
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self._adam = torch.optim.Adam(self.param_groups[1:], lr, betas=betas, fused=fused)
        self._stacks = Stacks(self.param_groups[0]["params"])
        self._recorded: RecordedUpdate | None = None
        self._recordable = True

    def __getstate__(self) -> dict[str, Any]:
        ours = {"_adam": self._adam, "_stacks": self._stacks, "_recorded": None, "_recordable": self._recordable}
        return {**super().__getstate__(), **ours}  # torch's leaves them out, and a graph cannot be copied

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update all parameters.

        Raises:
            ValueError: a closure was given, or a matrix has no gradient.
        """
        if closure is not None:
            raise ValueError("closure: found one, expected None")
        matrices, _ = self.param_groups
        if matrices["params"]:
            self._step_matrices(matrices["params"], matrices["lr"], matrices["momentum"])
        # Both are replaced by others when a state is loaded.
        self._adam.param_groups, self._adam.state = self.param_groups[1:], self.state
        self._adam.step()

    def _step_matrices(self, parameters: Sequence[nn.Parameter], lr: float, momentum: float) -> None:
        for parameter in parameters:
            if parameter.grad is None:
                raise ValueError(f"a matrix of shape {list(parameter.shape)}: found no gradient, expected one")
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters]
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]

        def update(gradients: Sequence[Tensor], lr: float | Tensor) -> None:
            torch._foreach_lerp_(momenta, gradients, 1 - momentum)
            ahead = torch._foreach_lerp(gradients, momenta, momentum)
            torch._foreach_sub_(parameters, self._stacks.orthogonalized(ahead, lr))

        run = update
        if not parameters[0].is_cuda or (dist.is_available() and dist.is_initialized()):
            self._recorded = None  # what it reads on the GPU may go
        elif self._recordable:
            kept = [*parameters, *momenta]
            key = (momentum, *(tensor.data_ptr() for tensor in kept))  # others, if they were moved or a state loaded
            if self._recorded is None or self._recorded.key != key:
                self._recorded = None  # its memory is free for the next
                try:
                    self._recorded = RecordedUpdate(update, kept, gradients, key)
                except RuntimeError as error:
                    self._recordable = False
                    logger.warning("The update of the matrices cannot be captured as a CUDA graph: %s", error)
            run = self._recorded or update
        run(gradients, lr)


class RecordedUpdate:
    """An update by gradients and a learning rate as a CUDA graph: one launch of the host in place of some seventy.

    Args:
        update: changes tensors in place, by gradients and a rate.
        kept: these tensors.
        like: gradients like those to come.
        key: what the update depends on otherwise.

    Raises:
        RuntimeError: the update cannot be captured; ``kept`` are as they were before.
    """

    def __init__(
        self,
        update: Callable[[Sequence[Tensor], Tensor], None],
        kept: Sequence[Tensor],
        like: Sequence[Tensor],
        key: tuple[float, ...],
    ) -> None:
        self.key = key
        self._gradients = [torch.zeros_like(gradient) for gradient in like]
        self._rate = torch.zeros((), device=like[0].device)
        before = [tensor.clone() for tensor in kept]
        try:
            with capturing(like[0]):
                (self._replay,) = recorded([lambda: update(self._gradients, self._rate)])
        finally:
            torch._foreach_copy_(kept, before)  # it has run for warming up

    def __call__(self, gradients: Sequence[Tensor], rate: float) -> None:
        torch._foreach_copy_(self._gradients, gradients)
        self._rate.fill_(rate)
        self._replay()


class Stacks:
    """Where the matrices of all parameters lie in few stacks ``(B, M, N)``, filled up with zeros.

    In a stack are those whose width is within a factor of two: few launches count for more than few numbers.

    Args:
        parameters: see :func:`as_matrices`.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._shapes = [parameter.shape for parameter in parameters]
        self._sizes = [parameter.numel() for parameter in parameters]
        # Every element has a number, and the matrices of these numbers are put into stacks, wide ones first.
        matrices, scales = [], []
        for parameter, numbers in zip(parameters, torch.arange(sum(self._sizes)).split(self._sizes), strict=True):
            rows, columns = as_matrices(parameter).shape[-2:]
            stack = numbers.view(-1, rows, columns)
            matrices += stack if rows <= columns else stack.mT
            scales.append(torch.full_like(numbers, UPDATE_SIZE * max(rows, columns) ** 0.5, dtype=torch.float32))
        groups: list[list[Tensor]] = []
        for matrix in sorted(matrices, key=lambda matrix: matrix.shape[1], reverse=True):
            if not groups or 2 * matrix.shape[1] < groups[-1][0].shape[1]:
                groups.append([])
            groups[-1].append(matrix)
        self._numbers = [self._filled_up(group, fill=sum(self._sizes)) for group in groups]
        # Of each element, and in the end of a zero, its place in the stacks, which lie one behind another.
        self._places = torch.empty(sum(self._sizes) + 1, dtype=torch.long)
        flat = torch.cat([torch.empty(0, dtype=torch.long), *(stack.flatten() for stack in self._numbers)])
        self._places[flat] = torch.arange(len(flat))
        self._places = self._places[:-1]
        self._scales = torch.cat(scales) if scales else torch.empty(0)

    @staticmethod
    def _filled_up(matrices: Sequence[Tensor], fill: int) -> Tensor:
        rows, columns = (max(matrix.shape[side] for matrix in matrices) for side in (0, 1))
        stack = torch.full((len(matrices), rows, columns), fill)
        for filled, matrix in zip(stack, matrices, strict=True):
            filled[: matrix.shape[0], : matrix.shape[1]] = matrix
        return stack

    def orthogonalized(self, updates: Sequence[Tensor], rate: float | Tensor) -> list[Tensor]:
        """The updates of all parameters orthogonalised, their root mean square about `UPDATE_SIZE` rates at full rank.

        The rate may be a tensor `()`, so that a CUDA graph can take another one in every step.
        """
        flat = torch.cat([*(update.reshape(-1) for update in updates), updates[0].new_zeros(1)])  # 0: what is filled up
        if self._places.device != flat.device:
            self._places, self._scales, *self._numbers = (
                tensor.to(flat.device) for tensor in (self._places, self._scales, *self._numbers)
            )
        stacks = [orthogonalized(flat[numbers]).flatten() for numbers in self._numbers]
        result = torch.cat(stacks)[self._places] * (self._scales * rate)
        return [part.view(shape) for part, shape in zip(result.split(self._sizes), self._shapes, strict=True)]
