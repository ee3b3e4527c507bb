"""Real input sizes: what the file says, what the user says, and 1 for an open batch axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spectool.errors import UsageError
from spectool.graph.onnx.state import Dims

_EXAMPLE = {2: 512, 3: 1024, 4: 224, 5: 32}
"""A plausible size for an open axis in a hint, by rank of the input."""


def declared_shape(value: Any) -> list[int | str | None] | None:
    """Return the dimensions of a ``ValueInfoProto``: numbers, names, None; None for an unknown rank."""
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not kind.HasField("shape"):
        return None
    return [
        dim.dim_value
        if dim.HasField("dim_value")
        else dim.dim_param or None
        if dim.HasField("dim_param")
        else None
        for dim in kind.shape.dim
    ]


def resolve_inputs(
    declared: Mapping[str, Sequence[int | str | None] | None], given: Mapping[str, Sequence[int]] | None
) -> tuple[dict[str, Dims | None], dict[str, int]]:
    """Return the shape of every input, None where it stays open, and the sizes of named dimensions.

    Args:
        declared: Input name → dimensions as the file has them.
        given: Input name → shape as the user has it; the name ``""`` means the only input.

    Raises:
        UsageError: If what the user gave does not fit the model.
    """
    chosen: dict[str, tuple[int, ...]] = {}
    for name, shape in (given or {}).items():
        chosen[_meant(name, declared)] = tuple(shape)
    sizes: dict[str, int] = {}
    for name, shape in chosen.items():
        _check(name, shape, declared[name], sizes)
    for dims in declared.values():
        # An open leading axis is the batch: every sample is treated alike.
        if dims and isinstance(dims[0], str):
            sizes.setdefault(dims[0], 1)
    resolved: dict[str, Dims | None] = {}
    for name, dims in declared.items():
        if name in chosen:
            resolved[name] = chosen[name]
        elif dims is None:
            resolved[name] = None
        else:
            resolved[name] = tuple(
                size if isinstance(size, int) and size > 0
                else sizes.get(size) if isinstance(size, str)
                else 1 if axis == 0
                else None
                for axis, size in enumerate(dims)
            )  # fmt: skip
    return resolved, sizes


def ones(shape: Dims | None) -> Dims | None:
    """Return a shape with 1 wherever it is open."""
    return None if shape is None else tuple(1 if size is None else size for size in shape)


def example_shapes(resolved: Mapping[str, Dims | None]) -> dict[str, Dims | None]:
    """Return the input shapes with a plausible size wherever one is open."""
    return {
        name: tuple(size if size is not None else _EXAMPLE.get(len(shape), 16) for size in shape)
        for name, dims in resolved.items()
        for shape in [dims if dims is not None else (1, 3, None, None)]
    }


def missing_size(
    what: str, declared: Mapping[str, Sequence[int | str | None] | None], resolved: Mapping[str, Dims | None]
) -> UsageError:
    """Return the error for an operator whose input size is open, with the inputs and an example."""
    open_inputs = [name for name, shape in resolved.items() if shape is None or None in shape]
    example = example_shapes({name: resolved[name] for name in open_inputs})
    flags = " ".join(f"--input {name}={'x'.join(map(str, shape or ()))}" for name, shape in example.items())
    shapes = ", ".join(f"{name} ({_text(declared[name])})" for name in open_inputs)
    return UsageError(
        f"the size of {what} is not fixed by the file: open input {shapes}",
        hint=f"say what size it has, e.g. {flags}",
    )


def _meant(name: str, declared: Mapping[str, Sequence[int | str | None] | None]) -> str:
    if name in declared:
        return name
    if not name and len(declared) == 1:
        return next(iter(declared))
    listed = ", ".join(f"{known} ({_text(dims)})" for known, dims in declared.items()) or "none"
    if not name:
        raise UsageError(
            f"the model has {len(declared)} inputs: {listed}",
            hint="say which one is meant: --input name=1x3x224x224",
        )
    raise UsageError(
        f"the model has no input {name!r}; its inputs are {listed}", hint="use one of those names"
    )


def _check(
    name: str, shape: tuple[int, ...], dims: Sequence[int | str | None] | None, sizes: dict[str, int]
) -> None:
    text = "x".join(map(str, shape))
    if any(size < 1 for size in shape):
        raise UsageError(f"input {name} cannot have the shape {text}", hint="every size is at least 1")
    if dims is None:
        return
    problem = f"input {name} has the shape {_text(dims)} in the file, not {text}"
    if len(dims) != len(shape):
        raise UsageError(problem, hint=f"give {len(dims)} sizes, the batch axis included")
    for size, dim in zip(shape, dims, strict=True):
        if isinstance(dim, int) and dim > 0 and dim != size:
            raise UsageError(problem, hint="only sizes shown as ? or by a name are open")
        if isinstance(dim, str) and sizes.setdefault(dim, size) != size:
            raise UsageError(
                f"the dimension {dim} cannot be {sizes[dim]} and {size} at once",
                hint=f"give every input with {dim} the same size there",
            )


def _text(dims: Sequence[int | str | None] | None) -> str:
    if dims is None:
        return "any shape"
    if not dims:
        return "a single number"
    return "x".join(str(size) if size else "?" for size in dims)
