"""``torch.save`` files, new (zip) and old: structure by the inert reader, bytes where torch put them."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any, BinaryIO, cast

from spectool.checkpoint.archive import Archive
from spectool.checkpoint.bind import Place, bind
from spectool.checkpoint.dtypes import ITEMSIZE, STORAGE_CLASSES
from spectool.checkpoint.inert import Reference, Storage, brief
from spectool.checkpoint.limits import Limits
from spectool.checkpoint.modules import Collector, scalars
from spectool.checkpoint.nest import Nest
from spectool.checkpoint.payloads import Payloads
from spectool.checkpoint.pickled import unpickle
from spectool.checkpoint.read import Reader, find_aliases
from spectool.checkpoint.recognise import is_tar
from spectool.checkpoint.source import Source
from spectool.checkpoint.types import Checkpoint
from spectool.errors import CorruptFile, NothingToAnalyse, UnrecognisedFormat

#: First pickle of a file written before torch 1.6, as bytes: a LONG1 opcode and the number 0x1950a86a20f9469cfc6c.
LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
_LEGACY_PROTOCOL = 1001


def open_torch_zip(archive: Archive, limits: Limits, key: str | None) -> Checkpoint:
    """Read the structure of a ``torch.save`` zip file.

    Raises:
        CorruptFile, LimitExceeded: If a record is missing, damaged or too large.
        NothingToAnalyse, UsageError: As ``Nest.choose``.
    """
    payloads = Payloads()
    root = unpickle_record(archive, "data.pkl", limits, _Storages(), payloads)
    found = assemble(archive.source, "torch-zip", root, zip_locator(archive, "data", limits), limits, key)
    return replace(found, notes=(*found.notes, *payloads.notes()))


def unpickle_record(
    archive: Archive,
    name: str,
    limits: Limits,
    persistent: Callable[[Any], Any] | None = None,
    payloads: Payloads | None = None,
) -> Any:
    """Return the inert contents of one pickle record of a torch archive, storages as ``storage_of`` by default."""
    data = archive.read(name, "pickle_bytes")
    what = f"{archive.source.path}: record {name!r}"
    return unpickle(io.BytesIO(data), what, limits, persistent or storage_of, payloads)


def zip_locator(archive: Archive, folder: str, limits: Limits) -> Callable[[Storage], Place]:
    """Return a function that finds the record of a storage in an archive's ``folder``."""
    path = archive.source.path
    # torch finds records without regard to case.
    record = next((name for name in archive.records if name.lower() == "byteorder"), None)
    order = archive.read(record, "header_bytes") if record is not None else b"little"
    if order not in (b"little", b"big"):
        raise CorruptFile(f"{path}: the byte order {order[:16]!r} is neither little nor big")
    byteorder = order.decode()

    def locate(storage: Storage) -> Place:
        name = f"{folder}/{storage.key}"
        record = archive.records.get(name)
        if record is None:
            raise CorruptFile(f"{path}: the zip archive has no record {name!r}", hint="copy or save it again")
        if not record.stored:
            raise CorruptFile(
                f"{path}: record {record.name!r} is compressed, which torch never does",
                hint="load it and save it again with torch.save",
            )
        return Place(record.name, archive.source.base + record.start, 0, record.size, byteorder)

    return locate


def storage_of(identity: Any) -> Any:
    """Return what a persistent id of ``torch.save`` stands for.

    Raises:
        ValueError: If it is neither a storage nor a class with its source.
    """
    if isinstance(identity, tuple) and len(identity) == 4 and identity[0] == "module":
        # Before 1.6 a module's class was pickled with its source text.
        return identity[1]
    if not (isinstance(identity, tuple) and len(identity) in (5, 6) and identity[0] == "storage"):
        raise ValueError("a persistent id is no storage")
    kind, key, _, numel, *view = identity[1:]
    name = kind.name.rpartition(".")[2] if isinstance(kind, Reference) else ""
    if name not in STORAGE_CLASSES or type(numel) is not int or not 0 <= numel < 2**63:
        raise ValueError(f"a storage of type {name[:60] or brief(kind)!r} and {brief(numel)} elements")
    key = key if type(key) is str else brief(key)
    if view and view[0] is not None:
        # A view of a part of the storage called ``key``; ``numel`` is that of the whole.
        _, first, _ = view[0]
        if type(first) is not int or not 0 <= first <= numel:
            raise ValueError("a storage view that begins outside its storage")
        return Storage(STORAGE_CLASSES[name], key, numel, first)
    return Storage(STORAGE_CLASSES[name], key, numel)


class _Storages:
    """``storage_of`` for one pickle in which every storage must be the same wherever it is named.

    ``torch.load`` makes a storage, or a view of a part of it, where it is named first and hands out that one whatever
    else is said of it later.

    Attributes:
        named: Key → the storage as it is named first.
    """

    def __init__(self) -> None:
        self.named: dict[str, Storage] = {}
        self._views: dict[str, object] = {}

    def __call__(self, identity: Any) -> Any:
        value = storage_of(identity)
        if not isinstance(value, Storage):
            return value
        known = self.named.setdefault(value.key, value)
        if (known.dtype, known.numel) != (value.dtype, value.numel) and (known.numel or value.numel):
            raise ValueError(f"the storage {value.key[:60]!r} is named with two types or sizes")
        view = identity[5] if len(identity) == 6 else None
        if view is not None:
            key = view[0] if type(view[0]) is str else brief(view[0])
            part = (value.key, value.first, view[2])
            if self._views.setdefault(key, part) != part or key in self.named:
                raise ValueError(f"the part {key[:60]!r} of a storage is named twice, otherwise")
        if value.key in self._views:
            raise ValueError(f"a storage and a part of one have the same key {value.key[:60]!r}")
        return value


