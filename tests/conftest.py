"""What holds for every test."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # Small float64 operators lose far more to the hand-over between threads than they gain.
    import torch

    torch.set_num_threads(1)
