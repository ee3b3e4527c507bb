"""Lossless writing, container by container: the bytes, and what the ordinary loader makes of them."""

from __future__ import annotations

import gzip
import io
import json
import struct
import warnings
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import DTYPES, REAL, same, values
from patch_tools import (
    FORMS,
    SAMPLES,
    assert_clean,
    assert_inside,
    differing,
    halved,
    load,
    octets,
    replaced,
    written,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from spectool.checkpoint import open_checkpoint, write_checkpoint


@pytest.mark.parametrize(
    "name",
    [
        "digits_cnn_state.pt",
        "digits_cnn_legacy.pt",
        "digits_cnn_training.pt",
        "digits_cnn_module.pt",
        "digits_cnn_torchscript.pt",
        "digits_cnn.pt2",
        "digits_cnn.safetensors",
        "digits_mlp_bf16.safetensors",
        "digits_cnn.onnx",
        "digits_mlp_weightnorm.pt",
    ],
)
def test_only_the_tensors_and_their_checksums_change(tmp_path: Path, name: str) -> None:
    path = SAMPLES / name
    checkpoint = open_checkpoint(path)
    edits = halved(checkpoint, path.read_bytes())
    assert len(edits) > 2
    out = tmp_path / "out.any"
    result = checkpoint.write(out, edits)
    old = {key: checkpoint.read(key) for key in edits}
    assert out.read_bytes() == replaced(path.read_bytes(), old, edits)
    assert result.path == out
    assert result.files == (out,)
    assert_inside(path.read_bytes(), out.read_bytes(), result, out)
    assert_clean(tmp_path, "out.any")
    if out.read_bytes()[:2] == b"PK":
        assert zipfile.ZipFile(out).testzip() is None


def test_training_file_in_torch(tmp_path: Path) -> None:
    path = SAMPLES / "digits_cnn_training.pt"
    edits = halved(open_checkpoint(path), path.read_bytes())
    out = tmp_path / "out.pt"
    written(path, out, edits)
    before, after = load(path), load(out)
    assert list(after) == list(before)
    assert repr(after["optimizer"]) == repr(before["optimizer"])
    assert list(after["state_dict"]) == list(before["state_dict"])
    for key, tensor in before["state_dict"].items():
        assert same(after["state_dict"][key], edits.get(key, tensor)), key


def test_programs_run_with_the_new_weights(tmp_path: Path) -> None:
    image = values((1, 1, 16, 16)) / 100
    outputs = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, loader in (
            ("digits_cnn_torchscript.pt", torch.jit.load),
            ("digits_cnn.pt2", lambda file: torch.export.load(file).module()),
        ):
            checkpoint = open_checkpoint(SAMPLES / name)
            (key,) = [key for key in checkpoint.tensors if key.endswith("head.weight")]
            edits = {key: torch.zeros_like(checkpoint.read(key))}
            out = tmp_path / name
            checkpoint.write(out, edits)
            model = loader(str(out))
            assert bool((model.state_dict()[key] == 0).all())
            with torch.no_grad():
                outputs.append(model(image))
    bias = load(SAMPLES / "digits_cnn_state.pt")["head.bias"]
    for output in outputs:
        # With a last weight of zero, only the last bias is left.
        assert torch.equal(output[0], bias)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_element_type_and_view(tmp_path: Path, form: dict[str, Any], dtype: torch.dtype) -> None:
    whole = values((6, 5), dtype)
    content = {
        "steps": whole[1::2, ::2],
        "column": whole[:, 1],
        "corner": whole[4:, 3:].t(),
        "scalar": values((), dtype, 1),
        "empty": torch.empty(0, 3, dtype=dtype),
        "last": values((2, 2), dtype, 5).to(memory_format=torch.contiguous_format),
    }
    path, out = tmp_path / "in.pt", tmp_path / "out.pt"
    torch.save(content, path, **form)
    edits = {key: values(tuple(content[key].shape), dtype, 9) for key in ("steps", "scalar", "empty")}
    if dtype == torch.bool:
        edits["steps"] = ~edits["steps"]
    result = written(path, out, edits)
    assert_inside(path.read_bytes(), out.read_bytes(), result, out)
    expected = whole.clone()
    expected[1::2, ::2] = edits["steps"]
    unloadable = form and dtype in torch.storage._new_dtypes()
    if unloadable:
        # torch cannot load its own legacy files of these types.
        assert out.read_bytes().count(octets(expected)) == 1
        return
    after = load(out)
    assert same(after["steps"], edits["steps"])
    assert same(after["column"], expected[:, 1])
    assert same(after["corner"], expected[4:, 3:].t())
    assert same(after["scalar"], edits["scalar"])
    assert same(after["last"], content["last"])
    assert after["steps"].stride() == content["steps"].stride()
    assert after["steps"].untyped_storage().data_ptr() == after["column"].untyped_storage().data_ptr()
    if not form:
        assert zipfile.ZipFile(out).testzip() is None


@pytest.mark.parametrize("form", FORMS)
def test_a_state_dict_keeps_its_metadata_ties_and_devices(tmp_path: Path, form: dict[str, Any]) -> None:
    embedding, head = torch.nn.Embedding(7, 3), torch.nn.Linear(3, 7, bias=False)
    head.weight = embedding.weight
    model = torch.nn.ModuleDict({"embedding": embedding, "norm": torch.nn.BatchNorm1d(3), "head": head})
    path, out = tmp_path / "in.pt", tmp_path / "out.pt"
    torch.save(model.state_dict(), path, **form)
    new = values((7, 3))
    written(path, out, {"head.weight": new})
    after = load(out)
    assert isinstance(after, OrderedDict)
    assert after._metadata == model.state_dict()._metadata
    assert same(after["embedding.weight"], new)
    assert after["embedding.weight"].data_ptr() == after["head.weight"].data_ptr()
    written(path, tmp_path / "both.pt", {"head.weight": new, "embedding.weight": new.clone()})
    assert (tmp_path / "both.pt").read_bytes() == out.read_bytes()


@pytest.mark.parametrize("streamed", [False, True])
def test_zip_files_of_other_writers(tmp_path: Path, streamed: bool) -> None:
    """Python's zipfile writes the checksum into the header, or behind the data if it cannot seek."""
    path, out = tmp_path / "in.pt", tmp_path / "out.pt"
    torch.save({"a": values((4, 3)), "b": values((4, 3), seed=1)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}

    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return not streamed

        def seek(self, *_: Any) -> int:
            if streamed:
                raise OSError("a pipe")
            return super().seek(*_)

        def tell(self) -> int:
            if streamed:
                raise OSError("a pipe")
            return super().tell()

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    data = pipe.getvalue()
    path.write_bytes(data)
    new = values((4, 3), seed=9)
    written(path, out, {"b": new})
    assert out.read_bytes() == replaced(data, {"b": values((4, 3), seed=1)}, {"b": new})
    assert zipfile.ZipFile(out).testzip() is None


def test_archives_inside_archives(tmp_path: Path) -> None:
    """torch 2.1 to 2.6 kept the state dict of an exported program as a torch file inside the zip."""
    inner = io.BytesIO()
    state = {"fc.weight": values((4, 3)), "fc.bias": values((4,), seed=1)}
    torch.save(state, inner)
    path, out = tmp_path / "in.pt2", tmp_path / "out.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("version", "8.7")
        archive.writestr("serialized_state_dict.pt", inner.getvalue())
        archive.writestr("serialized_constants.pt", b"")
        archive.writestr("serialized_exported_program.json", json.dumps({"graph_module": {}}))
    new = values((4, 3), seed=9)
    written(path, out, {"fc.weight": new})
    with zipfile.ZipFile(out) as archive:
        assert archive.testzip() is None
        nested = archive.read("serialized_state_dict.pt")
    assert nested == replaced(inner.getvalue(), state, {"fc.weight": new})
    assert zipfile.ZipFile(io.BytesIO(nested)).testzip() is None
    assert same(torch.load(io.BytesIO(nested))["fc.weight"], new)


def test_safetensors_of_every_type(tmp_path: Path) -> None:
    content = {
        str(dtype): values((3, 4), dtype, n) for n, dtype in enumerate(DTYPES) if dtype != torch.complex128
    }
    path, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(content, path, metadata={"format": "pt", "note": "ä"})
    edits = {name: values((3, 4), tensor.dtype, 77) for name, tensor in content.items()}
    written(path, out, edits)
    after = load_file(out)
    assert list(after) == list(load_file(path))
    assert all(same(after[name], edits[name]) for name in content)
    size = 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]
    assert out.read_bytes()[:size] == path.read_bytes()[:size]
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "ä"}


