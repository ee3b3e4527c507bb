"""From edits to the changed contents of each file they stand in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectool.checkpoint.limits import Limits
from spectool.checkpoint.patch.content import Content, Splice
from spectool.checkpoint.patch.values import check_edits, splices_of
from spectool.checkpoint.patch.zipcrc import is_zip, with_checksums
from spectool.checkpoint.source import Source
from spectool.checkpoint.types import Checkpoint, TensorRef

if TYPE_CHECKING:
    import torch

#: What was read once within the user's limits may be read again.
UNBOUNDED = Limits(**dict.fromkeys(Limits.__dataclass_fields__, 2**62))

_RAW = ("safetensors", "safetensors-sharded", "onnx")


@dataclass(frozen=True)
class Plan:
    """One write, before anything is written.

    Attributes:
        checkpoint: What is copied.
        edits: Ref and new values of every edit.
        sources: File → its bytes.
    """

    checkpoint: Checkpoint
    edits: Sequence[tuple[TensorRef, torch.Tensor]]
    sources: Mapping[Path, Source]

    def check_sources(self) -> None:
        """Ask once more, just before a copy gets its name, whether the originals are what they were.

        Raises:
            CorruptFile: If one changed or vanished since it was opened.
        """
        for source in self.sources.values():
            source.check()

    def contents(self, locations: Mapping[str, str] | None = None) -> dict[Path, Content]:
        """Return the contents of every file that changes.

        Args:
            locations: Names of an ONNX model's external data files that change, old → new.

        Raises:
            CorruptFile: If the file is not what its structure said.
            OutputError: If two edits contradict each other, or a tensor that repeats its own bytes would get values
                that do not.
        """
        found: dict[Path, Content] = {}
        by_file: dict[Path, list[Any]] = {}
        for edit in self.edits:
            if edit[0].base >= 0:
                by_file.setdefault(edit[0].file, []).append(edit)
        for file, edits in by_file.items():
            content = Content(self.sources[file], splices_of(self.sources[file], edits))
            if self.checkpoint.format not in _RAW and is_zip(content.source):
                content = with_checksums(content, UNBOUNDED)
            found[file] = content
        inside = {ref.name: tensor for ref, tensor in self.edits if ref.base < 0}
        if self.checkpoint.format == "onnx" and (inside or locations or found):
            model = self.checkpoint.path
            splices = self._model_splices(inside, locations or {}, found)
            if splices:
                found[model] = Content(self.sources[model], splices)
        return found

    def _model_splices(
        self,
        inside: Mapping[str, torch.Tensor],
        locations: Mapping[str, str],
        data: Mapping[Path, Content],
    ) -> list[Splice]:
        from spectool.checkpoint.patch.onnxfields import field_splices

        model = self.checkpoint.path
        digests: dict[str, str] = {}

        def digest(name: str) -> str | None:
            content = data.get(model.parent / name)
            if content is not None and name not in digests:
                checksum = hashlib.sha1(usedforsecurity=False)
                for block in content.blocks():
                    checksum.update(block)
                digests[name] = checksum.hexdigest()
            return digests.get(name)

        return field_splices(self.checkpoint, self.sources[model], inside, locations, digest)


def plan_of(checkpoint: Checkpoint, edits: Mapping[str, torch.Tensor]) -> Plan:
    """Check edits against a checkpoint.

    Raises:
        KeyError, ValueError, OutputError: As ``check_edits``.
        ValueError: If the checkpoint was not opened from files.
    """
    sources = getattr(checkpoint.reader, "sources", None)
    if sources is None:
        raise ValueError(f"checkpoint {checkpoint.path} was built without files to copy")
    return Plan(checkpoint, check_edits(checkpoint, edits), sources)
