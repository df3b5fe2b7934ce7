"""Parameters and multiply-adds, counted truly and as the paper counts (docs/method.md, cost)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glmamba_monai.networks.glmamba import (
    SS2D,
    ChannelAttention,
    DeformBlock,
    LateBiasConv2d,
    MultiModalityFusion,
    OffsetsAndMask,
)
from glmamba_monai.networks.registry import NETWORKS, build_network


@dataclass(frozen=True)
class Cost:
    """Cost of one slice.

    Attributes:
        parameters: all of them.
        macs: multiply-adds of every convolution, linear layer, deformable product and SSM projection.
        scan_flops: operations of the selective scans, which are not multiply-adds.
        paper_parameters: parameters inside ``nn.Conv2d``, ``nn.Linear`` and ``nn.LayerNorm``, which is all that the
            paper's tool sees: no raw parameter of the SSM or of the deformable convolution.
        paper_macs: multiply-adds of ``nn.Conv2d`` and ``nn.Linear`` alone.
    """

    parameters: int
    macs: int
    scan_flops: int
    paper_parameters: int
    paper_macs: int


def count_cost(network: nn.Module, height: int = 240, width: int = 240) -> Cost:
    """Count what one slice of ``height x width`` costs; nothing is computed, only shapes are followed."""
    network = copy.deepcopy(network).to("meta").eval()
    totals = {"module": 0, "raw": 0, "scan": 0}

    def count_module(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        if isinstance(module, nn.Conv2d):
            if isinstance(module, LateBiasConv2d):
                output = output[0]  # without the bias
            if isinstance(module, OffsetsAndMask):
                output = output[:, : module.out_channels]  # without those that are made of zeros
            totals["module"] += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            totals["module"] += output.numel() * module.in_features
        elif isinstance(module, SS2D):
            tokens = output.shape[:3].numel()  # (B, H, W, D)
            totals["raw"] += module.projection_macs(tokens)
            totals["scan"] += module.scan_flops(tokens)
        elif isinstance(module, DeformBlock):
            totals["raw"] += module.product_macs(output.numel() // output.shape[1])
        elif isinstance(module, ChannelAttention):
            totals["module"] += module.layer_macs(output.shape[0])
        elif isinstance(module, MultiModalityFusion):
            totals["module"] += module.layer_macs(output.shape[0], output.numel() // output.shape[1])

    hooks = [module.register_forward_hook(count_module) for module in network.modules()]
    try:
        with torch.no_grad():
            network(torch.empty(1, 2, height, width, device="meta"))
    finally:
        for hook in hooks:
            hook.remove()
    seen_by_paper = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.LayerNorm))]
    return Cost(
        parameters=sum(p.numel() for p in network.parameters()),
        macs=totals["module"] + totals["raw"],
        scan_flops=totals["scan"],
        paper_parameters=sum(p.numel() for m in seen_by_paper for p in m.parameters()),
        paper_macs=totals["module"],
    )


def cost_table(height: int = 240, width: int = 240) -> str:
    """The cost of every registered network as a Markdown table."""
    lines = [
        f"Cost of one slice of {height}x{width}",
        "",
        "| network | parameters (M) | GMAC | scan (GFLOP) | parameters (M), paper's count | GMAC, paper's count |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in NETWORKS.names:
        cost = count_cost(build_network(name), height, width)
        lines.append(
            f"| {name} | {cost.parameters / 1e6:.3f} | {cost.macs / 1e9:.2f} | {cost.scan_flops / 1e9:.2f} "
            f"| {cost.paper_parameters / 1e6:.3f} | {cost.paper_macs / 1e9:.2f} |"
        )
    return "\n".join(lines)
