"""The process that runs mutants: one request a line on stdin, one answer a line on stdout."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from .contract import Bench
from .mutate import mutant


def main() -> None:
    """Answer requests until stdin ends."""
    folder = Path(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    os.chdir(folder)
    warnings.simplefilter("ignore")
    trace = (folder / "trace").open("w")
    faulthandler.enable(trace)
    import torch

    torch.set_num_threads(1)
    bench = Bench(folder)
    answers.write(json.dumps({"ready": True}) + "\n")
    answers.flush()
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        with contextlib.suppress(OSError):
            trace.truncate(0)
        faulthandler.dump_traceback_later(request["seconds"] * 0.9, file=trace)
        made = mutant(request["name"], request["seed"], request.get("only"))
        outcome = bench.run(made.case, request["compute"], request["clip"], request["shell"])
        faulthandler.cancel_dump_traceback_later()
        answers.write(json.dumps({**outcome.plain(), "steps": made.steps, "size": made.case.size}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
