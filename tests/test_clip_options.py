"""Every option of `spectool clip` reaches the library, and none that could do harm comes from a file."""

from __future__ import annotations

import json
from inspect import signature
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import spectool as library
from spectool.api.clipping import clip
from spectool.cli import main


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return a net of three Linear with σ₁ = 1, 2, 3, in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".git").mkdir()  # the search for a configuration ends here
    tensors = {f"fc{size}.weight": torch.diag(torch.tensor([float(size), 0.5])) for size in (1, 2, 3)}
    save_file(tensors, tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def test_every_option_reaches_the_library(monkeypatch: pytest.MonkeyPatch, net: Path) -> None:
    given: dict[str, object] = {}

    def stub(source: Path, **options: object) -> None:
        given.update(options, source=source)
        raise library.SpectoolError("far enough")

    monkeypatch.setattr("spectool.api.clip", stub)
    inputs = net.parent / "inputs.npz"
    inputs.touch()
    text = (
        f"clip {net} --max 2 --max fc1*=1 --prove --min-change --all-sizes --recenter bias --calibrate {inputs} "
        "-k 3 --input 1x2 --arch a:b --arch-args {} --no-recognise --trust --method symbol --tol 1e-4 "
        "--max-matvecs 9 --seed 5 --device cpu --dtype float64 --hash --level both --layers fc* --exclude fc9* "
        f"--kind linear,conv2d --assume-bn --key ema -o {net.parent / 'out'} --force "
        "--max-tensor-bytes 1GB --limit depth=7"
    )
    assert main(text.split()) == library.SpectoolError.exit_code
    assert set(given) == set(signature(clip).parameters)
    given.pop("progress")
    assert given.pop("max").to_dict() == {"*": 2.0, "fc1*": 1.0}  # type: ignore[attr-defined]
    assert given == {
        "source": net,
        "out": net.parent / "out",
        "force": True,
        "dry_run": False,
        "prove": True,
        "exact": True,
        "all_sizes": True,
        "method": "symbol",
        "k": 3,
        "input_shape": (1, 2),
        "tol": 1e-4,
        "max_matvecs": 9,
        "seed": 5,
        "device": "cpu",
        "dtype": "float64",
        "level": "both",
        "layers": ("fc*",),
        "exclude": ("fc9*",),
        "kinds": ("linear", "conv2d"),
        "assume_bn": True,
        "key": "ema",
        "arch": "a:b",
        "arch_args": {},
        "recognise": False,
        "trust": True,
        "hash": True,
        "recenter": "bias",
        "calibrate": inputs,
        "limits": library.Limits(tensor_bytes=10**9, depth=7),
    }
    main(["clip", str(net), "--max", "2", "--exact", "--no-recenter", "-n"])
    assert (given["exact"], given["recenter"], given["out"], given["dry_run"]) == (True, "none", None, True)


def test_what_is_written_over_never_comes_from_a_file(capfd: pytest.CaptureFixture[str], net: Path) -> None:
    for key in ("force = true", "in-place = true", "report = 'r.csv'", "output = 'o.pt'"):
        (net.parent / "spectool.toml").write_text(f"[clip]\n{key}\n")
        code = main(["clip", str(net), "--max", "1.5", "-n"])
        assert code == 2
        assert "cannot be set in a file" in capfd.readouterr().err
    (net.parent / "spectool.toml").write_text('[clip]\nmax = ["1.5", "fc3.*=2"]\nprove = true\n')
    assert main(["clip", str(net), "-n", "--format", "json"]) == 0
    out = capfd.readouterr().out
    assert json.loads(out)["settings"]["max"] == {"*": 1.5, "fc3.*": 2.0}
    assert json.loads(out)["settings"]["prove"] is True
