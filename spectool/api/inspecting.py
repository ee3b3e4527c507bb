"""The main job: from a file, a module or a function to certified singular values."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from spectool import __version__
from spectool.api.devices import choose_device, choose_dtype
from spectool.api.operators import function_map
from spectool.api.rows import Options, Tightening, analysed_row, fill, listed_row
from spectool.api.selecting import select
from spectool.api.sources import InputShapes, Ways, find, named_shapes
from spectool.checkpoint import sha256_of
from spectool.errors import NothingToAnalyse, UsageError
from spectool.graph import Region, Survey
from spectool.progress import Progress, Step, silent
from spectool.report.row import Report, Row
from spectool.spectrum import svds
from spectool.spectrum.types import Method

Source = str | Path | torch.nn.Module | Callable[[torch.Tensor], torch.Tensor]

_CACHE_BYTES = 64 << 20


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
    progress: Progress = silent,
) -> Report:
    """Find every implicitly linear operator and enclose its largest singular values.

    Nothing in a file is ever run to read it. Weights are read one operator at a time.

    Args:
        source: A checkpoint file or directory, a live module, or a function that is affine on ``(b, *in_shape)``.
        k: How many singular values per operator; clamped to the operator's smaller side.
        input_shape: Shape of the model's input with its batch axis, or a mapping from input name to shape. For a
            function it is the shape of one input without the batch axis.
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
    settings = {
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(options)},
        "device": str(options.device),
        "dtype": str(options.dtype).removeprefix("torch."),
        "input_shape": {n: list(shape) for n, shape in (named_shapes(input_shape) or {}).items()} or None,
        "level": level,
        "layers": list(layers),
        "exclude": list(exclude),
        "kinds": list(kinds),
        "assume_bn": assume_bn,
        "key": key,
        "arch": arch,
        "arch_args": dict(arch_args) if arch_args else None,
        "recognise": recognise,
        "trust": trust,
        "shard": list(shard) if shard else None,
    }
    if not isinstance(source, (str, Path, torch.nn.Module)):
        return _inspect_function(source, input_shape, options, settings, progress)
    progress(Step("finding operators"))
    found = find(source, Ways(assume_bn, key, arch, arch_args, recognise, trust), input_shape)
    items = found.survey.items
    name = found.path or type(source).__name__
    if not any(isinstance(item, Region) or item.operators for item in items):
        raise NothingToAnalyse(
            f"{name} holds no linear operator",
            hint=f"`spectool ls {name}` lists what it holds" if found.path else "",
        )
    chosen = select(items, level=level, layers=layers, exclude=exclude, kinds=kinds, shard=shard)
    if not chosen and shard is None:
        raise NothingToAnalyse(
            f"the filters leave none of the {len(items)} rows of {name}",
            hint="`spectool inspect --list` shows the keys, levels and kinds",
        )
    load = _cached(found.survey)
    rows: list[Row] = []
    tightening = Tightening()
    for index, item in enumerate(chosen):
        if list_only:
            rows.append(listed_row(item))
            continue
        report_step = _numbered(progress, item.key, index, len(chosen))
        report_step(Step(item.key))
        rows.append(tightening.note(item, analysed_row(item, load, options, report_step)))
    return Report(
        rows=tuple(rows),
        path=found.path,
        format=found.format,
        sha256=sha256_of(Path(found.path)) if hash and found.path else None,
        settings=settings,
        version=__version__,
        notes=found.notes,
    )


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
        progress=_numbered(progress, name, 0, 1),
    )
    row = Row(name, "layer", "region", (), (), input_shape=shape, output_shape=operator.out_shape)
    return Report((fill(row, spectrum),), None, None, None, settings, __version__)


def _cached(found: Survey) -> Callable[[str], torch.Tensor]:
    """Return the survey's loader, remembering the small tensors it gave last."""
    kept: OrderedDict[str, torch.Tensor] = OrderedDict()

    def load(name: str) -> torch.Tensor:
        if name in kept:
            kept.move_to_end(name)
            return kept[name]
        tensor = found.load(name)
        if tensor.nbytes <= _CACHE_BYTES // 4:
            kept[name] = tensor
            while sum(held.nbytes for held in kept.values()) > _CACHE_BYTES:
                kept.popitem(last=False)
        return tensor

    return load


def _numbered(progress: Progress, key: str, index: int, total: int) -> Progress:
    def report(step: Step) -> None:
        progress(dataclasses.replace(step, task=key, index=index, total=total))

    return report
