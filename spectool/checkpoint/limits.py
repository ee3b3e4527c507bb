"""How much a file may ask for before it is refused."""

from __future__ import annotations

from dataclasses import dataclass

from spectool.errors import LimitExceeded


@dataclass(frozen=True)
class Limits:
    """Bounds on what a file may ask for; the defaults fit every honest checkpoint.

    On the command line each is ``--limit NAME=VALUE``, ``tensor_bytes`` also ``--max-tensor-bytes``. Together they
    keep the memory that reading a structure takes below twice the file's size plus 1 GB.

    Attributes:
        tensor_bytes: Bytes of one tensor once it is read.
        header_bytes: Bytes of one JSON text (safetensors header, shard index, ``config.json``, exported program).
        json_values: Values in one JSON text.
        pickle_bytes: Bytes of one pickle inside a checkpoint, without the storages.
        opcodes: Opcodes of one pickle; bounds its memo and everything it builds.
        integer_bytes: Bytes of one integer in a pickle.
        depth: Levels of dicts, lists, objects or submodules above a tensor.
        names: Tensors, submodules and attributes of one checkpoint.
        name_bytes: Characters of all tensor names of one checkpoint, the names of the parts around them included.
        records: Members of one zip archive.
        directory_bytes: Bytes of the zip central directory.
        unpacked_bytes: Bytes that a gzipped file may unpack to.
        unpack_ratio: Unpacked over packed size, for anything that unpacks to more than 64 MiB.
        expanded_bytes: Bytes of a tensor that repeats its storage (stride 0).
        model_bytes: Bytes of an ONNX model without its external data.
        model_fields: Protobuf fields of an ONNX model.
        nodes: Nodes of a program's graph, bodies and inlined functions included.
        code_bytes: Bytes of the code of a TorchScript archive.
        operator_entries: Entries of one operator's input or output; what asks for more is a skipped row.
    """

    tensor_bytes: int = 16 * 2**30
    header_bytes: int = 100_000_000
    json_values: int = 5_000_000
    pickle_bytes: int = 512 * 2**20
    opcodes: int = 4_000_000
    integer_bytes: int = 1024
    depth: int = 100
    names: int = 1_000_000
    name_bytes: int = 64 * 2**20
    records: int = 500_000
    directory_bytes: int = 64 * 2**20
    unpacked_bytes: int = 16 * 2**30
    unpack_ratio: int = 200
    expanded_bytes: int = 2**30
    model_bytes: int = 2**31 - 1
    model_fields: int = 5_000_000
    nodes: int = 250_000
    code_bytes: int = 2**20
    operator_entries: int = 2**28

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
            much = f"{amount:,}" if amount < 10**18 else "far too much"
            raise LimitExceeded(
                f"{what} asks for {much}, more than the limit {name} = {bound:,}",
                hint=f"if you trust the file, raise it: {option_of(name)} (limits=Limits({name}=N) in Python)",
            )


def option_of(name: str) -> str:
    """Return how a limit is set on the command line."""
    return "--max-tensor-bytes N" if name == "tensor_bytes" else f"--limit {name}=N"


DEFAULT = Limits()
