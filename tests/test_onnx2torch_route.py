"""Regions with an ONNX operation that only onnx2torch can run, against ONNX Runtime, column by column."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx_models import dense, graph, jacobian_of, model, node, region, summary, survey_of, weights

from spectool.api import inspect
from spectool.errors import OperatorError
from spectool.graph.types import BatchNorm, Call, Node, Region
from spectool.lower import lower, onnx_ops
from spectool.lower.onnx2torch_route import convert_node

Array = np.ndarray
SHAPE = (1, 3, 5, 5)
CONV = node("Conv", "x w", "c")


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Take our own implementations away."""
    left = {name: function for name, function in onnx_ops.OPS.items() if name.split(".")[1] not in names}
    assert len(left) == len(onnx_ops.OPS) - len(names)
    monkeypatch.setattr(onnx_ops, "OPS", left)


def places(*values: int) -> Array:
    return np.array(values, np.int64)


# Operation that has no implementation, nodes behind the convolution, constants, opset.
ROUTES = {
    "Pad": ([node("Pad", "c p", "y")], {"p": places(0, 0, 1, 2, 0, 0, 0, 1)}, 17),
    "Pad-newer": ([node("Pad", "c p", "y")], {"p": places(0, 0, 1, 2, 0, 0, 0, 1)}, 21),
    "Tile": ([node("Tile", "c r", "y")], {"r": places(1, 1, 2, 1)}, 13),
    "ReduceSum": ([node("ReduceSum", "c a", "y", keepdims=0)], {"a": places(2)}, 17),
    "AveragePool": ([node("AveragePool", "c", "y", kernel_shape=[2, 2])], {}, 13),
    "Slice": ([node("Slice", "c b e a", "y")], {"b": places(1), "e": places(3), "a": places(2)}, 13),
    "Split": ([node("Split", "c s", "p q", axis=1), node("Sub", "p q", "y")], {"s": places(2, 2)}, 13),
    "Concat": ([node("Neg", "c", "n"), node("Concat", "c n", "y", axis=1)], {}, 13),
    "Transpose": ([node("Transpose", "c", "t", perm=[0, 2, 3, 1]), node("Mul", "t m", "y")], {"m": weights(4)}, 17),
    "ScatterND": ([node("ScatterND", "c i u", "y")], {"i": places(0, 1, 0, 3).reshape(2, 2), "u": weights(2, 3, 3)},
                  16),
    # The constant is written into by what flows: both have to be fed.
    "ScatterND-into": ([node("ScatterND", "z i c", "y")], {"z": weights(3, 4, 3, 3), "i": places(2).reshape(1, 1)}, 18),
}  # fmt: skip


