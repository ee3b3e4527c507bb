"""Lossless writing of ONNX models whose weights stand in data files beside them."""

from __future__ import annotations

import gzip
import hashlib
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from checkpoint_files import values
from onnx import TensorProto, helper, numpy_helper
from patch_tools import SAMPLES, assert_clean, assert_inside, halved, replaced, written

from spectool.checkpoint import open_checkpoint, write_checkpoint
from spectool.errors import OutputError


def external(folder: Path, location: str = "w.bin", name: str = "in.onnx") -> onnx.ModelProto:
    """A model with two weights in a data file and one in itself."""
    folder.mkdir(exist_ok=True)
    tensors = [numpy_helper.from_array(values((4, 5), seed=n).numpy(), f"w{n}") for n in range(2)]
    tensors.append(helper.make_tensor("inside", TensorProto.FLOAT16, [3], [1.0, 2.0, 3.0]))
    value, result = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [result], tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    (folder / location).parent.mkdir(exist_ok=True, parents=True)
    for tensor in proto.graph.initializer[:2]:
        onnx.external_data_helper.set_external_data(tensor, location)
    plain = onnx.ModelProto.FromString(proto.SerializeToString())
    onnx.save_model(proto, folder / name)
    return plain


EDITS = {"w1": values((4, 5), seed=9), "inside": torch.tensor([0.0, 2.0, -1.0]).half()}


def loaded(path: Path) -> dict[str, np.ndarray]:
    onnx.checker.check_model(str(path))
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def assert_edited(path: Path) -> None:
    found = loaded(path)
    assert np.array_equal(found["w0"], values((4, 5)).numpy())
    assert all(np.array_equal(found[name], tensor.numpy()) for name, tensor in EDITS.items())


@pytest.mark.parametrize("location", ["w.bin", "data/w.bin"])
def test_external_data_is_copied_under_its_name(tmp_path: Path, location: str) -> None:
    external(tmp_path / "in", location)
    (tmp_path / "out").mkdir()
    before = {path: path.read_bytes() for path in (tmp_path / "in").rglob("*") if path.is_file()}
    out = tmp_path / "out" / "new.onnx"
    result = written(tmp_path / "in" / "in.onnx", out, {"w1": EDITS["w1"]})
    data = tmp_path / "out" / location
    assert set(result.files) == {out, data}
    assert out.read_bytes() == before[tmp_path / "in" / "in.onnx"]
    assert data.read_bytes() == replaced(
        before[tmp_path / "in" / location], {"w1": values((4, 5), seed=1)}, {"w1": EDITS["w1"]}
    )
    assert_inside(before[tmp_path / "in" / location], data.read_bytes(), result, data)
    assert {path: path.read_bytes() for path in before} == before
    assert np.array_equal(loaded(out)["w1"], EDITS["w1"].numpy())
    written(tmp_path / "in" / "in.onnx", tmp_path / "in" / "all.onnx", EDITS)
    assert_edited(tmp_path / "in" / "all.onnx")


def test_external_data_beside_the_original_gets_a_name_of_its_own(tmp_path: Path) -> None:
    external(tmp_path)
    before = (tmp_path / "in.onnx").read_bytes(), (tmp_path / "w.bin").read_bytes()
    out = tmp_path / "out.onnx"
    result = written(tmp_path / "in.onnx", out, EDITS)
    assert_clean(tmp_path, "in.onnx", "w.bin", "out.onnx", "out.onnx.data")
    assert set(result.files) == {out, tmp_path / "out.onnx.data"}
    assert ((tmp_path / "in.onnx").read_bytes(), (tmp_path / "w.bin").read_bytes()) == before
    assert_edited(out)
    # Only the name of the data file and the one tensor inside differ.
    proto, old = (
        onnx.load(out, load_external_data=False),
        onnx.load(tmp_path / "in.onnx", load_external_data=False),
    )
    for mine, theirs in zip(proto.graph.initializer, old.graph.initializer, strict=True):
        for entry in mine.external_data:
            if entry.key == "location":
                assert entry.value == "out.onnx.data"
                entry.value = "w.bin"
        if mine.name == "inside":
            mine.CopyFrom(theirs)
    assert proto.SerializeToString() == before[0]


def test_a_second_write_replaces_model_and_data(tmp_path: Path) -> None:
    external(tmp_path)
    out = tmp_path / "out.onnx"
    written(tmp_path / "in.onnx", out, {})
    with pytest.raises(OutputError, match=r"out.onnx exists already"):
        written(tmp_path / "in.onnx", out, EDITS)
    for _ in range(3):
        written(tmp_path / "in.onnx", out, EDITS, force=True)
        assert_edited(out)
        assert len(list(tmp_path.iterdir())) == 4
        assert_edited(out)


def test_external_data_in_place(tmp_path: Path) -> None:
    external(tmp_path)
    path = tmp_path / "in.onnx"
    with pytest.raises(OutputError, match=r"in.onnx is the input itself"):
        written(path, path, EDITS)
    with pytest.raises(OutputError, match=r"w.bin is a part of the input"):
        written(path, tmp_path / "w.bin", EDITS, force=True)
    model_before = path.stat().st_ino
    written(path, path, {"w1": EDITS["w1"]}, force=True)
    assert path.stat().st_ino == model_before
    written(path, path, EDITS, force=True)
    assert_edited(path)
    assert_clean(tmp_path, "in.onnx", "w.bin")


def test_checksums_of_data_files(tmp_path: Path) -> None:
    """The format allows a SHA-1 of the data file beside its name."""
    external(tmp_path)
    path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    proto = onnx.load(path, load_external_data=False)
    old = hashlib.sha1((tmp_path / "w.bin").read_bytes()).hexdigest()
    for tensor in proto.graph.initializer[:2]:
        tensor.external_data.add(key="checksum", value=old)
    path.write_bytes(proto.SerializeToString())
    written(path, out, EDITS)
    new = hashlib.sha1((tmp_path / "out.onnx.data").read_bytes()).hexdigest()
    entries = onnx.load(out, load_external_data=False).graph.initializer[1].external_data
    assert {entry.key: entry.value for entry in entries}["checksum"] == new != old
    before = path.read_bytes()
    written(path, path, {"w1": EDITS["w1"]}, force=True)
    new = hashlib.sha1((tmp_path / "w.bin").read_bytes()).hexdigest()
    assert path.read_bytes() == before.replace(old.encode(), new.encode())


def test_gzipped_model_with_external_data(tmp_path: Path) -> None:
    external(tmp_path)
    path, out = tmp_path / "in.onnx.gz", tmp_path / "out.onnx.gz"
    path.write_bytes(gzip.compress((tmp_path / "in.onnx").read_bytes()))
    written(path, out, EDITS)
    (tmp_path / "plain.onnx").write_bytes(gzip.decompress(out.read_bytes()))
    assert_edited(tmp_path / "plain.onnx")


def test_sample_with_external_data(tmp_path: Path) -> None:
    for name in ("digits_cnn_external.onnx", "digits_cnn_external.onnx.data"):
        shutil.copy(SAMPLES / name, tmp_path / name)
    path, out = tmp_path / "digits_cnn_external.onnx", tmp_path / "out.onnx"
    checkpoint = open_checkpoint(path)
    edits = halved(checkpoint, (tmp_path / "digits_cnn_external.onnx.data").read_bytes())
    assert edits
    write_checkpoint(checkpoint, out, edits)
    before, after = loaded(path), loaded(out)
    assert list(before) == list(after)
    for key, array in before.items():
        assert np.array_equal(after[key], edits[key].numpy() if key in edits else array)