@pytest.mark.parametrize("name", ["digits_cnn_state.pt", "digits_cnn.onnx"])
def test_gzipped_files_are_packed_again(tmp_path: Path, name: str) -> None:
    raw = (SAMPLES / name).read_bytes()
    path, out, again = tmp_path / "in.gz", tmp_path / "out.gz", tmp_path / "again.gz"
    with (
        path.open("wb") as file,
        gzip.GzipFile("ein name.pt", "wb", fileobj=file, mtime=1234567890) as packed,
    ):
        packed.write(raw)
    checkpoint = open_checkpoint(path)
    edits = halved(checkpoint, raw)
    result = checkpoint.write(out, edits)
    checkpoint.write(again, edits)
    unpacked = gzip.decompress(out.read_bytes())
    assert unpacked == replaced(raw, {key: checkpoint.read(key) for key in edits}, edits)
    assert_inside(raw, unpacked, result, out)
    assert again.read_bytes() == out.read_bytes()
    header = 10 + len(b"ein name.pt\0")
    assert out.read_bytes()[:header] == path.read_bytes()[:header]


def test_without_edits_a_copy(tmp_path: Path) -> None:
    packed = tmp_path / "packed.gz"
    packed.write_bytes(gzip.compress((SAMPLES / "digits_mlp_state.pt").read_bytes(), 3))
    for number, file in enumerate([packed, *sorted(SAMPLES.glob("*.p*t"))]):
        assert written(file, tmp_path / str(number), {}).changed == ()
        assert (tmp_path / str(number)).read_bytes() == file.read_bytes()


