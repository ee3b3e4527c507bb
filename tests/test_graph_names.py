"""The front-end for tensors alone: rules on names and shapes, nothing silently dropped, counts of real files."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from graph_tools import ANY_SIZE, checkpoint, regions, skips, state, survey
from torch import nn

from spectool.graph.effective import Weights
from spectool.graph.names import survey_names
from spectool.graph.types import BatchNorm, Conv, Embedding, Linear, Region, Skipped

# --- operators --------------------------------------------------------------------------------------------


def test_a_matrix_is_exact() -> None:
    (row,) = survey({"fc.weight": (5, 7), "fc.bias": (5,)}).items
    assert row == Region(
        key="fc.weight",
        level="layer",
        kind="linear",
        root=row.root,
        exit=row.exit,
        nodes=row.nodes,
        weights=("fc.weight",),
        weight_shapes=((5, 7),),
        in_shape=(7,),
        out_shape=(5,),
    )
    (node,) = row.nodes
    assert node.op == Linear()
    assert node.inputs == (row.root, "fc.weight")
    assert node.outputs == (row.exit,)


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((4, 3, 5), "conv1d"),
        ((4, 3, 3, 3), "conv2d"),
        ((4, 3, 1, 1), "conv2d"),
        ((8, 1, 3, 3), "conv2d"),
        ((4, 3, 3, 1, 2), "conv3d"),
    ],
)
def test_a_kernel_is_an_operator_of_any_size(shape: tuple[int, ...], kind: str) -> None:
    (row,) = survey({"conv.weight": shape, "conv.bias": shape[:1]}).items
    assert isinstance(row, Region)
    assert (row.kind, row.in_shape, row.out_shape, row.operators) == (kind, None, None, 1)
    assert row.assumed == ANY_SIZE
    (node,) = row.nodes
    assert isinstance(node.op, Conv)
    assert (node.op.geometry.groups, set(node.op.geometry.stride), node.op.geometry.dims) == (
        1,
        {1},
        len(shape) - 2,
    )
    assert row.note == ("perhaps depthwise" if shape[1] == 1 else "")


@pytest.mark.parametrize("affine", [True, False])
def test_a_batch_norm_has_a_row_and_no_operator(affine: bool) -> None:
    found = survey_names(
        checkpoint({f"bn.{name}": t for name, t in state(nn.BatchNorm2d(3, affine=affine)).items()})
    )
    (row,) = found.items
    assert isinstance(row, Region)
    assert (row.kind, row.operators, row.in_shape, row.assumed) == ("batchnorm", 0, None, ("eps=1e-5",))
    assert row.weights == (("bn.weight", "bn.running_var") if affine else ("bn.running_var",))
    assert row.key == row.weights[0]
    (node,) = row.nodes
    assert node.op == BatchNorm(1e-5)
    ends = ("bn.running_mean", "bn.running_var")
    assert node.inputs[1:] == (("bn.weight", "bn.bias", *ends) if affine else ("", "", *ends))


def test_batch_norms_by_the_names_of_keras() -> None:
    names = ("gamma", "beta", "moving_mean", "moving_variance")
    (row,) = survey({f"bn.{name}": (4,) for name in names}).items
    assert row.kind == "batchnorm"
    # Means and variances of an input's normalisation are no norm of the network.
    assert survey({"input.mean": (3,), "input.var": (3,)}).items == ()


@pytest.mark.parametrize(
    "name",
    [
        "embed_tokens.weight", "transformer.wte.weight", "wpe.weight", "tok_embeddings.weight", "shared.weight",
        "embeddings.word_embeddings.weight", "embeddings.position_embedding.weight", "token_emb.weight",
        "attn.relative_attention_bias.weight", "Embed_0.embedding",
    ],
)  # fmt: skip
def test_embeddings_by_name(name: str) -> None:
    (row,) = survey({name: (11, 4)}).items
    assert isinstance(row, Region)
    assert (row.kind, row.in_shape, row.out_shape, row.operators) == ("embedding", (11,), (4,), 1)
    assert row.nodes[0].op == Embedding()


@pytest.mark.parametrize(
    "name", ["time_embedding.linear_1", "embed_out", "patch_embed.proj", "context_embedder"]
)
def test_what_only_sounds_like_an_embedding(name: str) -> None:
    shapes = {f"{name}.weight": (11, 4)} | ({f"{name}.bias": (11,)} if name == "context_embedder" else {})
    (row,) = survey(shapes).items
    assert row.kind == "linear"


@pytest.mark.parametrize(
    ("module", "kind", "gates"),
    [
        (nn.LSTM(3, 4, num_layers=2, bidirectional=True), "lstm", 4),
        (nn.GRU(3, 4), "gru", 3),
        (nn.RNN(3, 4), "rnn", 1),
        (nn.LSTMCell(3, 4), "lstm", 4),
        (nn.GRUCell(4, 4), "gru", 3),
        (nn.LSTM(3, 8, proj_size=2), "lstm", 4),
        (nn.LSTM(3, 2, proj_size=1), "lstm", 4),
    ],
    ids=str,
)
def test_recurrent_matrices_have_a_row_per_gate(module: nn.Module, kind: str, gates: int) -> None:
    tensors = state(module)
    found = survey_names(checkpoint(tensors))
    assert {row.kind for row in found.items} == {kind}
    seen = {}
    for row in regions(found).values():
        (name,) = row.weights
        seen.setdefault(name, []).append(found.load(row.nodes[0].inputs[1]))
        assert row.weight_shapes == (tuple(seen[name][-1].shape),)
        assert (row.out_shape, row.in_shape) == (row.weight_shapes[0][:1], row.weight_shapes[0][1:])
    matrices = {name: tensor for name, tensor in tensors.items() if tensor.dim() == 2}
    assert set(seen) == set(matrices)
    for name, parts in seen.items():
        assert len(parts) == (1 if "weight_hr" in name else gates)
        assert torch.equal(torch.cat(parts), matrices[name])
    keys = [row.key for row in found.items]
    if gates > 1:
        size = module.hidden_size
        assert keys[0] == f"weight_ih{'_l0' if 'weight_ih_l0' in tensors else ''}[0:{size}]"


def test_recurrent_kernels_of_keras_are_cut_along_columns() -> None:
    tensors = {"cell.kernel": torch.randn(3, 16), "cell.recurrent_kernel": torch.randn(4, 16)}
    found = survey_names(checkpoint(tensors))
    assert [row.key for row in found.items][:2] == ["cell.kernel[:,0:4]", "cell.kernel[:,4:8]"]
    row = regions(found)["cell.kernel[:,4:8]"]
    assert (row.kind, row.in_shape, row.out_shape) == ("lstm", (3,), (4,))
    assert torch.equal(found.load(row.key), tensors["cell.kernel"][:, 4:8])


def test_attention_projections_are_three() -> None:
    found = survey_names(checkpoint(state(nn.MultiheadAttention(6, 2, add_bias_kv=True))))
    assert [item.key for item in found.items] == [
        "in_proj_weight[0:6]", "in_proj_weight[6:12]", "in_proj_weight[12:18]", "out_proj.weight",
    ]  # fmt: skip
    assert sorted(found.notes) == ["bias_k: a bias, no operator", "bias_v: a bias, no operator"]
    apart = survey_names(checkpoint(state(nn.MultiheadAttention(6, 2, kdim=4, vdim=5))))
    assert [(item.key, item.assumed) for item in regions(apart).values()][:3] == [
        ("q_proj_weight", ()), ("k_proj_weight", ()), ("v_proj_weight", ()),
    ]  # fmt: skip


def test_transposed_matrices_by_their_bias() -> None:
    found = regions(
        survey(
            {
                "h.attn.c_attn.weight": (6, 18), "h.attn.c_attn.bias": (18,),
                "h.attn.c_proj.weight": (6, 6), "h.attn.c_proj.bias": (6,),
                "h.mlp.c_fc.weight": (6, 24), "h.mlp.c_fc.bias": (24,),
                "Dense_0.kernel": (4, 7), "Dense_0.bias": (7,), "Dense_1.kernel": (7, 3), "Dense_2.kernel": (3, 3),
                "plain.weight": (3, 7), "plain.bias": (3,), "odd.weight": (3, 7), "odd.bias": (5,),
            }
        )
    )  # fmt: skip
    got = {key: (row.in_shape, row.out_shape) for key, row in found.items()}
    assert got["h.attn.c_attn.weight"] == ((6,), (18,))
    assert got["h.mlp.c_fc.weight"] == ((6,), (24,))
    assert got["Dense_0.kernel"] == ((4,), (7,))
    assert got["Dense_1.kernel"] == ((7,), (3,))
    assert got["plain.weight"] == got["odd.weight"] == ((7,), (3,))
    turned = {key for key, row in found.items() if row.nodes[0].op == Linear(transposed=True)}
    assert turned == set(found) - {"plain.weight", "odd.weight"}
    assert "Hugging Face's Conv1D" in found["h.attn.c_attn.weight"].note
    assert "it is square" in found["h.attn.c_proj.weight"].note


def test_square_projections_follow_the_file() -> None:
    """A GPT of one's own has the same names with ordinary Linear layers."""
    shapes = {"c_attn.weight": (18, 6), "c_attn.bias": (18,), "c_proj.weight": (6, 6), "c_proj.bias": (6,)}
    for row in regions(survey(shapes)).values():
        assert row.nodes[0].op == Linear()
        assert row.note == ""


