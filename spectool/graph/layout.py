"""Which way round a stored matrix or kernel is, where frameworks differ and shapes or biases can tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spectool.graph.effective import Weights
    from spectool.graph.types import Shape

_CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")  # Hugging Face's Conv1D: a Linear stored (in, out)
_SHIFTS = ("bias", "beta")
_LARGEST_WINDOW = 15


@dataclass(frozen=True)
class Orientation:
    """How a matrix is stored: (out, in), or (in, out) if ``transposed``; and why, in words."""

    transposed: bool = False
    note: str = ""


def orientation(weights: Weights, groups: Mapping[str, Mapping[str, str]]) -> dict[str, Orientation]:
    """Return the matrices that are stored (in, out), or could be.

    The bias tells unless the matrix is square: it has one entry per output. A square ``c_attn``, ``c_proj`` or
    ``c_fc`` follows the others of its file, and is taken for Hugging Face's if there are none. The spectrum is
    the same either way; only the shapes of input and output depend on it.

    Args:
        weights: The weights of the file.
        groups: Module → local name → weight name.
    """
    found: dict[str, Orientation] = {}
    square: list[str] = []
    votes = {True: 0, False: 0}
    for owner, group in groups.items():
        bias = next((weights.shape(group[leaf]) for leaf in _SHIFTS if leaf in group), None)
        module = owner.rpartition(".")[2]
        for leaf, name in group.items():
            shape = weights.shape(name)
            if len(shape) != 2:
                continue
            out = bias[0] if bias is not None and len(bias) == 1 and leaf in ("weight", "kernel") else None
            if shape[0] == shape[1]:
                if module in _CONV1D and out is not None:
                    square.append(name)
                elif leaf.endswith("kernel"):
                    found[name] = Orientation(True, "stored (in, out)")
                continue
            transposed = out == shape[1] if out in shape else leaf.endswith("kernel")
            if transposed:
                words = (
                    "stored (in, out), as in Hugging Face's Conv1D"
                    if module in _CONV1D
                    else "stored (in, out)"
                )
                found[name] = Orientation(True, words)
            if module in _CONV1D and out in shape:
                votes[transposed] += 1
    if votes[True] or not votes[False]:
        for name in square:
            found[name] = Orientation(
                True, "taken as stored (in, out), as in Hugging Face's Conv1D; it is square"
            )
    return found


def kernel_layout(shape: Shape, outputs: int | None) -> bool | None:
    """Return whether a convolution's kernel is stored (…, in, out), or None if that cannot be told.

    Args:
        shape: Shape of the kernel.
        outputs: Length of its bias, if there is one.
    """
    first, last = shape[0], shape[-1]
    if outputs is not None and (outputs == first) != (outputs == last):
        return outputs == last
    if len(shape) > 3:
        # Windows are square far more often than pairs of channel counts.
        leading, trailing = set(shape[:-2]), set(shape[2:])
        if (len(leading) == 1) != (len(trailing) == 1):
            return len(leading) == 1
        window = min(first, last)
        if len(leading) == 1 and first != last and window <= _LARGEST_WINDOW:
            return first == window
    return None
