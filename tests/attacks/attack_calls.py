"""Pickles that run something when an ordinary unpickler reads them: every way that the stack machine has to call."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path

from attack import FOREIGN, TOKEN, WEIGHT, Attack, checkpoint, integer, state, text, torch_zip

#: Name → opcodes that leave one object, made for a folder in which the payload would leave a file.
Payload = Callable[[Path], bytes]


def call(name: str, *arguments: bytes) -> bytes:
    """A call by REDUCE."""
    module, _, attribute = name.rpartition(".")
    return b"c" + f"{module}\n{attribute}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def touch(folder: Path) -> str:
    return f"touch {folder / TOKEN}"


def source(folder: Path) -> str:
    return f"open({str(folder / TOKEN)!r}, 'w').close()"


def through_getattr(folder: Path) -> bytes:
    """``getattr(__import__('os'), 'system')(…)``: no opcode names the function that runs."""
    module = call("builtins.__import__", text("os"))
    return call("builtins.getattr", module, text("system")) + b"(" + text(touch(folder)) + b"tR"


def through_state(folder: Path) -> bytes:
    """BUILD gives an object its state, and with it runs ``__setstate__``."""
    return f"c{FOREIGN}\nThing\n".encode() + b")\x81}" + text("path") + text(str(folder / TOKEN)) + b"sb"


def through_items(folder: Path) -> bytes:
    """SETITEMS calls ``__setitem__`` of whatever stands there, APPENDS ``extend``, ADDITEMS ``add``."""
    thing = f"c{FOREIGN}\nThing\n".encode() + b")\x81"
    return thing + b"(" + text("a") + b"Nu" + thing + b"(Ne" + b"\x86"


def through_torch(folder: Path) -> bytes:
    """``torch.load`` of another pickle, a file of the attacker's beside this one."""
    (folder / "second.pt").write_bytes(b"\x80\x02" + call("os.system", text(touch(folder))) + b".")
    pickle_module = call("importlib.import_module", text("pickle"))
    return call("torch.load", text(str(folder / "second.pt")), b"N", pickle_module)


def through_rebuild(folder: Path) -> bytes:
    """A torch function that calls what it is given: known names must not call their arguments either."""
    command = b"(" + text(touch(folder)) + b"t"
    return call("torch._tensor._rebuild_from_type_v2", b"cos\nsystem\n", b"cos\nsystem\n", command, b"N")


def chain(folder: Path) -> bytes:
    """A call of the result of a call of the result…: ``partial(partial(…os.system, command)…)()``."""
    inner = call("functools.partial", b"cos\nsystem\n", text(touch(folder)))
    for _ in range(12):
        inner = call("functools.partial", inner)
    return inner + b")R"


RUNS: Mapping[str, Payload] = {
    "os.system": lambda folder: call("os.system", text(touch(folder))),
    "posix.system by STACK_GLOBAL": lambda folder: (
        b"\x8c\x05posix\x8c\x06system\x93" + text(touch(folder)) + b"\x85R"
    ),
    "os.system by INST": lambda folder: b"(" + text(touch(folder)) + b"ios\nsystem\n",
    "os.system by OBJ": lambda folder: b"(cos\nsystem\n" + text(touch(folder)) + b"o",
    "os.execv": lambda folder: call(
        "os.execv", text("/bin/sh"), b"(" + text("sh") + text("-c") + text(touch(folder)) + b"l"
    ),
    "subprocess.Popen": lambda folder: call(
        "subprocess.Popen", b"(" + text("touch") + text(str(folder / TOKEN)) + b"l"
    ),
    "builtins.eval": lambda folder: call("builtins.eval", text(source(folder))),
    "builtins.exec": lambda folder: call("builtins.exec", text(source(folder))),
    "builtins.open": lambda folder: call("builtins.open", text(str(folder / TOKEN)), text("w")),
    "builtins.getattr": through_getattr,
    "importlib.import_module": lambda folder: call("importlib.import_module", text(FOREIGN)),
    "runpy": lambda folder: call("runpy.run_module", text(FOREIGN)),
    "a class by NEWOBJ": lambda folder: f"c{FOREIGN}\nThing\n".encode() + b")\x81",
    "a class by NEWOBJ_EX": lambda folder: f"c{FOREIGN}\nThing\n".encode() + b")}\x92",
    "__setstate__": through_state,
    "__setitem__ and extend": through_items,
    "torch.load": through_torch,
    "torch's own rebuild": through_rebuild,
    "a chain of calls": chain,
    "pip.main": lambda folder: call("pip.main", b"(" + text("download") + text(TOKEN) + b"l"),
    "a socket": lambda folder: call("socket.create_connection", b"(" + text("127.0.0.1") + integer(9) + b"t"),
    "webbrowser": lambda folder: call("webbrowser.open", text("http://127.0.0.1:9/" + TOKEN)),
}


def trapped(payload: Payload) -> Callable[[Path], Path]:
    """A checkpoint that holds a payload beside its weight."""
    return lambda folder: checkpoint(folder / "net.pt", text("trap"), payload(folder))


def as_key(payload: Payload) -> Callable[[Path], Path]:
    return lambda folder: checkpoint(folder / "net.pt", payload(folder), b"N")


def legacy(folder: Path, entry: bytes) -> Path:
    """A file of torch before 1.6: five pickles, then the storages."""
    head = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}."
    storage = struct.pack("<q", WEIGHT.size) + WEIGHT.tobytes()
    path = folder / "old.pt"
    path.write_bytes(head + state(text("trap"), entry) + b"\x80\x02](" + text("0") + b"e." + storage)
    return path


def plain(folder: Path) -> Path:
    (folder / "net.pkl").write_bytes(b"\x80\x02" + RUNS["os.system"](folder) + b".")
    return folder / "net.pkl"


def with_trap(data: bytes) -> Callable[[Path], Path]:
    """A checkpoint with these opcodes beside its weight."""
    return lambda folder: checkpoint(folder / "net.pt", text("trap"), data)


ATTACKS = [
    *(Attack(f"pickle runs {name}", trapped(payload)) for name, payload in RUNS.items()),
    Attack("pickle runs as a key", as_key(RUNS["os.system"])),
    Attack(
        "pickle runs before anything else",
        lambda folder: torch_zip(folder / "net.pt", b"\x80\x02" + RUNS["os.system"](folder) + b"."),
        refused="holds no tensors",
    ),
    Attack(
        "pickle runs as a persistent id",
        lambda folder: checkpoint(folder / "net.pt", text("trap"), RUNS["os.system"](folder) + b"Q"),
        refused="a persistent id is no storage",
    ),
    *(
        Attack(
            f"pickle names extension {name}",
            with_trap(opcode),
            refused="uses an extension registry",
        )
        for name, opcode in {"EXT1": b"\x82\1", "EXT2": b"\x83\1\1", "EXT4": b"\x84\1\1\1\1"}.items()
    ),
    Attack("pickle with out-of-band data", with_trap(b"\x97"), refused="or out-of-band data"),
    # --- the same machine in other containers
    Attack("legacy pickle that runs os.system", lambda folder: legacy(folder, RUNS["os.system"](folder))),
    Attack(
        "plain pickle that runs os.system",
        lambda folder: plain(folder),
        refused=r"a plain pickle \(of os.system\)",
    ),
]
