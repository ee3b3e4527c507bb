"""Full float32 arithmetic while an operator is applied, without a trace afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Turn off every reduced-precision shortcut for float32, and restore what was set.

    TF32 keeps 10 bits of each factor; left on (the default for cuDNN convolutions) it limits singular values
    to about three digits. cuDNN is also made deterministic and kept from timing algorithms, so that one seed
    gives one result. Applies to the process, not to the thread. Costs microseconds; wrap whole runs in it.

    Example:
        >>> with exact_arithmetic():
        ...     torch.get_float32_matmul_precision()
        'highest'
    """
    saved: list[tuple[Any, str, Any]] = []

    def switch(owner: Any, name: str, value: Any) -> None:
        saved.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    try:
        switch(cudnn, "deterministic", True)
        switch(cudnn, "benchmark", False)
        for owner in (cudnn, matmul):
            switch(owner, "allow_tf32", False)
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        saved.append((torch, "float32_matmul_precision", precision))
        yield
    finally:
        for owner, name, value in reversed(saved):
            if name == "float32_matmul_precision":
                torch.set_float32_matmul_precision(value)
            else:
                setattr(owner, name, value)
