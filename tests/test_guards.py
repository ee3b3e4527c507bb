"""Rules of the house that no single test would notice being broken."""

from __future__ import annotations

import ast
import builtins
import doctest
import importlib
import itertools
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import spectool
from spectool import errors

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "spectool"
SOURCES = sorted(PACKAGE.rglob("*.py"))
RANKS = {
    **dict.fromkeys(["errors", "progress"], 0),
    **dict.fromkeys(["linear", "checkpoint"], 1),
    **dict.fromkeys(["spectrum", "graph"], 2),
    **dict.fromkeys(["architectures", "lower"], 3),
    **dict.fromkeys(["clip", "report"], 4),
    "api": 5,
    "cli": 6,
    "__main__": 7,
}
HEAVY = {"torch", "onnx", "onnx2torch", "pandas", "scipy", "matplotlib", "plotly", "xlsxwriter"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tracked_texts() -> Iterator[tuple[str, str]]:
    """Yield path and text of everything that could be in the repository (which need not be a git checkout)."""
    made = {"build", "dist", "__pycache__"}
    for folder in [ROOT, ROOT / ".ci", *ROOT.glob("[!.]*/")]:
        if folder.name in made or (folder / "pyvenv.cfg").exists() or folder.suffix == ".egg-info":
            continue
        for path in sorted(folder.glob("*") if folder == ROOT else folder.rglob("*")):
            if path.is_file() and not made & set(path.parts) and path.name != ".git":
                yield name_of(path), path.read_bytes().decode("utf-8", errors="replace")


# --- layers -----------------------------------------------------------------------------------------------


def imported(path: Path) -> Iterator[str]:
    """Yield the dotted names under ``spectool`` that a file imports when it runs (not only for type checkers)."""

    class Typing(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST:
            return ast.Pass() if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)

    for node in ast.walk(Typing().visit(ast.parse(path.read_text()))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name_of(path)} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_a_file_imports_only_from_lower_ranks_or_its_own_package() -> None:
    broken = []
    for path in SOURCES:
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for target in imported(path):
            package = [*target.split("."), ""][1]
            if target.split(".")[0] != "spectool" or package in (own, "__version__") or own == "__init__":
                continue
            if RANKS.get(package, 9) >= RANKS[own]:
                broken.append(f"{name_of(path)} imports {target}")
    assert broken == []


def test_every_package_has_a_rank() -> None:
    packages = {path.name.removesuffix(".py") for path in PACKAGE.glob("[!_]*") if path.suffix in ("", ".py")}
    assert packages <= set(RANKS)


# --- public names -----------------------------------------------------------------------------------------


def test_public_names_are_exactly_all() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    typed = {alias.asname or alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
             if (node.module or "").startswith("spectool") for alias in node.names}  # fmt: skip
    assert set(spectool.__all__) == typed | {"__version__"} == set(spectool._HOMES) | {"__version__"}
    assert spectool.__all__ == sorted(spectool.__all__)
    for name in spectool.__all__:
        assert getattr(spectool, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = spectool.nothing


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name == "__init__.py"], ids=name_of)
def test_every_name_in_all_exists(path: Path) -> None:
    module = importlib.import_module(module_of(path))
    names = getattr(module, "__all__", [])
    assert len(names) == len(set(names))
    assert [name for name in names if not hasattr(module, name)] == []


def test_the_version_is_the_one_of_the_package() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert re.findall(r'^version = "(.+)"$', text, flags=re.MULTILINE) == [spectool.__version__]


# --- documentation ----------------------------------------------------------------------------------------


def public_functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef]]:
    tree = ast.parse(path.read_text())
    for node in tree.body:
        bodies = [node] if isinstance(node, ast.FunctionDef) else []
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            bodies = [inner for inner in node.body if isinstance(inner, ast.FunctionDef)]
        yield from (
            (f"{name_of(path)}:{body.lineno}", body) for body in bodies if not body.name.startswith("_")
        )


def section(docstring: str, title: str) -> set[str] | None:
    """Return the names that a Google docstring lists under a title; None if it has no such section."""
    lines = docstring.splitlines()
    if f"{title}:" not in lines:
        return None
    body = itertools.takewhile(lambda line: line[:1] in ("", " "), lines[lines.index(f"{title}:") + 1 :])
    entries = (re.match(r" {4}\*{0,2}([\w.]+)(?: \(.*?\))?:", line) for line in body)
    return {entry[1] for entry in entries if entry}


