"""Every vector of the threat table names tests and attacks that exist, and every attack is in the table."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from run_attacks import everything

ROOT = Path(__file__).parents[2]
#: Vectors that the project set out to defend against; the table may hold more.
VECTORS = [
    *(
        "pickle",
        "zip",
        "gzip",
        "safetensors",
        "ONNX external data",
        "TorchScript",
        ".pt2",
        "Hugging Face",
        "CSV",
        "XLSX",
    ),
    *("HTML", "terminal", "JUnit", "SARIF", "GitHub", "paths", "resource exhaustion", "concurrent writers"),
]


def table() -> list[list[str]]:
    """Rows of the threat table: vector, example, defence, tests."""
    lines = (
        (ROOT / "docs" / "security.md")
        .read_text()
        .partition("## Threats")[2]
        .partition("## Limits")[0]
        .splitlines()
    )
    rows = [re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


@pytest.mark.parametrize("row", table(), ids=lambda row: row[0])
def test_a_vector_names_tests_that_exist(row: list[str]) -> None:
    vector, example, defence, tests = row
    assert all((vector, example, defence))
    named = re.findall(r"`([^`]+)`", tests)
    assert named
    attacks = list(everything())
    for name in named:
        if "::" not in name:
            assert any(attack.startswith(name) for attack in attacks), name
            continue
        path, _, function = name.partition("::")
        tree = ast.parse((ROOT / path).read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


def test_the_table_covers_every_vector() -> None:
    vectors = "\n".join(row[0] for row in table())
    assert [vector for vector in VECTORS if vector.lower() not in vectors.lower()] == []


def test_every_attack_stands_in_the_table() -> None:
    named = tuple(name for row in table() for name in re.findall(r"`([^`]+)`", row[3]) if "::" not in name)
    assert [attack for attack in everything() if not attack.startswith(named)] == []
