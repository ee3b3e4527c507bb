"""Writes of every kind, and the states that a folder may be in at any moment of them."""

from __future__ import annotations

import gzip
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
from boundaries import tree
from checkpoint_files import ROOT, values
from onnx import TensorProto, helper, numpy_helper
from report_cases import small_report

from spectool.checkpoint import open_checkpoint
from spectool.checkpoint.dtypes import torch_dtype
from spectool.checkpoint.patch import place
from spectool.report import write

SAMPLES = ROOT / "sample_models"
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
LEFT = re.compile(r"\.[^/]+\.spectool-[0-9a-f]{8}\.(tmp|old)")
Files = dict[str, bytes]


@dataclass(frozen=True)
class Scenario:
    """One write into a folder.

    Attributes:
        name: What it shows.
        build: Puts the input, and what is to be replaced, into an empty folder.
        run: Writes, in this folder.
        steps: Names that change, those of one step at once; None if everything changes in one step.
        out: What is opened to see whether it is sound; empty if it is no checkpoint.
        gone: Whether the old output may be away for a moment, under a name that says what it is.
    """

    name: str
    build: Callable[[Path], object]
    run: Callable[[Path], object]
    steps: tuple[tuple[str, ...], ...] | None = None
    out: str = ""
    gone: bool = False

    def states(self, before: Files, after: Files) -> list[Files]:
        """What may be seen, temporary names left out, in this order."""
        changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        steps = (tuple(changed),) if self.steps is None else self.steps
        assert {name for step in steps for name in step} == changed, self.name
        states = [before]
        if self.gone:
            states.append(
                {name: data for name, data in before.items() if not name.startswith(f"{self.out}/")}
            )
        for step in steps:
            state = dict(states[0] if self.gone else states[-1])
            for name in step:
                state.pop(name, None)
                if name in after:
                    state[name] = after[name]
            states.append(state)
        assert states[-1] == after
        return states


def visible(files: Mapping[str, bytes]) -> Files:
    """The files of a folder without those under temporary names."""
    return {name: data for name, data in files.items() if not any(map(LEFT.fullmatch, name.split("/")))}


def leftovers(folder: Path, suffix: str = "") -> list[str]:
    """Every temporary name in a folder, those of folders and links too."""
    names = [path.name for path in folder.rglob("*")]
    return [name for name in names if LEFT.fullmatch(name) and name.endswith(suffix)]


def after(scenario: Scenario, folder: Path) -> tuple[Files, Files]:
    """What a folder holds before and after an undisturbed write."""
    folder.mkdir(parents=True)
    scenario.build(folder)
    before = tree(folder)
    scenario.run(folder)
    assert not leftovers(folder)
    return before, tree(folder)


def edit(path: Path, out: Path, force: bool = False, seed: int = 7) -> None:
    """Write with new values, the same ones every time, for one weight of every file."""
    checkpoint = open_checkpoint(path)
    weights = [
        n for n in checkpoint.tensors if n in ("fc1.weight", "fc2.weight", "stem.conv.weight", "inside")
    ]
    assert weights
    refs = [checkpoint.tensors[name] for name in weights]
    edits = {ref.name: values(ref.shape, torch_dtype(ref.dtype), seed) for ref in refs}
    checkpoint.write(out, edits, force=force)


def assert_sound(path: Path) -> None:
    """A checkpoint opens, and every tensor of it reads."""
    checkpoint = open_checkpoint(path)
    for name in checkpoint.tensors:
        assert checkpoint.read(name).shape == checkpoint.tensors[name].shape


def _copied(sample: str, name: str) -> Callable[[Path], object]:
    return lambda folder: shutil.copy(SAMPLES / sample, folder / name)


def _file(sample: str, suffix: str) -> Scenario:
    source, out = f"in{suffix}", f"out{suffix}"
    return Scenario(
        f"new {sample}", _copied(sample, source), lambda folder: edit(folder / source, folder / out), out=out
    )


def _gzipped(folder: Path) -> None:
    data = gzip.compress((SAMPLES / "digits_mlp_state.pt").read_bytes(), mtime=7)
    (folder / "in.pt.gz").write_bytes(data)


def _replacing(folder: Path) -> None:
    _copied("digits_mlp_state.pt", "in.pt")(folder)
    _copied("digits_mlp_weightnorm.pt", "out.pt")(folder)


def _folder(name: str) -> Callable[[Path], object]:
    return lambda folder: shutil.copytree(SAMPLES / "digits_mlp_sharded", folder / name)


def _two_folders(folder: Path) -> None:
    _folder("in")(folder)
    _folder("out")(folder)


def _external(folder: Path) -> None:
    """A model with one weight in a data file and one in itself."""
    (folder / "in").mkdir()
    (folder / "out").mkdir()
    tensors = [
        numpy_helper.from_array(values((20, 30)).numpy(), "fc1.weight"),
        numpy_helper.from_array(np.ones((3,), np.float32), "inside"),
    ]
    value, result = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [result], tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    onnx.save_model(
        proto, folder / "in" / "in.onnx", save_as_external_data=True, location="w.bin", size_threshold=100
    )


def _external_twice(folder: Path) -> None:
    _external(folder)
    for number in range(2):  # the data file gets a name of its own when its name is taken
        edit(folder / "in" / "in.onnx", folder / "out" / "out.onnx", force=bool(number))


