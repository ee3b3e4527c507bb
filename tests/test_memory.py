"""What is too large to compute with: refused by the machine's memory or the file's limit, and computed in parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_models as om
import pytest
import torch

import spectool
from spectool.errors import OperatorError
from spectool.linear import ConvGeometry, ConvMap, memory, window
from spectool.linear.memory import available_bytes, check_memory
from spectool.spectrum import gram

GB = 10**9


def machine(monkeypatch: pytest.MonkeyPatch, **texts: str) -> None:
    """Pretend to be a machine that says this of itself."""
    names = {"/proc/meminfo": "meminfo"} | {
        f"/sys/fs/cgroup/memory.{name}": name for name in ("max", "current", "stat")
    }
    monkeypatch.setattr(memory, "_text", lambda path: texts.get(names[path], ""))


def kilobytes(count: int) -> str:
    return f"MemTotal: 99999999999 kB\nMemFree: 17 kB\nMemAvailable: {count // 1024} kB\nBuffers: 5 kB\n"


@pytest.mark.parametrize(
    ("texts", "bytes_"),
    [
        ({"meminfo": kilobytes(1024 * 5000)}, 1024 * 5000),
        ({"meminfo": kilobytes(8 * GB), "max": "max\n", "current": "700\n"}, 8 * GB // 1024 * 1024),
        ({"meminfo": kilobytes(8 * GB), "max": f"{3 * GB}\n", "current": f"{GB}\n"}, 2 * GB),
        (
            {
                "max": f"{3 * GB}\n",
                "current": f"{GB}\n",
                "stat": "anon 7\nactive_file 30\ninactive_file 200\n",
            },
            2 * GB + 230,
        ),
        ({"max": "5\n", "current": "9\n"}, 0),
        ({}, None),
    ],
)
def test_what_is_available(
    monkeypatch: pytest.MonkeyPatch, texts: dict[str, str], bytes_: int | None
) -> None:
    machine(monkeypatch, **texts)
    assert available_bytes() == bytes_


def test_this_machine_says_what_it_has() -> None:
    there = available_bytes()
    assert there is None or 2**20 < there < 2**50


def test_only_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, meminfo=kilobytes(4 * GB))
    check_memory("it", "cpu", (3, 2000, 2000))  # 40 vectors of 48 MB
    with pytest.raises(
        OperatorError, match=r"^it of shape \(3, 4000, 4000\): 48,000,000 entries take about 7.7 GB"
    ):
        check_memory("it", "cpu", (3,), (3, 4000, 4000))
    machine(monkeypatch)
    check_memory("it", "cpu", (3, 4000, 4000))


def test_an_operator_that_does_not_fit_is_one_skipped_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [
        om.node("Conv", "x w", "h", pads=[1] * 4),
        om.node("Relu", "h", "r"),
        om.node("Conv", "r v", "y", strides=[512, 512]),
    ]
    constants = {"w": om.weights(4, 1, 3, 3), "v": om.weights(2, 4, 512, 512)}
    body = om.graph(nodes, {"x": (1, 1, 1024, 1024)}, "y", constants)
    path = tmp_path / "net.onnx"
    path.write_bytes(om.model(body).SerializeToString())
    machine(monkeypatch, meminfo=kilobytes(GB // 4))
    report = spectool.inspect(path, k=1, max_matvecs=2)
    rows = {row.layer: row for row in report.rows}
    assert rows["w"].status == "skipped"
    assert "0.7 GB to compute with, and 0.2 GB are available" in rows["w"].note
    machine(monkeypatch, meminfo=kilobytes(4 * GB))
    rows = {row.layer: row for row in spectool.inspect(path, k=1, layers=["w"], max_matvecs=2).rows}
    assert rows["w"].status == "ok"
    few = spectool.inspect(path, k=1, limits=spectool.Limits(operator_entries=4 * 1024 * 1024 - 1))
    for row in few.rows:
        assert row.status == "skipped"
        assert "the limit operator_entries = 4,194,303" in row.note
        assert "--limit operator_entries=N" in row.note
    assert few.coverage == (0, 2, 2)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_a_batch_in_parts_is_the_same_batch(
    monkeypatch: pytest.MonkeyPatch, transposed: bool, mode: str
) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(4, 3, 3, 3, generator=generator)
    stride = (2, 2) if transposed or mode == "zeros" else (1, 1)
    geometry = ConvGeometry(
        stride, ((1, 1), (1, 1)), (1, 1), padding_mode="zeros" if transposed else mode, transposed=transposed
    )
    shape = (4 if transposed else 3, 9, 8)
    x = torch.randn(7, *shape, generator=generator, dtype=torch.float64)

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        A = ConvMap(weight, shape, geometry, dtype=torch.float64)
        return A.matvec(x), A.rmatvec(A.matvec(x))

    whole = both()
    sizes: list[int] = []

    def watched(table: dict[int, Callable[..., torch.Tensor]]) -> dict[int, Callable[..., torch.Tensor]]:
        real = table[2]
        return {2: lambda x, *rest: (sizes.append(len(x)), real(x, *rest))[1]}

    monkeypatch.setattr(window, "_CONV", watched(window._CONV))
    monkeypatch.setattr(window, "_TRANSPOSED", watched(window._TRANSPOSED))
    monkeypatch.setattr(window, "_PATCH_BYTES", 1)
    parts = both()
    assert len(sizes) >= 2 * len(x)
    assert set(sizes) == {1}
    for one, other in zip(whole, parts, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-13, atol=1e-13)


_PEAK = """
import json, resource, sys
import torch, spectool
torch.set_num_threads(1)
path, small = sys.argv[1:]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
spectool.inspect(small, k=8, max_matvecs=60)
before = peak()
row = spectool.inspect(path, k=8, max_matvecs=60).rows[0]
print(json.dumps([peak() - before, row.matvecs]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss")
def test_what_eight_values_of_a_large_map_take(tmp_path: Path) -> None:
    """Without parts it is more than twice as much; 40 + 7k vectors are stated."""
    for name, side in (("large", 320), ("small", 32)):
        nodes, kernel = [om.node("Conv", "x w", "y", pads=[1] * 4)], om.weights(16, 16, 3, 3)
        body = om.graph(nodes, {"x": (1, 16, side, side)}, "y", {"w": kernel})
        (tmp_path / f"{name}.onnx").write_bytes(om.model(body).SerializeToString())
    arguments = [sys.executable, "-c", _PEAK, str(tmp_path / "large.onnx"), str(tmp_path / "small.onnx")]
    # What is freed goes back at once: the peak is what was held, not what the C library kept.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(arguments, check=True, capture_output=True, text=True, env=environment)
    bytes_, matvecs = json.loads(done.stdout)
    assert matvecs > 40
    assert bytes_ / (4 * 16 * 320 * 320) < 120


def test_rows_in_parts_are_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight at once kept recordings of a function on 2 million entries: 2.3 GB for two values."""
    weight = torch.randn(40, 60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seen: list[int] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return (x * 3.0) @ weight.T.to(x.dtype)

    def found() -> tuple[spectool.Spectrum, int]:
        seen.clear()
        return spectool.svds(function, (60,), k=3, method="lanczos"), max(seen)

    whole, most = found()
    assert most > 2
    monkeypatch.setattr(gram, "_TOGETHER", 60)
    parts, most = found()
    assert most == 2  # what it takes to see that there is a batch axis
    truth = np.linalg.svd(3.0 * weight.numpy(), compute_uv=False)[:3]
    np.testing.assert_allclose(parts.values, truth, rtol=1e-6)
    np.testing.assert_allclose(whole.values, truth, rtol=1e-6)
    assert parts.matvecs == whole.matvecs
