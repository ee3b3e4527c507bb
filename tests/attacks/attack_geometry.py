"""Tensors whose offset, shape or stride leaves the storage, repeats it, or overlaps itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attack import WEIGHT, Attack, Build, integer, tensor, text, torch_zip


def view(**geometry: Any) -> Build:
    """A checkpoint in which ``w`` is this view of a storage of 16 elements."""

    def build(folder: Path) -> Path:
        pickled = b"\x80\x02}(" + text("w") + tensor(**geometry) + b"u."
        return torch_zip(folder / "net.pt", pickled, {"0": WEIGHT.tobytes()})

    return build


def beside(*others: bytes) -> Build:
    """A checkpoint with the weight and other views of its storage."""

    def build(folder: Path) -> Path:
        pickled = b"\x80\x02}(" + text("w") + tensor() + b"".join(others) + b"u."
        return torch_zip(folder / "net.pt", pickled, {"0": WEIGHT.tobytes()})

    return build


def retyped(kind: str) -> Build:
    """The weight's storage under another type, once as float32 and once as something else."""
    other = tensor().replace(b"ctorch\nFloatStorage\n", f"ctorch\n{kind}\n".encode())
    return beside(text("other"), other)


SMALL = "small non-negative integers"
ATTACKS = [
    Attack("view one row too long", view(shape=(5, 4)), refused="needs 80 bytes of a storage that has 64"),
    Attack("view one element too far", view(offset=1), refused="needs 68 bytes"),
    Attack("view with a wide stride", view(stride=(5, 1)), refused="needs 76 bytes"),
    Attack("view of 2^62 rows", view(shape=(2**62, 4)), refused="of a storage that has 64"),
    Attack("view of 2^70 rows", view(shape=(2**70, 4)), refused=SMALL),
    Attack(
        "view whose size overflows", view(shape=(2**32, 2**32), stride=(0, 0)), refused="limit expanded_bytes"
    ),
    Attack("view with a negative offset", view(offset=-4), refused=SMALL),
    Attack("view with a negative size", view(shape=(-4, 4)), refused=SMALL),
    Attack("view with a negative stride", view(stride=(-4, 1)), refused=SMALL),
    Attack("view with too few strides", view(stride=(1,)), refused="impossible shape"),
    Attack(
        "view of 100 000 axes",
        view(shape=(1,) * 10**5, stride=(1,) * 10**5),
        refused="impossible shape of 100000",
    ),
    Attack("view of 65 axes", view(shape=(1,) * 65, stride=(1,) * 65), refused="impossible shape of 65 axes"),
    Attack(
        "view of 64 axes of 2^60", view(shape=(2**60,) * 64, stride=(0,) * 64), refused="limit expanded_bytes"
    ),
    Attack(
        "view of a terabyte by stride 0", view(shape=(2**40,), stride=(0,)), refused="limit expanded_bytes"
    ),
    Attack(
        "view of no elements of a size of 2^62",
        beside(text("none"), tensor(shape=(0, 2**62), stride=(1, 1))),
        clip=4,
    ),
    Attack("storage of more elements than its record", view(numel=2**40), refused="its record has 64 bytes"),
    Attack("storage that is not there", view(key="9"), refused="no record 'data/9'"),
    Attack("storage outside its folder", view(key="../data.pkl"), refused=r"no record 'data/\.\./data.pkl'"),
    Attack(
        "storage at an absolute path", view(key="/etc/hostname"), refused="no record 'data//etc/hostname'"
    ),
    Attack("storage of two types", retyped("LongStorage"), refused="is named with two types"),
    Attack(
        "storage of a class that is none", retyped("OrderedDict"), refused="a storage of type 'OrderedDict'"
    ),
    Attack("storage of smaller elements", retyped("HalfStorage"), refused="is named with two types"),
    Attack(
        "storage of two sizes",
        beside(text("some"), tensor(numel=8, shape=(2, 4))),
        refused="is named with two types or sizes",
    ),
    # What a clip writes through such a view it would write several times over.
    Attack("view that repeats its rows", beside(text("rows"), tensor(shape=(4, 4), stride=(0, 1))), clip=4),
    Attack("view whose windows overlap", beside(text("hankel"), tensor(shape=(4, 4), stride=(1, 1))), clip=4),
    Attack(
        "views that overlap each other",
        beside(text("upper"), tensor(shape=(3, 4)), text("halves"), tensor(shape=(2, 8), stride=(8, 1))),
        clip=2,
    ),
    Attack("views that are transposes of each other", beside(text("t"), tensor(stride=(1, 4)))),
    Attack(
        "tensor of 128 bytes and a limit of 60",
        beside(),
        refused="limit tensor_bytes = 60",
        options=("--max-tensor-bytes", "60"),
    ),
    Attack(
        "integer for a shape",
        beside(text("x"), tensor().replace(b"(" + integer(4) * 2 + b"t", integer(4), 1)),
        refused=SMALL,
    ),
]
