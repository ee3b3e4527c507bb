"""Submodules that are one boundary as a whole: norms by their own statistics, recurrent layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

RECURRENT: Mapping[str, int] = {"lstm": 4, "gru": 3, "rnn": 1}
"""Kind of a recurrent layer → matrices stacked in each of its weights, one per gate."""

_MAKERS = ("_WeightNorm", "_SpectralNorm", "WeightNorm", "SpectralNorm")


@dataclass(frozen=True)
class Wall:
    """A submodule inside which no operation is looked at by itself.

    Attributes:
        kind: ``layernorm``, ``rmsnorm``, ``groupnorm``, ``instancenorm``, ``lstm``, ``gru`` or ``rnn``.
        parameters: Name in the program → shape, its own parameters only.
    """

    kind: str
    parameters: Mapping[str, tuple[int, ...]]


def wall_kind(class_name: str) -> str | None:
    """Return the kind of boundary that a class is by its name, None if it is none.

    Batch norms are none: in evaluation mode they are diagonal. Nor are parametrisations: they make weights.
    """
    name = class_name.rsplit(".", 1)[-1]
    lowered = name.lower()
    if "batchnorm" in lowered or "localresponsenorm" in lowered or name in _MAKERS:
        return None
    for word in RECURRENT:
        if name in (word.upper(), f"{word.upper()}Cell"):
            return word
    if "norm" not in lowered and name != "GRN":
        return None
    if name == "T5LayerNorm":
        return "rmsnorm"
    for word, kind in (("rms", "rmsnorm"), ("group", "groupnorm"), ("instance", "instancenorm")):
        if word in lowered:
            return kind
    return "layernorm"
