"""Weight norm and spectral norm where a program computes the weight: clipped, written, and computed again by torch.

Truth: what torch's own modules compute from the written file, in torch's arithmetic, and numpy's SVD of it in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from dense import conv_matrix, conv_transpose_matrix
from onnx_models import graph, model, node, weights
from onnx_models import run as ort_run
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import spectool
from spectool.report.clip import ClipReport

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*weight_norm.*",
    "ignore:.*spectral_norm.*",
    "ignore:.*assigned during export.*",
    "ignore::torch.jit.TracerWarning",
    "ignore:.*torch.jit.*",
)

SHAPE = (1, 2, 6, 6)
LIMIT = 0.5
Wrap = Callable[[nn.Module], nn.Module]
WRAPS: dict[str, Wrap] = {
    "weight_norm hook": lambda layer: nn.utils.weight_norm(layer),
    "weight_norm": lambda layer: parametrizations.weight_norm(layer),
    "spectral_norm hook": lambda layer: nn.utils.spectral_norm(layer),
    "spectral_norm": lambda layer: parametrizations.spectral_norm(layer),
}
HOOKS = [kind for kind in WRAPS if "hook" in kind]


class Net(nn.Module):
    """Three parametrised layers: a convolution with its batch norm, a transposed convolution, a matrix."""

    def __init__(self, kind: str = "weight_norm") -> None:
        super().__init__()
        torch.manual_seed(0)
        wrap = WRAPS[kind]
        self.conv = wrap(nn.Conv2d(2, 4, 3, padding=1))
        self.norm = nn.BatchNorm2d(4)
        self.up = wrap(nn.ConvTranspose2d(4, 4, 2, stride=2))
        self.fc = wrap(nn.Linear(36, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.norm(self.conv(x)).relu()).relu()
        y: Tensor = self.fc(nn.functional.max_pool2d(x, 4).flatten(1))
        return y


def factory(kind: str = "weight_norm") -> Net:
    """What ``--arch`` calls."""
    return Net(kind)


def trained(kind: str) -> Net:
    """A net whose vectors, lengths and statistics are not those of its start."""
    net = Net(kind)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        net(torch.randn(8, *SHAPE[1:])).square().mean().backward()
        optimizer.step()
    net.eval()
    with torch.no_grad():
        net(torch.zeros(SHAPE))
    net.zero_grad()
    return net


def truths(net: nn.Module) -> dict[str, float]:
    """σ₁ of what torch computes in evaluation mode, by layer."""
    net = net.eval()
    with torch.no_grad():
        net(torch.zeros(SHAPE))
        conv, up, fc = (layer.weight.detach().double().numpy() for layer in (net.conv, net.up, net.fc))
        scale = (net.norm.weight.double() / (net.norm.running_var.double() + net.norm.eps).sqrt()).numpy()
    both = conv * scale[:, None, None, None]
    padding = ((1, 1), (1, 1))
    return {
        "conv": _top(conv_matrix(conv, (6, 6), (1, 1), padding, (1, 1))),
        "conv + norm": _top(conv_matrix(both, (6, 6), (1, 1), padding, (1, 1))),
        "up": _top(conv_transpose_matrix(up, (6, 6), (2, 2), ((0, 0), (0, 0)), (1, 1))),
        "fc": _top(fc),
    }


def _top(matrix: np.ndarray) -> float:
    return float(np.linalg.norm(matrix, 2))


def _state_dict(net: Net, kind: str, folder: Path, arch: bool) -> tuple[nn.Module, ClipReport]:
    torch.save(net.state_dict(), folder / "net.pt")
    program: dict[str, object] = {"exclude": ["conv.*"]}  # for every input size that takes seconds
    if arch:
        program = {"arch": f"{__name__}:factory", "arch_args": {"kind": kind}, "input_shape": SHAPE}
    report = spectool.clip(folder / "net.pt", max=LIMIT, out=folder / "out.pt", **program)
    again = Net(kind)
    again.load_state_dict(torch.load(folder / "out.pt", weights_only=True))
    return again, report


def _archive(net: Net, kind: str, folder: Path, suffix: str) -> tuple[nn.Module, ClipReport]:
    source, target = folder / f"net.{suffix}", folder / f"out.{suffix}"
    x, again = torch.randn(SHAPE), Net(kind)
    if suffix == "pt2":
        torch.export.save(torch.export.export(net, (x,)), source)
        report = spectool.clip(source, max=LIMIT, out=target)
        loaded = torch.export.load(target)
        state, output = loaded.state_dict, loaded.module()(x)
    else:
        torch.jit.save(torch.jit.trace(net, x), source)
        report = spectool.clip(source, max=LIMIT, out=target, input_shape=SHAPE)
        loaded = torch.jit.load(target)
        state, output = loaded.state_dict(), loaded(x)
    again.load_state_dict(state)
    # The archive's own program computes what the module does.
    torch.testing.assert_close(again.eval()(x), output, rtol=1e-5, atol=1e-6)
    return again, report


def clipped(net: Net, kind: str, route: str, folder: Path) -> tuple[nn.Module, ClipReport]:
    """Return the net that torch makes of a clipped file, and the report."""
    if route in ("state dict", "arch"):
        return _state_dict(net, kind, folder, route == "arch")
    if route in ("pt2", "script"):
        return _archive(net, kind, folder, "pt2" if route == "pt2" else "ts")
    if route == "live":
        again = copy.deepcopy(net)
        return again, spectool.clip_(again, LIMIT, SHAPE)
    torch.save(net, folder / "net.pt")
    report = spectool.clip(folder / "net.pt", max=LIMIT, out=folder / "out.pt", trust=True, input_shape=SHAPE)
    return torch.load(folder / "out.pt", weights_only=False), report


ROUTES = ["state dict", "arch", "pt2", "script", "live"]
CASES = [(kind, route) for kind in WRAPS for route in ROUTES] + [(kind, "trust") for kind in HOOKS]


@pytest.mark.parametrize(("kind", "route"), CASES)
def test_torch_computes_weights_within_the_limit(kind: str, route: str, tmp_path: Path) -> None:
    net = trained(kind)
    before, old = truths(net), copy.deepcopy(net.state_dict())
    again, report = clipped(net, kind, route, tmp_path)
    after, new = truths(again), again.state_dict()
    rows = {row.row.layer: row for row in report.rows if row.action == "clipped"}
    known = route != "state dict"
    keys = {"up.weight": "up", "fc.weight": "fc"} | (
        {"conv.weight + norm.weight": "conv + norm"} if known else {}
    )
    assert set(rows) == set(keys)
    for key, name in keys.items():
        assert before[name] > LIMIT
        assert after[name] <= LIMIT * (1 + 1e-9)
        if not known and name == "up":
            continue  # a bound for every stride and input size
        assert after[name] >= LIMIT * (1 - 3e-4)
        # What is reported is what torch computes, up to the roundings of its arithmetic.
        assert rows[key].before.sigma == pytest.approx(before[name], rel=2e-6)
        assert rows[key].after.sigma == pytest.approx(after[name], rel=2e-6)
    for row in rows.values():
        assert row.change_lower_bound <= row.change <= 1.10 * row.change_lower_bound
        assert row.change < row.change_scaling
        assert ("training mode" in row.reason) == ("spectral" in kind)
    moved = {name for name in new if not torch.equal(new[name], old[name])}
    assert not {name for name in moved if name.startswith("norm.") and name != "norm.running_mean"}
    assert not {name for name in moved if "bias" in name}
    assert {name for name in moved if not name.startswith("norm.")} <= set(report.changed)
    assert list(new) == list(old)
    if kind.startswith("weight"):
        for name, value in new.items():
            if name.endswith(("_v", "original1")):  # directions keep their lengths
                length = value.flatten(1).norm(dim=1)
                torch.testing.assert_close(length, old[name].flatten(1).norm(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", [kind for kind in WRAPS if kind not in HOOKS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_obey_as_torch_computes_them(kind: str, dtype: torch.dtype) -> None:
    net = trained(kind).to(dtype)
    report = spectool.clip_(net, LIMIT, SHAPE, layers=["up.*", "fc.*"])
    assert report.counts["clipped"] == 2
    with torch.no_grad():
        fc, up = net.fc.weight.double().numpy(), net.up.weight.double().flatten(1).numpy()
    # Windows that do not overlap: the operator is the matrix (in, out·4).
    for value in (_top(fc), _top(up)):
        assert LIMIT * (1 - (3e-4 if dtype == torch.float64 else 2**-6)) <= value <= LIMIT * (1 + 1e-9)


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_half_types_of_a_state_dict_obey_in_either_arithmetic(kind: str, tmp_path: Path) -> None:
    """What is stored is neither what the formula in float64 makes of it nor what torch makes of it in bfloat16."""
    torch.manual_seed(0)
    net = nn.Sequential(*(WRAPS[kind](nn.Linear(12, 9)) for _ in range(5))).eval().to(torch.bfloat16)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    report = spectool.clip(tmp_path / "net.pt", max=0.3, out=tmp_path / "out.pt", k=1)
    assert report.counts["clipped"] == 5
    net.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True))
    for layer, wide in zip(net, copy.deepcopy(net).double(), strict=True):
        for weight in (layer.weight, wide.weight):
            assert _top(weight.detach().double().numpy()) <= 0.3 * (1 + 1e-9)


def test_training_mode_undoes_a_clip_under_spectral_norm_as_the_row_says() -> None:
    net = trained("spectral_norm")
    report = spectool.clip_(net, LIMIT, SHAPE)
    assert all("training mode" in row.reason for row in report.rows)
    assert truths(net)["fc"] <= LIMIT * (1 + 1e-9)
    net.train()
    for _ in range(50):
        net.fc(torch.zeros(1, 36))
    assert truths(net)["fc"] == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("kind", ["weight_norm", "weight_norm hook"])
def test_weight_norm_is_clipped_while_it_trains(kind: str) -> None:
    net = trained(kind).train()
    keys = list(net.state_dict())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
    clipper = spectool.SpectralClipper(net, LIMIT, every=1, input_shape=SHAPE)
    assert not clipper.refused
    worst = 0.0
    for _ in range(6):
        optimizer.zero_grad()
        net(torch.randn(8, *SHAPE[1:])).square().sum().neg().backward()  # upwards
        optimizer.step()
        worst = max(worst, float(net.fc.weight.detach().double().norm(2)))
        clipper.step()
        tops = truths(net)
        net.train()
        assert max(tops[name] for name in ("conv + norm", "up", "fc")) <= LIMIT * (1 + 1e-4)
    assert worst > LIMIT  # there was something to do
    assert list(net.state_dict()) == keys


def test_spectral_norm_is_clipped_after_training_only() -> None:
    net = trained("spectral_norm").train()
    old = copy.deepcopy(net.state_dict())
    with pytest.warns(UserWarning, match="operators that are not clipped: 3"):
        clipper = spectool.SpectralClipper(net, LIMIT, every=1, input_shape=SHAPE)
    assert all("training mode renews" in reason for reason in clipper.refused.values())
    assert clipper.step().keys() == clipper.refused.keys()
    assert all(torch.equal(value, old[name]) for name, value in net.state_dict().items())
    assert clipper.finish().counts["clipped"] == 3
    tops = truths(net)
    assert max(tops[name] for name in ("conv + norm", "up", "fc")) <= LIMIT * (1 + 1e-9)


@pytest.mark.parametrize("turned", [False, True])
def test_weight_norm_in_an_onnx_graph(turned: bool, tmp_path: Path) -> None:
    """As exporters write it without folding constants; truth is what ONNX Runtime computes."""
    tensors = {"fc.weight_v": weights(5, 7), "fc.weight_g": np.abs(weights(5, 1)) + 1}
    steps = [node("ReduceL2", "fc.weight_v", "n", axes=[1]), node("Div", "fc.weight_v n", "d")]
    steps += [node("Mul", "d fc.weight_g", "w"), node("Transpose", "w", "wt", perm=[1, 0])]
    last = node("MatMul", "x wt", "y") if turned else node("Gemm", "x w", "y", transB=1)
    made = model(graph([*steps, last] if turned else [*steps[:3], last], {"x": [7, 7]}, "y", tensors))
    (tmp_path / "net.onnx").write_bytes(made.SerializeToString())
    report = spectool.clip(tmp_path / "net.onnx", max=LIMIT, out=tmp_path / "out.onnx")
    assert [row.action for row in report.rows] == ["clipped"]
    assert set(report.changed) == set(tensors)
    (y,) = ort_run(onnx.load(tmp_path / "out.onnx"), {"x": np.eye(7, dtype=np.float32)}, ["y"])
    assert LIMIT * (1 - 3e-4) <= _top(y.astype(np.float64)) <= LIMIT * (1 + 1e-9)


@pytest.mark.parametrize(("rows", "lengths"), [(1, (1, 1)), (5, ()), (5, (1, 1))])
def test_one_length_for_the_whole_weight_of_an_onnx_graph(
    rows: int, lengths: tuple[int, ...], tmp_path: Path
) -> None:
    """A single number is one of the tensors, and one that a program adds to the length is none."""
    tensors = {"fc.weight_v": weights(rows, 7), "fc.weight_g": np.full(lengths, -2.0, np.float32)}
    steps = [node("ReduceL2", "fc.weight_v", "n", axes=[0, 1]), node("Add", "n tiny", "m")]
    steps += [node("Div", "fc.weight_v m", "d"), node("Mul", "d fc.weight_g", "w")]
    last = node("Gemm", "x w", "y", transB=1)
    stored = {**tensors, "tiny": np.float32(1e-12)}
    made = model(graph([*steps, last], {"x": [7, 7]}, "y", stored))
    (tmp_path / "net.onnx").write_bytes(made.SerializeToString())
    report = spectool.clip(tmp_path / "net.onnx", max=LIMIT, out=tmp_path / "out.onnx")
    assert [row.action for row in report.rows] == ["clipped"]
    assert set(report.changed) <= set(tensors)
    (y,) = ort_run(onnx.load(tmp_path / "out.onnx"), {"x": np.eye(7, dtype=np.float32)}, ["y"])
    assert LIMIT * (1 - 3e-4) <= _top(y.astype(np.float64)) <= LIMIT * (1 + 1e-9)


@pytest.mark.parametrize("kind", list(WRAPS))
def test_parametrised_layers_are_calibrated(kind: str, tmp_path: Path) -> None:
    """Old hooks keep a weight with its graph, which cannot be copied, and kept a fake one after the tape."""
    torch.save(trained(kind).state_dict(), tmp_path / "net.pt")
    program = {"arch": f"{__name__}:factory", "arch_args": {"kind": kind}, "input_shape": SHAPE}
    inputs = torch.randn(16, *SHAPE[1:])
    report = spectool.clip(
        tmp_path / "net.pt", max=LIMIT, out=tmp_path / "out.pt", calibrate=inputs, **program
    )
    again = Net(kind)
    again.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True))
    tops = truths(again)
    assert max(tops[name] for name in ("conv + norm", "up", "fc")) <= LIMIT * (1 + 1e-9)
    assert {row.metric for row in report.rows} == {"data"}
    assert "norm.running_mean" in report.changed
