"""Every attack through the real command line: refused in one line or read for what it holds, and nothing runs.

What an attack is and what must come of it stands beside its builder (``attack_pickles.py``, ``attack_archives.py``…).
They run in one process after another (``run_attacks.py``), under a limit on memory and with an audit hook that sees
whatever Python is made to do. The slow ones run where ``SPECTOOL_ATTACKS=all`` is set.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from attack import FOREIGN, TOKEN, Attack
from attack_calls import RUNS, trapped
from run_attacks import Audit, everything

HERE = Path(__file__).parent
ATTACKS = everything()
ALL = os.environ.get("SPECTOOL_ATTACKS") == "all"
Result = dict[str, Any]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> dict[str, Result]:
    """Run the attacks that are wanted, all in one go, because importing torch takes longer than most of them."""
    wanted = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    names = [name for name in ATTACKS if name in wanted]
    command = [sys.executable, "-W", "ignore", str(HERE / "run_attacks.py"), "--json", *names]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "critical",
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    return {result["name"]: result for result in found}


@pytest.mark.parametrize("name", [name for name, attack in ATTACKS.items() if ALL or not attack.slow])
def test_attack(results: dict[str, Result], name: str) -> None:
    attack, result = ATTACKS[name], results[name]
    assert result["status"] == 0, f"ended by {-result['status']} after {attack.seconds} s of CPU"
    assert not result.get("error")
    assert result["seen"] == []
    assert not result["ran"]
    assert result["changed"] == []
    assert result["peak"] <= 2 * result["size"] + 10**9 + OVERHEAD
    codes = {command: code for command, (code, _, _) in result["commands"].items()}
    if attack.refused or attack.lost:
        assert codes.items() <= {"ls": 2 if attack.refused else 0, "inspect": 2, "clip": 2}.items()
        for command, (code, _, messages) in result["commands"].items():
            if code:
                check_error(messages, attack.refused or attack.lost)
                assert command == "ls" or not result["written"]
        return
    assert codes.items() <= {"ls": 0, "inspect": 0, "clip": attack.clip}.items()
    rows = json.loads(result["commands"]["inspect"][1])["rows"]
    assert any(row["status"] == "ok" and row["lower"] <= 3 <= row["upper"] for row in rows)
    notes = [row["note"] for row in rows if row["status"] in ("failed", "skipped")]
    assert (
        any(re.search(attack.failed, note) for note in notes) if attack.failed else attack.clip or not notes
    )
    if "clip" not in codes:
        return
    if attack.clip == 2:
        check_error(result["commands"]["clip"][2], ".")
        assert not result["written"]
    else:
        check_clipped(result)


#: What the interpreter and torch take before the first byte is read, and a report of many rows after the last.
OVERHEAD = 350 * 2**20


def check_error(messages: str, pattern: str) -> None:
    """One line that says what is wrong, one that says what to do at most, and never a traceback."""
    lines = [line for line in messages.splitlines() if not line.startswith(("warning: ", "hint: "))]
    assert len(lines) == 1, messages
    assert lines[0].startswith("error: ")
    assert "internal" not in lines[0]
    assert re.search(pattern, lines[0]), lines[0]
    assert len(lines[0]) < 2000
    assert lines[0].isprintable()


def check_clipped(result: Result) -> None:
    """Nothing is left in the way, and every row that was changed is within its limit."""
    assert result["written"]
    assert not [name for name in result["written"] if name.endswith(".tmp")]
    rows = json.loads(result["commands"]["clip"][1])["rows"]
    changed = [row for row in rows if row.get("change")]
    assert changed
    assert all(row["after"]["sigma"] <= 1.5 for row in changed)


# --- the attacks are real ones ----------------------------------------------------------------------------------

LOADED = {
    name: payload
    for name, payload in RUNS.items()
    if name not in ("a socket", "webbrowser", "pip.main", "os.execv")
}


@pytest.mark.parametrize("name", LOADED)
def test_an_ordinary_unpickler_runs_the_payload(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{FOREIGN}.py").write_text(
        f"open({str(tmp_path / TOKEN)!r}, 'w').close()\n"
        "class Thing:\n def __setitem__(self, key, value): pass\n def extend(self, items): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    data = b"\x80\x02" + RUNS[name](tmp_path) + b"."
    trapped(RUNS[name])(tmp_path)
    try:
        value = pickle.loads(data)
        if isinstance(value, subprocess.Popen):
            value.wait()
        elif hasattr(value, "close"):
            value.close()
    except Exception as error:  # what it returns may be of no use to the function around it
        print(error)
    finally:
        sys.modules.pop(FOREIGN, None)
    assert (tmp_path / TOKEN).exists()


@pytest.mark.parametrize(
    ("event", "arguments", "seen"),
    [
        ("os.system", (b"true",), True),
        ("subprocess.Popen", ("true", [], None, None), True),
        ("os.posix_spawn", ("true",), True),
        ("socket.connect", (None, ("127.0.0.1", 9)), True),
        ("pickle.find_class", ("os", "system"), True),
        ("import", (FOREIGN, None, None, None, None), True),
        ("exec", (compile(f"x = {TOKEN!r}", "<string>", "exec"),), True),
        ("open", ("elsewhere", "w", 0), True),
        ("open", ("elsewhere", None, os.O_CREAT | os.O_WRONLY), True),
        ("os.remove", ("elsewhere", -1), True),
        ("os.rename", ("out/a", "elsewhere", -1, -1), True),
        ("os.rename", ("out/a", "out/b", -1, -1), False),
        ("open", ("out/a", "wb", 0), False),
        ("open", ("elsewhere", "rb", 0), False),
        ("import", ("json", None, None, None, None), False),
    ],
)
def test_the_audit_sees_what_it_should(
    event: str, arguments: tuple[Any, ...], seen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    audit = Audit()
    audit(event, arguments)
    assert audit.seen == []
    audit.armed, audit.allowed = True, (str(tmp_path / "out"),)
    audit(event, arguments)
    assert bool(audit.seen) == seen


def test_every_attack_has_a_name_that_can_be_run_alone() -> None:
    for name, attack in ATTACKS.items():
        assert isinstance(attack, Attack)
        assert name.isprintable()
        assert sum(map(bool, (attack.refused, attack.lost, attack.failed))) <= 1
