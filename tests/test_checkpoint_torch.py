"""torch.save files, zip and legacy: every key and value as torch.load gives it."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import DTYPES, assert_equals, same, values

from spectool.checkpoint import open_checkpoint

FORMS = [
    pytest.param({}, id="zip"),
    pytest.param({"_use_new_zipfile_serialization": False}, id="legacy"),
    pytest.param({"pickle_protocol": 4}, id="zip-protocol4"),
    pytest.param({"_use_new_zipfile_serialization": False, "pickle_protocol": 4}, id="legacy-protocol4"),
]


def save(content: Any, path: Path, form: dict[str, Any]) -> Path:
    torch.save(content, path, **form)
    return path


def load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_element_type(tmp_path: Path, form: dict[str, Any], dtype: torch.dtype) -> None:
    whole = values((6, 5), dtype)
    content = {
        "whole": whole,
        "scalar": values((), dtype, 1),
        "empty": torch.empty(0, 3, dtype=dtype),
        "row": whole[2],
        "column": whole[:, 1],
        "transposed": whole.t(),
        "tied": whole,
        "steps": whole[1::2, ::2],
        "expanded": values((1, 4), dtype, 2).expand(3, 4),
    }
    path = save(content, tmp_path / "any.bin", form)
    # torch cannot load its own legacy files of the types it added last; what was saved is the truth there.
    unloadable = "_use_new_zipfile_serialization" in form and dtype in torch.storage._new_dtypes()
    checkpoint = assert_equals(path, content if unloadable else load(path))
    assert checkpoint.format == ("torch-legacy" if "_use_new_zipfile_serialization" in form else "torch-zip")
    assert checkpoint.aliases == {"tied": "whole"}
    names = ("whole", "row", "column", "transposed", "tied", "steps")
    assert len({checkpoint.tensors[name].storage for name in names}) == 1
    assert checkpoint.tensors["whole"].nbytes == 30 * dtype.itemsize
    assert checkpoint.tensors["row"].lead == 10 * dtype.itemsize
    assert checkpoint.tensors["transposed"].stride == (1, 5)


@pytest.mark.parametrize("form", FORMS)
def test_positions_are_those_of_the_bytes_in_the_file(tmp_path: Path, form: dict[str, Any]) -> None:
    base = values((7, 3), torch.float32, 3)
    path = save({"base": base, "part": base[4:]}, tmp_path / "net.pt", form)
    checkpoint = open_checkpoint(path)
    data = path.read_bytes()
    part = checkpoint.tensors["part"]
    assert part.position is not None
    assert part.storage_position is not None
    assert data[part.storage_position :][: part.nbytes] == base.numpy().tobytes()
    assert data[part.position :][: 9 * 4] == base[4:].numpy().tobytes()


@pytest.mark.parametrize("form", FORMS)
def test_channels_last_and_fortran_order(tmp_path: Path, form: dict[str, Any]) -> None:
    image = values((2, 3, 4, 5)).to(memory_format=torch.channels_last)
    path = save({"image": image}, tmp_path / "net.pt", form)
    checkpoint = assert_equals(path, load(path))
    assert checkpoint.tensors["image"].stride == image.stride()


@pytest.mark.parametrize("form", FORMS)
def test_parameters_and_their_attributes(tmp_path: Path, form: dict[str, Any]) -> None:
    plain = torch.nn.Parameter(values((2, 3)))
    frozen = torch.nn.Parameter(values((3,), seed=1), requires_grad=False)
    marked = torch.nn.Parameter(values((4,), seed=2))
    marked.tensor_model_parallel = True
    content = {
        "plain": plain,
        "frozen": frozen,
        "marked": marked,
        "buffer": torch.nn.Buffer(values((5,), seed=3)),
    }
    path = save(content, tmp_path / "net.pt", form)
    assert_equals(path, load(path))


@pytest.mark.parametrize("stem", ["модель", "naïve net", "a'b\"c", "ünï.v2", "名前"])
def test_any_file_name(tmp_path: Path, stem: str) -> None:
    """torch names the records of a zip file after the file."""
    path = save({"w": values((2, 3))}, tmp_path / f"{stem}.pt", {})
    checkpoint = assert_equals(path, load(path))
    ref = checkpoint.tensors["w"]
    assert path.read_bytes()[ref.position :][: ref.nbytes] == values((2, 3)).numpy().tobytes()


def test_parameters_from_before_torch_0_4(tmp_path: Path) -> None:
    """They are objects whose state begins with their tensor; the same object may be used twice."""

    class Old:
        def __reduce__(self) -> Any:
            return torch.nn.parameter.Parameter, (), (values((2, 3)), True, False, OrderedDict())

    one = Old()
    path = save({"w": one, "again": one}, tmp_path / "old.pt", {})
    checkpoint = assert_equals(path, {"w": values((2, 3)), "again": values((2, 3))})
    assert checkpoint.aliases == {"again": "w"}


class Tagged(torch.Tensor):
    """A plain subclass of Tensor."""


def test_plain_subclass_of_tensor(tmp_path: Path) -> None:
    path = save({"x": values((2, 2)).as_subclass(Tagged)}, tmp_path / "net.pt", {})
    truth = {"x": load(path)["x"].as_subclass(torch.Tensor)}
    assert_equals(path, truth)


def test_ordered_dict_with_metadata_of_a_module(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    path = save(net.state_dict(), tmp_path / "net.pt", {})
    truth = load(path)
    assert isinstance(truth, OrderedDict)
    assert_equals(path, truth)


@pytest.mark.parametrize("form", FORMS)
def test_numpy_arrays_in_the_pickle(tmp_path: Path, form: dict[str, Any]) -> None:
    content = {
        "c": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "bytes": np.frombuffer(bytes(range(200, 216)), np.uint8),
        "big": np.arange(3, dtype=">i4"),
        "half": np.ones(2, np.float16),
        "empty": np.zeros((0, 2), np.int64),
        "flags": np.array([True, False]),
    }
    path = save(content, tmp_path / "net.pt", form)
    truth = {
        name: torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
        for name, array in load(path).items()
    }
    checkpoint = assert_equals(path, truth)
    assert checkpoint.tensors["c"].position is None


def test_numpy_scalars_are_facts_not_tensors(tmp_path: Path) -> None:
    content = {
        "state_dict": {"w": values((2, 2))},
        "loss": np.float64(0.25),
        "epoch": np.int64(7),
        "arch": "resnet",
    }
    checkpoint = open_checkpoint(save(content, tmp_path / "net.pt", {}))
    assert checkpoint.metadata["scalars"] == {"loss": 0.25, "epoch": 7, "arch": "resnet"}
    assert list(checkpoint.tensors) == ["w"]


@pytest.mark.filterwarnings("ignore:torch.quantize_per")
def test_quantised_tensors_are_read_as_stored_integers(tmp_path: Path) -> None:
    per_tensor = torch.quantize_per_tensor(values((2, 3)), 0.5, 3, torch.quint8)
    per_channel = torch.quantize_per_channel(
        values((2, 3)), torch.tensor([0.5, 0.25]), torch.tensor([0, 1]), 0, torch.qint8
    )
    path = save({"t": per_tensor, "c": per_channel}, tmp_path / "net.pt", {})
    checkpoint = open_checkpoint(path)
    assert (checkpoint.tensors["t"].dtype, checkpoint.tensors["c"].dtype) == ("quint8", "qint8")
    assert same(checkpoint.read("t"), per_tensor.int_repr())
    assert same(checkpoint.read("c"), per_channel.int_repr())
    facts = checkpoint.metadata["quantization"]
    assert facts["t"] == {"scheme": "torch.per_tensor_affine", "scale": 0.5, "zero_point": 3}
    assert facts["c"]["axis"] == 0
    assert checkpoint.reader is not None
    assert checkpoint.reader(facts["c"]["scale"]).tolist() == [0.5, 0.25]


@pytest.mark.filterwarnings("ignore:Sparse", "ignore:The PyTorch API of nested")
def test_what_has_no_readable_values_is_explained(tmp_path: Path) -> None:
    content = {
        "w": values((2, 2)),
        "sparse": torch.eye(3).to_sparse(),
        "csr": torch.eye(3).to_sparse_csr(),
        "meta": torch.empty(2, 3, device="meta"),
        "conjugate": torch.ones(2, dtype=torch.complex64).conj(),
        "nested": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
        "strings": np.array(["a", "b"]),
    }
    path = save(content, tmp_path / "net.pt", {})
    checkpoint = open_checkpoint(path)
    assert list(checkpoint.tensors) == ["w"]
    reasons = dict(checkpoint.unread)
    assert "sparse tensor (sparse_coo)" in reasons["sparse"]
    assert "sparse tensor (sparse_csr)" in reasons["csr"]
    assert "meta device" in reasons["meta"]
    assert "conj" in reasons["conjugate"]
    assert "nested" in reasons["nested"]
    assert "numpy array" in reasons["strings"]


def test_big_endian_zip(tmp_path: Path) -> None:
    """torch.load swaps bytes by the byteorder record; so does this."""
    from torch.serialization import LoadEndianness, set_default_load_endianness

    for dtype in (torch.float32, torch.int16, torch.complex64, torch.bool, torch.bfloat16):
        path = save({"w": values((3, 4), dtype)}, tmp_path / "net.pt", {})
        fixed = _with_byteorder(path, b"big")
        set_default_load_endianness(LoadEndianness.BIG)
        try:
            truth = load(fixed)
        finally:
            set_default_load_endianness(None)
        assert not torch.equal(truth["w"], values((3, 4), dtype)) or dtype.itemsize == 1
        assert_equals(fixed, truth)


def _with_byteorder(path: Path, order: bytes) -> Path:
    """Write a torch zip anew with another byteorder record."""
    import zipfile

    fixed = path.with_name("fixed.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(fixed, "w") as new:
        for name in old.namelist():
            if name.endswith("byteorder"):
                new.writestr(name, order)
            else:
                new.writestr(name, old.open(name).read())
    return fixed


def test_legacy_views_of_one_storage(tmp_path: Path) -> None:
    """Very old files name a part of a storage in the persistent id; written here as torch 0.4 did."""
    import io
    import pickle
    import struct

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return obj.identity if isinstance(obj, Part) else None

    class Part:
        def __init__(self, view: Any) -> None:
            self.identity = ("storage", torch.FloatStorage, "7", "cpu", 10, view)

    class Rebuilt:
        def __init__(self, part: Part, offset: int, size: int) -> None:
            self.args = (part, offset, (size,), (1,), False, OrderedDict())

        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, self.args

    stream = io.BytesIO()
    for item in (
        0x1950A86A20F9469CFC6C,
        1001,
        {"protocol_version": 1001, "little_endian": True, "type_sizes": {}},
    ):
        pickle.dump(item, stream, protocol=2)
    content = {"all": Rebuilt(Part(None), 0, 10), "view": Rebuilt(Part(("9", 4, 3)), 1, 2)}
    Pickler(stream, protocol=2).dump(content)
    pickle.dump(["7"], stream, protocol=2)
    stream.write(struct.pack("<q", 10) + np.arange(10, dtype="<f4").tobytes())
    path = tmp_path / "old.pt"
    path.write_bytes(stream.getvalue())
    truth = load(path)
    assert truth["view"].tolist() == [5.0, 6.0]
    assert_equals(path, truth)
