"""Options that commands share: one name, one meaning, one help text."""

from __future__ import annotations

import secrets
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

COMPUTE = "What to compute"
SELECT = "Which operators"
READ = "What a file may ask for"
OUTPUT = "Output"
MESSAGES = "Messages"


class MethodName(StrEnum):
    """Solvers."""

    auto = "auto"
    exact = "exact"
    lanczos = "lanczos"
    power = "power"
    powerqr = "powerqr"


class ClipMethodName(StrEnum):
    """Ways to the nearest weights."""

    auto = "auto"
    svd = "svd"
    bundle = "bundle"
    symbol = "symbol"
    scale = "scale"
    fastclip = "fastclip"
    sedghi = "sedghi"


class RecenterName(StrEnum):
    """How means follow clipped weights."""

    auto = "auto"
    bias = "bias"
    none = "none"


class LevelName(StrEnum):
    """Which rows."""

    layer = "layer"
    composed = "composed"
    both = "both"


class DtypeName(StrEnum):
    """Arithmetic types."""

    float32 = "float32"
    float64 = "float64"


class FormatName(StrEnum):
    """Output formats."""

    table = "table"
    csv = "csv"
    tsv = "tsv"
    json = "json"
    jsonl = "jsonl"
    md = "md"
    xlsx = "xlsx"


class CheckFormatName(StrEnum):
    """Output formats of `check`."""

    table = "table"
    csv = "csv"
    tsv = "tsv"
    json = "json"
    jsonl = "jsonl"
    md = "md"
    xlsx = "xlsx"
    junit = "junit"
    github = "github"
    sarif = "sarif"


def _file(text: Any) -> Path:
    """Return a path; nothing, as an unset variable of a shell leaves it, is not the working directory."""
    if str(text) == "":
        raise typer.BadParameter("its name is empty")
    return Path(text)


