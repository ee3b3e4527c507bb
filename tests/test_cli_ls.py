"""`spectool ls`: tensors, shapes and kinds from headers alone."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jsonschema
import openpyxl
import pytest
from goldens import check_golden

from spectool.checkpoint.types import Checkpoint, TensorRef
from spectool.cli import main
from spectool.report.layout import WriteOptions
from spectool.report.listing import LISTING_COLUMNS, guess_kind, listing_layout, tensor_bytes

ROOT = Path(__file__).parents[1]
LISTING_NAMES = tuple(column.name for column in LISTING_COLUMNS)
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
    monkeypatch.setattr("spectool.checkpoint.open_checkpoint", lambda path, **options: checkpoint())
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
    assert rows[0] == ["tensor", "kind", "dtype", "shape", "bytes", "tied", "note"]
    assert rows[1] == ["embed.weight", "embedding", "bfloat16", "1000x64", "128000", "", ""]
    assert rows[6] == ["bn1.num_batches_tracked", "batchnorm", "int64", "scalar", "8", "", ""]
    assert rows[7][0] == "fc.\\x1b[31mweight"
    assert rows[8][5] == "embed.weight"
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


@pytest.fixture
def unreadable(tmp_path: Path) -> Path:
    """A file that torch wrote, with tensors that no storage holds the values of."""
    import torch

    path = tmp_path / "net.pt"
    state = {
        "a": torch.ones(2, 3),
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.empty(4, 4, device="meta"),
        "z": torch.ones(2),
    }
    torch.save({"state_dict": state, "optimizer": {"momentum_buffer": torch.ones(2)}}, path)
    return path


def listed(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, which must not import torch."""
    program = (
        "import sys\nfrom spectool.cli import main\ncode = main(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules\nsys.exit(code)"
    )
    return subprocess.run(
        [sys.executable, "-c", program, "ls", str(path), *arguments],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip


def test_what_cannot_be_read_is_listed_with_the_reason(unreadable: Path) -> None:
    result = listed(unreadable)
    rows = [
        dict(zip(LISTING_NAMES, line.split("\t"), strict=True)) for line in result.stdout.splitlines()[1:]
    ]
    assert [row["tensor"] for row in rows] == ["a", "z", "sparse", "meta"]
    for row in rows[2:]:
        assert row["note"].startswith("cannot be read: ")
        assert {row[name] for name in LISTING_NAMES[1:-1]} == {""}
    assert "sparse" in rows[2]["note"]
    assert "meta" in rows[3]["note"]
    assert [row["note"] for row in rows[:2]] == ["", ""]
    assert result.stderr.splitlines()[-1].endswith("torch-zip, 2 more cannot be read")
    assert "note: took 'state_dict'" in result.stderr


def test_reasons_and_notes_in_json(unreadable: Path) -> None:
    document = json.loads(listed(unreadable, "--format", "json").stdout)
    jsonschema.validate(document, json.loads((ROOT / "docs/schema/ls.schema.json").read_text()))
    assert document["notes"][0] == "took 'state_dict'"
    assert any("optimizer" in note for note in document["notes"])
    by_name = {entry["tensor"]: entry for entry in document["tensors"]}
    assert (by_name["meta"]["shape"], by_name["meta"]["bytes"], by_name["a"]["note"]) == (None, None, None)
    assert "meta" in by_name["meta"]["note"]


def test_reasons_and_notes_in_files(unreadable: Path, tmp_path: Path) -> None:
    listed(unreadable, "-o", str(tmp_path / "net.csv"), "--sort", "-bytes")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "net.csv").read_text())))
    assert [row["tensor"] for row in rows] == ["a", "z", "sparse", "meta"]  # unknown sizes come last
    assert rows[2]["note"].startswith("cannot be read")
    listed(unreadable, "-o", str(tmp_path / "net.xlsx"))
    book = openpyxl.load_workbook(tmp_path / "net.xlsx")
    assert book.sheetnames == ["tensors", "notes"]
    assert book["tensors"].cell(4, 7).value.startswith("cannot be read")
    assert book["notes"].cell(2, 1).value == "took 'state_dict'"


def test_the_table_has_a_column_of_reasons_only_where_there_are_any(unreadable: Path) -> None:
    text = listed(unreadable, "--format", "table").stdout
    assert "cannot be read" in text
    assert "note" in text.splitlines()[0]


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

    layout = listing_layout(checkpoint(), "0.1.0", WriteOptions(columns=LISTING_NAMES[:-1]))
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
