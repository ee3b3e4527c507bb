"""Recognise a state dict by its keys and shapes, up to the classifier."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

from spectool.architectures.matching import PREFIXES

Shape = tuple[int, ...]

HEADS = frozenset(
    {"fc", "classifier", "head", "heads", "head_dist", "AuxLogits", "aux1", "aux2", "aux_classifier"}
    | {"last_linear", "proj_head"}
)
"""First components of the keys of classifiers, whose size depends on the task."""

_LENGTH = 16


@dataclass(frozen=True)
class Recognised:
    """A known architecture that a state dict is an instance of.

    Attributes:
        name: E.g. ``torchvision:resnet18``.
        arguments: What its factory needs to make this instance (the number of classes).
    """

    name: str
    arguments: Mapping[str, int]


def fingerprint(shapes: Mapping[str, Shape]) -> str:
    """Return a short hash of the keys and shapes of everything but the classifier and counters."""
    lines = sorted(
        f"{name}:{','.join(map(str, shape))}"
        for name, shape in shapes.items()
        if name.split(".")[0] not in HEADS and not name.endswith("num_batches_tracked")
    )
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()[:_LENGTH]


def recognise(shapes: Mapping[str, Shape]) -> Recognised | None:
    """Return the known architecture of a state dict, None if there is none.

    Args:
        shapes: Checkpoint key → shape; prefixes of training wrappers are stripped as a whole.
    """
    stripped = dict(shapes)
    table = _table()
    for _ in range(4):
        if len(stripped) > 4:
            name = table.get(fingerprint(stripped))
            if name is not None:
                return Recognised(name, _classes(stripped))
        prefix = next((p for p in PREFIXES if stripped and all(key.startswith(p) for key in stripped)), None)
        if prefix is None:
            return None
        stripped = {key[len(prefix) :]: shape for key, shape in stripped.items()}
    return None


def _classes(shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Return the number of classes that the last bias of the classifier has."""
    biases = [
        (name, shape)
        for name, shape in shapes.items()
        if name.split(".")[0] in {"fc", "classifier", "head", "heads"}
        and name.endswith("bias")
        and len(shape) == 1
    ]
    if not biases:
        return {}
    biases.sort(key=lambda pair: [part.zfill(8) for part in pair[0].split(".")])
    return {"num_classes": biases[-1][1][0]}


def _table() -> Mapping[str, str]:
    text = resources.files("spectool.architectures").joinpath("fingerprints.json").read_text(encoding="utf-8")
    table: dict[str, str] = json.loads(text)
    return table
