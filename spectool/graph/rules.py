"""Which operations are affine in what they read, as data: one row per operation, no code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

How = Literal["first", "either", "join", "mask", "shape"]
Role = Literal["neutral", "move", "select", "avgpool", "upsample", "pad", "scale", "mix"]


@dataclass(frozen=True)
class Rule:
    """How one operation depends on its arguments.

    Attributes:
        how: ``first``: linear in argument 0, affine with everything else constant (also division by a constant).
            ``either``: linear in each argument; affine while exactly one is not constant.
            ``join``: affine in all arguments together; those that are not constant need one common root.
            ``mask``: argument 0 must be constant, the others join.
            ``shape``: reads no data, only the shape of its argument, and so is no user of a value.
        role: What it may do to singular values. ``neutral``: nothing, and positions stay where they are.
            ``move``: a bijection of positions. ``select``: keeps or places positions, none twice. ``avgpool``,
            ``upsample``, ``pad``, ``scale``: that kind of row. ``mix``: anything else.
        same: Role instead where one argument flows and the output has its shape (no broadcast enlarged it).
        alone: Role instead where one argument flows, whatever the shapes.
        spatial: Whether ``avgpool`` holds only for means over two or more axes behind batch and channels.
        operator: Kind of the row it makes if it reads a constant of rank 2 or more: it is a stored operator then.
    """

    how: How
    role: Role
    same: Role | None = None
    alone: Role | None = None
    spatial: bool = False
    operator: str = ""


def _onnx(names: str, rule: Rule) -> dict[str, Rule]:
    return {f"onnx.{name}": rule for name in names.split()}


ONNX_RULES: Mapping[str, Rule] = {
    **_onnx("Identity Cast CastLike Dropout Neg", Rule("first", "neutral")),
    **_onnx("Transpose Reshape Flatten Squeeze Unsqueeze DepthToSpace SpaceToDepth", Rule("first", "move")),
    **_onnx("ReverseSequence", Rule("first", "move")),
    **_onnx("Slice Split Gather GatherElements GatherND Trilu Compress", Rule("first", "select")),
    **_onnx("Pad CenterCropPad", Rule("first", "pad", same="neutral")),
    **_onnx("AveragePool GlobalAveragePool", Rule("first", "avgpool")),
    **_onnx("ReduceMean", Rule("first", "avgpool", same="neutral", spatial=True)),
    **_onnx("Resize Upsample", Rule("first", "upsample")),
    **_onnx("ReduceSum Expand Tile", Rule("first", "mix", same="neutral")),
    **_onnx("CumSum Col2Im", Rule("first", "mix")),
    **_onnx("Div", Rule("first", "mix", same="scale")),
    **_onnx("Mul", Rule("either", "mix", same="scale")),
    **_onnx("MatMul Einsum", Rule("either", "mix", operator="linear")),
    **_onnx("Add Sub Sum", Rule("join", "mix", same="neutral")),
    **_onnx("Mean", Rule("join", "mix")),
    **_onnx("Concat", Rule("join", "mix", alone="select")),
    **_onnx("ScatterND ScatterElements Scatter", Rule("join", "mix")),
    **_onnx("Where", Rule("mask", "mix", same="select")),
    **_onnx("Shape Size", Rule("shape", "mix")),
}
"""ONNX operations by the name that their ``Call`` carries; what is missing here is a boundary."""
