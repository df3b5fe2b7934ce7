"""Which implementation runs each operation: one table, one choice, one report.

An operation lists its backends in order of preference. Adding one is an entry in `OPERATIONS` and a function in the
operation's own file. Optional modules are imported when first asked for, and the outcome is remembered.
"""

import contextlib
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "OPERATIONS",
    "Backend",
    "Operation",
    "backend_for",
    "backend_report",
    "format_backend_report",
    "require_backends",
    "select_backend",
]

logger = logging.getLogger(__name__)

DEVICES = ("cpu", "cuda")
# The kernels are written for the memory and matrix instructions of this generation (A100, RTX 30) and later.
CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Backend:
    """One implementation of an operation.

    Args:
        name: what the user writes to ask for it.
        load: imports what it needs and returns the module; any exception means that it is not available.
        how_to_get: one sentence for the user who lacks it.
        runs_on: device types whose tensors it accepts.
        automatic_on: device types where it may be chosen unasked.
        takes_float64: whether it computes in double precision.
    """

    name: str
    load: Callable[[], ModuleType] = lambda: torch
    how_to_get: str = ""
    runs_on: tuple[str, ...] = DEVICES
    automatic_on: tuple[str, ...] = DEVICES
    takes_float64: bool = False


@dataclass(frozen=True)
class Operation:
    """An operation's environment variable and its backends, the preferred one first."""

    variable: str
    backends: tuple[Backend, ...]


def _load_triton(kernels: str) -> ModuleType:
    if torch.version.cuda is None:
        raise RuntimeError("this build of torch has no CUDA")
    # Counted by the driver's management library where it can be: without a GPU nothing of CUDA is started.
    if torch.cuda.device_count() == 0:
        raise RuntimeError("no CUDA GPU is visible")
    # Starts CUDA; in a process forked from one that uses it torch refuses, and that is then the reason.
    found = torch.cuda.get_device_capability()
    if found < CAPABILITY:
        raise RuntimeError(f"{torch.cuda.get_device_name()} has compute capability {found[0]}.{found[1]}")
    return importlib.import_module(f"glmamba_monai.ops.{kernels}")


def _load_torchvision_ops() -> ModuleType:
    module = importlib.import_module("torchvision.ops")
    # The Python part can import without its compiled operators (beside another build of torch), and a call then fails.
    if not hasattr(torch.ops.torchvision, "deform_conv2d"):
        raise ImportError("torchvision.ops imports, but its compiled operator deform_conv2d is missing")
    return module


def _triton(kernels: str) -> Backend:
    return Backend(
        "triton",
        load=lambda: _load_triton(kernels),
        how_to_get=(
            "Linux, a CUDA GPU of compute capability 8.0 or newer, and a CUDA build of torch, which brings triton "
            "(else: pip install triton)"
        ),
        runs_on=("cuda",),
        automatic_on=("cuda",),
    )


_NATIVE = Backend(
    "native",
    load=lambda: importlib.import_module("glmamba_monai.ops.native").load(),
    how_to_get=(
        "install a C compiler (Debian, Ubuntu: apt-get install gcc; macOS: xcode-select --install), then, in the "
        "repository: pip install --no-deps --force-reinstall -e ."
    ),
    runs_on=("cpu",),
    automatic_on=("cpu",),
)

_TORCH = Backend("torch", takes_float64=True)

OPERATIONS: dict[str, Operation] = {
    "ss2d_scan": Operation(
        "GLMAMBA_SCAN_BACKEND",
        (
            _triton("triton_ss2d"),
            Backend(
                "mamba_ssm",
                # The compiled extension alone: `import mamba_ssm` pulls in its language models and their requirements.
                load=lambda: importlib.import_module("selective_scan_cuda"),
                how_to_get="pip install --no-build-isolation mamba-ssm, beside an nvcc that matches torch",
                runs_on=("cuda",),
                automatic_on=("cuda",),
            ),
            _NATIVE,
            _TORCH,
        ),
    ),
    "deform_conv2d": Operation(
        "GLMAMBA_DEFORM_BACKEND",
        (
            _triton("triton_deform_conv"),
            Backend(
                "torchvision",
                load=_load_torchvision_ops,
                how_to_get="install the torchvision release that was built for the installed torch",
                # Its CPU kernel samples in one serial scalar loop; the torch form is vectorised and threaded.
                automatic_on=("cuda",),
                takes_float64=True,
            ),
            _NATIVE,
            _TORCH,
        ),
    ),
    "pointwise": Operation("GLMAMBA_POINTWISE_BACKEND", (_triton("triton_pointwise"), _TORCH)),
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
        how_to_get = _backend(op, name).how_to_get
        raise RuntimeError(f"{op}: backend {name!r} is not available ({reason}). To get it: {how_to_get}")
    return module


def for_triton(x: Tensor) -> Tensor:
    """The tensor as the Triton kernels read it: half precision as it is, all else in float32."""
    return x if x.dtype in (torch.float16, torch.bfloat16) else x.float()


_recording = False


@contextlib.contextmanager
def recorded_operators() -> Iterator[None]:
    """Within, heavy operations are called as operators of torch, to be recorded and translated, not to be run."""
    global _recording
    _recording = True
    try:
        yield
    finally:
        _recording = False


@torch.compiler.assume_constant_result  # torch.compile keeps the choice that it found
def select_backend(
    op: str, tensor_is_cuda: bool, requested: str | None = None, dtype: torch.dtype = torch.float32
) -> str:
    """Name the backend that runs an operation.

    The argument beats the operation's environment variable, which beats the automatic choice: the first backend of
    the table that is available, meant for the tensor's device, and able to compute in the tensor's precision.

    Args:
        op: a key of `OPERATIONS`.
        tensor_is_cuda: whether the tensors are on a CUDA device.
        requested: a backend's name, or None for the environment variable or the automatic choice.
        dtype: of the tensors.

    Raises:
        ValueError: unknown operation or backend name.
        RuntimeError: the backend asked for is not available, or cannot take tensors of this device; or an ONNX export
            that lacks the translations of :mod:`glmamba_monai.onnx_export` is under way.
        TypeError: the backend asked for cannot take float64.
    """
    if _recording:
        return "torch" if op == "pointwise" else "native"
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            f"{op}: torch.onnx.export and monai.bundle onnx_export do not know how to write it. Use "
            "python -m glmamba_monai export-onnx OUTPUT --network NAME --weights FILE"
        )
    operation = _operation(op)
    device = "cuda" if tensor_is_cuda else "cpu"
    double = dtype == torch.float64
    source = "backend"
    if requested is None:
        requested = os.environ.get(operation.variable) or None
        source = operation.variable
    if requested is None:
        fitting = (b for b in operation.backends if device in b.automatic_on and (b.takes_float64 or not double))
        return next(b.name for b in fitting if _try_load(op, b.name)[0])
    backend = _backend(op, requested, source)
    load_backend(op, requested)
    if device not in backend.runs_on:
        raise RuntimeError(
            f"{source}: {op} was asked to run on {requested!r}, which takes {' or '.join(backend.runs_on)} tensors, "
            f"but the tensors are on {device}. Move them, or choose 'torch'"
        )
    if double and not backend.takes_float64:
        raise TypeError(
            f"{source}: {op} was asked to run on {requested!r}, which computes in float32, but the tensors are "
            f"float64. Convert them, or choose 'torch'"
        )
    return requested


