"""`spectool inspect`."""

from __future__ import annotations

from typing import Annotated

from spectool.cli import options as opt
from spectool.cli.conclusion import conclude, draw_report
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
from spectool.report.layout import WriteOptions, check_options, report_layout
from spectool.report.table import split_columns

EXAMPLES = """
spectool inspect net.onnx
spectool inspect net.pt --input 1x3x224x224 -k 3
spectool inspect net.safetensors -o net.xlsx
spectool inspect net.onnx --sort -sigma_1 --format csv | head
"""


def inspect(
    file: opt.File,
    top_k: opt.TopK = 8,
    inputs: opt.Inputs = None,
    arch: opt.Arch = None,
    arch_args: opt.ArchArgs = None,
    no_recognise: opt.NoRecognise = False,
    trust: opt.Trust = False,
    method: opt.Method = opt.MethodName.auto,
    tol: opt.Tol = 1e-5,
    max_matvecs: opt.MaxMatvecs = None,
    certify: opt.Certify = False,
    seed: opt.Seed = 0,
    device: opt.Device = "auto",
    dtype: opt.Dtype = None,
    hash: opt.Hash = False,
    list_only: Annotated[
        bool,
        opt.option(opt.SELECT, "--list", help="List the operators and their geometry only; compute nothing."),
    ] = False,
    level: opt.Level = opt.LevelName.both,
    layers: opt.Layers = None,
    exclude: opt.Exclude = None,
    kinds: opt.Kinds = None,
    assume_bn: opt.AssumeBn = False,
    key: opt.Key = None,
    shard: opt.Shard = None,
    max_tensor_bytes: opt.MaxTensorBytes = None,
    limit: opt.ReadLimits = None,
    format: opt.Format = None,
    output: opt.Output = None,
    columns: opt.Columns = None,
    sort: opt.Sort = None,
    tidy: opt.Tidy = False,
    no_guard: opt.NoGuard = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    no_progress: opt.NoProgress = False,
    strict: opt.Strict = False,
    debug: opt.Debug = False,
) -> int:
    """Enclose the singular values of every linear operator."""
    target = choose_target(output, format, file, quiet=quiet)
    layout = WriteOptions(split_columns(columns or ""), sort or "", tidy, not no_guard)
    check_options(layout, target.format, top_k)
    check_numbers(top_k, tol, max_matvecs)
    shapes, part, arguments = parse_inputs(inputs or ()), parse_shard(shard), parse_arguments(arch_args)
    reading = parse_limits(max_tensor_bytes, limit or ())
    check_source(file)
    with LiveProgress(enabled=not (quiet or no_progress)) as progress:
        # Imports torch, which takes seconds: only once the arguments are known to make sense.
        from spectool.api import inspect as analyse

        report = analyse(
            file, k=top_k, input_shape=shapes, method=method.value, tol=tol, max_matvecs=max_matvecs, certify=certify,
            seed=seed, device=device, dtype=dtype, level=level.value, layers=tuple(layers or ()),
            exclude=tuple(exclude or ()), kinds=split_list(kinds or ()), assume_bn=assume_bn, key=key,
            arch=arch, arch_args=arguments, recognise=not no_recognise, trust=trust, list_only=list_only,
            shard=part, hash=hash, limits=reading, progress=progress,
        )  # fmt: skip
    deliver(report_layout(report, layout), target, layout, lambda width: draw_report(report, layout, width))
    conclude(report, target, verbose=verbose, listed=list_only)
    return 5 if strict and report.coverage[2] else 0
