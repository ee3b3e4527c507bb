"""Where the values of an ONNX model's own tensors lie in its bytes, and what to put there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from spectool.checkpoint.dtypes import ITEMSIZE
from spectool.checkpoint.onnxfile import Route, placed_tensors
from spectool.checkpoint.patch.content import Splice, fixed
from spectool.checkpoint.patch.values import octets
from spectool.checkpoint.patch.wire import (
    BLOCK,
    NARROW,
    NUMBER,
    WIDE,
    Field,
    Messages,
    read_varint,
    with_lengths,
    write_varint,
)
from spectool.checkpoint.source import Source
from spectool.checkpoint.types import Checkpoint
from spectool.errors import CorruptFile

if TYPE_CHECKING:
    import torch

#: Typed fields by element type: those of fixed width may be written in place, those of numbers change their length.
_FIXED = {
    "float32": "float_data",
    "complex64": "float_data",
    "float64": "double_data",
    "complex128": "double_data",
}
_NUMBERS = {"int64": "int64_data", "uint32": "uint64_data", "uint64": "uint64_data"}
_HOLD_TENSORS = {
    *("GraphProto", "NodeProto", "AttributeProto", "FunctionProto", "TrainingInfoProto"),
    *("SparseTensorProto", "TensorProto"),
}
_ATTRIBUTES = {"value_float": "f", "value_floats": "floats", "value_int": "i", "value_ints": "ints"}


def field_splices(
    checkpoint: Checkpoint,
    source: Source,
    edits: Mapping[str, torch.Tensor],
    locations: Mapping[str, str],
    digest: Callable[[str], str | None],
) -> list[Splice]:
    """Return the splices of an ONNX model's own bytes.

    Args:
        checkpoint: The model.
        source: Its bytes.
        edits: Key → new values, for tensors that stand in the model itself.
        locations: Names of external data files that change, old → new, as relative POSIX paths.
        digest: Gives the SHA-1 checksum of a data file that changes by its old name, None of one that does not.

    Raises:
        CorruptFile: If the bytes cannot be followed to a tensor.
    """
    messages = Messages(source.read(0, source.size, "the ONNX model"))
    changes: list[Splice] = []
    around: list[Field] = []
    try:
        for key, proto, route in placed_tensors(checkpoint.program) if edits else ():
            if key not in edits:
                continue
            way = _follow(messages, checkpoint.program, route)
            around += way
            new, inside = _new_values(messages, way[-1], proto, checkpoint.tensors[key].dtype, edits[key])
            changes += new
            around += inside
        for change, way in _external_changes(messages, checkpoint.program, locations, digest):
            changes.append(change)
            around += way
    except ValueError as error:
        raise CorruptFile(
            f"{source.path}: the ONNX model cannot be followed byte by byte ({error})",
            hint="load it and save it again with onnx",
        ) from error
    return with_lengths(messages.data, changes, around)


def _number(message: Any, name: str) -> int:
    number: int = message.DESCRIPTOR.fields_by_name[name].number
    return number


def _follow(messages: Messages, model: Any, route: Route) -> list[Field]:
    """Return the blocks from the outermost message to the one at the end of a route."""
    way: list[Field] = []
    message, start, stop = model, 0, len(messages.data)
    for name, index in route:
        found = messages.fields(start, stop).get(_number(message, name), [])
        if index is None and len(found) != 1:
            raise ValueError(f"field {name} is there {len(found)} times")
        if index is not None and len(getattr(message, name)) != len(found):
            raise ValueError(f"field {name} has other entries than were read")
        block = found[index or 0]
        if block.wire != BLOCK:
            raise ValueError(f"field {name} is no message")
        way.append(block)
        message = getattr(message, name) if index is None else getattr(message, name)[index]
        start, stop = block.start, block.stop
    return way


def _new_values(
    messages: Messages, place: Field, proto: Any, dtype: str, tensor: torch.Tensor
) -> tuple[list[Splice], list[Field]]:
    """Return the changes for one tensor, and the blocks of numbers that they may lengthen."""
    fields = messages.fields(place.start, place.stop)
    if not hasattr(proto, "data_type"):
        name = _ATTRIBUTES[proto.name]
        found = fields.get(_number(proto, name), [])
        return _typed(
            messages, found[-1:] if name in ("f", "i") else found, dtype, tensor, dtype == "float32"
        )
    if proto.HasField("segment"):
        raise ValueError("a tensor is split into segments")
    if proto.HasField("raw_data"):
        raw = fields[_number(proto, "raw_data")][-1]
        if raw.stop - raw.start != tensor.numel() * ITEMSIZE[dtype]:
            raise ValueError("raw_data has other bytes than the shape says")
        whole = Splice(raw.start, raw.stop, raw.stop - raw.start, partial(_little, tensor))
        return [whole] if tensor.numel() else [], []
    name = _FIXED.get(dtype) or _NUMBERS.get(dtype, "int32_data")
    return _typed(messages, fields.get(_number(proto, name), []), dtype, tensor, dtype in _FIXED)


def _little(tensor: torch.Tensor) -> Any:
    return octets(tensor, "little").reshape(-1).numpy()


def _typed(
    messages: Messages, found: Sequence[Field], dtype: str, tensor: torch.Tensor, of_fixed_width: bool
) -> tuple[list[Splice], list[Field]]:
    if of_fixed_width:
        size = 4 if dtype in ("float32", "complex64") else 8
        return _of_fixed_width(found, _little(tensor).tobytes(), NARROW if size == 4 else WIDE, size), []
    return _of_numbers(messages, found, _integers(tensor)), [field for field in found if field.wire == BLOCK]


def _of_fixed_width(found: Sequence[Field], data: bytes, single: int, size: int) -> list[Splice]:
    """Replace numbers of 4 or 8 bytes, however they are split into packed runs and single ones."""
    splices, at = [], 0
    for field in found:
        length = field.stop - field.start
        if field.wire not in (BLOCK, single) or length % size:
            raise ValueError("values of another width than their type has")
        splices.append(fixed(field.start, field.stop, data[at : at + length]))
        at += length
    if at != len(data):
        raise ValueError(f"a tensor has {at} bytes of values where its shape says {len(data)}")
    return splices


def _of_numbers(messages: Messages, found: Sequence[Field], values: list[int]) -> list[Splice]:
    """Replace varints one by one, so that a value that stays keeps its bytes."""
    splices: list[Splice] = []
    index = 0
    for field in found:
        if field.wire not in (BLOCK, NUMBER):
            raise ValueError("values of another width than their type has")
        at = field.start
        out = bytearray()
        while at < field.stop:
            old, end = read_varint(messages.data, at)
            if index == len(values):
                raise ValueError("a tensor has more values than its shape says")
            same = old == values[index] & (1 << 64) - 1
            out += messages.data[at:end] if same else write_varint(values[index])
            index, at = index + 1, end
        splices.append(fixed(field.start, field.stop, bytes(out)))
    if index != len(values):
        raise ValueError(f"a tensor has {index} values where its shape says {len(values)}")
    return splices


def _integers(tensor: torch.Tensor) -> list[int]:
    """Return elements as ONNX writes them into integer fields: floats by their bits, unsigned."""
    import numpy as np

    flat = octets(tensor, "little").reshape(-1).numpy()
    size = tensor.dtype.itemsize
    signed = not (
        tensor.dtype.is_floating_point or str(tensor.dtype).startswith(("torch.uint", "torch.bool"))
    )
    values: list[int] = flat.view(np.dtype(f"<{'i' if signed else 'u'}{size}")).tolist()
    return values


def external_names(messages: Messages, model: Any) -> set[str]:
    """Return the names of all external data files, as relative POSIX paths."""
    entries = _external_entries(messages, model.DESCRIPTOR, [], 0, len(messages.data))
    return {_text(messages, pairs["location"]) for _, pairs in entries if "location" in pairs}


def _text(messages: Messages, field: Field) -> str:
    text = messages.data[field.start : field.stop].decode("utf-8", "replace")
    return str(PurePosixPath(text.replace("\\", "/")))


def _external_changes(
    messages: Messages, model: Any, locations: Mapping[str, str], digest: Callable[[str], str | None]
) -> Iterator[tuple[Splice, list[Field]]]:
    """Yield new names and SHA-1 checksums of data files, each with the blocks around it."""
    for way, pairs in _external_entries(messages, model.DESCRIPTOR, [], 0, len(messages.data)):
        if "location" not in pairs:
            continue
        old = _text(messages, pairs["location"])
        new = {"location": locations.get(old), "checksum": digest(old) if "checksum" in pairs else None}
        for key, value in new.items():
            if value is not None:
                field = pairs[key]
                yield fixed(field.start, field.stop, value.encode()), [*way, field]


def _external_entries(
    messages: Messages, kind: Any, way: list[Field], start: int, stop: int
) -> Iterator[tuple[list[Field], dict[str, Field]]]:
    """Yield the blocks down to every tensor with external data, and the values of its entries by their keys."""
    fields = messages.fields(start, stop)
    if kind.name == "TensorProto":
        pairs = {}
        around = list(way)
        for entry in fields.get(kind.fields_by_name["external_data"].number, []):
            pair = messages.fields(entry.start, entry.stop)
            if pair.get(1) and pair.get(2):
                key = messages.data[pair[1][-1].start : pair[1][-1].stop].decode("utf-8", "replace")
                pairs[key] = pair[2][-1]
                around.append(entry)
        if pairs:
            yield around, pairs
        return
    for field in kind.fields:
        inner = field.message_type
        if inner is not None and inner.name in _HOLD_TENSORS:
            for block in fields.get(field.number, []):
                yield from _external_entries(messages, inner, [*way, block], block.start, block.stop)
