"""What a process may not do while it reads a stranger's file: an audit hook that takes notes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PROCESSES = {
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
}
_CODE = {"pickle.find_class", "ctypes.dlopen", "sys.settrace"}
#: Event → which of its arguments name what is changed.
_FILES = {
    "os.remove": (0,), "os.rename": (0, 1), "os.mkdir": (0,), "os.rmdir": (0,), "os.truncate": (0,),
    "os.link": (1,), "os.symlink": (1,), "os.chmod": (0,), "os.chown": (0,), "os.utime": (0,), "os.setxattr": (0,),
    "shutil.rmtree": (0,), "shutil.move": (0, 1), "shutil.copyfile": (1,),
}  # fmt: skip
#: What a library may do while it is imported: torch loads shared objects and makes folders for its caches.
_QUIET_IN_IMPORTS = {*_CODE, "open", *_FILES}


class Guard:
    """Notes forbidden events between ``start`` and ``stop``.

    Args:
        folder: Where files may be written.

    Attributes:
        events: What happened, in words.
    """

    def __init__(self, folder: Path) -> None:
        self.events: list[str] = []
        self._folder = os.path.realpath(folder)
        self._watching = False
        sys.addaudithook(self._note)

    def start(self) -> None:
        self.events.clear()
        self._watching = True

    def stop(self) -> None:
        self._watching = False

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._watching or (event in _QUIET_IN_IMPORTS and self._imports()):
            return
        if event.startswith(("socket.", "urllib.")) or event in _PROCESSES or event in _CODE:
            self.events.append(f"{event} {arguments!r}"[:300])
        elif event == "open":
            path, mode, flags = arguments
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & _WRITING
            if writes and not isinstance(path, int) and not self._allowed(path):
                self.events.append(f"open {path!r} {mode!r}"[:300])
        elif event in _FILES:
            for index in _FILES[event]:
                if not isinstance(arguments[index], int) and not self._allowed(_absolute(arguments, index)):
                    self.events.append(f"{event} {arguments!r}"[:300])

    def _allowed(self, path: Any) -> bool:
        text = os.fsdecode(path)
        return text == os.devnull or f"{os.path.realpath(text)}{os.sep}".startswith(self._folder + os.sep)

    @staticmethod
    def _imports() -> bool:
        """Tell whether an import is under way."""
        frame = sys._getframe(2)
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                return True
            frame = frame.f_back  # type: ignore[assignment]
        return False


def _absolute(arguments: tuple[Any, ...], index: int) -> str:
    """Return a path that an event names, relative to an open folder or not."""
    path = os.fsdecode(arguments[index])
    folder = arguments[-1] if len(arguments) > 1 and isinstance(arguments[-1], int) else -1
    return path if folder < 0 else str(Path(f"/proc/self/fd/{folder}").resolve() / path)
