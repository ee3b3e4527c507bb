"""How much work one verdict takes: a bound, else a solve, else all singular values where they are affordable."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch

from spectool.api.rows import Load, Options, analysed_row, listed_row
from spectool.errors import OperatorError
from spectool.graph.types import Region, Skipped
from spectool.linear import InfiniteConv, exact_arithmetic, fold, frobenius
from spectool.lower import lower
from spectool.progress import Progress, silent
from spectool.report.check import CheckRow
from spectool.report.row import Row
from spectool.spectrum.arguments import check_finite, moderate
from spectool.spectrum.bounds import cost, deterministic
from spectool.spectrum.dense import on_host
from spectool.spectrum.exact import closed_form
from spectool.spectrum.intervals import work
from spectool.spectrum.stencil import convolution_of

_SIDE = 2048
_ENTRIES = 1 << 25  # of the dense matrix: 256 MB in float64
_WORTH = (
    100.0  # applications whose flops a bound may cost: its own count fourfold, and iterating takes some 400
)


def settle(
    item: Region | Skipped,
    load: Load,
    options: Options,
    verdict: Callable[[Row], CheckRow],
    progress: Progress,
) -> CheckRow:
    """Return the verdict on an operator, with as little work as it takes.

    1. For a large convolution the bound by its symbol, where that costs less than iterating (which takes some 400
       applications). If it proves the verdict, σ₁ itself is not computed and the row holds an upper end only.
    2. The solve of ``inspect(k=1, certify=True)``.
    3. If its interval decides nothing, as the bounds by the symbol or by chance may lie a per cent too high, and the
       operator is small (a side of at most 2048), a dense factorisation, which tells σ₁ to the last digits.

    Args:
        item: A region, or a skip.
        load: Reads a constant by name.
        options: What shapes the numbers.
        verdict: Judges a row.
        progress: Receives steps.
    """
    row = _bounded_row(item, load, options)
    if row is not None:
        quick = verdict(row)
        if quick.verdict == "proven":
            return quick
    first = verdict(analysed_row(item, load, options, progress))
    if first.verdict != "undecided":
        return first
    refined = refined_row(item, load, options, first.row, progress)
    return first if refined is None else verdict(refined)


def refined_row(
    item: Region | Skipped, load: Load, options: Options, row: Row, progress: Progress = silent
) -> Row | None:
    """Return the row of a small operator by a dense factorisation, exact to the last digits.

    Args:
        item: The operator.
        load: Reads a constant by name.
        options: What shaped the numbers of ``row``.
        row: Its row so far, whose interval is too wide.
        progress: Receives steps.

    Returns:
        The row; None where it is exact already or too large (a side above 2048).
    """
    if isinstance(item, Skipped) or not _dense_helps(row, options):
        return None
    dense = analysed_row(item, load, replace(options, method="exact"), progress)
    if dense.status != "ok":
        return None
    spent = [(row.seconds or 0.0) + (dense.seconds or 0.0), (row.matvecs or 0) + (dense.matvecs or 0)]
    return replace(dense, seconds=spent[0], matvecs=int(spent[1]))


def level_of(item: Region | Skipped) -> Literal["layer", "composed"]:
    """Return the level of an item's row."""
    return item.level if isinstance(item, Region) else "layer"


def _bounded_row(item: Region | Skipped, load: Load, options: Options) -> Row | None:
    """Return a row with a proven upper end alone; None where there is none or a solve hardly costs more."""
    if (
        options.method != "auto"
        or isinstance(item, Skipped)
        or item.in_shape is None
        or item.out_shape is None
    ):
        return None
    if min(math.prod(item.in_shape), math.prod(item.out_shape)) <= _SIDE:
        return None
    start = time.perf_counter()
    try:
        with exact_arithmetic(), torch.no_grad():
            operator = lower(item, load, dtype=options.dtype, device=options.device)
            conv = None if isinstance(operator, InfiniteConv) else convolution_of(fold(operator))
            if isinstance(operator, InfiniteConv) or conv is None or conv.geometry.padding_mode == "circular":
                return None
            check_finite(operator)
            A, factor = moderate(fold(operator))
            # Where a theorem gives σ₁ itself, the solve is as quick as a bound and says more.
            theorem = closed_form(on_host(A), 1) is not None
            bound = None if theorem or cost(A) > _WORTH * work(A) else deterministic(on_host(A), 1)
            fro = frobenius(A)
    except OperatorError:
        # Its row says why.
        return None
    if bound is None:
        return None
    return replace(
        listed_row(item),
        sigma_upper=(float(bound.upper[0]) * factor,),
        upper_kind=bound.kind,
        fro=None if fro is None or not math.isfinite(fro * factor) else fro * factor,
        method="bound",
        matvecs=0,
        seconds=time.perf_counter() - start,
        why="its upper bound alone proves it",
    )


def _dense_helps(row: Row, options: Options) -> bool:
    if options.method != "auto" or row.status != "ok" or row.upper_kind == "exact":
        return False
    if row.input_shape is None or row.output_shape is None:
        return False
    m, n = math.prod(row.output_shape), math.prod(row.input_shape)
    return min(m, n) <= _SIDE and m * n <= _ENTRIES
