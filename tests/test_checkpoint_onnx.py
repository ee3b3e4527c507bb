"""ONNX models: every stored tensor as onnx.numpy_helper gives it, wherever it stands."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from checkpoint_files import assert_equals, run_python, values
from onnx import TensorProto, helper, numpy_helper

from spectool.checkpoint import Limits, open_checkpoint
from spectool.errors import CheckpointError, CorruptFile, LimitExceeded, NothingToAnalyse, UnrecognisedFormat

Proto = TensorProto


def model(nodes: list[Any], initializers: list[Any] = (), **options: Any) -> onnx.ModelProto:
    value = helper.make_tensor_value_info("x", Proto.FLOAT, [1, 3])
    graph = helper.make_graph(
        nodes, "g", [value], [helper.make_tensor_value_info("y", Proto.FLOAT, None)], initializers
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], **options)


def identity() -> onnx.NodeProto:
    return helper.make_node("Identity", ["x"], ["y"])


NUMPY = [
    np.float32,
    np.float64,
    np.float16,
    np.int64,
    np.int32,
    np.int16,
    np.int8,
    np.uint8,
    np.uint16,
    np.uint32,
]
NUMPY += [np.uint64, np.bool_, np.complex64, np.complex128]


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("dtype", NUMPY, ids=lambda t: t.__name__)
def test_numpy_types_raw_and_external(tmp_path: Path, dtype: type, external: bool) -> None:
    arrays = {
        "m": np.arange(6).reshape(2, 3).astype(dtype),
        "s": np.array(1).astype(dtype),
        "e": np.zeros((0, 3), dtype),
    }
    proto = model([identity()], [numpy_helper.from_array(array, name) for name, array in arrays.items()])
    path = tmp_path / "net.any"
    onnx.save(proto, path, save_as_external_data=external, location="w.bin", size_threshold=0)
    checkpoint = assert_equals(path, {name: torch.from_numpy(array) for name, array in arrays.items()})
    ref = checkpoint.tensors["m"]
    if external:
        assert ref.file == tmp_path / "w.bin"
        assert ref.file.read_bytes()[ref.position :][: ref.nbytes] == arrays["m"].tobytes()
        assert not checkpoint.program.graph.initializer[0].raw_data
    else:
        assert ref.position is None


@pytest.mark.parametrize(
    "kind, dtype",
    [
        (Proto.BFLOAT16, torch.bfloat16),
        (Proto.FLOAT8E4M3FN, torch.float8_e4m3fn),
        (Proto.FLOAT8E5M2, torch.float8_e5m2),
        (Proto.FLOAT16, torch.float16),
        (Proto.FLOAT, torch.float32),
        (Proto.INT8, torch.int8),
        (Proto.BOOL, torch.bool),
        (Proto.UINT64, torch.uint64),
        (Proto.INT4, torch.int8),
        (Proto.UINT4, torch.uint8),
    ],
)
def test_values_in_typed_fields(tmp_path: Path, kind: int, dtype: torch.dtype) -> None:
    """make_tensor puts them in float_data, int32_data, int64_data or uint64_data, as older exporters do."""
    proto = helper.make_tensor("w", kind, [2, 3], [0, 1, 1, 0, 2, 3])
    assert not proto.raw_data
    path = tmp_path / "net.onnx"
    onnx.save(model([identity()], [proto]), path)
    truth = torch.from_numpy(numpy_helper.to_array(proto).astype(np.float32)).to(dtype)
    assert_equals(path, {"w": truth})


def test_external_bfloat16(tmp_path: Path) -> None:
    proto = helper.make_tensor("w", Proto.BFLOAT16, [2, 3], [0, 1, 1, 0, 2, 3])
    raw = helper.make_tensor(
        "w", Proto.BFLOAT16, [2, 3], np.array(proto.int32_data, np.uint16).tobytes(), raw=True
    )
    onnx.save(model([identity()], [raw]), tmp_path / "net.onnx", save_as_external_data=True, size_threshold=0)
    truth = torch.from_numpy(numpy_helper.to_array(proto).astype(np.float32)).to(torch.bfloat16)
    assert_equals(tmp_path / "net.onnx", {"w": truth})


def test_constants_of_every_kind(tmp_path: Path) -> None:
    matrix = values((2, 2))
    nodes = [
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(matrix.numpy(), "inner")),
        helper.make_node("Constant", [], ["f"], value_float=1.5),
        helper.make_node("Constant", [], ["fs"], value_floats=[1.5, 2.5]),
        helper.make_node("Constant", [], ["i"], value_int=7),
        helper.make_node("Constant", [], ["is"], value_ints=[7, 8, 9]),
        helper.make_node("Constant", [], ["t"], value_string="text"),
        identity(),
    ]
    onnx.save(model(nodes), tmp_path / "net.onnx")
    truth = {"c": matrix, "f": torch.tensor(1.5), "fs": torch.tensor([1.5, 2.5])}
    truth |= {"i": torch.tensor(7), "is": torch.tensor([7, 8, 9])}
    checkpoint = assert_equals(tmp_path / "net.onnx", truth)
    assert checkpoint.unread == {"t": "strings"}


def branch(value: float, name: str) -> onnx.GraphProto:
    nodes = [
        helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(np.full(2, value, np.float32))),
        helper.make_node("Add", ["w", "k"], ["out"]),
    ]
    output = helper.make_tensor_value_info("out", Proto.FLOAT, [2])
    own = numpy_helper.from_array(np.full(2, 10 * value, np.float32), "w")
    lone = numpy_helper.from_array(np.full(3, value, np.float32), f"only_{name}")
    return helper.make_graph(nodes, name, [], [output], [own, lone])


def test_graphs_inside_nodes_keep_unique_names(tmp_path: Path) -> None:
    condition = numpy_helper.from_array(np.array(True), "cond")
    # The else branch is written first, as some exporters do.
    node = helper.make_node(
        "If", ["cond"], ["z"], name="choice", else_branch=branch(2, "else"), then_branch=branch(1, "then")
    )
    onnx.save(model([node, identity()], [condition]), tmp_path / "net.onnx")
    ones = torch.ones(2)
    truth = {
        "cond": torch.tensor(True),
        "choice.then.w": 10 * ones,
        "only_then": torch.ones(3),
        "choice.then.k": ones,
        "choice.else.w": 20 * ones,
        "only_else": 2 * torch.ones(3),
        "choice.else.k": 2 * ones,
    }
    assert_equals(tmp_path / "net.onnx", truth)


def test_tensors_without_a_name(tmp_path: Path) -> None:
    nameless = [numpy_helper.from_array(np.full(2, i, np.float32)) for i in range(2)]
    onnx.save(model([identity()], nameless), tmp_path / "net.onnx")
    assert_equals(tmp_path / "net.onnx", {f"initializer_{i}": torch.full((2,), float(i)) for i in range(2)})


def test_local_functions(tmp_path: Path) -> None:
    node = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(np.ones(2, np.float32)))
    function = helper.make_function("own", "f", ["a"], ["w"], [node], [helper.make_opsetid("", 21)])
    proto = model([identity()], [numpy_helper.from_array(np.zeros(2, np.float32), "w")], functions=[function])
    onnx.save(proto, tmp_path / "net.onnx")
    assert_equals(tmp_path / "net.onnx", {"w": torch.zeros(2), "own.f.w": torch.ones(2)})


def test_sparse_and_text_initializers_are_explained(tmp_path: Path) -> None:
    proto = model([identity()], [helper.make_tensor("t", Proto.STRING, [1], [b"x"])])
    data, places = (
        numpy_helper.from_array(np.ones(1, np.float32), "s"),
        numpy_helper.from_array(np.zeros(1, np.int64)),
    )
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(data, places, [3]))
    onnx.save(proto, tmp_path / "net.onnx")
    assert open_checkpoint(tmp_path / "net.onnx").unread == {"t": "strings", "s": "a sparse tensor"}


def test_program_and_facts(tmp_path: Path) -> None:
    proto = model([identity()], [numpy_helper.from_array(np.ones(2, np.float32), "w")], producer_name="me")
    helper.set_model_props(proto, {"author": "x"})
    onnx.save(proto, tmp_path / "net.onnx")
    checkpoint = open_checkpoint(tmp_path / "net.onnx")
    assert checkpoint.program == proto
    facts = checkpoint.metadata["onnx"]
    assert (facts["producer"], facts["opsets"], facts["metadata_props"]) == (
        "me",
        {"ai.onnx": 21},
        {"author": "x"},
    )


def test_gzipped_model_with_external_data(tmp_path: Path) -> None:
    proto = model([identity()], [numpy_helper.from_array(np.arange(8, dtype=np.float32), "w")])
    onnx.save(proto, tmp_path / "net.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    (tmp_path / "net.onnx.gz").write_bytes(gzip.compress((tmp_path / "net.onnx").read_bytes()))
    checkpoint = assert_equals(tmp_path / "net.onnx.gz", {"w": torch.arange(8.0)})
    assert checkpoint.metadata["gzip"] is True


def external(tmp_path: Path, **entries: str) -> Path:
    tensor = Proto(name="w", data_type=Proto.FLOAT, dims=[2, 2], data_location=Proto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    path = tmp_path / "model" / "net.onnx"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(model([identity()], [tensor]).SerializeToString())
    return path


@pytest.mark.parametrize(
    "location",
    [
        "../secret.bin",
        "/etc/passwd",
        "a/../../secret.bin",
        "..\\secret.bin",
        "C:\\x.bin",
        "",
        "link.bin",
        "sub/x.bin",
    ],
)
def test_external_data_outside_the_folder(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(16))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.bin").write_bytes(bytes(16))
    path = external(tmp_path, location=location)
    (path.parent / "link.bin").symlink_to(tmp_path / "secret.bin")
    (path.parent / "sub").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(CorruptFile, match="external data of tensor 'w' lies outside the model's folder"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "entries, error, message",
    [
        ({}, CheckpointError, "external data file 'w.bin' is missing"),
        ({"offset": "8"}, CorruptFile, r"w\.bin ends after 16 bytes; tensor 'w' needs 24"),
        ({"offset": "-8"}, CorruptFile, "impossible offset"),
        ({"offset": "x"}, CorruptFile, "impossible offset"),
        ({"length": "12"}, CorruptFile, "needs 16 bytes of external data, 12 are declared"),
    ],
)
def test_external_data_that_is_not_all_there(
    tmp_path: Path, entries: dict[str, str], error: type[Exception], message: str
) -> None:
    path = external(tmp_path, location="w.bin", **entries)
    if entries:
        (path.parent / "w.bin").write_bytes(bytes(16))
    with pytest.raises(error, match=message):
        open_checkpoint(path)


def test_tied_external_data(tmp_path: Path) -> None:
    path = external(tmp_path, location="w.bin")
    proto = onnx.load(path, load_external_data=False)
    proto.graph.initializer.append(proto.graph.initializer[0])
    proto.graph.initializer[1].name = "v"
    path.write_bytes(proto.SerializeToString())
    (path.parent / "w.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    matrix = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    assert assert_equals(path, {"w": matrix, "v": matrix}).aliases == {"v": "w"}


def test_external_data_in_a_folder_below(tmp_path: Path) -> None:
    path = external(tmp_path, location="./data/w.bin", offset="4")
    (path.parent / "data").mkdir()
    (path.parent / "data" / "w.bin").write_bytes(np.arange(5, dtype=np.float32).tobytes())
    assert_equals(path, {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]])})


def test_fewer_values_than_the_shape_says(tmp_path: Path) -> None:
    tensor = Proto(name="w", data_type=Proto.FLOAT, dims=[4, 4], raw_data=bytes(8))
    onnx.save(model([identity()], [tensor]), tmp_path / "net.onnx")
    checkpoint = open_checkpoint(tmp_path / "net.onnx")
    with pytest.raises(CorruptFile, match="'w' has other bytes than its shape says"):
        checkpoint.read("w")


def test_cut_short_or_not_a_model(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(model([identity()], [numpy_helper.from_array(np.ones(100, np.float32), "w")]), path)
    data = path.read_bytes()
    path.write_bytes(data[:200])
    with pytest.raises(CorruptFile, match="its ONNX graph needs"):
        open_checkpoint(path)
    path.write_bytes(data)
    with pytest.raises(LimitExceeded, match="limit model_bytes = 99"):
        open_checkpoint(path, limits=Limits(model_bytes=99))
    path.write_bytes(b"\x08\x07" + bytes(range(1, 100)))
    with pytest.raises(UnrecognisedFormat, match="none of the formats"):
        open_checkpoint(path)
    path.write_bytes(b"\x08\x07\x3a\x03\xff\xff\xff")
    with pytest.raises(CorruptFile, match="begins like an ONNX model but does not parse"):
        open_checkpoint(path)
    onnx.save(model([identity()]), path)
    with pytest.raises(NothingToAnalyse, match="an ONNX model without a single tensor"):
        open_checkpoint(path)


def test_fields_of_the_model_by_number_and_type(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    data = model([identity()], [numpy_helper.from_array(np.ones(2, np.float32), "w")]).SerializeToString()
    # Field 40 does not exist yet; field 5 (model_version) is a number, not a block of bytes.
    path.write_bytes(data + b"\xc2\x02\x03abc")
    assert_equals(path, {"w": torch.ones(2)})
    for wrong in (b"\x2a\x03abc", b"\xc5\x02abcd", b"\xc2\x02\x7fabc", b"\x02\x01a"):
        path.write_bytes(data + wrong)
        with pytest.raises(UnrecognisedFormat, match="none of the formats"):
            open_checkpoint(path)


def test_only_onnx_is_imported(tmp_path: Path) -> None:
    onnx.save(
        model([identity()], [numpy_helper.from_array(np.ones(2, np.float32), "w")]), tmp_path / "net.onnx"
    )
    code = (
        "import sys\nfrom spectool.checkpoint import open_checkpoint\n"
        f"print(list(open_checkpoint({str(tmp_path / 'net.onnx')!r}).tensors))\n"
        "print([name for name in ('torch', 'onnx2torch', 'pandas') if name in sys.modules])"
    )
    assert run_python(code) == "['w']\n[]"
