"""Files are written whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from report_cases import small_report

from spectool.errors import OutputError
from spectool.report import files as module
from spectool.report import write


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    place = tmp_path / "net.csv"
    place.write_text("old")
    place.chmod(0o640)
    write(small_report(), "csv", place)
    assert place.read_text().startswith("layer,level,kind")
    assert stat.S_IMODE(place.stat().st_mode) == 0o640
    assert [entry.name for entry in tmp_path.iterdir()] == ["net.csv"]


def test_a_new_file_has_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write(small_report(), "csv", tmp_path / "net.csv")
    assert (tmp_path / "net.csv").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "net.csv"
    place.write_text("old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        write(small_report(), "csv", place)
    assert place.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["net.csv"]


def test_an_interrupt_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(small_report(), "csv", tmp_path / "net.csv")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"there is no folder .*missing"):
        write(small_report(), "csv", tmp_path / "missing" / "net.csv")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="it is a folder"):
        write(small_report(), "csv", tmp_path)


def test_a_closed_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "access", lambda place, mode: False)  # the tests may run as root
    with pytest.raises(OutputError, match="no permission to write"):
        write(small_report(), "csv", tmp_path / "net.csv")
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to("real.csv")
    write(small_report(), "csv", tmp_path / "link.csv")
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "real.csv").read_text().startswith("layer")


def test_a_device_is_written_in_place() -> None:
    before = Path(os.devnull).stat().st_mode
    write(small_report(), "csv", os.devnull)
    assert stat.S_ISCHR(Path(os.devnull).stat().st_mode)
    assert Path(os.devnull).stat().st_mode == before
