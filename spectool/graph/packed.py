"""Weights of four or so bits packed into larger words: GPTQ, AWQ, compressed-tensors, bitsandbytes, MXFP4."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from spectool.graph.effective import Effective, Found, Read
from spectool.graph.types import Shape

if TYPE_CHECKING:
    from torch import Tensor

    from spectool.checkpoint.types import Checkpoint, TensorRef

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds column _AWQ_ORDER[i] of its eight
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

Leaves = Mapping[str, str]


def gptq(checkpoint: Checkpoint, prefix: str, leaves: Leaves) -> Found | None:
    """Return a GPTQ weight: W[o, i] = scales[g, o]·(q[i, o] − zero[g, o]) with g the group of input i.

    Inputs are packed along the rows of ``qweight``, zero points along the columns of ``qzeros``, lowest bits
    first. Version 1 stores zero points less one, modulo 2^bits; version 2 as they are.

    Args:
        checkpoint: The file.
        prefix: What stands before the names, with its dot.
        leaves: Local name → tensor name of one module.

    Returns:
        None if the tensors have another layout (or 3-bit words, which straddle).

    **Source:** Frantar et al. 2022; the AutoGPTQ and GPTQModel checkpoint formats.
    """
    refs = _refs(checkpoint, leaves, ("qweight", "qzeros", "scales"))
    if refs is None:
        return None
    qweight, qzeros, scales = refs
    groups, outputs = scales.shape
    if qweight.shape[1] != outputs or qzeros.shape[0] != groups or (32 * qzeros.shape[1]) % outputs:
        return None
    bits = 32 * qzeros.shape[1] // outputs
    if bits not in (2, 4, 8):
        return None
    inputs = qweight.shape[0] * (32 // bits)
    index = leaves.get("g_idx", "")
    if index and checkpoint.tensors[index].numel != inputs:
        return None
    if (not index and inputs % groups) or {qweight.dtype, qzeros.dtype} != {"int32"}:
        return None
    config = _config(checkpoint)
    version = str(config.get("checkpoint_format", ""))
    shift = 0 if version == "gptq_v2" else 1
    assumed = () if version in ("gptq", "gptq_v2") else ("GPTQ version 1 zero points",)
    names = (qweight.name, qzeros.name, scales.name, *((index,) if index else ()))

    def build(read: Read) -> Tensor:
        import torch

        values = _unpack(read(qweight.name), bits, axis=0)
        zeros = (_unpack(read(qzeros.name), bits, axis=1) + shift) % 2**bits
        group = read(index).int().reshape(-1) if index else torch.arange(inputs) // (inputs // groups)
        result: Tensor = (values - zeros[group]) * exact(read(scales.name))[group]
        return result.T

    weight = Effective(f"{prefix}weight", (outputs, inputs), names, build, f"GPTQ, {bits} bits", assumed)
    return Found(names, weight=weight)


def awq(checkpoint: Checkpoint, prefix: str, leaves: Leaves) -> Found | None:
    """Return an AWQ weight: W[o, i] = scales[g, o]·(q[i, o] − zero[g, o]), four bits, equal groups of inputs.

    Outputs are packed along the columns of ``qweight`` and ``qzeros``, interleaved.

    Args:
        checkpoint: The file.
        prefix: What stands before the names, with its dot.
        leaves: Local name → tensor name of one module.

    **Source:** Lin et al. 2023; the AutoAWQ "GEMM" checkpoint format.
    """
    refs = _refs(checkpoint, leaves, ("qweight", "qzeros", "scales"))
    if refs is None:
        return None
    qweight, qzeros, scales = refs
    groups, outputs = scales.shape
    inputs, words = qweight.shape
    if 8 * words != outputs or qzeros.shape != (groups, words) or inputs % groups:
        return None
    if {qweight.dtype, qzeros.dtype} != {"int32"}:
        return None
    names = (qweight.name, qzeros.name, scales.name)

    def columns(packed: Tensor) -> Tensor:
        nibbles = _unpack(packed, 4, axis=1).reshape(packed.shape[0], -1, 8)
        ordered = nibbles.new_empty(nibbles.shape)
        ordered[:, :, list(_AWQ_ORDER)] = nibbles
        return ordered.reshape(packed.shape[0], -1)

    def build(read: Read) -> Tensor:
        size = inputs // groups
        zeros = columns(read(qzeros.name)).repeat_interleave(size, dim=0)
        scale = exact(read(scales.name)).repeat_interleave(size, dim=0)
        return ((columns(read(qweight.name)) - zeros) * scale).T

    weight = Effective(f"{prefix}weight", (outputs, inputs), names, build, "AWQ, 4 bits")
    return Found(names, weight=weight)


def compressed(checkpoint: Checkpoint, prefix: str, leaves: Leaves) -> Found | None:
    """Return a ``pack-quantized`` weight of compressed-tensors: W = (q − 2^(bits−1))·scale, per group of inputs.

    Args:
        checkpoint: The file; ``weight_shape`` is read to know the unpacked size.
        prefix: What stands before the names, with its dot.
        leaves: Local name → tensor name of one module.

    Returns:
        None for asymmetric or float kinds and for widths that do not divide 32.

    **Source:** the compressed-tensors ``pack-quantized`` format.
    """
    refs = _refs(checkpoint, leaves, ("weight_packed", "weight_scale"))
    if refs is None or "weight_shape" not in leaves or "weight_zero_point" in leaves:
        return None
    packed, scale = refs
    if packed.dtype != "int32":
        return None
    outputs, inputs = (int(size) for size in checkpoint.read(leaves["weight_shape"]).reshape(-1).tolist())
    groups = scale.shape[1]
    bits = next((b for b in (4, 8, 2) if -(-inputs * b // 32) == packed.shape[1]), 0)
    index = leaves.get("weight_g_idx", "")
    if not bits or packed.shape[0] != outputs or scale.shape[0] != outputs or (inputs % groups and not index):
        return None
    names = (packed.name, scale.name, *((index,) if index else ()))

    def build(read: Read) -> Tensor:
        import torch

        values = _unpack(read(packed.name), bits, axis=1)[:, :inputs] - 2 ** (bits - 1)
        group = read(index).int() if index else torch.arange(inputs) // (inputs // groups)
        result: Tensor = values * exact(read(scale.name))[:, group]
        return result

    how = f"compressed-tensors, {bits} bits"
    weight = Effective(f"{prefix}weight", (outputs, inputs), names, build, how)
    return Found((*names, leaves["weight_shape"]), weight=weight)


def bitsandbytes_4bit(checkpoint: Checkpoint, ref: TensorRef, members: Leaves) -> Found | None:
    """Return an NF4 or FP4 weight: code[nibble]·absmax of its block, high nibble first.

    With double quantisation the block maxima are themselves codes: nested_code[u8]·nested_absmax + offset.

    Args:
        checkpoint: The file; the small JSON state is read to know the shape.
        ref: The packed weight.
        members: Local name → tensor name of what stands under the weight's own name.

    Returns:
        None if the state is missing or contradicts the sizes.

    **Source:** Dettmers et al. 2023 (QLoRA), section 3; the bitsandbytes serialisation of ``QuantState``.
    """
    state_name = next((name for leaf, name in members.items() if "bitsandbytes__" in leaf), "")
    if not state_name or "absmax" not in members or "quant_map" not in members:
        return None
    state = _json(checkpoint, state_name)
    shape, size = _sizes(state.get("shape")), state.get("blocksize")
    if not shape or not isinstance(size, int) or size < 1 or -(-prod(shape) // 2) != ref.numel:
        return None
    maxima = checkpoint.tensors[members["absmax"]]
    nested = maxima.dtype == "uint8"
    inner, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if nested and not ({"nested_absmax", "nested_quant_map"} <= set(members) and isinstance(inner, int)):
        return None
    if maxima.numel != -(-prod(shape) // size):
        return None

    def build(read: Read) -> Tensor:
        import torch

        words = read(ref.name).reshape(-1)
        if words.dtype != torch.uint8:
            words = words.view(torch.uint8)
        nibbles = torch.stack([words >> 4, words & 15], dim=1).reshape(-1)[: prod(shape)]
        largest = read(members["absmax"]).reshape(-1)
        if nested and isinstance(inner, int):
            code = read(members["nested_quant_map"]).double()[largest.int()]
            scale = read(members["nested_absmax"]).double().repeat_interleave(inner)[: largest.numel()]
            largest = code * scale + float(offset or 0.0)
        values: Tensor = read(members["quant_map"]).double()[nibbles.int()]
        spread = largest.double().repeat_interleave(size)[: prod(shape)]
        return (values * spread).reshape(shape)

    used = (ref.name, *members.values())
    kind = str(state.get("quant_type", "4-bit"))
    return Found(used, weight=Effective(ref.name, shape, used, build, f"bitsandbytes {kind}"))


def mxfp4(checkpoint: Checkpoint, prefix: str, stack: str, leaves: Leaves) -> Found | None:
    """Return a stack of MXFP4 matrices: E2M1 values, low nibble first, times 2^(scale − 127) per block.

    Args:
        checkpoint: The file.
        prefix: What stands before the names, with its dot.
        stack: Local name without ``_blocks``.
        leaves: Local name → tensor name of one module.

    **Source:** OCP Microscaling Formats (MX) specification 1.0, sections 5 and 6.
    """
    blocks = checkpoint.tensors[leaves[f"{stack}_blocks"]]
    scales = checkpoint.tensors[leaves[f"{stack}_scales"]]
    if blocks.dtype != "uint8" or scales.dtype != "uint8" or blocks.shape[:-1] != scales.shape:
        return None
    if len(blocks.shape) not in (3, 4):
        return None
    shape = (*blocks.shape[:-2], 2 * blocks.shape[-2] * blocks.shape[-1])

    def values(words: Tensor, exponents: Tensor) -> Tensor:
        import torch

        table = torch.tensor(_E2M1, dtype=torch.float32)
        pairs = torch.stack([table[(words & 15).int()], table[(words >> 4).int()]], dim=-1)
        numbers = pairs.reshape(*words.shape[:-1], -1)
        scaled: Tensor = torch.ldexp(numbers, exponents.int().unsqueeze(-1) - 127)
        return scaled.flatten(-2)

    def build(read: Read) -> Tensor:
        return values(read(blocks.name), read(scales.name))

    def build_one(read: Read, index: int) -> Tensor:
        matrix: Tensor = values(read(blocks.name)[index], read(scales.name)[index])
        return matrix

    names = (blocks.name, scales.name)
    weight = Effective(f"{prefix}{stack}", shape, names, build, "MXFP4", build_one=build_one)
    return Found(names, weight=weight)


def exact(scales: Tensor) -> Tensor:
    """Return scales in a type in which their product with an integer of up to nine bits is exact."""
    return scales.float() if scales.element_size() < 4 else scales.double()


def _refs(checkpoint: Checkpoint, leaves: Leaves, wanted: tuple[str, ...]) -> list[TensorRef] | None:
    if not all(leaf in leaves for leaf in wanted):
        return None
    refs = [checkpoint.tensors[leaves[leaf]] for leaf in wanted]
    return refs if all(len(ref.shape) == 2 and ref.numel for ref in refs) else None


def _unpack(words: Tensor, bits: int, *, axis: int) -> Tensor:
    """Return the numbers of ``bits`` bits in a matrix of int32 words, lowest bits first, as int32.

    Shifting a negative word drags its sign along, which the mask takes off again.
    """
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    wide = words.to(torch.int32).unsqueeze(axis + 1)
    fields: Tensor = (wide >> (shifts[:, None] if axis == 0 else shifts)) & (2**bits - 1)
    return fields.flatten(axis, axis + 1)


def _config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Return the quantisation part of ``config.json``, wherever the container put it."""
    for holder in (
        checkpoint.metadata,
        checkpoint.metadata.get("config"),
        checkpoint.metadata.get("config.json"),
    ):
        if isinstance(holder, Mapping) and isinstance(holder.get("quantization_config"), Mapping):
            found: Mapping[str, Any] = holder["quantization_config"]
            return found
    return {}


def _json(checkpoint: Checkpoint, name: str) -> Mapping[str, Any]:
    if checkpoint.tensors[name].numel > 65536:
        return {}
    try:
        state = json.loads(bytes(checkpoint.read(name).reshape(-1).tolist()))
    except ValueError:
        return {}
    return state if isinstance(state, Mapping) else {}


def _sizes(value: Any) -> Shape | None:
    if isinstance(value, list) and value and all(isinstance(size, int) and size > 0 for size in value):
        return tuple(value)
    return None
