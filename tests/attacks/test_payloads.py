"""A pickle that asks to run something is said to, and no other is: every command, one note."""

from __future__ import annotations

import argparse
import datetime
import enum
import functools
import json
import shutil
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from attack import text
from attack_calls import RUNS, call, legacy, trapped
from torch import nn

from spectool.checkpoint import open_checkpoint
from spectool.checkpoint.payloads import is_payload
from spectool.cli import main

SAMPLES = Path(__file__).parents[2] / "sample_models"
#: What loading runs by way of classes and their states: nothing tells these names from those of a network.
CLASSES = {"a class by NEWOBJ", "a class by NEWOBJ_EX", "__setstate__", "__setitem__ and extend"}


class Colour(enum.Enum):
    """As a configuration holds it."""

    RED = 1


class Schedule:
    """What pickles as ``getattr(object, 'name')`` once one of its methods is kept."""

    def rate(self, epoch: int) -> float:
        return 0.5**epoch


def notes(path: Path) -> list[str]:
    return [note for note in open_checkpoint(path).notes if "asks to call" in note]


@pytest.mark.parametrize("name", RUNS)
def test_what_a_pickle_would_run_is_named(name: str, tmp_path: Path) -> None:
    expected = {"builtins.getattr": "builtins.__import__", "torch's own rebuild": "os.system"}
    expected |= {
        "a chain of calls": "os.system",
        "runpy": "runpy.run_module",
        "webbrowser": "webbrowser.open",
    }
    expected |= {"a socket": "socket.create_connection", "posix.system by STACK_GLOBAL": "posix.system"}
    found = notes(trapped(RUNS[name])(tmp_path))
    if name in CLASSES:
        assert not found
    else:
        (note,) = found
        assert note.startswith(f"its pickle asks to call {expected.get(name, name.split(' ')[0])}")
        assert "spectool did not run it, torch.load(weights_only=False) would" in note


def test_every_command_says_it_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".git").mkdir()
    path = trapped(RUNS["builtins.getattr"])(tmp_path)
    said = "note: its pickle asks to call builtins.__import__, builtins.getattr when it is loaded;"
    for arguments in (
        ["ls", str(path)],
        ["inspect", str(path)],
        ["clip", str(path), "--max", "1", "-o", "out.pt"],
        ["check", str(path), "--max", "9"],
    ):
        assert main(arguments) == 0
        assert capfd.readouterr().err.count(said) == 1, arguments
    assert main(["ls", str(path), "--format", "json", "-q"]) == 0
    out, err = capfd.readouterr()
    assert ("asks" in err, sum("asks to call" in note for note in json.loads(out)["notes"])) == (False, 1)
    assert len(notes(tmp_path / "out.pt")) == 1  # clip changes nothing but weights


def test_a_legacy_file_and_a_shard(tmp_path: Path) -> None:
    assert len(notes(legacy(tmp_path, RUNS["os.system"](tmp_path)))) == 1
    part = tmp_path / "pytorch_model-00001-of-00001.bin"
    trapped(RUNS["os.system"])(tmp_path).rename(part)
    (name,) = open_checkpoint(part).tensors
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {name: part.name}}))
    (note,) = [note for note in open_checkpoint(index).notes if "asks to call os.system" in note]
    assert note.startswith(f"{part.name}: ")


def test_names_are_counted_cut_and_spelled_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    names = [f"os.\x1b[31m{letter}{'x' * 500}" for letter in "abcde"]
    calls = b"".join(call(name) + b"0" for name in names)
    shutil.copy(trapped(lambda folder: calls + b"N")(tmp_path), tmp_path / "many.pt")
    assert main(["ls", str(tmp_path / "many.pt"), "--format", "csv"]) == 0
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "asks to call" in line]
    assert "\x1b" not in line
    assert "and 2 more when it is loaded" in line
    assert len(line) < 500


def test_ordinary_checkpoints_are_left_alone(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(net.parameters())
    torch.save(
        {
            "state_dict": net.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": Schedule().rate,
            "args": argparse.Namespace(
                lr=0.1, out=Path("runs"), colour=Colour.RED, when=datetime.datetime.now()
            ),
            "random": (np.random.default_rng(0).bit_generator.state, torch.get_rng_state(), np.float64(3)),
            "more": (
                OrderedDict(a=1),
                Counter("ab"),
                {1, 2},
                slice(3),
                complex(1, 2),
                range(3),
                np.arange(3),
            ),
            "types": (
                nn.Linear,
                torch.float16,
                torch.device("cpu"),
                np.dtype("f4"),
                functools.partial(max, 1),
            ),
        },
        tmp_path / "training.pt",
    )
    torch.save(net, tmp_path / "module.pt")
    torch.save(net, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for path in (*tmp_path.iterdir(), *sorted(SAMPLES.glob("*.pt"))):
        assert not notes(path), path


@pytest.mark.parametrize(
    "name, expected",
    [
        ("torch.serialization.os.popen", True),
        ("torch.hub.load", True),
        ("torch.load", True),
        ("__builtin__.execfile", True),
        ("numpy.load", True),
        ("torch.ops.load_library", True),
        ("types.CodeType", True),
        ("torch.nn.modules.linear.Linear", False),
        ("torch._utils._rebuild_tensor_v2", False),
        ("pathlib.PosixPath", False),
        ("mylib.signal.Filter", False),
        ("mylib.code.Encoder", False),
        ("builtins.getattr", False),
        ("collections.OrderedDict", False),
        ("functools.partial", False),
    ],
)
def test_which_names_these_are(name: str, expected: bool) -> None:
    assert is_payload(name) is expected


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ((b"cnet\nRate\n", text("step")), 0),
        ((b"cnet\nRate\n", text("__subclasses__")), 1),
        ((b"ctorch\nserialization\n", text("os")), 1),
        ((b"cos\npath\n", text("join")), 1),
    ],
)
def test_getattr_by_what_it_reaches_for(arguments: tuple[bytes, ...], expected: int, tmp_path: Path) -> None:
    payload: Callable[[Path], bytes] = lambda folder: call("builtins.getattr", *arguments)  # noqa: E731
    assert len(notes(trapped(payload)(tmp_path))) == expected
