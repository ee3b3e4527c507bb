"""Inputs that once broke a promise, built in code: what the fuzzer found."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnx_models as om
import pytest
import torch
from onnx import helper
from safetensors.torch import load_file, save_file

from spectool import clip, inspect
from spectool.checkpoint import open_checkpoint
from spectool.cli.ls import ls
from spectool.errors import CheckpointError, CorruptFile, GraphError, OperatorError
from spectool.graph import survey
from spectool.linear import ConvGeometry, ConvMap, InfiniteConv, MatrixMap
from spectool.spectrum import supremum, svds


def test_a_shard_name_that_no_file_can_have(tmp_path: Path) -> None:
    for name in ("x" * 5000 + ".safetensors", "a\0b", "\ud800"):
        index = {"weight_map": {"w": name}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=r"is missing|is not valid JSON"):
            open_checkpoint(tmp_path)


def external(location: str, folder: Path) -> Path:
    """A model whose one weight lies in another file."""
    body = om.graph([om.node("MatMul", "x w", "y")], {"x": (1, 4)}, "y", {"w": om.weights(4, 4)})
    made = om.model(body)
    tensor = made.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    path = folder / "net.onnx"
    path.write_bytes(made.SerializeToString())
    return path


def test_external_data_under_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"outside the model's folder|is missing"):
        open_checkpoint(external("x" * 5000, tmp_path))
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match=r"outside the model's folder|is missing"):
        open_checkpoint(external("loop", tmp_path))


@pytest.mark.parametrize("text", [b"wonder", b"MatMul", b"locati", b"metaXX", b"sizeXX", b"x_in"])
def test_names_in_a_model_that_are_no_text(tmp_path: Path, text: bytes) -> None:
    """Protobuf hands out strings that are no UTF-8 as bytes, which ended in a TypeError wherever they were used."""
    path = external("locati", tmp_path)
    made = onnx.load(path, load_external_data=False)
    (tmp_path / "locati").write_bytes(bytes(64))
    made.metadata_props.add(key="metaXX", value="x")
    made.graph.input[0].name = made.graph.node[0].input[0] = "x_in"
    made.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "sizeXX"
    made.graph.initializer[0].name = made.graph.node[0].input[1] = "wonder"
    data = made.SerializeToString()
    path.write_bytes(data)
    assert list(open_checkpoint(path).tensors) == ["wonder"]
    assert text in data
    path.write_bytes(data.replace(text, b"\xff" * len(text)))
    with pytest.raises(CorruptFile, match="is no UTF-8 text"):
        open_checkpoint(path)


def test_a_sparse_tensor_that_contradicts_itself(tmp_path: Path) -> None:
    values = om.numpy_helper.from_array(np.ones(2, np.float32), "w")
    indices = om.numpy_helper.from_array(np.array([0, 5]), "i")
    for dims, kind in (((4, 4), 0), ((2, 2), 1), ((2**20, 2**20), 1)):
        body = om.graph([om.node("MatMul", "x w", "y")], {"x": (1, 4)}, "y")
        values.data_type = kind
        body.sparse_initializer.append(helper.make_sparse_tensor(values, indices, list(dims)))
        (tmp_path / "net.onnx").write_bytes(om.model(body).SerializeToString())
        with pytest.raises(GraphError, match="the sparse tensor 'w'"):
            survey(open_checkpoint(tmp_path / "net.onnx"))


def test_padding_of_two_billion_pixels_is_one_skipped_row(tmp_path: Path) -> None:
    """It asked for 17 GB; only what the padding makes is large, not the input, the output or the file."""
    far, wide = om.weights(2, 1, 3, 3), [2**31 - 1] * 4
    nodes = [
        om.node("Conv", "x w", "h", pads=wide, strides=[2**30, 2**30]),
        om.node("Relu", "h", "r"),
        om.node("Conv", "r v", "y"),
    ]
    body = om.graph(nodes, {"x": (1, 1, 8, 8)}, "y", {"w": far, "v": om.weights(3, 2, 1, 1)})
    (tmp_path / "net.onnx").write_bytes(om.model(body).SerializeToString())
    rows = {row.layer: row for row in inspect(tmp_path / "net.onnx", k=1).rows}
    assert rows["w"].status == "skipped"
    assert "entries take about" in rows["w"].note
    assert "GB are available" in rows["w"].note
    assert rows["v"].status == "ok"


def exported(folder: Path, net: torch.nn.Module, old: bytes, new: bytes) -> Path:
    """A small exported program with something else in its graph."""
    torch.export.save(torch.export.export(net.eval(), (torch.zeros(1, 1, 8, 8),)), folder / "good.pt2")
    with zipfile.ZipFile(folder / "good.pt2") as good, zipfile.ZipFile(folder / "net.pt2", "w") as bad:
        for name in good.namelist():
            data = good.read(name)
            if "/models/" in name:
                assert old in data
                data = data.replace(old, new)
            bad.writestr(name, data)
    return folder / "net.pt2"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "change", [{"as_float": {}}, {"as_int": "5"}, {"as_floats": [0.1]}, {"as_strings": 5}]
)
def test_an_exported_call_with_arguments_of_another_kind(tmp_path: Path, change: dict[str, object]) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    path = exported(tmp_path, net, b'"as_float": 1e-05', json.dumps(change).encode()[1:-1])
    report = inspect(path, k=1)
    assert any("does not follow torch.export's schema" in note for note in report.notes)
    assert [row.kind for row in report.rows if row.kind == "conv2d"] == ["conv2d"]


def test_listing_a_recurrent_matrix_without_columns(tmp_path: Path) -> None:
    tensors = {"rnn.weight_ih_l0": torch.zeros(4, 3), "rnn.weight_hh_l0": torch.zeros(4, 0)}
    save_file(tensors, tmp_path / "net.safetensors")
    assert ls(tmp_path / "net.safetensors", format="json", quiet=True) == 0


TYPES = [
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.int8,
    torch.bool,
]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_weights_of_types_that_torch_cannot_reduce(dtype: torch.dtype) -> None:
    """8-bit floats ended in NotImplementedError, and |-128| is -128 in int8."""
    stored = torch.tensor([[3.0, 1.0, 0.0], [2.0, 5.0, 1.0]]).to(dtype)
    if dtype == torch.int8:
        stored = torch.tensor([[-128, 0, 0], [0, -128, 0]], dtype=dtype)  # was certified as zero
    truth = np.linalg.svd(stored.double().numpy(), compute_uv=False)
    kernel = stored.reshape(2, 3, 1, 1)
    plain = ConvGeometry.plain(2)
    found = [
        svds(MatrixMap(stored), 1),
        svds(MatrixMap(stored), 1, method="lanczos"),
        svds(ConvMap(kernel, (3, 4, 4), plain), 1),
        supremum(InfiniteConv(kernel, plain)),
    ]
    for spectrum in found:
        assert spectrum.lower[0] <= truth[0] <= spectrum.upper[0]
        assert spectrum.values[0] == pytest.approx(truth[0], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_file_of_8_bit_floats_is_analysed_and_clipped(tmp_path: Path, dtype: torch.dtype) -> None:
    linear = torch.from_numpy(om.weights(6, 4)).to(dtype)
    broken = linear.clone()
    broken[1, 2] = torch.nan
    save_file({"a.weight": linear, "b.weight": broken}, tmp_path / "net.safetensors")
    fine, bad = inspect(tmp_path / "net.safetensors", k=1).rows
    truth = np.linalg.svd(linear.double().numpy(), compute_uv=False)[0]
    assert fine.sigma[0] == pytest.approx(truth, rel=1e-6)
    assert bad.status == "failed"
    assert "1 NaN or infinite values of 24" in bad.note
    clip(tmp_path / "net.safetensors", max=1.0, out=tmp_path / "out.safetensors")
    written = open_checkpoint(tmp_path / "out.safetensors").read("a.weight")
    assert written.dtype == dtype
    assert np.linalg.svd(written.double().numpy(), compute_uv=False)[0] <= 1.0


def test_complex_kernels_are_refused_at_any_size() -> None:
    with pytest.raises(OperatorError, match="complex"):
        supremum(InfiniteConv(torch.ones(1, 1, 1, 1, dtype=torch.complex64), ConvGeometry.plain(2)))


def test_a_stated_output_that_its_weight_cannot_give_is_not_cut_from_it(tmp_path: Path) -> None:
    """Recursion without end: rows that the weight does not have became a part that is all of it."""
    first, second = om.weights(24, 32, seed=1), om.weights(10, 24, seed=2)
    nodes = [om.node("Gemm", "x v", "h", transB=1), om.node("Gemm", "h w", "y", transB=1)]
    body = om.graph(nodes, {"x": (1, 32)}, "y", {"v": first, "w": second})
    # Without a known version nothing is inferred, and what the file states is all that is known.
    model = om.model(body, opset=0)
    model.graph.ClearField("output")
    model.graph.output.append(helper.make_tensor_value_info("y", 1, (1, 64)))
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    rows = {row.layer: row for row in inspect(tmp_path / "net.onnx", k=1).rows}
    for name, weight in (("v", first), ("w", second)):
        assert rows[name].sigma[0] == pytest.approx(np.linalg.norm(weight.astype(np.float64), 2), rel=1e-6)
    composed = rows["v + w"]
    assert composed.status != "ok" or composed.sigma[0] == pytest.approx(
        np.linalg.norm(second.astype(np.float64) @ first.astype(np.float64), 2), rel=1e-6
    )


@pytest.mark.filterwarnings("ignore")
def test_an_exported_program_that_names_a_constant_it_does_not_hold(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.ReLU()
    net = torch.nn.Sequential(*first, torch.nn.Conv2d(2, 2, 3), torch.nn.BatchNorm2d(2))
    path = exported(tmp_path, net, b'"parameter_name": "1.weight"', b'"parameter_name": "gone"')
    report = inspect(path, k=1)
    rows = {row.layer: row for row in report.rows}
    assert "constants of the program are not stored: gone" in report.notes[0]
    assert rows["gone"].status == rows["0.weight + gone"].status == "skipped"
    assert "'gone' is not stored in the file" in rows["gone"].note
    assert rows["0.weight"].status == rows["3.weight + 4.weight"].status == "ok"
    # The mean of the second batch norm follows from the first one's, which is not known.
    clipped = clip(path, max={"3.weight + 4.weight": 0.1}, out=tmp_path / "out.pt2")
    made = {row.row.layer: row for row in clipped.rows}
    assert made["3.weight + 4.weight"].action == "clipped"
    assert made["3.weight + 4.weight"].row.sigma_upper[0] <= 0.1
    assert "'gone' is not stored in the file" in made["3.weight + 4.weight"].reason


def test_a_bias_of_nan_stops_one_clip_and_not_the_run(tmp_path: Path) -> None:
    """The matrices that share a limit are tried at zero, where nothing but the bias is left."""
    first, second, third = om.weights(5, 4, seed=1), om.weights(3, 5, seed=2), om.weights(3, 3, seed=3)
    bias = np.array([0, np.nan, 0, 0, 0], np.float32)
    nodes = [
        om.node("Gemm", "x v b", "h", transB=1),
        om.node("Gemm", "h w", "g", transB=1),
        om.node("Relu", "g", "r"),
        om.node("Gemm", "r u", "y", transB=1),
    ]
    body = om.graph(nodes, {"x": (1, 4)}, "y", {"v": first, "b": bias, "w": second, "u": third})
    (tmp_path / "net.onnx").write_bytes(om.model(body).SerializeToString())
    made = {row.row.layer: row for row in clip(tmp_path / "net.onnx", max=0.5, dry_run=True).rows}
    assert made["u"].action == "clipped"
    composed = made["v + w"]
    assert composed.action in ("clipped", "refused")
    assert composed.action == "clipped" or "NaN or infinite values" in composed.reason


def test_a_batch_norm_with_factors_of_another_length(tmp_path: Path) -> None:
    kernel, ones = om.weights(3, 2, 1, 1), np.ones(3, np.float32)
    nodes = [
        om.node("BatchNormalization", "x five ones ones ones", "h"),
        om.node("Relu", "h", "r"),
        om.node("Conv", "r w", "y"),
    ]
    tensors = {"w": kernel.transpose(1, 0, 2, 3).copy(), "five": np.ones(5, np.float32), "ones": ones}
    body = om.graph(nodes, {"x": ("n", 3, "h", "k")}, "y", tensors)
    (tmp_path / "net.onnx").write_bytes(om.model(body).SerializeToString())
    rows = {row.layer: row for row in inspect(tmp_path / "net.onnx", k=1).rows}
    assert rows["five"].status == "skipped"
    assert rows["w"].status == "ok"


def test_a_factor_of_integers_is_taken_as_its_numbers(tmp_path: Path) -> None:
    down = torch.tensor([[1, 2, 0], [0, 1, -3]], dtype=torch.int32)
    up = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    key = "base_model.model.q_proj.lora_{}.weight"
    save_file({key.format("A"): down, key.format("B"): up}, tmp_path / "lora.safetensors")
    (row,) = inspect(tmp_path / "lora.safetensors", k=1).rows
    truth = np.linalg.norm(up.double().numpy() @ down.double().numpy(), 2)
    assert row.sigma[0] == pytest.approx(truth, rel=1e-6)
    report = clip(tmp_path / "lora.safetensors", max=truth / 2, out=tmp_path / "out.safetensors")
    assert report.rows[0].action == "clipped"
    written = load_file(tmp_path / "out.safetensors")
    assert torch.equal(written[key.format("A")], down)
    product = written[key.format("B")].double().numpy() @ down.double().numpy()
    assert np.linalg.norm(product, 2) <= truth / 2
