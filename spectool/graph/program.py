"""The front-end for live programs: a module, its tape, and rows for everything on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from spectool.errors import GraphError, OperatorError
from spectool.graph.boundaries import Wall
from spectool.graph.inputs import Fed, Given, example_inputs
from spectool.graph.recorded import survey_recorded, unused
from spectool.graph.tape import record, wall_of
from spectool.graph.types import Survey

Load = Callable[[str], torch.Tensor]


def survey_module(
    module: torch.nn.Module,
    inputs: Sequence[Fed],
    named_inputs: Mapping[str, Fed] | None = None,
    *,
    keys: Mapping[str, str] | None = None,
    load: Load | None = None,
    notes: Sequence[str] = (),
) -> Survey:
    """Find every operator of a live module by one forward under fake tensors.

    Args:
        module: The program, run in evaluation mode; its weights may be on the meta device if ``load`` is given.
        inputs: Example inputs with their batch axis, of which only shapes and types count, and numbers.
        named_inputs: The same, by keyword.
        keys: Parameter or buffer name → checkpoint key; by default the names themselves.
        load: Reads a tensor by checkpoint key; by default from the module.
        notes: What to say besides.

    Raises:
        GraphError: If the module cannot be run on such inputs.
    """
    recorded, captured = record(module, inputs, named_inputs)
    names = dict(keys or {})
    state = dict(
        (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    )

    def stored(name: str) -> torch.Tensor:
        if load is not None and (not names or name in names):
            return load(names.get(name, name))
        if state[name].is_meta:
            raise OperatorError(f"{name} is not in the file and was not computed when its module was built")
        return state[name].detach().cpu()

    walls = {}
    for path, child in module.named_modules():
        kind = wall_of(child)
        if kind is not None:
            prefix = f"{path}." if path else ""
            walls[path] = Wall(
                kind, {prefix + name: tuple(p.shape) for name, p in child.named_parameters(recurse=False)}
            )
    found = survey_recorded(recorded, captured, stored, walls=walls, keys=names, notes=notes)
    parameters = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    return replace(found, notes=(*found.notes, *unused(found, parameters, names)))


def survey_live(
    module: torch.nn.Module,
    shapes: Mapping[str, Given] | None,
    *,
    keys: Mapping[str, str] | None = None,
    load: Load | None = None,
    notes: Sequence[str] = (),
) -> Survey:
    """Find every operator of a live module from the shapes of its inputs; types are found by trying.

    Args:
        module: As for ``survey_module``.
        shapes: Input name → shape with the batch axis, or a number where the module wants one; ``""`` is the only
            input; None asks the module.
        keys: As for ``survey_module``.
        load: As for ``survey_module``.
        notes: As for ``survey_module``.

    Raises:
        UsageError: If shapes are needed and missing.
        GraphError: If the module cannot be run on inputs of these shapes.
    """
    problem: GraphError | None = None
    for positional, named in example_inputs(module, shapes):
        try:
            return survey_module(module, positional, named, keys=keys, load=load, notes=notes)
        except GraphError as error:
            problem = problem or error
    raise problem or GraphError(f"{type(module).__name__} cannot be followed")
