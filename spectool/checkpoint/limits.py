"""How much a file may ask for before it is refused."""

from __future__ import annotations

from dataclasses import dataclass

from spectool.errors import LimitExceeded


@dataclass(frozen=True)
class Limits:
    """Bounds on what reading the structure of a file may cost; the defaults fit every honest checkpoint.

    Tensor bytes are not bounded here: they are checked against the file and read one tensor at a time.

    Attributes:
        header_bytes: Bytes of one JSON header (safetensors, shard index, ``config.json``, exported program).
        pickle_bytes: Bytes of one pickle inside a checkpoint, without the storages.
        opcodes: Opcodes of one pickle; bounds its memo and everything it builds.
        integer_bytes: Bytes of one integer in a pickle.
        depth: Levels of dicts, lists, objects or submodules above a tensor.
        names: Tensors, submodules and attributes of one checkpoint.
        records: Members of one zip archive.
        directory_bytes: Bytes of the zip central directory.
        unpacked_bytes: Bytes that a gzipped file may unpack to.
        unpack_ratio: Unpacked over packed size, for anything that unpacks to more than 64 MiB.
        expanded_bytes: Bytes of a tensor that repeats its storage (stride 0).
        model_bytes: Bytes of an ONNX model without its external data.
    """

    header_bytes: int = 100_000_000
    pickle_bytes: int = 512 * 2**20
    opcodes: int = 5_000_000
    integer_bytes: int = 1024
    depth: int = 100
    names: int = 1_000_000
    records: int = 500_000
    directory_bytes: int = 64 * 2**20
    unpacked_bytes: int = 16 * 2**30
    unpack_ratio: int = 200
    expanded_bytes: int = 2**30
    model_bytes: int = 2**31 - 1

    def check(self, name: str, amount: int, what: str) -> None:
        """Refuse ``amount`` of something if it exceeds the limit called ``name``.

        Args:
            name: A field of this class.
            amount: How much the file asks for.
            what: What asks, beginning with the file's name: ``net.pt: the pickle``.

        Raises:
            LimitExceeded: Naming the limit and both numbers.
        """
        bound: int = getattr(self, name)
        if amount > bound:
            raise LimitExceeded(
                f"{what} asks for {amount:,}, more than the limit {name} = {bound:,}",
                hint=f"if you trust the file, open it from Python with limits=Limits({name}=…)",
            )


DEFAULT = Limits()
