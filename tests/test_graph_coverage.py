"""Nothing falls through: random files, and the counts of real ones."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from graph_tools import REAL, checkpoint, norm, regions, skips, survey
from hypothesis import given, settings
from hypothesis import strategies as st

from spectool.checkpoint.types import Checkpoint
from spectool.graph.names import survey_names
from spectool.graph.types import Region

LEAVES = [
    "weight", "bias", "kernel", "weight_g", "weight_v", "weight_orig", "weight_u", "weight_mask",
    "running_mean", "running_var", "lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight",
    "lora_mid.weight", "alpha", "dora_scale", "qweight", "qzeros", "scales", "g_idx", "weight_scale",
    "weight_scale_inv", "SCB", "W_q", "in_proj_weight", "weight_ih_l0", "weight_hh_l0", "weight_hr_l0",
    "recurrent_kernel", "pos_embed", "mask", "gate_up_proj", "gate_up_proj_blocks", "gate_up_proj_scales",
    "weight_packed", "weight_shape", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1",
    "hada_t2", "lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "parametrizations.weight.original",
    "parametrizations.weight.original0", "parametrizations.weight.original1",
    "parametrizations.weight.0._u", "parametrizations.weight.0._v", "weight.absmax", "weight.quant_map",
    "weight.quant_state.bitsandbytes__nf4", "diff", "gamma", "beta", "freely.named", "a:0:up", "a:0:down",
    "lora.up.weight",
]  # fmt: skip
DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.float8_e4m3fn,
]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["", "m.", "m.prelu.", "m.norm.", "m.embed.", "x.experts."]),
            st.sampled_from(LEAVES),
            st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 12]), max_size=5).map(tuple),
            st.sampled_from(DTYPES),
        ),
        max_size=14,
    ),
    st.booleans(),
)
def test_every_tensor_of_rank_two_is_in_a_row_or_explained(entries: list[Any], assume_bn: bool) -> None:
    tensors = {f"{owner}{leaf}": torch.zeros(shape).to(dtype) for owner, leaf, shape, dtype in entries}
    found = survey_names(checkpoint(tensors), assume_bn=assume_bn)
    shown = {name for item in found.items for name in item.weights}
    explained = {note.partition(":")[0] for note in found.notes} | {
        note.rpartition(": ")[0] for note in found.notes
    }
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dim() >= 2:
            assert name in shown | explained, name
    for level in ("layer", "composed"):
        keys = [item.key for item in found.items if getattr(item, "level", "layer") == level]
        assert len(keys) == len(set(keys))
    for item in found.items:
        assert len(item.weights) == len(item.weight_shapes)
        assert set(item.weights) <= set(tensors)
        if isinstance(item, Region):
            assert item.nodes[0].inputs[0] == item.root
            assert item.nodes[-1].outputs == (item.exit,)
            assert not {item.root, item.exit} & set(tensors)


@settings(max_examples=100, deadline=None)
@given(st.permutations(["conv1", "bn1", "fc", "lstm", "q", "n"]))
def test_the_order_of_the_file_is_the_order_of_the_rows(order: list[str]) -> None:
    parts = {
        "conv1": {"conv1.weight": (4, 3, 3, 3)},
        "bn1": norm("bn1", 4),
        "fc": {"fc.bias": (5,), "fc.weight": (5, 4)},
        "lstm": {"lstm.weight_ih_l0": (8, 3), "lstm.weight_hh_l0": (8, 2)},
        "q": {"q.lora_A.weight": (2, 4), "q.lora_B.weight": (3, 2)},
        "n": {"n.weight_g": (4, 1), "n.weight_v": (4, 2)},
    }
    found = survey({name: shape for part in order for name, shape in parts[part].items()})
    owners = list(dict.fromkeys(item.key.partition(".")[0] for item in found.items))
    assert owners == order


def test_surveying_imports_no_torch() -> None:
    """Structure is found from headers alone; torch comes when the first weight is read."""
    code = """
