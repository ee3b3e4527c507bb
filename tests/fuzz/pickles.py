"""Mutants of pickles, opcode by opcode."""

from __future__ import annotations

import pickletools
import random
import struct
from typing import Any

from .octets import number, text

#: What the inert reader knows by name, and what an attacker would call.
NAMES = (
    *("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3", "torch._utils._rebuild_tensor"),
    *(
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_qtensor",
        "torch._utils._rebuild_sparse_tensor",
    ),
    *("torch._utils._rebuild_sparse_csr_tensor", "torch._utils._rebuild_nested_tensor", "torch.Size"),
    *("torch._utils._rebuild_meta_tensor_no_storage", "torch._utils._rebuild_wrapper_subclass"),
    *("torch._utils._rebuild_device_tensor_from_numpy", "torch._tensor._rebuild_from_type_v2"),
    *("torch._utils._rebuild_parameter_with_state", "torch.nn.parameter.Parameter", "torch.FloatStorage"),
    *("torch.HalfStorage", "torch.ComplexDoubleStorage", "torch.storage.UntypedStorage", "torch.float32"),
    *("torch.jit._pickle.build_intlist", "torch.jit._pickle.restore_type_tag", "torch.per_channel_affine"),
    *(
        "collections.OrderedDict",
        "collections.defaultdict",
        "builtins.set",
        "builtins.list",
        "builtins.bytes",
    ),
    *(
        "builtins.dict",
        "builtins.tuple",
        "builtins.bytearray",
        "builtins.eval",
        "builtins.getattr",
        "os.system",
    ),
    *("subprocess.Popen", "copyreg._reconstructor", "copyreg.__newobj__", "_codecs.encode", "numpy.dtype"),
    *(
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy._core.numeric._frombuffer",
    ),
    *("torch.nn.modules.conv.Conv2d", "torch.nn.modules.container.Sequential", "torch.fx.graph_module.X"),
)
_SNIPPETS = (
    *(
        b"(",
        b")",
        b"]",
        b"}",
        b"N",
        b"\x88",
        b"0",
        b"1",
        b"2",
        b"t",
        b"l",
        b"d",
        b"R",
        b"b",
        b"o",
        b"\x81",
        b"\x92",
    ),
    *(
        b"a",
        b"e",
        b"s",
        b"u",
        b"Q",
        b"\x85",
        b"\x86",
        b"\x87",
        b"\x8f",
        b"\x90",
        b"\x91",
        b"\x93",
        b"\x94",
        b".",
    ),
    *(b"\x97", b"\x98", b"\x82\x01", b"\x83\x01\x02", b"\x84\x01\x00\x00\x00", b"\x80\x02", b"\x80\xff"),
    *(
        b"Vx\\ud800\n",
        b"I01\n",
        b"I99999999999999999999\n",
        b"L7L\n",
        b"F1e999\n",
        b"Fnan\n",
        b"S'a\\x41'\n",
        b"P7\n",
    ),
    *(
        b"g0\n",
        b"p0\n",
        b"h\x00",
        b"q\x00",
        b"j\xff\xff\xff\x7f",
        b"r\xff\xff\xff\xff",
        b"G\x7f\xf8\0\0\0\0\0\0",
    ),
    *(b"\x8a\x00", b"\x8b\x04\x00\x00\x00\xff\xff\xff\x7f", b"\x8b\xff\xff\xff\xff", b"\x95" + b"\xff" * 8),
    *(
        b"\x95\x10\0\0\0\0\0\0\0",
        b"\x96\x04\0\0\0\0\0\0\0abcd",
        b"\x8e\xff\xff\xff\xff\0\0\0\0",
        b"X\xff\xff\xff\x7f",
    ),
    *(b"\x8c\x02ab", b"ccopy_reg\n_reconstructor\n", b"c\n\n", b"ios\nsystem\n"),
)
Op = tuple[str, Any, bytes]


def operations(data: bytes) -> tuple[list[Op], bytes]:
    """Return the opcodes of a pickle (name, argument, bytes) and what follows it.

    Raises:
        ValueError: If it is no pickle.
    """
    found = []
    try:
        for opcode, argument, at in pickletools.genops(data):
            found.append((opcode.name, argument, at))
    except Exception as error:
        raise ValueError(str(error)) from error
    ends = [*(at for _, _, at in found[1:]), found[-1][2] + 1]
    ops = [(name, argument, data[at:end]) for (name, argument, at), end in zip(found, ends, strict=True)]
    return ops, data[ends[-1] :]


