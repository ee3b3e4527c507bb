"""The ONNX front-end on models trained by others: every operator found, every region equal to ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from onnx_models import FLOAT, Array, replayed, run

from spectool.checkpoint import open_checkpoint
from spectool.checkpoint.types import Checkpoint
from spectool.graph.onnx import survey_onnx
from spectool.graph.types import Region, Survey
from spectool.lower import lower

REAL = Path(__file__).resolve().parents[2] / "shared" / "real_models"
FILES = {
    "wonnx_opt_mnist.onnx": None,
    "ultraface_rfb320.onnx": None,
    "silero_vad.onnx": {"input": (1, 512)},
}
pytestmark = pytest.mark.real


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Many small convolutions: threads that wait for each other cost ten times what they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def opened(file: str) -> tuple[Checkpoint, Survey]:
    if not (REAL / file).exists():
        pytest.skip(f"{file} is not here")
    checkpoint = open_checkpoint(REAL / file)
    return checkpoint, survey_onnx(checkpoint, inputs=FILES[file])


def graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from graphs(attribute.g)


def matrices(model: Any, *operations: str) -> set[str]:
    """Names of the weights of all nodes of some kinds, in all bodies."""
    return {
        node.input[1] for graph in graphs(model.graph) for node in graph.node if node.op_type in operations
    }


def between(graph: Any, root: str, exit: str) -> onnx.ModelProto:
    """A model of the nodes of one graph from root to exit, by walking back from the exit."""
    makers = {name: node for node in graph.node for name in node.output}
    stored = {tensor.name: tensor for tensor in graph.initializer}
    kept: dict[int, Any] = {}
    tensors: dict[str, Any] = {}
    pending = [exit]
    while pending:
        name = pending.pop()
        if name in stored:
            tensors[name] = stored[name]
        elif name != root and name and id(makers[name]) not in kept:
            kept[id(makers[name])] = makers[name]
            pending += makers[name].input
    nodes = [node for node in graph.node if id(node) in kept]
    body = helper.make_graph(
        nodes,
        "region",
        [helper.make_tensor_value_info(root, FLOAT, None)],
        [helper.make_tensor_value_info(exit, FLOAT, None)],
        list(tensors.values()),
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 16)], ir_version=8)


def truth(model: Any, item: Region, x: Array, y: Array) -> Array:
    """f(x) − f(y) by ONNX Runtime, on the region cut out of the file."""
    (graph,) = [
        graph for graph in graphs(model.graph) if any(item.exit in node.output for node in graph.node)
    ]
    cut = between(graph, item.root, item.exit)
    cut.opset_import[0].version = model.opset_import[0].version
    lead: Sequence[int] = (1,) if item.batched else ()
    first, second = (run(cut, {item.root: z.reshape(*lead, *z.shape)})[0] for z in (x, y))
    return (first.astype(np.float64) - second)[0] if item.batched else first.astype(np.float64) - second


@pytest.mark.parametrize("file", FILES)
def test_every_operator_is_found_once_and_none_is_skipped(file: str) -> None:
    checkpoint, survey = opened(file)
    layers = [item for item in survey.items if isinstance(item, Region) and item.level == "layer"]
    convolutions = matrices(checkpoint.program, "Conv", "ConvTranspose")
    found = {name for item in layers if item.kind.startswith("conv") for name in item.weights}
    assert found == convolutions
    products = matrices(checkpoint.program, "Gemm") | matrices(checkpoint.program, "MatMul")
    assert {name for item in layers if item.kind == "linear" for name in item.weights} == products
    norms = {n.input[1] for n in checkpoint.program.graph.node if n.op_type == "BatchNormalization"}
    assert {item.key for item in layers if item.kind == "batchnorm"} == norms
    gates = [item for item in layers if item.kind == "lstm"]
    assert len(gates) == (16 if file == "silero_vad.onnx" else 0)
    assert sum(item.operators for item in survey.items if getattr(item, "level", "layer") == "layer") == len(
        convolutions | products
    ) + len(gates)
    assert not any(item.operators for item in survey.items if not isinstance(item, Region))


@pytest.mark.parametrize("file", FILES)
def test_every_maximal_region_equals_onnxruntime(file: str) -> None:
    checkpoint, survey = opened(file)
    generator = np.random.default_rng(0)
    checked = 0
    for item in survey.items:
        if not isinstance(item, Region) or not item.maximal or item.kind in ("lstm", "embedding"):
            continue
        if item.in_shape is None:
            assert item.assumed == ("infinite grid",)
            continue
        x, y = generator.standard_normal((2, *item.in_shape)).astype(np.float32)
        expected = truth(checkpoint.program, item, x, y)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(replayed(item, survey, x, y), expected, rtol=0, atol=2e-5 * scale)
        operator = lower(item, survey.load, dtype=torch.float64)
        image = operator.matvec(torch.from_numpy(x - y).double().reshape(1, *operator.in_shape))
        # A lone operator is lowered without the rearrangements around it.
        assert image.numel() == expected.size
        if not any(node.op.__class__.__name__ == "Call" for node in item.nodes):
            np.testing.assert_allclose(
                image[0].numpy().reshape(expected.shape), expected, rtol=0, atol=2e-5 * scale
            )
        else:
            assert float(image.norm()) == pytest.approx(float(np.linalg.norm(expected)), rel=1e-4)
        checked += 1
    # The detector: 52 convolutions, of which three pairs are one region each, and four scalings of boxes.
    assert checked == {"wonnx_opt_mnist.onnx": 3, "ultraface_rfb320.onnx": 53, "silero_vad.onnx": 13}[file]


def test_lstm_gates_are_rows_of_the_stored_weights() -> None:
    checkpoint, survey = opened("silero_vad.onnx")
    for branch in ("then", "else"):
        for name in ("weight_ih", "weight_hh"):
            stored = f"If_0_{branch}_branch__Inline_0__decoder.rnn.{name}"
            tensor = checkpoint.read(stored)
            for start in range(0, 512, 128):
                key = f"{stored}[{start}:{start + 128}]"
                (item,) = [item for item in survey.items if item.key == key]
                assert isinstance(item, Region)
                assert (item.weights, item.weight_shapes) == ((stored,), ((512, 128),))
                got = survey.load(item.nodes[0].inputs[1])
                torch.testing.assert_close(got, tensor[start : start + 128], rtol=0, atol=0)


def test_the_detector_has_its_pairs_and_its_linear_bottlenecks() -> None:
    checkpoint, survey = opened("ultraface_rfb320.onnx")
    program = checkpoint.program.graph
    convs = {node.output[0]: node.input[1] for node in program.node if node.op_type == "Conv"}
    pairs = {
        f"{convs[node.input[0]]} + {node.input[1]}"
        for node in program.node
        if node.op_type == "BatchNormalization" and node.input[0] in convs
    }
    assert len(pairs) == 35
    assert pairs <= {
        item.key for item in survey.items if isinstance(item, Region) and item.level == "composed"
    }
    # Three branches of the receptive-field block compose two convolutions without an activation between them.
    two = [item.key for item in survey.items if item.operators == 2]
    assert [key.split(".")[2] for key in two] == ["branch0", "branch1", "branch2"]


def test_an_open_input_is_asked_for() -> None:
    """Without a size every convolution is a row for any size, and the note says what to give."""
    if not (REAL / "silero_vad.onnx").exists():
        pytest.skip("silero_vad.onnx is not here")
    survey = survey_onnx(open_checkpoint(REAL / "silero_vad.onnx"))
    assert "open input input (?x?), state (2x?x128)" in survey.notes[-1]
    assert "--input input=1x512" in survey.notes[-1]
    layers = [item for item in survey.items if isinstance(item, Region) and item.kind == "conv1d"]
    assert {item.assumed for item in layers if item.level == "layer"} == {("infinite grid",)}
