"""Choose the front-end that knows most about a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from spectool.checkpoint.types import ExportedProgram, InertModule, ScriptProgram
from spectool.errors import GraphError
from spectool.graph.types import Survey

if TYPE_CHECKING:
    from spectool.checkpoint.types import Checkpoint

Inputs = Mapping[str, tuple[int, ...]]


def survey(checkpoint: Checkpoint, *, inputs: Inputs | None = None, assume_bn: bool = False) -> Survey:
    """Find every operator of a checkpoint.

    Args:
        checkpoint: An open checkpoint.
        inputs: Input name → shape with the batch axis; the name ``""`` means the only input.
        assume_bn: Whether to guess conv–batch-norm pairs where the file has no program.

    Raises:
        UsageError: If the inputs do not fit the program.
        GraphError: If the program cannot be followed at all.
    """
    given = dict(inputs) if inputs else None
    if checkpoint.format == "onnx":
        from spectool.graph.onnx import survey_onnx

        return survey_onnx(checkpoint, inputs=given)
    if isinstance(checkpoint.program, InertModule):
        from spectool.graph.modules import survey_modules

        return survey_modules(checkpoint, inputs=given, assume_bn=assume_bn)
    from spectool.graph.names import survey_names

    notes: tuple[str, ...] = ()
    try:
        if isinstance(checkpoint.program, ExportedProgram):
            from spectool.graph.exported import survey_exported

            return survey_exported(checkpoint, checkpoint.program.document)
        if isinstance(checkpoint.program, ScriptProgram):
            from spectool.graph.script import survey_script

            if given:
                return survey_script(checkpoint, checkpoint.program, given)
            notes = ("the file holds a program: give --input for exact operators at their real sizes",)
    except GraphError as error:
        # A program that cannot be followed still has tensors.
        notes = (f"its program cannot be followed ({error}); tensors only",)
    found = survey_names(checkpoint, assume_bn=assume_bn)
    return replace(found, notes=(*notes, *found.notes))