def mutate_pickle(data: bytes, rng: random.Random, donor: list[Op]) -> tuple[bytes, str]:
    """Return a changed pickle (whatever follows it is kept) and what was done.

    Raises:
        ValueError: If it is no pickle.
    """
    ops, rest = operations(data)
    at = rng.randrange(len(ops))
    length = min(rng.choice((1, 1, 1, 2, 3, 5, 20)), len(ops) - at)
    match rng.randrange(11):
        case 0:
            what = f"delete {_names(ops[at : at + length])}"
            del ops[at : at + length]
        case 1:
            what = f"repeat {_names(ops[at : at + length])}"
            ops[at:at] = ops[at : at + length]
        case 2:
            other = rng.randrange(len(ops))
            ops[at], ops[other] = ops[other], ops[at]
            what = f"swap {ops[other][0]} with {ops[at][0]} of {other}"
        case 3 | 4 | 5 | 6:
            at, what = _change(ops, rng)
        case 7 | 8:
            pieces = [_snippet(rng) for _ in range(rng.choice((1, 1, 2, 3)))]
            ops[at:at] = [("", None, piece) for piece in pieces]
            what = f"put in {b''.join(pieces)[:60]!r}"
        case 9:
            piece, count = rng.choice(
                ((b"]", 1), (b"\x85", 1), (b"(", 1), (b"2", 1), (b"}\x86", 2), (b"]a", 2))
            )
            count = int(10 ** rng.uniform(0.5, 4.5)) // count
            ops[at:at] = [("", None, piece * count)]
            what = f"put in {count} times {piece!r}"
        case _:
            other = rng.randrange(len(donor)) if donor else 0
            ops[at : at + length] = donor[other : other + rng.choice((1, 3, 10, 50))]
            what = f"replace {length} by the other pickle's from {other}"
    return b"".join(piece for _, _, piece in ops) + rest, f"opcode {at}: {what}"


def _names(ops: list[Op]) -> str:
    return "+".join(name for name, _, _ in ops[:4])


def _change(ops: list[Op], rng: random.Random) -> tuple[int, str]:
    """Change the argument of one opcode, kinds of arguments with equal weight."""
    kinds: dict[str, list[int]] = {}
    for index, (name, argument, _) in enumerate(ops):
        if argument is not None and "PUT" not in name and name not in ("PROTO", "FRAME"):
            kind = (
                "call" if name in ("GLOBAL", "INST") else "memo" if "GET" in name else type(argument).__name__
            )
            kinds.setdefault(kind, []).append(index)
    if not kinds:
        return 0, "nothing to change"
    kind = rng.choice(sorted(kinds))
    at = rng.choice(kinds[kind])
    name, argument, _ = ops[at]
    new: Any
    if kind == "call":
        new = rng.choice(NAMES)
        piece = f"c{new.rpartition('.')[0]}\n{new.rpartition('.')[2]}\n".encode()
    elif kind == "memo":
        new = max(rng.choice((argument + 1, argument - 1, rng.randrange(argument + 9), 2**31 - 1)), 0)
        piece = b"j" + struct.pack("<I", new)
    elif kind == "int":
        new = number(rng, argument)
        size = (new.bit_length() + 8) // 8
        piece = b"\x8a" + bytes([size]) + new.to_bytes(size, "little", signed=True)
    elif kind == "str":
        new = text(rng, [other for _, other, _ in ops if isinstance(other, str)])
        coded = new.encode("utf-8", "surrogatepass")
        piece = b"X" + struct.pack("<I", len(coded)) + coded
    elif kind == "float":
        new = rng.choice((0.0, -1.0, 1e308, 1e-320, float("nan"), float("inf")))
        piece = b"G" + struct.pack(">d", new)
    else:
        new = rng.randbytes(rng.choice((0, 1, 8, 300)))
        piece = b"T" + struct.pack("<i", len(new)) + new
    ops[at] = (name, new, piece)
    return at, f"{name} {str(argument)[:40]!r} -> {str(new)[:40]!r}"


def _snippet(rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        module, _, name = rng.choice(NAMES).rpartition(".")
        return f"c{module}\n{name}\n".encode() + rng.choice(
            (b"", b")R", b")\x81", b"}b", b"(I1\nI2\ntR", b"(tR")
        )
    return rng.choice(_SNIPPETS)
