"""The verdicts of ``check`` for continuous integration: JUnit XML, GitHub workflow commands, SARIF."""

from __future__ import annotations

import hashlib
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from spectool.report.check import CheckReport, CheckRow
from spectool.report.text import number_text, visible

_RULES = {
    "violated": ("error", "σ₁ is proven to exceed its limit", "The lower end of the interval is greater."),
    "undecided": (
        "warning",
        "σ₁ is neither proven within its limit nor beyond it",
        "The interval straddles it.",
    ),
}
_SARIF_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def junit_bytes(report: CheckReport) -> bytes:
    """Return JUnit XML: one test case per gated row, ``failure`` if violated, ``error`` if undecided."""
    gated = [row for row in report.rows if row.gated]
    counts = {
        "tests": str(len(gated)),
        "failures": str(report.counts["violated"]),
        "errors": str(report.counts["undecided"]),
        "skipped": "0",
        "time": f"{sum(row.row.seconds or 0.0 for row in gated):.3f}",
    }
    root = ElementTree.Element("testsuites", {"name": "spectool check", **counts})
    suite = ElementTree.SubElement(root, "testsuite", {"name": _xml(report.report.path or "model"), **counts})
    facts = ElementTree.SubElement(suite, "properties")
    for name, value in (("spectool", report.report.version), ("verdict", report.summary())):
        ElementTree.SubElement(facts, "property", {"name": name, "value": _xml(value)})
    for row in gated:
        case = {
            "classname": f"spectool.{row.row.level}",
            "name": _xml(row.row.layer),
            "time": f"{row.row.seconds or 0.0:.3f}",
        }
        element = ElementTree.SubElement(suite, "testcase", case)
        if row.verdict != "proven":
            tag = "failure" if row.verdict == "violated" else "error"
            said = ElementTree.SubElement(element, tag, {"type": row.verdict, "message": _xml(row.reason)})
            said.text = _xml(_facts(row), keep="\n")
    ElementTree.indent(root)
    text: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return text + b"\n"


def github_bytes(report: CheckReport) -> bytes:
    """Return workflow commands: an error per violated row, a warning per undecided one, a notice that sums up."""
    file = report.report.path
    lines = [
        _command("error" if row.verdict == "violated" else "warning", row.row.layer, file, row.reason)
        for row in report.rows
        if row.verdict in _RULES
    ]
    if report.baseline is not None:
        lines += [
            _command("notice", key, file, "vanished: in the baseline, not in the file")
            for key in report.baseline.vanished
        ]
        lines += [
            _command("notice", row.row.layer, file, "new: not in the baseline")
            for row in report.rows
            if row.baseline is not None and row.baseline.verdict == "new"
        ]
    lines.append(_command("notice", "spectool check", file, report.summary()))
    return "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")


def sarif_bytes(report: CheckReport) -> bytes:
    """Return SARIF 2.1.0: rules ``violated`` and ``undecided``, a result per such row."""
    rules = [
        {
            "id": name,
            "shortDescription": {"text": short},
            "fullDescription": {"text": full},
            "defaultConfiguration": {"level": level},
        }
        for name, (level, short, full) in _RULES.items()
    ]
    driver = {"name": "spectool", "version": report.report.version, "rules": rules}
    run: dict[str, Any] = {
        "tool": {"driver": driver},
        "invocations": [{"executionSuccessful": True, "exitCode": report.exit_code()}],
        "results": [_result(row, report.report.path) for row in report.rows if row.verdict in _RULES],
        "columnKind": "unicodeCodePoints",
    }
    document = {"$schema": _SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}
    return f"{json.dumps(document, indent=1, allow_nan=False)}\n".encode("ascii")


# An entry for each format that only `check` has, and the suffixes that ask for it.
CHECK_FORMATS: Mapping[str, Callable[[CheckReport], bytes]] = {
    "junit": junit_bytes,
    "github": github_bytes,
    "sarif": sarif_bytes,
}
CHECK_SUFFIXES = {"junit": ("xml", "junit"), "github": (), "sarif": ("sarif",)}


def _result(row: CheckRow, path: str | None) -> dict[str, Any]:
    key = visible(row.row.layer)
    location: dict[str, Any] = {"logicalLocations": [{"fullyQualifiedName": key, "kind": "resource"}]}
    if path is not None:
        # Code scanning at GitHub wants a line; a checkpoint has none but the first.
        location["physicalLocation"] = {
            "artifactLocation": {"uri": _uri(path)},
            "region": {"startLine": 1},
        }
    return {
        "ruleId": row.verdict,
        "ruleIndex": list(_RULES).index(row.verdict),
        "level": _RULES[row.verdict][0],
        "message": {"text": f"{key}: {visible(row.reason)}"},
        "locations": [location],
        # What stays the same from run to run, so that one finding is not reported as many.
        "partialFingerprints": {
            "spectool/row/v1": hashlib.sha256(
                f"{row.row.level}\0{row.row.layer}".encode("utf-8", "surrogatepass")
            ).hexdigest()
        },
        "properties": {
            "lower": row.row.lower,
            "upper": row.row.upper,
            "upper_kind": row.row.upper_kind,
            "limit": row.limit,
            "slack": row.slack,
        },
    }


def _uri(path: str) -> str:
    place = Path(path)
    return place.as_uri() if place.is_absolute() else quote(place.as_posix(), errors="surrogateescape")


def _facts(row: CheckRow) -> str:
    """Return the numbers of a row, a fact per line."""
    facts = [
        ("sigma_1_lower", _number(row.row.lower)),
        ("sigma_1_upper", _number(row.row.upper)),
        ("upper_kind", row.row.upper_kind),
        ("limit", _number(row.limit)),
        ("slack", _number(row.slack)),
        ("baseline_upper", _number(row.baseline.upper if row.baseline else None)),
        ("kind", visible(row.row.kind)),
        ("assumed", visible("; ".join(row.row.assumed))),
    ]
    return "".join(f"{name}: {value}\n" for name, value in facts if value)


def _number(value: float | None) -> str:
    return "" if value is None else number_text(value)


def _xml(text: str, *, keep: str = "") -> str:
    """Return text that XML 1.0 may hold: controls spelled out, and the two code points it forbids besides."""
    kept = visible(text, keep=keep)
    return kept.replace("\ufffe", "\\ufffe").replace("\uffff", "\\uffff")


def _command(name: str, title: str, file: str | None, text: str) -> str:
    """Return one workflow command; nothing in it can end it or begin another."""
    given = {"file": file, "title": title}
    properties = ",".join(
        f"{key}={_percent(value, ':,')}" for key, value in given.items() if value is not None
    )
    return f"::{name} {properties}::{_percent(f'{title}: {text}')}"


def _percent(text: str, more: str = "") -> str:
    """Return text as GitHub's runner decodes it."""
    for char in f"%{more}":
        text = text.replace(char, f"%{ord(char):02X}")
    return visible(text)
