"""Archives that hold a compiled program: TorchScript and exported programs (.pt2). Their tensors are read here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from spectool.checkpoint.archive import Archive
from spectool.checkpoint.bind import Place, bind
from spectool.checkpoint.dtypes import EXPORTED, ITEMSIZE
from spectool.checkpoint.inert import Storage, Tensor
from spectool.checkpoint.jsonfile import parse_object
from spectool.checkpoint.limits import Limits
from spectool.checkpoint.modules import Collector
from spectool.checkpoint.nest import Nest
from spectool.checkpoint.read import Reader, find_aliases
from spectool.checkpoint.torchfile import assemble, unpickle_record, zip_locator
from spectool.checkpoint.types import Checkpoint
from spectool.errors import CorruptFile, NothingToAnalyse

_STATE = "serialized_state_dict"
_STRIDED = 7


def open_torchscript(archive: Archive, limits: Limits) -> Checkpoint:
    """Read the tensors of a TorchScript archive.

    Attributes of the module tree become dotted names, as in the module's own state dict (plain tensor attributes
    are there too); tensors that the compiler inlined are called ``CONSTANTS.c0``, ``CONSTANTS.c1``…, as in its code.
    The compiled code is not read.

    Raises:
        CorruptFile, LimitExceeded: If a record is missing, damaged or too large.
        NothingToAnalyse: If there is no tensor.
    """
    source = archive.source
    bound = None
    for record, folder in (("data.pkl", "data"), ("constants.pkl", "constants")):
        if record not in archive:
            continue
        root = unpickle_record(archive, record, limits)
        if folder == "constants":
            values = root if isinstance(root, tuple | list) else ()
            root = {"CONSTANTS": {f"c{index}": value for index, value in enumerate(values)}}
        collector = Collector(str(source.path), Nest(root, limits), limits)
        collector.flatten(root, "", 0, training=True)
        part = bind(source.path, collector.tensors, zip_locator(archive, folder, limits), limits)
        if bound is None:
            bound = part
        else:
            bound.tensors.update(part.tensors)
            bound.unread.update(part.unread)
            bound.quantization.update(part.quantization)
    if bound is None or not (bound.tensors or bound.unread):
        raise NothingToAnalyse(
            f"{source.path}: a TorchScript archive without a single tensor", hint="name a file that holds weights"
        )
    metadata = {"quantization": bound.quantization} if bound.quantization else {}
    aliases = find_aliases(bound.tensors.values())
    reader = Reader({source.path: source}, bound.inside)
    return Checkpoint(source.path, "torchscript", bound.tensors, aliases, metadata, None, (), reader, bound.unread)


def open_exported(archive: Archive, limits: Limits) -> Checkpoint:
    """Read the weights and constants of an exported program (.pt2).

    Raises:
        CorruptFile, LimitExceeded: If a record is missing, damaged or too large.
        NothingToAnalyse: If there is no tensor.
    """
    if f"{_STATE}.pt" in archive or f"{_STATE}.json" in archive:
        return _open_early_export(archive, limits)
    path = archive.source.path
    named: dict[str, Tensor] = {}
    unread: dict[str, str] = {}
    configs = [
        (name, folder)
        for folder in ("weights", "constants")
        for name in archive.records
        if name.startswith(f"data/{folder}/") and name.endswith(f"_{folder}_config.json")
    ]
    models = {name.rsplit("/", 1)[1].removesuffix(f"_{folder}_config.json") for name, folder in configs}
    for record, folder in configs:
        model = record.rsplit("/", 1)[1].removesuffix(f"_{folder}_config.json")
        prefix = f"{model}." if len(models) > 1 else ""
        config = parse_object(archive.read(record, "header_bytes"), f"{path}: record {record!r}").get("config")
        if not isinstance(config, dict):
            raise CorruptFile(f"{path}: record {record!r} lists no tensors")
        limits.check("names", len(config), f"{path}: the number of tensors")
        for name, entry in config.items():
            key = prefix + name
            tensor = _exported_tensor(f"{path}: tensor {key!r}", f"{folder}/", entry)
            if tensor is None:
                continue
            named[key] = tensor
    # ``byteorder`` is not consulted: the exporter writes raw bytes of its machine and records it beside them.
    bound = bind(path, named, _in_data(zip_locator(archive, "data", limits)), limits)
    unread.update(bound.unread)
    if not (bound.tensors or unread):
        raise NothingToAnalyse(
            f"{path}: an exported program without weights of its own", hint="export it with torch.export.save"
        )
    aliases = find_aliases(bound.tensors.values())
    reader = Reader({path: archive.source})
    return Checkpoint(path, "pt2", bound.tensors, aliases, {}, None, (), reader, unread)


def _in_data(locate: Callable[[Storage], Place]) -> Callable[[Storage], Place]:
    return locate


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
        sound = isinstance(file, str) and all(type(n) is int and 0 <= n < 2**63 for n in (*shape, *stride, offset))
    except (KeyError, TypeError):
        sound = False
    if not sound:
        raise CorruptFile(f"{what} has an entry without file, type, sizes and strides")
    if pickled or layout != _STRIDED or number not in EXPORTED:
        return Tensor("", shape, problem="stored as a pickled tensor subclass, or of an unknown type or layout")
    dtype = EXPORTED[number]
    return Tensor(dtype, shape, stride, Storage(dtype, folder + file, 0), offset)


def _open_early_export(archive: Archive, limits: Limits) -> Checkpoint:
    """Read a .pt2 of torch 2.1 to 2.6: a zip in which the state dict is a whole torch file of its own."""
    source = archive.source
    record = archive.records.get(f"{_STATE}.pt") or archive.records[f"{_STATE}.json"]
    if not record.stored:
        raise CorruptFile(f"{source.path}: record {record.name!r} is compressed", hint="export the program again")
    inner = Archive(source.window(record.start, record.size), limits)
    root = unpickle_record(inner, "data.pkl", limits)
    locate = zip_locator(inner, "data", limits)
    return assemble(inner.source, "pt2", root, locate, limits, None)


__all__ = ["ITEMSIZE", "open_exported", "open_torchscript"]
