"""Build the model that a Hugging Face ``config.json`` describes, on the meta device; none of its code is run."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from spectool.architectures.bounded import bounded, harmless, offline
from spectool.architectures.resolve import empty_parameters, import_torchvision
from spectool.errors import UsageError

if TYPE_CHECKING:
    import torch

_TOKENS = 8


def build_from_config(config: Mapping[str, Any], tensors: int = 10_000) -> torch.nn.Module:
    """Return the transformers model of a configuration, in evaluation mode, on the meta device.

    Code that a repository ships beside its weights (``auto_map``) is never used, nothing is downloaded, and a model
    that is far larger than its file is not built to its end.

    Args:
        config: The content of ``config.json``.
        tensors: How many tensors the file has.

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
    try:
        plain = {key: value for key, value in harmless(config).items() if key != "model_type"}
        with offline(), empty_parameters(), bounded(tensors):
            settings = transformers.AutoConfig.for_model(kind, **plain)
            names = config.get("architectures") or []
            cls = next(filter(None, (_model_class(transformers, name) for name in names)), None)
            module = cls(settings) if cls is not None else transformers.AutoModel.from_config(settings)
    except UsageError as error:
        raise UsageError(f"model_type {kind!r} is not built: {error}", hint=error.hint) from error
    except Exception as error:  # whatever a library of hundreds of models raises
        text = str(error).splitlines()[0] if str(error) else ""
        raise UsageError(
            f"transformers cannot build model_type {kind!r} ({type(error).__name__}: {text})"
        ) from error
    found: torch.nn.Module = module.eval()
    return found


def _model_class(transformers: Any, name: Any) -> Any:
    """Return the model class of this name; None for everything else that the library calls its own."""
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    base = transformers.PreTrainedModel
    return found if isinstance(found, type) and issubclass(found, base) and found is not base else None


def input_shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Return input name → shape for a transformers model, from its configuration.

    The number of tokens is small and arbitrary: no spectrum depends on it.

    Raises:
        UsageError: If the configuration states sizes that are none.
    """
    try:
        return _input_shapes(module)
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"its configuration states no usable input size ({error})") from error


def _input_shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
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
