"""The tensors of a checkpoint as a table, from headers alone."""

from __future__ import annotations

import re
from collections.abc import Mapping

from spectool.checkpoint.types import Checkpoint, TensorRef
from spectool.report.document import SCHEMA
from spectool.report.layout import Layout, WriteOptions
from spectool.report.table import Cell, Column, Table
from spectool.report.text import shape_text

LISTING_COLUMNS = (
    Column("tensor"),
    Column("kind"),
    Column("dtype"),
    Column("shape", "shape"),
    Column("bytes", "integer"),
    Column("tied"),
    Column("note"),
)
_NOTES = (Column("note"),)
_BITS = re.compile(r"\d+")
_EMBEDDING = re.compile(r"(^|[._])(embed|embedding|embeddings|emb|wte|wpe|tok|token)", re.IGNORECASE)
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_GATES = {4: "lstm", 3: "gru", 1: "rnn"}


def listing_layout(checkpoint: Checkpoint, version: str, options: WriteOptions) -> Layout:
    """Return the tensors of a checkpoint, one row each, in file order; those that cannot be read come last.

    Of a tensor that cannot be read there is its name, and a note that says why.

    Args:
        checkpoint: An open checkpoint; none of its tensors is read.
        version: spectool's version.
        options: Columns and order.

    Raises:
        UsageError: If a column is asked for that there is not.
    """
    shapes: list[list[int] | None] = [list(ref.shape) for ref in checkpoint.tensors.values()]
    rows: list[tuple[Cell, ...]] = [
        (ref.name, guess_kind(ref, checkpoint.tensors), ref.dtype, shape_text(ref.shape), tensor_bytes(ref),
         checkpoint.aliases.get(ref.name), None)
        for ref in checkpoint.tensors.values()
    ]  # fmt: skip
    for name, reason in checkpoint.unread.items():
        shapes.append(None)
        rows.append((name, None, None, None, None, None, f"cannot be read: {reason}"))
    table = Table(LISTING_COLUMNS, tuple(rows))
    order = table.order(options.sort) if options.sort else list(range(len(rows)))
    table = table.take(order)
    names = table.names
    records = tuple(
        dict(zip(names, row, strict=True)) | {"shape": shapes[place]}
        for row, place in zip(table.rows, order, strict=True)
    )
    if options.columns:
        table = table.pick(options.columns)
    sheets = {"tensors": table}
    if checkpoint.notes:
        sheets["notes"] = Table(_NOTES, tuple((note,) for note in checkpoint.notes))
    return Layout(
        table=table,
        sheets=sheets,
        head={
            "schema": SCHEMA,
            "spectool": version,
            "file": {"path": str(checkpoint.path), "format": checkpoint.format},
            "notes": list(checkpoint.notes),
        },
        records=records,
        member="tensors",
        columns=options.columns,
    )


def tensor_bytes(ref: TensorRef) -> int:
    """Return the bytes of the tensor's own elements, which may be fewer than its storage's."""
    if ref.dtype == "bool":
        return ref.numel
    bits = _BITS.search(ref.dtype)
    return ref.numel * int(bits[0]) // 8 if bits else ref.nbytes


def guess_kind(ref: TensorRef, tensors: Mapping[str, TensorRef]) -> str | None:
    """Return what a tensor most likely is, by its name and shape; None where nothing suggests itself.

    Args:
        ref: The tensor.
        tensors: All tensors of the file: a norm shows by the running statistics beside it.
    """
    parent, _, own = ref.name.rpartition(".")
    lowered = ref.name.lower()
    if own in _STATISTICS or f"{parent}.running_var" in tensors:
        return "batchnorm"
    if not ref.dtype.startswith(("float", "bfloat")) or "bias" in own:
        return None
    if len(ref.shape) <= 1:
        if "norm" in lowered or re.search(r"(^|[._])ln[._\d]", lowered):
            return "rmsnorm" if "rms" in lowered else "layernorm"
        return None
    if "lora" in lowered or re.split("[.:]", own)[-1] in ("up", "down"):
        return "lora"
    if re.match(r"weight_[ih]h_l\d", own):
        hidden = tensors.get(
            f"{parent}.{own.replace('_ih_', '_hh_')}" if parent else own.replace("_ih_", "_hh_")
        )
        if hidden is None or len(hidden.shape) != 2 or hidden.shape[1] == 0:
            return "rnn"
        return _GATES.get(hidden.shape[0] // hidden.shape[1])
    if len(ref.shape) == 2:
        return "embedding" if _EMBEDDING.search(ref.name) else "linear"
    return f"conv{len(ref.shape) - 2}d" if len(ref.shape) <= 5 else None
