"""Trapped checkpoints give what torch loads from them and run nothing; shared parts do not multiply.

Attacks, each with the refusal that must come of it, stand in ``tests/attacks``.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import assert_equals, values, zipped
from torch import nn

from spectool.checkpoint import Limits, open_checkpoint
from spectool.errors import LimitExceeded

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


# --- pickles that cost ------------------------------------------------------------------------------------


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
