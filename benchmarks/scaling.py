"""Cost of a network as the image grows (it must stay linear in the pixels) and as the batch grows.

python benchmarks/scaling.py --device cuda
python benchmarks/scaling.py --device cpu --threads 2 --sizes 60,120,240 --batches 1,2
"""

from __future__ import annotations

from collections.abc import Iterable

import fire
import torch
from network_speed import network_training
from timing import Stopwatch, allow_tf32, milliseconds, numbers, print_heading, print_row, print_table

REFERENCE_SIZE = 240


def slice_seconds(stopwatch: Stopwatch, network: str, batch: int, size: int, bf16: bool) -> tuple[float, float] | None:
    """Seconds a slice, forward and training step; None if they need more memory than there is."""
    try:
        training = network_training(network, batch, size, bf16, stopwatch.device, graph=stopwatch.device == "cuda")
        times = stopwatch.medians({"forward": training.forward, "step": training.step})
    except torch.OutOfMemoryError:
        return None
    return times["forward"] / batch, times["step"] / batch


def print_growth(
    stopwatch: Stopwatch, network: str, cases: Iterable[tuple[int, int]], reference: tuple[int, int], bf16: bool
) -> None:
    """One row for each (batch, size), the reference first; time a pixel relative to the reference's."""
    print_table(
        f"{network}, {'bf16 autocast' if bf16 else 'fp32'}",
        "forward (ms a slice)",
        "a pixel, relative",
        "training step (ms a slice)",
        "a pixel, relative",
    )
    first: list[float] = []
    for batch, size in (reference, *(case for case in cases if case != reference)):
        title = f"batch {batch}, {size}x{size}"
        seconds = slice_seconds(stopwatch, network, batch, size, bf16)
        if seconds is None:
            print_row(title, *["out of memory"] * 4)
            continue
        first = first or [s / reference[1] ** 2 for s in seconds]
        cells = ((milliseconds(s), f"{s / size**2 / unit:.2f}") for s, unit in zip(seconds, first))
        print_row(title, *(text for cell in cells for text in cell))


def main(
    network: str = "glmamba",
    sizes: tuple[int, ...] | None = None,
    batches: tuple[int, ...] | None = None,
    bf16: bool = False,
    seconds: float = 0.5,
    threads: int = torch.get_num_threads(),
    device: str = "cpu",
) -> None:
    """Print two Markdown tables: growing images at the first batch size, growing batches at 240x240.

    Args:
        network: registered name.
        sizes: sides of the square slices in pixels; 120,240,480,960 on cuda, 48,96,192 on cpu by default.
        batches: slices at once; 1,2,4,8,16,32 on cuda, 1,2,4 on cpu by default.
        bf16: under bfloat16 autocast.
        seconds: time spent on each figure.
        threads: CPU threads.
        device: cpu or cuda.
    """
    allow_tf32()
    stopwatch = Stopwatch(device, seconds, threads)
    sides = numbers(sizes or ((120, 240, 480, 960) if device == "cuda" else (48, 96, 192)))
    counts = numbers(batches or ((1, 2, 4, 8, 16, 32) if device == "cuda" else (1, 2, 4)))
    side = REFERENCE_SIZE if REFERENCE_SIZE in sides else sides[0]
    reference = (counts[0], side)
    print_heading(stopwatch, "tf32 allowed in fp32; a training step is forward, loss, backward, Adam.")
    print_growth(stopwatch, network, [(counts[0], s) for s in sides], reference, bf16)
    print_growth(stopwatch, network, [(b, side) for b in counts], reference, bf16)


if __name__ == "__main__":
    fire.Fire(main)
