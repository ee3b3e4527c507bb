"""What a live module wants to be fed: names and types from its forward, shapes from its first layers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spectool.errors import UsageError

Shape = tuple[int, ...]
Scalar = int | float | bool
Given = Sequence[int] | Scalar
Fed = torch.Tensor | Scalar
Try = tuple[list[Fed], dict[str, Fed]]

_TOKENS = 8
_NUMBERS: Mapping[str, type] = {"int": int, "float": float, "bool": bool}
_CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")


@dataclass(frozen=True)
class Wanted:
    """One parameter of a forward.

    Attributes:
        name: Its name.
        kind: ``Tensor``, ``int``, ``float`` or ``bool``; empty if the program does not say.
        required: Whether it has no default.
    """

    name: str
    kind: str
    required: bool

    def __str__(self) -> str:
        return f"{self.name}: {self.kind}" if self.kind else self.name


def wanted_inputs(module: torch.nn.Module) -> tuple[Wanted, ...] | None:
    """Return the parameters of a module's forward; None if it takes any or does not say."""
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return None
    if any(p.kind == p.VAR_KEYWORD for p in parameters):
        return None
    return tuple(
        Wanted(p.name, _kind(p.annotation), p.default is p.empty)
        for p in parameters
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    )


def _kind(annotation: Any) -> str:
    """Return the word of ``Wanted.kind`` for an annotation, written out or evaluated."""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    for wrapping in ("typing.", "torch.", "Optional[", "]", " | None", "Union[", ", NoneType", ", None"):
        text = text.replace(wrapping, "")
    return text if text == "Tensor" or text in _NUMBERS else ""


def suggest(module: torch.nn.Module) -> tuple[Shape, bool] | None:
    """Return a shape that the first layer accepts, and whether it settles the analysis whatever the size.

    None where nothing can be told. A shape settles the analysis if no layer's spectrum depends on sizes.
    """
    leaves = [child for child in module.modules() if not any(True for _ in child.children())]
    sized = any(type(leaf).__name__ in _CONVOLUTIONS or _has_kernel(leaf) for leaf in leaves)
    for leaf in leaves:
        name = type(leaf).__name__
        weight = leaf._parameters.get("weight")
        if isinstance(leaf, torch.nn.RNNBase):
            steps, batch = (1, _TOKENS) if leaf.batch_first else (_TOKENS, 1)
            return (steps, batch, leaf.input_size), not sized
        if weight is None:
            continue
        if name in _CONVOLUTIONS and weight.dim() > 2:
            channels = getattr(leaf, "in_channels", weight.shape[0 if "Transpose" in name else 1])
            return (1, channels, *{1: (1000,), 2: (224, 224), 3: (16, 112, 112)}[weight.dim() - 2]), False
        if name == "Embedding":
            return (1, _TOKENS), not sized
        if name == "Linear":
            return (1, weight.shape[1]), not sized
    return None


def _has_kernel(leaf: torch.nn.Module) -> bool:
    """Return whether a layer is a convolution by another name, or one of an archive that has a kernel at all."""
    if isinstance(leaf, torch.nn.modules.conv._ConvNd):
        return True
    return hasattr(leaf, "script_class") and any(
        p is not None and p.dim() > 2 for p in leaf._parameters.values()
    )


def example_inputs(module: torch.nn.Module, given: Mapping[str, Given] | None) -> list[Try]:
    """Return the inputs to try, most likely first: positional ones and named ones, tensors on the meta device.

    Element types are not written in a module, so that both floats and token indices are tried. A single number is
    the length of an axis or, where the program wants a number, that number.

    Args:
        module: The program.
        given: Input name → shape with the batch axis, or a number; ``""`` is the only (or first) input; None asks
            the module.

    Raises:
        UsageError: If something is needed and missing, or does not fit; the message names the inputs and their
            types, the hint suggests values.
    """
    wanted = wanted_inputs(module)
    if not given:
        guess = suggest(module)
        required = _required(wanted)
        if guess is None or not guess[1] or len(required) > 1:
            shape = guess[0] if guess else (1, 3, 224, 224)
            plural = "s" if len(required) > 1 else ""
            raise UsageError(
                f"{type(module).__name__} needs the shape of its input{plural} "
                f"({_listed(required) or 'unnamed'})",
                hint=f"for example {_example(module, required, shape)}; give your own sizes",
            )
        given = {"": guess[0]}
    fixed: dict[str, Scalar] = {}
    shapes: dict[str, Shape] = {}
    loose: dict[str, Scalar] = {}
    by_name = {item.name: item for item in wanted or ()}
    for name, value in given.items():
        if name and wanted is not None and name not in by_name:
            raise UsageError(
                f"{type(module).__name__} has no input {name!r}", hint=f"its inputs are {', '.join(by_name)}"
            )
        item = by_name.get(name) if name else next(iter(by_name.values()), None)
        number = _number(item, name, value)
        if number is not None:
            fixed[name] = number
        else:
            shapes[name] = tuple(int(size) for size in value)  # type: ignore[union-attr]
            if item is not None and not item.kind and len(shapes[name]) == 1:
                loose[name] = shapes[name][0]
    _check_numbers_given(module, wanted, given)
    return _tries(shapes, fixed, loose)


