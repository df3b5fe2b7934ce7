from glmamba_monai.networks.baselines import SRCNN, Interpolation
from glmamba_monai.networks.cost import Cost, cost_table, count_cost
from glmamba_monai.networks.glmamba import GLMamba
from glmamba_monai.networks.registry import (
    NETWORKS,
    build_network,
    edge_weight_of,
    find_network,
    upsampling_of,
)

__all__ = [
    "NETWORKS",
    "SRCNN",
    "Cost",
    "GLMamba",
    "Interpolation",
    "build_network",
    "cost_table",
    "count_cost",
    "edge_weight_of",
    "find_network",
    "upsampling_of",
]
