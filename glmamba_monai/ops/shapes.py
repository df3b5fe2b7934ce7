"""What operations say of a tensor of the wrong shape."""

from torch import Tensor

__all__ = ["check_shape"]


def check_shape(name: str, tensor: Tensor, expected: list[int], source: str) -> None:
    """Refuse a tensor of another shape.

    Args:
        name: of the argument.
        tensor: its value.
        expected: the shape it should have.
        source: of what arguments that follows.

    Raises:
        ValueError: the shape is another.
    """
    if list(tensor.shape) != expected:
        raise ValueError(f"{name}: found shape {list(tensor.shape)}, expected {expected} (from {source})")
