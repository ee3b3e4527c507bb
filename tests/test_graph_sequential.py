"""``nn.Sequential`` against itself: regions and layers compared with the live module, matrix by matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_tools import (
    dense,
    keys,
    pickled,
    region_matrix,
    regions,
    run,
    settled,
    skips,
)
from torch import nn

from spectool.graph.modules import survey_modules
from spectool.graph.program import survey_live
from spectool.graph.types import Region, Survey

# Everything here is affine from end to end, so one region must be the whole module.
AFFINE = {
    "pair": ([nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)], (2, 5, 4)),
    "norm first": ([nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3)], (2, 5, 4)),
    "three": ([nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)], (2, 5, 4)),
    "strided": (
        [nn.Conv2d(1, 2, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), nn.Conv2d(2, 2, 2)], (1, 7, 6)
    ),
    "same": ([nn.Conv2d(1, 2, (4, 3), padding="same"), nn.BatchNorm2d(2)], (1, 5, 5)),
    "valid": ([nn.Conv1d(2, 2, 3, padding="valid"), nn.BatchNorm1d(2)], (2, 6)),
    "reflect": ([nn.Conv2d(1, 2, 3, padding=2, padding_mode="reflect"), nn.BatchNorm2d(2)], (1, 4, 5)),
    "circular": ([nn.Conv1d(1, 2, 3, padding=1, padding_mode="circular"), nn.BatchNorm1d(2)], (1, 5)),
    "replicate": ([nn.Conv3d(1, 2, 2, padding=1, padding_mode="replicate"), nn.BatchNorm3d(2)], (1, 3, 2, 3)),
    "transposed": (
        [nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, output_padding=1, groups=2), nn.BatchNorm2d(4)],
        (2, 3, 4),
    ),
    "transposed, dilated": ([nn.ConvTranspose1d(2, 2, 3, stride=3, dilation=2), nn.Conv1d(2, 1, 2)], (2, 4)),
    "three axes": ([nn.Conv3d(1, 2, (1, 2, 3), stride=(1, 2, 1)), nn.AvgPool3d((2, 1, 1))], (1, 3, 4, 4)),
    "head": ([nn.Conv2d(1, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(3, 4)], (1, 4, 4)),
    "linear": ([nn.Linear(4, 3), nn.Identity(), nn.Linear(3, 5), nn.Dropout(), nn.Linear(5, 2)], (4,)),
    "linear and norm": ([nn.Linear(4, 3), nn.BatchNorm1d(3)], (4,)),
    "pool": (
        [nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True, count_include_pad=False), nn.Conv2d(2, 1, 2)], (2, 6, 7)
    ),
    "divisor": ([nn.AvgPool2d(2, divisor_override=3), nn.Conv2d(1, 1, 2)], (1, 6, 6)),
    "uneven pool": ([nn.AdaptiveAvgPool2d((2, None)), nn.Conv2d(1, 1, 1)], (1, 5, 3)),
    "pool of one axis": ([nn.AvgPool1d(2), nn.Conv1d(1, 2, 2), nn.AdaptiveAvgPool1d(2)], (1, 9)),
    "pads": (
        [nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(1, 2, 2), nn.ReflectionPad2d((0, 1, 1, 0)), nn.Conv2d(2, 1, 2)],
        (1, 3, 4),
    ),
    "more pads": (
        [nn.ReplicationPad1d((2, 1)), nn.Conv1d(1, 1, 2), nn.ConstantPad1d(1, 3.0), nn.Conv1d(1, 1, 2)], (1, 4)
    ),
    "circular pad": ([nn.CircularPad2d((1, 2, 0, 1)), nn.Conv2d(1, 1, 2)], (1, 3, 4)),
    "nearest": ([nn.Upsample(scale_factor=2), nn.Conv2d(1, 2, 3, padding=1)], (1, 3, 2)),
    "bilinear": ([nn.Upsample(scale_factor=1.5, mode="bilinear"), nn.Conv2d(1, 1, 2)], (1, 4, 5)),
    "corners": ([nn.UpsamplingBilinear2d(size=(5, 3)), nn.Conv2d(1, 1, 2)], (1, 3, 2)),
    "cubic": ([nn.Upsample(size=6, mode="bicubic", align_corners=True), nn.Conv2d(1, 1, 2)], (1, 4, 4)),
    "line": ([nn.Upsample(scale_factor=(2.0,), mode="linear"), nn.Conv1d(1, 1, 2)], (1, 4)),
    "volume": ([nn.Upsample(scale_factor=2, mode="trilinear"), nn.Conv3d(1, 1, 2)], (1, 2, 2, 2)),
    "shuffle": (
        [nn.Conv2d(1, 4, 2), nn.PixelShuffle(2), nn.Conv2d(1, 2, 3), nn.PixelUnshuffle(2), nn.Conv2d(8, 1, 1)],
        (1, 5, 5),
    ),
    "unflatten": (
        [nn.Linear(4, 8), nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(3, 2)], (4,)
    ),
    "instance norm": ([nn.Conv1d(1, 2, 2), nn.InstanceNorm1d(2, affine=True, track_running_stats=True)], (1, 5)),
    "plain norm": ([nn.Conv1d(1, 2, 2), nn.BatchNorm1d(2, affine=False, eps=0.1)], (1, 5)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("case", AFFINE)
def test_an_affine_sequential_is_one_region(case: str) -> None:
    layers, shape = AFFINE[case]
    module = settled(nn.Sequential(*layers))
    found = survey_modules(pickled(module), inputs={"": (1, *shape)})
    largest = [r for r in regions(found).values() if r.maximal]
    assert [region.level for region in largest] == ["composed"]
    region = largest[0]
    with torch.no_grad():
        truth = dense(module, shape)
    torch.testing.assert_close(region_matrix(region, found.load), truth, rtol=1e-12, atol=1e-12)
    assert region.out_shape == tuple(module(torch.zeros(1, *shape).double()).shape[1:])
    assert region.in_shape == shape
    assert region.assumed == ()
    weighted = [part for part in module if isinstance(part, (nn.Linear, nn.modules.conv._ConvNd))]
    assert region.operators == len(weighted)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("case", AFFINE)
def test_every_layer_stands_alone_at_its_real_size(case: str) -> None:
    layers, shape = AFFINE[case]
    module = settled(nn.Sequential(*layers))
    found = survey_modules(pickled(module), inputs={"": (1, *shape)})
    alone = regions(found, "layer")
    x = torch.randn(1, *shape, dtype=torch.float64)
    for name, part in module.named_children():
        y = part(x)
        key = f"{name}.weight" if f"{name}.weight" in module.state_dict() else f"{name}.running_var"
        if key in module.state_dict():
            region = alone.pop(key)
            assert not region.maximal
            zero = part(torch.zeros_like(x))
            torch.testing.assert_close(run(region, found.load, x) - run(region, found.load, x * 0), y - zero)
            if isinstance(part, nn.Linear):
                assert (region.in_shape, region.out_shape) == ((part.in_features,), (part.out_features,))
            else:
                assert (region.in_shape, region.out_shape) == (tuple(x.shape[1:]), tuple(y.shape[1:]))
        x = y
    assert not alone


def test_rows_of_a_small_net_in_order() -> None:
    net = settled(
        nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
            nn.Sequential(
                nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)
            ),
            nn.MaxPool2d(2),
            nn.AvgPool2d(2),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(6, 5),
            nn.LayerNorm(5),
            nn.PReLU(5),
            nn.Linear(5, 2),
        )
    )
    found = survey_modules(pickled(net), inputs={"": (1, 3, 8, 8)})
    assert keys(found.items) == [
        ("0.0.weight", "layer", "conv2d"),
        ("0.1.weight", "layer", "batchnorm"),
        ("0.0.weight + 0.1.weight", "composed", "conv2d+batchnorm"),
        ("1.0.weight", "layer", "conv2d"),
        ("1.1.weight", "layer", "batchnorm"),
        ("1.0.weight + 1.1.weight", "composed", "conv2d+batchnorm"),
        ("1.2.weight", "layer", "conv2d"),
        ("1.3.weight", "layer", "batchnorm"),
        ("1.2.weight + 1.3.weight", "composed", "conv2d+batchnorm"),
        (
            "1.0.weight + 1.1.weight + 1.2.weight + 1.3.weight",
            "composed",
            "conv2d+batchnorm+conv2d+batchnorm",
        ),
        ("avgpool:3", "layer", "avgpool"),
        ("6.weight", "layer", "linear"),
        ("7.weight", "skipped", "layernorm"),
        ("8.weight", "skipped", "prelu"),
        ("9.weight", "layer", "linear"),
    ]
    by_key = regions(found)
    assert by_key["1.0.weight + 1.1.weight"].maximal is False
    assert by_key["0.0.weight + 0.1.weight"].maximal is True
    assert by_key["avgpool:3"].operators == 0
    assert by_key["avgpool:3"].in_shape == (6, 3, 3)
    assert by_key["6.weight"].maximal
    assert by_key["1.1.weight"].weights == ("1.1.weight", "1.1.running_var")
    assert {item.status for item in skips(found).values()} == {"nonlinear"}
    with torch.no_grad():
        inner = net[0](torch.randn(1, 3, 8, 8).double())
    whole = by_key["1.0.weight + 1.1.weight + 1.2.weight + 1.3.weight"]
    truth = net[1](inner) - net[1](inner * 0)
    torch.testing.assert_close(run(whole, found.load, inner) - run(whole, found.load, inner * 0), truth)


def test_matrices_over_positions_act_on_the_last_axis() -> None:
    tokens = settled(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
    found = survey_modules(pickled(tokens), inputs={"": (1, 5, 4)})
    region = regions(found)["0.weight + 1.weight"]
    assert (region.in_shape, region.out_shape) == ((4,), (2,))
    torch.testing.assert_close(region_matrix(region, found.load), dense(tokens, (4,)))
    # A convolution over the positions makes them part of the operator.
    mixed = settled(nn.Sequential(nn.Linear(4, 3), nn.Conv1d(5, 2, 2)))
    found = survey_modules(pickled(mixed), inputs={"": (1, 5, 4)})
    region = regions(found)["0.weight + 1.weight"]
    assert (region.in_shape, region.out_shape) == ((5, 4), (2, 2))
    torch.testing.assert_close(region_matrix(region, found.load), dense(mixed, (5, 4)))
    assert regions(found)["0.weight"].in_shape == (4,)


def test_a_pickle_says_what_a_run_of_the_module_says() -> None:
    """Two front-ends that share nothing but the shape of a row: attributes in a file, and a recorded forward."""
    net = settled(
        nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
            nn.Sequential(
                nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)
            ),
            nn.Tanh(),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(54, 5),
            nn.ReLU(),
            nn.Linear(5, 4),
            nn.Dropout(),
            nn.Linear(4, 3),
        )
    )

    file = survey_modules(pickled(net), inputs={"": (1, 3, 8, 8)})
    live = survey_live(net.float(), {"": (1, 3, 8, 8)})

    def facts(found: Survey) -> list[tuple[Any, ...]]:
        return [
            (
                r.key,
                r.level,
                r.kind,
                r.weights,
                r.weight_shapes,
                r.in_shape,
                r.out_shape,
                r.maximal,
                r.operators,
            )
            for r in found.items
            if isinstance(r, Region)
        ]

    assert facts(file) == facts(live)
    assert len(facts(file)) == 16


@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize(
    "between",
    [nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, 3, 1), nn.MaxPool2d(3, 2, 0, dilation=2), nn.AvgPool2d(2, 3, 1)],
    ids=str,
)
def test_sizes_behind_a_pool(between: nn.Module, ceil: bool) -> None:
    between.ceil_mode = ceil
    net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), between, nn.ReLU(), nn.Conv2d(1, 1, 1))
    for size in range(5, 12):
        x = torch.zeros(1, 1, size, size + 1)
        found = regions(survey_modules(pickled(net), inputs={"": tuple(x.shape)}))
        assert found["4.weight"].in_shape == tuple(net[:4](x).shape[1:])