import sys, types
from pathlib import Path
import spectool
# The package of linear maps is torch's by nature; only its plain geometry is wanted here.
stub = sys.modules["spectool.linear"] = types.ModuleType("spectool.linear")
stub.__path__ = [str(Path(spectool.__file__).parent / "linear")]
from spectool.checkpoint.types import Checkpoint, TensorRef
shapes = {"conv.weight": (4, 3, 3, 3), "bn.weight": (4,), "bn.running_mean": (4,), "bn.running_var": (4,),
          "fc.weight_g": (2, 1), "fc.weight_v": (2, 3), "q.lora_A.weight": (2, 3), "q.lora_B.weight": (3, 2)}
refs = {n: TensorRef(n, "float32", s, (), Path("f"), "", 0, n, 0) for n, s in shapes.items()}
from spectool.graph.names import survey_names
found = survey_names(Checkpoint(Path("f"), "torch-zip", refs), assume_bn=True)
assert [item.kind for item in found.items] == ["conv2d", "batchnorm", "conv2d+batchnorm", "linear", "lora"]
from spectool.graph.modules import survey_modules
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# --- real files -------------------------------------------------------------------------------------------


def flat(node: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """Tensors of a nest by dotted path, as ``torch.load`` gave it."""
    if isinstance(node, torch.Tensor):
        return {prefix: node}
    if not isinstance(node, dict):
        return {}
    parts = [flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in node.items()]
    return {name: tensor for part in parts for name, tensor in part.items()}


def real(name: str) -> tuple[Checkpoint, dict[str, torch.Tensor]]:
    """The file as a checkpoint, and its tensors by the format's ordinary loader."""
    path = REAL / name
    if not path.exists():
        pytest.skip("the real checkpoints are not here")
    metadata: dict[str, str] = {}
    if path.suffix == ".safetensors":
        from safetensors import safe_open
        from safetensors.torch import load_file

        tensors = load_file(path)
        with safe_open(path, "pt") as handle:
            metadata = handle.metadata() or {}
    elif path.suffix == ".jit":
        tensors = dict(torch.jit.load(path, map_location="cpu").state_dict())
    else:
        tensors = flat(torch.load(path, map_location="cpu", weights_only=True))
    return checkpoint(tensors, metadata=metadata, format=path.suffix), tensors


@pytest.mark.real
@pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated")
@pytest.mark.parametrize(
    ("name", "paired"),
    [
        ("resnet20_cifar10.th", 19),
        ("ultraface_rfb320.pth", 35),
        ("aesthetic_linear.pth", 0),
        ("burn_mnist.pt", 2),
        ("burn_mnist.safetensors", 1),
        ("mtcnn_pnet.pt", 0),
    ],
)
def test_counts_of_real_files(name: str, paired: int) -> None:
    source, tensors = real(name)
    found = survey_names(source)
    ranks = Counter(tensor.dim() for tensor in tensors.values() if tensor.is_floating_point())
    norms = sum(key.endswith("running_var") for key in tensors)
    kinds = Counter(item.kind for item in found.items if isinstance(item, Region))
    assert (kinds["linear"], kinds["conv2d"], kinds["batchnorm"]) == (ranks[2], ranks[4], norms)
    assert all(item.status == "nonlinear" for item in skips(found).values())
    assert sum("prelu" in key for key in tensors) == len(skips(found))
    assert len(regions(survey_names(source, assume_bn=True), "composed")) == paired
    for row in regions(found).values():
        for weight, shape in zip(row.weights, row.weight_shapes, strict=True):
            assert tuple(tensors[weight].shape) == shape
            assert torch.equal(found.load(weight), tensors[weight])


@pytest.mark.real
def test_a_real_adapter() -> None:
    source, tensors = real("lora_disney.safetensors")
    found = survey_names(source)
    assert len(found.items) == sum(name.endswith(":up") for name in tensors) == 192
    for row in regions(found).values():
        up, down = tensors[row.key].double(), tensors[row.key.replace(":up", ":down")].double()
        assert (row.kind, row.out_shape, row.in_shape) == ("lora", (up.shape[0],), (down.shape[1],))
        assert row.assumed == ("alpha=r",)


@pytest.mark.real
@pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated")
def test_a_real_script_archive_as_tensors() -> None:
    source, tensors = real("silero_vad.jit")
    found = survey_names(source)
    kinds = Counter(item.kind for item in regions(found).values())
    assert kinds == {"lstm": 16, "conv1d": 10}
    assert set(skips(found)) == {name for name in tensors if name.endswith("forward_basis_buffer")}
