"""A live module as something that can be clipped: its operators, its tensors as they are now, and the way back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils.parametrize import ParametrizationList

from spectool.api.job import Job, Selection, open_job
from spectool.api.selecting import select
from spectool.api.sources import InputShapes, Ways
from spectool.checkpoint import Checkpoint, TensorRef
from spectool.errors import UsageError
from spectool.graph import Skipped
from spectool.graph.effective import Effective
from spectool.graph.untouched import as_it_was
from spectool.graph.writing import Writer

Load = Callable[[str], Tensor]


@dataclass(frozen=True)
class Attached:
    """A module whose operators were found once and whose tensors are read when asked for.

    Attributes:
        module: The module itself, without wrappers.
        job: Its operators, and those wanted of them.
        owners: Name of a parameter or buffer → (submodule, its name there).
        group: Process group of the wrapper that keeps several copies of the module equal; None if there is one copy.
    """

    module: Module
    job: Job
    owners: Mapping[str, tuple[Module, str]]
    group: Any = None

    @property
    def writer(self) -> Writer | None:
        """The way back from constants to tensors of the module, as these are when it is used."""
        found = self.job.found.survey.writer
        return None if found is None else _LiveWriter(found, self)

    def tensor(self, name: str) -> Tensor:
        """Return a parameter or buffer as it is now: itself, not a copy."""
        owner, leaf = self.owners[name]
        found: Tensor | None = owner._parameters.get(leaf)
        if found is None:
            found = owner._buffers.get(leaf)
        if found is None:
            raise UsageError(f"the module no longer has {name}", hint="make a new clipper")
        return found

    def read(self, name: str) -> Tensor:
        """Return a parameter or buffer on the CPU, in its own type; on the CPU it shares the module's memory."""
        return self.tensor(name).detach().cpu()

    def load(self, name: str) -> Tensor:
        """Return a constant as regions read it, from the tensors as they are now."""
        if name in self.owners:
            return self.read(name)
        survey = self.job.found.survey
        homes = None if survey.writer is None else survey.writer.homes(name)
        if survey.writer is not None and homes:
            now = {home: self.read(home) for home in homes if home in self.owners}
            return survey.writer.reload(now)(name)
        return survey.load(name)

    def write(self, edits: Mapping[str, Tensor]) -> None:
        """Copy values into tensors of the module; identity, gradients, flags, strides and hooks stay."""
        with torch.no_grad():
            for name, value in edits.items():
                self.tensor(name).copy_(value)

    def as_checkpoint(self) -> Checkpoint:
        """Return the module's tensors as those of a file that was opened."""
        path = Path(type(self.module).__name__)
        tensors = {name: _ref(name, self.tensor(name), path) for name in self.owners}
        return Checkpoint(path, "module", tensors, reader=lambda ref: self.read(ref.name))

    def agree(self, names: list[str]) -> None:
        """Make tensors of all copies of the module those of the first process; all processes must call it."""
        if self.group is None:
            return
        source = torch.distributed.get_global_rank(self.group, 0)
        with torch.no_grad():
            for name in names:
                torch.distributed.broadcast(self.tensor(name).data, source, group=self.group)

    @property
    def leads(self) -> bool:
        """Whether this process is the first of those that hold a copy."""
        return self.group is None or torch.distributed.get_rank(self.group) == 0


@dataclass(frozen=True)
class _LiveWriter:
    """A writer that knows the tensors of the module as they are now: those it was made with may be gone.

    Attributes:
        inner: The writer of the front-end.
        attached: The module.
    """

    inner: Writer
    attached: Attached

    def homes(self, name: str) -> tuple[str, ...] | None:
        """Return the tensors behind a constant, if it can be changed."""
        return self.inner.homes(name)

    def edits(self, updates: Mapping[str, Tensor], read: Load | None = None) -> dict[str, Tensor]:
        """Return new values of tensors that make constants the wanted ones."""
        return self.inner.edits(updates, read or self.attached.read)

    def reload(self, stored: Mapping[str, Tensor]) -> Load:
        """Return the loader of constants once ``stored`` tensors have these values and all others those of now."""
        return self._loader(stored, 0)

    def derived(self, name: str) -> Effective | None:
        """Return the parametrisation behind a constant."""
        return self.inner.derived(name)

    def readings(self, stored: Mapping[str, Tensor]) -> tuple[Load, ...]:
        """Return ``reload`` and what else ``stored`` values may come to."""
        return tuple(self._loader(stored, index) for index, _ in enumerate(self.inner.readings(stored)))

    def _loader(self, stored: Mapping[str, Tensor], which: int) -> Load:
        def load(name: str) -> Tensor:
            homes = self.inner.homes(name) or ()
            if not any(home in stored for home in homes):
                return self.attached.load(name)
            now = {home: stored[home] if home in stored else self.attached.read(home) for home in homes}
            loaders = self.inner.readings(now)
            return loaders[min(which, len(loaders) - 1)](name)

        return load


