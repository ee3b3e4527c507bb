"""Bytes ↔ named tensors, for every container; never runs code from a file, never imports torch to list one."""

from spectool.checkpoint.hashing import sha256_of
from spectool.checkpoint.limits import Limits
from spectool.checkpoint.open import open_checkpoint
from spectool.checkpoint.patch import Written, can_write, write_checkpoint
from spectool.checkpoint.types import Checkpoint, InertModule, InertObject, TensorRef

__all__ = [
    "Checkpoint",
    "InertModule",
    "InertObject",
    "Limits",
    "TensorRef",
    "Written",
    "can_write",
    "open_checkpoint",
    "sha256_of",
    "write_checkpoint",
]
