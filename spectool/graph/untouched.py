"""Running a module, or copying it, without a trace in it."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def as_it_was(module: torch.nn.Module) -> Iterator[None]:
    """Put back what a forward sets on submodules: weights that old hooks compute, counters, caches."""
    before = [(child, dict(vars(child))) for child in module.modules()]
    try:
        yield
    finally:
        for child, attributes in before:
            now = vars(child)
            for name in set(now) - set(attributes):
                del now[name]
            for name, value in attributes.items():
                if name not in now or now[name] is not value:
                    now[name] = value


@contextlib.contextmanager
def evaluation(module: torch.nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and every part back into its own."""
    flags = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, training in flags:
            child.training = training


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from logging the failure of an attempt that another one follows."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def slow_attention() -> Iterator[None]:
    """Switch off the fused attention that would hide its projections, and put it back."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def copied(module: torch.nn.Module) -> torch.nn.Module:
    """Return a deep copy of a module.

    Old hooks (weight norm, spectral norm) keep the weight of the last forward as a plain attribute. With its graph
    it cannot be copied, and it need not be: the next forward makes it anew.
    """
    known: dict[int, object] = {}
    for child in module.modules():
        for value in vars(child).values():
            if isinstance(value, torch.Tensor):
                known[id(value)] = value.detach().clone()
    made: torch.nn.Module = copy.deepcopy(module, known)
    return made
