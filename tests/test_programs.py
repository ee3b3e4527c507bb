"""Live programs: every operator of real architectures is found, and every region replays what torch computes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from programs import (
    MATRIX_MODULES,
    layer_operators,
    pairs,
    torchvision_survey,
    transformers_models,
    transformers_survey,
)
from torch import nn

from spectool.graph.program import survey_live, survey_module
from spectool.graph.tape import record
from spectool.graph.types import Graph, Region, Skipped
from spectool.linear import to_dense
from spectool.lower import lower

Function = Callable[[torch.Tensor], torch.Tensor]
COUNTS = {
    # name: (matrix operators, conv–batch-norm pairs), known from the architectures
    "resnet18": (21, 20),
    "mobilenet_v2": (53, 52),
    "densenet121": (121, None),
    "efficientnet_b0": (82, None),
    "shufflenet_v2_x1_0": (57, None),
    "vit_b_16": (50, 0),
    "swin_t": (None, 0),
    "convnext_tiny": (None, 0),
    "googlenet": (58, 57),
    "deeplabv3_resnet50": (61, 60),
}


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_torchvision_networks_lose_no_operator(name: str) -> None:
    module, found = torchvision_survey(name)
    operators, expected_pairs = COUNTS[name]
    used = {weight for item in found.items for weight in item.weights}
    expected = [
        f"{path}.weight" for path, child in module.named_modules()
        if isinstance(child, MATRIX_MODULES) and not path.startswith("aux")
    ]  # fmt: skip
    assert set(expected) <= used
    assert layer_operators(found) == (operators if operators is not None else len(expected))
    if expected_pairs is not None:
        assert len(pairs(found)) == expected_pairs
    assert not [item for item in found.items if isinstance(item, Skipped) and item.status == "skipped"]


def test_video_network_loses_no_operator() -> None:
    module, found = torchvision_survey("r3d_18", (1, 3, 8, 56, 56))
    expected = [p for p, child in module.named_modules() if isinstance(child, MATRIX_MODULES)]
    assert layer_operators(found) == len(expected) == 21
    assert len(pairs(found)) == 20


@pytest.mark.parametrize("name", sorted(transformers_models()))
def test_transformers_lose_no_operator(name: str) -> None:
    module, found = transformers_survey(name)
    used = {weight for item in found.items if isinstance(item, Region) for weight in item.weights}
    wanted = set()
    for path, child in module.named_modules():
        kind = type(child).__name__
        if isinstance(child, MATRIX_MODULES) or kind in ("Conv1D", "MixtralExperts"):
            wanted |= {
                f"{path}.{key}"
                for key, parameter in child.named_parameters(recurse=False)
                if parameter.dim() >= 2
            }
    names = {id(parameter): key for key, parameter in module.named_parameters()}  # first name of tied ones
    wanted = {names[id(module.get_parameter(key))] for key in wanted}
    positions = {
        key for key in wanted if key.endswith("decoder.embed_positions.weight")
    }  # sliced, not looked up
    assert wanted - positions <= used
    assert len(wanted) >= 10


class Toy(nn.Module):
    """In-place writes, views of constants, a fused projection, a residual sum of affine branches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, groups=3)
        self.bn = nn.BatchNorm2d(6)
        self.side = nn.Conv2d(3, 6, 1, stride=1)
        self.qkv = nn.Linear(6, 18)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn(self.conv(x))
        y += self.side(x)
        y.relu_()
        tokens = y.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(tokens)).chunk(3, dim=-1)
        buffer = torch.zeros_like(v)
        buffer[:, :2] = v[:, :2] * 2.0
        mixed = torch.softmax(q @ k.transpose(1, 2), dim=-1) @ v
        return self.head(mixed + buffer)


@pytest.fixture(scope="module")
def toy() -> nn.Module:
    torch.manual_seed(0)
    module = Toy()
    nn.init.normal_(module.bn.weight)
    nn.init.uniform_(module.bn.running_var, 0.5, 2.0)
    return module


def test_toy_program_gives_the_expected_rows(toy: nn.Module) -> None:
    found = survey_live(toy, {"": (1, 3, 5, 5)})
    keys = {(item.key, item.kind) for item in found.items if isinstance(item, Region)}
    assert ("conv.weight + bn.weight", "conv2d+batchnorm") in keys
    assert ("conv.weight + bn.weight + side.weight", "conv2d+batchnorm+conv2d") in keys
    assert {("qkv.weight[0:6]", "linear"), ("qkv.weight[6:12]", "linear")} <= keys
    assert ("head.weight", "linear") in keys
    (norm,) = [item for item in found.items if isinstance(item, Skipped)]
    assert norm.status == "nonlinear"
    assert norm.key == "norm.weight"
    assert toy.training  # left as it was


