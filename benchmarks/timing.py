"""What the benchmarks share: medians of interleaved runs, what a machine can do at most, Markdown tables."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from monai.inferers import SimpleInferer
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from glmamba_monai.engines import GraphInferer
from glmamba_monai.ops import backend_report, format_backend_report, keep_freed_memory
from glmamba_monai.ops.backends import OPERATIONS

MIN_RUNS, MAX_RUNS = 3, 100
SFU_A_CLOCK = 16  # results of the special-function units of one multiprocessor a clock, on every chip since 2016
MIB = 2**20


class Stopwatch:
    """Times calls on one device.

    On CUDA with events. Before each run the GPU reads a buffer far larger than its L2 cache, outside the timed region:
    no run finds its inputs in the cache, and the host has time to launch.

    Args:
        device: cpu or cuda.
        seconds: time spent on each call, in at least 3 runs and at most 100.
        threads: CPU threads.
        head_start: how often the buffer is read, a third of a millisecond each on an H100. A call that the host
            launches within that time is timed as it runs in a CUDA graph, without waiting for the host.
    """

    def __init__(self, device: str, seconds: float, threads: int, head_start: int = 1) -> None:
        self.device, self.seconds, self.threads, self.head_start = device, seconds, threads, head_start
        torch.set_num_threads(threads)
        keep_freed_memory(device)  # as the bundle does
        self._flush = torch.zeros(256 * MIB, device=device) if device == "cuda" else None  # 1 GiB

    def medians(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """Median seconds of every call after one to warm up; runs of all of them in turn, so that they see the same
        machine."""
        for call in calls.values():
            call()
        times: dict[str, list[float]] = {name: [] for name in calls}
        while left := [name for name, spent in times.items() if self._wants_more(spent)]:
            for name in left:
                times[name].append(self._time(calls[name]))
        return {name: statistics.median(spent) for name, spent in times.items()}

    def _wants_more(self, spent: list[float]) -> bool:
        return len(spent) < MIN_RUNS or (sum(spent) < self.seconds and len(spent) < MAX_RUNS)

    def _time(self, call: Callable[[], object]) -> float:
        if self._flush is None:
            return Timer("call()", globals={"call": call}, num_threads=self.threads).timeit(1).mean
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        for _ in range(self.head_start):
            self._flush.sum()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    def copy_bandwidth(self) -> float:
        """Bytes a second, read and written, of a copy."""
        source = torch.rand((512 if self.device == "cuda" else 32) * MIB, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.medians({"copy": lambda: target.copy_(source)})["copy"]

    def exponentials(self) -> float:
        """Exponentials a second of the special-function units of a GPU at its highest clock; 0 if unknown."""
        if self.device != "cuda":
            return 0.0
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return SFU_A_CLOCK * properties.multi_processor_count * 1000.0 * _clock_khz(properties)


def _clock_khz(properties: Any) -> float:
    if hasattr(properties, "clock_rate"):
        return properties.clock_rate
    try:  # older releases of torch do not tell, triton does
        from triton.runtime import driver

        return driver.active.utils.get_device_properties(torch.cuda.current_device())["sm_clock_rate"]
    except ImportError:
        return 0.0


def allow_tf32() -> None:
    """Let CUDA use its matrix units for float32."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True


def available_backends(op: str, device: str) -> list[str]:
    """The backends of an operation that can run on a device type, the preferred one first."""
    available = backend_report()[op]["available"]
    return [b.name for b in OPERATIONS[op].backends if device in b.runs_on and b.name in available]


def reference_backends(device: str) -> tuple[str, dict[str, str]]:
    """What the network is compared with, in words, and its backend of every operation; no words if it is not there."""
    name, modules = "PyTorch's own operations", dict.fromkeys(OPERATIONS, "torch")
    if device == "cuda":
        name = "mamba-ssm + torchvision"
        modules |= {"ss2d_scan": "mamba_ssm", "deform_conv2d": "torchvision"}
    there = all(backend in available_backends(op, device) for op, backend in modules.items())
    return (name if there else ""), modules


