"""The module front-end against live torch modules: same tree, same tensors, matrices compared entry by entry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_tools import REAL, checkpoint, dense, inert, pickled, region_matrix, regions, settled, skips
from torch import nn

from spectool.checkpoint.types import Checkpoint, InertModule, InertObject
from spectool.errors import UsageError
from spectool.graph.modules import survey_modules
from spectool.graph.types import BatchNorm, Conv, Region


class Block(nn.Module):
    """A module of one's own: what its forward does is nowhere in the file."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, dilation=2, groups=2)
        self.bn = nn.BatchNorm2d(8, eps=0.01)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1))
        self.head = nn.Sequential(nn.Linear(4, 5), nn.Dropout(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 3))
        self.table = nn.Embedding(7, 4)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.mix = nn.Parameter(torch.randn(4, 3))


def test_outside_sequential_geometry_is_exact_and_size_unknown() -> None:
    found = survey_modules(pickled(Block()))
    by_key = regions(found)
    conv = by_key["conv.weight"]
    op = conv.nodes[0].op
    assert isinstance(op, Conv)
    assert (op.geometry.stride, op.geometry.padding) == ((2, 2), ((1, 1), (1, 1)))
    assert (op.geometry.dilation, op.geometry.groups) == ((2, 2), 2)
    assert conv.assumed == ("infinite grid",)
    assert (conv.in_shape, conv.out_shape, conv.maximal) == (None, None, True)
    assert by_key["up.weight"].kind == "conv_transpose2d"
    norm = by_key["bn.weight"].nodes[0].op
    assert isinstance(norm, BatchNorm)
    assert norm.eps == 0.01
    assert by_key["bn.weight"].assumed == ()
    # Order is known inside a Sequential even where sizes are not.
    assert by_key["body.0.weight + body.1.weight"].assumed == ("infinite grid",)
    assert by_key["body.0.weight + body.1.weight"].maximal
    assert "body.0.weight + body.1.weight + body.2.weight" not in by_key
    chain = by_key["head.0.weight + head.2.weight"]
    assert (chain.in_shape, chain.out_shape, chain.maximal) == ((4,), (3,), True)
    assert by_key["head.4.weight"].maximal
    table = by_key["table.weight"]
    assert (table.kind, table.in_shape, table.out_shape) == ("embedding", (7,), (4,))
    # What is no module of torch's is judged by names and shapes, and says so.
    assert "Block is not known" in by_key["mix"].note
    assert "a matrix by its shape" in by_key["mix"].assumed
    assert skips(found)["scale"].status == "skipped"
    order = [item.weights[0] for item in found.items if getattr(item, "level", "layer") == "layer"]
    state = list(Block().state_dict())
    assert order == sorted(order, key=state.index)


def test_assumed_pairs_stop_where_the_order_is_known() -> None:
    net = nn.Module()
    net.conv1, net.bn1 = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
    net.tail = nn.Sequential(
        nn.Conv2d(4, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    )
    found = regions(survey_modules(pickled(net), assume_bn=True), "composed")
    assert set(found) == {"conv1.weight + bn1.weight", "tail.3.weight + tail.4.weight"}
    assert "batch norm pairing" in found["conv1.weight + bn1.weight"].assumed
    assert "batch norm pairing" not in found["tail.3.weight + tail.4.weight"].assumed
    assert not regions(survey_modules(pickled(net)), "layer")["tail.3.weight"].maximal


def test_wrappers_and_dicts_pass_the_input_on() -> None:
    net = settled(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
    wrapped = nn.DataParallel(net)
    found = survey_modules(pickled(wrapped), inputs={"x": (1, 1, 5, 5)})
    assert regions(found)["module.0.weight + module.1.weight"].in_shape == (1, 5, 5)
    tree = InertModule("builtins.dict", {}, {}, {"model": inert(net, "model")})
    tensors = {f"model.{name}": tensor for name, tensor in net.state_dict().items()}
    found = survey_modules(checkpoint(tensors, program=tree), inputs={"": (1, 1, 5, 5)})
    assert regions(found)["model.0.weight"].in_shape == (1, 5, 5)


def test_tensors_beside_the_module_are_judged_by_name() -> None:
    net = nn.Sequential(nn.Linear(3, 2))
    tree = InertModule("builtins.dict", {}, {}, {"model": inert(net, "model")})
    tensors = {f"model.{name}": t for name, t in net.state_dict().items()} | {
        "ema.0.weight": torch.randn(2, 3)
    }
    found = survey_modules(checkpoint(tensors, program=tree))
    assert list(regions(found)) == ["model.0.weight", "ema.0.weight"]


def test_an_input_for_one_sequential_by_its_path() -> None:
    net = nn.Module()
    net.features = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3))
    found = regions(survey_modules(pickled(net), inputs={"features": (1, 1, 9, 9)}))
    assert found["features.2.weight"].in_shape == (2, 7, 7)
    with pytest.raises(UsageError, match=r"'classifier' is no nn\.Sequential"):
        survey_modules(pickled(net), inputs={"classifier": (1, 4)})
    survey = survey_modules(pickled(net), inputs={"": (1, 1, 9, 9)})
    assert regions(survey)["features.2.weight"].in_shape is None
    assert any("input size has no effect" in note for note in survey.notes)


