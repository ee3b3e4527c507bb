"""Run single ONNX nodes with the reference implementation that comes with onnx."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper

if TYPE_CHECKING:
    from onnx.reference import ReferenceEvaluator

Array = np.ndarray

_NOT_DETERMINED_NAMES = (
    "RandomNormal RandomNormalLike RandomUniform RandomUniformLike Bernoulli Multinomial "
    "If Loop Scan SequenceMap Optional OptionalGetElement OptionalHasElement"
)
_NOT_DETERMINED = frozenset(_NOT_DETERMINED_NAMES.split())
_FIRST_KNOWN = {"DequantizeLinear": 19}
"""Versions below which the reference lacks an operation that a newer version contains unchanged."""


@dataclass
class Evaluator:
    """Runs nodes of one model; remembers the implementation of each kind of node.

    Attributes:
        versions: Domain → opset version of the model.
    """

    versions: dict[str, int]
    _known: dict[object, ReferenceEvaluator | None] = field(default_factory=dict)

    def can(self, node: Any, types: Sequence[int]) -> bool:
        """Return whether a node can be run at all on inputs of these element types (0 where absent)."""
        return self._implementation(node, types) is not None

    def run(self, node: Any, arrays: Sequence[Array | None], version: int | None = None) -> list[Array]:
        """Return a node's outputs for constant inputs, None where an optional one is absent.

        Raises:
            ValueError: If there is no implementation, or it fails on these inputs.
        """
        types = [0 if array is None else helper.np_dtype_to_tensor_dtype(array.dtype) for array in arrays]
        implementation = self._implementation(node, types, version)
        if implementation is None:
            raise ValueError(f"no implementation of {node.op_type}")
        feeds = {f"x{index}": array for index, array in enumerate(arrays) if array is not None}
        try:
            with np.errstate(all="ignore"):
                results = implementation.run(None, feeds)
        except Exception as error:  # whatever a reference implementation trips over
            raise ValueError(f"{node.op_type} cannot be evaluated: {error}") from error
        return [np.asarray(result) for result in results]

    def _implementation(
        self, node: Any, types: Sequence[int], version: int | None = None
    ) -> ReferenceEvaluator | None:
        from onnx.reference import ReferenceEvaluator

        if node.domain not in ("", "ai.onnx") or node.op_type in _NOT_DETERMINED:
            return None
        if any(attribute.name == "broadcast" for attribute in node.attribute):
            return None  # broadcasting of opset 6, which the reference ignores
        number = self.versions.get("", 1) if version is None else version
        number = max(number, _FIRST_KNOWN.get(node.op_type, 1))
        attributes = b"".join(sorted(attribute.SerializeToString() for attribute in node.attribute))
        key = (node.op_type, number, tuple(types), len(node.output), attributes)
        if key in self._known:
            return self._known[key]
        copy = onnx.NodeProto()
        copy.op_type = node.op_type
        copy.attribute.extend(node.attribute)
        copy.input.extend(f"x{index}" if kind else "" for index, kind in enumerate(types))
        copy.output.extend(f"y{index}" if name else "" for index, name in enumerate(node.output))
        graph = onnx.GraphProto(
            node=[copy],
            input=[
                helper.make_tensor_value_info(f"x{index}", kind, None)
                for index, kind in enumerate(types)
                if kind
            ],
            output=[helper.make_empty_tensor_value_info(name) for name in copy.output if name],
        )
        found: ReferenceEvaluator | None
        try:
            found = ReferenceEvaluator(graph, opsets={"": number})
        except Exception:  # an operation or a version that it does not know
            found = None
        self._known[key] = found
        return found
