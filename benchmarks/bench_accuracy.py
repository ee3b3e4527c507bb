"""What a clip costs in accuracy: scaling, FastClip and the nearest weights, with and without moving means.

Plain convolutional networks (five conv–BN–ReLU blocks) are trained on scikit-learn's digits from three seeds; every
conv–BN pair is then clipped to half of the largest σ₁ there is, and test accuracy is measured again. Run
``python benchmarks/bench_accuracy.py``; it needs scikit-learn, takes some minutes and writes
``benchmarks/results/accuracy.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spectool

HERE = Path(__file__).parent
CHANNELS = (1, 16, 32, 32, 64, 64)
WAYS = (
    ("scale", "scale", "none"),
    ("scale + mean", "scale", "auto"),
    ("FastClip", "fastclip", "none"),
    ("FastClip + mean", "fastclip", "auto"),
    ("spectool, means left alone", "auto", "none"),
    ("spectool (default)", "auto", "auto"),
    ("spectool --calibrate", "auto", "calibrate"),
)


def plain_cnn() -> nn.Module:
    """Return five conv–BN–ReLU blocks, the third and fifth of stride 2, and a linear head."""
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(pairwise(CHANNELS)):
        stride = 2 if index in (2, 4) else 1
        layers += [
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS[-1], 10))


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images and labels, test images and labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images[order[:1300]], labels[order[:1300]], images[order[1300:]], labels[order[1300:]]


def train(seed: int) -> tuple[nn.Module, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return a trained network in evaluation mode, and its data."""
    torch.manual_seed(seed)
    data = digits(seed)
    images, labels, _, _ = data
    model = plain_cnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for _ in range(12):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval(), data


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of right answers in per cent."""
    with torch.no_grad():
        return 100.0 * float((model(images).argmax(1) == labels).double().mean())


def clipped(model: nn.Module, data: tuple[Tensor, Tensor, Tensor, Tensor], share: float) -> dict[str, object]:
    """Return accuracies of one network after every way of clipping it."""
    images, _, tests, answers = data
    found: dict[str, object] = {"trained": accuracy(model, tests, answers)}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "net.pt", Path(folder) / "clipped.pt"
        torch.save(model.state_dict(), source)
        options = {"arch": "bench_accuracy:plain_cnn", "input_shape": (1, 1, 8, 8)}
        rows = spectool.inspect(source, k=1, level="composed", **options).rows
        pairs = [row for row in rows if "batchnorm" in row.kind]
        limit = share * max(row.sigma[0] for row in pairs)
        found["limit"] = limit
        for name, method, recenter in WAYS:
            report = spectool.clip(
                source,
                max=limit,
                out=target,
                force=True,
                k=1,
                method=method,
                layers=tuple(row.layer for row in pairs),
                recenter="auto" if recenter == "calibrate" else recenter,
                calibrate=images if recenter == "calibrate" else None,
                **options,
            )
            other = plain_cnn().eval()
            other.load_state_dict(torch.load(target, weights_only=True))
            changes = [row.change for row in report.rows if row.change is not None]
            found[name] = accuracy(other, tests, answers)
            print(f"  {name:<28} {found[name]:6.1f} %   changed {max(changes):.3f} at most", flush=True)
    return found


def main() -> None:
    """Train, clip, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=0.5, help="limit over the largest σ₁")
    arguments = parser.parse_args()
    sys.path.insert(0, str(HERE))
    torch.set_num_threads(1)
    results = []
    for seed in range(3):
        model, data = train(seed)
        print(f"net {seed + 1}: {accuracy(model, data[2], data[3]):.1f} % before", flush=True)
        results.append(clipped(model, data, arguments.share))
    path = HERE / "results" / "accuracy.json"
    document = {"share": arguments.share, "torch": torch.__version__, "nets": results}
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
