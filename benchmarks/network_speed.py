"""Networks against themselves on mamba-ssm and torchvision, and against plain convolutions of as many multiply-adds.

python benchmarks/network_speed.py --device cuda --batch 1,4,32
python benchmarks/network_speed.py --device cpu --threads 2
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import fire
import torch
from timing import (
    Stopwatch,
    Training,
    allow_tf32,
    forced,
    milliseconds,
    names,
    numbers,
    print_heading,
    print_row,
    print_table,
    ratio,
    reference_backends,
)
from torch import nn

from glmamba_monai.losses import GLMambaLoss
from glmamba_monai.networks import build_network
from glmamba_monai.networks.cost import count_cost

CHANNELS, DEPTH = 96, 4  # of the plain convolutions


def plain_convolutions(batch: int, size: int, bf16: bool, channels_last: bool, device: str) -> Training:
    """A stack of 3x3 convolutions; its batch wants a gradient, so that the first layer does as much as the others."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    stack = nn.Sequential(*(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(DEPTH)))
    features = torch.rand(batch, CHANNELS, size, size, device=device).to(memory_format=layout).requires_grad_()
    return Training(stack.to(device, memory_format=layout), lambda y, _: y.square().mean(), features, bf16)


def plain_macs(size: int) -> int:
    """Multiply-adds of :func:`plain_convolutions` for one slice."""
    return DEPTH * 9 * CHANNELS**2 * size**2


def network_training(name: str, batch: int, size: int, bf16: bool, device: str, graph: bool = False) -> Training:
    """A registered network with its loss and a batch of random slices."""
    slices = torch.rand(batch, 2, size, size, device=device)
    return Training(build_network(name).to(device), GLMambaLoss().to(device), slices, bf16, graph)


def print_speed(stopwatch: Stopwatch, network_names: list[str], batches: list[int], size: int) -> None:
    """Milliseconds a slice, forward and training step."""
    device = stopwatch.device
    reference, modules = reference_backends(device)
    compared = ["launched one by one (ms, over it)"] if device == "cuda" else []
    compared += [f"on {reference} (ms, over it)"] if reference else []
    here = "here, as a CUDA graph" if device == "cuda" else "here"
    print_table("ms a slice", "pass", here, *compared, "convolutions of as many multiply-adds (ms, here over them)")
    for batch in batches:
        for bf16 in (False, True) if device == "cuda" else (False,):
            for name in network_names:
                share = count_cost(build_network(name), size, size).macs / plain_macs(size)
                training = network_training(name, batch, size, bf16, device)
                graph = network_training(name, batch, size, bf16, device, True) if device == "cuda" else training
                stacks = [plain_convolutions(batch, size, bf16, last, device) for last in (False, True)]
                for label in ("forward", "step"):
                    calls: dict[str, Callable[[], object]] = {"here": getattr(graph, label)}
                    if graph is not training:
                        calls["launched"] = getattr(training, label)
                    if reference:
                        calls["reference"] = forced(modules)(getattr(training, label))
                    calls |= {f"plain {i}": getattr(stack, label) for i, stack in enumerate(stacks)}
                    times = {key: seconds / batch for key, seconds in stopwatch.medians(calls).items()}
                    here, plain = times["here"], share * min(times["plain 0"], times["plain 1"])
                    cells = [
                        f"{milliseconds(times[key])} ({ratio(times[key], here)})"
                        for key in ("launched", "reference")
                        if key in times
                    ]
                    cells.append(f"{milliseconds(plain)} ({ratio(here, plain)})")
                    title = f"{name}, batch {batch}, {'bf16 autocast' if bf16 else 'fp32'}"
                    print_row(title, "training step" if label == "step" else label, milliseconds(here), *cells)


def print_memory(network_names: list[str], batches: list[int], size: int) -> None:
    """Gigabytes of a training step on the GPU."""
    reference, modules = reference_backends("cuda")
    columns = ["peak (GB)", "kept by the forward pass (GB)"]
    on_reference = [f"on {reference}: {column}" for column in columns] if reference else []
    print_table("memory of a training step", *columns, *on_reference)
    for batch in batches:
        for bf16 in (False, True):
            for name in network_names:
                cells: list[str] = []
                for context in (nullcontext(), *([forced(modules)] if reference else [])):
                    with context:
                        used = network_training(name, batch, size, bf16, "cuda").memory()
                    cells += [f"{value / 1e9:.2f}" for value in used]
                print_row(f"{name}, batch {batch}, {'bf16 autocast' if bf16 else 'fp32'}", *cells)


def main(
    networks: str = "glmamba,glmamba_light,srcnn_ref",
    batch: int | tuple[int, ...] | None = None,
    size: int = 240,
    seconds: float = 0.5,
    threads: int = torch.get_num_threads(),
    device: str = "cpu",
) -> None:
    """Print Markdown tables.

    Args:
        networks: registered names, separated by commas.
        batch: slices at once, one or several numbers; 4 on cuda, 1 on cpu by default.
        size: side of the square slice in pixels.
        seconds: time spent on each figure.
        threads: CPU threads.
        device: cpu or cuda.
    """
    allow_tf32()
    stopwatch = Stopwatch(device, seconds, threads)
    batches = numbers(batch if batch is not None else 4 if device == "cuda" else 1)
    print_heading(stopwatch, f"{size}x{size}, tf32 allowed in fp32; a training step is forward, loss, backward, Adam.")
    if not reference_backends(device)[0]:
        print("\nLeft out: the same network on mamba-ssm + torchvision, which are not both here.")
    print_speed(stopwatch, names(networks), batches, size)
    if device == "cuda":
        del stopwatch
        print_memory(names(networks), batches, size)


if __name__ == "__main__":
    fire.Fire(main)