@pytest.mark.parametrize("name", ROUTES)
def test_a_region_goes_through_onnx2torch(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes, constants, opset = ROUTES[name]
    proto = model(graph([CONV, *nodes], {"x": SHAPE}, "y", {"w": weights(4, 3, 3, 3), **constants}), opset)
    truth = jacobian_of(proto)
    without(monkeypatch, name.split("-")[0])
    found = survey_of(proto, tmp_path)
    (item,) = [i for i in found.items if isinstance(i, Region) and i.level == "composed" and i.maximal]
    np.testing.assert_allclose(dense(item, found), truth, atol=2e-6 * np.abs(truth).max())


def test_types_and_batches_of_the_second_route(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proto = model(graph([CONV, node("Tile", "c r", "y")], {"x": SHAPE}, "y", {
        "w": weights(4, 3, 3, 3), "r": places(1, 2, 1, 1)}))  # fmt: skip
    without(monkeypatch, "Tile")
    found = survey_of(proto, tmp_path)
    operator = lower(region(found, "w", "composed"), found.load, dtype=torch.float32)
    x = torch.randn(3, *operator.in_shape, generator=torch.Generator().manual_seed(0))
    y = operator.matvec(x)
    assert y.dtype == torch.float32
    for row, alone in zip(y, x, strict=True):
        torch.testing.assert_close(row, operator.matvec(alone[None])[0])
    exact = lower(region(found, "w", "composed"), found.load, dtype=torch.float64)
    torch.testing.assert_close(exact.matvec(x.double()).float(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "attributes", "constants", "reason"),
    [
        # onnx2torch has no such operation.
        ("Trilu", {}, {}, "Converter is not implemented"),
        # onnx2torch takes an absent `reverse` for a set one: believed only after a comparison.
        ("CumSum", {}, {"k": np.array(2, np.int64)}, "differs from onnx's reference"),
    ],
)
def test_what_neither_route_can_run_is_a_skipped_row(
    name: str,
    attributes: dict[str, int],
    constants: dict[str, Array],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes = [CONV, node(name, " ".join(["c", *constants]), "y", **attributes)]
    proto = model(graph(nodes, {"x": SHAPE}, "y", {"w": weights(4, 3, 3, 3), **constants}))
    path = tmp_path / "net.onnx"
    path.write_bytes(proto.SerializeToString())
    without(monkeypatch, name)
    rows = {row.level: row for row in inspect(path, k=1).rows}
    assert rows["layer"].status == "ok"
    assert rows["composed"].status == "skipped"
    assert f"no way to replay onnx.{name}; onnx2torch: " in rows["composed"].note
    assert reason in rows["composed"].note


def test_what_is_not_affine_is_not_believed() -> None:
    x = torch.randn(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    clip = Node("y", Call("onnx.Relu", {}, 14), ("x",), ("y",))
    with pytest.raises(OperatorError, match="onnx2torch: what it made is not affine"):
        convert_node(clip, [x], [True])
    with pytest.raises(OperatorError, match="of ONNX's own domain only"):
        convert_node(Node("y", BatchNorm(0.0), ("x",), ("y",)), [x], [True])
    with pytest.raises(OperatorError, match="of ONNX's own domain only"):
        convert_node(Node("y", Call("com.microsoft.Gelu", {}, 1), ("x",), ("y",)), [x], [True])


def test_scatters_that_do_not_add_are_boundaries(tmp_path: Path) -> None:
    tensors = {"w": weights(4, 3, 3, 3), "i": places(2).reshape(1, 1), "z": weights(3, 4, 3, 3)}
    for reduction, rows in (("add", 2), ("mul", 1), ("max", 1)):
        nodes = [CONV, node("ScatterND", "z i c", "y", reduction=reduction)]
        found = survey_of(model(graph(nodes, {"x": SHAPE}, "y", tensors), 18), tmp_path)
        assert len(summary(found)) == rows


@pytest.mark.parametrize("torchvision", ["as it is", "absent"])
def test_onnx2torch_is_imported_late_and_leaves_no_stub(torchvision: str) -> None:
    """Imported where it is first needed, with torchvision or without, and nothing false stays behind."""
    program = """
import importlib.abc, sys, warnings
warnings.simplefilter("error")
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchvision":
            raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")
if sys.argv[1] == "absent":
    sys.meta_path.insert(0, Absent())
import torch
from spectool.graph.types import Call, Node
from spectool.lower import replay, onnx2torch_route
assert "onnx2torch" not in sys.modules
node = Node("y", Call("onnx.Tile", {}, 13), ("x", "r"), ("y",))
arguments = [torch.arange(6.0).reshape(1, 6), torch.tensor([1, 2])]
route = onnx2torch_route.convert_node(node, arguments, [True, False])
assert torch.equal(route(arguments)[0], torch.arange(6.0).repeat(2).reshape(1, 12))
for name, module in sys.modules.items():
    assert getattr(module, "__file__", "") != "<stub>", name
if sys.argv[1] == "absent":
    assert not any(name.startswith(("torchvision", "onnx2torch")) for name in sys.modules)
print("done")
"""
    result = subprocess.run(
        [sys.executable, "-c", program, torchvision], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.stdout.strip() == "done", result.stderr


def test_onnx_checks_what_an_older_opset_lacks() -> None:
    """A newer attribute must not be dropped on the way to an opset that onnx2torch knows."""
    x = torch.zeros(1, 2, dtype=torch.float64)
    pad = Node("y", Call("onnx.Pad", {"mode": "wrap"}, 19), ("x", "p"), ("y",))
    with pytest.raises(OperatorError, match="onnx2torch: "):
        convert_node(pad, [x, torch.tensor([0, 1, 0, 1])], [True, False])
    assert onnx.defs.get_schema("Pad", 19).since_version == 19
