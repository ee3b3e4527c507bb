"""`spectool ls`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectool.cli import options as opt
from spectool.cli.messages import say
from spectool.cli.numbers import readable_bytes
from spectool.cli.output import choose_target, deliver
from spectool.cli.parsing import check_source
from spectool.report.layout import WriteOptions, check_columns
from spectool.report.listing import LISTING_COLUMNS, listing_layout, tensor_bytes
from spectool.report.table import split_columns

EXAMPLES = """
spectool ls net.pt
spectool ls net.safetensors --sort -bytes
spectool ls net.onnx --format json
"""


def ls(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Checkpoint: .pt .pth .safetensors .onnx, or a folder.")
    ],
    key: opt.Key = None,
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
    from spectool.api.listing import ls as read

    target = choose_target(output, format, file, quiet=quiet)
    options = WriteOptions(split_columns(columns or ""), sort or "", guard=not no_guard)
    check_columns(LISTING_COLUMNS, options, target.format)
    check_source(file)
    checkpoint = read(file, key=key)
    layout = listing_layout(checkpoint, __version__, options)

    def draw(width: int | None):  # type: ignore[no-untyped-def]
        from spectool.cli.cells import cells_grid

        return cells_grid(layout.table, width)

    deliver(layout, target, options, draw)
    if not quiet:
        refs = checkpoint.tensors.values()
        size = sum(tensor_bytes(ref) for ref in refs if ref.name not in checkpoint.aliases)
        for note in checkpoint.notes:
            say(note, label="note")
        say(
            f"{len(refs)} tensors, {sum(ref.numel for ref in refs)} values, {readable_bytes(size)}, {checkpoint.format}"
        )
    return 0
