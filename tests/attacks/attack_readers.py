"""Files that two readers could take for different ones: what torch would load is what is listed, or it is refused.

``test_readers.py`` gives the same files to ``torch.load``.
"""

from __future__ import annotations

import io
import struct
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from attack import WEIGHT, Attack, Build, integer, tensor, text, torch_zip, zip_bytes

#: Another weight than the harmless one, which some reader would see in its place.
OTHER = np.arange(16, dtype=np.float32).reshape(4, 4)
STORAGES = {"0": WEIGHT.tobytes(), "1": OTHER.tobytes()}
EMPTY = b"ccollections\nOrderedDict\n)R"
FIRST, SECOND = tensor("0"), tensor("1")
SIZES, STEPS = (b"(" + integer(4) + integer(step) + b"t" for step in (4, 1))


def reduce(name: str, *arguments: bytes) -> bytes:
    """A call, pickled."""
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n(".encode() + b"".join(arguments) + b"tR"


def tuple_of(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def storage(key: str, numel: int = 16, of: str = "FloatStorage", *view: bytes) -> bytes:
    """A storage by its persistent id."""
    kind = f"ctorch\n{of}\n".encode()
    return tuple_of(text("storage"), kind, text(key), text("cpu"), integer(numel), *view) + b"Q"


def set_to(key: str) -> bytes:
    """Put the elements of a storage into the tensor on the stack."""
    return tuple_of(storage(key), integer(0), SIZES, STEPS) + b"b"


def pickled(weight: bytes, before: bytes = b"", order: str = "", record: str = "byteorder") -> Build:
    """A checkpoint whose only weight is ``weight``."""

    def build(folder: Path) -> Path:
        path = folder / "net.pt"
        data = b"\x80\x02}(" + before + text("w") + weight + b"u."
        torch_zip(path, data, STORAGES)
        if order:
            # The weight itself is one of the order told, so that the attack is on the other one.
            stored = STORAGES | {"0": WEIGHT.byteswap().tobytes()}
            records = {f"net/data/{name}": content for name, content in stored.items()}
            more = {f"net/{record}": order.encode(), "net/version": b"3\n"}
            path.write_bytes(zip_bytes({"net/data.pkl": data, **records, **more}))
        return path

    return build


def wrapped(data: bytes) -> Build:
    """A checkpoint around a pickle."""
    return lambda folder: torch_zip(folder / "net.pt", data, STORAGES)


# --- arrays of numpy ------------------------------------------------------------------------------------------


def octets(values: np.ndarray) -> bytes:
    return reduce("_codecs.encode", text(values.tobytes().decode("latin1")), text("latin1"))


def kind(code: str, order: bytes = b"") -> bytes:
    """A ``numpy.dtype``; its state, if it has one, says the byte order."""
    made = reduce("numpy.dtype", text(code), b"\x89\x88")
    state = tuple_of(integer(3), order, b"NNN", integer(-1), integer(-1), integer(0)) + b"b"
    return made + state if order else made


def contents(values: np.ndarray, dtype: bytes) -> bytes:
    """The state of an array."""
    return tuple_of(integer(1), SIZES, dtype, b"\x89", octets(values)) + b"b"


def array(values: np.ndarray, dtype: bytes) -> bytes:
    empty = tuple_of(integer(0))
    made = reduce(
        "numpy.core.multiarray._reconstruct", b"cnumpy\nndarray\n", empty, octets(np.zeros(1, np.uint8))
    )
    return made + contents(values, dtype)


def from_buffer(values: np.ndarray, order: str) -> bytes:
    return reduce("numpy.core.numeric._frombuffer", octets(values), kind("f4"), SIZES, text(order))


# --- old files ------------------------------------------------------------------------------------------------

MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
OLD_HEAD = MAGIC + b"\x80\x02M\xe9\x03.\x80\x02}."


def old_view(key: str, part: tuple[str, int, int] | None, of: str = "FloatStorage") -> bytes:
    """Four elements of a storage, or of a part of one, as torch before 1.6 names them."""
    view = b"N" if part is None else tuple_of(text(part[0]), integer(part[1]), integer(part[2]))
    named = storage(key, 16, of, view)
    sizes = tuple_of(integer(4)), tuple_of(integer(1))
    return reduce("torch._utils._rebuild_tensor_v2", named, integer(0), *sizes, b"\x89", EMPTY)


def old(*entries: bytes) -> bytes:
    data = struct.pack("<q", WEIGHT.size) + WEIGHT.tobytes()
    return OLD_HEAD + b"\x80\x02}(" + b"".join(entries) + b"u.\x80\x02](" + text("0") + b"e." + data


def written(data: Callable[[], bytes]) -> Build:
    def build(folder: Path) -> Path:
        (folder / "net.pt").write_bytes(data())
        return folder / "net.pt"

    return build


def tar_and_torch() -> bytes:
    """A file of torch before 1.6 whose first 512 bytes are the header of a tar archive as well."""
    begin = MAGIC + b"\x80\x02M\xe9\x03.\x80\x02"
    info = tarfile.TarInfo("x" * 99)
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    # The rest of the header is a text of the third pickle, the facts of the system.
    block[: len(begin)] = begin
    start = len(begin)
    block[start : start + 5] = b"X" + struct.pack("<I", 512 - start - 5)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + b"." + old(text("w"), old_view("0", None))[len(OLD_HEAD) :]


# --- archives -------------------------------------------------------------------------------------------------

RECORDS: Mapping[str, bytes] = {
    "net/data.pkl": b"\x80\x02}(" + text("w") + FIRST + b"u.",
    "net/data/0": WEIGHT.tobytes(),
}


def behind_a_header() -> bytes:
    """An archive, with positions that are right, behind what could be the header of another format."""
    stream = io.BytesIO(b"PK\3\4" + bytes(4) + b'{"a": 1}')
    stream.seek(0, io.SEEK_END)
    start = stream.tell()
    archive = zip_bytes(RECORDS)
    end = archive.rindex(b"PK\5\6")
    first = struct.unpack_from("<L", archive, end + 16)[0]
    moved = bytearray(archive)
    at = first
    while archive[at : at + 4] == b"PK\1\2":
        struct.pack_into("<L", moved, at + 42, struct.unpack_from("<L", archive, at + 42)[0] + start)
        at += 46 + sum(struct.unpack_from("<3H", archive, at + 28))
    struct.pack_into("<L", moved, end + 16, first + start)
    return stream.getvalue() + bytes(moved)


def other_method() -> bytes:
    """An archive whose first header has ``{"`` for its compression, as a safetensors file has in that place."""
    data = zip_bytes(RECORDS)
    return data[:8] + b'{"' + data[10:]


TWICE = "named with two types or sizes"
OTHERWISE = "given other contents than it was made with"
ATTACKS = [
    # --- torch puts other values into a tensor that the pickle has made
    Attack(
        "pickle that sets a tensor anew",
        pickled(FIRST + set_to("1")),
        refused=OTHERWISE,
    ),
    Attack(
        "pickle that gives a parameter other data",
        pickled(
            reduce("torch._utils._rebuild_parameter", FIRST, b"\x89", EMPTY)
            + tuple_of(SECOND, b"N", EMPTY, b"\x89N")
            + b"b"
        ),
        refused=OTHERWISE,
    ),
    Attack(
        "pickle that gives a parameter the attribute data",
        pickled(
            reduce(
                "torch._utils._rebuild_parameter_with_state",
                *(FIRST, b"\x89", EMPTY, b"}(" + text("data") + SECOND + b"u"),
            )
        ),
        refused="the attribute 'data' would replace",
    ),
    Attack(
        "pickle that gives a subclass the attribute real",
        pickled(
            FIRST.replace(
                b"ctorch._utils\n_rebuild_tensor_v2\n(",
                b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n_rebuild_tensor_v2\nctorch\nTensor\n(",
            )[:-1]
            + b"}("
            + text("real")
            + SECOND
            + b"utR"
        ),
        refused="the attribute 'real' would replace",
    ),
    Attack(
        "pickle that converts a tensor",
        pickled(
            reduce(
                "torch._utils._rebuild_device_tensor_from_cpu_tensor",
                *(SECOND, b"ctorch\nfloat16\n", text("cpu"), b"\x89"),
            ),
            text("a") + FIRST,
        ),
    ),
    Attack("pickle that makes a tensor of a tensor", pickled(reduce("torch.Tensor", FIRST))),
    Attack(
        "pickle that makes a tensor of numbers",
        pickled(reduce("torch.FloatTensor", b"]" + integer(1) + b"a"), text("a") + FIRST),
    ),
    Attack(
        "pickle that makes a tensor without contents",
        pickled(b"ctorch\nTensor\n)R" + set_to("0")),
    ),
    # --- containers
    Attack(
        "pickle that makes a dict by __new__",
        wrapped(
            b"\x80\x02ccollections\nOrderedDict\n(}("
            + text("w")
            + SECOND
            + text("ghost")
            + SECOND
            + b"ut\x81("
            + text("w")
            + FIRST
            + b"u."
        ),
    ),
    Attack(
        "pickle that makes a defaultdict of entries",
        wrapped(
            b"\x80\x02" + reduce("collections.defaultdict", b"N", b"}(" + text("w") + FIRST + b"u") + b"."
        ),
    ),
    Attack(
        "pickle that gives a module its state twice",
        pickled(
            b"ctorch.nn.modules.linear\nLinear\n)\x81"
            + 2 * (b"}(" + text("_parameters") + b"}" + text("_modules") + b"}ub")
        ),
        refused="is given its state twice",
    ),
    # --- storages
    Attack(
        "storage of another type in its first use",
        pickled(FIRST, text("a") + FIRST.replace(b"FloatStorage", b"IntStorage")),
        refused=TWICE,
    ),
    Attack(
        "storage of another size in its first use",
        pickled(FIRST, text("a") + tensor(shape=(2,), stride=(1,), numel=2)),
        refused=TWICE,
    ),
    Attack(
        "storage of bytes turned round by its own type",
        pickled(
            reduce(
                "torch._utils._rebuild_tensor_v3",
                *(storage("1", 8, "DoubleStorage"), integer(0), SIZES, STEPS),
                *(b"\x89", EMPTY, b"ctorch\nfloat32\n"),
            ),
            text("a") + FIRST,
            "big",
        ),
    ),
    Attack(
        "zip with the record 'net/ByteOrder'",
        pickled(FIRST, order="big", record="ByteOrder"),
    ),
    # --- arrays
    Attack(
        "pickle of a numpy array whose type names its order",
        pickled(array(WEIGHT.byteswap(), kind(">f4")), text("a") + FIRST),
        clip=4,
    ),
    Attack(
        "pickle of a numpy array whose order is of bytes",
        pickled(array(WEIGHT.byteswap(), kind("f4", b"C\1>")), text("a") + FIRST),
        clip=4,
    ),
    Attack(
        "pickle of a numpy array with two states",
        pickled(array(OTHER, kind("f4")) + contents(WEIGHT, kind("f4"))),
        refused=OTHERWISE,
    ),
    Attack(
        "pickle of a numpy array in an order that is f",
        pickled(from_buffer(OTHER, "f")),
        refused="neither C nor F",
    ),
    # --- files of torch before 1.6
    Attack(
        "legacy pickle with two parts of one name",
        written(
            lambda: old(text("a"), old_view("0", ("part", 0, 4)), text("w"), old_view("0", ("part", 8, 4)))
        ),
        refused="is named twice",
    ),
    Attack(
        "legacy pickle with a part named as its storage",
        written(lambda: old(text("a"), old_view("0", None), text("w"), old_view("0", ("0", 8, 4)))),
        refused="is named twice",
    ),
    Attack(
        "legacy pickle with a storage of two types",
        written(lambda: old(text("a"), old_view("0", None, "IntStorage"), text("w"), old_view("0", None))),
        refused=TWICE,
    ),
    Attack("legacy pickle in a tar archive", written(tar_and_torch), refused="both a tar archive and"),
    # --- archives
    Attack(
        "zip with bytes before it that it counts", written(behind_a_header), refused="does not begin with"
    ),
    Attack(
        "zip with a header of another compression", written(other_method), refused="has another compression"
    ),
    Attack(
        "zip with two formats in it",
        written(lambda: zip_bytes({**RECORDS, "net/archive_format": b"pt2"})),
        refused="both an exported program and",
    ),
]
