"""`python -m tests.fuzz.guided TARGET [libFuzzer options]`: let coverage lead the way into one reader.

Targets: pickle, safetensors, onnx, script, pt2. Needs the development extra `fuzz` (atheris).
Two of three mutations know the format, the others are libFuzzer's own. A finding ends the run, with its input in a
file `crash-…`.
"""

from __future__ import annotations

import io
import json
import random
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import atheris

from .corpus import SAMPLES, corpus
from .documents import mutate_json, mutate_safetensors
from .mutate import BROKEN, mutate_text
from .pickles import mutate_pickle, operations
from .protobufs import mutate_onnx
from .zips import members

_LOOK_INTO = [
    *("spectool.checkpoint", "spectool.graph.onnx", "spectool.graph.script", "spectool.graph.exported"),
    *(
        "spectool.graph.recorded",
        "spectool.graph.aten_translate",
        "spectool.graph.regions",
        "spectool.graph.narrow",
    ),
]
with atheris.instrument_imports(include=_LOOK_INTO):
    # Some are only imported here so that they are looked into: spectool itself imports them when it needs them.
    import spectool.checkpoint.onnxfile
    import spectool.graph.exported
    import spectool.graph.onnx
    import spectool.graph.script  # noqa: F401
    from spectool.checkpoint import Limits, open_checkpoint
    from spectool.checkpoint.bind import Place
    from spectool.checkpoint.inert import Storage
    from spectool.checkpoint.pickled import unpickle
    from spectool.checkpoint.source import Source
    from spectool.checkpoint.torchfile import assemble, storage_of
    from spectool.errors import SpectoolError
    from spectool.graph.survey import survey


_LIMITS = Limits(opcodes=200_000, names=50_000, pickle_bytes=1 << 22)
_FOLDER = Path(tempfile.mkdtemp(prefix="guided-"))
Mutator = Callable[[bytes, random.Random], tuple[bytes, str]]


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        run: Gives it some bytes.
        mutate: Knows the format.
        seeds: Where it begins.
    """

    run: Callable[[bytes], Any]
    mutate: Mutator
    seeds: list[bytes]


def _files(suffix: str, most: int = 30_000) -> list[bytes]:
    """Return the first files of the samples with a suffix, small ones only."""
    found = [case.files[case.target] for case in corpus(real=False).values() if case.target.endswith(suffix)]
    return [data for data in found if len(data) <= most] or found[:1]


def _records(sample: str, suffix: str) -> list[bytes]:
    parts = members((SAMPLES / sample).read_bytes())
    return [part.data for part in parts if part.name.decode().endswith(suffix)]


def _pickle(data: bytes) -> None:
    """The inert reader, then everything that looks at what it built."""
    root = unpickle(io.BytesIO(data), "x", _LIMITS, storage_of)

    def locate(storage: Storage) -> Place:
        return Place("", 0, 0, 1 << 20)

    assemble(Source(_write(data)), "torch-zip", root, locate, _LIMITS, None)


def _write(data: bytes) -> Path:
    path = _FOLDER / "input"
    path.write_bytes(data)
    return path


def _open(data: bytes) -> None:
    open_checkpoint(_write(data), limits=_LIMITS)


def _onnx(data: bytes) -> None:
    survey(open_checkpoint(_write(data), limits=_LIMITS))


def _script() -> Target:
    checkpoint = open_checkpoint(SAMPLES / "digits_cnn_torchscript.pt")
    program = checkpoint.program
    (main,) = [name for name in program.code if name.endswith("nets.py") or name == "__torch__/nets.py"]

    def run(data: bytes) -> None:
        code = {**program.code, main: data.decode("utf-8", "replace")}
        changed = replace(checkpoint, program=replace(program, code=code))
        survey(changed, inputs={"": (1, 1, 16, 16)})

    return Target(run, mutate_text, [program.code[main].encode()])


def _exported() -> Target:
    checkpoint = open_checkpoint(SAMPLES / "digits_cnn.pt2")

    def run(data: bytes) -> None:
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):
            return
        if isinstance(document, dict):
            survey(replace(checkpoint, program=replace(checkpoint.program, document=document)))

    return Target(run, mutate_json, [json.dumps(checkpoint.program.document).encode()])


def _pickles() -> list[bytes]:
    names = (
        "digits_mlp_state.pt",
        "digits_mlp_weightnorm.pt",
        "digits_sequential_module.pt",
        "digits_cnn_training.pt",
    )
    return [data for name in names for data in _records(name, "data.pkl")]


TARGETS: dict[str, Callable[[], Target]] = {
    "pickle": lambda: Target(
        _pickle, lambda data, rng: mutate_pickle(data, rng, operations(data)[0]), _pickles()
    ),
    "safetensors": lambda: Target(_open, mutate_safetensors, _files(".safetensors")),
    "onnx": lambda: Target(_onnx, lambda data, rng: mutate_onnx(data, rng, data), _files(".onnx")),
    "script": _script,
    "pt2": _exported,
}


def main() -> None:
    """Fuzz one target until libFuzzer is told to stop."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(__doc__)
    warnings.simplefilter("ignore")
    target = TARGETS[sys.argv[1]]()
    seeds = _FOLDER / "seeds"
    seeds.mkdir()
    for index, data in enumerate(target.seeds):
        (seeds / f"{index}").write_bytes(data)

    def one(data: bytes) -> None:
        try:
            target.run(data)
        except SpectoolError as error:
            if error.exit_code != 2 or not str(error):
                raise

    def mutate(data: bytes, size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        try:
            made = target.mutate(data, rng)[0] if rng.random() < 0.7 else b""
        except BROKEN:
            made = b""
        return made if 0 < len(made) <= size else atheris.Mutate(data, size)

    longest = max(map(len, target.seeds)) * 2 + 4096
    options = [f"-max_len={longest}", "-timeout=60", "-rss_limit_mb=3000", "-mutate_depth=2"]
    atheris.Setup([sys.argv[0], *options, *sys.argv[2:], str(seeds)], one, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