def is_legacy(head: bytes) -> bool:
    """Tell whether a file begins like one of torch before 1.6."""
    return head[:1] == b"\x80" and LEGACY_MAGIC in head[:64]


def open_legacy(source: Source, limits: Limits, key: str | None) -> Checkpoint:
    """Read the structure of a ``torch.save`` file from before torch 1.6.

    The file is five pickles (magic number, protocol, system, object, list of storage keys), then the storages in
    that order, each as an int64 count of elements and its bytes.

    Raises:
        CorruptFile, LimitExceeded: If a part is missing, damaged or too large.
        NothingToAnalyse, UsageError: As ``Nest.choose``.
    """
    path = source.path
    found, payloads = _Storages(), Payloads()
    if is_tar(source.head(512)):
        raise CorruptFile(
            f"{path} is both a tar archive and a torch file",
            hint="torch of 2016 wrote the former, and torch.load prefers it: save the one that is meant again",
        )
    with source.stream(limits, "pickle_bytes") as stream:
        tape = cast(BinaryIO, _Tape(stream, f"{path}: its pickles", limits))
        unpickle(tape, f"{path}: the magic number", limits, payloads=payloads)
        if unpickle(tape, f"{path}: the protocol version", limits, payloads=payloads) != _LEGACY_PROTOCOL:
            raise UnrecognisedFormat(
                f"{path}: a torch file of an unknown old protocol", hint="save it with a new torch"
            )
        unpickle(tape, f"{path}: the system facts", limits, payloads=payloads)
        root = unpickle(tape, f"{path}: the object", limits, found, payloads)
        keys = unpickle(tape, f"{path}: the storage keys", limits, payloads=payloads)
        position = tape.tell()
    if not (isinstance(keys, list) and all(isinstance(name, str) for name in keys)):
        raise CorruptFile(f"{path}: the list of storage keys is no list of strings")
    storages, places = found.named, dict[str, Place]()
    for name in keys:
        if name not in storages or name in places:
            raise CorruptFile(f"{path}: the storage key {name!r} is listed but not used, or listed twice")
        storage = storages[name]
        count = int.from_bytes(
            source.read(position, 8, f"the size of storage {name!r}"), "little", signed=True
        )
        if count != storage.numel:
            raise CorruptFile(
                f"{path}: storage {name!r} has {count} elements, its tensors expect {storage.numel}"
            )
        nbytes = count * ITEMSIZE[storage.dtype]
        # These bytes are little-endian whatever machine wrote them.
        places[name] = Place("", 0, position + 8, nbytes)
        position += 8 + nbytes
    if position > source.size:
        raise CorruptFile(
            f"{path} ends after {source.size} bytes; its storages need {position}",
            hint="the file was cut short: copy or download it again",
        )

    def locate(storage: Storage) -> Place:
        if storage.key not in places:
            raise CorruptFile(f"{path}: storage {storage.key!r} is used but not in the file")
        return places[storage.key]

    opened = assemble(source, "torch-legacy", root, locate, limits, key)
    return replace(opened, notes=(*opened.notes, *payloads.notes()))


def assemble(
    source: Source, form: str, root: Any, locate: Callable[[Storage], Place], limits: Limits, key: str | None
) -> Checkpoint:
    """Choose the network in an unpickled nest and turn its tensors into refs."""
    path = source.path
    nest = Nest(root, limits)
    try:
        choice = nest.choose(key)
    except NothingToAnalyse as error:
        raise NothingToAnalyse(f"{path}: {error}", hint=error.hint) from None
    collector = Collector(str(path), nest, limits)
    program = collector.collect(choice)
    bound = bind(path, collector.tensors, locate, limits)
    metadata: dict[str, Any] = {}
    if choice.path:
        metadata["branch"] = ".".join(choice.path)
        metadata["candidates"] = tuple(".".join(names) for names, _ in nest.candidates())
    if plain := scalars(root):
        metadata["scalars"] = plain
    if bound.quantization:
        metadata["quantization"] = bound.quantization
    return Checkpoint(
        path,
        form,
        bound.tensors,
        find_aliases(bound.tensors.values()),
        metadata,
        program,
        (*choice.notes, *collector.notes),
        Reader({path: source}, bound.inside),
        bound.unread,
    )


class _Tape:
    """A binary stream that counts what pickles read from it and refuses to go past ``pickle_bytes``."""

    def __init__(self, stream: BinaryIO, what: str, limits: Limits) -> None:
        self._stream = stream
        self._what = what
        self._limits = limits
        self._most = limits.pickle_bytes
        self._at = 0

    def read(self, size: int) -> bytes:
        if self._at + size > self._most:
            self._limits.check("pickle_bytes", self._at + size, self._what)
        data = self._stream.read(size)
        self._at += len(data)
        return data

    def readline(self) -> bytes:
        data = self._stream.readline(self._most - self._at)
        self._at += len(data)
        return data

    def tell(self) -> int:
        return self._at
