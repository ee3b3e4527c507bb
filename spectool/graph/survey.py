"""Choose the front-end that knows most about a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from spectool.checkpoint.types import InertModule
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

    return survey_names(checkpoint, assume_bn=assume_bn)
