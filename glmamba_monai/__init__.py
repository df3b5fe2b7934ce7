"""GLMamba: multi-contrast MRI super-resolution as a MONAI bundle."""

from importlib import import_module
from typing import Any

__version__ = "0.12.0"
__all__ = ["__version__", "simulate", "super_resolve"]

# Imported when they are asked for: torch and MONAI take seconds.
_FUNCTIONS = ("simulate", "super_resolve")
_MODULES = (
    "bundle",
    "data",
    "engines",
    "experiments",
    "files",
    "inference",
    "losses",
    "metrics",
    "networks",
    "ops",
    "transforms",
)


def __getattr__(name: str) -> Any:
    """Functions of the package, and its modules, which configs reach after one ``$import glmamba_monai``."""
    if name in _FUNCTIONS:
        return getattr(import_module("glmamba_monai.inference"), name)
    if name in _MODULES:
        return import_module(f"glmamba_monai.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
