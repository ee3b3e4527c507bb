"""Files for the checkpoint tests, written by the ordinary libraries, and the comparison with what those load."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import torch

from spectool.checkpoint import Checkpoint, open_checkpoint

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "real_models"

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def values(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Return reproducible values that any type can hold exactly enough to tell orders apart."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


def same(mine: torch.Tensor, truth: torch.Tensor) -> bool:
    """Tell whether two tensors agree in type, shape and every bit."""
    if mine.dtype != truth.dtype or mine.shape != truth.shape:
        return False
    a, b = mine.detach().contiguous().reshape(-1), truth.detach().resolve_conj().contiguous().reshape(-1)
    return a.numel() == 0 or torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def assert_equals(path: Path, truth: dict[str, torch.Tensor], **options: object) -> Checkpoint:
    """Open ``path``, compare every key (in order) and every value with ``truth``, return the checkpoint."""
    checkpoint = open_checkpoint(path, **options)  # type: ignore[arg-type]
    assert list(checkpoint.tensors) == list(truth)
    for name, tensor in truth.items():
        ref = checkpoint.tensors[name]
        assert ref.shape == tuple(tensor.shape), name
        assert same(checkpoint.read(name), tensor), name
    return checkpoint


def run_python(code: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def zipped(path: Path, data: bytes, storages: dict[str, bytes] | None = None) -> Path:
    """A torch zip around a pickle written by hand."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", data)
        for name, content in (storages or {}).items():
            archive.writestr(f"a/data/{name}", content)
    return path
