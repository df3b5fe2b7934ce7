"""Which implementation runs each operation: one table, one choice, one report.

An operation lists its backends in order of preference. Adding one is an entry in `OPERATIONS` and a function in the
operation's own file. Optional modules are imported when first asked for, and the outcome is remembered.
"""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch

__all__ = [
    "OPERATIONS",
    "Backend",
    "Operation",
    "backend_report",
    "format_backend_report",
    "require_backends",
    "select_backend",
]

DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Backend:
    """One implementation of an operation.

    Args:
        name: what the user writes to ask for it.
        runs_on: device types whose tensors it accepts.
        automatic_on: device types where it may be chosen unasked.
        load: imports what it needs and returns the module; any exception means that it is not available.
        how_to_get: one sentence for the user who lacks it.
    """

    name: str
    runs_on: tuple[str, ...] = DEVICES
    automatic_on: tuple[str, ...] = DEVICES
    load: Callable[[], ModuleType] = lambda: torch
    how_to_get: str = ""


@dataclass(frozen=True)
class Operation:
    """An operation's environment variable and its backends, the preferred one first."""

    variable: str
    backends: tuple[Backend, ...]


def _load_torchvision_ops() -> ModuleType:
    module = importlib.import_module("torchvision.ops")
    # The Python part can import without its compiled operators (beside another build of torch), and a call then fails.
    if not hasattr(torch.ops.torchvision, "deform_conv2d"):
        raise ImportError("torchvision.ops imports, but its compiled operator deform_conv2d is missing")
    return module


_TORCH = Backend("torch")

OPERATIONS: dict[str, Operation] = {
    "selective_scan": Operation(
        "GLMAMBA_SCAN_BACKEND",
        (
            Backend(
                "mamba_ssm",
                runs_on=("cuda",),
                automatic_on=("cuda",),
                # The compiled extension alone: `import mamba_ssm` pulls in its language models and their requirements.
                load=lambda: importlib.import_module("selective_scan_cuda"),
                how_to_get="pip install --no-build-isolation mamba-ssm, beside an nvcc that matches torch",
            ),
            _TORCH,
        ),
    ),
    "deform_conv2d": Operation(
        "GLMAMBA_DEFORM_BACKEND",
        (
            Backend(
                "torchvision",
                # Its CPU kernel samples in one serial scalar loop; the torch form is vectorised and threaded.
                automatic_on=("cuda",),
                load=_load_torchvision_ops,
                how_to_get="install the torchvision release that was built for the installed torch",
            ),
            _TORCH,
        ),
    ),
}


@cache
def _try_load(op: str, name: str) -> tuple[ModuleType | None, str]:
    """The module of a backend and "", or None and the reason why it cannot be had."""
    try:
        return _backend(op, name).load(), ""
    except Exception as error:  # a broken binary raises OSError, RuntimeError, ... not only ImportError
        return None, f"{type(error).__name__}: {error}"


def _operation(op: str) -> Operation:
    if op not in OPERATIONS:
        raise ValueError(f"op: found {op!r}, expected one of {sorted(OPERATIONS)}")
    return OPERATIONS[op]


def _backend(op: str, name: str, source: str = "backend") -> Backend:
    backends = _operation(op).backends
    for backend in backends:
        if backend.name == name:
            return backend
    raise ValueError(f"{source}: found {name!r}, expected one of {[b.name for b in backends]} for {op}")


def load_backend(op: str, name: str) -> ModuleType:
    """The module that the backend `name` of `op` calls (see `select_backend` for the errors)."""
    module, reason = _try_load(op, name)
    if module is None:
        raise RuntimeError(f"{op}: backend {name!r} is not available ({reason}). {_backend(op, name).how_to_get}")
    return module


def select_backend(op: str, tensor_is_cuda: bool, requested: str | None = None) -> str:
    """Name the backend that runs an operation.

    The argument beats the operation's environment variable, which beats the automatic choice: the first backend of
    the table that is available and meant for the tensor's device.

    Args:
        op: `"selective_scan"` or `"deform_conv2d"`.
        tensor_is_cuda: whether the tensors are on a CUDA device.
        requested: a backend's name, or None for the environment variable or the automatic choice.

    Raises:
        ValueError: unknown operation or backend name.
        RuntimeError: the backend asked for is not available, or cannot take tensors of this device.
    """
    operation = _operation(op)
    device = "cuda" if tensor_is_cuda else "cpu"
    source = "backend"
    if requested is None:
        requested = os.environ.get(operation.variable) or None
        source = operation.variable
    if requested is None:
        return next(b.name for b in operation.backends if device in b.automatic_on and _try_load(op, b.name)[0])
    backend = _backend(op, requested, source)
    load_backend(op, requested)
    if device not in backend.runs_on:
        raise RuntimeError(
            f"{source}: {op} was asked to run on {requested!r}, which takes {' or '.join(backend.runs_on)} tensors, "
            f"but the tensors are on {device}. Move them, or choose 'torch'"
        )
    return requested


def require_backends(device: torch.device | str) -> None:
    """Make sure, before any work is done, that what the environment variables ask for can run on a device.

    Raises:
        ValueError, RuntimeError: see :func:`select_backend`.
    """
    for op in OPERATIONS:
        select_backend(op, torch.device(device).type == "cuda")


def backend_report() -> dict[str, dict[str, Any]]:
    """What runs each operation here, and why not something else.

    Returns:
        For each operation: `cpu` and `cuda` (the backend that tensors there get now, or `"error: ..."` where the
        environment variable forces one that cannot run), `available` (names), `unavailable` (name -> reason and how
        to get it), `variable` (the environment variable's name) and `forced` (its value or None).
    """
    report: dict[str, dict[str, Any]] = {}
    for op, operation in OPERATIONS.items():
        entry: dict[str, Any] = {}
        for device in DEVICES:
            try:
                entry[device] = select_backend(op, device == "cuda")
            except (ValueError, RuntimeError) as error:
                entry[device] = f"error: {error}"
        reasons = {b.name: _try_load(op, b.name)[1] for b in operation.backends}
        entry["available"] = [name for name, reason in reasons.items() if not reason]
        entry["unavailable"] = {
            b.name: f"{reasons[b.name]}. To get it: {b.how_to_get}" for b in operation.backends if reasons[b.name]
        }
        entry["variable"] = operation.variable
        entry["forced"] = os.environ.get(operation.variable) or None
        report[op] = entry
    return report


def format_backend_report() -> str:
    """`backend_report` as text for a terminal or a log."""
    lines = []
    for op, entry in backend_report().items():
        forced = entry["forced"] or "not set"
        lines.append(f"{op}: cpu -> {entry['cpu']}, cuda -> {entry['cuda']} ({entry['variable']}: {forced})")
        lines.extend(f"  {name}: available" for name in entry["available"])
        lines.extend(f"  {name}: not available: {reason}" for name, reason in entry["unavailable"].items())
    return "\n".join(lines)
