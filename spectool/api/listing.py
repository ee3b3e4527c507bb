"""List the tensors of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from spectool.checkpoint import open_checkpoint
from spectool.checkpoint.limits import DEFAULT, Limits
from spectool.checkpoint.types import Checkpoint


def ls(path: str | Path, *, key: str | None = None, limits: Limits = DEFAULT) -> Checkpoint:
    """Read the structure of a checkpoint, no tensor data and no torch.

    Args:
        path: A checkpoint file or a Hugging Face directory.
        key: Which branch of a nested training checkpoint to take, e.g. ``"ema"``.
        limits: What the file may ask for.

    Returns:
        The open checkpoint; ``.tensors`` holds name → ``TensorRef`` in file order.

    Raises:
        CheckpointError: If the file cannot be read.

    Example:
        >>> import spectool
        >>> list(spectool.ls("sample_models/digits_mlp_state.pt").tensors)[0]
        'fc1.weight'
    """
    return open_checkpoint(path, key=key, limits=limits)