def _tries(
    shapes: Mapping[str, Shape], fixed: Mapping[str, Scalar], loose: Mapping[str, Scalar]
) -> list[Try]:
    """Return what to feed, for every guess of element types; ``loose`` ones may be numbers instead of shapes."""

    def fed(types: Mapping[str, torch.dtype], numbers: Mapping[str, Scalar]) -> Try:
        made: dict[str, Fed] = {
            name: torch.empty(shape, dtype=types[name], device="meta")
            for name, shape in shapes.items()
            if name not in numbers
        }
        made.update(numbers)
        return ([made.pop("")] if "" in made else []), made

    tries = []
    for numbers in (fixed, {**fixed, **loose}) if loose else (fixed,):
        if len(shapes) > 1:
            # Names say which of several inputs are indices.
            tries.append(fed({n: torch.int64 if _is_index(n) else torch.float32 for n in shapes}, numbers))
        tries += [fed(dict.fromkeys(shapes, dtype), numbers) for dtype in (torch.float32, torch.int64)]
    return tries


def _number(item: Wanted | None, name: str, value: Given) -> Scalar | None:
    """Return the number that an input is to have, None if it is a tensor.

    Raises:
        UsageError: If what is given does not fit what the program says it wants.
    """
    kind = item.kind if item is not None else ""
    label = name or (item.name if item is not None else "")
    if not isinstance(value, (int, float)):
        if kind not in _NUMBERS:
            return None
        if len(value) != 1:
            raise UsageError(
                f"input {label} is no tensor but {_article(kind)}", hint=f"give --input {label}=1"
            )
        value = value[0]
    elif kind == "Tensor":
        raise UsageError(
            f"input {label} is a tensor, not the number {value}",
            hint=f"give its shape: --input {label}=1x3x224x224",
        )
    if kind not in _NUMBERS:
        return value
    if kind != "float" and value != int(value):
        raise UsageError(f"input {label} is {_article(kind)}, not {value}", hint=f"give --input {label}=1")
    found: Scalar = _NUMBERS[kind](value)
    return found


def _article(kind: str) -> str:
    return f"an {kind}" if kind == "int" else f"a {kind}"


def _check_numbers_given(
    module: torch.nn.Module, wanted: Sequence[Wanted] | None, given: Mapping[str, Given]
) -> None:
    """Refuse inputs among which a number is missing: unlike a tensor's, no shape would tell what it is.

    Raises:
        UsageError: If one is.
    """
    named = set(given)
    if "" in named and wanted:
        named.add(wanted[0].name)
    missing = [w for w in wanted or () if w.required and w.kind in _NUMBERS and w.name not in named]
    if not missing:
        return
    required = _required(wanted)
    shape = next((value for value in given.values() if not isinstance(value, (int, float))), (1, 3, 224, 224))
    raise UsageError(
        f"{type(module).__name__} also needs {', '.join(map(str, missing))}",
        hint=f"for example {_example(module, required, tuple(shape))}; give your own values",
    )


def _required(wanted: Sequence[Wanted] | None) -> tuple[Wanted, ...]:
    """Return the inputs without a default; the first one if all have one."""
    return tuple(item for item in wanted or () if item.required) or tuple((wanted or ())[:1])


def _listed(wanted: Sequence[Wanted]) -> str:
    """Return the inputs with their types, or the only one by its name."""
    return ", ".join(map(str, wanted)) if len(wanted) != 1 else wanted[0].name


def _example(module: torch.nn.Module, required: Sequence[Wanted], shape: Shape) -> str:
    """Return what to write on a command line."""
    written = "x".join(map(str, shape))
    if len(required) <= 1:
        return f"--input {written}"
    hints = getattr(module, "input_hints", {})
    plain = {"int": "1", "float": "1.0", "bool": "true"}
    return " ".join(
        f"--input {item.name}={hints.get(item.name, plain[item.kind]) if item.kind in _NUMBERS else written}"
        for item in required
    )


def _is_index(name: str) -> bool:
    return name.endswith(("ids", "mask", "tokens", "positions", "indices", "lengths"))