def test_docstrings_list_the_arguments_that_the_function_has() -> None:
    wrong = []
    for path in SOURCES:
        for place, function in public_functions(path):
            documented = section(ast.get_docstring(function) or "", "Args")
            spec = function.args
            arguments = [
                *spec.posonlyargs,
                *spec.args,
                *spec.kwonlyargs,
                *filter(None, [spec.vararg, spec.kwarg]),
            ]
            actual = {argument.arg for argument in arguments} - {"self", "cls"}
            if documented is not None and documented != actual:
                wrong.append(f"{place} {function.name}: {sorted(documented ^ actual)}")
    assert wrong == []


def test_docstrings_name_errors_that_exist() -> None:
    wrong = []
    for path in SOURCES:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        known = {node.name for node in nodes if isinstance(node, ast.ClassDef)}
        known |= {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
        for place, function in public_functions(path):
            for name in (section(ast.get_docstring(function) or "", "Raises") or set()) - known:
                if not hasattr(errors, name) and not hasattr(builtins, name):
                    wrong.append(f"{place} {function.name}: {name}")
    assert wrong == []


@pytest.mark.parametrize("name", [name for name in spectool.__all__ if re.match(r"[a-z]", name)])
def test_public_functions_explain_themselves(name: str) -> None:
    text = getattr(spectool, name).__doc__ or ""
    text = text.partition("\n")[0] + "\n" + textwrap.dedent(text.partition("\n")[2])
    first = text.splitlines()[0]
    assert first.endswith(".")
    assert section(text, "Args"), "no Args"
    assert first.startswith("Return ") or re.search(r"^Returns:", text, flags=re.MULTILINE), "no Returns"
    assert doctest.DocTestParser().get_examples(text), "no example"


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


WITH_EXAMPLES = [module_of(path) for path in SOURCES if ">>>" in path.read_text()]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_in_docstrings_are_true(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # examples name files as a reader of the repository would
    failed, attempted = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert attempted > 0
    assert failed == 0


# --- the command line -------------------------------------------------------------------------------------


def commands() -> dict[str, object]:
    typer = importlib.import_module("typer.main")
    group = typer.get_command(importlib.import_module("spectool.cli").app)
    return dict(group.commands)


def test_every_command_is_documented_and_has_help() -> None:
    pages = "\n".join(path.read_text() for path in (ROOT / "docs").rglob("*.md"))
    found = commands()
    assert {"ls", "inspect"} <= set(found)
    for name, command in found.items():
        assert re.search(rf"\bspectool {name}\b", pages), f"docs say nothing about {name}"
        assert getattr(command, "help", ""), name
        for parameter in getattr(command, "params", []):
            assert getattr(parameter, "help", None), f"{name} {parameter.name}"


def loaded_by(*arguments: str) -> set[str]:
    """Return the top-level packages that a run of the command line imports."""
    code = "import sys; sys.argv[0] = 'spectool'; from spectool.cli import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-X", "importtime", "-c", code, *arguments]
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout
    names = re.findall(r"^import time:.*\|\s+([\w.]+)$", result.stderr, flags=re.MULTILINE)
    assert "typing" in names
    return {name.split(".")[0] for name in names}


def test_help_imports_nothing_heavy() -> None:
    assert loaded_by("--help") & HEAVY == set()


@pytest.mark.parametrize("file", ["digits_cnn_training.pt", "digits_cnn.safetensors", "digits_mlp_sharded"])
def test_listing_imports_nothing_heavy(file: str) -> None:
    assert loaded_by("ls", f"sample_models/{file}") & HEAVY == set()


def test_listing_an_onnx_model_imports_no_torch() -> None:
    assert loaded_by("ls", "sample_models/digits_mlp.onnx") & HEAVY <= {"onnx"}


# --- files ------------------------------------------------------------------------------------------------


def test_no_file_is_past_400_lines() -> None:
    texts = {path: text for path, text in tracked_texts() if path.endswith(".py")}
    assert len(texts) > 50
    assert {path: text.count("\n") for path, text in texts.items() if text.count("\n") > 400} == {}


def test_only_the_command_line_prints() -> None:
    printing = []
    for path in SOURCES:
        if "cli" in path.relative_to(PACKAGE).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "print",
                "sys.stdout.write",
                "sys.stderr.write",
            ):
                printing.append(f"{name_of(path)}:{node.lineno}")
    assert printing == []


def test_no_file_names_a_folder_of_the_machine_that_made_it() -> None:
    pattern = re.compile(r"(?<![\w.])/(?:work|root|farm|opt|home)/[A-Za-z]")
    named = [path for path, text in tracked_texts() if pattern.search(text)]
    assert named == []


def test_ci_runs_what_the_readme_says() -> None:
    steps = [line for line in (ROOT / ".ci/run").read_text().splitlines() if line.startswith("python -m ")]
    assert len(steps) == 5
    readme = (ROOT / "README.md").read_text()
    assert [step for step in steps if step not in readme] == []