@pytest.mark.parametrize(
    ("shape", "bias", "out_in"),
    [
        ((3, 3, 8, 16), 16, (16, 8)),
        ((3, 3, 8, 16), None, (16, 8)),
        ((3, 3, 8, 8), None, (8, 8)),
        ((1, 1, 8, 16), None, (16, 8)),
        ((16, 8, 3, 3), None, (16, 8)),
        ((16, 8, 3, 3), 16, (16, 8)),
        ((5, 8, 16), 16, (16, 8)),
        ((2, 3, 4, 8, 16), 16, (16, 8)),
        ((8, 8, 8, 8), 8, None),
        ((5, 8, 16), None, None),
        ((64, 32, 48, 32), None, None),
    ],
)
def test_kernels_of_other_frameworks(
    shape: tuple[int, ...], bias: int | None, out_in: tuple[int, int] | None
) -> None:
    tensors = {"conv.kernel": torch.randn(shape)} | ({"conv.bias": torch.zeros(bias)} if bias else {})
    found = survey_names(checkpoint(tensors))
    (item,) = found.items
    if out_in is None:
        assert isinstance(item, Skipped)
        assert "a kernel whose axes may be" in item.reason
        return
    assert isinstance(item, Region)
    made = found.load("conv.kernel")
    assert tuple(made.shape[:2]) == out_in
    stored = tensors["conv.kernel"]
    if shape[-1] == out_in[0] and shape[-2] == out_in[1]:
        last = stored.reshape(-1, *out_in[::-1])
        torch.testing.assert_close(made.reshape(*out_in, -1), last.permute(2, 1, 0))
        assert "kernel stored (…, in, out)" in item.assumed
        assert isinstance(found.load, Weights)
        assert torch.equal(found.load.edits({"conv.kernel": made})["conv.kernel"], stored)
    else:
        assert torch.equal(made, stored)


