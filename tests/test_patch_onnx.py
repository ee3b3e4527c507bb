"""Lossless writing of ONNX models, wherever a tensor's values stand in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from checkpoint_files import REAL, same, values
from onnx import TensorProto, helper, numpy_helper
from onnx_models import run
from patch_tools import SAMPLES, assert_clean, assert_inside, halved, octets, replaced, written

from spectool.checkpoint import can_write, open_checkpoint, write_checkpoint
from spectool.errors import CorruptFile, OutputError

Proto = TensorProto


def model(nodes: list[Any], initializers: list[Any], **options: Any) -> onnx.ModelProto:
    value = helper.make_tensor_value_info("x", Proto.FLOAT, [1, 3])
    nodes = [*nodes, helper.make_node("Identity", ["x"], ["y"])]
    graph = helper.make_graph(
        nodes, "g", [value], [helper.make_tensor_value_info("y", Proto.FLOAT, [1, 3])], initializers
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21)], producer_name="me", **options
    )


def save(path: Path, proto: onnx.ModelProto, **options: Any) -> bytes:
    onnx.save(proto, path, **options)
    return path.read_bytes()


def test_raw_data_is_written_in_place(tmp_path: Path) -> None:
    for number, name in enumerate(("digits_cnn.onnx", "digits_mlp.onnx")):
        path, out = SAMPLES / name, tmp_path / f"{number}.onnx"
        data = path.read_bytes()
        checkpoint = open_checkpoint(path)
        edits = halved(checkpoint, data)
        result = write_checkpoint(checkpoint, out, edits)
        assert out.read_bytes() == replaced(data, {key: checkpoint.read(key) for key in edits}, edits)
        assert_inside(data, out.read_bytes(), result, out)
        proto = onnx.load(out)
        onnx.checker.check_model(proto)
        weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
        assert all(np.array_equal(weights[key], tensor.numpy()) for key, tensor in edits.items())


def test_the_runtime_computes_with_the_new_weights(tmp_path: Path) -> None:
    path, out = SAMPLES / "digits_mlp.onnx", tmp_path / "out.onnx"
    checkpoint = open_checkpoint(path)
    weight, bias = torch.zeros(10, 24), values((10,))
    names = {checkpoint.tensors[name].shape: name for name in checkpoint.tensors}
    write_checkpoint(checkpoint, out, {names[10, 24]: weight, names[10,]: bias})
    (result,) = run(onnx.load(out), {"image": np.ones((1, 64), np.float32)})
    assert np.array_equal(result[0], bias.numpy())


TYPED = [
    (Proto.FLOAT, torch.float32),
    (Proto.DOUBLE, torch.float64),
    (Proto.FLOAT16, torch.float16),
    (Proto.BFLOAT16, torch.bfloat16),
    (Proto.FLOAT8E4M3FN, torch.float8_e4m3fn),
    (Proto.FLOAT8E5M2, torch.float8_e5m2),
    (Proto.INT8, torch.int8),
    (Proto.UINT8, torch.uint8),
    (Proto.INT32, torch.int32),
    (Proto.INT64, torch.int64),
    (Proto.UINT32, torch.uint32),
    (Proto.UINT64, torch.uint64),
    (Proto.BOOL, torch.bool),
    (Proto.COMPLEX64, torch.complex64),
    (Proto.COMPLEX128, torch.complex128),
]


def typed_model(kind: int, numbers: Any) -> onnx.ModelProto:
    """A tensor in its typed field, in front of and behind others."""
    before, after = (
        helper.make_tensor("a", kind, [2], numbers[:2]),
        helper.make_tensor("z", kind, [2], numbers[1:3]),
    )
    return model([], [before, helper.make_tensor("w", kind, [2, 3], numbers), after])


@pytest.mark.parametrize("kind, dtype", TYPED, ids=lambda value: str(value))
def test_values_in_typed_fields(tmp_path: Path, kind: int, dtype: torch.dtype) -> None:
    """Small floats stand there as numbers of one to three bytes: lengths change all the way up."""
    old, new = np.array([0, 1, 1, 0, 2, 3]), np.array([3, 0, 16, 1, 0, 2])
    if dtype in (torch.int8, torch.int32, torch.int64):
        new = -new
    elif dtype == torch.bool:
        old, new = old > 0, new > 0
    path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    save(path, typed_model(kind, old))
    wanted = typed_model(kind, old)
    wanted.graph.initializer[1].CopyFrom(helper.make_tensor("w", kind, [2, 3], new))
    edit = (
        torch.from_numpy(new.reshape(2, 3)).to(torch.float32 if dtype.is_floating_point else dtype).to(dtype)
    )
    result = written(path, out, {"w": edit})
    assert out.read_bytes() == wanted.SerializeToString()
    assert same(open_checkpoint(out).read("w"), edit)
    # Positions that are reported count in the new file: without those bytes it is a part of the old one.
    data = out.read_bytes()
    first, last = min(start for _, start, _ in result.changed), max(stop for _, _, stop in result.changed)
    before = path.read_bytes()
    assert data[:first] == before[:first]
    assert data[last:] == before[len(before) - (len(data) - last) :]


def test_numbers_that_are_not_packed_or_split(tmp_path: Path) -> None:
    """Protobuf allows packed numbers in several runs, and single ones between them."""
    path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    halves = np.array([2, 1, 4, 5], np.float16).view(np.uint16)

    def varint(value: int) -> bytes:
        # Three bytes even for 1.0, for which two would do: a value that stays keeps its bytes.
        return bytes([value & 0x7F | 0x80, value >> 7 & 0x7F | 0x80, value >> 14])

    def message(numbers: list[int]) -> bytes:
        a, b, c, d = (varint(int(number)) for number in numbers)
        fields = b"\x08\x04" + b"\x10\x0a" + b"\x28" + a + b"\x2a\x06" + b + c + b"\x42\x01w" + b"\x28" + d
        tensor = b"\x2a" + bytes([len(fields)]) + fields
        rest = model([], [])
        rest.ClearField("graph")
        body = model([], []).graph.SerializeToString() + tensor
        return rest.SerializeToString() + b"\x3a" + bytes([len(body)]) + body

    path.write_bytes(message(halves.tolist()))
    new = torch.tensor([8.0, 1.0, -3.0, 16.0], dtype=torch.float16)
    written(path, out, {"w": new})
    assert same(open_checkpoint(out).read("w"), new)
    assert out.read_bytes() == message(new.view(torch.uint16).tolist())


@pytest.mark.parametrize("old, new", [(0.0, -1.0), (-1.0, 0.0)])
def test_lengths_that_need_more_bytes_themselves(tmp_path: Path, old: float, new: float) -> None:
    """From 60 bytes of numbers to 180 and back: the lengths of every block around them gain or lose a byte."""
    path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"

    def proto(value: float) -> onnx.ModelProto:
        return model([], [helper.make_tensor("w", Proto.FLOAT16, [60], [value] * 60)])

    save(path, proto(old))
    written(path, out, {"w": torch.full((60,), new, dtype=torch.float16)})
    assert out.read_bytes() == proto(new).SerializeToString()


def nested() -> onnx.ModelProto:
    """Weights in Constant nodes, in the branches of an If and in a local function."""

    def branch(value: float) -> onnx.GraphProto:
        tensor = numpy_helper.from_array(np.full(40, value, np.float32) + np.arange(40, dtype=np.float32))
        nodes = [helper.make_node("Constant", [], ["k"], value=tensor)]
        nodes.append(helper.make_node("Identity", ["k"], ["out"]))
        return helper.make_graph(nodes, "b", [], [helper.make_tensor_value_info("out", Proto.FLOAT, None)])

    half = helper.make_tensor("t", Proto.FLOAT16, [2], [1.0, 2.0])
    nodes = [
        helper.make_node("Constant", [], ["c"], value=half),
        helper.make_node("Constant", [], ["f"], value_float=1.5),
        helper.make_node("Constant", [], ["fs"], value_floats=[1.5, 2.5, 3.5]),
        helper.make_node("Constant", [], ["i"], value_int=300),
        helper.make_node("Constant", [], ["is"], value_ints=[1, 300, -5]),
        helper.make_node(
            "If", ["cond"], ["z"], name="choice", else_branch=branch(200), then_branch=branch(100)
        ),
    ]
    inner = helper.make_node(
        "Constant", [], ["w"], value=numpy_helper.from_array(np.arange(5, dtype=np.float32))
    )
    function = helper.make_function("own", "f", ["a"], ["w"], [inner], [helper.make_opsetid("", 21)])
    return model(nodes, [numpy_helper.from_array(np.array(True), "cond")], functions=[function])


def test_constants_branches_and_functions(tmp_path: Path) -> None:
    path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    save(path, nested())
    edits = {
        "c": torch.tensor([0.0, 0.5], dtype=torch.float16),
        "f": torch.tensor(-2.5),
        "fs": torch.tensor([0.0, -1.0, 7.0]),
        "i": torch.tensor(5),
        "is": torch.tensor([1, -1, 70000]),
        "choice.then.k": values((40,)),
        "choice.else.k": values((40,), seed=1),
        "w": values((5,), seed=2),
    }
    written(path, out, edits)
    wanted = nested()
    nodes = {node.output[0]: node for node in wanted.graph.node}
    nodes["c"].attribute[0].t.CopyFrom(helper.make_tensor("t", Proto.FLOAT16, [2], [0.0, 0.5]))
    nodes["f"].attribute[0].f = -2.5
    nodes["fs"].attribute[0].floats[:] = [0.0, -1.0, 7.0]
    nodes["i"].attribute[0].i = 5
    nodes["is"].attribute[0].ints[:] = [1, -1, 70000]
    for attribute in nodes["z"].attribute:
        key = f"choice.{attribute.name.split('_')[0]}.k"
        attribute.g.node[0].attribute[0].t.raw_data = octets(edits[key])
    wanted.functions[0].node[0].attribute[0].t.raw_data = octets(edits["w"])
    assert out.read_bytes() == wanted.SerializeToString()


def test_unknown_fields_and_their_order_stay(tmp_path: Path) -> None:
    """Loading and serialising would put the fields of this file into another order."""
    path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    proto = typed_model(Proto.FLOAT16, [0, 1, 1, 0, 2, 3])
    parts = model([], [])
    parts.ClearField("graph")
    body = proto.graph.SerializeToString() + b"\xca\x3e\x03abc"
    data = (
        parts.SerializeToString()[:2]
        + b"\x3a"
        + onnx_varint(len(body))
        + body
        + parts.SerializeToString()[2:]
    )
    path.write_bytes(data + b"\xc2\x02\x03xyz")
    new = torch.tensor([[3.0, 2, 1], [0, 5, 6]]).half()
    written(path, out, {"w": new})
    assert same(open_checkpoint(out).read("w"), new)
    tensor = proto.graph.initializer[1].SerializeToString()
    other = helper.make_tensor("w", Proto.FLOAT16, [2, 3], new.flatten().tolist()).SerializeToString()
    changed = body.replace(bytes([len(tensor)]) + tensor, bytes([len(other)]) + other)
    assert changed != body
    head = b"\x3a" + onnx_varint(len(body)) + body
    assert out.read_bytes() == path.read_bytes().replace(head, b"\x3a" + onnx_varint(len(changed)) + changed)


def onnx_varint(value: int) -> bytes:
    assert value < 2**14
    return bytes([value]) if value < 128 else bytes([value & 0x7F | 0x80, value >> 7])


def test_a_message_that_is_split_is_refused(tmp_path: Path) -> None:
    """Protobuf merges two graphs into one; where an initializer stands is then another question."""
    path = tmp_path / "in.onnx"
    data = save(path, model([], [numpy_helper.from_array(np.ones(4, np.float32), "w")]))
    path.write_bytes(data + b"\x3a\x00")
    checkpoint = open_checkpoint(path)
    with pytest.raises(CorruptFile, match=r"cannot be followed byte by byte .field graph is there 2 times"):
        checkpoint.write(tmp_path / "out.onnx", {"w": torch.zeros(4)})
    assert_clean(tmp_path, "in.onnx")


def test_packed_types_say_why_not(tmp_path: Path) -> None:
    path = tmp_path / "in.onnx"
    save(path, model([], [helper.make_tensor("w", Proto.INT4, [2, 2], [0, 1, 2, 3])]))
    checkpoint = open_checkpoint(path)
    assert "packed or quantised" in str(can_write(checkpoint, "w"))
    with pytest.raises(OutputError, match="'w' cannot be written: it is stored as packed"):
        checkpoint.write(tmp_path / "out.onnx", {"w": torch.zeros(2, 2, dtype=torch.int8)})


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -0.0])
@pytest.mark.parametrize("kind, dtype", [(Proto.BFLOAT16, torch.bfloat16), (Proto.FLOAT, torch.float32)])
def test_special_values(tmp_path: Path, kind: int, dtype: torch.dtype, special: float) -> None:
    path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    save(path, model([], [helper.make_tensor("w", kind, [2], [1.0, 2.0])]))
    new = torch.tensor([special, 1.0], dtype=dtype)
    written(path, out, {"w": new})
    stored = onnx.load(out).graph.initializer[0]
    bits = np.array(stored.int32_data, np.uint16).tobytes() if kind == Proto.BFLOAT16 else None
    assert (bits or np.array(stored.float_data, np.float32).tobytes()) == octets(new)


@pytest.mark.real
@pytest.mark.skipif(not REAL.exists(), reason="the real checkpoints are not here")
@pytest.mark.parametrize("name", ["silero_vad.onnx", "ultraface_rfb320.onnx", "wonnx_opt_mnist.onnx"])
def test_real_models(tmp_path: Path, name: str) -> None:
    path, out = REAL / name, tmp_path / "out.onnx"
    checkpoint = open_checkpoint(path)
    edits = {
        key: checkpoint.read(key) * 0.5
        for key in checkpoint.tensors
        if checkpoint.read(key).is_floating_point()
    }
    result = checkpoint.write(out, edits)
    before, after = (np.frombuffer(file.read_bytes(), np.uint8) for file in (path, out))
    inside = np.zeros(len(before), bool)
    for _, start, stop in result.changed:
        inside[start:stop] = True
    assert not (before != after)[~inside].any()
    assert sum(stop - start for _, start, stop in result.changed) == sum(
        edit.nbytes for edit in edits.values()
    )
    onnx.checker.check_model(onnx.load(out))
