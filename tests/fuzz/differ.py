"""Whether what is listed is what the format's ordinary loader gives: names, shapes, types and bytes.

A file that spectool reads one way and its owner's program another is a broken promise that no exit code shows.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from spectool.checkpoint.types import Checkpoint

#: Bytes of a file up to which values are compared.
_VALUES = 1 << 20
#: What torch says of a tensor that leaves its storage.
_OUTSIDE = ("out of bounds for storage", "setStorage", "exceeds the storage")


def differences(path: Path) -> list[str]:
    """Return in words what spectool and the ordinary loader see differently in a file that spectool has listed."""
    import spectool

    checkpoint = spectool.ls(path)
    if checkpoint.metadata.get("gzip"):
        return []
    values = path.stat().st_size <= _VALUES
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if checkpoint.format == "safetensors":
            return list(_safetensors(checkpoint, values))
        if checkpoint.format in ("torch-zip", "torch-legacy"):
            return list(_torch(checkpoint, values))
        if checkpoint.format == "onnx":
            return list(_onnx(checkpoint, values))
    return []


def _safetensors(checkpoint: Checkpoint, values: bool) -> Iterator[str]:
    from safetensors import safe_open

    try:
        theirs = safe_open(checkpoint.path, "pt")
    except Exception as error:
        yield f"the ordinary loader refuses it: {error}"
        return
    with theirs as file:
        names = set(file.keys())
        ours = {*checkpoint.tensors, *checkpoint.unread}
        if names != ours:
            yield f"names differ: {sorted(names ^ ours)[:4]!r}"
        for name in names & set(checkpoint.tensors):
            shape = tuple(file.get_slice(name).get_shape())
            if shape != checkpoint.tensors[name].shape:
                yield f"the shape of {name!r}: {checkpoint.tensors[name].shape}, not {shape}"
            elif values:
                try:
                    tensor = file.get_tensor(name)
                except Exception:  # a type that this torch does not have
                    continue
                yield from _compared(checkpoint, name, tensor)


def _torch(checkpoint: Checkpoint, values: bool) -> Iterator[str]:
    import torch

    try:
        found: Any = torch.load(checkpoint.path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Classes, mostly, which it would have to run.
        if any(text in str(error) for text in _OUTSIDE):
            yield f"the ordinary loader refuses it: {error}"
        return
    for step in filter(None, str(checkpoint.metadata.get("branch") or "").split(".")):
        if not isinstance(found, Mapping) or step not in found:
            return
        found = found[step]
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        return
    tensors = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    nested = any(isinstance(value, Mapping | list | tuple) for value in found.values())
    for name, tensor in tensors.items():
        if name in checkpoint.tensors:
            ref = checkpoint.tensors[name]
            if ref.shape != tuple(tensor.shape):
                yield f"the shape of {name!r}: {ref.shape}, not {tuple(tensor.shape)}"
            elif values and tensor.layout == torch.strided:
                yield from _compared(checkpoint, name, tensor)
        elif name not in checkpoint.unread and not nested:
            yield f"{name!r} is not listed"
    if not nested and tensors:
        more = set(checkpoint.tensors) - set(tensors)
        if more:
            yield f"listed, and not there: {sorted(more)[:4]!r}"


def _onnx(checkpoint: Checkpoint, values: bool) -> Iterator[str]:
    import numpy as np
    import onnx
    import torch
    from onnx import numpy_helper

    try:
        model = onnx.load(checkpoint.path, load_external_data=False)
    except Exception as error:
        yield f"the ordinary loader refuses it: {error}"
        return
    # Of several with one name every one is listed; runtimes take the last.
    names = Counter(tensor.name for tensor in model.graph.initializer)
    names.update(name for node in model.graph.node for name in node.output)
    for tensor in model.graph.initializer:
        ref = checkpoint.tensors.get(tensor.name)
        if ref is None or names[tensor.name] > 1:
            continue
        if ref.shape != tuple(tensor.dims):
            yield f"the shape of {tensor.name!r}: {ref.shape}, not {tuple(tensor.dims)}"
        elif values:
            try:
                array = numpy_helper.to_array(tensor, str(checkpoint.path.parent))
                found = torch.from_numpy(np.ascontiguousarray(array))
            except Exception:  # types that numpy or torch does not have; data elsewhere
                continue
            yield from _compared(checkpoint, tensor.name, found)


def _compared(checkpoint: Checkpoint, name: str, tensor: torch.Tensor) -> Iterator[str]:
    from spectool.errors import SpectoolError

    try:
        ours = checkpoint.read(name)
    except SpectoolError:
        return
    theirs = tensor.detach()
    if theirs.is_quantized:
        theirs = theirs.int_repr()
    if str(ours.dtype) != str(theirs.dtype):
        yield f"the type of {name!r}: {ours.dtype}, not {theirs.dtype}"
    elif _bytes(ours) != _bytes(theirs):
        yield f"the values of {name!r} differ"


def _bytes(tensor: torch.Tensor) -> bytes:
    import torch

    plain = tensor.resolve_conj().resolve_neg().contiguous().flatten()
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""