@pytest.mark.parametrize(
    "name", ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "moe.experts.w1.weight"]
)
def test_stacks_of_experts_are_matrices(name: str) -> None:
    tensors = {name: torch.randn(3, 4, 5)}
    found = survey_names(checkpoint(tensors))
    assert [item.key for item in found.items] == [f"{name}[{index}]" for index in range(3)]
    for index, item in enumerate(found.items):
        assert isinstance(item, Region)
        assert (item.kind, item.in_shape, item.out_shape, item.weights) == ("linear", (5,), (4,), (name,))
        assert torch.equal(found.load(item.key), tensors[name][index])


def test_matrices_of_other_names_say_what_was_assumed() -> None:
    found = regions(survey({"text_projection": (5, 7), "lookup": (9, 3), "alphas": (14, 8)}))
    assert {key: row.assumed for key, row in found.items()} == dict.fromkeys(
        ("text_projection", "lookup", "alphas"), ("a matrix by its shape",)
    )


# --- what is no operator ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "kind"),
    [
        ({"ln_1.weight": (4,), "ln_1.bias": (4,)}, "layernorm"),
        ({"LayerNorm.gamma": (4,), "LayerNorm.beta": (4,)}, "layernorm"),
        ({"group_norm.weight": (4,), "group_norm.bias": (4,)}, "groupnorm"),
        ({"instancenorm.weight": (4,), "instancenorm.bias": (4,)}, "instancenorm"),
        ({"input_layernorm.weight": (4,)}, "rmsnorm"),
        ({"prelu1.weight": (10,)}, "prelu"),
        ({"features.2.weight": (10,)}, "scale"),
        ({"ls1.gamma": (4,)}, "scale"),
        ({"norm.weight": (4, 5), "norm.bias": (4, 5)}, "layernorm"),
    ],
)
def test_vectors_that_could_be_taken_for_operators(shapes: dict[str, tuple[int, ...]], kind: str) -> None:
    (item,) = [item for item in survey(shapes).items if isinstance(item, Skipped)]
    assert (item.kind, item.status, item.operators) == (kind, "nonlinear", 0)
    if kind == "scale":
        assert "which its name does not tell" in item.reason