@contextmanager
def forced(modules: Mapping[str, str]) -> Iterator[None]:
    """Let these backends run their operations, as their environment variables would; cheap enough to be timed."""
    before = {OPERATIONS[op].variable: os.environ.get(OPERATIONS[op].variable) for op in modules}
    os.environ.update({OPERATIONS[op].variable: name for op, name in modules.items()})
    try:
        yield
    finally:
        for variable, value in before.items():
            del os.environ[variable]
            if value is not None:
                os.environ[variable] = value


# --- networks ----------------------------------------------------------------------------------------------------


class Training:
    """A network in training, on one batch of random slices.

    Args:
        network: on the batch's device.
        loss: of the output and the batch.
        batch: `(B, C, H, W)`.
        bf16: under bfloat16 autocast.
        graph: as CUDA graphs, of the forward pass alone and of the training step as the bundle makes them.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        batch: Tensor,
        bf16: bool = False,
        graph: bool = False,
    ) -> None:
        self.network, self.loss, self.batch = network, loss, batch
        # As in the bundle; a graph could not keep casts of the weights.
        self.autocast = torch.autocast(batch.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)
        self.infer = GraphInferer() if graph else SimpleInferer()
        self.forward = self._captured_forward() if graph else self._forward
        self.optimizer = torch.optim.Adam(network.parameters(), fused=batch.is_cuda)

    @torch.no_grad()
    def _forward(self) -> None:
        with self.autocast:
            self.network(self.batch)

    def _captured_forward(self) -> Callable[[], None]:
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._forward()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            self._forward()
        return graph.replay

    def _loss(self) -> Tensor:
        self.optimizer.zero_grad()
        with self.autocast:
            return self.loss(self.infer(self.batch, self.network), self.batch)

    def step(self) -> None:
        """Forward, loss, backward and optimiser step."""
        self._loss().backward()
        self.optimizer.step()

    def memory(self) -> tuple[int, int]:
        """Bytes on the GPU: the peak of a step, with the network and the optimiser; what the forward pass keeps."""
        self.step()  # makes the optimiser's state, chooses kernels
        self.optimizer.zero_grad()
        fixed = (*self.network.parameters(), *self.network.buffers(), self.batch)
        state = (x for values in self.optimizer.state.values() for x in values.values() if x.is_cuda)
        own = sum(x.nbytes for x in (*fixed, *state))
        before = torch.cuda.memory_allocated()
        loss = self._loss()
        kept = torch.cuda.memory_allocated() - before
        del loss
        torch.cuda.reset_peak_memory_stats()
        self.step()
        return torch.cuda.max_memory_allocated() - before + own, kept


# --- what is printed ---------------------------------------------------------------------------------------------


def print_heading(stopwatch: Stopwatch, details: str) -> None:
    """Date, machine, versions, how it was measured and which backends run."""
    machine = f"{platform.machine()} CPU, {stopwatch.threads} threads"
    if stopwatch.device == "cuda":
        machine = torch.cuda.get_device_name()
    others = (f"{name} {_version(name)}" for name in ("triton", "torchvision", "mamba_ssm"))
    print(f"{date.today()}, {machine}, torch {torch.__version__}, {', '.join(others)}. {details}")
    print(f"Medians of {MIN_RUNS} to {MAX_RUNS} runs, {stopwatch.seconds:g} s each.\n\n```", flush=True)
    print(f"{format_backend_report()}\n```", flush=True)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def print_table(*columns: str) -> None:
    """The head of a Markdown table; numbers, to the right, in all columns but the first."""
    print()
    print_row(*columns)
    print_row("---", *["---:"] * (len(columns) - 1))


def print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def milliseconds(seconds: float) -> str:
    """A time without its unit."""
    return f"{1000 * seconds:.3g}" if seconds < 1 else f"{1000 * seconds:.0f}"


def ratio(a: float, b: float) -> str:
    """How many times ``b`` is ``a``."""
    return f"{a / b:.2g}x" if a < 99 * b else f"{a / b:.0f}x"


def numbers(values: object) -> list[int]:
    """What fire makes of ``4`` or ``1,4,32`` on a command line."""
    return [int(v) for v in (values if isinstance(values, (list, tuple)) else str(values).split(","))]


def names(values: object) -> list[str]:
    """What fire makes of ``a`` or ``a,b`` on a command line."""
    return [str(v) for v in (values if isinstance(values, (list, tuple)) else str(values).split(","))]
