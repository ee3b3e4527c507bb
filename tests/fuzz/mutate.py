"""From a seed to a mutant: which file, which steps, and in words what was done."""

from __future__ import annotations

import gzip
import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from .corpus import Case, corpus
from .documents import mutate_json, mutate_safetensors
from .octets import damage, number, text
from .pickles import Op, mutate_pickle, operations
from .protobufs import mutate_onnx
from .zips import members, mutate_zip

_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
_MOST_BYTES = 64 << 20
#: What taking apart the result of an earlier step can raise.
BROKEN = (ValueError, TypeError, LookupError, ArithmeticError, OSError, EOFError, RecursionError, zlib.error)


@dataclass(frozen=True)
class Mutant:
    """One input and how it came about.

    Attributes:
        case: What is run.
        steps: What was done, one after the other.
    """

    case: Case
    steps: tuple[str, ...]


def mutant(name: str, seed: int, only: Sequence[int] | None = None) -> Mutant:
    """Return the mutant of a corpus file that belongs to a seed.

    Args:
        name: Which file of the corpus.
        seed: Any number.
        only: Which of the seed's steps to take; None for all. Every step has its own source of chance, so that
            leaving one out does not change the others.
    """
    case = corpus()[name]
    rng = random.Random(f"{name}:{seed}")
    count = rng.choice((1, 1, 1, 1, 1, 2, 2, 3, 4, 6))
    # Partners of a sample are samples, so that a seed means the same where the real models are missing.
    partners = [other for other in corpus().values() if case.real or not other.real]
    files, target, told = dict(case.files), case.target, []
    for step in range(count):
        own = random.Random(f"{name}:{seed}:{step}")
        if only is not None and step not in only:
            continue
        donor = own.choice([other for other in partners if _family(other) == _family(case)] + partners[:3])
        told.append(_step(files, own, donor, target))
    return Mutant(Case(case.name, files, target, case.real), tuple(told))


def steps_of(name: str, seed: int) -> int:
    """Return how many steps a seed has."""
    return random.Random(f"{name}:{seed}").choice((1, 1, 1, 1, 1, 2, 2, 3, 4, 6))


def _family(case: Case) -> str:
    return case.name.rpartition(".")[2]


def _step(files: dict[str, bytes], rng: random.Random, donor: Case, target: str) -> str:
    names = sorted(files)
    main = target or next((name for name in names if name.endswith(".json")), names[0])
    name = rng.choice([*names, *[main] * len(names)])
    if name not in files:
        return "the file is gone already"
    if len(files) > 1 and rng.random() < 0.05:
        other = rng.choice(names)
        if rng.random() < 0.5 and name != target:
            del files[name]
            return f"{name} deleted"
        files[name], files[other] = files[other], files[name]
        return f"{name} and {other} swapped"
    other_bytes = donor.files[rng.choice(sorted(donor.files))]
    data, what = change(name, files[name], rng, other_bytes)
    files[name] = data[:_MOST_BYTES]
    return f"{name}: {what}" if len(files) > 1 else what


def change(name: str, data: bytes, rng: random.Random, donor: bytes) -> tuple[bytes, str]:
    """Return changed bytes and what was done: by their structure where they have one, else blindly."""
    if rng.random() < 0.02:
        return gzip.compress(data, 1, mtime=0), "gzipped"
    if rng.random() < 0.15:
        return damage(data, rng, donor)
    try:
        if data[:4] == b"PK\3\4":
            return mutate_zip(data, rng, lambda record, body: _record(record, body, rng, donor))
        if data[:2] == b"\x1f\x8b":
            body, what = change(name, gzip.decompress(data), rng, donor)
            return gzip.compress(body, 1, mtime=0), f"in gzip: {what}"
        if _MAGIC in data[:64]:
            return _legacy(data, rng, donor)
        if data[8:9] == b"{":
            return mutate_safetensors(data, rng)
        if data[:1] in (b"{", b"["):
            return mutate_json(data, rng)
        if data[:1] == b"\x80":
            return mutate_pickle(data, rng, _donor_pickle(donor))
        if name.endswith(".onnx"):
            return mutate_onnx(data, rng, donor)
    except BROKEN:
        # What an earlier step has left cannot be taken apart.
        pass
    return damage(data, rng, donor)


