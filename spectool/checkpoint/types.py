"""What a checkpoint is once its structure has been read: names, shapes and where the bytes lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TensorRef:
    """Where the bytes of one named tensor lie. Nothing is read until ``Checkpoint.read``.

    Attributes:
        name: Checkpoint key (nested keys joined by ``.``).
        dtype: Element type by its safetensors-like short name: ``float32``, ``bfloat16``, ``int64``, ``uint8``…
        shape: Shape as stored.
        stride: Stride in elements; row-major unless the container says otherwise.
        file: File that holds the bytes (a shard, an external data file, or the checkpoint itself).
        record: Name of the record inside the file (zip member, initializer name); empty if the file has none.
        offset: Byte offset of the tensor's first element inside ``record`` (inside ``file`` if no record).
        storage: Identity of the underlying storage; two refs with one ``storage`` share bytes.
        nbytes: Bytes of the storage that holds it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    file: Path
    record: str
    offset: int
    storage: str
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors and, if the container has one, its program. Holds no tensor data.

    Attributes:
        path: What the user named.
        format: One of ``torch-zip``, ``torch-legacy``, ``torchscript``, ``pt2``, ``safetensors``,
            ``safetensors-sharded``, ``huggingface``, ``onnx``.
        tensors: Name → ref, in file order, optimizer-like branches left out.
        aliases: Name → first name in file order, for tied tensors (same storage, offset, shape and stride).
        metadata: Small facts from the container (safetensors ``__metadata__``, LoRA alpha, ``config.json``…).
        program: The program if there is one: a ``ModelProto`` for ONNX, an ``InertModule`` tree for a pickled
            module; None otherwise.
        notes: What was left out or unwrapped, in words (``ignored optimizer``, ``took 'state_dict'``…).
        reader: Reads one tensor's bytes; use ``read``.
    """

    path: Path
    format: str
    tensors: Mapping[str, TensorRef]
    aliases: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    program: Any = None
    notes: tuple[str, ...] = ()
    reader: Callable[[TensorRef], torch.Tensor] | None = field(default=None, repr=False, compare=False)

    def read(self, name: str) -> torch.Tensor:
        """Return tensor ``name`` on the CPU in its stored type; only its own bytes are read.

        Raises:
            KeyError: If there is no such tensor.
            CorruptFile: If its bytes are not all there.
        """
        if self.reader is None:
            raise ValueError(f"checkpoint {self.path} was built without a reader")
        return self.reader(self.tensors[name])


@dataclass(frozen=True)
class InertModule:
    """A pickled ``nn.Module`` whose class was never imported.

    Attributes:
        cls: Dotted name of the class as pickled, e.g. ``torch.nn.modules.conv.Conv2d``.
        attributes: Plain attributes (numbers, strings, tuples, None) such as ``stride`` or ``eps``.
        parameters: Local name → checkpoint key, parameters and buffers.
        children: Local name → submodule, in registration order.
    """

    cls: str
    attributes: Mapping[str, Any]
    parameters: Mapping[str, str]
    children: Mapping[str, InertModule]
