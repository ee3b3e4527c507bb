"""Checkpoints built by hand, module trees as an inert reader gives them, and regions run node by node.

The executor here knows nothing of the package's own lowering: it is the other side of the comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from spectool.checkpoint.types import Checkpoint, InertModule, TensorRef
from spectool.graph.aten import Slot
from spectool.graph.names import survey_names
from spectool.graph.types import BatchNorm, Call, Conv, Embedding, Linear, Region, Skipped, Survey

ANY_SIZE = ("infinite grid, stride 1, zero padding", "groups=1")
REAL = Path(__file__).resolve().parents[2] / "shared" / "real_models"


def checkpoint(
    tensors: Mapping[str, torch.Tensor],
    *,
    metadata: Mapping[str, Any] | None = None,
    program: InertModule | None = None,
    format: str = "torch-zip",
) -> Checkpoint:
    """A checkpoint over tensors in memory; tensors that share memory, offset, shape and stride are tied."""
    refs: dict[str, TensorRef] = {}
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, tensor in tensors.items():
        storage = f"{tensor.untyped_storage().data_ptr():x}"
        place = (storage, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()))
        if tensor.numel() and place in first:
            aliases[name] = first[place]
        first.setdefault(place, name)
        dtype = str(tensor.dtype).removeprefix("torch.")
        refs[name] = TensorRef(
            name,
            dtype,
            tuple(tensor.shape),
            tuple(tensor.stride()),
            Path("net"),
            name,
            0,
            storage,
            tensor.nbytes,
        )
    return Checkpoint(
        Path("net"), format, refs, aliases, dict(metadata or {}), program, (), lambda ref: tensors[ref.name]
    )


def inert(module: nn.Module, path: str = "") -> InertModule:
    """What an inert reader makes of a pickled module: its class's name, plain attributes, names of tensors."""
    plain = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, float, str, tuple, list, type(None)))
    }
    cls = type(module)
    prefix = f"{path}." if path else ""
    own = {**module._parameters, **module._buffers}
    return InertModule(
        f"{cls.__module__}.{cls.__qualname__}",
        plain,
        {name: f"{prefix}{name}" for name, value in own.items() if value is not None},
        {
            name: inert(child, f"{prefix}{name}")
            for name, child in module._modules.items()
            if child is not None
        },
    )


def pickled(module: nn.Module, **options: Any) -> Checkpoint:
    """The checkpoint of a module pickled whole; names that share a parameter are tied."""
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(
        module.named_buffers(remove_duplicate=False)
    )
    order = {name: tensors[name].detach() for name in module.state_dict() if name in tensors}
    return checkpoint(order, program=inert(module), **options)


def regions(survey: Survey, level: str | None = None) -> dict[str, Region]:
    """Regions by key."""
    return {
        item.key: item for item in survey.items if isinstance(item, Region) and level in (None, item.level)
    }


def skips(survey: Survey) -> dict[str, Skipped]:
    return {item.key: item for item in survey.items if isinstance(item, Skipped)}


def run(region: Region, load: Callable[[str], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Run a region in float64 on one batch, exactly as its nodes say."""
    values = {region.root: x.double()}
    for node in region.nodes:
        arguments = [
            None if not name else values[name] if name in values else load(name).double()
            for name in node.inputs
        ]
        values[node.outputs[0]] = _apply(node.op, arguments)
    return values[region.exit]


def _apply(op: Any, arguments: list[Any]) -> torch.Tensor:
    x, *rest = arguments
    match op:
        case Linear():
            matrix = rest[0] if op.transposed else rest[0].T
            return op.alpha * (x @ matrix)
        case Embedding():
            return x @ rest[0]
        case BatchNorm():
            gamma, beta, mean, var = rest
            return F.batch_norm(x, mean, var, gamma, beta, False, 0.0, op.eps)
        case Conv(geometry=g):
            if g.transposed:
                function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[g.dims - 1]
                pads = [low for low, high in g.padding if low == high]
                return function(x, rest[0], None, g.stride, pads, g.output_padding, g.groups, g.dilation)
            flat = [side for pair in reversed(g.padding) for side in pair]
            mode = {"zeros": "constant"}.get(g.padding_mode, g.padding_mode)
            x = F.pad(x, flat, mode=mode) if any(flat) else x
            return (F.conv1d, F.conv2d, F.conv3d)[g.dims - 1](
                x, rest[0], None, g.stride, 0, g.dilation, g.groups
            )
        case Call(name=name, attributes=attributes):
            namespace, packet, overload = name.split(".")
            function = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
            filled = [arguments[a.index] if isinstance(a, Slot) else a for a in attributes["args"]]
            return function(*filled, **attributes["kwargs"])
    raise AssertionError(f"unexpected operator {op}")


def dense(function: Callable[[torch.Tensor], torch.Tensor], in_shape: tuple[int, ...]) -> torch.Tensor:
    """The matrix of an affine function on a batch, by the unit vectors, in float64."""
    size = torch.Size(in_shape).numel()
    with torch.no_grad():
        basis = torch.eye(size, dtype=torch.float64).reshape(size, *in_shape)
        zero = function(torch.zeros(1, *in_shape, dtype=torch.float64))
        return torch.cat([(function(e[None]) - zero).reshape(1, -1) for e in basis]).T


def region_matrix(region: Region, load: Callable[[str], torch.Tensor]) -> torch.Tensor:
    assert region.in_shape is not None
    return dense(lambda x: run(region, load, x), region.in_shape)


def settled(module: nn.Module, seed: int = 0) -> nn.Module:
    """A module in float64 and evaluation mode with running statistics that are not trivial."""
    generator = torch.Generator().manual_seed(seed)
    module.double().eval()
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
        for part in module.modules():
            if getattr(part, "running_var", None) is not None:
                part.running_var.copy_(0.1 + torch.rand(part.running_var.shape, generator=generator).double())
    return module


def keys(items: Any) -> list[tuple[str, str, str]]:
    return [(item.key, getattr(item, "level", item.__class__.__name__.lower()), item.kind) for item in items]


def survey(shapes: dict[str, tuple[int, ...]], **options: Any) -> Survey:
    """A survey of float32 tensors of these shapes, by names alone."""
    assume_bn = options.pop("assume_bn", False)
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    return survey_names(checkpoint(tensors, **options), assume_bn=assume_bn)


def norm(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a batch norm."""
    return {f"{name}.{leaf}": (channels,) for leaf in ("weight", "bias", "running_mean", "running_var")}


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}
