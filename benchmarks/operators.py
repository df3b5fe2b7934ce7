"""The two operations against mamba-ssm, torchvision and their PyTorch forms, and against what the machine can do.

python benchmarks/operators.py --device cuda
python benchmarks/operators.py --device cpu --threads 2
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import fire
import torch
import torch.nn.functional as F
from timing import (
    Stopwatch,
    allow_tf32,
    available_backends,
    milliseconds,
    names,
    numbers,
    print_heading,
    print_row,
    print_table,
    ratio,
)
from torch import Tensor

from glmamba_monai.ops.deform_conv import deform_conv2d
from glmamba_monai.ops.selective_scan import selective_scan
from glmamba_monai.ops.ss2d import ss2d_scan

K = 4  # directions of the scan
HEAD_START = 10  # 3 ms: more than the host takes to launch any of the operators


@dataclass(frozen=True)
class Case:
    """One size of an operation; ``states`` and ``local`` are those of the scan."""

    batch: int
    channels: int
    side: int
    states: int = 0
    local: bool = False
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        states = f" K{K} D{self.channels} N{self.states}" if self.states else f" C{self.channels}"
        precision = "bf16" if self.dtype == torch.bfloat16 else "fp32"
        return f"B{self.batch}{states} {self.side}x{self.side}{' quadrants' if self.local else ''} {precision}"


@dataclass(frozen=True)
class Candidate:
    """One way to compute an operation.

    Attributes:
        function: takes the inputs.
        inputs: floating-point tensors; the backward pass differentiates by all of them.
    """

    function: Callable[..., Tensor]
    inputs: list[Tensor]


def scan_candidates(case: Case, device: str) -> dict[str, Candidate]:
    """The map scan; `mamba_ssm` and the torch form prepare four sequences first, the prepared ones are spared that."""
    random = partial(torch.randn, device=device, dtype=case.dtype)
    b, side, d, n = case.batch, case.side, case.channels, case.states
    A = -torch.arange(1.0, n + 1, device=device).expand(K, d, n).contiguous()
    D, bias = torch.ones(K, d, device=device), torch.full((K, d), -4.0, device=device)
    maps = [random(b, side, side, d), random(b, side, side, K, d), A]
    maps += [random(b, side, side, K, n), random(b, side, side, K, n), D, bias]
    found = {
        name: Candidate(partial(ss2d_scan, local=case.local, backend=name), maps)
        for name in available_backends("ss2d_scan", device)
    }

    if case.local:
        b, side = 4 * b, side // 2
    length = side * side
    sequences = [random(b, K * d, length), random(b, K * d, length), A.flatten(0, 1)]
    sequences += [random(b, K, n, length), random(b, K, n, length), D.flatten(), bias.flatten()]
    if "mamba_ssm" in found:
        scan = partial(selective_scan, delta_softplus=True, backend="mamba_ssm")
        found["mamba_ssm on prepared sequences"] = Candidate(scan, sequences)
    if device == "cpu":
        found["unbind loop on prepared sequences"] = Candidate(unbind_scan, sequences)
    return found


def unbind_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor) -> Tensor:
    """:func:`selective_scan` as a plain loop over the steps."""
    k = B.shape[1]
    dt = F.softplus(delta + delta_bias[:, None])
    # Steps first and channels last, so that one step's values lie together, in the order of the state (B, K, N, D).
    dt_, u_ = (x.unflatten(1, (k, 1, -1)).movedim(-1, 0).contiguous() for x in (dt, u))  # (L, B, K, 1, D)
    B_, C_ = (x.unsqueeze(-2).movedim(-1, 0).contiguous() for x in (B, C))  # (L, B, K, N, 1)
    A = A.unflatten(0, (k, -1)).transpose(1, 2).contiguous()  # (K, N, D)
    state = u.new_zeros(u.shape[0], *A.shape)
    outputs = []
    for dt_t, u_t, B_t, C_t in zip(dt_.unbind(0), u_.unbind(0), B_.unbind(0), C_.unbind(0)):
        state = torch.exp(dt_t * A) * state + dt_t * u_t * B_t
        outputs.append((state * C_t).sum(2))
    return torch.stack(outputs, -1).flatten(1, 2) + D[:, None] * u


def deform_candidates(case: Case, device: str) -> dict[str, Candidate]:
    """The deformable convolution and, for comparison, the plain one (its faster memory layout counts)."""
    shape = (case.batch, case.channels, case.side, case.side)
    random = partial(torch.randn, device=device, dtype=case.dtype)
    image, offset, mask = (random(shape[0], c, *shape[2:]) for c in (shape[1], 18, 9))
    weight, bias = random(shape[1], shape[1], 3, 3) / (3 * shape[1] ** 0.5), random(shape[1])
    planes = [image, offset, weight, bias, mask.sigmoid()]
    last = [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in planes]

    def deform(backend: str, image: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        return deform_conv2d(image, offset, weight, bias, padding=1, mask=mask, backend=backend)

    found = {
        name: Candidate(partial(deform, name), last)
        for name in available_backends("deform_conv2d", device)
        if name != "torchvision"
    }
    if "torchvision" in available_backends("deform_conv2d", device):
        half = case.dtype == torch.bfloat16  # torchvision's kernels know no bfloat16
        inputs = [x.half() for x in planes] if half else planes
        found["torchvision (fp16 for bf16)"] = Candidate(torchvision_deform, inputs)
    for name, tensors in (("conv2d", planes), ("conv2d channels_last", last)):
        image, _, weight, bias, _ = tensors
        found[name] = Candidate(partial(F.conv2d, padding=1), [image, weight, bias])
    return found


def torchvision_deform(image: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    from torchvision.ops import deform_conv2d

    return deform_conv2d(image, offset, weight, bias, padding=1, mask=mask)


def passes(candidates: dict[str, Candidate], device: str) -> Iterator[tuple[str, dict[str, Callable[[], object]]]]:
    """Name and calls of what is timed: the forward pass and, on CUDA, the backward pass alone.

    On a CPU forward and backward together, since the plain loop keeps gigabytes between them.
    """
    yield "forward", {name: partial(c.function, *c.inputs) for name, c in candidates.items()}
    if device == "cuda":
        yield "backward", {name: backward_call(c) for name, c in candidates.items()}
    else:
        yield "forward + backward", {name: partial(gradients, c) for name, c in candidates.items()}


def backward_call(candidate: Candidate) -> Callable[[], object]:
    """The gradients of all inputs, the forward pass done."""
    inputs = [x.detach().requires_grad_() for x in candidate.inputs]
    y = candidate.function(*inputs)
    return partial(torch.autograd.grad, y, inputs, output_gradient(y), retain_graph=True)


def gradients(candidate: Candidate) -> tuple[Tensor, ...]:
    """The result and the gradient of every input."""
    inputs = [x.detach().requires_grad_() for x in candidate.inputs]
    y = candidate.function(*inputs)
    return (y.detach(), *torch.autograd.grad(y, inputs, output_gradient(y)))


def output_gradient(y: Tensor) -> Tensor:
    """Random, but the same for every candidate; laid out in memory as y."""
    generator = torch.Generator(y.device).manual_seed(0)
    return torch.empty_like(y).copy_(torch.randn(y.shape, device=y.device, generator=generator))


def differences(candidates: dict[str, Candidate]) -> tuple[str, str]:
    """Relative difference of the first candidate's result from the torch form's, and the largest of its gradients'."""
    first = next(iter(candidates))
    if first == "torch":
        return "-", "-"
    results = zip(gradients(candidates[first]), gradients(candidates["torch"]))
    forward, *backward = (float((x.double() - y.double()).norm() / y.double().norm()) for x, y in results)
    return f"{forward:.1e}", f"{max(backward):.1e}"


