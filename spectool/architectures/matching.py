"""Match the keys of a checkpoint with those of a module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spectool.errors import UsageError

Shape = tuple[int, ...]

PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.", "encoder.")
"""Prefixes that training wrappers put before every key; any sequence of them may be stripped."""

_IGNORED = "num_batches_tracked"
_SHOWN = 6


@dataclass(frozen=True)
class Match:
    """Which checkpoint key feeds which parameter or buffer.

    Attributes:
        keys: Module name → checkpoint key.
        unused: Checkpoint keys that the module has no place for.
        prefix: What was stripped from checkpoint keys.
    """

    keys: Mapping[str, str]
    unused: tuple[str, ...]
    prefix: str = ""


def match_keys(
    stored: Mapping[str, Shape],
    wanted: Mapping[str, Shape],
    *,
    architecture: str,
    tied: Mapping[str, int] | None = None,
) -> Match:
    """Pair the tensors of a checkpoint with those of a module, prefixes of wrappers stripped.

    Args:
        stored: Checkpoint key → shape.
        wanted: Module name → shape of its parameters and persistent buffers.
        architecture: For the error.
        tied: Module name → identity of its tensor; one name of several with one identity is enough.

    Raises:
        UsageError: If a wanted tensor is missing or has another shape; the message lists the first ones.
    """
    identity = tied or {}
    prefix, added = _prefix(stored, wanted)
    by_name = {added + key[len(prefix) :]: key for key in stored if key.startswith(prefix)}
    found = {name: by_name[name] for name in wanted if name in by_name}
    by_identity = {identity[name]: key for name, key in found.items() if name in identity}
    problems = []
    keys = {}
    for name, shape in wanted.items():
        key = found.get(name) or by_identity.get(identity.get(name, -1))
        if key is None:
            if not name.endswith(_IGNORED):
                problems.append(f"{name} {_text(shape)} is missing")
        elif tuple(stored[key]) != tuple(shape):
            problems.append(
                f"{name} is {_text(stored[key])} in the file and {_text(shape)} in {architecture}"
            )
        else:
            keys[name] = key
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise UsageError(
            f"the file does not fit {architecture}: {'; '.join(problems[:_SHOWN])}{more}",
            hint="check --arch and --arch-args (the number of classes, say), or --key for another branch of the file",
        )
    used = set(keys.values())
    return Match(keys, tuple(key for key in stored if key not in used), prefix)


def _prefix(stored: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> tuple[str, str]:
    """Return what to strip from checkpoint keys and what to put before them for the most names in common.

    A file of the base model alone lacks the prefix that a model with a head gives it (``bert.``, ``model.``).
    """
    heads = {""} | {name.split(".")[0] + "." for name in wanted if "." in name}
    best = (-1, "", "")
    for prefix in _prefixes(list(stored)):
        names = [key[len(prefix) :] for key in stored if key.startswith(prefix)]
        for added in sorted(heads):
            hits = sum(1 for name in names if added + name in wanted)
            if hits > best[0]:
                best = (hits, prefix, added)
    return best[1], best[2]


def _prefixes(keys: Sequence[str]) -> list[str]:
    """Return every sequence of wrapper prefixes that begins some key, the empty one first."""
    found = [""]
    for prefix in found:
        if len(prefix) > 64:
            break
        found.extend(
            prefix + more
            for more in PREFIXES
            if prefix + more not in found and any(key.startswith(prefix + more) for key in keys)
        )
    return found


def _text(shape: Shape) -> str:
    return "x".join(str(size) for size in shape) or "scalar"