def _record(name: str, data: bytes, rng: random.Random, donor: bytes) -> tuple[bytes, str]:
    """Change the contents of one zip record."""
    if rng.random() < 0.1:
        return damage(data, rng, donor)
    try:
        if data[:1] == b"\x80":
            return mutate_pickle(data, rng, _donor_pickle(donor))
        if name.endswith(".json"):
            return mutate_json(data, rng)
        if name.endswith(".py"):
            return mutate_text(data, rng)
        if data[:4] == b"PK\3\4":
            return mutate_zip(data, rng, lambda record, body: _record(record, body, rng, donor))
    except BROKEN:
        pass
    return damage(data, rng, donor)


def _legacy(data: bytes, rng: random.Random, donor: bytes) -> tuple[bytes, str]:
    """Change one of the five pickles of an old torch file, or what follows them."""
    heads, rest = [], data
    for _ in range(5):
        _, after = operations(rest)
        heads.append(rest[: len(rest) - len(after)])
        rest = after
    at = rng.choice((0, 1, 2, 3, 3, 3, 3, 3, 4, 4, 5))
    if at == 5:
        rest, what = damage(rest, rng, donor)
    else:
        heads[at], what = mutate_pickle(heads[at], rng, _donor_pickle(donor))
    return b"".join(heads) + rest, f"pickle {at}: {what}"


def _donor_pickle(donor: bytes) -> list[Op]:
    """Return opcodes of another file to splice in."""
    try:
        if donor[:4] == b"PK\3\4":
            donor = next(part.data for part in members(donor) if part.name.endswith(b"data.pkl"))
        return operations(donor)[0] if donor[:1] == b"\x80" else []
    except (*BROKEN, StopIteration):
        return []


_TOKEN = re.compile(rb"[A-Za-z_]\w*|\d+\.?\d*(?:e-?\d+)?|\s+|.", re.DOTALL)


def mutate_text(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Return changed source text: tokens or lines deleted, repeated, swapped or exchanged."""
    whole = rng.random() < 0.3
    parts = data.splitlines(keepends=True) if whole else _TOKEN.findall(data)
    telling = [index for index, part in enumerate(parts) if part.strip()]
    if not telling:
        return damage(data, rng, b"")
    at, other = rng.choice(telling), rng.choice(telling)
    old = parts[at]
    match rng.randrange(7):
        case 0:
            parts[at] = b""
            what = "deleted"
        case 1:
            parts[at] = old * rng.choice((2, 2, 3, 500))
            what = "repeated"
        case 2:
            parts[at], parts[other] = parts[other], old
            what = f"swapped with {parts[at][:40]!r}"
        case 3 if old in (b"(", b"[") or rng.random() < 0.2:
            depth = int(10 ** rng.uniform(0.5, 4))
            parts[at] = rng.choice((b"(", b"[", b"-", b"not ", b"f(")) * depth
            what = f"{depth} times {parts[at][:4]!r}"
        case 4 | 5 if old[:1].isdigit() or old[:1].isalpha():
            value = (
                str(number(rng))
                if old[:1].isdigit()
                else text(rng, ["None", "self", "torch", "annotate", "List"])
            )
            parts[at] = value.encode("utf-8", "replace")
            what = f"-> {parts[at][:40]!r}"
        case _:
            parts[at] = parts[other]
            what = f"-> {parts[at][:40]!r}"
    return b"".join(parts), f"{'line' if whole else 'token'} {at} {old[:40]!r}: {what}"
