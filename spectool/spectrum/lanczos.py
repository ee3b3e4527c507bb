"""Thick-restart (block) Lanczos for the largest singular triplets, verified and polished."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from spectool.linear import MatrixMap, exact_arithmetic
from spectool.progress import Progress, Step, silent
from spectool.spectrum.estimate import Estimate
from spectool.spectrum.finish import finish, zero
from spectool.spectrum.gram import Gram
from spectool.spectrum.krylov import Krylov
from spectool.spectrum.probabilistic import FAILURE
from spectool.spectrum.starts import fingerprint, gaussian, generator
from spectool.spectrum.verify import verify

if TYPE_CHECKING:
    from spectool.linear import LinearMap

EXTRA = 4
CHECK = 8

@dataclass(frozen=True)
class Found:
    values: torch.Tensor
    vectors: torch.Tensor
    converged: bool
    worst: float


def iterate(gram, known, known_values, k, extra, *, tol, pairs, block, base, source, task, progress):
    space = gram.size - len(known)
    cap = min(base, space)
    krylov = Krylov(gram, known, cap, block, source)
    krylov.start()
    done = 0
    last_check = 0
    history = np.inf
    while True:
        width = krylov.frontier
        full = krylov.size + width > cap or width == 0
        spent = done + width > pairs
        if full or spent or (krylov.size - last_check >= CHECK and krylov.size >= k):
            values, coords, eig = krylov.ritz()
            last_check = krylov.size
            top = max(values[0], known_values[0] if len(known_values) else 0)
            merged = np.sort(np.concatenate([values, known_values]))[::-1]
            level = merged[min(k, len(merged)) - 1]
            wanted = [i for i in range(min(k, len(values))) if values[i] >= level or width==0]
            res = eig / np.sqrt(np.maximum(values, 1e-15 * top) * top)
            worst = max((res[i] for i in wanted), default=0.0)
            ok = worst <= tol and (len(merged) >= k)
            progress(Step(task, matvecs=gram.applications, residual=float(worst)))
            if ok or spent or width == 0:
                count = min(k + extra, len(values))
                return Found(torch.from_numpy(values[:count].copy()), krylov.vectors(coords[:, :count]), ok or width == 0, worst), done
            if full:
                if worst > 0.5 * history and cap < 160:
                    cap = min(2 * cap, 160, space)
                    krylov.grow(cap)
                history = worst
                keep = k + (krylov.size - k) // 3
                krylov.restart(coords, values, keep)
                last_check = keep
        krylov.expand()
        done += width

LOG=[]
def lanczos(
    A: LinearMap,
    k: int,
    *,
    tol: float = 1e-5,
    max_matvecs: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
    block=None, block2=4, extra=None, base=None,
) -> Estimate:
    """Compute the k largest singular triplets of A by thick-restart Lanczos, verified and polished."""
    LOG.clear()
    extra = EXTRA if extra is None else extra
    budget = (max_matvecs or 2 * (200 + 100 * k)) // 2
    gram = Gram(A)
    k = min(k, gram.size)
    digest = fingerprint(A)
    def source(purpose): return generator(digest, seed, purpose)
    if not gram.prescale(gaussian(1, gram.size, source("scale"))):
        return zero(A, k, gram)
    if gram.size <= max(2 * k, 32):
        return finish(A, gram, torch.eye(gram.size), k, tol, tau=0.0, converged=True, note="")
    known = torch.empty(0, gram.size, dtype=gram.dtype, device=gram.device)
    values = torch.empty(0, dtype=torch.float64)
    block = block or (4 if isinstance(A, MatrixMap) else 1)
    ok = True
    for attempt in range(8):
        left = budget - gram.applications // 2 - 40 - k - extra
        b = block if attempt == 0 else max(block, min(k, block2))
        b0=base or max(2 * k + 6 * b, 48)
        found, done = iterate(gram, known, values.numpy(), k, extra, tol=tol, pairs=left, block=b, base=b0,
                        source=source(f"lanczos {attempt}"), task="lanczos", progress=progress)
        LOG.append(('main', done))
        ok = found.converged
        values, order = torch.sort(torch.cat([values, found.values]), descending=True)
        count = min(k + extra, len(values))
        values, known = values[:count], torch.cat([known, found.vectors])[order[:count]]
        known = torch.linalg.qr(known.double().T).Q.T.to(known.dtype)
        p0=gram.applications
        verdict = verify(gram, known, float(values[0]), float(values[k - 1]),
                         (source(f"verify {attempt}"), source(f"verify {attempt} again")),
                         pairs=max(40, min(200, budget - gram.applications // 2 - k - extra)), failure=FAILURE / 8)
        LOG.append(('verify', (gram.applications-p0)//2, verdict.tau/float(values[k-1])**.5, verdict.tau/float(values[0])**.5))
        if not verdict.above or not ok:
            break
    return finish(A, gram, known, k, tol, tau=verdict.tau, converged=ok and verdict.proven, note="")
