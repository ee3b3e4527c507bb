"""How strongly an adapter counts: alpha over its rank, wherever a file says it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any

from spectool.graph.effective import Read

if TYPE_CHECKING:
    from spectool.checkpoint.types import Checkpoint

ALPHA_UNKNOWN = "alpha=r"
PATTERN_UNREAD = "alpha_pattern not applied"


@dataclass(frozen=True)
class Scale:
    """The factor on an adapter's product.

    Attributes:
        rank: Rank of the adapter.
        value: The factor, if the metadata say it; 1 where nothing does.
        tensor: Name of the tensor that holds alpha; empty if there is none.
        assumed: What had to be assumed.
    """

    rank: int
    value: float = 1.0
    tensor: str = ""
    assumed: tuple[str, ...] = ()

    @property
    def trivial(self) -> bool:
        """Whether the factor is known to be 1."""
        return not self.tensor and self.value == 1.0

    @property
    def words(self) -> str:
        """The factor in words."""
        if self.tensor:
            return f"scaled by {self.tensor} / {self.rank}"
        return (
            "alpha unknown, alpha/r taken as 1"
            if ALPHA_UNKNOWN in self.assumed
            else f"scaled by {self.value:g}"
        )

    def read(self, read: Read) -> float:
        """Return the factor, reading alpha if a tensor holds it."""
        return float(read(self.tensor)) / self.rank if self.tensor else self.value


def adapter_scale(checkpoint: Checkpoint, base: str, rank: int) -> Scale:
    """Return the factor on an adapter's product.

    In order: the tensor ``base.alpha`` beside the factors, a PEFT configuration in the metadata (with its patterns
    and rsLoRA's alpha/√r), kohya's metadata; else alpha = r is assumed.

    Args:
        checkpoint: The file.
        base: Name of the adapted module.
        rank: Rank of the adapter.
    """
    alpha = checkpoint.tensors.get(f"{base}.alpha")
    if alpha is not None and alpha.numel == 1:
        return Scale(rank, tensor=alpha.name)
    config = _peft_config(checkpoint.metadata, base)
    patterns = config.get("alpha_pattern")
    own, unread = _by_pattern(patterns if isinstance(patterns, Mapping) else {}, base)
    for source in (own, config.get("lora_alpha"), checkpoint.metadata.get("ss_network_alpha")):
        value = _number(source)
        if value is not None:
            said = (PATTERN_UNREAD,) if unread else ()
            return Scale(
                rank, value / (sqrt(rank) if config.get("use_rslora") is True else rank), assumed=said
            )
    return Scale(rank, assumed=(ALPHA_UNKNOWN,))


def _peft_config(metadata: Mapping[str, Any], base: str) -> Mapping[str, Any]:
    """Return PEFT's configuration: under a key of its own, as JSON text, or spread over the metadata."""
    for key in ("adapter_config", "adapter_config.json", "lora_adapter_metadata"):
        entry = metadata.get(key)
        if isinstance(entry, str):
            try:
                entry = json.loads(entry)
            except ValueError:
                continue
        if isinstance(entry, Mapping):
            # diffusers puts the component in front: ``unet.lora_alpha``.
            prefix = f"{base.partition('.')[0]}."
            own = {str(name)[len(prefix) :]: entry[name] for name in entry if str(name).startswith(prefix)}
            return own or entry
    return metadata


def _by_pattern(patterns: Mapping[Any, Any], base: str) -> tuple[Any, bool]:
    """Return the value of the first pattern that matches the end of a module's name, as PEFT does.

    Patterns come from the file, and a regular expression can be made to take for ever: only names with anchors and
    a few wildcards are tried. The second value says whether one had to be passed over.
    """
    unread = False
    for pattern, value in patterns.items():
        text = str(pattern)
        if not re.fullmatch(r"(?:[\w\-^$.]|\\\.|\.\*)+", text) or text.count("*") > 3 or len(text) > 200:
            unread = True
        elif re.match(rf"(.*\.)?({text})$", base):
            return value, False
    return None, unread


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if abs(number) < float("inf") else None