def backend_for(op: str, tensor: Tensor, requested: str | None = None) -> str:
    """:func:`select_backend` for a tensor; on a device that no kernel is made for (mps, xpu, ...) `"torch"`.

    Raises:
        ValueError, RuntimeError, TypeError: see :func:`select_backend`.
    """
    if tensor.device.type in DEVICES:
        return select_backend(op, tensor.is_cuda, requested, tensor.dtype)
    requested = requested or os.environ.get(_operation(op).variable) or "torch"
    if requested != "torch":
        raise RuntimeError(f"{op} was asked to run on {requested!r}, but on {tensor.device.type} only 'torch' runs")
    return requested


def require_backends(device: torch.device | str) -> None:
    """Make sure, before any work is done, that what the environment variables ask for can run on a device.

    Where PyTorch's own operations run, for want of a kernel that would be chosen, it says how to get that.

    Raises:
        ValueError, RuntimeError: see :func:`select_backend`.
    """
    kind = torch.device(device).type
    for op, operation in OPERATIONS.items():
        chosen = select_backend(op, kind == "cuda")
        wanted = next((backend for backend in operation.backends if kind in backend.automatic_on), _TORCH)
        if chosen == _TORCH.name != wanted.name and not os.environ.get(operation.variable):
            logger.warning(
                f"{op}: runs on PyTorch's own operations here, several times slower than by the kernel "
                f"{wanted.name!r} ({_try_load(op, wanted.name)[1]}). To get it: {wanted.how_to_get}"
            )


def backend_report() -> dict[str, dict[str, Any]]:
    """What runs each operation here, and why. Where there is a GPU, this starts CUDA in the process.

    Returns:
        For each operation: `cpu` and `cuda` (the backend that float32 and half-precision tensors there get now, or
        `"error: ..."` where the environment variable forces one that cannot run), `available` (names), `why` (for
        every backend: where it runs and why not elsewhere, or why it is not there and how to get it), `variable` (the
        environment variable's name) and `forced` (its value or None).
    """
    report: dict[str, dict[str, Any]] = {}
    for op, operation in OPERATIONS.items():
        entry: dict[str, Any] = {}
        for device in DEVICES:
            try:
                entry[device] = select_backend(op, device == "cuda")
            except (ValueError, RuntimeError) as error:
                entry[device] = f"error: {error}"
        entry["available"] = [b.name for b in operation.backends if _try_load(op, b.name)[0]]
        entry["variable"] = operation.variable
        entry["forced"] = os.environ.get(operation.variable) or None
        entry["why"] = {b.name: _why(op, b, entry) for b in operation.backends}
        report[op] = entry
    return report


def _why(op: str, backend: Backend, entry: dict[str, Any]) -> str:
    """One sentence of the report on a backend, from what the report says already."""
    module, reason = _try_load(op, backend.name)
    if module is None:
        return f"not available ({reason}). To get it: {backend.how_to_get}"
    forced = f"{entry['variable']} asks for {entry['forced']}"
    parts = []
    for device in DEVICES:
        if device not in backend.runs_on:
            parts.append(f"does not run on {device}")
        elif entry[device] == backend.name:
            parts.append(f"runs on {device}: {forced if entry['forced'] else 'the first that is available there'}")
        elif entry["forced"]:
            parts.append(f"not on {device}: {forced}")
        elif device not in backend.automatic_on:
            parts.append(f"on {device} only if asked for")
        else:
            parts.append(f"not on {device}: {entry[device]} comes first")
    return "; ".join(parts)


def format_backend_report() -> str:
    """`backend_report` as text for a terminal or a log."""
    lines = []
    for op, entry in backend_report().items():
        forced = entry["forced"] or "not set"
        lines.append(f"{op}: cpu -> {entry['cpu']}, cuda -> {entry['cuda']} ({entry['variable']}: {forced})")
        lines.extend(f"  {name}: {why}" for name, why in entry["why"].items())
    return "\n".join(lines)
