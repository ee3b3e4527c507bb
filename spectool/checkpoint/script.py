"""Archives that hold a compiled program: TorchScript and exported programs (.pt2). Their tensors are read here."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from spectool.checkpoint.archive import Archive
from spectool.checkpoint.bind import Bound, bind
from spectool.checkpoint.dtypes import EXPORTED
from spectool.checkpoint.inert import Storage, Tensor
from spectool.checkpoint.jsonfile import parse_object
from spectool.checkpoint.limits import Limits
from spectool.checkpoint.modules import Collector
from spectool.checkpoint.nest import Nest
from spectool.checkpoint.programs import exported_program, script_program
from spectool.checkpoint.read import Reader, find_aliases
from spectool.checkpoint.source import Source
from spectool.checkpoint.torchfile import unpickle_record, zip_locator
from spectool.checkpoint.types import Checkpoint
from spectool.errors import CorruptFile, NothingToAnalyse

_EARLY = "serialized_state_dict.pt"
_TABLE = re.compile(r"data/(weights|constants)/([^/]+)_\1_config\.json")
_STRIDED = 7


def open_torchscript(archive: Archive, limits: Limits) -> Checkpoint:
    """Read the tensors of a TorchScript archive.

    Attributes of the module tree become dotted names, as in the module's own state dict (plain tensor attributes
    are there too); tensors that the compiler inlined are called ``CONSTANTS.c0``, ``CONSTANTS.c1``…, as in its code.
    The code is kept as text.

    Raises:
        CorruptFile, LimitExceeded: If a record is missing, damaged or too large.
        NothingToAnalyse: If there is no tensor.
    """
    bound = _every_tensor(archive, "data.pkl", "data", limits) if "data.pkl" in archive else Bound()
    if "constants.pkl" in archive:
        bound.update(_every_tensor(archive, "constants.pkl", "constants", limits, "CONSTANTS", "c"))
    checkpoint = _program_checkpoint(archive.source, "torchscript", "a TorchScript archive", bound)
    return replace(checkpoint, program=script_program(archive, limits, checkpoint.tensors))


def open_exported(archive: Archive, limits: Limits) -> Checkpoint:
    """Read the weights and constants of an exported program (.pt2).

    Raises:
        CorruptFile, LimitExceeded: If a record is missing, damaged or too large.
        NothingToAnalyse: If there is no tensor.
    """
    bound = _early_export(archive, limits) if _EARLY in archive else _export(archive, limits)
    checkpoint = _program_checkpoint(archive.source, "pt2", "an exported program", bound)
    return replace(checkpoint, program=exported_program(archive, limits))


def _program_checkpoint(source: Source, form: str, what: str, bound: Bound) -> Checkpoint:
    if not (bound.tensors or bound.unread):
        raise NothingToAnalyse(
            f"{source.path}: {what} without a single tensor", hint="name a file that holds weights"
        )
    metadata = {"quantization": bound.quantization} if bound.quantization else {}
    aliases = find_aliases(bound.tensors.values())
    reader = Reader({source.path: source}, bound.inside)
    return Checkpoint(source.path, form, bound.tensors, aliases, metadata, None, (), reader, bound.unread)


def _every_tensor(
    archive: Archive, record: str, folder: str, limits: Limits, prefix: str = "", item: str = ""
) -> Bound:
    """Bind every tensor of one pickle record; nothing in it is training state."""
    root = unpickle_record(archive, record, limits)
    if prefix:
        values = root if isinstance(root, tuple | list) else ()
        root = {prefix: {f"{item}{index}": value for index, value in enumerate(values)}}
    path = archive.source.path
    collector = Collector(str(path), Nest(root, limits), limits)
    collector.flatten(root, "", 0, training=True)
    return bind(path, collector.tensors, zip_locator(archive, folder, limits), limits)


def _export(archive: Archive, limits: Limits) -> Bound:
    """Read the tables of weights and constants that an exported program has for each of its models."""
    path = archive.source.path
    tables = []
    for record in archive.records:
        match = _TABLE.fullmatch(record)
        if match:
            tables.append((record, *match.groups()))
    several = len({model for _, _, model in tables}) > 1
    named: dict[str, Tensor] = {}
    # Weights before constants, whatever the order in the archive.
    for record, folder, model in sorted(tables, key=lambda table: table[1], reverse=True):
        config = parse_object(archive.read(record, "header_bytes"), f"{path}: record {record!r}", limits).get(
            "config"
        )
        if not isinstance(config, dict):
            raise CorruptFile(f"{path}: record {record!r} lists no tensors")
        limits.check("names", len(named) + len(config), f"{path}: the number of tensors")
        if several:
            repeated = len(model) * len(config) + sum(map(len, config))
            limits.check("name_bytes", repeated, f"{path}: its names together")
        for name, entry in config.items():
            key = f"{model}.{name}" if several else name
            tensor = _exported_tensor(f"{path}: tensor {key!r}", f"{folder}/", entry)
            if tensor is not None:
                named[key] = tensor
    return bind(path, named, zip_locator(archive, "data", limits), limits)


def _early_export(archive: Archive, limits: Limits) -> Bound:
    """Read a .pt2 of torch 2.1 to 2.6: a zip whose state dict and constants are whole torch files of their own."""
    source = archive.source
    bound = Bound()
    for name in (_EARLY, "serialized_constants.pt"):
        record = archive.records.get(name)
        if record is None or record.size == 0:
            continue
        if not record.stored:
            raise CorruptFile(
                f"{source.path}: record {record.name!r} is compressed", hint="export the program again"
            )
        inner = Archive(source.window(record.start, record.size), limits)
        bound.update(_every_tensor(inner, "data.pkl", "data", limits))
    return bound


def _exported_tensor(what: str, folder: str, entry: Any) -> Tensor | None:
    """Return one entry of a weights or constants table; None for one that is no tensor (a script object)."""
    try:
        meta = entry["tensor_meta"]
        if meta is None:
            return None
        file, pickled = entry["path_name"], entry["use_pickle"]
        number, layout = meta["dtype"], meta["layout"]
        shape = tuple(size["as_int"] for size in meta["sizes"])
        stride = tuple(step["as_int"] for step in meta["strides"])
        offset = meta["storage_offset"]["as_int"]
        sound = isinstance(file, str) and all(
            type(n) is int and 0 <= n < 2**63 for n in (*shape, *stride, offset)
        )
    except (KeyError, TypeError):
        sound = False
    if not sound:
        raise CorruptFile(f"{what} has an entry without file, type, sizes and strides")
    if pickled or layout != _STRIDED or number not in EXPORTED:
        return Tensor(
            "", shape, problem="stored as a pickled tensor subclass, or of an unknown type or layout"
        )
    dtype = EXPORTED[number]
    return Tensor(dtype, shape, stride, Storage(dtype, folder + file, 0), offset)