@pytest.mark.parametrize(
    ("layers", "shape", "message"),
    [
        ([nn.Conv2d(3, 4, 3)], (1, 9, 9), r"0 \(Conv2d\) takes 3 channels, its input has shape \(1, 9, 9\)"),
        (
            [nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 7)],
            (1, 5, 5),
            r"1 \(Conv2d\) takes room for a kernel of \(7, 7\)",
        ),
        ([nn.Flatten(), nn.Linear(10, 2)], (1, 3, 3), r"1 \(Linear\) takes 10 features"),
        ([nn.AvgPool2d(4)], (1, 3, 3), r"room for a window of \(4, 4\)"),
        ([nn.BatchNorm2d(2)], (1, 3, 3), "takes 2 channels"),
    ],
)
def test_an_input_that_does_not_fit(layers: list[nn.Module], shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        survey_modules(pickled(nn.Sequential(*layers)), inputs={"": (1, *shape)})


def test_attributes_that_old_pickles_lack() -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2, stride=2)
    )
    source = pickled(net)
    for child in source.program.children.values():
        for name in ("padding_mode", "_reversed_padding_repeated_twice", "output_padding"):
            child.attributes.pop(name, None)
    found = regions(survey_modules(source, inputs={"": (1, 2, 6, 6)}))
    assert found["2.weight"].out_shape == (2, 12, 12)
    op = found["0.weight"].nodes[0].op
    assert isinstance(op, Conv)
    assert op.geometry.padding_mode == "zeros"


@pytest.mark.parametrize("bad", [object(), "wide", (), -1, {"a": 1}, None, (0, 0), float("nan")])
@pytest.mark.parametrize("attribute", ["stride", "padding", "dilation", "groups"])
def test_attributes_from_a_hostile_file_never_raise(attribute: str, bad: Any) -> None:
    source = pickled(nn.Sequential(nn.Conv2d(2, 4, 3), nn.AvgPool2d(2), nn.Flatten()))
    for child in source.program.children.values():
        child.attributes[attribute] = bad
    found = survey_modules(source, inputs={"": (1, 2, 9, 9)})
    assert "0.weight" in regions(found)


def test_old_style_hooks_and_parametrisations_give_the_effective_weight() -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        first = nn.utils.weight_norm(nn.Conv2d(1, 2, 3))
    second = nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 2, 2))
    net = nn.Sequential(first, nn.Conv2d(2, 2, 1), second).double().eval()
    found = survey_modules(pickled(net), inputs={"": (1, 1, 6, 6)})
    region = regions(found)["0.weight + 1.weight + 2.weight"]
    torch.testing.assert_close(region_matrix(region, found.load), dense(net, (1, 6, 6)))
    assert region.weights[:2] == ("0.weight_g", "0.weight_v")
    assert "weight norm" in region.note


