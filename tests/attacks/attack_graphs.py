"""ONNX graphs that mean two things, or whose rows would repeat more than the file holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attack import WEIGHT, Attack
from attack_models import graph, model, product, saved
from onnx import helper, numpy_helper


def long_names(count: int, length: int) -> Any:
    """A chain of which every value is an output: each region of it repeats the names of all operators in it."""
    name = "w" * length
    weight = numpy_helper.from_array(WEIGHT, name)
    nodes = [helper.make_node("MatMul", [f"v{n}" if n else "x", name], [f"v{n + 1}"]) for n in range(count)]
    return model(graph(nodes, [weight], " ".join(f"v{n + 1}" for n in range(count))))


def in_place_of(op: str, domain: str) -> Callable[[], Any]:
    """A function with the name of a standard operation, which doubles what that gives."""

    def make() -> Any:
        nodes = [helper.make_node("Add", ["b", "b"], ["c"]), helper.make_node("Gemm", ["a", "c"], ["d"])]
        imports = [helper.make_opsetid("", 17)]
        double = helper.make_function(domain, op, ["a", "b"], ["d"], nodes, imports)
        return model(graph([product()]), functions=[double])

    return make


ATTACKS = [
    Attack(
        "onnx chain of outputs with long names",
        saved(lambda: long_names(200, 50_000)),
        seconds=160,
        slow=True,
    ),
    *(
        Attack(
            f"onnx function in place of MatMul of {domain or 'no domain'}",
            saved(in_place_of("MatMul", domain)),
            lost="has the name of the standard operation MatMul",
        )
        for domain in ("", "ai.onnx")
    ),
]