@pytest.mark.parametrize(
    "name",
    [
        "pos_embed", "cls_token", "mask_token", "relative_position_bias_table", "positional_embedding", "rel_pos_h",
        "query_tokens", "pos_embedding", "class_token",
    ],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(1, 5, 4), (5, 4)])
def test_tables_are_nonlinear(name: str, shape: tuple[int, ...]) -> None:
    (item,) = survey({f"encoder.{name}": shape}).items
    assert isinstance(item, Skipped)
    assert (item.status, item.operators) == ("nonlinear", 0)


def test_kernels_of_unknown_names_are_skipped_and_counted() -> None:
    (item,) = survey({"stft.forward_basis_buffer": (258, 1, 256)}).items
    assert isinstance(item, Skipped)
    assert (item.status, item.operators) == ("skipped", 1)
    assert "rank 3 and a name that does not say what it does" in item.reason


def test_what_makes_no_row() -> None:
    tensors = {
        "bn.num_batches_tracked": torch.tensor(1),
        "position_ids": torch.arange(6).reshape(2, 3),
        "attn.mask": torch.ones(3, 3, dtype=torch.bool),
        "attn.bias": torch.ones(1, 1, 3, 3),
        "rope.inv_freq": torch.ones(8),
        "logit_scale": torch.tensor(1.0),
        "fc.bias": torch.ones(3),
    }
    found = survey_names(checkpoint(tensors))
    assert found.items == ()
    assert found.notes == ("attn.bias: a bias, no operator",)


def test_what_cannot_be_analysed_says_why() -> None:
    tensors = {
        "a.weight": torch.zeros(3, 3, dtype=torch.complex64),
        "b.weight": torch.zeros(0, 3),
        "c.weight": torch.zeros(1, 1, 1, 1, 1, 1),
    }
    source = replace(checkpoint(tensors), unread={"d.weight": "a sparse tensor", "d.note": "a string"})
    found = skips(survey_names(source))
    assert {key: item.reason.split(",")[0] for key, item in found.items()} == {
        "a.weight": "complex weights are out of scope",
        "b.weight": "has no elements",
        "c.weight": "rank 6 and a name that does not say what it does",
        "d.weight": "cannot be read: a sparse tensor",
    }


# --- ties -------------------------------------------------------------------------------------------------


def test_tied_tensors_go_by_the_first_name() -> None:
    table = torch.randn(11, 4)
    found = survey_names(
        checkpoint({"wte.weight": table, "head.weight": table, "fc.weight": torch.randn(3, 4)})
    )
    assert list(regions(found)) == ["wte.weight", "fc.weight"]
    assert regions(found)["wte.weight"].note == "tied with head.weight"


def test_tied_parts_and_effective_weights() -> None:
    g, v, fused = torch.ones(4, 1), torch.randn(4, 3), torch.randn(12, 4)
    tensors = {"a.weight_g": g, "a.weight_v": v, "b.weight_g": g, "b.weight_v": v}
    tensors |= {"c.in_proj_weight": fused, "d.in_proj_weight": fused}
    found = survey_names(checkpoint(tensors))
    assert list(regions(found)) == ["a.weight", *(f"c.in_proj_weight[{at}:{at + 4}]" for at in (0, 4, 8))]


def test_a_shared_gain_with_other_statistics_is_a_second_use() -> None:
    gain = torch.rand(3)
    tensors = {"bn1.weight": gain, "bn2.weight": gain}
    for name in ("bn1", "bn2"):
        tensors |= {f"{name}.bias": torch.zeros(3), f"{name}.running_mean": torch.zeros(3)}
        tensors[f"{name}.running_var"] = torch.rand(3)
    found = regions(survey_names(checkpoint(tensors)))
    assert list(found) == ["bn1.weight", "bn1.weight#2"]
    assert found["bn1.weight#2"].nodes[0].inputs[4] == "bn2.running_var"
