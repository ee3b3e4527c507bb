"""From one region to one row."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from spectool.errors import OperatorError
from spectool.graph.types import BatchNorm, Region, Skipped
from spectool.linear import InfiniteConv, MatrixMap
from spectool.linear.scaling import count_not_finite
from spectool.lower import chain_parts, lower, without_epsilon
from spectool.progress import Progress, Step, silent
from spectool.report.row import Row, parts_text
from spectool.spectrum import Spectrum, supremum, svds
from spectool.spectrum.types import Method

Load = Callable[[str], torch.Tensor]

_SMALL = 1 << 16  # entries of an input, an output or a weight


@dataclass(frozen=True)
class Options:
    """Everything that shapes the numbers of a row.

    Attributes:
        k: How many singular values.
        method: Solver.
        tol: Relative residual to reach.
        max_matvecs: Cap on operator applications; None for the solver's own.
        certify: Whether to add deterministic bounds wherever one exists.
        seed: Seed of the start vectors.
        device: Where to compute.
        dtype: Arithmetic type.
    """

    k: int = 8
    method: Method = "auto"
    tol: float = 1e-5
    max_matvecs: int | None = None
    certify: bool = False
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32


def listed_row(item: Region | Skipped) -> Row:
    """Return the row of an item with its geometry and reasons, nothing computed."""
    shapes = item.weight_shapes
    composed = isinstance(item, Region) and item.level == "composed"
    row = Row(
        layer=item.key,
        level="composed" if composed else "layer",
        kind=item.kind,
        weights=item.weights,
        # A single operator has one shape, that of its matrix or kernel, whatever else it is stored with.
        weight_shape=shapes if composed else max(shapes, key=math.prod, default=()),
        operators=item.operators,
    )
    if isinstance(item, Skipped):
        return replace(row, status=item.status, note=item.reason)
    return replace(
        row,
        input_shape=item.in_shape,
        output_shape=item.out_shape,
        assumed=item.assumed,
        maximal=item.maximal,
        note=item.note,
    )


def analysed_row(item: Region | Skipped, load: Load, options: Options, progress: Progress = silent) -> Row:
    """Return the row of an item with its spectrum.

    An operator that cannot be built is a ``skipped`` row, one whose weights are not finite or whose solver broke
    down a ``failed`` one; both say why.

    Args:
        item: A region, or a skip, which is passed on.
        load: Reads a constant by name.
        options: What shapes the numbers.
        progress: Receives steps.
    """
    row = listed_row(item)
    if isinstance(item, Skipped):
        return row
    with _few_threads(item):
        return _solved_row(row, item, load, options, progress)


@contextmanager
def _few_threads(item: Region) -> Iterator[None]:
    """Let a small operator have one thread, and put the number back.

    Handing work over costs more than it saves: a composition on 8×16×16 took 9 s on two threads and 0.6 s on one.
    """
    before = torch.get_num_threads()
    sizes = (item.in_shape or (), item.out_shape or (), *item.weight_shapes)
    if max(math.prod(shape) for shape in sizes) <= _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _solved_row(row: Row, item: Region, load: Load, options: Options, progress: Progress) -> Row:
    start = time.perf_counter()
    try:
        bad = _not_finite(item, load)
        if bad:
            return replace(
                row, status="failed", note=_join(row.note, bad), seconds=time.perf_counter() - start
            )
        operator = lower(item, load, dtype=options.dtype, device=options.device)
    except OperatorError as error:
        reason = f"cannot be built: {error.in_full}"
        return replace(
            row, status="skipped", note=_join(row.note, reason), seconds=time.perf_counter() - start
        )
    try:
        if isinstance(operator, InfiniteConv):
            spectrum = supremum(operator, progress=progress)
        else:
            spectrum = svds(
                operator,
                options.k,
                method=options.method,
                tol=options.tol,
                max_matvecs=options.max_matvecs,
                certify=options.certify,
                seed=options.seed,
                progress=progress,
            )
    except OperatorError as error:
        return replace(
            row, status="failed", note=_join(row.note, str(error)), seconds=time.perf_counter() - start
        )
    if any(text.startswith("eps=") for text in item.assumed):
        spectrum = _any_epsilon(item, load, spectrum)
    # Without a size every value but the largest depends on it; a matrix has one size only.
    sized = item.in_shape is not None or isinstance(operator, MatrixMap)
    filled = fill(row, spectrum if sized else _largest(spectrum), not sized)
    return replace(filled, seconds=time.perf_counter() - start)


class Tightening:
    """Remembers σ₁ of single operators to say how much tighter the bound of a chain is than their product."""

    def __init__(self) -> None:
        self._single: dict[str, float] = {}

    def note(self, item: Region | Skipped, row: Row) -> Row:
        """Return the row, with the ratio in its note if it is a chain whose parts have all had rows."""
        if isinstance(item, Skipped) or not row.sigma:
            return row
        if len(item.nodes) == 1:
            self._single[item.nodes[0].outputs[0]] = row.sigma[0]
            return row
        parts = chain_parts(item)
        if parts is None or len(parts) < 2 or row.sigma[0] == 0:
            return row
        values = [self._single.get(node.outputs[0]) for node in parts]
        if any(value is None for value in values):
            return row
        ratio = math.prod(value for value in values if value is not None) / row.sigma[0]
        return replace(row, note=_join(row.note, parts_text(ratio)), looseness=ratio)


def fill(row: Row, spectrum: Spectrum, infinite: bool = False) -> Row:
    """Return the row with a spectrum's numbers; unknown becomes None."""
    sigma = spectrum.values
    fro = None if infinite else spectrum.fro
    stable = None
    if fro is not None and math.isfinite(fro) and sigma and sigma[0] > 0:
        stable = (fro / sigma[0]) ** 2
    return replace(
        row,
        sigma=sigma,
        sigma_lower=spectrum.lower,
        sigma_upper=tuple(upper if math.isfinite(upper) else None for upper in spectrum.upper),
        upper_kind=spectrum.upper_kind,
        residual=spectrum.residuals[0] if spectrum.residuals else None,
        multiplicity=None if infinite else spectrum.multiplicity,
        multiplicity_exact=None if infinite else spectrum.multiplicity_exact,
        converged=spectrum.converged,
        fro=fro if fro is not None and math.isfinite(fro) else None,
        stable_rank=stable,
        method=spectrum.method,
        matvecs=spectrum.matvecs,
        note=_join(row.note, spectrum.note),
        why=spectrum.why,
    )


