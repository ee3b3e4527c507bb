"""Guessing which batch norm follows which operator."""

from __future__ import annotations

from typing import Any

from graph_tools import ANY_SIZE, norm, regions, survey


def pairs(shapes: dict[str, tuple[int, ...]], **options: Any) -> set[str]:
    return set(regions(survey(shapes, assume_bn=True, **options), "composed"))


def test_pairs_by_registration_order() -> None:
    shapes = {
        "stem.weight": (4, 3, 3, 3), **norm("normal", 4),
        "layer1.0.conv1.weight": (4, 4, 3, 3), **norm("layer1.0.bn1", 4),
        "layer1.0.down.0.weight": (8, 4, 1, 1), **norm("layer1.0.down.1", 8),
        "block.conv.depthwise.weight": (8, 1, 3, 3), "block.conv.pointwise.weight": (8, 8, 1, 1), **norm("block.bn", 8),
        "fc.weight": (5, 8), "fc.bias": (5,), **norm("fc_norm", 5),
    }  # fmt: skip
    assert pairs(shapes) == {
        "stem.weight + normal.weight",
        "layer1.0.conv1.weight + layer1.0.bn1.weight",
        "layer1.0.down.0.weight + layer1.0.down.1.weight",
        "block.conv.pointwise.weight + block.bn.weight",
        "fc.weight + fc_norm.weight",
    }
    assert pairs({}) == set()
    found = survey(shapes, assume_bn=True)
    row = regions(found)["stem.weight + normal.weight"]
    assert row.assumed == (*ANY_SIZE, "eps=1e-5", "batch norm pairing")
    assert (row.kind, row.level, row.operators, row.maximal) == ("conv2d+batchnorm", "composed", 1, True)
    assert row.weights == ("stem.weight", "normal.weight", "normal.running_var")
    assert not regions(found)["stem.weight"].maximal
    assert [item.key for item in found.items][:3] == ["stem.weight", "normal.weight", row.key]
    first, second = row.nodes
    assert (first.inputs[0], first.outputs[0]) == (row.root, second.inputs[0])
    assert second.outputs == (row.exit,)
    # And never without being asked.
    assert not regions(survey(shapes), "composed")


def test_no_pair_across_blocks_channels_or_slopes() -> None:
    assert pairs({"a.weight": (4, 3, 3, 3), **norm("bn", 5)}) == set()
    assert pairs({"layer3.2.conv2.weight": (4, 4, 3, 3), **norm("bn", 4)}) == set()
    assert pairs({"b1.conv2.weight": (4, 4, 3, 3), **norm("b2.bn1", 4)}) == set()
    assert pairs({"conv.weight": (4, 3, 3, 3), "prelu.weight": (4,), **norm("bn", 4)}) == {
        "conv.weight + bn.weight"
    }
    assert pairs({"first.weight": (4, 3, 3, 3), "prelu.weight": (4,), **norm("last", 4)}) == set()
    assert pairs({"conv.weight": (4, 3, 3, 3), **norm("bn1", 4), **norm("bn2", 4)}) == {
        "conv.weight + bn1.weight"
    }


def test_pairs_by_name_where_the_order_is_lost() -> None:
    shapes = {
        "conv1.weight": (4, 3, 3, 3), "conv2.weight": (4, 4, 3, 3), **norm("bn1", 4), **norm("bn2", 4),
        "0.weight": (4, 3, 3, 3), **norm("1", 4), "block.conv.weight": (4, 4, 1, 1), **norm("block.norm", 4),
        **norm("bn3", 4), "conv3.weight": (6, 4, 1, 1), "fc4.weight": (3, 6), **norm("norm4", 3),
    }  # fmt: skip
    shapes = dict(sorted(shapes.items()))
    assert pairs(shapes, format="safetensors") == {
        "conv1.weight + bn1.weight",
        "conv2.weight + bn2.weight",
        "0.weight + 1.weight",
        "block.conv.weight + block.norm.weight",
        "fc4.weight + norm4.weight",
    }


def test_the_order_of_a_safetensors_file_pairs_nothing() -> None:
    shapes = {"a.conv1.weight": (4, 4, 3, 3), "a.conv2.weight": (4, 4, 3, 3), **norm("a.norm1", 4)}
    shapes |= {"0.first.weight": (4, 4)}
    assert pairs(shapes, format="safetensors-sharded") == {"a.conv1.weight + a.norm1.weight"}
    assert pairs(shapes) == {"a.conv2.weight + a.norm1.weight"}
