"""Pads that a convolution alone reads belong to it: a program writes them apart, a layer means them together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from spectool.graph.types import Call, Conv, Graph, Node
from spectool.linear.geometry import ConvGeometry, PaddingMode

if TYPE_CHECKING:
    import torch

Sides = tuple[tuple[int, int], ...]
_ATEN: dict[str, PaddingMode] = {
    "constant_pad_nd": "zeros",
    "reflection_pad1d": "reflect",
    "reflection_pad2d": "reflect",
    "reflection_pad3d": "reflect",
    "replication_pad1d": "replicate",
    "replication_pad2d": "replicate",
    "replication_pad3d": "replicate",
    "_pad_circular": "circular",
}
_MODES: dict[str, PaddingMode] = {
    "constant": "zeros",
    "reflect": "reflect",
    "edge": "replicate",
    "replicate": "replicate",
    "circular": "circular",
    "wrap": "circular",
}


def fuse_pads(graph: Graph, load: Callable[[str], torch.Tensor]) -> Graph:
    """Return the graph with every pad moved into the convolution that is its only user, where that is exact.

    A pad of zeros adds to a convolution's own; any other mode needs a convolution that does not pad.

    Args:
        graph: Nodes in execution order.
        load: Reads a constant by name (ONNX keeps pads in tensors).
    """
    users = Counter(name for node in graph.nodes for name in node.inputs)
    users.update(graph.outputs)
    makers = {name: node for node in graph.nodes for name in node.outputs}
    gone: set[str] = set()
    nodes: list[Node] = []
    for node in graph.nodes:
        pad = makers.get(node.inputs[0]) if isinstance(node.op, Conv) and node.inputs else None
        if pad is not None and isinstance(node.op, Conv) and users[node.inputs[0]] == 1:
            found = _pad(pad, node.op.geometry.dims, load)
            fused = None if found is None else _merge(node.op.geometry, *found)
            if fused is not None:
                gone.add(pad.name)
                node = replace(node, op=Conv(fused), inputs=(pad.inputs[0], *node.inputs[1:]))
        nodes.append(node)
    return replace(graph, nodes=tuple(node for node in nodes if node.name not in gone)) if gone else graph


def _merge(geometry: ConvGeometry, sides: Sides, mode: PaddingMode) -> ConvGeometry | None:
    if geometry.transposed:
        return None
    plain = not any(side for pair in geometry.padding for side in pair)
    if mode != "zeros":
        if not plain or any(side < 0 for pair in sides for side in pair):
            return None
        return replace(geometry, padding=sides, padding_mode=mode)
    if geometry.padding_mode != "zeros" or any(side < 0 for pair in sides for side in pair):
        return None
    merged = tuple(
        (low + more, high + extra) for (low, high), (more, extra) in zip(geometry.padding, sides, strict=True)
    )
    return replace(geometry, padding=merged)


def _pad(node: Node, dims: int, load: Callable[[str], torch.Tensor]) -> tuple[Sides, PaddingMode] | None:
    """Return (leading, trailing) per spatial axis and the mode of a pad, None if the node is no such pad."""
    if not isinstance(node.op, Call):
        return None
    domain, _, rest = node.op.name.partition(".")
    if domain == "onnx" and rest == "Pad":
        return _onnx_pad(node, node.op, dims, load)
    if domain != "aten":
        return None
    name = rest.split(".")[0]
    arguments = [*node.op.attributes["args"], *node.op.attributes["kwargs"].values()]
    if name == "pad":
        mode = next((value for value in arguments if isinstance(value, str)), "constant")
        fill = arguments[3] if len(arguments) > 3 else 0
    elif name in _ATEN:
        mode = {"zeros": "constant"}.get(_ATEN[name], _ATEN[name])
        fill = arguments[2] if name == "constant_pad_nd" and len(arguments) > 2 else 0
    else:
        return None
    flat = arguments[1]
    if (
        mode not in _MODES
        or fill
        or not isinstance(flat, (list, tuple))
        or len(flat) % 2
        or len(flat) > 2 * dims
    ):
        return None
    # torch lists the last axis first.
    pairs = [(int(flat[i]), int(flat[i + 1])) for i in range(0, len(flat), 2)]
    pairs += [(0, 0)] * (dims - len(pairs))
    return tuple(reversed(pairs)), _MODES[mode]


def _onnx_pad(
    node: Node, op: Call, dims: int, load: Callable[[str], torch.Tensor]
) -> tuple[Sides, PaddingMode] | None:
    mode = op.attributes.get("mode", "constant")
    mode = mode.decode() if isinstance(mode, bytes) else mode
    if len(node.inputs) > 3 and node.inputs[3]:
        return None
    if len(node.inputs) > 2 and node.inputs[2] and bool(load(node.inputs[2]).any()):
        return None
    if op.attributes.get("value"):
        return None
    if len(node.inputs) > 1 and node.inputs[1]:
        pads = [int(value) for value in load(node.inputs[1]).reshape(-1).tolist()]
    else:
        pads = [int(value) for value in op.attributes.get("pads", op.attributes.get("paddings", ()))]
    half = len(pads) // 2
    if half != dims + 2 or any(pads[:2]) or any(pads[half : half + 2]) or mode not in _MODES:
        return None
    return tuple(zip(pads[2:half], pads[half + 2 :], strict=True)), _MODES[mode]
