"""Adapters: low-rank (LoRA, LoCon), Hadamard (LoHa) and Kronecker (LoKr) updates ΔW of weights elsewhere.

Each becomes one row of kind ``lora``. Its key is the name of the factor that is applied last (``lora_B``, ``up``, …)
and its ``weights`` are all factors in order of application. A product of two matrices is never formed: the region
applies one after the other. The names of PEFT, kohya, LyCORIS, diffusers, loralib and cloneofsimo are known.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING

from spectool.graph.alpha import Scale, adapter_scale
from spectool.graph.effective import Effective, Found, Read
from spectool.graph.rows import INFINITE_PLAIN, UNGROUPED, Step, region
from spectool.graph.types import Conv, Linear, Op, Shape, Skipped
from spectool.linear.geometry import ConvGeometry

if TYPE_CHECKING:
    from torch import Tensor

    from spectool.checkpoint.types import Checkpoint, TensorRef

_PATTERNS = {
    "peft": r"^(?P<base>.+)\.lora_(?P<role>A|B)(?P<tail>(?:\.(?!weight$)[^.]+)?(?:\.weight)?)$",
    "embedding": r"^(?P<base>.+)\.lora_embedding_(?P<role>A|B)(?P<tail>(?:\.[^.]+)?)$",
    "kohya": r"^(?P<base>.+)\.lora_(?P<role>up|down|mid)(?P<tail>\.weight)$",
    "diffusers": r"^(?P<base>.*lora[^.]*)\.(?P<role>up|down|mid)(?P<tail>\.weight)$",
    "cloneofsimo": r"^(?P<base>.+:\d+):(?P<role>up|down)(?P<tail>)$",
    "loha": r"^(?P<base>.+)\.hada_(?P<role>w1_a|w1_b|w2_a|w2_b|t1|t2)(?P<tail>)$",
    "lokr": r"^(?P<base>.+)\.lokr_(?P<role>w1|w1_a|w1_b|w2|w2_a|w2_b|t2)(?P<tail>)$",
}
_ROLES = {"A": "down", "B": "up"}
_TUCKER = "ij...,ip,jr->pr..."  # core (r, r, *k), left (r, out), right (r, in) -> (out, in, *k)

Members = Mapping[str, str]


def find_adapters(checkpoint: Checkpoint, free: Collection[str]) -> Iterator[Found]:
    """Yield the adapters of a file, each as one row.

    Args:
        checkpoint: The file; its metadata may hold alpha.
        free: Names that no other finder has taken.

    **Source:** Hu et al. 2021 (LoRA); Kalajdzievski 2023 (rsLoRA); Yeh et al. 2023 (LyCORIS).
    """
    patterns = {family: re.compile(pattern) for family, pattern in _PATTERNS.items()}
    groups: dict[tuple[str, str, str], dict[str, str]] = {}
    for name in checkpoint.tensors:
        if name not in free:
            continue
        for family, pattern in patterns.items():
            if match := pattern.match(name):
                role = _ROLES.get(match["role"], match["role"])
                groups.setdefault((family, match["base"], match["tail"]), {})[role] = name
                break
    for (family, base, tail), members in groups.items():
        found = _adapter(checkpoint, family, base, tail, members)
        if found is not None:
            yield found


def _adapter(checkpoint: Checkpoint, family: str, base: str, tail: str, members: Members) -> Found | None:
    tensors = checkpoint.tensors
    roles = set(members)
    extra = (f"{base}.dora_scale", f"{base}.lora_magnitude_vector{tail}", f"{base}.lora_magnitude_vector")
    magnitude = tuple(name for name in extra if name in tensors)
    alpha = (f"{base}.alpha",) if f"{base}.alpha" in tensors else ()
    used = (*members.values(), *magnitude, *alpha)
    # The magnitude of DoRA rescales W + ΔW, which takes the base weights; what is left is ΔW itself.
    said = ("DoRA magnitude not applied",) if magnitude else ()
    if family == "loha":
        made = _hadamard(checkpoint, base, members, said)
    elif family == "lokr":
        made = _kronecker(checkpoint, base, members, said)
    elif roles >= {"up", "down"}:
        made = _low_rank(checkpoint, base, members, said)
    else:
        return None  # half a pair: its tensor goes by its own name and shape
    if made is None:
        shapes = tuple(tensors[name].shape for name in members.values())
        reason = "an adapter whose factors do not fit each other"
        return Found(used, item=Skipped(_last(members), "lora", tuple(members.values()), shapes, reason))
    step, constants = made
    return Found(used, item=region([step]), constants=constants)


def _last(members: Members) -> str:
    """Return the factor that names the row: the one applied last, else the first in file order."""
    for role in ("up", "w1_a", "w1"):
        if role in members:
            return members[role]
    return next(iter(members.values()))


def _low_rank(
    checkpoint: Checkpoint, base: str, members: Members, said: tuple[str, ...]
) -> tuple[Step, tuple[Effective, ...]] | None:
    tensors = checkpoint.tensors
    up, down, mid = members["up"], members["down"], members.get("mid", "")
    a, b = tensors[down].shape, tensors[up].shape
    if len(a) != len(b) or len(a) < 2 or 0 in (*a, *b) or a[0] != (tensors[mid].shape[1] if mid else b[1]):
        return None
    scale = adapter_scale(checkpoint, base, a[0])
    order = (down, mid, up) if mid else (down, up)
    if len(a) == 2 and not mid:
        scaled = _scaled(up, b, scale)
        ops: tuple[tuple[Op, tuple[str, ...]], ...] = (
            (Linear(), (down,)),
            (Linear(), (scaled.name if scaled else up,)),
        )
        step = _row(tensors, ops, order, (a[1],), (b[0],), scale, said)
        return step, (scaled,) if scaled else ()
    core = tensors[mid].shape[2:] if mid else ()
    kernels = [shape[2:] for shape in (a, b) if prod(shape[2:]) != 1] + ([core] if core else [])
    # Kernels of one tap merge into any other; two larger ones would make a larger kernel, which no file has.
    if len(kernels) > 1 or not 3 <= len(a) <= 5:
        return None
    kernel = kernels[0] if kernels else (1,) * (len(a) - 2)

    def build(read: Read) -> Tensor:
        import torch

        factors = [read(name).double() for name in reversed(order)]
        product = factors[0]
        for factor in factors[1:]:
            # Broadcasting over taps is right since at most one factor has more than one.
            product = torch.einsum("or...,ri...->oi...", product, factor)
        return product * scale.read(read)

    delta = Effective(f"{up} ∘ {down}", (b[0], a[1], *kernel), order, build, "an adapter's product")
    ops = ((Conv(ConvGeometry.plain(len(a) - 2)), (delta.name,)),)
    return _row(tensors, ops, order, None, None, scale, (*said, INFINITE_PLAIN, UNGROUPED)), (delta,)


def _scaled(up: str, shape: Shape, scale: Scale) -> Effective | None:
    """Return the factor applied last times alpha/r; None if that is 1."""
    if scale.trivial:
        return None

    def build(read: Read) -> Tensor:
        return read(up).double() * scale.read(read)

    def invert(wanted: Tensor, read: Read) -> dict[str, Tensor]:
        return {up: wanted.double() / scale.read(read)}

    return Effective(f"{up} · alpha/r", shape, (up,), build, scale.words, invert=invert)


def _hadamard(
    checkpoint: Checkpoint, base: str, members: Members, said: tuple[str, ...]
) -> tuple[Step, tuple[Effective, ...]] | None:
    """(A₁B₁) ⊙ (A₂B₂), each product with a Tucker core for kernels."""
    tensors = checkpoint.tensors
    tucker = {"t1", "t2"} <= set(members)
    if not {"w1_a", "w1_b", "w2_a", "w2_b"} <= set(members) or tucker != bool({"t1", "t2"} & set(members)):
        return None
    shape = {role: tensors[name].shape for role, name in members.items()}
    kernel = shape["t1"][2:] if tucker else ()
    left = 1 if tucker else 0
    wholes = set()
    for w in ("1", "2"):
        a, b = shape[f"w{w}_a"], shape[f"w{w}_b"]
        if len(a) != 2 or len(b) != 2 or not _meet(a, b, shape.get(f"t{w}")):
            return None
        wholes.add((a[left], b[1], *kernel))
    if len(wholes) != 1:
        return None
    whole = wholes.pop()
    scale = adapter_scale(checkpoint, base, shape["w1_b"][0])

    def build(read: Read) -> Tensor:
        one = _product(read, members["w1_a"], members["w1_b"], members.get("t1"))
        two = _product(read, members["w2_a"], members["w2_b"], members.get("t2"))
        return one * two * scale.read(read)

    order = tuple(members[role] for role in ("w1_b", "t1", "w1_a", "w2_b", "t2", "w2_a") if role in members)
    return _dense(tensors, members["w1_a"], whole, order, build, scale, said)


def _kronecker(
    checkpoint: Checkpoint, base: str, members: Members, said: tuple[str, ...]
) -> tuple[Step, tuple[Effective, ...]] | None:
    """W₁ ⊗ W₂, each stored whole or as a product."""
    tensors = checkpoint.tensors
    shape = {role: tensors[name].shape for role, name in members.items()}
    for w in ("w1", "w2"):
        if w not in members and not {f"{w}_a", f"{w}_b"} <= set(members):
            return None
        core = shape.get("t2") if w == "w2" else None
        if w not in members and not _meet(shape[f"{w}_a"], shape[f"{w}_b"], core):
            return None
    one = shape["w1"] if "w1" in shape else (shape["w1_a"][0], shape["w1_b"][1])
    if "w2" in shape:
        two = shape["w2"]
    elif "t2" in shape:
        two = (shape["w2_a"][1], shape["w2_b"][1], *shape["t2"][2:])
    else:
        two = (shape["w2_a"][0], *shape["w2_b"][1:])
    if len(one) != 2 or not 2 <= len(two) <= 5:
        return None
    whole = (one[0] * two[0], one[1] * two[1], *two[2:])
    rank = next((shape[role][0] for role in ("w2_b", "w1_b") if role in shape), 0)
    # With both factors whole there is no rank, and LyCORIS counts the product as it is.
    scale = adapter_scale(checkpoint, base, rank) if rank else Scale(1)

    def factor(read: Read, w: str) -> Tensor:
        if w in members:
            return read(members[w]).double()
        return _product(read, members[f"{w}_a"], members[f"{w}_b"], members.get("t2") if w == "w2" else None)

    def build(read: Read) -> Tensor:
        import torch

        first = factor(read, "w1")
        second = factor(read, "w2")
        first = first.reshape(*first.shape, *(1,) * (second.dim() - 2))
        return torch.kron(first, second.contiguous()) * scale.read(read)

    roles = ("w2_b", "t2", "w2_a", "w2", "w1_b", "w1_a", "w1")
    order = tuple(members[role] for role in roles if role in members)
    return _dense(tensors, _last(members), whole, order, build, scale, said)


def _meet(a: Shape, b: Shape, core: Shape | None) -> bool:
    """Return whether two factors, and the core between them if there is one, have inner sizes that agree."""
    if len(a) != 2 or len(b) < 2:
        return False
    return a[1] == b[0] if core is None else len(b) == 2 and core[:2] == (a[0], b[0])


def _product(read: Read, left: str, right: str, core: str | None) -> Tensor:
    import torch

    a, b = read(left).double(), read(right).double()
    if core is not None:
        return torch.einsum(_TUCKER, read(core).double(), a, b)
    return torch.einsum("or,ri...->oi...", a, b)


def _dense(
    tensors: Mapping[str, TensorRef],
    key: str,
    shape: Shape,
    order: tuple[str, ...],
    build: Callable[[Read], Tensor],
    scale: Scale,
    said: tuple[str, ...],
) -> tuple[Step, tuple[Effective, ...]]:
    """Return the row of a ΔW that has to be formed, and the constant it reads."""
    delta = Effective(f"{key} (ΔW)", shape, order, build, "an adapter's product")
    if len(shape) == 2:
        step = _row(tensors, ((Linear(), (delta.name,)),), order, (shape[1],), (shape[0],), scale, said, key)
    else:
        op = Conv(ConvGeometry.plain(len(shape) - 2))
        assumed = (*said, INFINITE_PLAIN, UNGROUPED)
        step = _row(tensors, ((op, (delta.name,)),), order, None, None, scale, assumed, key)
    return step, (delta,)


def _row(
    tensors: Mapping[str, TensorRef],
    ops: tuple[tuple[Op, tuple[str, ...]], ...],
    order: tuple[str, ...],
    in_shape: Shape | None,
    out_shape: Shape | None,
    scale: Scale,
    assumed: tuple[str, ...],
    key: str = "",
) -> Step:
    return Step(
        ops=ops,
        key=key or order[-1],
        kind="lora",
        weights=order,
        weight_shapes=tuple(tensors[name].shape for name in order),
        in_shape=in_shape,
        out_shape=out_shape,
        operators=1,
        assumed=(*assumed, *scale.assumed),
        note=f"update ΔW, {scale.words}",
    )