def floors(case: Case, candidate: Candidate, name: str, bandwidth: float, rate: float) -> list[float]:
    """Seconds that a pass takes at least: for its bytes and, where the rate is known, for a scan's exponentials."""
    read = sum(x.nbytes for x in candidate.inputs)
    written = candidate.function(*candidate.inputs).nbytes
    # The backward pass reads the inputs and the result's gradient and writes the inputs' gradients.
    passes = {"forward": (read + written, 1), "backward": (2 * read + written, 1)}
    passes["forward + backward"] = (3 * read + 2 * written, 2)
    moved, times = passes[name]
    # A decay for every state and step; softplus is an exponential and a logarithm more.
    count = times * case.batch * case.side**2 * K * case.channels * (case.states + 2)
    return [moved / bandwidth, *([count / rate] if rate and case.states else [])]


def print_operation(
    title: str,
    cases: list[Case],
    candidates_of: Callable[[Case, str], dict[str, Candidate]],
    stopwatch: Stopwatch,
    bandwidth: float,
) -> None:
    """The table of one operation."""
    print(f"\n### {title}")
    rate = stopwatch.exponentials()
    for case in cases:
        candidates = candidates_of(case, stopwatch.device)
        first, *others = (name for name in candidates if name != "conv2d channels_last")
        if case is cases[0]:
            limits = [f"{text} (ms, share)" for text in ("floor: bytes", "floor: exponentials")]
            limits = limits[: 2 if rate and case.states else 1]
            columns = [f"{first} (ms)", *limits, *(f"{name} (ms, over {first})" for name in others)]
            print_table("size", "pass", *columns, "relative difference to torch")
        forward, backward = differences(candidates)
        for name, calls in passes(candidates, stopwatch.device):
            times = stopwatch.medians(calls)
            if "conv2d" in times:
                times["conv2d"] = min(times["conv2d"], times["conv2d channels_last"])
            cells = [milliseconds(times[first])]
            for floor in floors(case, candidates[first], name, bandwidth, rate):
                cells.append(f"{milliseconds(floor)} ({floor / times[first]:.0%})")
            cells += [f"{milliseconds(times[other])} ({ratio(times[other], times[first])})" for other in others]
            print_row(str(case), name, *cells, forward if name == "forward" else backward)


