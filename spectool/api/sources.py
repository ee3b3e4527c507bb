"""Where operators come from: a file, a file with a known architecture, a live module, a function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spectool.checkpoint import open_checkpoint
from spectool.graph import Region, Survey, survey

if TYPE_CHECKING:
    from spectool.checkpoint.types import Checkpoint

Shape = tuple[int, ...]
InputShapes = Shape | Sequence[int] | Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Found:
    """What was found where.

    Attributes:
        survey: The operators.
        path: The file; None for a live module.
        format: Its container; None for a live module.
        notes: What a user should know.
    """

    survey: Survey
    path: str | None
    format: str | None
    notes: tuple[str, ...]


def find(
    source: str | Path | torch.nn.Module,
    *,
    input_shape: InputShapes | None = None,
    assume_bn: bool = False,
    key: str | None = None,
    arch: str | None = None,
    arch_args: Mapping[str, Any] | None = None,
) -> Found:
    """Find every operator of a file or a live module.

    Args:
        source: A checkpoint file or directory, or a module.
        input_shape: As for ``inspect``.
        assume_bn: As for ``inspect``.
        key: As for ``inspect``.
        arch: Architecture that gives a file without a program its program.
        arch_args: Arguments of its factory.

    Raises:
        UsageError: If the architecture or the shapes do not fit.
        CheckpointError: If the file cannot be read.
    """
    shapes = named_shapes(input_shape)
    if isinstance(source, torch.nn.Module):
        from spectool.graph.program import survey_live

        found = survey_live(source, shapes)
        return Found(found, None, None, found.notes)
    checkpoint = open_checkpoint(source, key=key)
    if arch is not None:
        found = _with_architecture(checkpoint, arch, arch_args, shapes)
    else:
        found = survey(checkpoint, inputs=shapes, assume_bn=assume_bn)
    return Found(found, str(source), checkpoint.format, (*checkpoint.notes, *found.notes))


def _with_architecture(
    checkpoint: Checkpoint, arch: str, arguments: Mapping[str, Any] | None, shapes: Mapping[str, Shape] | None
) -> Survey:
    from spectool.architectures import build, match_keys
    from spectool.graph.program import survey_live

    module = build(arch, arguments)
    wanted = {
        name: tuple(tensor.shape)
        for name, tensor in module.state_dict(keep_vars=True).items()
        if isinstance(tensor, torch.Tensor)
    }
    stored = {name: ref.shape for name, ref in checkpoint.tensors.items()}
    match = match_keys(stored, wanted, architecture=arch)
    notes = [f"architecture: {arch}"]
    if match.prefix:
        notes.append(f"prefix {match.prefix!r} stripped")
    if match.unused:
        shown = ", ".join(match.unused[:4]) + (", …" if len(match.unused) > 4 else "")
        notes.append(f"{len(match.unused)} tensors of the file have no place in {arch}: {shown}")
    found = survey_live(module, shapes, keys=match.keys, load=checkpoint.read, notes=notes)
    items = tuple(
        replace(item, assumed=(*item.assumed, f"architecture: {arch}")) if isinstance(item, Region) else item
        for item in found.items
    )
    return replace(found, items=items)


def named_shapes(shapes: InputShapes | None) -> dict[str, Shape] | None:
    """Return input name → shape; a bare shape goes by ``""``."""
    if shapes is None:
        return None
    if isinstance(shapes, Mapping):
        return {name: tuple(int(size) for size in shape) for name, shape in shapes.items()}
    return {"": tuple(int(size) for size in shapes)}
