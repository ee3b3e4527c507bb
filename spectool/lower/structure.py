"""Which nodes leave singular values alone, and which pads can move into a convolution."""

from __future__ import annotations

import torch

from spectool.graph.aten_rules import ATEN_RULES, packet
from spectool.graph.rules import ONNX_RULES
from spectool.graph.types import Call, Node, Region
from spectool.lower.replay import Load

_SHIFTS = frozenset({"onnx.Add", "onnx.Sub", "aten.add", "aten.sub", "aten.rsub"})


def role(node: Node) -> str:
    """Return the role that the tables of rules give a replayed operation; ``mix`` for one without a rule."""
    op = node.op
    if not isinstance(op, Call):
        return "mix"
    rule = ONNX_RULES.get(op.name) or ATEN_RULES.get(packet(op.name))
    return rule.role if rule is not None else "mix"


def is_structural(node: Node, region: Region) -> bool:
    """Return whether a node is a rearrangement or a bias, so that dropping it changes no singular value."""
    if not isinstance(node.op, Call):
        return False
    return role(node) in ("neutral", "move") or is_bias(node, region)


def is_neutral(node: Node, region: Region) -> bool:
    """Return whether a node leaves the order of positions alone, so that it may stand between two operators."""
    if not isinstance(node.op, Call):
        return False
    return role(node) == "neutral" or is_bias(node, region)


def is_bias(node: Node, region: Region) -> bool:
    """Return whether a node adds a constant (or subtracts from one: a sign changes no singular value)."""
    if not isinstance(node.op, Call) or packet(node.op.name) not in _SHIFTS or len(node.inputs) > 2:
        return False
    if float(node.op.attributes.get("kwargs", {}).get("alpha", 1)) != 1.0:
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