def _old_report(folder: Path) -> None:
    (folder / "net.csv").write_text("precious")


SINGLE = [
    *(
        _file(sample, suffix)
        for sample, suffix in (
            ("digits_mlp_state.pt", ".pt"),
            ("digits_cnn_legacy.pt", ".pt"),
            ("digits_cnn_module.pt", ".pt"),
            ("digits_cnn_torchscript.pt", ".pt"),
            ("digits_cnn.pt2", ".pt2"),
            ("digits_mlp_bf16.safetensors", ".safetensors"),
            ("digits_mlp.onnx", ".onnx"),
        )
    ),
    Scenario(
        "new gzip",
        _gzipped,
        lambda folder: edit(folder / "in.pt.gz", folder / "out.pt.gz"),
        out="out.pt.gz",
    ),
    Scenario(
        "replaced file",
        _replacing,
        lambda folder: edit(folder / "in.pt", folder / "out.pt", force=True),
        out="out.pt",
    ),
    Scenario(
        "file in place",
        _copied("digits_mlp_state.pt", "in.pt"),
        lambda folder: edit(folder / "in.pt", folder / "in.pt", force=True),
        out="in.pt",
    ),
    Scenario(
        "new report", lambda folder: None, lambda folder: write(small_report(), "csv", folder / "net.csv")
    ),
    Scenario("replaced report", _old_report, lambda folder: write(small_report(), "csv", folder / "net.csv")),
]
SEVERAL = [
    Scenario("new folder", _folder("in"), lambda folder: edit(folder / "in", folder / "out"), out="out"),
    Scenario(
        "new folder from an index",
        _folder("in"),
        lambda folder: edit(folder / "in" / INDEX, folder / "out"),
        out=f"out/{INDEX}",
    ),
    Scenario(
        "replaced folder",
        _two_folders,
        lambda folder: edit(folder / "in", folder / "out", force=True),
        out="out",
    ),
    Scenario(
        "new index",
        lambda folder: (_folder("in")(folder), (folder / "out").mkdir()),
        lambda folder: edit(folder / "in" / INDEX, folder / "out" / "new.index.json"),
        steps=((f"out/{SHARDS[0]}",), (f"out/{SHARDS[1]}",), ("out/new.index.json",)),
        out="out/new.index.json",
    ),
    Scenario(
        "replaced index",
        _two_folders,
        lambda folder: edit(folder / "in" / INDEX, folder / "out" / INDEX, force=True),
        steps=((f"out/{SHARDS[0]}",), (f"out/{SHARDS[1]}",)),
        out=f"out/{INDEX}",
    ),
    Scenario(
        "folder in place",
        _folder("in"),
        lambda folder: edit(folder / "in", folder / "in", force=True),
        steps=((f"in/{SHARDS[0]}",), (f"in/{SHARDS[1]}",)),
        out="in",
    ),
    Scenario(
        "new external data",
        _external,
        lambda folder: edit(folder / "in" / "in.onnx", folder / "out" / "out.onnx"),
        steps=(("out/w.bin",), ("out/out.onnx",)),
        out="out/out.onnx",
    ),
    Scenario(
        "external data beside",
        _external,
        lambda folder: edit(folder / "in" / "in.onnx", folder / "in" / "out.onnx"),
        steps=(("in/out.onnx.data",), ("in/out.onnx",)),
        out="in/out.onnx",
    ),
    Scenario(
        "replaced external data",
        _external_twice,
        lambda folder: edit(folder / "in" / "in.onnx", folder / "out" / "out.onnx", force=True, seed=8),
        steps=(("out/out.onnx.2.data",), ("out/out.onnx",), ("out/out.onnx.data",)),
        out="out/out.onnx",
    ),
    Scenario(
        "external data in place",
        _external,
        lambda folder: edit(folder / "in" / "in.onnx", folder / "in" / "in.onnx", force=True),
        steps=(("in/w.bin",), ("in/in.onnx",)),
        out="in/in.onnx",
    ),
]


@contextmanager
def poor_file_system(level: int) -> Iterator[None]:
    """A file system without hard links (1), and without renames that replace nothing or exchange (2)."""
    with ExitStack() as stack:
        refuse = OSError(1, "Operation not permitted")
        stack.enter_context(mock.patch.object(os, "link", side_effect=refuse))
        if level > 1:
            stack.enter_context(mock.patch.object(place, "_renamed", return_value=22))
        yield


def _poor(scenario: Scenario, level: int, **changes: object) -> Scenario:
    def run(folder: Path) -> None:
        with poor_file_system(level):
            scenario.run(folder)

    fields = {
        **scenario.__dict__,
        "name": f"{scenario.name}, poor file system {level}",
        "run": run,
        **changes,
    }
    return Scenario(**fields)  # type: ignore[arg-type]


_BY_NAME = {scenario.name: scenario for scenario in (*SINGLE, *SEVERAL)}
POOR = [
    _poor(_BY_NAME["new digits_mlp_state.pt"], 1),
    _poor(_BY_NAME["new index"], 1),
    _poor(_BY_NAME["replaced folder"], 2, gone=True),
    _poor(_BY_NAME["folder in place"], 2),
]
EVERY = [*SINGLE, *SEVERAL, *POOR]
