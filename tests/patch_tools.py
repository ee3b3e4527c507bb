"""What a lossless write must give, computed from the bytes by search and replace, and edits to try."""

from __future__ import annotations

import os
import signal
import struct
import time
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import ROOT

from spectool.checkpoint import Checkpoint, Written, open_checkpoint, write_checkpoint
from spectool.errors import OutputError

SAMPLES = ROOT / "sample_models"
FORMS = [
    pytest.param({}, id="zip"),
    pytest.param({"_use_new_zipfile_serialization": False}, id="legacy"),
]


def load(path: Path) -> Any:
    """What torch makes of a file."""
    return torch.load(path, map_location="cpu", weights_only=True)


def octets(tensor: torch.Tensor) -> bytes:
    """Bytes of a tensor in row-major order."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def replaced(data: bytes, old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor]) -> bytes:
    """The file after the edits: every old tensor's bytes, which occur once, and every old checksum of them."""
    for name, tensor in new.items():
        before, after = octets(old[name]), octets(tensor)
        assert data.count(before) == 1, name
        data = data.replace(before, after)
        if data[:4] == b"PK\3\4":
            crc = struct.pack("<L", zlib.crc32(before))
            assert data.count(crc) in (2, 3), name
            data = data.replace(crc, struct.pack("<L", zlib.crc32(after)))
    return data


def halved(checkpoint: Checkpoint, data: bytes, least: int = 64) -> dict[str, torch.Tensor]:
    """New values for every float tensor of some size whose bytes occur once in ``data``."""
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    return {
        name: tensor * -0.5
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and tensor.nbytes >= least and data.count(octets(tensor)) == 1
    }


def written(path: Path, out: Path, edits: Mapping[str, torch.Tensor], **options: object) -> Written:
    """Open, write, return what was written."""
    return write_checkpoint(open_checkpoint(path), out, edits, **options)  # type: ignore[arg-type]


def differing(a: bytes, b: bytes) -> list[int]:
    """Positions at which two files of one length differ."""
    assert len(a) == len(b)
    return [index for index, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]


def assert_inside(before: bytes, after: bytes, result: Written, file: Path) -> None:
    """Every byte that differs lies in a range that was reported."""
    ranges = [(start, stop) for name, start, stop in result.changed if name == file]
    positions = differing(before, after)
    assert positions
    assert all(any(start <= at < stop for start, stop in ranges) for at in positions)


def assert_clean(folder: Path, *names: str) -> None:
    """The folder holds these files and nothing else, no temporary ones either."""
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def forked(action: Callable[[], None]) -> int:
    """Run something in a child process that ends at once: with 0, or with 2 if the output is refused."""
    with warnings.catch_warnings():
        # Newer Pythons warn if a library keeps threads; the child uses none of them.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        code = 3
        try:
            action()
            code = 0
        except OutputError:
            code = 2
        finally:
            os._exit(code)
    return child


def killed_after(seconds: float, action: Callable[[], None]) -> None:
    """Run something that never ends in a child process and kill it."""
    child = forked(action)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
