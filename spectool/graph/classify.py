"""What a tensor is, by its name, its shape and its neighbours in one module: rules, tried in order.

A floating tensor of rank 2 or more always ends somewhere: in a region, in a skipped row with a reason, or, if it is
a bias or a mask, in a note. Vectors get rows only where they could be taken for an operator.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod

from spectool.graph.effective import Weights, is_complex, is_floating
from spectool.graph.layout import Orientation, kernel_layout, orientation
from spectool.graph.rows import (
    BY_SHAPE,
    batchnorm_step,
    conv_step,
    embedding_step,
    linear_step,
    region,
)
from spectool.graph.types import Region, Skipped

_GAINS = ("weight", "gamma", "scale", "g")
_SHIFTS = ("bias", "beta")
_MEANS = ("running_mean", "moving_mean", "mean")
_VARIANCES = ("running_var", "moving_variance", "moving_var", "var", "variance")
_GATES = {4: "lstm", 3: "gru", 1: "rnn"}
_RECURRENT = re.compile(r"^weight_(?P<role>ih|hh|hr)(?P<suffix>(?:_l\d+(?:_reverse)?)?)$")

# Last part of an embedding module's name. An embedding has no bias; what has one is a Linear.
_EMBEDDING = re.compile(
    r"(?:^|_)(?:emb|embed|embeds|embedding|embeddings|embedder)$"
    r"|^(?:wte|wpe|tok_embeddings|embed_(?:tokens|positions|in)|relative_attention_bias|lookup_table)$"
)
# Parameters that are added or looked up by position, never multiplied with an activation.
_TABLE = re.compile(
    r"(?:^|_)pos(?:ition|itional)?(?:_?(?:emb|embed|embedding|embeddings|enc|encoding|table|ids?))+s?(?:_|$)"
    r"|(?:^|_)(?:cls|mask|dist|class|register|query|sep|bos|eos|pad|null|prompt|latent|learn(?:able|ed))"
    r"_(?:tokens?|query|queries|embeds?|embedding|emb|latents?)(?:_|$)"
    r"|bias_table|(?:^|_)rel_pos(?:_[hwt])?$|(?:^|_)rel(?:ative)?_(?:pos|position|attn)_?(?:bias|emb|embedding)"
    r"|(?:^|_)(?:pe|tokens?|latents|freqs|freqs_cis|inv_freq|anchors?|priors?)$"
)
_BIAS = re.compile(r"^bias|bias$|_bias_|^beta$|^pos_bias_|^(?:b|bias)_[kv]$|^diff_b$")
_MASK = re.compile(r"mask")
_NORM = re.compile(r"norm|^ln|_ln(?:_|$)|(?:^|_)rms|^gn\d*$|^bn\d*$|^in\d+$", re.IGNORECASE)
_MOST_EXPERTS = 4096
_EXPERTS = re.compile(r"(?:^|\.|_)(?:experts|moe)(?:\.|_|$)|\.block_sparse_moe\.")


@dataclass
class Rows:
    """Rows found so far, each with the name of the tensor that decides its place, and notes."""

    placed: list[tuple[str, Region | Skipped]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def classify(weights: Weights, names: Iterable[str]) -> Rows:
    """Make rows of tensors known by name and shape alone.

    Args:
        weights: The weights of the file.
        names: The stored or derived weights to classify, in file order.
    """
    ordered = list(names)
    groups: dict[str, dict[str, str]] = {}
    for name in ordered:
        owner, _, leaf = name.rpartition(".")
        groups.setdefault(owner, {})[leaf] = name
    layout = orientation(weights, groups)
    rows = Rows()
    done: set[str] = set()
    for name in ordered:
        if name in done:
            continue
        owner, _, leaf = name.rpartition(".")
        group = groups[owner]
        rule = _batchnorm(weights, group, leaf) or _recurrent(weights, group, leaf)
        if rule is not None:
            used, items = rule
            done.update(used)
            rows.placed += [(name, item) for item in items]
        else:
            done.add(name)
            _single(weights, name, group, layout, rows)
    return rows


def batchnorm_names(weights: Weights, group: Mapping[str, str]) -> dict[str, str] | None:
    """Return gamma, beta, mean and var of a module with running statistics (``""`` if absent), else None."""

    def pick(leaves: Iterable[str]) -> str:
        return next((group[leaf] for leaf in leaves if leaf in group), "")

    found = {"gamma": pick(_GAINS), "beta": pick(_SHIFTS), "mean": pick(_MEANS), "var": pick(_VARIANCES)}
    if not found["mean"] or not found["var"]:
        return None
    # Plain "mean" and "var" also name input normalisers; a norm of its own has a gain as well.
    if not found["gamma"] and not {"running_var", "moving_variance", "moving_var"} & set(group):
        return None
    shapes = {weights.shape(name) for name in found.values() if name}
    if len(shapes) != 1 or len(shapes.pop()) != 1:
        return None
    return found


def _batchnorm(
    weights: Weights, group: Mapping[str, str], leaf: str
) -> tuple[list[str], list[Region | Skipped]] | None:
    found = batchnorm_names(weights, group)
    if found is None or group[leaf] not in found.values():
        return None
    step = batchnorm_step(
        weights, gamma=found["gamma"], beta=found["beta"], mean=found["mean"], var=found["var"]
    )
    return [name for name in found.values() if name], [region([step])]


def _recurrent(
    weights: Weights, group: Mapping[str, str], leaf: str
) -> tuple[list[str], list[Region | Skipped]] | None:
    """Rows of a recurrent matrix, one per gate, or of a fused attention projection, one per part."""
    name = group[leaf]
    shape = weights.shape(name)
    if len(shape) != 2 or not is_floating(weights.dtype(name)) or not prod(shape):
        return None
    axis = 0
    if match := _RECURRENT.match(leaf):
        hidden = group.get(f"weight_hh{match['suffix']}")
        project = group.get(f"weight_hr{match['suffix']}")
        if hidden is None or len(weights.shape(hidden)) != 2:
            return None
        height, width = weights.shape(hidden)
        size = weights.shape(project)[-1] if project else width
        kind = _GATES.get(height // size if size and height % size == 0 else 0, "")
        if not kind:
            return None
        if match["role"] == "hr":
            return [name], [region([linear_step(weights, name, kind=kind)])]
        if shape[0] != height:
            return None
    elif leaf in ("kernel", "recurrent_kernel") and "recurrent_kernel" in group:
        size = weights.shape(group["recurrent_kernel"])[0]
        axis = 1
        kind = _GATES.get(shape[1] // size if size and shape[1] % size == 0 else 0, "")
        if not kind:
            return None
    elif leaf == "in_proj_weight" and shape[0] == 3 * shape[1]:
        size, kind = shape[1], "linear"
    else:
        return None
    if size == shape[axis]:
        return [name], [region([linear_step(weights, name, kind=kind, transposed=axis == 1)])]
    parts = [weights.part(name, at, at + size, axis=axis) for at in range(0, shape[axis], size)]
    rows = [region([linear_step(weights, part, kind=kind, transposed=axis == 1)]) for part in parts]
    return [name], list(rows)


def _single(
    weights: Weights, name: str, group: Mapping[str, str], layout: Mapping[str, Orientation], rows: Rows
) -> None:
    """Add the rows of one tensor, or its note, or nothing if it is no candidate for an operator."""
    leaf = name.rpartition(".")[2]
    shape, dtype = weights.shape(name), weights.dtype(name)
    rank = len(shape)
    if is_complex(dtype) and rank >= 2:
        rows.placed.append((name, skip(weights, name, "region", "complex weights are out of scope")))
    elif not is_floating(dtype) or rank == 0:
        return
    elif rank == 1:
        item = _vector(weights, name, group)
        if item is not None:
            rows.placed.append((name, item))
    elif not prod(shape):
        rows.placed.append((name, skip(weights, name, "linear", "has no elements")))
    elif not _is_weight(leaf) and _TABLE.search(leaf):
        reason = "a table that is added or read, no operator"
        rows.placed.append((name, nonlinear(weights, name, "embedding", reason)))
    elif _BIAS.search(leaf):
        rows.notes.append(f"{name}: a bias, no operator")
    elif _MASK.search(leaf):
        rows.notes.append(f"{name}: a mask, no operator")
    elif leaf in _GAINS and any(shift in group and weights.shape(group[shift]) == shape for shift in _SHIFTS):
        reason = "a norm over several axes: divides by statistics of its input"
        rows.placed.append((name, nonlinear(weights, name, "layernorm", reason)))
    elif rank == 2:
        rows.placed.append((name, _matrix(weights, name, group, layout)))
    elif rank == 3 and _EXPERTS.search(name) and shape[0] <= _MOST_EXPERTS:
        for index in range(shape[0]):
            part = weights.part(name, index)
            rows.placed.append(
                (name, region([linear_step(weights, part, note="one matrix of a stack of experts")]))
            )
    else:
        rows.placed.append((name, _kernel(weights, name, group)))


def _matrix(
    weights: Weights, name: str, group: Mapping[str, str], layout: Mapping[str, Orientation]
) -> Region:
    owner, _, leaf = name.rpartition(".")
    module = owner.rpartition(".")[2]
    table = leaf in ("embedding", "embeddings") or (leaf == "weight" and _EMBEDDING.search(module.lower()))
    shared = leaf == "weight" and owner.rpartition(".")[2] == "shared"  # the one table of T5 and BART
    if (table or shared) and not any(shift in group for shift in _SHIFTS):
        return region([embedding_step(weights, name)])
    stored = layout.get(name, Orientation())
    return region(
        [
            linear_step(
                weights,
                name,
                kind="lora" if leaf == "diff" else "linear",
                transposed=stored.transposed,
                assumed=() if _is_weight(leaf) or leaf == "diff" else (BY_SHAPE,),
                note=stored.note or ("a full difference" if leaf == "diff" else ""),
            )
        ]
    )


def _kernel(weights: Weights, name: str, group: Mapping[str, str]) -> Region | Skipped:
    leaf = name.rpartition(".")[2]
    shape = weights.shape(name)
    if not 3 <= len(shape) <= 5 or not (_is_weight(leaf) or leaf == "diff"):
        return skip(weights, name, "region", f"rank {len(shape)} and a name that does not say what it does")
    if leaf == "diff":
        return region([conv_step(weights, name, kind="lora", note="a full difference")])
    if "kernel" in leaf:
        bias = next((weights.shape(group[shift]) for shift in _SHIFTS if shift in group), None)
        channels_last = kernel_layout(shape, bias[0] if bias and len(bias) == 1 else None)
        if channels_last is None:
            reason = "a kernel whose axes may be (out, in, …) or (…, in, out)"
            return skip(weights, name, f"conv{len(shape) - 2}d", reason)
        if channels_last:
            weights.move_channels_first(name)
            return region([conv_step(weights, name, assumed=("kernel stored (…, in, out)",))])
    depthwise = "perhaps depthwise" if shape[1] == 1 and shape[0] > 1 else ""
    return region([conv_step(weights, name, note=depthwise)])


def _vector(weights: Weights, name: str, group: Mapping[str, str]) -> Skipped | None:
    owner, _, leaf = name.rpartition(".")
    if leaf not in _GAINS or (leaf in ("scale", "g") and weights.shape(name) == (1,)):
        return None
    module = owner.rpartition(".")[2].lower()
    shifted = any(shift in group for shift in _SHIFTS)
    if "prelu" in module:
        return nonlinear(weights, name, "prelu", "slopes of a PReLU")
    if shifted or _NORM.search(module):
        kind = "layernorm" if shifted else "rmsnorm"
        if "group" in module or module.startswith("gn"):
            kind = "groupnorm"
        elif "instance" in module:
            kind = "instancenorm"
        return nonlinear(weights, name, kind, "no running statistics: divides by statistics of its input")
    reason = "a vector alone: a norm's gain, slopes of a PReLU or a scale, which its name does not tell"
    return nonlinear(weights, name, "scale", reason)


def skip(weights: Weights, name: str, kind: str, reason: str) -> Skipped:
    """Return the row of a linear operator that is not analysed."""
    return Skipped(name, kind, weights.sources(name), weights.source_shapes(name), reason)


def nonlinear(weights: Weights, name: str, kind: str, reason: str) -> Skipped:
    """Return the row of something that is no linear operator."""
    shapes = weights.source_shapes(name)
    return Skipped(name, kind, weights.sources(name), shapes, reason, status="nonlinear", operators=0)


def _is_weight(leaf: str) -> bool:
    return leaf.startswith("weight") or leaf.endswith(("weight", "kernel"))