def test_the_state_dict_that_was_chosen(tmp_path: Path) -> None:
    """``model`` and ``ema`` have the same keys and shapes; only the chosen one changes."""
    path, out = tmp_path / "in.pt", tmp_path / "out.pt"
    content = {"model": {"w": values((3, 4))}, "ema": {"w": values((3, 4), seed=1)}}
    torch.save(content, path)
    new = values((3, 4), seed=9)
    open_checkpoint(path, key="ema").write(out, {"w": new})
    after = load(out)
    assert same(after["model"]["w"], content["model"]["w"])
    assert same(after["ema"]["w"], new)


def test_a_wrong_checksum_before_is_a_right_one_after(tmp_path: Path) -> None:
    path, out = tmp_path / "in.pt", tmp_path / "out.pt"
    torch.save({"w": values((3, 4))}, path)
    checkpoint = open_checkpoint(path)
    write_checkpoint(checkpoint, out, {"w": values((3, 4), seed=3)})
    crc = struct.pack("<L", zlib.crc32(octets(values((3, 4)))))
    damaged = path.read_bytes().replace(crc, b"\1\2\3\4")
    path.write_bytes(damaged)
    assert zipfile.ZipFile(path).namelist()
    written(path, tmp_path / "again.pt", {"w": values((3, 4), seed=3)})
    assert (tmp_path / "again.pt").read_bytes() == out.read_bytes()
    assert len(differing(damaged, out.read_bytes())) <= 48 + 12


@pytest.mark.real
@pytest.mark.skipif(not REAL.exists(), reason="the real checkpoints are not here")
@pytest.mark.parametrize(
    "name",
    [
        *("aesthetic_linear.pth", "burn_mnist.pt", "burn_mnist.safetensors", "lora_disney.safetensors"),
        *(
            "resnet20_cifar10.th",
            "silero_vad.jit",
            "ultraface_rfb320.pth",
            "vdsr_epoch50.pth",
        ),
    ],
)
def test_real_files(tmp_path: Path, name: str) -> None:
    path, out = REAL / name, tmp_path / "out"
    checkpoint = open_checkpoint(path)
    edits = halved(checkpoint, path.read_bytes(), least=1024)
    assert edits
    checkpoint.write(out, edits)
    wanted = replaced(path.read_bytes(), {key: checkpoint.read(key) for key in edits}, edits)
    assert out.read_bytes() == wanted
    if wanted[:2] == b"PK":
        assert zipfile.ZipFile(out).testzip() is None


@pytest.mark.real
@pytest.mark.skipif(not REAL.exists(), reason="the real checkpoints are not here")
def test_real_file_with_transposed_weights(tmp_path: Path) -> None:
    path, out = REAL / "mtcnn_pnet.pt", tmp_path / "out"
    before = load(path)
    edits = {key: tensor * -0.5 for key, tensor in before.items() if tensor.dim() == 4}
    result = written(path, out, edits)
    assert_inside(path.read_bytes(), out.read_bytes(), result, out)
    after = load(out)
    assert list(after) == list(before)
    for key, tensor in before.items():
        assert same(after[key], edits.get(key, tensor))
        assert after[key].stride() == tensor.stride()
