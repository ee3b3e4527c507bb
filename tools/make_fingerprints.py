"""Write spectool/architectures/fingerprints.json: the fingerprint of every torchvision and timm classifier.

Run it in an environment with torchvision and, if wanted, timm: ``python tools/make_fingerprints.py``.
Where several names share one set of keys and shapes, the first in the library's order is kept.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import torch

from spectool.architectures.fingerprints import fingerprint
from spectool.architectures.resolve import build, import_torchvision
from spectool.errors import SpectoolError

TARGET = Path(__file__).parent.parent / "spectool" / "architectures" / "fingerprints.json"


def names() -> list[str]:
    """Return the names of all classifiers of the installed libraries."""
    torchvision = import_torchvision()
    found = [f"torchvision:{name}" for name in torchvision.models.list_models(module=torchvision.models)]
    if importlib.util.find_spec("timm") is not None:
        import timm

        found += [f"timm:{name}" for name in timm.list_models()]
    return found


def main() -> None:
    """Build every model on the meta device and write the table."""
    table: dict[str, str] = {}
    failed = []
    for name in names():
        try:
            module = build(name)
        except SpectoolError:
            failed.append(name)
            continue
        shapes = {
            key: tuple(value.shape)
            for key, value in module.state_dict(keep_vars=True).items()
            if isinstance(value, torch.Tensor)
        }
        table.setdefault(fingerprint(shapes), name)
    TARGET.write_text(json.dumps(dict(sorted(table.items())), indent=0) + "\n", encoding="utf-8")
    sys.stderr.write(f"{len(table)} fingerprints, {len(failed)} models not built: {', '.join(failed[:8])}\n")


if __name__ == "__main__":
    main()
