"""Full float32 arithmetic while an operator is applied, without a trace afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Turn off every reduced-precision shortcut for float32, and restore what was set.

    TF32 keeps 10 bits of each factor; left on, as it is for cuDNN's convolutions, it limits singular values
    to about three digits. The same goes for bfloat16 passes in oneDNN. cuDNN is also made deterministic and
    kept from timing its algorithms, so that one seed gives one result.

    Applies to the process, not to the thread. Costs microseconds; wrap whole runs in it.

    Example:
        >>> with exact_arithmetic():
        ...     torch.get_float32_matmul_precision()
        'highest'
    """
    backends: Any = torch.backends
    undo: list[Callable[[], None]] = []

    def switch(read: Callable[[], Any], write: Callable[[Any], None], value: Any) -> None:
        try:
            before = read()
        except RuntimeError:  # torch ≥ 2.9 once both of its interfaces were used; the newer one will do
            return
        undo.append(lambda: write(before))
        write(value)

    def attribute(owner: Any, name: str, value: Any) -> None:
        switch(lambda: getattr(owner, name), lambda new: setattr(owner, name, new), value)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions warn that the same flags have a newer interface
        units = _units()
        before = [unit.fp32_precision for unit in units]
        attribute(backends.cudnn, "deterministic", True)
        attribute(backends.cudnn, "benchmark", False)
        # The older interface first, because what runs inside may itself read it.
        attribute(backends.cudnn, "allow_tf32", False)
        switch(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest")
        for unit in units:
            if unit.fp32_precision not in ("none", "ieee"):
                unit.fp32_precision = "ieee"
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for restore in reversed(undo):
                restore()
            for unit, precision in zip(units, before, strict=True):
                if unit.fp32_precision != precision:
                    unit.fp32_precision = precision


def _units() -> list[Any]:
    """Return what carries a float32 precision of its own; nothing before torch 2.9."""
    backends: Any = torch.backends
    owners = [(backends.cudnn, "conv"), (backends.cudnn, "rnn"), (backends.cuda, "matmul")]
    owners += [(backends.mkldnn, name) for name in ("conv", "matmul", "rnn")]
    found = [getattr(owner, name, None) for owner, name in owners]
    return [unit for unit in found if hasattr(unit, "fp32_precision")]
