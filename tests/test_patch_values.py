"""Lossless writing of ``torch.save`` files: which values a tensor takes, and which it does not."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import same, values
from patch_tools import FORMS, assert_clean, load, written

import spectool
from spectool.checkpoint import can_write, open_checkpoint
from spectool.checkpoint.patch.sharing import sharing
from spectool.errors import OutputError


@pytest.mark.parametrize("form", FORMS)
def test_edits_that_contradict_each_other(tmp_path: Path, form: dict[str, Any]) -> None:
    whole = values((6, 5))
    path = tmp_path / "in.pt"
    torch.save(
        {"whole": whole, "row": whole[2], "odd": whole[1::2], "even": whole[::2], "tied": whole}, path, **form
    )
    checkpoint = open_checkpoint(path)
    out = tmp_path / "out.pt"
    new = values((6, 5), seed=4)
    for edits in (
        {"whole": new, "tied": new + 1},
        {"whole": new, "row": new[3]},
        {"row": new[3], "even": new[::2]},
    ):
        with pytest.raises(OutputError, match="share bytes and their new values contradict"):
            checkpoint.write(out, edits)
    assert_clean(tmp_path, "in.pt")
    checkpoint.write(out, {"whole": new, "row": new[2]})
    assert same(load(out)["whole"], new)
    checkpoint.write(tmp_path / "apart.pt", {"odd": new[1::2], "even": new[::2]})
    assert (tmp_path / "apart.pt").read_bytes() == out.read_bytes()


@pytest.mark.parametrize("form", FORMS)
def test_tensors_that_repeat_their_bytes(tmp_path: Path, form: dict[str, Any]) -> None:
    path, out = tmp_path / "in.pt", tmp_path / "out.pt"
    windows = values((6,), seed=1).unfold(0, 3, 1)
    torch.save({"row": values((1, 4)).expand(3, 4), "windows": windows}, path, **form)
    checkpoint = open_checkpoint(path)
    for name in ("row", "windows"):
        assert "repeats its own bytes" in str(can_write(checkpoint, name))
        with pytest.raises(
            OutputError, match=f"tensor '{name}' repeats its own bytes .* the new values do not"
        ):
            checkpoint.write(out, {name: torch.arange(12.0).reshape(checkpoint.tensors[name].shape)})
    edits = {"row": values((1, 4), seed=3).expand(3, 4), "windows": values((6,), seed=8).unfold(0, 3, 1)}
    checkpoint.write(out, edits)
    after = load(out)
    assert all(same(after[name], tensor) for name, tensor in edits.items())


def big_endian_zip(path: Path, tensor: torch.Tensor) -> None:
    """The file a big-endian machine would have written."""
    torch.save({"w": tensor}, path)
    part = tensor.dtype.itemsize // (2 if tensor.dtype.is_complex else 1)
    flipped = tensor.reshape(-1).view(torch.uint8).reshape(-1, part).flip(1).numpy().tobytes()
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            kind = name.split("/", 1)[1]
            archive.writestr(name, {"byteorder": b"big", "data/0": flipped}.get(kind, data))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
def test_big_endian_files(tmp_path: Path, dtype: torch.dtype) -> None:
    path, out = tmp_path / "in.pt", tmp_path / "out.pt"
    big_endian_zip(path, values((4, 3), dtype))
    new = values((4, 3), dtype, 6)
    written(path, out, {"w": new})
    assert same(load(out)["w"], new)
    big_endian_zip(path, new)
    with zipfile.ZipFile(path) as wanted, zipfile.ZipFile(out) as got:
        assert got.testzip() is None
        assert got.namelist() == wanted.namelist()
        # torch derives the serialization id from the checksums when it saves; nothing reads it.
        names = [name for name in got.namelist() if not name.endswith("serialization_id")]
        assert [got.read(name) for name in names] == [wanted.read(name) for name in names]


def test_wrong_edits(tmp_path: Path) -> None:
    path, out = tmp_path / "in.pt", tmp_path / "out.pt"
    torch.save({"w": values((3, 4)), "s": torch.eye(2).to_sparse()}, path)
    checkpoint = open_checkpoint(path)
    with pytest.raises(
        ValueError, match=r"'w' is stored as torch.float32 \(3, 4\); .* torch.float64 \(3, 4\)"
    ):
        checkpoint.write(out, {"w": values((3, 4), torch.float64)})
    with pytest.raises(ValueError, match=r"the new values are torch.float32 \(4, 3\)"):
        checkpoint.write(out, {"w": values((4, 3))})
    with pytest.raises(ValueError, match="are not dense"):
        checkpoint.write(out, {"w": values((3, 4)).to_sparse()})
    with pytest.raises(KeyError, match="has no tensor 'v'"):
        checkpoint.write(out, {"v": values((3, 4))})
    assert "cannot be read: a sparse tensor" in str(can_write(checkpoint, "s"))
    with pytest.raises(OutputError, match="tensor 's' cannot be written: its values cannot be read"):
        checkpoint.write(out, {"s": torch.eye(2)})
    with pytest.raises(KeyError, match="v"):
        can_write(checkpoint, "v")
    assert_clean(tmp_path, "in.pt")


def test_what_cannot_be_written_says_why(tmp_path: Path) -> None:
    path = tmp_path / "in.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and common in files
        quantised = torch.quantize_per_tensor(torch.ones(2, 2), 0.5, 0, torch.qint8)
    torch.save({"array": values((2, 2)).numpy(), "q": quantised, "w": values((2, 2))}, path)
    checkpoint = open_checkpoint(path)
    assert "inside a pickle" in str(can_write(checkpoint, "array"))
    assert "quantised" in str(can_write(checkpoint, "q"))
    assert can_write(checkpoint, "w") is None


def test_conjugate_and_foreign_edits(tmp_path: Path) -> None:
    """Lazy views, gradients and odd strides of the new values do not matter."""
    path, out = tmp_path / "in.pt", tmp_path / "out.pt"
    torch.save({"c": values((3, 4), torch.complex64), "w": values((3, 4))}, path)
    new = torch.complex(values((4, 3)), values((4, 3), seed=2)).t().conj()
    odd = torch.nn.Parameter(values((4, 3), seed=5)).t()
    written(path, out, {"c": new, "w": odd})
    assert same(load(out)["c"], new.resolve_conj())
    assert same(load(out)["w"], odd.detach())
    whole = torch.complex(values((3, 4)), values((3, 4), seed=2)).conj()
    written(path, out, {"c": whole, "w": whole.imag}, force=True)
    assert same(load(out)["c"], whole.resolve_conj())
    assert torch.equal(load(out)["w"], -values((3, 4), seed=2))


@pytest.mark.parametrize("form", FORMS)
def test_who_changes_with_an_edit(tmp_path: Path, form: dict[str, Any]) -> None:
    """Columns lie between each other without sharing; a row and its matrix share."""
    whole = values((6, 5))
    parts = {"whole": whole, "row": whole[2], "left": whole[:, :2], "right": whole[:, 2:], "tied": whole}
    torch.save({**parts, "apart": values((6, 5))}, tmp_path / "in.pt", **form)
    checkpoint = open_checkpoint(tmp_path / "in.pt")
    for edited in ({"left"}, {"whole"}, {"row"}, {"right", "row"}, {"apart"}, {"left", "apart"}, set[str]()):
        new = {name: torch.zeros_like(checkpoint.read(name)) for name in edited}
        out = tmp_path / f"{'-'.join(sorted(edited))}.pt"
        checkpoint.write(out, new)
        after = load(out)
        changed = [name for name in checkpoint.tensors if not same(after[name], checkpoint.read(name))]
        assert [name for name in changed if name not in edited] == list(sharing(checkpoint, edited))


def test_a_clip_says_what_else_it_changed(tmp_path: Path) -> None:
    whole = values((6, 5))
    torch.save({"whole": whole, "half": whole[:3], "apart": values((3, 5))}, tmp_path / "in.pt")
    clip = spectool.clip(tmp_path / "in.pt", max=0.5, out=tmp_path / "out.pt", layers=["whole"])
    assert any(note == "changed, too, where they share bytes: half" for note in clip.report.notes)
    clip = spectool.clip(tmp_path / "in.pt", max=0.5, out=tmp_path / "apart.pt", layers=["apart"])
    assert not any("share bytes" in note for note in clip.report.notes)
