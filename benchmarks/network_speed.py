"""Seconds a slice of every network, against one plain 3x3 convolution of 96 to 96 channels measured in the same run.

python benchmarks/network_speed.py --device cpu --threads 2
python benchmarks/network_speed.py --device cuda --batch 4 --runs 20
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable
from datetime import date

import fire
import torch
from torch import nn
from torch.utils.benchmark import Timer

from glmamba_monai.losses import GLMambaLoss
from glmamba_monai.networks import build_network
from glmamba_monai.ops import format_backend_report


def median_seconds(call: Callable[[], object], runs: int, threads: int) -> float:
    """Median over ``runs`` calls, after one to warm up; waits for the GPU."""
    timer = Timer("call()", globals={"call": call}, num_threads=threads)
    timer.timeit(1)
    return statistics.median(timer.timeit(1).mean for _ in range(runs))


def main(
    networks: str = "glmamba,glmamba_light,srcnn_ref",
    size: int = 240,
    batch: int = 1,
    runs: int = 5,
    threads: int = torch.get_num_threads(),
    device: str = "cpu",
) -> None:
    """Print a Markdown table.

    Args:
        networks: registered names, separated by commas.
        size: side of the square slice in pixels.
        batch: slices at once.
        runs: timed calls; the median counts.
        threads: CPU threads.
        device: cpu or cuda.
    """
    networks = networks if isinstance(networks, str) else ",".join(networks)
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, {threads} threads"
    print(f"{date.today()}, {machine}, torch {torch.__version__}, {size}x{size}, batch {batch}, median of {runs}")
    print(f"\n{format_backend_report()}\n")
    x = torch.rand(batch, 2, size, size, device=device)

    plain = nn.Conv2d(96, 96, 3, padding=1).to(device)
    features = torch.rand(batch, 96, size, size, device=device, requires_grad=True)
    with torch.no_grad():
        forward = median_seconds(lambda: plain(features), runs, threads) / batch
    step = median_seconds(lambda: plain(features).square().mean().backward(), runs, threads) / batch

    print("| | forward (s a slice) | over the convolution | forward + backward (s a slice) | over the convolution |")
    print("| --- | ---: | ---: | ---: | ---: |")
    print(f"| one 3x3 convolution, 96 to 96 | {forward:.3g} | 1 | {step:.3g} | 1 |", flush=True)
    for name in networks.split(","):
        network, loss = build_network(name).to(device), GLMambaLoss().to(device)
        with torch.no_grad():
            seconds = median_seconds(lambda n=network: n(x), runs, threads) / batch
        training = median_seconds(lambda n=network, f=loss: f(n(x), x).backward(), runs, threads) / batch
        print(
            f"| {name} | {seconds:.3g} | {seconds / forward:.0f} | {training:.3g} | {training / step:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    fire.Fire(main)
