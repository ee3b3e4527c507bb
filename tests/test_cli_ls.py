"""`spectool ls`: tensors, shapes and kinds from headers alone."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
from goldens import check_golden

from spectool.checkpoint.types import Checkpoint, TensorRef
from spectool.cli import main
from spectool.report.layout import WriteOptions
from spectool.report.listing import guess_kind, listing_layout, tensor_bytes

ROOT = Path(__file__).parents[1]
Run = Callable[..., tuple[int, str, str]]


def ref(name: str, shape: tuple[int, ...], dtype: str = "float32", storage: str = "") -> TensorRef:
    return TensorRef(name, dtype, shape, (), Path("net.pt"), "", 0, storage or name, 10**9)


def checkpoint(*refs: TensorRef) -> Checkpoint:
    chosen = refs or (
        ref("embed.weight", (1000, 64), "bfloat16"),
        ref("conv1.weight", (16, 3, 3, 3)),
        ref("conv1.bias", (16,)),
        ref("bn1.weight", (16,)),
        ref("bn1.running_var", (16,)),
        ref("bn1.num_batches_tracked", (), "int64"),
        ref("fc.\x1b[31mweight", (10, 64), "float16"),
        ref("head.weight", (1000, 64), "bfloat16", "embed.weight"),
    )
    tensors = {entry.name: entry for entry in chosen}
    aliases = {} if refs else {"head.weight": "embed.weight"}
    return Checkpoint(Path("net.pt"), "torch-zip", tensors, aliases, notes=("ignored optimizer",))


@pytest.fixture
def spectool(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes], tmp_path: Path
) -> Run:
    monkeypatch.setattr("spectool.checkpoint.open_checkpoint", lambda path, key=None: checkpoint())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.pt").write_bytes(b"x")

    def go(*arguments: str) -> tuple[int, str, str]:
        code = main(["ls", "net.pt", *arguments])
        out, err = capfdbinary.readouterr()
        return code, out.decode(), err.decode()

    return go


def test_a_pipe_gets_tsv(spectool: Run) -> None:
    code, out, err = spectool()
    assert code == 0
    rows = [line.split("\t") for line in out.splitlines()]
    assert rows[0] == ["tensor", "kind", "dtype", "shape", "bytes", "tied"]
    assert rows[1] == ["embed.weight", "embedding", "bfloat16", "1000x64", "128000", ""]
    assert rows[6] == ["bn1.num_batches_tracked", "batchnorm", "int64", "scalar", "8", ""]
    assert rows[7][0] == "fc.\\x1b[31mweight"
    assert rows[8][-1] == "embed.weight"
    assert err.splitlines() == [
        "note: ignored optimizer",
        "8 tensors, 65121 values, 131 kB, torch-zip",
    ]


def test_json_is_the_documented_schema(spectool: Run) -> None:
    schema = json.loads((ROOT / "docs/schema/ls.schema.json").read_text())
    document = json.loads(spectool("--format", "json", "-q")[1])
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(document, schema)
    assert document["tensors"][1]["shape"] == [16, 3, 3, 3]
    assert document["tensors"][5]["shape"] == []


def test_sorted_and_picked(spectool: Run) -> None:
    _, out, _ = spectool("--sort", "-bytes", "--columns", "bytes,tensor", "--format", "csv")
    rows = list(csv.reader(io.StringIO(out)))
    assert [row[0] for row in rows[1:4]] == ["128000", "128000", "1728"]
    code, _, err = spectool("--columns", "size")
    assert code == 2
    assert "no column called 'size'" in err


def test_the_table(spectool: Run) -> None:
    check_golden("table_ls.txt", spectool("--format", "table")[1])


def test_wide_tables_drop_the_last_columns() -> None:
    from spectool.cli.cells import cells_grid

    layout = listing_layout(checkpoint(), "0.1.0", WriteOptions())
    assert cells_grid(layout.table, 66)[1] == ["tied"]
    assert cells_grid(layout.table, 50)[1] == ["tied", "bytes"]
    assert cells_grid(layout.table, 44)[1] == ["tied", "bytes", "shape"]


@pytest.mark.parametrize(
    "name, shape, kind",
    [
        ("conv.weight", (8, 3, 5), "conv1d"),
        ("conv.weight", (8, 3, 5, 5), "conv2d"),
        ("conv.weight", (8, 3, 5, 5, 5), "conv3d"),
        ("fc.weight", (8, 3), "linear"),
        ("transformer.wte.weight", (50257, 768), "embedding"),
        ("model.embed_tokens.weight", (50257, 768), "embedding"),
        ("blocks.0.attn.lora_A.weight", (4, 768), "lora"),
        ("text_encoder:0:down", (4, 768), "lora"),
        ("ln_1.weight", (768,), "layernorm"),
        ("model.norm.weight", (768,), "layernorm"),
        ("input_rms_norm.weight", (768,), "rmsnorm"),
        ("fc.bias", (8,), None),
        ("prelu.weight", (8,), None),
    ],
)
def test_kinds_are_guessed(name: str, shape: tuple[int, ...], kind: str | None) -> None:
    entry = ref(name, shape)
    assert guess_kind(entry, {name: entry}) == kind


@pytest.mark.parametrize("gates, kind", [(4, "lstm"), (3, "gru"), (1, "rnn")])
def test_recurrent_kinds_show_by_their_gates(gates: int, kind: str) -> None:
    entries = [ref("rnn.weight_ih_l0", (gates * 20, 10)), ref("rnn.weight_hh_l0", (gates * 20, 20))]
    tensors = {entry.name: entry for entry in entries}
    assert [guess_kind(entry, tensors) for entry in entries] == [kind, kind]


@pytest.mark.parametrize(
    "dtype, count",
    [("float32", 4), ("bfloat16", 2), ("float8_e4m3fn", 1), ("bool", 1), ("int64", 8), ("complex64", 8)],
)
def test_bytes_are_of_the_tensor_and_not_of_its_storage(dtype: str, count: int) -> None:
    assert tensor_bytes(ref("x", (3, 5), dtype)) == 15 * count
