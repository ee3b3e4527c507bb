"""Choose the front-end that knows most about a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from spectool.checkpoint.types import ExportedProgram, InertModule, ScriptProgram
from spectool.errors import GraphError, UsageError
from spectool.graph.types import Survey

if TYPE_CHECKING:
    from spectool.checkpoint.types import Checkpoint

Given = tuple[int, ...] | int | float | bool
Inputs = Mapping[str, Given]


def survey(checkpoint: Checkpoint, *, inputs: Inputs | None = None, assume_bn: bool = False) -> Survey:
    """Find every operator of a checkpoint.

    Args:
        checkpoint: An open checkpoint.
        inputs: Input name → shape with the batch axis, or a number for a program that wants one; the name ``""``
            means the only input.
        assume_bn: Whether to guess conv–batch-norm pairs where the file has no program.

    Raises:
        UsageError: If the inputs do not fit the program.
        GraphError: If the program cannot be followed at all.
    """
    given = dict(inputs) if inputs else None
    if checkpoint.format == "onnx":
        from spectool.graph.onnx import survey_onnx

        return survey_onnx(checkpoint, inputs=_without_numbers(checkpoint.program, given))
    if isinstance(checkpoint.program, InertModule):
        from spectool.graph.modules import survey_modules

        return survey_modules(checkpoint, inputs=_shapes(given), assume_bn=assume_bn)
    from spectool.graph.names import survey_names

    notes: tuple[str, ...] = ()
    try:
        if isinstance(checkpoint.program, ExportedProgram):
            from spectool.graph.exported import survey_exported

            found = survey_exported(checkpoint, checkpoint.program.document)
            unused = ("--input is not used: an exported program has sizes of its own",) if given else ()
            return replace(found, notes=(*unused, *found.notes))
        if isinstance(checkpoint.program, ScriptProgram):
            from spectool.graph.script import survey_script

            try:
                return survey_script(checkpoint, checkpoint.program, given)
            except UsageError as error:
                if given:
                    raise
                notes = (f"for exact operators, {error}: {error.hint}",)
    except GraphError as error:
        # A program that cannot be followed still has tensors.
        notes = (f"its program cannot be followed ({error}); tensors only",)
    found = survey_names(checkpoint, assume_bn=assume_bn)
    return replace(found, notes=(*notes, *found.notes))


def _without_numbers(model: Any, given: Mapping[str, Given] | None) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes alone; what a number is in the graph has no size to be told, and its value no influence."""
    scalars = {
        value.name
        for value in model.graph.input
        if value.type.tensor_type.HasField("shape") and not value.type.tensor_type.shape.dim
    }
    left = {
        name: value for name, value in (given or {}).items() if name not in scalars or not _is_number(value)
    }
    return _shapes(left) or None


def _shapes(given: Mapping[str, Given] | None) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes as they are.

    Raises:
        UsageError: If one is a number.
    """
    if given is None:
        return None
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in given.items():
        if not isinstance(value, tuple):
            raise UsageError(
                f"--input {name}={value} is a number, and the file holds no program that takes one",
                hint="write 1x3x224x224 (with the batch axis) or name=1x3x224x224",
            )
        shapes[name] = value
    return shapes


def _is_number(value: Given) -> bool:
    return not isinstance(value, tuple) or len(value) == 1
