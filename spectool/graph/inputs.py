"""What a live module wants to be fed: names from its forward, shapes from its first layers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import torch

from spectool.errors import UsageError

Shape = tuple[int, ...]
_TOKENS = 8


def input_names(module: torch.nn.Module) -> tuple[str, ...]:
    """Return the names of forward's required parameters; all of them if none is required."""
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return ()
    plain = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = [p.name for p in plain if p.default is p.empty]
    return tuple(required or [p.name for p in plain[:1]])


def suggest(module: torch.nn.Module) -> tuple[Shape, bool] | None:
    """Return a shape that the first layer accepts, and whether it settles the analysis whatever the size.

    None where nothing can be told. A shape settles the analysis if no layer's spectrum depends on sizes.
    """
    leaves = [child for child in module.modules() if not any(True for _ in child.children())]
    sized = any(isinstance(leaf, torch.nn.modules.conv._ConvNd) for leaf in leaves)
    for leaf in leaves:
        if isinstance(leaf, torch.nn.modules.conv._ConvNd):
            dims = len(leaf.kernel_size)
            return (1, leaf.in_channels, *{1: (1000,), 2: (224, 224), 3: (16, 112, 112)}[dims]), False
        if isinstance(leaf, torch.nn.Embedding):
            return (1, _TOKENS), not sized
        if isinstance(leaf, torch.nn.Linear):
            return (1, leaf.in_features), not sized
        if isinstance(leaf, torch.nn.RNNBase):
            return (1, _TOKENS, leaf.input_size) if leaf.batch_first else (
                _TOKENS,
                1,
                leaf.input_size,
            ), not sized
    return None


def example_inputs(
    module: torch.nn.Module, shapes: Mapping[str, Sequence[int]] | None
) -> list[tuple[list[torch.Tensor], dict[str, torch.Tensor]]]:
    """Return the inputs to try, most likely first: positional tensors and named ones, on the meta device.

    Types are not written in a module, so that both floats and token indices are tried.

    Args:
        module: The program.
        shapes: Input name → shape with the batch axis; ``""`` is the only (or first) input; None asks the module.

    Raises:
        UsageError: If shapes are needed and missing, or a name is unknown; the message names the inputs and
            suggests a shape.
    """
    names = input_names(module)
    if not shapes:
        guess = suggest(module)
        if guess is None or not guess[1] or len(names) > 1:
            shape = "x".join(map(str, guess[0])) if guess else "1x3x224x224"
            raise UsageError(
                f"{type(module).__name__} needs the shape of its input"
                f"{'s' if len(names) > 1 else ''} ({', '.join(names) or 'unnamed'})",
                hint=f"e.g. --input {names[0] + '=' if len(names) > 1 else ''}{shape}",
            )
        shapes = {"": guess[0]}
    accepted = _accepted(module)
    for name in shapes:
        if name and accepted is not None and name not in accepted:
            raise UsageError(
                f"{type(module).__name__} has no input {name!r}", hint=f"its inputs are {', '.join(accepted)}"
            )
    tries = []
    for dtype in (torch.float32, torch.int64):
        made = {name: torch.empty(tuple(shape), dtype=dtype, device="meta") for name, shape in shapes.items()}
        tries.append(([made.pop("")] if "" in made else [], made))
    if len(shapes) > 1:
        # Names say which of several inputs are indices.
        mixed = {
            name: torch.empty(
                tuple(shape), dtype=torch.int64 if _is_index(name) else torch.float32, device="meta"
            )
            for name, shape in shapes.items()
        }
        tries.insert(0, ([mixed.pop("")] if "" in mixed else [], mixed))
    return tries


def _is_index(name: str) -> bool:
    return name.endswith(("ids", "mask", "tokens", "positions", "indices", "lengths"))


def _accepted(module: torch.nn.Module) -> list[str] | None:
    """Return the names forward takes, None if it takes any."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind == p.VAR_KEYWORD for p in parameters):
        return None
    return [p.name for p in parameters if p.kind != p.VAR_POSITIONAL]
