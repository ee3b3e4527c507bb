"""Limits on σ₁ kept during training: one cheap warm step per batch, a clip every few steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from spectool.api.attached import apart, attach
from spectool.api.clip_run import not_gated, training_remark
from spectool.api.job import Selection
from spectool.api.limits import Bounds
from spectool.api.live import checked_limits, clip_attached
from spectool.api.sources import InputShapes
from spectool.clip import Constraint, group
from spectool.clip import Options as ClipOptions
from spectool.clip.project import Method
from spectool.clip.tracked import Followed, Tracked, tracked
from spectool.errors import OperatorError, UsageError
from spectool.graph import Region
from spectool.progress import Progress, silent
from spectool.report.clip import ClipReport

OnStep = Callable[[Mapping[str, float]], None]


class SpectralClipper:
    """Keeps σ₁ of every operator of a model within its limit while the model is trained.

    Call ``step`` after ``optimizer.step()``. Every step follows the leading singular vectors by one block power
    step, whose estimates go to ``on_step``. Every ``every`` steps σ₁ of each operator is found, from these vectors
    and a cold start, and what exceeds its limit is projected: the nearest weights to within 5 %, in place. After it
    σ₁ ≤ limit to 1e-4.

    Operators are those of evaluation mode, with the running statistics as they are; these, the mode of the model,
    its state-dict keys, gradients and torch's random state stay as they are, so that a clipper whose limits are
    never reached changes nothing at all. The program is followed once, at the start; weights are read anew.

    Args:
        model: The model, or a ``DataParallel``, ``DistributedDataParallel`` or ``torch.compile`` wrapper of it. Under
            ``DistributedDataParallel`` every process makes its own clipper; the first one's weights count.
        max: Limit on σ₁, or a mapping from glob (of an operator's key or a weight's name) to limit.
        every: Steps from one clip to the next.
        level: ``composed`` (maximal regions such as conv∘BN), ``layer`` or ``both``.
        input_shape: Shape of the input with its batch axis, or a mapping from input name to shape.
        layers: Globs of keys to keep.
        exclude: Globs of keys to drop.
        kinds: Kinds to keep.
        warmup: Steps before the first clip.
        method: ``auto``, or a method of ``clip_``.
        cheap_steps: Power steps per call of ``step``; 0 for none, which leaves σ₁ as of the last clip.
        triplets: Singular vectors kept per operator; a cheap step applies the operator 2·triplets times.
        seed: Of the start vectors.
        on_step: Receives operator key → estimate of σ₁ after every step.

    Attributes:
        refused: Key → why an operator is not clipped: its weight cannot be set, training makes it anew (spectral
            norm), or no weight obeys its limit; said once by a warning, too.
        applications: Operator applications so far.

    Raises:
        UsageError: If an argument cannot be used, or a pattern matches nothing.
        GraphError: If the model cannot be followed.
        NothingToAnalyse: If there is no operator, or the filters leave none.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> clipper = SpectralClipper(model, max=1.0, every=1)
        >>> model(torch.ones(3, 4)).square().sum().backward()
        >>> optimizer.step()
        >>> sorted(clipper.step())
        ['0.weight', '2.weight']
        >>> max(clipper.sigma.values()) <= 1.0001
        True

    **Source:** A. Ebrahimpour Boroojeny, M. Telgarsky, H. Sundaram, "Spectrum extraction and clipping for implicitly
    linear layers", AISTATS 2024: the schedule; the projection is the nearest weight, not a rank-one deflation.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        max: float | Mapping[str, float] | Bounds,
        every: int = 100,
        level: str = "composed",
        *,
        input_shape: InputShapes | None = None,
        layers: Sequence[str] = (),
        exclude: Sequence[str] = (),
        kinds: Sequence[str] = (),
        warmup: int = 0,
        method: Method = "auto",
        cheap_steps: int = 1,
        triplets: int = 4,
        seed: int = 0,
        on_step: OnStep | None = None,
    ) -> None:
        for name, value, least in (
            ("every", every, 1),
            ("warmup", warmup, 0),
            ("cheap_steps", cheap_steps, 0),
            ("triplets", triplets, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(f"{name}={value!r} is no whole number from {least} up")
        self._bounds = checked_limits(max, method)
        self._selection = Selection(level, layers, exclude, kinds, None)
        self._input_shape = input_shape
        self._attached = attach(model, self._selection, input_shape)
        self._bounds.check_used((item.key, item.weights) for item in self._attached.job.wanted)
        self.every, self.warmup, self.cheap_steps = every, warmup, cheap_steps
        self.on_step, self._triplets = on_step, triplets
        self._options = ClipOptions(method=method, seed=seed)
        self._source = torch.Generator().manual_seed(seed)
        self.refused: dict[str, str] = {}
        self._followed: dict[str, Followed] = {}
        self._problems: list[Tracked] = []
        self._count = self._cheap_applications = 0
        with apart():
            self._prepare(kinds)

    def _prepare(self, kinds: Sequence[str]) -> None:
        """Sort operators into those that are clipped, those that are only followed, and those that cannot be."""
        constraints: list[Constraint] = []
        names: list[str] = []
        for item in self._attached.job.items:
            limit = self._bounds.for_row(item.key, item.weights)
            if not_gated(item, limit, kinds) or limit is None:
                continue
            if not isinstance(item, Region):
                self.refused[item.key] = item.reason
                continue
            # A layer and a composition may have one key.
            name = item.key if item.key not in self._followed else f"{item.key} ({item.level})"
            one = Followed(item, limit)
            try:
                one.map(self._attached.load)
            except OperatorError as error:
                self.refused[name] = str(error)
                continue
            self._followed[name] = one
            constraints.append(Constraint(item, limit))
            names.append(name)
        writer = self._attached.writer
        problems, refused = group(constraints, self._attached.load, writer)
        self.refused.update({names[index]: reason for index, reason in refused.items()})
        by_region = {id(one.region): one for one in self._followed.values()}
        key_of = {id(one.region): name for name, one in self._followed.items()}
        for problem in problems:
            if writer is None:
                break
            remark = training_remark(problem, writer)
            if remark:
                keys = [key_of[id(constraint.region)] for constraint in problem.constraints]
                self.refused.update(dict.fromkeys(keys, f"{remark}: only finish() and clip_ can clip it"))
            else:
                self._problems.append(tracked(problem, writer, self._triplets, by_region))
        if self.refused:
            self._warn(self.refused)

    def _warn(self, refused: Mapping[str, str]) -> None:
        shown = "; ".join(f"{key}: {reason}" for key, reason in list(refused.items())[:3])
        text = f"operators that are not clipped: {len(refused)} ({shown})"
        warnings.warn(text, UserWarning, stacklevel=4)

    @property
    def sigma(self) -> Mapping[str, float]:
        """Operator key → latest estimate of σ₁ (NaN before the first step)."""
        return MappingProxyType({name: one.sigma for name, one in self._followed.items()})

    @property
    def applications(self) -> int:
        """Operator applications so far."""
        return self._cheap_applications + sum(problem.applications for problem in self._problems)

    @torch.no_grad()
    def step(self) -> Mapping[str, float]:
        """Follow the operators and, every ``every`` steps, clip those above their limit.

        Returns:
            Operator key → estimate of σ₁, as ``on_step`` receives it.
        """
        self._count += 1
        with apart():
            due = self._count > self.warmup and self._count % self.every == 0
            for one in self._followed.values() if self.cheap_steps else ():
                self._cheap_applications += one.step(
                    self._attached.load, self._triplets, self.cheap_steps, self._source
                )
        if due:
            self.clip()
        sigma = self.sigma
        if self.on_step is not None:
            self.on_step(sigma)
        return sigma

    def clip(self) -> tuple[str, ...]:
        """Clip now what exceeds its limit, and return the keys of the problems that changed."""
        changed = []
        with apart():
            for problem in self._problems if self._attached.leads else ():
                key = problem.problem.key
                try:
                    if problem.clip(self._attached.read, self._attached.write, self._options, self._source):
                        changed.append(key)
                except OperatorError as error:
                    # A training of many hours must not end here; it is said once.
                    if key not in self.refused:
                        self._warn({key: str(error)})
                    self.refused[key] = str(error)
            if self._attached.group is not None:
                self._attached.agree(sorted(self._homes()))
        return tuple(changed)

    def finish(
        self, *, exact: bool = False, recenter: str = "none", k: int = 8, progress: Progress = silent
    ) -> ClipReport:
        """Clip once more, to the limits as ``clip_`` does, and say what every operator is now.

        Args:
            exact: As for ``clip_``.
            recenter: As for ``clip_``; ``auto`` moves running means along, which keeps accuracy.
            k: As for ``clip_``.
            progress: As for ``clip_``.

        Returns:
            What became of every operator, measured by a cold start.
        """
        options = ClipOptions(method=self._options.method, exact=exact, seed=self._options.seed)
        return clip_attached(
            self._attached,
            self._bounds,
            self._selection,
            self._input_shape,
            options,
            k=k,
            recenter=recenter,
            progress=progress,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs besides model and optimizer; ``torch.save`` takes it."""
        return {
            "version": 1,
            "count": self._count,
            "applications": self.applications,
            "generator": self._source.get_state(),
            "sigma": {name: one.sigma for name, one in self._followed.items()},
            "rows": {name: one.rows.clone() for name, one in self._followed.items() if one.rows is not None},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken: the same steps follow, bit by bit.

        Args:
            state: What ``state_dict`` of a clipper of the same model and selection returned.

        Raises:
            UsageError: If it is from another model or another version.
        """
        if state.get("version") != 1 or set(state.get("sigma", ())) != set(self._followed):
            raise UsageError(
                "this state is of another model or selection",
                hint="make the clipper as it was made when the state was saved",
            )
        for name, rows in state["rows"].items():
            if rows.dim() != 2 or len(rows) > self._triplets:
                raise UsageError(f"{name}: the state keeps {len(rows)} vectors", hint="use the same triplets")
        self._count = int(state["count"])
        self._cheap_applications = int(state["applications"])
        for problem in self._problems:
            problem.applications = 0
        self._source.set_state(state["generator"].cpu())
        for name, one in self._followed.items():
            rows = state["rows"].get(name)
            one.rows = None if rows is None else rows.detach().cpu().float().clone()
            one.sigma = float(state["sigma"][name])

    def _homes(self) -> set[str]:
        writer = self._attached.writer
        if writer is None:
            return set()
        return {
            home for one in self._problems for name in one.problem.names for home in writer.homes(name) or ()
        }
