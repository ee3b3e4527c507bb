"""`spectool check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from spectool.cli import options as opt
from spectool.cli.output import choose_target, deliver
from spectool.cli.parsing import (
    check_numbers,
    check_source,
    parse_arguments,
    parse_inputs,
    parse_shard,
    split_list,
)
from spectool.cli.progress import LiveProgress
from spectool.cli.reading import parse_limits
from spectool.cli.verdicts import conclude_check, draw_check, refuse_overwriting
from spectool.report.check_ci import CHECK_FORMATS, CHECK_SUFFIXES
from spectool.report.check_tables import CHECK_COLUMNS, check_layout
from spectool.report.layout import WriteOptions, check_columns
from spectool.report.table import split_columns

EXAMPLES = """
spectool check net.onnx --max 1.05
spectool check net.pt --input 1x3x32x32 --max 1.0 --max 'layer4.*=0.8' --slack 1%
spectool check net.onnx --max 1.05 --format junit -o check.xml
spectool check net.onnx --baseline old.json --tolerance 2%
"""


def check(
    file: opt.File,
    limits: opt.Limits = None,
    slack: Annotated[
        str,
        opt.option(
            opt.COMPUTE,
            "--slack",
            metavar="X",
            help="Relative amount by which limits may be exceeded, 1% or 0.01.",
            show_default=True,
        ),
    ] = "0",
    accept_probabilistic: Annotated[
        bool,
        opt.option(
            opt.COMPUTE,
            "--accept-probabilistic",
            help="Take an upper bound that fails with probability 1e-9 for proof.",
        ),
    ] = False,
    baseline: Annotated[
        Path | None,
        opt.option(
            opt.COMPUTE,
            "--baseline",
            metavar="FILE",
            help="JSON result of an earlier inspect or check to compare with.",
        ),
    ] = None,
    tolerance: Annotated[
        str,
        opt.option(
            opt.COMPUTE,
            "--tolerance",
            metavar="X",
            help="Relative growth over the baseline that is no regression.",
            show_default=True,
        ),
    ] = "1%",
    inputs: opt.Inputs = None,
    arch: opt.Arch = None,
    arch_args: opt.ArchArgs = None,
    no_recognise: opt.NoRecognise = False,
    trust: opt.Trust = False,
    method: opt.Method = opt.MethodName.auto,
    tol: opt.Tol = 1e-5,
    max_matvecs: opt.MaxMatvecs = None,
    seed: opt.Seed = 0,
    device: opt.Device = "auto",
    dtype: opt.Dtype = None,
    hash: opt.Hash = False,
    level: opt.Level = opt.LevelName.composed,
    layers: opt.Layers = None,
    exclude: opt.Exclude = None,
    kinds: opt.Kinds = None,
    assume_bn: opt.AssumeBn = False,
    key: opt.Key = None,
    shard: opt.Shard = None,
    max_tensor_bytes: opt.MaxTensorBytes = None,
    limit: opt.ReadLimits = None,
    format: opt.CheckFormat = None,
    output: opt.Output = None,
    columns: opt.Columns = None,
    sort: opt.Sort = None,
    no_guard: opt.NoGuard = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    no_progress: opt.NoProgress = False,
    strict: opt.Strict = False,
    debug: opt.Debug = False,
) -> int:
    """Prove that the largest singular value of every operator is within a limit."""
    target = choose_target(output, format, file, quiet=quiet, more=CHECK_SUFFIXES)
    refuse_overwriting(target, baseline)
    layout = WriteOptions(split_columns(columns or ""), sort or "", guard=not no_guard)
    check_columns(CHECK_COLUMNS, layout, target.format)
    check_numbers(1, tol, max_matvecs)
    shapes, part, arguments = parse_inputs(inputs or ()), parse_shard(shard), parse_arguments(arch_args)
    from spectool.api.limits import parse_bounds, parse_fraction

    bounds = parse_bounds(limits or ())
    share, growth = parse_fraction(slack, "--slack"), parse_fraction(tolerance, "--tolerance")
    reading = parse_limits(max_tensor_bytes, limit or ())
    check_source(file)
    with LiveProgress(enabled=not (quiet or no_progress)) as progress:
        # Imports torch, which takes seconds: only once the arguments are known to make sense.
        from spectool.api import check as judge

        report = judge(
            file, bounds, slack=share, accept_probabilistic=accept_probabilistic, baseline=baseline, tolerance=growth,
            input_shape=shapes, method=method.value, tol=tol, max_matvecs=max_matvecs, seed=seed, device=device,
            dtype=dtype, level=level.value, layers=tuple(layers or ()), exclude=tuple(exclude or ()),
            kinds=split_list(kinds or ()), assume_bn=assume_bn, key=key, arch=arch, arch_args=arguments,
            recognise=not no_recognise, trust=trust, shard=part, hash=hash, limits=reading, progress=progress,
        )  # fmt: skip
    writers = {name: lambda write=write: write(report) for name, write in CHECK_FORMATS.items()}
    deliver(
        check_layout(report, layout),
        target,
        layout,
        lambda width: draw_check(report, layout, width, verbose),
        writers,
    )
    conclude_check(report, target, verbose=verbose)
    return report.exit_code(strict=strict)
