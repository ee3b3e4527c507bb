"""Which nodes leave singular values alone, and which pads can move into a convolution."""

from __future__ import annotations

import torch

from spectool.graph.types import Call, Node, Region
from spectool.lower.replay import Load

# Bijections of positions: orthogonal, whatever their attributes.
_ISOMETRIES = frozenset(
    f"onnx.{name}"
    for name in (
        "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout", "Cast",
        "DepthToSpace", "SpaceToDepth",
    )
)  # fmt: skip
_NEUTRAL = frozenset({"onnx.Identity", "onnx.Dropout", "onnx.Cast"})
_SHIFTS = frozenset({"onnx.Add", "onnx.Sub"})


def is_structural(node: Node, region: Region) -> bool:
    """Return whether a node is a rearrangement or a bias, so that dropping it changes no singular value."""
    if not isinstance(node.op, Call):
        return False
    if node.op.name in _ISOMETRIES:
        return True
    return is_bias(node, region)


def is_neutral(node: Node, region: Region) -> bool:
    """Return whether a node leaves the order of positions alone, so that it may stand between two operators."""
    if not isinstance(node.op, Call):
        return False
    return node.op.name in _NEUTRAL or is_bias(node, region)


def is_bias(node: Node, region: Region) -> bool:
    """Return whether a node adds a constant (or subtracts from one: a sign changes no singular value)."""
    if not isinstance(node.op, Call) or node.op.name not in _SHIFTS or len(node.inputs) != 2:
        return False
    flowing = {region.root, *(name for other in region.nodes for name in other.outputs)}
    return sum(name in flowing for name in node.inputs) == 1


def zero_padding(node: Node, load: Load) -> tuple[tuple[int, int], ...] | None:
    """Return (leading, trailing) zeros per axis without the batch axis, or None if this is no such pad."""
    if not isinstance(node.op, Call) or node.op.name != "onnx.Pad":
        return None
    mode = node.op.attributes.get("mode", "constant")
    if mode not in ("constant", b"constant"):
        return None
    if len(node.inputs) > 3 and node.inputs[3]:
        return None
    if len(node.inputs) > 1 and node.inputs[1]:
        pads = [int(value) for value in load(node.inputs[1]).to(torch.int64).reshape(-1).tolist()]
    else:
        pads = [int(value) for value in node.op.attributes.get("pads", ())]
    half = len(pads) // 2
    if not half or pads[0] or pads[half] or any(value < 0 for value in pads):
        return None
    return tuple(zip(pads[1:half], pads[half + 1 :], strict=True))
