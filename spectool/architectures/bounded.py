"""What a stranger's configuration may ask a library of models for: no download, no kernel, no endless model."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from spectool.errors import UsageError

#: Entries that could make a library fetch or run something: code of the repository's own, kernels and weights from
#: the hub, a packing. None of them changes what the layers are.
_LEFT_OUT = re.compile(
    r"_.*|auto_map|quantization_config|trust_remote_code|custom_pipelines|name_or_path|transformers_weights"
    r"|.*(attn|experts)_implementation.*|.*kernel_config.*|use_kernels|.*_repo(_id)?|.*adapter_config"
)
#: Choices of weights to download, off rather than left out; what is built here gets its weights from the file.
_DOWNLOADS = re.compile(r".*pretrained.*")
#: Submodules of a model, and more for every tensor of its file (dropouts, activations, containers).
_MODULES, _MODULES_PER_TENSOR = 2000, 20
#: Entries of all tensors that are filled while a model is built (frequencies, masks; parameters are empty).
_ENTRIES = 1 << 28
_FILLED = frozenset(
    {"ones", "zeros", "randn", "rand", "randint", "randperm", "full", "arange", "linspace", "logspace", "eye"}
)


def harmless(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without what would run or fetch something; nested ones, too.

    Args:
        config: The content of ``config.json``.

    Raises:
        UsageError: If a part of the model is described elsewhere.
    """
    kept: dict[str, Any] = {}
    for key, value in config.items():
        if _LEFT_OUT.fullmatch(key):
            continue
        if key == "backbone" and isinstance(value, str) and not config.get("backbone_config"):
            raise UsageError(
                f"its backbone {value!r} is not described in the file but on a server",
                hint="give --arch, or a configuration with a backbone_config",
            )
        kept[key] = False if _DOWNLOADS.fullmatch(key) else _within(value)
    return kept


def _within(value: Any) -> Any:
    if isinstance(value, Mapping):
        return harmless(value)
    return [_within(item) for item in value] if isinstance(value, list) else value


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Keep the library of the Hugging Face hub, which transformers downloads with, from the network."""
    try:
        from huggingface_hub import constants
    except ImportError:
        yield
        return
    holder: Any = constants
    before = holder.HF_HUB_OFFLINE
    holder.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        holder.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def bounded(tensors: int) -> Iterator[None]:
    """Stop the building of a model that is far larger than its file.

    Args:
        tensors: How many tensors the file has.

    Raises:
        UsageError: If the model has very many more submodules than the file has tensors, or fills much memory.
    """
    from torch.nn.modules import module as registry
    from torch.overrides import TorchFunctionMode

    most = _MODULES + _MODULES_PER_TENSOR * tensors
    modules = entries = 0

    def count(*_: Any) -> None:
        nonlocal modules
        modules += 1
        if modules > most:
            raise UsageError(f"it describes more than {most} submodules, and the file has {tensors} tensors")

    class Filled(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal entries
            if getattr(func, "__name__", "") in _FILLED:
                entries += _entries(func, args, kwargs or {})
                if entries > _ENTRIES:
                    raise UsageError(f"it describes tables of more than {_ENTRIES} entries")
            return func(*args, **(kwargs or {}))

    handle = registry.register_module_module_registration_hook(count)
    try:
        with Filled():
            yield
    finally:
        handle.remove()


def _entries(make: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Return how many entries the tensor has that a call would make; the call is made where no memory is."""
    plain = {key: value for key, value in kwargs.items() if key not in ("generator", "pin_memory", "out")}
    return int(make(*args, **{**plain, "device": "meta"}).numel())
