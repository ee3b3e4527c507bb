"""Which device and type to compute on."""

from __future__ import annotations

import torch

from spectool.errors import UsageError

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def choose_device(name: str) -> torch.device:
    """Return the device called ``name``; ``auto`` takes CUDA, then MPS, then the CPU.

    Raises:
        UsageError: If there is no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")
    kind, _, index = name.partition(":")
    available = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }
    if kind not in available or (index and not index.isdigit()):
        raise UsageError(f"no device is called {name!r}", hint="use auto, cpu, cuda, cuda:0 or mps")
    if int(index or 0) >= available[kind]:
        raise UsageError(
            f"device {name!r} is not available here ({available[kind]} {kind} devices found)",
            hint="use --device auto or --device cpu",
        )
    return torch.device(name)


def choose_dtype(name: str | torch.dtype | None) -> torch.dtype:
    """Return the arithmetic type called ``name``; None means float32.

    Raises:
        UsageError: If spectra are not computed in that type.
    """
    if name is None:
        return torch.float32
    if isinstance(name, torch.dtype):
        name = str(name).removeprefix("torch.")
    if name not in DTYPES:
        raise UsageError(
            f"spectra are not computed in {name}",
            hint="use float32 or float64; half-type weights are upcast exactly",
        )
    return DTYPES[name]
