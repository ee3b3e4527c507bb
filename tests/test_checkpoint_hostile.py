"""Files made to do harm, damaged files, and files of other kinds: one clear error each, and nothing runs."""

from __future__ import annotations

import collections
import io
import os
import pickle
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import assert_equals, values, zipped
from torch import nn

from spectool.checkpoint import Limits, open_checkpoint
from spectool.errors import (
    CorruptFile,
    LimitExceeded,
    NothingToAnalyse,
    UnrecognisedFormat,
)

FORMS = [
    pytest.param({}, id="zip"),
    pytest.param({"_use_new_zipfile_serialization": False}, id="legacy"),
]


# --- nothing runs -----------------------------------------------------------------------------------------


class Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


class StateTrap:
    """Touches a marker when its state is set."""

    marker = ""

    def __getstate__(self) -> dict[str, Any]:
        return {"marker": self.marker}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Path(state["marker"]).touch()


@pytest.mark.parametrize("form", FORMS)
def test_a_trapped_checkpoint_runs_nothing_and_is_read(tmp_path: Path, form: dict[str, Any]) -> None:
    marker = tmp_path / "ran"
    sleeper = StateTrap()
    sleeper.marker = str(marker)
    net = nn.Linear(2, 2)
    net.trap = Trap(marker)
    content = {"state_dict": {"w": values((2, 3))}, "trap": Trap(marker), "more": [sleeper]}
    for part, truth in ((content, content["state_dict"]), (net, dict(net.state_dict()))):
        torch.save(part, tmp_path / "net.pt", **form)
        assert_equals(tmp_path / "net.pt", truth)
        assert not marker.exists()
        # The trap is a real one.
        torch.load(tmp_path / "net.pt", weights_only=False)
        assert marker.exists()
        marker.unlink()


def test_a_trapped_plain_pickle_is_refused_without_running(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(Trap(marker)))
    with pytest.raises(UnrecognisedFormat, match=r"a plain pickle \(of posix.system\)"):
        open_checkpoint(tmp_path / "x.pkl")
    assert not marker.exists()


# --- pickles that cost ------------------------------------------------------------------------------------


def pairs(levels: int) -> bytes:
    """A tuple of two copies of a tuple of two copies of…: 2^levels leaves in a few bytes."""
    return b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(levels))


LONG = b"\x80\x02\x8b" + struct.pack("<i", 5000) + b"\1" * 5000 + b"."
HUGE = b"\x80\x05\x96" + struct.pack("<Q", 2**60) + b"."
ZEROS = b"\x80\x02cbuiltins\nbytes\n\x8a\x06\0\0\0\0\0\1\x85R."


@pytest.mark.parametrize(
    "data, error, message",
    [
        pytest.param(b"\x80\x02}(" + pairs(60) + b"Nu.", CorruptFile, "a key is a very large tuple", id="wide-key"),
        pytest.param(b"\x80\x02}()" + b"\x85" * 10**5 + b"Nu.", CorruptFile, "a key is a very large", id="deep-key"),
        pytest.param(b"\x80\x02}(\x8a\x09" + b"\xff" * 8 + b"\0Nu.", CorruptFile, "more than 64 bits", id="huge-key"),
        pytest.param(LONG, LimitExceeded, "integer_bytes = 1,024", id="long"),
        pytest.param(b"\x80\x02" + b"N0" * 60 + b"N.", LimitExceeded, "opcodes = 100", id="opcodes"),
        pytest.param(b"\x80\x02]r\xff\xff\xff\x7f.", NothingToAnalyse, "no tensors", id="far-memo"),
        pytest.param(HUGE, CorruptFile, "not a well-formed pickle", id="huge-bytes"),
        pytest.param(b"\x80\x02" + b"(" * 50 + b".", CorruptFile, "not a well-formed pickle", id="marks"),
        pytest.param(b"\x80\x02h\x07.", CorruptFile, "not a well-formed pickle", id="no-memo"),
        pytest.param(b"\x80\x02\x82\x01.", CorruptFile, "extension registry", id="extension"),
        pytest.param(b"\x80\x02N", CorruptFile, "not a well-formed pickle", id="no-end"),
        pytest.param(b"", CorruptFile, "not a well-formed pickle", id="empty"),
        pytest.param(b"\x80\x02]q\0h\0a.", NothingToAnalyse, "no tensors", id="cycle"),
        pytest.param(ZEROS, CorruptFile, "bytes are built", id="zeros"),
        pytest.param(b"\x80\x02ctorch\nSize\nK\x01\x85R.", CorruptFile, "bad arguments for torch.Size", id="bad-call"),
    ],
)  # fmt: skip
def test_costly_or_malformed_pickles(
    tmp_path: Path, data: bytes, error: type[Exception], message: str
) -> None:
    limits = Limits(opcodes=100) if "opcodes = " in message else Limits()
    start = time.process_time()
    with pytest.raises(error, match=message):
        open_checkpoint(zipped(tmp_path / "x.pt", data), limits=limits)
    assert time.process_time() - start < 5


def nested_pairs_of_a_tensor(levels: int) -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(1)}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        data = archive.read("archive/data.pkl")
    # Each level is a dict that holds the one below twice.
    out = data[:-1] + b"r\xff\0\0\0"
    for level in range(levels):
        out += (
            b"0}(X\1\0\0\0aj"
            + struct.pack("<I", 255 + level)
            + b"X\1\0\0\0bj"
            + struct.pack("<I", 255 + level)
        )
        out += b"ur" + struct.pack("<I", 256 + level)
    return out + b"."


