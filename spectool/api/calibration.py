"""Matching means on data: the network runs with its old and its new weights, and batch norms follow in order."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from spectool.checkpoint import Checkpoint
from spectool.errors import UsageError
from spectool.graph.untouched import copied

_MOST = 1024
"""Samples that are used; the means of so many are accurate to a few per cent of a standard deviation."""

Live = tuple[torch.nn.Module, Mapping[str, str]]


def read_inputs(source: str | Path | Tensor) -> Tensor:
    """Return calibration inputs ``(n, …)``: a tensor, or the first array of a .npz, .npy or .pt file.

    Raises:
        UsageError: If there are none.
    """
    if isinstance(source, Tensor):
        return _usable(source[:_MOST], "the calibration inputs")
    path = Path(source)
    if not path.is_file():
        raise UsageError(f"there is no file {path} with calibration inputs", hint="give a .npz or .pt file")
    try:
        if path.suffix.lower() in (".npz", ".npy"):
            import numpy as np

            loaded = np.load(path, allow_pickle=False)
            array = loaded if isinstance(loaded, np.ndarray) else loaded[loaded.files[0]]
            value: object = torch.from_numpy(np.ascontiguousarray(array))
        else:
            value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken file makes its reader raise
        raise UsageError(
            f"{path} cannot be read as calibration inputs ({str(error).splitlines()[0] if str(error) else error!r})",
            hint="save an array (n, …) with numpy.savez or torch.save",
        ) from error
    if isinstance(value, Mapping):
        value = next((entry for entry in value.values() if isinstance(entry, Tensor)), None)
    if not isinstance(value, Tensor) or value.dim() < 2 or not len(value):
        raise UsageError(f"{path} holds no batch of inputs", hint="save an array (n, …) with its batch axis")
    return _usable(value[:_MOST], str(path))


def _usable(inputs: Tensor, name: str) -> Tensor:
    bad = int((~torch.isfinite(inputs)).sum()) if inputs.is_floating_point() else 0
    if bad:
        raise UsageError(
            f"{name}: {bad} numbers are NaN or infinite", hint="calibrate on inputs as the network takes them"
        )
    return inputs


def calibrated_means(
    live: Live, checkpoint: Checkpoint, edits: Mapping[str, Tensor], inputs: Tensor
) -> dict[str, Tensor]:
    """Return running means with which every batch norm sees the same mean, before and after, on these inputs.

    Args:
        live: The module and its keys.
        checkpoint: Holds the old weights.
        edits: The new ones, by checkpoint key.
        inputs: ``(n, …)``, of the first n = 1024.

    Returns:
        Checkpoint key → value, in the stored type; only those that move.

    Raises:
        UsageError: If the network does not run on these inputs.
    """
    module, keys = live
    old = with_weights(module, checkpoint, keys, {})
    new = with_weights(module, checkpoint, keys, edits)
    inputs = inputs.float() if inputs.is_floating_point() else inputs
    seen: dict[str, Tensor] = {}
    moved: dict[str, Tensor] = {}

    def remember(name: str) -> object:
        return lambda norm, arguments: seen.__setitem__(name, _channel_mean(arguments[0]))

    def follow(name: str) -> object:
        def hook(norm: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
            running = norm.running_mean
            if name in seen and isinstance(running, Tensor):
                difference = _channel_mean(arguments[0]) - seen[name]
                if float(difference.abs().max()) > 0.0:
                    running.add_(difference.to(running.dtype))
                    moved[f"{name}.running_mean" if name else "running_mean"] = running

        return hook

    with torch.no_grad():
        for program, make in ((old, remember), (new, follow)):
            for name, child in program.named_modules():
                if (
                    isinstance(child, torch.nn.modules.batchnorm._BatchNorm)
                    and child.running_mean is not None
                ):
                    child.register_forward_pre_hook(make(name))  # type: ignore[arg-type]
            try:
                program(inputs)
            except (RuntimeError, ValueError, TypeError) as error:
                raise UsageError(
                    f"the network does not run on inputs {tuple(inputs.shape)}: {str(error).splitlines()[0]}",
                    hint="--calibrate wants a batch as the network takes it",
                ) from error
    found = {}
    for name, value in moved.items():
        key = keys.get(name, name)
        if key in checkpoint.tensors:
            found[key] = value.detach().to(checkpoint.read(key).dtype)
    return found


def with_weights(
    module: torch.nn.Module, checkpoint: Checkpoint, keys: Mapping[str, str], edits: Mapping[str, Tensor]
) -> torch.nn.Module:
    """Return a copy of a module with the file's weights, edited, in evaluation mode and float32."""
    if any(value.is_meta for value in module.state_dict().values()):
        made = copied(module).to_empty(device="cpu")
    else:
        made = copied(module)
    made = made.float().eval()
    with torch.no_grad():
        for name, value in made.state_dict(keep_vars=True).items():
            key = keys.get(name, name)
            if key in checkpoint.tensors:
                value.copy_(edits[key] if key in edits else checkpoint.read(key))
    return made


def _channel_mean(x: Tensor) -> Tensor:
    return x.double().movedim(1, 0).flatten(1).mean(dim=1)
