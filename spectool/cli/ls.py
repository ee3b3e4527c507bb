"""`spectool ls`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spectool.cli import options as opt
from spectool.cli.messages import say
from spectool.cli.numbers import readable_bytes
from spectool.cli.output import TABLE, choose_target, deliver
from spectool.cli.parsing import check_source
from spectool.cli.reading import parse_limits
from spectool.report.layout import Layout, WriteOptions, check_columns
from spectool.report.listing import LISTING_COLUMNS, listing_layout, tensor_bytes
from spectool.report.table import split_columns

if TYPE_CHECKING:
    from rich.console import RenderableType

    from spectool.checkpoint.types import Checkpoint

EXAMPLES = """
spectool ls net.pt
spectool ls net.safetensors --sort -bytes
spectool ls net.onnx --format json
"""


def ls(
    file: opt.File,
    key: opt.Key = None,
    max_tensor_bytes: opt.MaxTensorBytes = None,
    limit: opt.ReadLimits = None,
    format: opt.Format = None,
    output: opt.Output = None,
    columns: opt.Columns = None,
    sort: opt.Sort = None,
    no_guard: opt.NoGuard = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> int:
    """List the tensors of a checkpoint, from its headers alone."""
    from spectool import __version__

    # The call that `spectool.ls` is; `spectool.api` would import torch.
    from spectool.checkpoint import open_checkpoint

    target = choose_target(output, format, file, quiet=quiet)
    options = WriteOptions(split_columns(columns or ""), sort or "", guard=not no_guard)
    check_columns(LISTING_COLUMNS, options, target.format)
    limits = parse_limits(max_tensor_bytes, limit or ())
    check_source(file)
    checkpoint = open_checkpoint(file, key=key, limits=limits)
    layout = listing_layout(checkpoint, __version__, options)

    deliver(layout, target, options, lambda width: _draw(layout, width))
    if not quiet:
        for note in checkpoint.notes:
            say(note, label="note")
        if target.format == TABLE and target.path is None:
            say(f"singular values: spectool inspect {file}", label="hint")
        say(summary(checkpoint))
    return 0


def summary(checkpoint: Checkpoint) -> str:
    """Return how much a checkpoint holds; tied tensors count once."""
    own = [ref for ref in checkpoint.tensors.values() if ref.name not in checkpoint.aliases]
    count = len(checkpoint.tensors)
    tensors = "1 tensor" if count == 1 else f"{count} tensors"
    values = sum(ref.numel for ref in own)
    size = readable_bytes(sum(map(tensor_bytes, own)))
    unread = f", {len(checkpoint.unread)} more cannot be read" if checkpoint.unread else ""
    return f"{tensors}, {values} values, {size}, {checkpoint.format}{unread}"


def _draw(layout: Layout, width: int | None) -> tuple[RenderableType, list[str]]:
    from spectool.cli.cells import cells_grid

    table = layout.table
    if not layout.columns and all(row[-1] is None for row in table.rows):
        table = table.pick(table.names[:-1])  # nobody needs a column of nothing
    return cells_grid(table, width)
