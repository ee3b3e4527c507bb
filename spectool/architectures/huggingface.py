"""Build the model that a Hugging Face ``config.json`` describes, on the meta device; none of its code is run."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from spectool.architectures.resolve import empty_parameters, import_torchvision
from spectool.errors import UsageError

if TYPE_CHECKING:
    import torch

_TOKENS = 8
#: Modules without tensors of their own (activations, dropouts, lists) per tensor of the file.
_MODULES_PER_TENSOR = 20
_MODULES_AT_LEAST = 1000

#: Entries that could make transformers fetch or run something: code of the repository's own, kernels and weights
#: from the hub. None of them changes what the layers are.
_LEFT_OUT = re.compile(
    r"auto_map|quantization_config|trust_remote_code|custom_pipelines|_?name_or_path|transformers_weights"
    r"|.*(attn|experts)_implementation.*|.*kernel_config.*|use_kernels|.*pretrained.*|.*_repo(_id)?|.*adapter_config"
)


def build_from_config(config: Mapping[str, Any], tensors: int = 10_000) -> torch.nn.Module:
    """Return the transformers model of a configuration, in evaluation mode, on the meta device.

    Code that a repository ships beside its weights (``auto_map``) is never used.

    Args:
        config: The content of ``config.json``.
        tensors: How many tensors the checkpoint has; a model of many more modules is not built.

    Raises:
        UsageError: If transformers is not installed, does not know the model, or cannot build it.
    """
    with contextlib.suppress(UsageError):
        # transformers looks for torchvision, and stumbles where its compiled part is of another build.
        import_torchvision()
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise UsageError(
            "transformers is not installed", hint="python -m pip install 'spectool[transformers]'"
        ) from error
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise UsageError("config.json names no model_type")
    plain = {key: value for key, value in _harmless(config).items() if key != "model_type"}
    try:
        settings = transformers.AutoConfig.for_model(kind, **plain)
        names = config.get("architectures") or []
        cls = next(filter(None, (_model_class(transformers, name) for name in names)), None)
        with empty_parameters(), _bounded(max(_MODULES_AT_LEAST, _MODULES_PER_TENSOR * tensors)):
            module = cls(settings) if cls is not None else transformers.AutoModel.from_config(settings)
    except Exception as error:  # whatever a library of hundreds of models raises
        text = str(error).splitlines()[0] if str(error) else ""
        raise UsageError(
            f"transformers cannot build model_type {kind!r} ({type(error).__name__}: {text})"
        ) from error
    found: torch.nn.Module = module.eval()
    return found


def _harmless(value: Any) -> Any:
    """Return a configuration without what is left out, at every level."""
    if isinstance(value, Mapping):
        return {key: _harmless(inner) for key, inner in value.items() if not _LEFT_OUT.fullmatch(str(key))}
    return [_harmless(inner) for inner in value] if isinstance(value, list) else value


def _model_class(transformers: Any, name: Any) -> Any:
    """Return the model class of this name; None for everything else that the library calls its own."""
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    base = transformers.PreTrainedModel
    return found if isinstance(found, type) and issubclass(found, base) and found is not base else None


@contextlib.contextmanager
def _bounded(most: int) -> Iterator[None]:
    """Stop the building of a model that would have more modules."""
    from torch.nn.modules.module import register_module_module_registration_hook

    count = 0

    def note(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise ValueError(f"it would have more than {most} modules, and the file far fewer tensors")

    hook = register_module_module_registration_hook(note)
    try:
        yield
    finally:
        hook.remove()


def input_shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Return input name → shape for a transformers model, from its configuration.

    The number of tokens is small and arbitrary: no spectrum depends on it.
    """
    config: Any = getattr(module, "config", None)
    shapes: dict[str, tuple[int, ...]] = {}
    vision = getattr(config, "vision_config", None) or config
    name = str(getattr(module, "main_input_name", "input_ids"))
    names = {name}
    if (
        getattr(config, "vision_config", None) is not None
        and getattr(config, "text_config", None) is not None
    ):
        names |= {"input_ids", "pixel_values"}
    if getattr(config, "is_encoder_decoder", False):
        names.add("decoder_input_ids")
    for wanted in sorted(names):
        if wanted == "pixel_values":
            size = getattr(vision, "image_size", 224)
            height, width = size if isinstance(size, (list, tuple)) else (size, size)
            shapes[wanted] = (1, int(getattr(vision, "num_channels", 3)), int(height), int(width))
        elif wanted == "input_features":
            shapes[wanted] = (
                1,
                int(getattr(config, "num_mel_bins", 80)),
                2 * int(getattr(config, "max_source_positions", 1500)),
            )
        elif wanted == "input_values":
            shapes[wanted] = (1, 16000)
        else:
            shapes[wanted] = (1, _TOKENS)
    return shapes