def _largest(spectrum: Spectrum) -> Spectrum:
    return replace(spectrum, values=spectrum.values[:1], lower=spectrum.lower[:1], upper=spectrum.upper[:1])


def _any_epsilon(item: Region, load: Load, spectrum: Spectrum) -> Spectrum:
    """Widen the upper ends so that they hold for every eps ≥ 0 (a smaller eps gives a larger scale)."""
    bare = lower(without_epsilon(item), load, dtype=torch.float64)
    if isinstance(bare, InfiniteConv):
        top = supremum(bare)
    else:
        try:
            top = svds(bare, len(spectrum.values), method="exact")
        except OperatorError:
            # A running variance of zero: without eps nothing bounds the scale.
            return replace(spectrum, upper=(math.inf,) * len(spectrum.values), upper_kind="none")
    return replace(spectrum, upper=top.upper, upper_kind=top.upper_kind)


def _not_finite(item: Region, load: Load) -> str:
    """Return which tensor of the linear part holds NaN or infinity, and how many; empty if none does."""
    for name in _linear_tensors(item):
        tensor = load(name)
        bad = 0 if tensor.is_complex() else count_not_finite(tensor)
        if bad:
            return f"{name} holds {bad} NaN or infinite values of {tensor.numel()}"
    return ""


def _linear_tensors(item: Region) -> list[str]:
    names: dict[str, None] = {}
    for node in item.nodes:
        wanted: tuple[str, ...]
        if isinstance(node.op, BatchNorm):
            wanted = (node.inputs[1], node.inputs[4])
        else:
            flowing = {item.root, *(name for other in item.nodes for name in other.outputs)}
            wanted = tuple(name for name in node.inputs[:2] if name not in flowing)
        for name in wanted:
            if name:
                names[name] = None
    return list(names)


def _join(first: str, second: str) -> str:
    return f"{first}; {second}" if first and second else first or second


__all__ = ["Options", "Step", "analysed_row", "fill", "listed_row"]
