"""Gates of a recurrent layer: parts of one stored tensor, reordered in the graph as torch's export does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import spectool

HIDDEN, INPUTS = 6, 5


def model(path: Path) -> None:
    """An LSTM whose stored weights have torch's order i, f, c, o; ONNX wants i, o, f, c."""
    rng = np.random.default_rng(0)
    stored = {
        "rnn.weight_ih": rng.standard_normal((4 * HIDDEN, INPUTS)).astype(np.float32),
        "rnn.weight_hh": rng.standard_normal((4 * HIDDEN, HIDDEN)).astype(np.float32),
        "axis": np.array([0]),
        **{f"at{gate}": np.array([gate * HIDDEN]) for gate in range(5)},
    }
    nodes = []
    for name in ("ih", "hh"):
        for part, (first, last) in enumerate([(0, 1), (3, 4), (1, 3)]):
            where = [f"rnn.weight_{name}", f"at{first}", f"at{last}", "axis"]
            nodes.append(helper.make_node("Slice", where, [f"{name}{part}"]))
        nodes.append(
            helper.make_node("Concat", [f"{name}{part}" for part in range(3)], [f"{name}_all"], axis=0)
        )
        nodes.append(helper.make_node("Unsqueeze", [f"{name}_all", "axis"], [f"{name}_w"]))
    nodes.append(helper.make_node("LSTM", ["x", "ih_w", "hh_w"], ["y"], hidden_size=HIDDEN))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 1, INPUTS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 1, 1, HIDDEN])],
        [numpy_helper.from_array(value, name) for name, value in stored.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)


def weights(path: Path) -> dict[str, np.ndarray]:
    found = onnx.load(path)
    onnx.checker.check_model(found)
    return {item.name: numpy_helper.to_array(item) for item in found.graph.initializer}


def test_every_gate_is_clipped_where_it_is_stored(tmp_path: Path) -> None:
    source, target = tmp_path / "lstm.onnx", tmp_path / "out.onnx"
    model(source)
    report = spectool.clip(source, max={"*ih[[]*": 1.5, "rnn.weight_hh[[]6:12[]]": 1.0}, out=target)
    assert sum(row.action == "clipped" for row in report.rows) == 5
    assert report.exit_code() == 0
    old, new = weights(source), weights(target)
    for gate in range(4):
        rows = slice(gate * HIDDEN, (gate + 1) * HIDDEN)
        for name, limit in (("rnn.weight_ih", 1.5), ("rnn.weight_hh", 1.0 if gate == 1 else None)):
            before, after = old[name][rows].astype(float), new[name][rows].astype(float)
            if limit is None:
                assert np.array_equal(before, after)
                continue
            u, s, vh = np.linalg.svd(before, full_matrices=False)
            assert s[0] > limit
            # The nearest matrix is the clipped one, gate by gate.
            np.testing.assert_allclose(after, (u * np.minimum(s, limit)) @ vh, atol=1e-5)
            assert np.linalg.svd(after, compute_uv=False)[0] <= limit * (1 + 1e-9)
