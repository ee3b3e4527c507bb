"""A fixed share of the fuzzer's mutants, the fuzzer itself, and inputs that it once broke a promise with."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import onnx
import onnx_models as om
import pytest
import torch
from fuzz.corpus import ROOT, corpus
from fuzz.differ import differences
from fuzz.guard import Guard
from fuzz.mutate import mutant, steps_of
from fuzz.run import Worker, minimise, plan
from safetensors.torch import save_file

from spectool.checkpoint import open_checkpoint

SAMPLES = sorted(corpus(real=False))
SEEDS = range(30)


# --- the share --------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="measures memory and CPU time as Linux tells them"
)
def test_mutants_of_every_sample_keep_the_promises() -> None:
    worker = Worker()
    broken, seen = [], set()
    try:
        for seed in SEEDS:
            for name in SAMPLES:
                answer = worker.ask(plan(name, seed))
                seen |= {f"{command}={code}" for command, code in answer["codes"].items()}
                broken += [(name, seed, found["signature"], found["text"]) for found in answer["findings"]]
    finally:
        worker.close()
    assert broken == []
    assert seen >= {"ls=0", "ls=2", "inspect-list=0", "inspect=0", "clip=0"}


# --- the fuzzer -------------------------------------------------------------------------------------------


def test_a_seed_means_the_same_every_time() -> None:
    for name in SAMPLES:
        first, again = mutant(name, 7), mutant(name, 7)
        assert first == again
        assert first.case.files != mutant(name, 8).case.files or first.steps == ("nothing to change",)


def test_mutants_get_past_the_first_checks() -> None:
    """Damage that is put right around: sums of zip records, lengths of headers and messages."""
    read = {"digits_cnn_state.pt": 0, "digits_cnn.safetensors": 0, "digits_cnn.onnx": 0}
    for name in read:
        for seed in range(100, 140):
            data = mutant(name, seed, [0]).case.files[name]
            try:
                if name.endswith(".pt"):
                    with zipfile.ZipFile(io.BytesIO(data)) as archive:
                        read[name] += archive.testzip() is None
                elif name.endswith(".onnx"):
                    onnx.ModelProto().ParseFromString(data)
                    read[name] += 1
                else:
                    json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
                    read[name] += 1
            except Exception:
                continue
    assert min(read.values()) >= 20, read


def test_leaving_out_a_step_keeps_the_others() -> None:
    name = "digits_mlp.onnx"
    seed = next(seed for seed in range(100) if steps_of(name, seed) == 2)
    whole, first = mutant(name, seed), mutant(name, seed, [0])
    assert whole.steps[:1] == first.steps
    assert len(whole.steps) == 2
    assert mutant(name, seed, []).case == corpus()[name]


class _Stub(Worker):
    """Finds fault with every mutant whose third step is among those taken."""

    def ask(self, request: dict[str, object]) -> dict[str, object]:
        only = request["only"]
        assert isinstance(only, list)
        return {"findings": [{"signature": "x"}] if 2 in only else []}


def test_a_finding_is_reduced_to_the_step_that_matters() -> None:
    name = "digits_mlp.onnx"
    seed = next(seed for seed in range(100) if steps_of(name, seed) == 4)
    assert minimise(_Stub(), plan(name, seed), "x") == [2]


def test_the_guard_notes_what_a_reader_may_not_do(tmp_path: Path) -> None:
    code = """
import os, pathlib, pickle, socket, subprocess, sys
from fuzz.differ import differences
from fuzz.guard import Guard
out = pathlib.Path(sys.argv[1])
guard = Guard(out)
def noted(action):
    guard.start()
    try: action()
    except Exception: pass
    guard.stop()
    return len(guard.events)
fine = [lambda: (out / "a").write_text("x"), lambda: open(os.devnull, "w").close(), lambda: open(__file__).close(),
        lambda: (out / "a").unlink()]
bad = [lambda: socket.create_connection(("127.0.0.1", 9)), lambda: subprocess.run(["true"]), lambda: os.system("true"),
       lambda: out.with_name("b").write_text("x"), lambda: os.rename(out, out.with_name("c")),
       lambda: pickle.loads(b"cos\\nsystem\\n.")]
assert [noted(action) for action in fine] == [0] * len(fine), guard.events
assert all(noted(action) for action in bad), [noted(action) for action in bad]
"""
    (tmp_path / "out").mkdir()
    (tmp_path / "probe.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, str(tmp_path / "probe.py"), str(tmp_path / "out")]
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "out").exists()  # the guard watches, it does not stop
    assert Guard.__doc__


# --- the ordinary loaders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["pt", "legacy.pt", "safetensors", "onnx"])
def test_what_ordinary_loaders_see_otherwise_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, container: str
) -> None:
    honest = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}

    def saved(name: str, state: dict[str, torch.Tensor]) -> Path:
        path = tmp_path / f"{name}.{container}"
        if container == "safetensors":
            save_file(state, path)
        elif container == "onnx":
            tensors = {key: value.numpy() for key, value in state.items()}
            body = om.graph([om.node("Gemm", "x w b", "y", transB=1)], {"x": (1, 3)}, "y", tensors)
            path.write_bytes(om.model(body).SerializeToString())
        else:
            torch.save(state, path, _use_new_zipfile_serialization=container == "pt")
        return path

    path = saved("honest", honest)
    assert differences(path) == []
    others = {
        "the values of 'w' differ": {**honest, "w": honest["w"] + 1},
        "the shape of 'w'": {**honest, "w": honest["w"].T.contiguous()},
        "the type of 'b'": {**honest, "b": honest["b"].double()},
    }
    if container != "onnx":
        others["'w'"] = {"b": honest["b"]}
        others["'more'"] = {**honest, "more": torch.ones(1)}
    for text, state in others.items():
        # What spectool would say if it took the file for another one.
        seen = dataclasses.replace(open_checkpoint(saved("other", state)), path=path)
        with monkeypatch.context() as patch:
            patch.setattr("spectool.ls", lambda _, seen=seen: seen)
            found = differences(path)
        assert any(text in line for line in found), (text, found)
