"""Every kernel for CUDA at small sizes, forward and backward, to be run under NVIDIA's checker of memory accesses.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/sanitize.py
"""

from __future__ import annotations

import time

import fire
import torch
from torch import Tensor

from glmamba_monai.losses import GLMambaLoss
from glmamba_monai.networks import build_network
from glmamba_monai.ops import backend_report, deform_conv2d, format_backend_report, ss2d_scan

DTYPES = (torch.float32, torch.bfloat16)
# Channels, reduction of the attention, batch, H, W: channels that fill their tiles, and others.
SLICES = ((32, 8, 1, 30, 22), (20, 6, 2, 32, 40))
SCANS = (  # D, N, H, W, quadrants: tiles that fill lines, channels and states, and others
    (192, 16, 24, 32, False),
    (192, 16, 24, 32, True),
    (20, 5, 14, 18, False),
    (8, 1, 6, 10, True),
    (96, 8, 40, 40, False),
)
CONVOLUTIONS = ((96, 96, 24, 24), (20, 7, 13, 17))  # channels, results, H, W


def leaf(*shape: int, dtype: torch.dtype = torch.float32, device: str) -> Tensor:
    """Random numbers that want a gradient."""
    return torch.randn(*shape, dtype=dtype, device=device).requires_grad_()


def run_network(
    channels: int, reduction: int, batch: int, height: int, width: int, autocast: bool, device: str
) -> None:
    """A small GLMamba: training step and inference."""
    size = {"channels": channels, "n_mamba": 1, "n_deform": 1, "attention_reduction": reduction, "mix_channels": 8}
    network = build_network("glmamba", **size).to(device)
    for parameter in network.parameters():
        if not parameter.abs().any():  # offsets that are zero would not leave their pixels
            torch.nn.init.normal_(parameter, std=0.1)
    x = torch.rand(batch, 2, height, width, device=device)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        result = network(x)
    GLMambaLoss().to(device)(result.float(), x).backward()
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=autocast):
        network.eval()(x)


def run_scan(channels: int, states: int, height: int, width: int, local: bool, dtype: torch.dtype, device: str) -> None:
    """The scan and its gradients."""
    shapes = ((channels,), (4, channels), (4, states), (4, states))
    u, delta, b, c = (leaf(2, height, width, *shape, dtype=dtype, device=device) for shape in shapes)
    a = (-torch.rand(4, channels, states, device=device)).requires_grad_()
    skip, bias = (leaf(4, channels, device=device) for _ in range(2))
    ss2d_scan(u, delta, a, b, c, skip, bias, local).square().mean().backward()


def run_convolution(channels: int, results: int, height: int, width: int, dtype: torch.dtype, device: str) -> None:
    """The deformable convolution and its gradients, with offsets that leave the map."""
    shapes = ((2, channels, height, width), (2, 18, height, width), (results, channels, 3, 3), (2, 9, height, width))
    x, offset, weight, mask = (leaf(*shape, dtype=dtype, device=device) for shape in shapes)
    deform_conv2d(x, 3 * offset, weight, mask=torch.sigmoid(mask)).square().mean().backward()


def main(device: str = "cuda") -> None:
    """Run them all; a line each.

    Args:
        device: cuda; cpu runs the kernels of the CPU.
    """
    print(format_backend_report())
    others = {op: entry["cuda"] for op, entry in backend_report().items() if entry["cuda"] != "triton"}
    if device == "cuda" and others:
        raise RuntimeError(f"expected Triton's kernels for every operation, but others run: {others}")
    torch.manual_seed(0)
    begin = time.perf_counter()
    cases = [
        *((run_network, (*case, autocast)) for case in SLICES for autocast in (False, True)),
        *((run_scan, (*case, dtype)) for case in SCANS for dtype in DTYPES),
        *((run_convolution, (*case, dtype)) for case in CONVOLUTIONS for dtype in DTYPES),
    ]
    for run, case in cases:
        run(*case, device)
        if device == "cuda":
            torch.cuda.synchronize()  # so that what is found is found here
        print(f"{run.__name__} {case}: {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    fire.Fire(main)
