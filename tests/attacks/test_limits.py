"""Limits on what a file may ask for: options, environment, configuration and library, and what their errors say."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from attack import checkpoint, integer, text

import spectool
from spectool.checkpoint.limits import DEFAULT, Limits
from spectool.cli import main
from spectool.cli.reading import parse_amount, parse_limits
from spectool.errors import LimitExceeded, UsageError

DOCS = Path(__file__).parents[2] / "docs"
NAMES = [field.name for field in dataclasses.fields(Limits)]


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".git").mkdir()  # the search for a configuration ends here
    checkpoint(tmp_path / "net.pt", text("n"), integer(2**80))
    return "net.pt"


@pytest.mark.parametrize("name", NAMES)
def test_every_limit_names_itself(name: str) -> None:
    limits = Limits(**{name: 7})
    limits.check(name, 7, "net.pt: it")
    with pytest.raises(
        LimitExceeded, match=rf"^net.pt: it asks for 1,008, more than the limit {name} = 7$"
    ) as caught:
        limits.check(name, 1008, "net.pt: it")
    option = "--max-tensor-bytes" if name == "tensor_bytes" else f"--limit {name}="
    assert option in caught.value.hint
    with pytest.raises(LimitExceeded, match="asks for far too much"):
        limits.check(name, 10**5000, "net.pt: it")


@pytest.mark.parametrize(
    "command", [["ls"], ["inspect", "-k", "1"], ["check", "--max", "9"], ["clip", "--max", "9", "-n"]]
)
def test_every_command_takes_limits(net: str, command: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    name, *more = command
    assert main([name, net, *more]) == 0
    for option in (["--limit", "integer_bytes=10"], ["--limit", "depth=9", "--limit", "integer-bytes=10"]):
        assert main([name, net, *more, *option]) == 2
        error, hint = capfd.readouterr().err.splitlines()[-2:]
        assert error.endswith("an integer asks for 11, more than the limit integer_bytes = 10")
        assert "--limit integer_bytes=N" in hint
    assert main([name, net, *more, "--max-tensor-bytes", "63"]) == 2
    error, hint = capfd.readouterr().err.splitlines()[-2:]
    assert error.endswith("tensor 'w' asks for 64, more than the limit tensor_bytes = 63")
    assert "--max-tensor-bytes N" in hint
    assert main([name, net, *more, "--max-tensor-bytes", "64"]) == 0


def test_the_environment_and_a_configuration_set_limits(
    net: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("spectool.toml").write_text('limit = ["integer_bytes=10", "depth=50"]\n')
    assert main(["ls", net]) == 2
    assert "integer_bytes = 10" in capfd.readouterr().err
    monkeypatch.setenv("SPECTOOL_LIMIT", "integer_bytes=11 depth=50")
    assert main(["ls", net]) == 0
    monkeypatch.setenv("SPECTOOL_MAX_TENSOR_BYTES", "10B")
    assert main(["ls", net]) == 2
    assert "tensor_bytes = 10" in capfd.readouterr().err
    assert main(["ls", net, "--max-tensor-bytes", "1kB"]) == 0


def test_the_library_takes_limits(net: str) -> None:
    few = spectool.Limits(integer_bytes=10)
    with pytest.raises(LimitExceeded, match="integer_bytes = 10"):
        spectool.ls(net, limits=few)
    with pytest.raises(LimitExceeded, match="integer_bytes = 10"):
        spectool.inspect(net, limits=few)
    with pytest.raises(LimitExceeded, match="integer_bytes = 10"):
        spectool.check(net, 9.0, limits=few)
    with pytest.raises(LimitExceeded, match="integer_bytes = 10"):
        spectool.clip(net, max=9.0, dry_run=True, limits=few)
    # What was allowed for reading is allowed for hashing, which reads the structure again.
    checkpoint(Path("more.pt"), text("n"), integer(2**9000))
    assert spectool.inspect("more.pt", k=1, hash=True, limits=spectool.Limits(integer_bytes=2000)).sha256


@pytest.mark.parametrize(
    ("written", "amount"),
    [("200", 200), ("1_000_000", 10**6), ("1,000", 1000), ("2GB", 2 * 10**9), ("2 gb", 2 * 10**9), ("512MiB", 2**29),
     ("1.5k", 1500), ("3TiB", 3 * 2**40), ("7B", 7), ("4K", 4000), ("9007199254740993", 9007199254740993)],
)  # fmt: skip
def test_amounts(written: str, amount: int) -> None:
    assert parse_amount(written, "it") == amount


@pytest.mark.parametrize(
    "written", ["", "many", "-1", "1.2.3", "2XB", "1iB", "0x10", "1e9", "GB", "1,00", "nan", "²", "9" * 5000]
)
def test_what_is_no_amount(written: str) -> None:
    with pytest.raises(UsageError, match=r"^it is no amount$"):
        parse_amount(written, "it")


def test_what_is_no_limit() -> None:
    with pytest.raises(UsageError, match="'dept=3' is no limit") as caught:
        parse_limits(None, ["dept=3"])
    assert caught.value.hint == "did you mean depth=N?"
    with pytest.raises(UsageError, match="'xyzzy=3' is no limit") as caught:
        parse_limits(None, ["xyzzy=3"])
    assert all(name in caught.value.hint for name in NAMES)
    with pytest.raises(UsageError, match="'depth' is no limit") as caught:
        parse_limits(None, ["depth"])
    assert "NAME=VALUE" in caught.value.hint
    assert parse_limits(None, []) == DEFAULT
    assert parse_limits("1GiB", ["tensor_bytes=5", "depth=1", "depth=2"]) == Limits(
        tensor_bytes=2**30, depth=2
    )


def test_the_documentation_lists_every_limit_with_its_default() -> None:
    rows = dict(
        re.findall(r"^\| `(\w+)` \| (\d+) \|", (DOCS / "security.md").read_text(), flags=re.MULTILINE)
    )
    assert rows == {name: str(getattr(DEFAULT, name)) for name in NAMES}
