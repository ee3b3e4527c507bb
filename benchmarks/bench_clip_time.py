"""How long whole clips take: a ResNet-20, all conv–BN pairs, and a large Linear in bf16.

    python benchmarks/bench_clip_time.py [--resnet FILE] [--only NAME] [-o results/clip_time.json]

Each clip runs as a command of its own, whose wall time, processor time and peak memory are taken. ``--resnet`` is a
CIFAR-10 ResNet-20 state dict (``resnet20-12fca82f.th`` of akamaster/pytorch_resnet_cifar10); without it the same
network is used with seeded weights, which are easier. Times are of the machine at hand: they are printed, no test
reads them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HERE = Path(__file__).parent


class Block(nn.Module):
    """Two convolutions beside a shortcut without parameters (option A: every other pixel, zero channels)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more // 2))
        return F.relu(out + x)


class ResNet20(nn.Module):
    """The CIFAR-10 network of He et al. (2016), 19 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(F.avg_pool2d(x, x.shape[3]).flatten(1))


def resnet20() -> nn.Module:
    """Return the network; what ``--arch bench_clip_time:resnet20`` calls."""
    return ResNet20()


def clip(arguments: list[str], report: Path) -> dict[str, Any]:
    """Run one clip as a command; return its times, its peak memory and its rows."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    command = [sys.executable, "-m", "spectool", "clip", *arguments, "--report", str(report), "-q"]
    start = time.perf_counter()
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = process.stderr.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - start
    if not report.exists():
        raise SystemExit(said)
    rows = json.loads(report.read_text())["rows"]
    print(said.strip())
    return {
        "exit_code": process.returncode,
        "wall_seconds": wall,
        "processor_seconds": used.ru_utime + used.ru_stime,
        "peak_memory_mb": used.ru_maxrss / 1024,
        "rows": [
            {
                "layer": row["layer"],
                "action": row["action"],
                "seconds": row["seconds"],
                "before": row["before"] and row["before"]["sigma"],
                "after": row["after"] and row["after"]["sigma"],
                "proven": row["after"] and row["after"]["proven"],
                "change": row["change"],
                "change_lower_bound": row["change_lower_bound"],
                "change_scaling": row["change_scaling"],
                "converged": row["converged"],
            }
            for row in rows
            if row["limit"] is not None and row["action"] != "listed"
        ],
    }


def resnet(folder: Path, weights: Path | None) -> dict[str, Any]:
    """All conv–BN pairs of a ResNet-20 to 1.0, at 3×32×32."""
    if weights is None:
        torch.manual_seed(0)
        weights = folder / "resnet20.pt"
        torch.save(ResNet20().eval().state_dict(), weights)
    options = ["--max", "1.0", "--arch", "bench_clip_time:resnet20", "--input", "1x3x32x32"]
    return clip(
        [str(weights), *options, "--kind", "conv2d+batchnorm", "-o", str(folder / "o.pt")], folder / "r.json"
    )


def linear(folder: Path) -> dict[str, Any]:
    """A Linear of 4096 × 4096 in bf16, heavy-tailed, to 0.8 of its largest singular value."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4096, 4096, generator=generator)
    decay = (1.0 + torch.arange(4096)) ** -0.35
    weight = (torch.linalg.qr(weight)[0] * decay) @ torch.linalg.qr(
        torch.randn(4096, 4096, generator=generator)
    )[0]
    source = folder / "linear.safetensors"
    save_file({"linear.weight": weight.bfloat16().contiguous()}, source)
    return clip([str(source), "--max", "0.8", "-o", str(folder / "o.safetensors")], folder / "l.json")


def show(name: str, found: dict[str, Any]) -> None:
    """Print one run."""
    times = f"{found['wall_seconds']:.0f} s ({found['processor_seconds']:.0f} s of processors)"
    print(f"\n{name}: exit {found['exit_code']}, {times}, {found['peak_memory_mb']:.0f} MB")
    for row in found["rows"]:
        values = f"{row['before']:8.4f} -> {row['after']:.6f}"
        bound = row["change_lower_bound"]
        change = (
            "" if row["change"] is None else f"{row['change']:.4f}" + (f" >= {bound:.4f}" if bound else "")
        )
        print(f"  {row['layer'][:56]:<56s} {row['seconds']:6.1f} s  {values}  {change}")


def main() -> None:
    """Run both, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--resnet", type=Path, help="state dict of a CIFAR-10 ResNet-20")
    parser.add_argument("--only", choices=("resnet20", "linear"))
    parser.add_argument("-o", "--output", type=Path, default=HERE / "results" / "clip_time.json")
    options = parser.parse_args()
    document = json.loads(options.output.read_text()) if options.output.exists() else {}
    document["versions"] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.only != "linear":
            document["resnet20"] = resnet(folder, options.resnet)
        if options.only != "resnet20":
            document["linear 4096x4096 bf16"] = linear(folder)
    for key, found in document.items():
        if key == "versions":
            continue
        show(key, found)
    options.output.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
