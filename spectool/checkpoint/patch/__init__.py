"""Write a checkpoint with some tensors changed: the bytes of those tensors, what checks them, and nothing else."""

from spectool.checkpoint.patch.types import Written
from spectool.checkpoint.patch.values import can_write
from spectool.checkpoint.patch.write import write_checkpoint

__all__ = ["Written", "can_write", "write_checkpoint"]
