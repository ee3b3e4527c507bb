"""Quantised weights: what the file alone says about their values, and what it does not.

Every scheme stores whole numbers (or an 8-bit float) with scales beside them. The rules here follow the published
layouts; a scheme without a rule makes a skipped row that names it. Each effective weight is exactly the stored
numbers times the stored scales: float32 where that holds their product, else float64.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from spectool.graph import packed
from spectool.graph.effective import Effective, Found, Read, is_floating
from spectool.graph.types import Shape, Skipped

if TYPE_CHECKING:
    from torch import Tensor

    from spectool.checkpoint.types import Checkpoint, TensorRef

_BLOCK = 128  # edge of the square blocks of DeepSeek-style float8 weights, where shapes leave a choice
_SCALES = ("weight_scale_inv", "weight_scale", "scale_weight")

# Leaf name that gives a scheme away → the scheme. None of these can be read from the tensors alone, or no rule
# is written for it yet.
_UNREAD = {
    "W_q": "HQQ",
    "codebooks": "AQLM",
    "Qidxs": "QuIP#",
    "q_weight": "EXL2 (exllamav2)",
    "trellis": "EXL3 (exllamav3)",
    "_packed_params": "torch's packed quantised modules",
    "lut": "a look-up table (SqueezeLLM)",
    "oweight": "OWQ",
}
Scheme = Callable[["Checkpoint", str, Mapping[str, str]], "Found | None"]


def find_quantised(checkpoint: Checkpoint, free: Collection[str]) -> Iterator[Found]:
    """Yield the quantised weights of a file.

    Args:
        checkpoint: The file; its metadata may hold ``quantization_config``.
        free: Names that no other finder has taken.
    """
    groups: dict[str, dict[str, str]] = {}
    for name, ref in checkpoint.tensors.items():
        if name in free and ref.dtype.startswith("q") and len(ref.shape) > 1:
            yield _torch_quantised(checkpoint, ref)
        elif name in free:
            owner, _, leaf = name.rpartition(".")
            groups.setdefault(owner, {})[leaf] = name
    for owner, leaves in groups.items():
        prefix = f"{owner}." if owner else ""
        stacks = [leaf.removesuffix("_blocks") for leaf in leaves if leaf.endswith("_blocks")]
        for stack in stacks:
            if f"{stack}_scales" in leaves:
                found = packed.mxfp4(checkpoint, prefix, stack, leaves)
                yield found or _unread(checkpoint, prefix, leaves, "MXFP4", stack)
        if "qweight" in leaves:
            yield (
                packed.gptq(checkpoint, prefix, leaves)
                or packed.awq(checkpoint, prefix, leaves)
                or _unread(checkpoint, prefix, leaves, "an unknown qweight layout", "qweight")
            )
        elif "weight_packed" in leaves:
            found = packed.compressed(checkpoint, prefix, leaves)
            yield found or _unread(
                checkpoint, prefix, leaves, "compressed-tensors of this kind", "weight_packed"
            )
        elif "weight" in leaves:
            yield from _weight(checkpoint, prefix, leaves, groups)
        for leaf, scheme in _UNREAD.items():
            if leaf in leaves:
                yield _unread(checkpoint, prefix, leaves, scheme, leaf)


def _weight(
    checkpoint: Checkpoint, prefix: str, leaves: Mapping[str, str], groups: Mapping[str, Mapping[str, str]]
) -> Iterator[Found]:
    """Yield what a tensor called ``weight`` is, if anything but itself."""
    ref = checkpoint.tensors[leaves["weight"]]
    inside = groups.get(ref.name, {})  # bitsandbytes puts its state under the weight's own name
    if any(leaf.startswith("quant_state.") or leaf == "absmax" for leaf in inside) or any(
        name.startswith("bitsandbytes__") for name in groups.get(f"{ref.name}.quant_state", {})
    ):
        members = {**inside, **groups.get(f"{ref.name}.quant_state", {})}
        found = packed.bitsandbytes_4bit(checkpoint, ref, members)
        yield found or _unread(checkpoint, prefix, leaves, "bitsandbytes 4-bit without its state", "weight")
        return
    if ref.dtype == "int8" and "SCB" in leaves:
        yield _rowwise_int8(checkpoint, prefix, leaves)
        return
    scale = next((leaf for leaf in _SCALES if leaf in leaves), None)
    small = ref.dtype in ("int8", "uint8") or ref.dtype.startswith("float8")
    if scale is not None and small:
        yield _scaled(checkpoint, prefix, leaves, scale)
    elif len(ref.shape) > 1 and not is_floating(ref.dtype) and not ref.dtype.startswith(("bool", "complex")):
        yield _unread(checkpoint, prefix, leaves, f"{ref.dtype} without a scale", "weight")


def _unread(checkpoint: Checkpoint, prefix: str, leaves: Mapping[str, str], scheme: str, leaf: str) -> Found:
    """Return the skipped row of a scheme that is not dequantised."""
    members = (leaves[leaf], *(name for other, name in leaves.items() if other != leaf and other != "bias"))
    shapes = tuple(checkpoint.tensors[name].shape for name in members)
    reason = f"quantised weights are not read from {scheme}"
    return Found(members, item=Skipped(leaves[leaf], "linear", members, shapes, reason))


def _torch_quantised(checkpoint: Checkpoint, ref: TensorRef) -> Found:
    """W = (q − zero_point)·scale of a quantised torch tensor, for the whole or per index of one axis."""
    facts = checkpoint.metadata.get("quantization", {}).get(ref.name, {})
    axis = facts.get("axis")
    if not {"scale", "zero_point"} <= set(facts) or ref.dtype.startswith("quint4") or ref.dtype == "quint2x4":
        return _unread(checkpoint, "", {"weight": ref.name}, f"{ref.dtype} without a scale", "weight")

    def build(read: Read) -> Tensor:
        import torch

        def values(fact: Any) -> Tensor:
            reader = checkpoint.reader
            tensor = (
                torch.as_tensor(fact) if isinstance(fact, (int, float)) or reader is None else reader(fact)
            )
            per_axis = tensor.numel() > 1 and axis is not None
            shape = [-1 if per_axis and at == axis else 1 for at in range(len(ref.shape))]
            return tensor.double().reshape(shape)

        return (read(ref.name).double() - values(facts["zero_point"])) * values(facts["scale"])

    return Found((ref.name,), weight=Effective(ref.name, ref.shape, (ref.name,), build, f"torch {ref.dtype}"))


def _rowwise_int8(checkpoint: Checkpoint, prefix: str, leaves: Mapping[str, str]) -> Found:
    """W = q·SCB/127 per output row.

    **Source:** Dettmers et al. 2022 (LLM.int8()), section 2.1: row-wise absolute maximum.
    """
    weight, scale = leaves["weight"], leaves["SCB"]
    shape = checkpoint.tensors[weight].shape
    used = [weight, scale]
    if "weight_format" in leaves:
        used.append(leaves["weight_format"])
        if int(checkpoint.read(leaves["weight_format"]).reshape(-1)[0]) != 0:
            return _unread(checkpoint, prefix, leaves, "int8 in a tiled GPU layout (bitsandbytes)", "weight")
    if checkpoint.tensors[scale].numel != shape[0]:
        return _unread(
            checkpoint, prefix, leaves, "int8 with scales of another shape (bitsandbytes)", "weight"
        )

    def build(read: Read) -> Tensor:
        rows = (read(scale).double() / 127).reshape(-1, *(1,) * (len(shape) - 1))
        return read(weight) * rows

    return Found(tuple(used), weight=Effective(weight, shape, (weight, scale), build, "bitsandbytes int8"))


def _scaled(checkpoint: Checkpoint, prefix: str, leaves: Mapping[str, str], leaf: str) -> Found:
    """W = (q − zero)·scale, the scale for the tensor, a row, or a block."""
    weight, scale, zero = leaves["weight"], leaves[leaf], leaves.get("weight_zero_point", "")
    ref, scales = checkpoint.tensors[weight], checkpoint.tensors[scale]
    blocks = _blocks(ref, scales)
    if blocks is None or (zero and checkpoint.tensors[zero].shape != scales.shape):
        return _unread(
            checkpoint, prefix, leaves, f"{ref.dtype} with scales of shape {scales.shape}", "weight"
        )

    def spread(tensor: Tensor) -> Tensor:
        values = tensor.reshape(blocks[0])
        for axis, (size, edge) in enumerate(zip(ref.shape, blocks[1], strict=True)):
            if edge > 1 and values.shape[axis] > 1:
                values = values.repeat_interleave(edge, dim=axis).narrow(axis, 0, size)
        return values

    def build(read: Read) -> Tensor:
        values = read(weight).float()
        if zero:
            values = values - spread(read(zero).float())
        return values * spread(packed.exact(read(scale)))

    sources = (weight, scale, zero) if zero else (weight, scale)
    other = tuple(leaves[name] for name in ("input_scale", "scale_input", "weight_shape") if name in leaves)
    how = f"{ref.dtype} times {leaf}"
    return Found((*sources, *other), weight=Effective(weight, ref.shape, sources, build, how))


def _blocks(weight: TensorRef, scale: TensorRef) -> tuple[Shape, tuple[int, ...]] | None:
    """Return the shape that scales broadcast from and the edge of a block per axis; None if they do not fit."""
    shape = weight.shape
    rank = len(shape)
    if prod(scale.shape) == 1:
        return (1,) * rank, (1,) * rank
    counts = scale.shape
    if len(counts) == 1 and counts[0] == shape[0]:
        counts = (*counts, *(1,) * (rank - 1))
    if len(counts) != rank:
        return None
    edges = []
    for size, count in zip(shape, counts, strict=True):
        if count in (1, size):
            edges.append(1)
        elif -(-size // _BLOCK) == count:
            edges.append(_BLOCK)
        elif count and size % count == 0:
            edges.append(size // count)
        else:
            return None
    return counts, tuple(edges)
