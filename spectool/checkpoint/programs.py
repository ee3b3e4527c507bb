"""Programs of archives as data: the objects and code of TorchScript, the graph of an exported program."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from spectool.checkpoint.archive import Archive
from spectool.checkpoint.inert import Foreign, Reference, Tensor
from spectool.checkpoint.jsonfile import parse_object
from spectool.checkpoint.limits import Limits
from spectool.checkpoint.torchfile import unpickle_record
from spectool.checkpoint.types import ExportedProgram, ScriptObject, ScriptProgram, StoredTensor

_PLAIN = (bool, int, float, complex, str, type(None))


def script_program(archive: Archive, limits: Limits, keys: Collection[str]) -> ScriptProgram | None:
    """Return the objects and the code of a TorchScript archive, None if it holds no code.

    Args:
        archive: The open archive.
        limits: Bounds of what is read.
        keys: Checkpoint keys that have been bound to tensors.
    """
    code = {}
    total = 0
    for name in archive.records:
        if name.startswith("code/") and name.endswith(".py"):
            text = archive.read(name, "code_bytes")
            total += len(text)
            limits.check("code_bytes", total, f"{archive.source.path}: its code")
            code[name.removeprefix("code/")] = text.decode("utf-8", "replace")
    if not code or "data.pkl" not in archive:
        return None
    made: dict[int, ScriptObject] = {}
    visited = characters = 0

    def convert(value: Any, path: str, depth: int) -> Any:
        nonlocal visited, characters
        visited += 1
        characters += len(path)
        # Containers that share their contents can unfold without end.
        limits.check("names", visited, f"{archive.source.path}: its objects")
        limits.check("name_bytes", characters, f"{archive.source.path}: the names of its objects together")
        limits.check("depth", depth, f"{archive.source.path}: nesting of its objects")
        if isinstance(value, Tensor):
            return StoredTensor(path) if path in keys else None
        if isinstance(value, Foreign):
            if id(value) not in made:
                attributes: dict[str, Any] = {}
                made[id(value)] = ScriptObject(value.cls, attributes)
                for name, inner in value.attributes().items():
                    attributes[name] = convert(inner, f"{path}.{name}" if path else name, depth + 1)
            return made[id(value)]
        if isinstance(value, (list, tuple)):
            return type(value)(
                [convert(inner, f"{path}.{index}", depth + 1) for index, inner in enumerate(value)]
            )
        if isinstance(value, dict):
            return {str(key): convert(inner, f"{path}.{key}", depth + 1) for key, inner in value.items()}
        if isinstance(value, Reference):
            return value.name
        return value if isinstance(value, _PLAIN) else None

    root = convert(unpickle_record(archive, "data.pkl", limits), "", 0)
    if not isinstance(root, ScriptObject):
        return None
    constants: list[str] = []
    while f"CONSTANTS.c{len(constants)}" in keys:
        constants.append(f"CONSTANTS.c{len(constants)}")
    return ScriptProgram(root, code, tuple(constants))


def exported_program(archive: Archive, limits: Limits) -> ExportedProgram | None:
    """Return the graph of an exported program, None if there is none or there are several."""
    names = [name for name in archive.records if name.startswith("models/") and name.endswith(".json")]
    if len(names) != 1:
        return None
    document = parse_object(
        archive.read(names[0], "header_bytes"),
        f"{archive.source.path}: record {names[0]!r}",
        limits,
        infinities=True,
    )
    module = document.get("graph_module")
    graph = module.get("graph") if isinstance(module, dict) else None
    nodes = graph.get("nodes") if isinstance(graph, dict) else None
    limits.check("nodes", len(nodes) if isinstance(nodes, list) else 0, f"{archive.source.path}: its graph")
    return ExportedProgram(document)