def test_shared_dicts_do_not_multiply_without_bound(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.pt", nested_pairs_of_a_tensor(3), {"0": np.ones(1, np.float32).tobytes()})
    assert len(open_checkpoint(path).tensors) == 8
    path = zipped(tmp_path / "x.pt", nested_pairs_of_a_tensor(60), {"0": np.ones(1, np.float32).tobytes()})
    with pytest.raises(LimitExceeded, match="limit names = 5,000"):
        open_checkpoint(path, limits=Limits(names=5000))


def test_attributes_of_a_module_do_not_multiply_either(tmp_path: Path) -> None:
    net = nn.Linear(2, 2)
    net.data = [1] * 200
    for _ in range(6):
        net.data = [net.data] * 200
    torch.save(net, tmp_path / "x.pt")
    with pytest.raises(LimitExceeded, match="limit names = 20,000"):
        open_checkpoint(tmp_path / "x.pt", limits=Limits(names=20_000))


def test_a_set_that_holds_itself(tmp_path: Path) -> None:
    net = nn.Linear(2, 2, bias=False)
    net.ring = "RING"
    torch.save(net, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        data, storage = archive.read("x/data.pkl"), archive.read("x/data/0")
    text = b"X\4\0\0\0RING"
    assert data.count(text) == 1
    ring = b"\x8fr\0\1\0\0(j\0\1\0\0\x90"
    assert_equals(zipped(tmp_path / "y.pt", data.replace(text, ring), {"0": storage}), dict(net.state_dict()))


def test_depth_of_a_nest(tmp_path: Path) -> None:
    content: Any = {"w": values((2, 2))}
    for _ in range(101):
        content = {"a": content}
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(LimitExceeded, match="limit depth = 100"):
        open_checkpoint(tmp_path / "x.pt")
    assert_equals(tmp_path / "x.pt", {"w": values((2, 2))}, limits=Limits(depth=200))


# --- views that leave their storage -----------------------------------------------------------------------


class Fake:
    """Pickles as a tensor with freely chosen geometry."""

    def __init__(self, storage: Any, offset: Any, size: Any, stride: Any) -> None:
        self.args = (storage, offset, size, stride, False, {})

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, self.args


class Pickler(pickle.Pickler):
    """Writes ``("storage", …)`` tuples of length 5 as persistent ids."""

    def persistent_id(self, obj: Any) -> Any:
        return obj if isinstance(obj, tuple) and len(obj) == 5 and obj[0] == "storage" else None


def faked(
    path: Path, offset: Any, size: Any, stride: Any, *, numel: Any = 4, key: str = "0", kind: Any = None
) -> Path:
    stream = io.BytesIO()
    kind = torch.FloatStorage if kind is None else kind
    content = {"good": 1, "w": Fake(("storage", kind, key, "cpu", numel), offset, size, stride)}
    Pickler(stream, protocol=2).dump(content)
    return zipped(path, stream.getvalue(), {"0": np.arange(4, dtype=np.float32).tobytes()})


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((0, (5,), (1,)), CorruptFile, "needs 20 bytes of a storage that has 16"),
        ((1, (4,), (1,)), CorruptFile, "needs 20 bytes of a storage that has 16"),
        ((0, (2, 2), (3, 1)), CorruptFile, "needs 20 bytes"),
        ((0, (2**62,), (1,)), CorruptFile, "needs"),
        ((0, (2**70,), (1,)), CorruptFile, "small non-negative integers"),
        ((-1, (2,), (1,)), CorruptFile, "small non-negative integers"),
        ((0, (-2,), (1,)), CorruptFile, "small non-negative integers"),
        ((0, (2,), (-1,)), CorruptFile, "small non-negative integers"),
        ((0, (2.0,), (1,)), CorruptFile, "small non-negative integers"),
        ((0, (2, 2), (1,)), CorruptFile, "impossible shape"),
        ((0, (1,) * 65, (1,) * 65), CorruptFile, "impossible shape"),
        ((0, (2**40,), (0,)), LimitExceeded, "limit expanded_bytes"),
        ((0, "ab", (1,)), CorruptFile, "small non-negative integers"),
    ],
)
def test_impossible_geometry(tmp_path: Path, arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        open_checkpoint(faked(tmp_path / "x.pt", *arguments))


def test_storages_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match="needs a storage of 5 elements; its record has 16 bytes"):
        open_checkpoint(faked(tmp_path / "x.pt", 0, (4,), (1,), numel=5))
    with pytest.raises(CorruptFile, match="no record 'data/9'"):
        open_checkpoint(faked(tmp_path / "x.pt", 0, (4,), (1,), key="9"))
    with pytest.raises(CorruptFile, match=r"no record 'data/\.\./data.pkl'"):
        open_checkpoint(faked(tmp_path / "x.pt", 0, (4,), (1,), key="../data.pkl"))
    with pytest.raises(CorruptFile, match="a storage of type 'OrderedDict'"):
        open_checkpoint(faked(tmp_path / "x.pt", 0, (4,), (1,), kind=collections.OrderedDict))
    with pytest.raises(CorruptFile, match="a storage of type"):
        open_checkpoint(faked(tmp_path / "x.pt", 0, (4,), (1,), numel=-4))
    assert_equals(faked(tmp_path / "x.pt", 0, (4,), (1,)), {"w": torch.arange(4.0)})