def test_regions_of_the_toy_equal_its_own_jacobian(toy: nn.Module) -> None:
    double = Toy().double().eval()
    double.load_state_dict(toy.state_dict())
    found = survey_live(double, {"": (1, 3, 5, 5)})
    region = next(item for item in found.items if item.key == "conv.weight + bn.weight + side.weight")
    assert isinstance(region, Region)

    def truth(x: torch.Tensor) -> torch.Tensor:
        return double.bn(double.conv(x)) + double.side(x)

    jacobian = torch.autograd.functional.jacobian(truth, torch.zeros(1, 3, 5, 5, dtype=torch.float64))
    expected = jacobian.reshape(150, 75).numpy()
    got = to_dense(lower(region, found.load, dtype=torch.float64)).numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def submodule_jacobian(module: nn.Module, path: str, root_shape: tuple[int, ...]) -> np.ndarray:
    child = module.get_submodule(path)
    point = torch.zeros(1, *root_shape, dtype=torch.float64)
    jacobian: torch.Tensor = torch.autograd.functional.jacobian(child, point)
    rows = jacobian.numel() // point.numel()
    return jacobian.reshape(rows, point.numel()).numpy()


def test_layers_of_a_real_network_equal_the_modules_they_are() -> None:
    torch.manual_seed(1)
    from spectool.architectures.resolve import import_torchvision

    module = import_torchvision().models.shufflenet_v2_x0_5(weights=None).double().eval()
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.weight)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    found = survey_live(module, {"": (1, 3, 32, 32)})
    checked = 0
    for item in found.items:
        if (
            not isinstance(item, Region)
            or item.level != "layer"
            or item.operators != 1
            or item.in_shape is None
        ):
            continue
        if np.prod(item.in_shape) > 800 or np.prod(item.out_shape) > 800:
            continue
        expected = submodule_jacobian(module, item.key.rpartition(".")[0], item.in_shape)
        got = to_dense(lower(item, found.load, dtype=torch.float64)).numpy()
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9 * np.abs(expected).max())
        checked += 1
    assert checked >= 30


def raw_function(recorded: Graph, state: dict[str, torch.Tensor], region: Region) -> Function:
    """The region as torch itself computes it: its exit as a function of its root, by the recorded calls alone."""
    makers = {name: node for node in recorded.nodes for name in node.outputs if name}

    def function(x: torch.Tensor) -> torch.Tensor:
        values = {region.root: x}

        def value(name: str) -> torch.Tensor:
            if name in values:
                return values[name]
            if name in state:
                return state[name].detach()
            node = makers[name]
            name_space, packet, overload = node.op.name.split(".", 2)
            target = getattr(getattr(getattr(torch.ops, name_space), packet), overload)
            inputs = [value(source) for source in node.inputs]

            def fill(argument: object) -> object:
                if type(argument).__name__ == "Slot":
                    return inputs[argument.index]
                if isinstance(argument, (list, tuple)):
                    return [fill(entry) for entry in argument]
                return argument

            attributes = node.op.attributes
            result = target(
                *[fill(entry) for entry in attributes["args"]],
                **{key: fill(entry) for key, entry in attributes["kwargs"].items()},
            )
            results = result if isinstance(result, (tuple, list)) else (result,)
            for output, tensor in zip(node.outputs, results, strict=False):
                if output:
                    values[output] = tensor
            return values[name]

        return value(region.exit)

    return function


@pytest.mark.parametrize(
    "name,shape,least",
    [
        ("shufflenet_v2_x0_5", (1, 3, 32, 32), 100),
        ("mobilenet_v3_small", (1, 3, 32, 32), 50),
        ("mnasnet0_5", (1, 3, 32, 32), 50),
    ],
)
def test_regions_replay_what_torch_computes(name: str, shape: tuple[int, ...], least: int) -> None:
    torch.manual_seed(2)
    from spectool.architectures.resolve import import_torchvision

    module = import_torchvision().models.get_model(name, weights=None).double().eval()
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.weight)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    found = survey_module(module, [torch.empty(shape)])
    recorded, captured = record(module, [torch.empty(shape)])
    state = {**dict(module.named_parameters()), **dict(module.named_buffers()), **captured}
    checked = 0
    for item in found.items:
        if not isinstance(item, Region) or item.in_shape is None:
            continue
        operator = lower(item, found.load, dtype=torch.float64)
        if max(np.prod(operator.in_shape), np.prod(operator.out_shape)) > 800 or item.key.endswith("]"):
            continue
        root = (1, *item.in_shape) if item.batched else item.in_shape
        function = raw_function(recorded, state, item)
        try:
            jacobian = torch.autograd.functional.jacobian(function, torch.zeros(root, dtype=torch.float64))
        except RuntimeError:
            continue  # the row stands for one position of many, and the recorded calls hold all of them
        expected = jacobian.reshape(-1, int(np.prod(root))).numpy()
        got = to_dense(operator).numpy()
        if got.shape != expected.shape:
            continue
        want, have = (np.linalg.svd(matrix, compute_uv=False) for matrix in (expected, got))
        np.testing.assert_allclose(have, want, rtol=0, atol=1e-9 * want[0], err_msg=item.key)
        checked += 1
    assert checked >= least
