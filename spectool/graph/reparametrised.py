"""Weights that a module recomputes from other parameters: weight norm, spectral norm, pruning.

Both the old hooks (``weight_g``/``weight_v``, ``weight_orig``/``weight_u``/``weight_v``, ``weight_orig``/
``weight_mask``) and ``torch.nn.utils.parametrizations`` are known; any other parametrisation is a function that the
file does not hold, so its row is skipped with that reason.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from spectool.graph.effective import Effective, Found
from spectool.graph.parametrisations import Shaped, pruned, spectral_norm, weight_norm
from spectool.graph.types import Skipped

_NEW = re.compile(r"^(?P<prefix>(?P<owner>.*?)parametrizations\.(?P<local>[^.]+)\.)(?P<leaf>.+)$")
_OLD = re.compile(r"^(?P<weight>(?:.*\.)?[^.]*(?:weight|kernel)[^.]*)_(?P<role>g|orig)$")


def find_reparametrised(
    tensors: Mapping[str, Shaped], free: Collection[str], *, axis: int | None = None
) -> Iterator[Found]:
    """Yield the weights that follow from other parameters.

    Args:
        tensors: All tensors of the file.
        free: Names that no other finder has taken.
        axis: Of spectral norm: which axis of the weight is that of its matrix's rows; None judges by the vectors.
    """
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name in tensors:
        if name not in free:
            continue
        if match := _NEW.match(name):
            groups.setdefault((match["prefix"], match["owner"], match["local"]), []).append(name)
        elif match := _OLD.match(name):
            if match["role"] == "orig":
                yield from _old_original(tensors, match["weight"], axis)
            elif f"{match['weight']}_v" in tensors and f"{match['weight']}_orig" not in tensors:
                v = f"{match['weight']}_v"
                made = weight_norm(match["weight"], name, v, tensors)
                if made is not None:
                    yield Found((name, v), weight=made)
    for (prefix, owner, local), members in groups.items():
        yield _parametrised(tensors, prefix, f"{owner}{local}", tuple(members), axis)


def _parametrised(
    tensors: Mapping[str, Shaped], prefix: str, weight: str, members: tuple[str, ...], axis: int | None
) -> Found:
    leaves = {name.removeprefix(prefix) for name in members}
    made: Effective | None = None
    if leaves == {"original0", "original1"}:
        made = weight_norm(weight, f"{prefix}original0", f"{prefix}original1", tensors)
    elif leaves == {"original", "0._u", "0._v"}:
        made = spectral_norm(weight, f"{prefix}original", f"{prefix}0._u", f"{prefix}0._v", tensors, axis)
    if made is not None:
        return Found(members, weight=made)
    rank = max(len(tensors[name].shape) for name in members)
    if rank < 2:
        return Found(members)
    reason = f"parametrised by a function the file does not hold (tensors: {', '.join(sorted(leaves))})"
    return Found(members, item=_skip(weight, members, tensors, reason))


def _skip(weight: str, members: tuple[str, ...], tensors: Mapping[str, Shaped], reason: str) -> Skipped:
    shapes = tuple(tensors[name].shape for name in members)
    rank = max(len(shape) for shape in shapes)
    return Skipped(weight, f"conv{rank - 2}d" if 3 <= rank <= 5 else "linear", members, shapes, reason)


def _old_original(tensors: Mapping[str, Shaped], weight: str, axis: int | None) -> Iterator[Found]:
    original, u, v, mask = (f"{weight}_{suffix}" for suffix in ("orig", "u", "v", "mask"))
    if mask in tensors and tensors[mask].shape == tensors[original].shape:
        yield Found((original, mask), weight=pruned(weight, original, mask, tensors))
    elif u in tensors and v in tensors:
        made = spectral_norm(weight, original, u, v, tensors, axis)
        if made is not None:
            yield Found((original, u, v), weight=made)
    elif u in tensors and len(tensors[original].shape) > 1:
        # Before torch 1.0 only u was stored and v recomputed from the last step of training.
        reason = "spectral norm whose right vector is not in the file"
        yield Found((original, u), item=_skip(weight, (original, u), tensors, reason))
