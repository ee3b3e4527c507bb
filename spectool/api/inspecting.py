"""The main job: from a file, a module or a function to certified singular values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from spectool import __version__
from spectool.api.devices import choose_device, choose_dtype
from spectool.api.job import Selection, numbered, open_job, report_of, settings_of
from spectool.api.operators import function_map
from spectool.api.rows import Options, Tightening, analysed_row, fill, listed_row
from spectool.api.sources import InputShapes, Ways
from spectool.checkpoint.limits import DEFAULT, Limits
from spectool.errors import UsageError
from spectool.progress import Progress, Step, silent
from spectool.report.row import Report, Row
from spectool.spectrum import svds
from spectool.spectrum.types import Method

Source = str | Path | torch.nn.Module | Callable[[torch.Tensor], torch.Tensor]


def inspect(
    source: Source,
    *,
    k: int = 8,
    input_shape: InputShapes | None = None,
    method: Method = "auto",
    tol: float = 1e-5,
    max_matvecs: int | None = None,
    certify: bool = False,
    seed: int = 0,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    level: str = "both",
    layers: Sequence[str] = (),
    exclude: Sequence[str] = (),
    kinds: Sequence[str] = (),
    assume_bn: bool = False,
    key: str | None = None,
    list_only: bool = False,
    arch: str | None = None,
    arch_args: Mapping[str, Any] | None = None,
    recognise: bool = True,
    trust: bool = False,
    shard: tuple[int, int] | None = None,
    hash: bool = False,
    limits: Limits = DEFAULT,
    progress: Progress = silent,
) -> Report:
    """Find every implicitly linear operator and enclose its largest singular values.

    Nothing in a file is ever run to read it. Weights are read one operator at a time.

    Args:
        source: A checkpoint file or directory, a live module, or a function that is affine on ``(b, *in_shape)``.
        k: How many singular values per operator; clamped to the operator's smaller side.
        input_shape: Shape of the model's input with its batch axis, or a mapping from input name to shape, or to a
            number for an input that is one. For a function it is the shape of one input without the batch axis.
        method: ``auto``, ``exact``, ``lanczos``, ``power`` or ``powerqr``.
        tol: Relative residual to reach.
        max_matvecs: Cap on operator applications per row.
        certify: Whether to add deterministic upper bounds wherever one exists.
        seed: Seed of the start vectors.
        device: ``auto``, ``cpu``, ``cuda[:i]`` or ``mps``.
        dtype: ``float32`` (default) or ``float64``, of the arithmetic.
        level: ``layer``, ``composed`` (maximal regions) or ``both``.
        layers: Globs of row keys to keep.
        exclude: Globs of row keys to drop.
        kinds: Kinds to keep.
        assume_bn: Whether to guess conv–batch-norm pairs where the file has no program.
        key: Which branch of a nested training checkpoint to take.
        arch: Architecture of a file without a program: ``torchvision:NAME``, ``timm:NAME`` or
            ``package.module:factory``.
        arch_args: Keyword arguments of the architecture's factory.
        recognise: Whether to look a bare state dict up among known architectures.
        trust: Whether the code of a pickled module may run to give exact operators.
        list_only: Whether to list operators and geometry only, nothing computed.
        shard: (i, n): analyse every n-th operator from the i-th.
        hash: Whether to hash the file.
        limits: What the file may ask for.
        progress: Receives steps.

    Returns:
        The report; skipped operators are rows with a reason.

    Raises:
        UsageError: If an argument cannot be used.
        CheckpointError: If the file cannot be read.
        NothingToAnalyse: If there is no operator, or the filters leave none.

    Example:
        >>> import spectool
        >>> report = spectool.inspect("sample_models/digits_mlp_state.pt", k=1)
        >>> row = report.rows[0]
        >>> row.lower <= row.sigma[0] <= row.upper
        True
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise UsageError(f"k is {k!r}; it counts singular values", hint="use k >= 1")
    options = Options(k, method, tol, max_matvecs, certify, seed, choose_device(device), choose_dtype(dtype))
    ways = Ways(assume_bn, key, arch, arch_args, recognise, trust, limits)
    selection = Selection(level, layers, exclude, kinds, shard)
    settings = settings_of(options, ways, selection, input_shape)
    if not isinstance(source, (str, Path, torch.nn.Module)):
        return _inspect_function(source, input_shape, options, settings, progress)
    progress(Step("finding operators"))
    job = open_job(source, ways, selection, input_shape)
    rows: list[Row] = []
    tightening = Tightening()
    for index, item in enumerate(job.items):
        if list_only:
            rows.append(listed_row(item))
            continue
        report_step = numbered(progress, item.key, index, len(job.items))
        report_step(Step(item.key))
        rows.append(tightening.note(item, analysed_row(item, job.load, options, report_step)))
    return report_of(job.found, rows, settings, hash=hash)


def _inspect_function(
    source: Callable[[torch.Tensor], torch.Tensor],
    input_shape: InputShapes | None,
    options: Options,
    settings: dict[str, Any],
    progress: Progress,
) -> Report:
    """Analyse a function as a single row."""
    if not callable(source):
        raise UsageError(
            f"cannot inspect a {type(source).__name__}", hint="give a path, a module or a function"
        )
    if input_shape is None or isinstance(input_shape, Mapping):
        raise UsageError(
            "a function needs input_shape=", hint="e.g. input_shape=(3, 32, 32), without the batch axis"
        )
    name = getattr(source, "__name__", None) or type(source).__name__
    shape = tuple(input_shape)
    operator = function_map(source, shape, str(options.device), options.dtype)
    spectrum = svds(
        operator,
        options.k,
        method=options.method,
        tol=options.tol,
        max_matvecs=options.max_matvecs,
        certify=options.certify,
        seed=options.seed,
        progress=numbered(progress, name, 0, 1),
    )
    row = Row(name, "layer", "region", (), (), input_shape=shape, output_shape=operator.out_shape)
    return Report((fill(row, spectrum),), None, None, None, settings, __version__)
