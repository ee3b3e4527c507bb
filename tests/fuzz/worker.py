"""The process that runs mutants: one request a line on stdin, one answer a line on stdout."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
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
    faulthandler.register(signal.SIGUSR1, trace)  # whoever finds this process hung asks where it is
    import torch

    torch.set_num_threads(1)
    bench = Bench(folder)
    answers.write(json.dumps({"ready": True}) + "\n")
    answers.flush()
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        made = mutant(request["name"], request["seed"], request.get("only"))
        outcome = bench.run(
            made.case, request["compute"], request["more"], request["shell"], request["format"]
        )
        answers.write(json.dumps({**outcome.plain(), "steps": made.steps, "size": made.case.size}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
