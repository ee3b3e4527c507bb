"""Where operators come from: a file, a file with a known architecture, a live module."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spectool.checkpoint import open_checkpoint
from spectool.checkpoint.limits import DEFAULT, Limits
from spectool.errors import CheckpointError, GraphError, LimitExceeded, UsageError
from spectool.graph import Region, Skipped, Survey, survey

if TYPE_CHECKING:
    from spectool.checkpoint.types import Checkpoint

Shape = tuple[int, ...]
Scalar = int | float | bool
InputShapes = Shape | Sequence[int] | Mapping[str, Sequence[int] | Scalar]


@dataclass(frozen=True)
class Found:
    """What was found where.

    Attributes:
        survey: The operators.
        path: The file; None for a live module.
        format: Its container; None for a live module.
        notes: What a user should know.
        checkpoint: The open file; None for a live module.
    """

    survey: Survey
    path: str | None
    format: str | None
    notes: tuple[str, ...]
    checkpoint: Checkpoint | None = None


@dataclass(frozen=True)
class Ways:
    """How operators may be found where the file itself does not say.

    Attributes:
        assume_bn: Whether to guess conv–batch-norm pairs.
        key: Which branch of a nested training checkpoint to take.
        arch: Architecture that gives a file its program.
        arch_args: Arguments of its factory.
        recognise: Whether to look the file's keys and shapes up among known architectures.
        trust: Whether the code of a pickled module may run.
        limits: What the file may ask for.
    """

    assume_bn: bool = False
    key: str | None = None
    arch: str | None = None
    arch_args: Mapping[str, Any] | None = None
    recognise: bool = True
    trust: bool = False
    limits: Limits = DEFAULT


def find(source: str | Path | torch.nn.Module, ways: Ways, input_shape: InputShapes | None = None) -> Found:
    """Find every operator of a file or a live module.

    A file without a program of its own gets one, in this order, from ``arch``, from its pickled module if that may
    run, from a fingerprint, from the ``config.json`` beside it; else its module tree or its tensors must do.

    Args:
        source: A checkpoint file or directory, or a module.
        ways: How operators may be found.
        input_shape: As for ``inspect``.

    Raises:
        UsageError: If the architecture or the shapes do not fit.
        CheckpointError: If the file cannot be read.
    """
    shapes = named_shapes(input_shape)
    if isinstance(source, torch.nn.Module):
        from spectool.graph.program import survey_live

        found = survey_live(source, shapes)
        return Found(found, None, None, found.notes)
    checkpoint = open_checkpoint(source, key=ways.key, limits=ways.limits)
    found, notes = _find(checkpoint, ways, shapes)
    found = replace(found, items=tuple(_within(item, ways.limits) for item in found.items))
    told = (*checkpoint.notes, *notes, *found.notes)
    return Found(found, str(source), checkpoint.format, told, checkpoint)


def _within(item: Region | Skipped, limits: Limits) -> Region | Skipped:
    """Return an operator, or why none of its size is computed with."""
    if isinstance(item, Skipped):
        return item
    try:
        for side, shape in (("input", item.in_shape), ("output", item.out_shape)):
            limits.check("operator_entries", math.prod(shape or ()), f"its {side} of shape {shape}")
    except LimitExceeded as error:
        return Skipped(
            item.key,
            item.kind,
            item.weights,
            item.weight_shapes,
            error.in_full,
            operators=item.operators,
        )
    return item


def _find(
    checkpoint: Checkpoint, ways: Ways, shapes: Mapping[str, Shape | Scalar] | None
) -> tuple[Survey, tuple[str, ...]]:
    if ways.arch is not None:
        from spectool.architectures import build

        module = build(ways.arch, ways.arch_args)
        return _as_module(checkpoint, module, f"architecture: {ways.arch}", ways.arch, shapes), ()
    from spectool.checkpoint.types import InertModule

    if ways.trust and isinstance(checkpoint.program, InertModule):
        return _trusted(checkpoint, shapes), ()
    notes: tuple[str, ...] = ()
    if checkpoint.program is None:
        if isinstance(checkpoint.metadata.get("config"), Mapping):
            found, notes = _from_config(checkpoint, checkpoint.metadata["config"], shapes)
            if found is not None:
                return found, ()
        elif ways.recognise:
            found, notes = _recognised(checkpoint, shapes)
            if found is not None:
                return found, ()
    return survey(checkpoint, inputs=shapes, assume_bn=ways.assume_bn), notes


def _recognised(
    checkpoint: Checkpoint, shapes: Mapping[str, Shape | Scalar] | None
) -> tuple[Survey | None, tuple[str, ...]]:
    """Return the survey of a known architecture; None, and why, where it is none or its input size is missing."""
    from spectool.architectures import build
    from spectool.architectures.fingerprints import recognise

    known = recognise({name: ref.shape for name, ref in checkpoint.tensors.items()})
    if known is None:
        return None, ()
    if shapes is None:
        return None, (
            f"looks like {known.name}: give --input 1x3x224x224, say, for exact operators and pairs",
        )
    try:
        module = build(known.name, known.arguments)
        label = f"architecture: {known.name} (recognised)"
        return _as_module(checkpoint, module, label, known.name, shapes), ()
    except (UsageError, GraphError) as error:
        return None, (f"looks like {known.name}, but: {error}",)


def _from_config(
    checkpoint: Checkpoint, config: Mapping[str, Any], shapes: Mapping[str, Shape | Scalar] | None
) -> tuple[Survey | None, tuple[str, ...]]:
    """Return the survey of the transformers model that a configuration describes; None, and why, if there is none."""
    from spectool.architectures.huggingface import build_from_config, input_shapes

    try:
        module = build_from_config(config, len(checkpoint.tensors))
        label = f"architecture: transformers:{type(module).__name__} (config.json)"
        return _as_module(
            checkpoint, module, label, type(module).__name__, shapes or input_shapes(module)
        ), ()
    except (UsageError, GraphError) as error:
        hint = f" ({error.hint})" if error.hint else ""
        return None, (f"config.json not used: {error}{hint}",)


def _trusted(checkpoint: Checkpoint, shapes: Mapping[str, Shape | Scalar] | None) -> Survey:
    """Unpickle a module, which runs its code, and follow it."""
    from spectool.graph.program import survey_live

    try:
        loaded = torch.load(checkpoint.path, map_location="cpu", weights_only=False)
    except Exception as error:  # whatever a stranger's pickle raises
        text = str(error).splitlines()[0] if str(error) else ""
        raise CheckpointError(
            f"{checkpoint.path}: its module cannot be unpickled ({type(error).__name__}: {text})",
            hint="its classes must be importable from here; without --trust the file is read as data",
        ) from error
    for source in getattr(checkpoint.reader, "sources", {}).values():
        source.check()
    module = _module_in(loaded)
    if module is None:
        raise CheckpointError(f"{checkpoint.path} holds no module", hint="leave --trust away")
    found = survey_live(module.float(), shapes, notes=("its own code was run (--trust)",))
    return replace(found, live=(module, {}))


def _module_in(value: Any) -> torch.nn.Module | None:
    if isinstance(value, torch.nn.Module):
        return value
    if isinstance(value, Mapping):
        return next((found for found in map(_module_in, value.values()) if found is not None), None)
    return None


def _as_module(
    checkpoint: Checkpoint,
    module: torch.nn.Module,
    label: str,
    name: str,
    shapes: Mapping[str, Shape | Scalar] | None,
) -> Survey:
    """Follow ``module`` with the checkpoint's weights; every row says where the program came from."""
    from spectool.architectures import match_keys
    from spectool.graph.program import survey_live

    state = {
        key: value
        for key, value in module.state_dict(keep_vars=True).items()
        if isinstance(value, torch.Tensor)
    }
    stored = {key: ref.shape for key, ref in checkpoint.tensors.items()}
    match = match_keys(
        stored,
        {key: tuple(value.shape) for key, value in state.items()},
        architecture=name,
        tied={key: id(value) for key, value in state.items()},
    )
    notes = [label]
    if match.prefix:
        notes.append(f"prefix {match.prefix!r} stripped")
    if match.unused:
        shown = ", ".join(match.unused[:4]) + (", …" if len(match.unused) > 4 else "")
        notes.append(f"{len(match.unused)} tensors of the file have no place in {name}: {shown}")
    found = survey_live(module, shapes, keys=match.keys, load=checkpoint.read, notes=notes)
    items = tuple(
        replace(item, assumed=(*item.assumed, label)) if isinstance(item, Region) else item
        for item in found.items
    )
    return replace(found, items=items, live=(module, dict(match.keys)))


def named_shapes(shapes: InputShapes | None) -> dict[str, Shape | Scalar] | None:
    """Return input name → shape, or the number given in its place; a bare shape goes by ``""``."""
    if shapes is None:
        return None
    if isinstance(shapes, Mapping):
        return {name: _shape_or_number(value) for name, value in shapes.items()}
    return {"": tuple(int(size) for size in shapes)}


def _shape_or_number(value: Any) -> Shape | Scalar:
    """Return a shape as a tuple and a number, numpy's too, as Python's own."""
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, numbers.Real):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    try:
        return tuple(int(size) for size in value)
    except (TypeError, ValueError):
        raise UsageError(
            f"{value!r} is neither a shape nor a number", hint="e.g. {'x': (1, 512), 'rate': 16000}"
        ) from None
