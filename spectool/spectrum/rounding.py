"""How wrong one application of an operator can be, and what that makes of singular values.

Three kinds of operators:

* One stored operator (a matrix, a convolution): its own norm bounds the rounding, ``rounding_unit``.
* A composition of those: its factors' sizes do, which can be far larger than its norm (``linear.magnitude``).
* A function, whose arithmetic cannot be seen: its rounding is measured. A(3x) and 3·A(x) are equal but for rounding,
  so their difference is a sample of it. A function that loses a part altogether (1e20·x + x − 1e20·x) shows nothing:
  such an operator is analysed as it computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from spectool.linear import factors, is_single, magnitude
from spectool.spectrum.gram import wide

if TYPE_CHECKING:
    from spectool.spectrum.gram import Gram
    from spectool.spectrum.starts import Stream

COARSE = 1e-3
"""Noise, ‖f·M‖ being about 1, from which float32 wants a sharper bound on it."""

LOUD = 1e-2
"""Noise from which the whole run is done in float64."""

PROBES = 4
"""Samples of the rounding of a function, forwards and backwards each."""

SAFETY = 64.0
"""Factor on the largest sample. Where all rounding falls into one single entry (few functions are like that), it is
too small with probability (0.8/64)⁴ ≈ 2e-8; with three entries or more it is with less than 1e-17."""

USUAL = 2.0
"""Factor on the largest sample for what to expect, where nothing is promised."""


def rounding_unit(gram: Gram) -> float:
    """Return the relative rounding error of one application of M, in units of ‖M‖, M one stored operator.

    An entry of M·x is summed term by term. After t terms the partial sums are those of M·x_t, x_t the first t entries
    of x: ‖M·x_t‖ ≤ ‖M‖. Every addition rounds its partial sum by at most u (the unit roundoff of the type the map
    really computes in), every product by u times itself. For errors of mean zero the squares add up: over L = max(m,
    n) terms to u²·L·‖M‖². The whole is below λ·u·sqrt(L)·‖M‖ with probability ≥ 1 − 2·exp(−λ²/2); λ = 8 makes the
    failure probability 3e-14. Fused or blocked sums only do better.

    **Source:** N. J. Higham and T. Mary, "A new approach to probabilistic rounding error analysis", SIAM J. Sci.
    Comput. 41 (2019), theorem 2.4.
    """
    length = max(math.prod(gram.map.in_shape), math.prod(gram.map.out_shape))
    return 4.0 * torch.finfo(gram.dtype).eps * math.sqrt(length)


def application_error(gram: Gram, norm: float) -> float:
    """Return a bound on the error of f·M·x or f·Mᵀ·x for a unit vector x, ``norm`` being ‖f·M‖."""
    return rounding_unit(gram) * norm + noise(gram)


def noise(gram: Gram) -> float:
    """Return what ``rounding_unit`` leaves out: 0 for one stored operator, in units of f·M for any other.

    For a composition 8·u·Σ√length·‖|A₁||A₂|…‖: stage by stage the error of an entry is at most
    8·u·sqrt(length)·(|A_i|…|x|), as above with λ = 8, and the stages before it (applied later) enlarge it by at most
    their magnitudes. For a function ``SAFETY`` times the largest of a few samples, which cost 16 matvecs, once.
    """
    if gram.noise is None:
        gram.noise = _noise(gram)
    return gram.noise


def begin(gram: Gram, source: Stream) -> bool:
    """Scale the operator (``Gram.prescale``), and go over to float64 where float32 would drown it in rounding.

    Returns:
        False if a random vector is mapped to zero.
    """
    if not gram.prescale(source):
        return False
    if gram.dtype == torch.float32 and noise(gram) > LOUD:
        gram.widen()
    return True


def reserve(gram: Gram) -> int:
    """Return the pairs that measuring a function's rounding still takes, in ``noise`` and in the polish."""
    if not is_hidden(gram):
        return 0
    ahead = {id(one) for one in (gram, gram.double()) if one.noise is None}
    return PROBES + 2 * PROBES * len(ahead)


def is_hidden(gram: Gram) -> bool:
    """Return whether the operator's arithmetic cannot be seen."""
    return not is_single(gram.map) and magnitude(gram.map) is None


def _noise(gram: Gram) -> float:
    if is_single(gram.map):
        return 0.0
    size = magnitude(gram.map)
    if size is not None:
        unit = 4.0 * torch.finfo(gram.dtype).eps * gram.factor
        bound = unit * size.roots * size.norm()
        # In float64 that is far below what matters; in float32 it may be worth a better bound.
        return min(bound, unit * _parts(gram)) if gram.dtype == torch.float32 and bound > COARSE else bound
    return SAFETY * max(
        _sample(gram, gram.forward, gram.map.in_shape), _sample(gram, gram.backward, gram.map.out_shape)
    )


def _parts(gram: Gram) -> float:
    """Return Σ_i √L_i·Π_j ν_j, ν_j a bound on the norm of the j-th map of a composition; inf if it is none.

    The errors of one stage are independent, so that what follows enlarges them by its norm, not its magnitude. A
    bound costs 24 applications of a part; all of them together as much as 24 of the composition.
    """
    from spectool.spectrum.probabilistic import upper  # which needs this module

    factor, parts = factors(gram.map)
    norms, spent = [factor], 0
    for index, part in enumerate(parts):
        # The rounding of the bound itself is small: each part is one stored operator.
        bound, spent = upper(part, max_matvecs=24, seed=index)
        norms.append(bound)
    gram.spend(spent)
    lengths = [max(math.prod(part.in_shape), math.prod(part.out_shape)) for part in parts]
    return sum(math.sqrt(length) for length in lengths) * math.prod(norms)


def _sample(gram: Gram, apply: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...]) -> float:
    """Return the largest ‖A(3x) − 3A(x)‖/(3√2) over random unit vectors: the errors of both are alike."""
    x = wide(gram.draw(PROBES, math.prod(shape)))
    x = gram.take(x / torch.linalg.vector_norm(x, dim=1, keepdim=True))
    image = wide(apply(torch.cat([x, 3.0 * x])))
    difference = torch.linalg.vector_norm(image[PROBES:] - 3.0 * image[:PROBES], dim=1)
    return float(difference.max()) / (3.0 * math.sqrt(2.0))


def sample_span(
    gram: Gram,
    rows: torch.Tensor,
    image: torch.Tensor,
    apply: Callable[[torch.Tensor], torch.Tensor],
) -> float:
    """Return the largest ‖A(cᵀX) − cᵀA(X)‖ over normal c: about ‖E‖_F, E the errors in ``image`` = A(X).

    Costs ``PROBES`` matvecs.

    Args:
        gram: The operator.
        rows: X ``(p, size)``.
        image: A(X) as it was computed.
        apply: A.
    """
    mix = wide(gram.draw(PROBES, len(rows)))
    difference = wide(apply(gram.take(mix @ rows))) - mix @ image
    return float(torch.linalg.vector_norm(difference, dim=1).max())
