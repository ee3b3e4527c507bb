"""Files made for two readers: spectool lists what torch loads, or refuses the file."""

from __future__ import annotations

import contextlib
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attack_readers
import numpy as np
import pytest
import torch
from attack import Attack

from spectool.checkpoint import open_checkpoint
from spectool.errors import CheckpointError


def tensors(loaded: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor or array in what ``torch.load`` returns."""
    if isinstance(loaded, np.ndarray):
        loaded = torch.from_numpy(loaded.astype(loaded.dtype.newbyteorder("=")))
    if isinstance(loaded, torch.Tensor):
        yield name, loaded.detach()
    elif isinstance(loaded, dict):
        for key, value in loaded.items():
            yield from tensors(value, f"{name}.{key}" if name else str(key))


@pytest.mark.parametrize("attack", attack_readers.ATTACKS, ids=lambda attack: attack.name)
def test_what_is_listed_is_what_torch_loads(attack: Attack, tmp_path: Path) -> None:
    path = attack.build(tmp_path)
    theirs: dict[str, torch.Tensor] = {}
    with warnings.catch_warnings(), contextlib.suppress(RuntimeError, tarfile.TarError, KeyError):
        warnings.simplefilter("ignore")
        theirs = dict(tensors(torch.load(path, weights_only=False)))
    if attack.refused:
        with pytest.raises(CheckpointError, match=attack.refused):
            open_checkpoint(path)
        return
    ours = open_checkpoint(path)
    assert theirs.keys() == ours.tensors.keys() | ours.unread.keys()
    for name in ours.tensors:
        read = ours.read(name)
        assert read.dtype == theirs[name].dtype
        assert torch.equal(read, theirs[name])