def main(
    device: str = "cpu",
    operations: str = "scan,deform",
    batch: int | tuple[int, ...] | None = None,
    side: int = 240,
    channels: int = 96,
    seconds: float = 0.2,
    threads: int = torch.get_num_threads(),
) -> None:
    """Print a Markdown table for each operation, at the sizes it has in a network.

    Args:
        device: cpu or cuda.
        operations: scan, deform or both, separated by a comma.
        batch: slices at once, one or several numbers; the scan's variants are run with the first. 8,1,4 on cuda,
            1 on cpu by default.
        side: of the square slice in pixels; the scan works at half of it.
        channels: of the network; the scan has twice as many.
        seconds: time spent on each figure.
        threads: CPU threads.
    """
    allow_tf32()
    torch.manual_seed(0)
    stopwatch = Stopwatch(device, seconds, threads, HEAD_START)
    batches = numbers(batch if batch is not None else (8, 1, 4) if device == "cuda" else 1)
    bandwidth = stopwatch.copy_bandwidth()
    details = "tf32 allowed in fp32. Floors: each input read and each result written once at the bandwidth of a copy, "
    details += f"{bandwidth / 1e9:.0f} GB/s here"
    if rate := stopwatch.exponentials():
        details += f"; exponentials, one a step and state and two a step, at {rate / 1e12:.3g} T/s"
    print_heading(stopwatch, f"{details}.")
    if "scan" in names(operations):
        full = Case(batches[0], 2 * channels, side // 2, states=16)
        cases = [full, *(replace(full, batch=b) for b in batches[1:]), replace(full, local=True)]
        if device == "cuda":
            cases += [replace(full, channels=channels), replace(full, states=8), replace(full, states=1)]
            cases += [replace(full, dtype=torch.bfloat16)]
        print_operation("Four-direction scan `ss2d_scan`", cases, scan_candidates, stopwatch, bandwidth)
    if "deform" in names(operations):
        cases = [Case(b, channels, side) for b in batches]
        if device == "cuda":
            cases += [replace(case, dtype=torch.bfloat16) for case in cases]
        title = "Modulated deformable convolution `deform_conv2d`, 3x3"
        print_operation(title, cases, deform_candidates, stopwatch, bandwidth)


if __name__ == "__main__":
    fire.Fire(main)