def test_recurrent_and_attention_layers() -> None:
    net = nn.Sequential(
        nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2), nn.MultiheadAttention(6, 2)
    )
    found = survey_modules(pickled(net))
    kinds = [item.kind for item in found.items]
    # Two layers, two directions: four gates of ih and of hh, and one projection each; then q, k, v and out.
    assert kinds.count("lstm") == 2 * 2 * (4 + 4 + 1)
    assert [item.key for item in found.items][-4:] == [
        "1.in_proj_weight[0:6]", "1.in_proj_weight[6:12]", "1.in_proj_weight[12:18]", "1.out_proj.weight",
    ]  # fmt: skip
    assert not any("not known" in item.note for item in regions(found).values())


def test_norms_without_running_statistics_are_nonlinear() -> None:
    net = nn.Sequential(
        nn.BatchNorm2d(3, track_running_stats=False), nn.GroupNorm(1, 3), nn.InstanceNorm2d(3, affine=True)
    )
    found = survey_modules(pickled(net), inputs={"": (1, 3, 4, 4)})
    assert [(item.kind, item.status) for item in skips(found).values()] == [
        ("batchnorm", "nonlinear"), ("groupnorm", "nonlinear"), ("instancenorm", "nonlinear"),
    ]  # fmt: skip
    assert not regions(found)


def test_a_subclass_of_a_convolution_by_its_attributes() -> None:
    class Own(nn.Conv2d):
        pass

    net = nn.Sequential(Own(4, 4, 3, groups=4, stride=2), nn.BatchNorm2d(4))
    found = regions(survey_modules(pickled(net), inputs={"": (1, 4, 9, 9)}))
    own = found["0.weight"]
    op = own.nodes[0].op
    assert isinstance(op, Conv)
    assert op.geometry.groups == 4
    assert own.in_shape is None
    assert any("by the attributes of" in text for text in own.assumed)
    # Its forward is its own, so nothing behind it composes with it.
    assert not [region for region in found.values() if region.level == "composed"]


def test_forward_hooks_break_a_chain() -> None:
    source = pickled(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    first, second = source.program.children.values()
    first.attributes["_forward_hooks"] = {0: InertObject("own.Hook")}
    assert not regions(survey_modules(source), "composed")
    first.attributes.pop("_forward_hooks")
    second.attributes["_forward_pre_hooks"] = {0: InertObject("own.Hook")}
    assert not regions(survey_modules(source), "composed")
    second.attributes["_forward_pre_hooks"] = {0: InertObject("torch.nn.utils.weight_norm.WeightNorm")}
    assert regions(survey_modules(source), "composed")


def test_shared_modules_have_one_row() -> None:
    conv = nn.Conv2d(2, 2, 3)
    found = regions(survey_modules(pickled(nn.Sequential(conv, nn.ReLU(), conv))))
    assert list(found) == ["0.weight"]
    assert found["0.weight"].note == "tied with 2.weight"
    sized = regions(survey_modules(pickled(nn.Sequential(conv, nn.ReLU(), conv)), inputs={"": (1, 2, 9, 9)}))
    assert {key: row.in_shape for key, row in sized.items()} == {
        "0.weight": (2, 9, 9),
        "0.weight#2": (2, 7, 7),
    }
    assert sized["0.weight#2"].weights == ("0.weight",)


@pytest.mark.real
def test_a_real_pickled_module() -> None:
    path = REAL / "vdsr_epoch50.pth"
    if not path.exists():
        pytest.skip("the real checkpoints are not here")
    from spectool.checkpoint import open_checkpoint

    source: Checkpoint = open_checkpoint(path)
    found = survey_modules(source)
    rows = [item for item in found.items if isinstance(item, Region)]
    # VDSR: 18 hidden convolutions, one in, one out, all 3x3 with padding 1 and without bias.
    assert len(rows) == len(found.items) == 20
    assert {row.kind for row in rows} == {"conv2d"}
    for row in rows:
        op = row.nodes[0].op
        assert isinstance(op, Conv)
        assert op.geometry.padding == ((1, 1), (1, 1))
        assert found.load(row.nodes[0].inputs[1]).shape[2:] == (3, 3)
