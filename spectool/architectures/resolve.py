"""Build the module that an architecture's name stands for: no weights, no downloads."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectool.errors import UsageError

if TYPE_CHECKING:
    import torch


def build(name: str, arguments: Mapping[str, Any] | None = None) -> torch.nn.Module:
    """Return the module called ``name``, in evaluation mode, its parameters on the meta device.

    Args:
        name: ``torchvision:resnet18``, ``timm:vit_tiny_patch16_224`` or ``package.module:factory``, a callable that
            returns a module; the working directory is searched too, as ``python -m`` would.
        arguments: Keyword arguments of the factory.

    Raises:
        UsageError: If there is no such architecture or its factory fails; the message says why.
    """
    import torch

    library, colon, rest = name.partition(":")
    if not colon or not rest:
        raise UsageError(
            f"{name!r} names no architecture",
            hint="use torchvision:resnet18, timm:NAME or package.module:factory",
        )
    makers = {"torchvision": _torchvision, "timm": _timm}
    factory = makers[library](rest) if library in makers else _imported(library, rest)
    try:
        # Shapes alone are wanted; weights come from the checkpoint.
        with empty_parameters():
            module = factory(**dict(arguments or {}))
    except Exception as error:  # whatever a stranger's factory raises
        text = str(error).splitlines()[0] if str(error) else ""
        raise UsageError(
            f"{name} cannot be built ({type(error).__name__}: {text})",
            hint="give its arguments as JSON with --arch-args",
        ) from error
    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"{name} made a {type(module).__name__}, not a torch module")
    return module.eval()


@contextlib.contextmanager
def empty_parameters() -> Iterator[None]:
    """Let modules that are built inside have parameters without memory, and buffers with their values.

    Buffers that a checkpoint leaves out (rotary frequencies, masks) are computed when a module is built; parameters
    come from the checkpoint.
    """
    import torch

    original = torch.nn.Module.register_parameter

    def register(self: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        original(self, name, parameter)
        if parameter is not None and not parameter.is_meta:
            kept = torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
            self._parameters[name] = kept

    owner: Any = torch.nn.Module
    owner.register_parameter = register
    try:
        yield
    finally:
        owner.register_parameter = original


def _imported(module_name: str, attribute: str) -> Callable[..., Any]:
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # an import runs the user's own code
        raise UsageError(
            f"cannot import {module_name} ({type(error).__name__}: {error})",
            hint="it is looked for in the working directory and in the installed packages",
        ) from error
    finally:
        if added:
            sys.path.remove(here)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UsageError(f"{module_name} has no {attribute!r}")
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(f"{module_name}:{attribute} is a {type(found).__name__}, not a callable")
    factory: Callable[..., Any] = found
    return factory


def _torchvision(name: str) -> Callable[..., Any]:
    models = import_torchvision().models
    known = models.list_models()
    if name not in known:
        raise UsageError(f"torchvision has no model {name!r}{_nearest(name, known)}")

    def factory(**arguments: Any) -> Any:
        builder = models.get_model_builder(name)
        accepted = builder.__code__.co_varnames
        defaults: dict[str, Any] = {"weights": None}
        if (
            "weights_backbone" in accepted
            or "segmentation" in builder.__module__
            or "detection" in builder.__module__
        ):
            defaults["weights_backbone"] = None
        if name in ("googlenet", "inception_v3"):
            defaults["init_weights"] = False
        return builder(**{**defaults, **arguments})

    return factory


def import_torchvision() -> Any:
    """Import torchvision, beside a CPU build of torch as well.

    PyPI's torchvision holds compiled operators for another build; Python registers fake kernels of them at import
    and fails where they are missing. Declaring the two it needs is enough for everything but running them.

    Raises:
        UsageError: If torchvision is not installed.
    """
    import torch

    try:
        return importlib.import_module("torchvision")
    except ImportError as error:
        raise UsageError("torchvision is not installed", hint="python -m pip install torchvision") from error
    except RuntimeError:
        library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for loaded in [key for key in sys.modules if key == "torchvision" or key.startswith("torchvision.")]:
            del sys.modules[loaded]
        found: Any = importlib.import_module("torchvision")
        # A library takes its declarations along when it is collected.
        found._spectool_declared = library
        return found


def _timm(name: str) -> Callable[..., Any]:
    with contextlib.suppress(UsageError):
        import_torchvision()  # timm imports it, and where that fails says so less well
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise UsageError("timm is not installed", hint="python -m pip install 'spectool[timm]'") from error
    if not timm.is_model(name):
        raise UsageError(f"timm has no model {name!r}{_nearest(name, timm.list_models())}")

    def factory(**arguments: Any) -> Any:
        return timm.create_model(name, pretrained=False, **arguments)

    return factory


def _nearest(name: str, known: list[str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