def attach(model: Module, selection: Selection, input_shape: InputShapes | None) -> Attached:
    """Find the operators of a live module, which is left exactly as it is.

    Args:
        model: The module, or a ``DataParallel``, ``DistributedDataParallel`` or ``torch.compile`` wrapper of it.
        selection: Which operators are wanted.
        input_shape: As for ``inspect``.

    Raises:
        UsageError: If an argument cannot be used.
        GraphError: If the module cannot be followed.
        NothingToAnalyse: If there is no operator, or the filters leave none.
    """
    if not isinstance(model, Module):
        raise UsageError(
            f"a live module is needed, got {type(model).__name__}", hint="spectool.clip takes files"
        )
    module, group = unwrap(model)
    with apart(), as_it_was(module), _uncompiled():
        job = open_job(module, Ways(), selection, input_shape)
    owners = {
        f"{path}.{leaf}" if path else leaf: (child, leaf)
        for path, child in module.named_modules(remove_duplicate=False)
        for leaf, tensor in (*child._parameters.items(), *child._buffers.items())
        if tensor is not None
    }
    return Attached(module, _with_unseen(job, module, selection), owners, group)


def _with_unseen(job: Job, module: Module, selection: Selection) -> Job:
    """Return the job with a skip for every parametrised weight that no row speaks of: none is passed over."""
    spoken = {name for item in job.found.survey.items for name in item.weights}
    unseen = []
    for path, child in module.named_modules():
        if not isinstance(child, ParametrizationList):
            continue
        shapes = {f"{path}.{leaf}": tuple(p.shape) for leaf, p in child.named_parameters()}
        if max(map(len, shapes.values()), default=0) >= 2 and not spoken & set(shapes):
            key = f".{path}".replace(".parametrizations.", ".")[1:]
            reason = "its parametrisation was not followed"
            unseen.append(Skipped(key, "region", tuple(shapes), tuple(shapes.values()), reason))
    found = select(
        unseen,
        level=selection.level,
        layers=selection.layers,
        exclude=selection.exclude,
        kinds=selection.kinds,
    )
    return replace(job, wanted=(*job.wanted, *found), items=(*job.items, *found))


def unwrap(model: Module) -> tuple[Module, Any]:
    """Return the module inside wrappers, and the process group that keeps copies of it equal (None: one copy)."""
    group = None
    while True:
        inner = model._modules.get("_orig_mod")  # torch.compile
        if isinstance(model, DistributedDataParallel):
            group = model.process_group if torch.distributed.get_world_size(model.process_group) > 1 else None
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            inner = model.module
        if inner is None:
            return model, group
        model = inner


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Let something compute without a trace in torch's global state, and without being bent by it.

    Inside there is no autocast, no inference mode and no default device; random numbers drawn inside are not
    missing outside.
    """
    cpu = torch.get_rng_state()
    started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state_all() if started else []
    precision = torch.get_float32_matmul_precision()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if precision != "highest":
            torch.set_float32_matmul_precision("highest")
            stack.callback(torch.set_float32_matmul_precision, precision)
        try:
            yield
        finally:
            torch.set_rng_state(cpu)
            if cuda:
                torch.cuda.set_rng_state_all(cuda)


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """Run compiled parts of a module as plain Python, so that they can be followed."""
    set_stance = getattr(torch.compiler, "set_stance", None)  # torch 2.6
    if set_stance is None:
        yield
        return
    with set_stance("force_eager"):
        yield


def _ref(name: str, tensor: Tensor, path: Path) -> TensorRef:
    kind = str(tensor.dtype).removeprefix("torch.")
    stride = tuple(tensor.stride()) if tensor.layout == torch.strided else ()
    return TensorRef(
        name, kind, tuple(tensor.shape), stride, path, name, 0, str(tensor.data_ptr()), tensor.nbytes
    )
