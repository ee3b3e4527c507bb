"""Damage that knows nothing of the bytes it is done to."""

from __future__ import annotations

import random

#: Whole numbers at which parsers break.
NUMBERS = (
    *(
        0,
        1,
        2,
        3,
        4,
        7,
        8,
        15,
        16,
        31,
        63,
        64,
        100,
        127,
        128,
        255,
        256,
        1000,
        4095,
        4096,
        32767,
        32768,
        65535,
    ),
    *(65536, 10**6, 2**24, 2**27, 2**30, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**33, 10**12, 2**48, 2**53),
    *(2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -1, -2, -8, -128, -(2**31), -(2**63)),
)
#: Texts at which parsers break.
TEXTS = (
    *(
        "",
        " ",
        ".",
        "..",
        "/",
        "\\",
        "\0",
        "\n",
        "a\nb",
        "=1+1",
        "é",
        "\U0001f600",
        "\ud800",
        "x" * 5000,
        "0",
        "-1",
    ),
    *(
        "nan",
        "1e999",
        "None",
        "weight",
        "bias",
        "__proto__",
        "../../etc/passwd",
        "C:\\x",
        "<script>",
        "%s%n",
        "{}",
    ),
)


def number(rng: random.Random, old: int | None = None) -> int:
    """Return a number that is likely to hurt, often one near the old one."""
    if old is not None and rng.random() < 0.5:
        near = (
            old + 1,
            old - 1,
            2 * old,
            old // 2,
            -old,
            old ^ (1 << rng.randrange(16)),
            old + 2**32,
            old * 1000,
        )
        return rng.choice(near)
    return rng.choice(NUMBERS) if rng.random() < 0.85 else rng.randrange(-5, 300)


def text(rng: random.Random, others: list[str] | None = None) -> str:
    """Return a text that is likely to hurt, often one of ``others``."""
    if others and rng.random() < 0.5:
        return rng.choice(others)
    return rng.choice(TEXTS)


def place(rng: random.Random, size: int) -> int:
    """Return a position in ``size`` bytes; headers and trailers get more than their share."""
    if size == 0:
        return 0
    edge = min(size, 4096)
    where = rng.random()
    if where < 0.4:
        return rng.randrange(edge)
    return size - 1 - rng.randrange(edge) if where < 0.6 else rng.randrange(size)


def damage(data: bytes, rng: random.Random, donor: bytes = b"") -> tuple[bytes, str]:
    """Return damaged bytes and what was done to them."""
    at = place(rng, len(data))
    length = min(int(2 ** rng.uniform(0, 12)), len(data) - at)
    match rng.randrange(10):
        case 0:
            return data[:at], f"cut at {at}"
        case 1:
            changed = bytearray(data)
            places = sorted({place(rng, len(data)) for _ in range(rng.randint(1, 8))})
            for spot in places if data else ():
                changed[spot] ^= 1 << rng.randrange(8)
            return bytes(changed), f"bits flipped at {places}"
        case 2:
            value = rng.choice((0, 0xFF, 0x80, 0x7F, 0x2E, 0x28, rng.randrange(256)))
            return data[:at] + bytes([value]) + data[at + 1 :], f"byte {at} = {value}"
        case 3:
            width = rng.choice((2, 4, 8))
            order = rng.choice(("little", "big"))
            value = number(rng, int.from_bytes(data[at : at + width], order)) % 2 ** (8 * width)  # type: ignore[arg-type]
            packed = value.to_bytes(width, order)  # type: ignore[arg-type]
            return data[:at] + packed + data[at + width :], f"{width} bytes at {at} = {value} ({order})"
        case 4:
            return data[:at] + data[at + length :], f"{length} bytes deleted at {at}"
        case 5:
            return data[:at] + data[at : at + length] + data[at:], f"{length} bytes repeated at {at}"
        case 6:
            return data[:at] + rng.randbytes(length) + data[at:], f"{length} random bytes put in at {at}"
        case 7:
            filler = bytes([rng.choice((0, 0xFF))]) * length
            return data[:at] + filler + data[at + length :], f"{length} bytes at {at} = {filler[:1]!r}"
        case 8:
            other = place(rng, len(donor))
            return data[:at] + donor[other:], f"from {at} on: the other file from {other} on"
        case _:
            other = place(rng, len(donor))
            block = donor[other : other + max(length, 1)]
            return data[:at] + block + data[
                at + len(block) :
            ], f"{len(block)} bytes at {at}: the other's at {other}"
