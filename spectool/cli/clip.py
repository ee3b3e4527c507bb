"""`spectool clip`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from spectool.cli import options as opt
from spectool.cli.clip_target import choose_checkpoint, choose_recentering, spare_inputs, warn_of_suffix
from spectool.cli.clipped import conclude_clip, written_line
from spectool.cli.messages import say
from spectool.cli.output import choose_target, deliver
from spectool.cli.parsing import check_numbers, check_source, parse_arguments, parse_inputs, split_list
from spectool.cli.progress import LiveProgress
from spectool.cli.reading import parse_limits
from spectool.errors import OutputError, UsageError
from spectool.report.clip_tables import clip_columns, clip_layout
from spectool.report.layout import WriteOptions, check_columns
from spectool.report.table import split_columns

if TYPE_CHECKING:
    from rich.console import RenderableType

EXAMPLES = """
spectool clip net.onnx --max 1.0 -o net.clipped.onnx
spectool clip net.pt --input 1x3x32x32 --max 1.0 --max 'layer4.*=0.8' --prove -o net.clipped.pt
spectool clip net.safetensors --max 2.0 --dry-run
spectool clip net.onnx --max 1.0 -o net.clipped.onnx --report net.clipped.csv
"""


def clip(
    file: opt.File,
    limits: opt.Limits = None,
    prove: Annotated[
        bool,
        opt.option(opt.COMPUTE, "--prove", help="Go on until the proven bound, not only σ₁, is within."),
    ] = False,
    exact: Annotated[
        bool,
        opt.option(
            opt.COMPUTE,
            "--min-change",
            "--exact",
            help="Go on to within a per cent of the least possible change, whatever it takes.",
        ),
    ] = False,
    all_sizes: Annotated[
        bool,
        opt.option(opt.COMPUTE, "--all-sizes", help="Bound convolutions for every size of their input."),
    ] = False,
    no_recenter: Annotated[
        bool, opt.option(opt.COMPUTE, "--no-recenter", help="Leave running means and biases alone.")
    ] = False,
    recenter: Annotated[
        opt.RecenterName,
        opt.option(
            opt.COMPUTE,
            "--recenter",
            metavar="NAME",
            help="What follows the weights so that means stay: auto (running means), bias (biases too) or none.",
            show_default=True,
        ),
    ] = opt.RecenterName.auto,
    calibrate: Annotated[
        Path | None,
        opt.option(
            opt.COMPUTE,
            "--calibrate",
            metavar="FILE",
            help="Inputs of the model (.npz, .pt) to match means on; needs a program that may run.",
        ),
    ] = None,
    top_k: opt.TopK = 8,
    inputs: opt.Inputs = None,
    arch: opt.Arch = None,
    arch_args: opt.ArchArgs = None,
    no_recognise: opt.NoRecognise = False,
    trust: opt.Trust = False,
    method: opt.ClipMethod = opt.ClipMethodName.auto,
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
    max_tensor_bytes: opt.MaxTensorBytes = None,
    limit: opt.ReadLimits = None,
    output: opt.Output = None,
    in_place: Annotated[
        bool, opt.option(opt.OUTPUT, "--in-place", help="Replace FILE itself; only with --force.")
    ] = False,
    force: Annotated[bool, opt.option(opt.OUTPUT, "--force", help="Replace what is there.")] = False,
    dry_run: Annotated[
        bool, opt.option(opt.OUTPUT, "-n", "--dry-run", help="Compute everything, write no checkpoint.")
    ] = False,
    result: Annotated[
        str | None,
        opt.option(
            opt.OUTPUT, "--report", metavar="FILE", help="Write the result (not the checkpoint) to FILE."
        ),
    ] = None,
    format: opt.Format = None,
    columns: opt.Columns = None,
    sort: opt.Sort = None,
    no_guard: opt.NoGuard = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    no_progress: opt.NoProgress = False,
    strict: opt.Strict = False,
    debug: opt.Debug = False,
) -> int:
    """Write the nearest checkpoint in which the largest singular value of every operator is within a limit."""
    target = choose_target(result, format, file, quiet=quiet, flag="--report")
    layout = WriteOptions(split_columns(columns or ""), sort or "", guard=not no_guard)
    check_numbers(top_k, tol, max_matvecs)
    check_columns(clip_columns(top_k), layout, target.format)
    shapes, arguments = parse_inputs(inputs or ()), parse_arguments(arch_args)
    means = choose_recentering(recenter.value, no_recenter)
    from spectool.api.limits import parse_bounds

    bounds = parse_bounds(limits or ())
    if not bounds:
        raise UsageError("there is no limit to clip to", hint="give one, e.g. --max 1.0")
    reading = parse_limits(max_tensor_bytes, limit or ())
    check_source(file)
    out = choose_checkpoint(file, output, in_place=in_place, force=force, dry_run=dry_run, quiet=quiet)
    spare_inputs(file, out, target.path, calibrate)
    with LiveProgress(enabled=not (quiet or no_progress)) as progress:
        # Imports torch, which takes seconds: only once the arguments are known to make sense.
        from spectool.api import clip as project

        report = project(
            file, max=bounds, out=out, force=force, dry_run=dry_run, prove=prove, exact=exact, all_sizes=all_sizes,
            method=method.value, k=top_k, input_shape=shapes, tol=tol, max_matvecs=max_matvecs, seed=seed,
            device=device, dtype=dtype, level=level.value, layers=tuple(layers or ()), exclude=tuple(exclude or ()),
            kinds=split_list(kinds or ()), assume_bn=assume_bn, key=key, arch=arch, arch_args=arguments,
            recognise=not no_recognise, trust=trust, hash=hash, recenter=means, calibrate=calibrate,
            limits=reading, progress=progress,
        )  # fmt: skip

    def draw(width: int | None) -> tuple[RenderableType, list[str]]:
        from spectool.cli.clip_table import draw_clip  # Rich, for a table only

        return draw_clip(report, layout, width, verbose)

    try:
        deliver(clip_layout(report, layout), target, layout, draw)
    except OutputError:
        say(written_line(report))  # whatever became of its description, the checkpoint is there
        raise
    if out is not None and not quiet:
        warn_of_suffix(file, out)
    conclude_clip(report, target, verbose=verbose)
    return report.exit_code(strict=strict)
