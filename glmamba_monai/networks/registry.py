"""Every network by name: presets, the rows of the paper's Table 1, and the baselines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from monai.utils import ComponentStore
from torch import nn

from glmamba_monai.losses import EDGE_WEIGHT
from glmamba_monai.networks.baselines import SRCNN, Interpolation
from glmamba_monai.networks.glmamba import GLMamba

NETWORKS = ComponentStore("GLMamba networks", "networks with the interface (B, 2, H, W) -> (B, 2, H, W)")


@dataclass(frozen=True)
class Network:
    """A registered network: call it to build one.

    Args:
        build: the constructor.
        arguments: what distinguishes this name from the constructor's defaults.
        upsampling: how channel 0 of its input is made of the low-resolution slice (mode of ``KSpaceUpsample``).
        edge_weight: weight of the edge loss it is trained with.
    """

    build: Callable[..., nn.Module]
    arguments: dict[str, Any] = field(default_factory=dict)
    upsampling: str = "zero_fill"
    edge_weight: float = EDGE_WEIGHT

    def __call__(self, **overrides: Any) -> nn.Module:
        return self.build(**{**self.arguments, **overrides})


LIGHT = {
    "n_deform": 1,
    "d_state": 8,
    "attention_reduction": 4,
    "mix_channels": 0,
    "unembedding": "bilinear",
}
PAPER = {"guided": False}
SINGLE = {**PAPER, "ref_scan": None}

for _name, _description, _network in (
    ("glmamba", "the paper's network, its low-resolution branch guided by the reference (default)", Network(GLMamba)),
    ("glmamba_paper", "the paper's layout, four deform blocks per branch", Network(GLMamba, PAPER)),
    (
        "glmamba_light",
        "1.2 M parameters: one deform block, 8 states, bilinear un-embedding",
        Network(GLMamba, LIGHT),
    ),
    # Table 1 of the paper, top to bottom, then what we add. Only the last two are trained with the edge loss.
    (
        "table1_lr_local",
        "Table 1: LRLocalMamba, target contrast alone",
        Network(GLMamba, {**SINGLE, "modulator": False, "lr_scan": "local"}, edge_weight=0.0),
    ),
    (
        "table1_lr_global",
        "Table 1: LRGlobalMamba, target contrast alone",
        Network(GLMamba, {**SINGLE, "modulator": False}, edge_weight=0.0),
    ),
    (
        "table1_modulator",
        "Table 1: LRGlobalMamba + Modulator, target contrast alone",
        Network(GLMamba, SINGLE, edge_weight=0.0),
    ),
    (
        "table1_ref_global",
        "Table 1: LRGlobal-RefGlobal, fused by sum and convolution",
        Network(GLMamba, {**PAPER, "ref_scan": "global", "fusion": "add"}, edge_weight=0.0),
    ),
    (
        "table1_ref_local",
        "Table 1: LRGlobal-RefLocal, fused by sum and convolution",
        Network(GLMamba, {**PAPER, "fusion": "add"}, edge_weight=0.0),
    ),
    ("table1_fusion", "Table 1: + Multi-modality fusion", Network(GLMamba, PAPER, edge_weight=0.0)),
    ("table1_edge_loss", "Table 1: + CELoss, the paper's method (as glmamba_paper)", Network(GLMamba, PAPER)),
    ("table1_guided", "Table 1, ours: + reference in the low-resolution branch (as glmamba)", Network(GLMamba)),
    ("srcnn", "SRCNN 9-5-5, target contrast alone", Network(SRCNN)),
    ("srcnn_ref", "SRCNN 9-5-5, reference as second channel", Network(SRCNN, {"use_reference": True})),
    ("bicubic", "bicubic interpolation", Network(Interpolation, upsampling="bicubic")),
    ("zero_filling", "zero-filling in k-space", Network(Interpolation)),
):
    NETWORKS.add(_name, _description, _network)


def find_network(name: str) -> Network:
    """The registered network of that name.

    Raises:
        ValueError: no network has that name; the message lists those there are.
    """
    if name not in NETWORKS:
        raise ValueError(f"network {name!r} is unknown; known are {', '.join(NETWORKS.names)}")
    return NETWORKS[name]


def build_network(name: str, **overrides: Any) -> nn.Module:
    """Build a registered network; ``overrides`` are arguments of its constructor.

    Raises:
        ValueError: no network has that name.
    """
    return find_network(name)(**overrides)


def upsampling_of(name: str) -> str:
    """Mode of :class:`~glmamba_monai.transforms.KSpaceUpsample` that makes channel 0 of this network's input."""
    return find_network(name).upsampling


def edge_weight_of(name: str) -> float:
    """Weight of the edge loss that this network is trained with."""
    return find_network(name).edge_weight
