"""Pickles that are data too dear to build, to hash, to walk or to print, and numbers of no sense."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path

from attack import WEIGHT, Attack, checkpoint, integer, tensor, text, torch_zip
from attack_calls import call, legacy


def pickled(*entries: bytes) -> Callable[[Path], Path]:
    """A checkpoint with more entries beside its weight."""
    return lambda folder: checkpoint(folder / "net.pt", *entries)


def whole(data: bytes) -> Callable[[Path], Path]:
    """A checkpoint whose pickle is just this."""
    return lambda folder: torch_zip(folder / "net.pt", data, {"0": WEIGHT.tobytes()})


def put(index: int) -> bytes:
    return b"r" + struct.pack("<I", index)


def get(index: int) -> bytes:
    return b"j" + struct.pack("<I", index)


def doubled(levels: int, bottom: bytes = b")", first: int = 100) -> bytes:
    """A tuple of twice a tuple of twice a tuple…: 2^levels leaves in 12 bytes a level."""
    out = bottom
    for level in range(levels):
        out += put(first + level) + get(first + level) + b"\x86"
    return out


def named_by(part: bytes) -> bytes:
    """An object that carries something, as dict keys and callers may be."""
    return b"cnet\nThing\n" + part + b"\x85R"


def shared_state(entries: int, uses: int) -> bytes:
    """One module with a large state and a tensor, in a list many times: each visit must not cost its size."""
    body = b"".join(integer(index) + b"N" for index in range(entries)) + text("t") + tensor()
    thing = b"cnet\nThing\n)\x81}(" + body + b"ub"
    return text("many") + b"](" + thing + put(1) + get(1) * uses + b"e"


def long_path(length: int, leaves: int) -> bytes:
    """A part with a long name and many tensors in it: every key repeats the name."""
    body = b"".join(text(str(index)) + get(1) for index in range(leaves))
    return text("spare") + tensor() + put(1) + text("n" * length) + b"}(" + body + b"u"


def entries(count: int) -> bytes:
    return b"}(" + b"".join(integer(number) + b"N" for number in range(count)) + b"u"


def nested(opening: bytes, closing: bytes, levels: int) -> bytes:
    return text("deep") + opening * levels + b"N" + closing * levels


BAD_PERSISTENT: Mapping[str, bytes] = {
    "a text": text("storage"),
    "an empty tuple": b")",
    "too short": text("storage") + b"N\x86",
    "a nested tuple": b"("
    + text("storage")
    + b"cnet\nFloatStorage\n"
    + doubled(60)
    + text("cpu")
    + integer(4)
    + b"t",
    "endless elements": b"("
    + text("storage")
    + b"ctorch\nFloatStorage\n"
    + text("0")
    + text("cpu")
    + doubled(60)
    + b"t",
    "an endless type": b"(" + text("storage") + doubled(60) + text("0") + text("cpu") + integer(4) + b"t",
    "2^70 elements": b"("
    + text("storage")
    + b"ctorch\nFloatStorage\n"
    + text("0")
    + text("cpu")
    + integer(2**70)
    + b"t",
    "minus one element": b"("
    + text("storage")
    + b"ctorch\nFloatStorage\n"
    + text("0")
    + text("cpu")
    + integer(-1)
    + b"t",
}

ATTACKS = [
    # --- dear to build
    Attack("pickle of a billion laughs", pickled(text("lol"), doubled(60))),
    Attack("pickle of a billion laughs in a list", pickled(text("lol"), doubled(60, b"]"))),
    Attack(
        "pickle whose key is a billion laughs",
        pickled(doubled(60), b"N"),
        refused="a key is a very large tuple",
    ),
    Attack(
        "pickle whose key is a deep tuple",
        pickled(b")" + b"\x85" * 20_000, b"N"),
        refused="a key is a very large",
    ),
    Attack("pickle whose key holds a billion laughs", pickled(named_by(doubled(60)), tensor())),
    Attack(
        "pickle whose attribute holds a billion laughs",
        pickled(text("m"), b"cnet\nThing\n)\x81}(" + named_by(doubled(60)) + tensor() + b"ub"),
    ),
    Attack("pickle of a call by a billion laughs", pickled(text("x"), doubled(60) + b")R")),
    Attack(
        "pickle of an encoding that is a billion laughs",
        pickled(text("x"), call("_codecs.encode", text("a"), doubled(60))),
        refused="bad arguments for _codecs.encode",
    ),
    Attack(
        "pickle of a type that is a billion laughs",
        pickled(
            text("x"),
            call("torch._utils._rebuild_tensor_v3", b"N", b"K\0", b")", b")", b"\x89", b"N", doubled(60)),
        ),
        refused="no element type",
    ),
    Attack("pickle of nested lists", pickled(nested(b"](", b"e", 8_000))),
    Attack(
        "pickle of nested dicts with a tensor",
        pickled(text("deep"), b"}(X\1\0\0\0a" * 10_000 + tensor() + b"u" * 10_000),
        refused="limit depth = 100",
    ),
    Attack(
        "pickle of nested objects", pickled(text("deep"), b"cnet\nThing\n" * 5_000 + b")R" + b"\x85R" * 4_999)
    ),
    Attack("pickle that holds itself", pickled(text("ring"), b"]" + put(1) + get(1) + b"a")),
    Attack("pickle with a memo of 2^31", pickled(text("far"), b"]r\xff\xff\xff\x7f")),
    Attack("pickle that recalls nothing", pickled(text("far"), b"h\x07"), refused="not a well-formed pickle"),
    Attack("pickle of marks", whole(b"\x80\x02" + b"(" * 20_000 + b"."), refused="not a well-formed pickle"),
    Attack("pickle of copies", whole(b"\x80\x02N" + b"2" * 20_000 + b"."), refused="holds no tensors"),
    Attack(
        "pickle of many opcodes",
        whole(b"\x80\x02" + b"N0" * 50_000 + b"."),
        refused="limit opcodes = 60,000",
        options=("--limit", "opcodes=60_000"),
    ),
    Attack(
        "pickle of too many opcodes",
        whole(b"\x80\x02" + b"N0" * 2_000_000 + b"."),
        refused="limit opcodes = 4,000,000",
        seconds=60,
        slow=True,
    ),
    Attack("pickle of 20 000 entries", pickled(text("large"), entries(20_000))),
    Attack("pickle of a million entries", pickled(text("large"), entries(1_000_000)), seconds=60, slow=True),
    Attack(
        "pickle of 3.9 million tuples",
        pickled(text("deep"), b")" + b"\x85" * 3_900_000),
        seconds=200,
        slow=True,
    ),
    Attack(
        "pickle of 3.9 million sets",
        pickled(text("sets"), b"](" + b"\x8f" * 3_900_000 + b"e"),
        seconds=200,
        slow=True,
    ),
    Attack(
        "pickle of many keys that are one",
        pickled(text("same"), b"}(" + (integer(7) + b"N") * 20_000 + b"u"),
    ),
    Attack(
        "pickle of keys that collide",
        pickled(
            text("slow"), b"}(" + b"".join(integer((2**61 - 1) * n) + b"N" for n in range(1, 100_000)) + b"u"
        ),
        refused="a key is an integer of more than 64 bits",
    ),
    Attack("pickle of empty sets", pickled(text("sets"), b"](" + b"\x8f" * 20_000 + b"e")),
    Attack(
        "pickle of objects",
        pickled(text("objects"), b"cnet\nThing\n" + put(1) + b"0](" + (get(1) + b")R") * 10_000 + b"e"),
    ),
    Attack("pickle of empty dicts", pickled(text("dicts"), b"](" + b"}" * 20_000 + b"e")),
    Attack("pickle of a large part in many places", pickled(shared_state(3_000, 3_000))),
    Attack(
        "pickle of long names", pickled(long_path(1_000_000, 1_000)), refused="limit name_bytes", seconds=60
    ),
    Attack(
        "pickle of dicts that share a tensor",
        pickled(
            text("spare"),
            b"}(" + text("t") + tensor() + b"u" + put(100),
            text("more"),
            b"".join(
                b"}(" + text("a") + get(100 + n) + text("b") + get(100 + n) + b"u" + put(101 + n) + b"0"
                for n in range(40)
            )
            + get(140),
        ),
        refused="limit names = 5,000",
        options=("--limit", "names=5000"),
    ),
    Attack("pickle without an end", whole(b"\x80\x02N"), refused="not a well-formed pickle"),
    Attack("pickle without a beginning", whole(b""), refused="not a well-formed pickle"),
    Attack(
        "pickle of a bytearray of 2^60 bytes",
        pickled(text("n"), b"\x96" + struct.pack("<Q", 2**60)),
        refused="not a well-formed pickle",
    ),
    Attack(
        "pickle of a size that is a number",
        pickled(text("n"), call("torch.Size", integer(1))),
        refused="bad arguments for torch.Size",
    ),
    # --- numbers
    Attack(
        "pickle of an integer of 2^31 bytes",
        pickled(text("n"), b"\x8b\xff\xff\xff\x7f" + b"\1" * 100),
        refused="not a well-formed pickle",
    ),
    Attack(
        "pickle of an integer of 1 MB",
        pickled(text("n"), b"\x8b" + struct.pack("<i", 10**6) + b"\1" * 10**6),
        refused="limit integer_bytes = 1,024",
    ),
    Attack(
        "pickle of a decimal of 1 MB",
        pickled(text("n"), b"L" + b"9" * 10**6 + b"L\n"),
        refused="not a well-formed pickle",
    ),
    Attack(
        "pickle of a negative length",
        pickled(text("n"), b"\x8b\xff\xff\xff\xff"),
        refused="not a well-formed pickle",
    ),
    Attack(
        "pickle of a text of 2^60 bytes",
        pickled(b"\x8d" + struct.pack("<Q", 2**60), b"N"),
        refused="not a well-formed pickle",
    ),
    Attack(
        "pickle of bytes of 2^40 zeros",
        pickled(text("n"), call("builtins.bytes", integer(2**40))),
        refused="bytes are built from something else",
    ),
    Attack(
        "pickle of a range of 2^60",
        pickled(text("n"), call("builtins.list", call("builtins.range", integer(2**60)))),
        refused="a list is built from something else",
    ),
    Attack(
        "pickle of a numpy array of 2^60",
        pickled(
            text("n"),
            call(
                "numpy.core.numeric._frombuffer",
                b"C\4\0\0\0\0",
                call("numpy.dtype", text("f4")),
                integer(2**60) + b"\x85",
                text("C"),
            ),
        ),
        refused="bad arguments for numpy",
    ),
    *(
        Attack(
            f"pickle with a persistent id that is {name}",
            pickled(text("bad"), identity + b"Q"),
            refused="well-formed",
        )
        for name, identity in BAD_PERSISTENT.items()
        if name != "a nested tuple"
    ),
    Attack(
        "pickle with a persistent id that is a nested tuple",
        pickled(text("bad"), BAD_PERSISTENT["a nested tuple"] + b"Q"),
    ),
    Attack("pickle with a text for a persistent id", pickled(text("bad"), b"P1\n"), refused="well-formed"),
    Attack("legacy pickle of a billion laughs", lambda folder: legacy(folder, doubled(60))),
]
