"""What a pickle asks an ordinary unpickler to run: names that no checkpoint needs. Nothing here looks them up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spectool.checkpoint.inert import Foreign, Reference

#: Modules that reach the system, the network, other processes or the interpreter: any name that leads through one.
_SYSTEM = frozenset(
    [
        "os",
        "posix",
        "nt",
        "sys",
        "subprocess",
        "_posixsubprocess",
        "shutil",
        "socket",
        "importlib",
        "ctypes",
        "runpy",
        "pty",
        "webbrowser",
    ]
)
#: Others of that kind, with names too common to mean them further inside.
_OUTERMOST = frozenset(
    [
        "asyncio",
        "bdb",
        "cProfile",
        "code",
        "codeop",
        "commands",
        "doctest",
        "ensurepip",
        "ftplib",
        "http",
        "imp",
        "linecache",
        "msvcrt",
        "pdb",
        "pip",
        "pkgutil",
        "popen2",
        "profile",
        "pydoc",
        "requests",
        "signal",
        "smtplib",
        "ssl",
        "telnetlib",
        "tempfile",
        "timeit",
        "trace",
        "urllib",
        "winreg",
        "zipimport",
        "_thread",
        "_winapi",
        "_winreg",
    ]
)
_BUILTIN = frozenset(["builtins", "__builtin__", "__builtins__"])
_RUNS = frozenset(
    [
        "__import__",
        "breakpoint",
        "compile",
        "delattr",
        "eval",
        "exec",
        "execfile",
        "globals",
        "input",
        "open",
        "setattr",
        "vars",
    ]
)
#: Functions that run code, read pickles or write files, by their module.
_FUNCTIONS: Mapping[str, frozenset[str]] = {
    module: frozenset(names.split())
    for modules, names in (
        (("io", "_io"), "open open_code FileIO"),
        (("types",), "CodeType FunctionType"),
        (("operator", "_operator"), "attrgetter methodcaller"),
        (
            ("marshal", "pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib"),
            "load loads Unpickler",
        ),
        (("numpy", "numpy.lib.npyio"), "load fromfile memmap"),
        (("pandas", "pandas.io.pickle"), "read_pickle"),
        (("torch", "torch.serialization", "torch.jit", "torch.jit._serialization"), "load"),
    )
    for module in modules
}
_INSIDE_TORCH = ("torch.hub.", "torch.package.", "torch.utils.cpp_extension.", "torch.utils.model_zoo.")
_NAMED, _LONGEST = 3, 60
_MOST = 10_000
_BEGINS = "its pickle asks to call "


class Payloads:
    """Names in a pickle by which loading it would run something.

    The rule (``docs/security.md``) is about names that no checkpoint needs. Classes of modules, containers and what
    rebuilds tensors are never among them, whatever package they come from.
    """

    def __init__(self) -> None:
        self._names: dict[str, None] = {}

    def name(self, name: str) -> None:
        """Note a name that the pickle imports."""
        if is_payload(name):
            self._add(name)

    def call(self, function: Any, args: Any) -> None:
        """Note a call of ``getattr`` that reaches for what no checkpoint needs."""
        if not (isinstance(function, Reference) and isinstance(args, tuple) and len(args) >= 2):
            return
        module, _, name = function.name.rpartition(".")
        if module not in _BUILTIN or name != "getattr":
            return
        owner, attribute = args[:2]
        whose = (
            owner.name if isinstance(owner, Reference) else owner.cls if isinstance(owner, Foreign) else ""
        )
        reached = isinstance(attribute, str) and (attribute.startswith("__") or attribute in _SYSTEM | _RUNS)
        if reached or is_payload(whose):
            self._add(function.name)

    def notes(self) -> tuple[str, ...]:
        """Return one note if there is anything to say."""
        if not self._names:
            return ()
        known = [name if len(name) <= _LONGEST else f"{name[:_LONGEST]}…" for name in self._names]
        more = f" and {len(known) - _NAMED} more" if len(known) > _NAMED else ""
        return (
            f"{_BEGINS}{', '.join(known[:_NAMED])}{more} when it is loaded; spectool did not run it, "
            "torch.load(weights_only=False) would",
        )

    def _add(self, name: str) -> None:
        if len(self._names) < _MOST:
            self._names[name] = None


def is_payload_note(note: str) -> bool:
    """Tell whether a note of a checkpoint is one of ``Payloads.notes``."""
    return note.startswith(_BEGINS)


def is_payload(name: str) -> bool:
    """Tell whether a dotted name is one that no checkpoint needs.

    Example:
        >>> [is_payload(name) for name in ("os.system", "torch.serialization.os.popen", "builtins.eval")]
        [True, True, True]
        >>> [is_payload(name) for name in ("torch._utils._rebuild_tensor_v2", "argparse.Namespace", "builtins.set")]
        [False, False, False]
    """
    parts = name.split(".")
    module, last = name.rpartition(".")[0], parts[-1]
    if parts[0] in _OUTERMOST or not _SYSTEM.isdisjoint(parts) or name.startswith(_INSIDE_TORCH):
        return True
    if last == "load_library" or (last in _RUNS and not _BUILTIN.isdisjoint(parts[:-1])):
        return True
    return last in _FUNCTIONS.get(module, ())