def _seed(text: Any) -> int:
    """Return a seed: the number given, or one that nobody can know before."""
    if str(text) == "random":
        return secrets.randbits(62)
    try:
        return int(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is neither a whole number nor random") from error


def option(panel: str, *flags: str, help: str, metavar: str | None = None, **more: Any) -> Any:
    """Return an option that can also be set by SPECTOOL_<LONG NAME>."""
    longest = max(flags, key=len).lstrip("-").replace("-", "_").upper()
    return typer.Option(
        *flags,
        help=help,
        metavar=metavar,
        rich_help_panel=panel,
        show_envvar=False,
        envvar=f"SPECTOOL_{longest}",
        **more,
    )


File = Annotated[
    Path,
    typer.Argument(
        metavar="FILE", parser=_file, help="Checkpoint: .pt .pth .safetensors .onnx, or a folder."
    ),
]
TopK = Annotated[
    int,
    option(COMPUTE, "-k", "--top-k", metavar="N", help="Singular values per operator.", show_default=True),
]
Inputs = Annotated[
    list[str] | None,
    option(
        COMPUTE,
        "--input",
        metavar="SHAPE",
        help="Shape of the model's input with its batch axis, 1x3x224x224; repeatable as NAME=SHAPE, or NAME=NUMBER "
        "where the program takes a number.",
    ),
]
Method = Annotated[
    MethodName,
    option(
        COMPUTE,
        "--method",
        metavar="NAME",
        help="auto chooses for each operator. exact: all values, of small or structured ones. lanczos: the k largest "
        "of large ones. power, powerqr: slower, to compare with.",
        show_default=True,
    ),
]
ClipMethod = Annotated[
    ClipMethodName,
    option(
        COMPUTE,
        "--method",
        metavar="NAME",
        help="auto chooses for each operator. svd: matrices. bundle: any operator, few values above the limit. symbol: "
        "a lone convolution, many. scale, fastclip, sedghi: published ones, to compare with.",
        show_default=True,
    ),
]
Tol = Annotated[
    float, option(COMPUTE, "--tol", metavar="X", help="Relative residual to reach.", show_default=True)
]
MaxMatvecs = Annotated[
    int | None,
    option(
        COMPUTE, "--max-matvecs", metavar="N", help="Most operator applications per row, A and its adjoint."
    ),
]
Certify = Annotated[
    bool, option(COMPUTE, "--certify", help="Add a deterministic upper bound wherever there is one.")
]
Seed = Annotated[
    int,
    option(
        COMPUTE,
        "--seed",
        metavar="N|random",
        help="Seed of the start vectors; random: another one in every run, for files that may know this one.",
        show_default=True,
        parser=_seed,
    ),
]
Device = Annotated[
    str,
    option(COMPUTE, "--device", metavar="NAME", help="auto, cpu, cuda, cuda:1 or mps.", show_default=True),
]
Dtype = Annotated[
    DtypeName | None,
    option(COMPUTE, "--dtype", metavar="NAME", help="Arithmetic type, float32 (default) or float64."),
]
Arch = Annotated[
    str | None,
    option(
        COMPUTE,
        "--arch",
        metavar="NAME",
        help="Program of a file that has none: torchvision:resnet18, timm:NAME or package.module:factory.",
    ),
]
ArchArgs = Annotated[
    str | None,
    option(
        COMPUTE, "--arch-args", metavar="JSON", help='Arguments of its factory, e.g. {"num_classes": 10}.'
    ),
]
NoRecognise = Annotated[
    bool,
    option(COMPUTE, "--no-recognise", help="Do not look a bare state dict up among known architectures."),
]
Trust = Annotated[
    bool,
    option(
        COMPUTE, "--trust", help="Let the code of a pickled module run, for exact operators; off by default."
    ),
]
Hash = Annotated[bool, option(COMPUTE, "--hash", help="Put the file's SHA-256 into the result.")]

Limits = Annotated[
    list[str] | None,
    option(
        COMPUTE,
        "--max",
        metavar="[GLOB=]C",
        help="Limit on the largest singular value; repeatable, with a pattern of keys or weights: 'layer4.*=0.8'.",
    ),
]

Level = Annotated[
    LevelName,
    option(
        SELECT,
        "--level",
        metavar="NAME",
        help="layer: stored operators. composed: maximal affine regions. both.",
        show_default=True,
    ),
]
Layers = Annotated[
    list[str] | None,
    option(SELECT, "--layers", metavar="GLOB", help="Keep rows whose key or weight matches; repeatable."),
]
Exclude = Annotated[
    list[str] | None,
    option(SELECT, "--exclude", metavar="GLOB", help="Drop rows whose key matches; repeatable."),
]
Kinds = Annotated[
    list[str] | None,
    option(SELECT, "--kind", metavar="KIND", help="Keep these kinds, e.g. conv2d,linear; repeatable."),
]
Shard = Annotated[
    str | None,
    option(SELECT, "--shard", metavar="I/N", help="Analyse every N-th row from the I-th (job arrays)."),
]
MaxTensorBytes = Annotated[
    str | None,
    option(READ, "--max-tensor-bytes", metavar="SIZE", help="Largest tensor that is read, 64GB or 512MiB."),
]
ReadLimits = Annotated[
    list[str] | None,
    option(
        READ,
        "--limit",
        metavar="NAME=VALUE",
        help="Another safety limit, as the error that it caused names it: depth=200, header_bytes=1GB; repeatable.",
    ),
]

Key = Annotated[
    str | None,
    option(
        SELECT,
        "--key",
        metavar="NAME",
        help="Branch of a training checkpoint to take, e.g. ema or state_dict.",
    ),
]
AssumeBn = Annotated[
    bool,
    option(
        SELECT, "--assume-bn", help="Guess convolution and batch norm pairs where the file has no program."
    ),
]

_FORMAT = option(
    OUTPUT,
    "--format",
    metavar="NAME",
    help="table, csv, tsv, json, jsonl, md or xlsx, for check also junit, github or sarif; default by suffix, else "
    "a table (tsv in a pipe).",
    case_sensitive=False,
)
Format = Annotated[FormatName | None, _FORMAT]
CheckFormat = Annotated[CheckFormatName | None, _FORMAT]
Output = Annotated[
    str | None,
    option(
        OUTPUT,
        "-o",
        "--output",
        metavar="FILE",
        help="Write to FILE; - is stdout. For clip the checkpoint to write.",
    ),
]
Columns = Annotated[
    str | None, option(OUTPUT, "--columns", metavar="A,B", help="Only these columns, in this order.")
]
Sort = Annotated[
    str | None,
    option(OUTPUT, "--sort", metavar="[-]COLUMN", help="Sort by a column, downward with a leading -."),
]
Tidy = Annotated[
    bool, option(OUTPUT, "--tidy", help="One row per singular value instead of one per operator.")
]
NoGuard = Annotated[
    bool,
    option(
        OUTPUT,
        "--no-guard",
        help="Leave CSV cells alone that a spreadsheet would take for formulas or dates.",
    ),
]

Quiet = Annotated[bool, option(MESSAGES, "-q", "--quiet", help="No progress, notes or hints.")]
Verbose = Annotated[
    bool,
    option(
        MESSAGES, "-v", "--verbose", help="Say why each method was chosen; check and clip show every row."
    ),
]
NoProgress = Annotated[bool, option(MESSAGES, "--no-progress", help="No progress.")]
Strict = Annotated[bool, option(MESSAGES, "--strict", help="Exit with 5 if a linear operator was skipped.")]
Debug = Annotated[bool, option(MESSAGES, "--debug", help="Show tracebacks.")]
