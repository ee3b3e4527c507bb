"""What spectool says about every sample file against the dense truth in ``expected.json``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import spectool
from spectool import Report

SAMPLES = Path(__file__).parents[1] / "sample_models"
EXPECTED = json.loads((SAMPLES / "expected.json").read_text())


def answers(name: str) -> dict[tuple[str, str], dict[str, Any]]:
    rows = EXPECTED["answers"][EXPECTED["files"][name]["answers"]]
    prefix = EXPECTED["files"][name]["prefix"]
    keyed = {}
    for row in rows:
        layer = " + ".join(prefix + key for key in row["layer"].split(" + "))
        keyed[layer, row["level"]] = {**row, "matrices": [prefix + key for key in row["matrices"]]}
    return keyed


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: two of them waiting for a busy core took 111 s where one took 8 s."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def inspected(name: str) -> Report:
    return spectool.inspect(SAMPLES / name, k=8, **EXPECTED["files"][name]["options"])


@pytest.mark.parametrize("name", list(EXPECTED["files"]))
def test_inspect_finds_exactly_the_operators_that_are_there(name: str) -> None:
    # Pools and paddings may have rows of their own; everything with a tensor must be in the answers.
    found = {(row.layer, row.level) for row in inspected(name).rows if row.weights}
    assert found == set(answers(name))


@pytest.mark.parametrize("name", list(EXPECTED["files"]))
def test_inspect_says_what_the_operators_are(name: str) -> None:
    for row in inspected(name).rows:
        wanted = answers(name).get((row.layer, row.level))
        if wanted is None:
            continue
        assert row.status == "ok", row
        assert row.converged, row
        assert row.kind == wanted["kind"] or not wanted["kind"], row
        assert set(wanted["matrices"]) <= set(row.weights), row
        for shape, key in ((row.input_shape, "input_shape"), (row.output_shape, "output_shape")):
            assert shape == (None if wanted[key] is None else tuple(wanted[key])), row


@pytest.mark.parametrize("name", list(EXPECTED["files"]))
def test_inspect_encloses_the_truth(name: str) -> None:
    compared = 0
    for row in inspected(name).rows:
        wanted = answers(name).get((row.layer, row.level))
        if wanted is None:
            continue
        truth = np.array(wanted["sigma"])
        slack = 1e-12 * truth[0]  # LAPACK's own error
        np.testing.assert_allclose(row.sigma, truth, rtol=0, atol=1e-6 * truth[0], err_msg=row.layer)
        assert np.all(np.array(row.sigma_lower) <= truth + slack), row
        assert row.upper is not None, row
        for upper, value in zip(row.sigma_upper, truth, strict=True):
            assert upper is None or upper >= value - slack, row
        if wanted["fro"] is None:
            assert row.fro is None, row
        elif row.fro is not None:
            assert row.fro == pytest.approx(wanted["fro"], rel=1e-6), row
        compared += 1
    assert compared == len(answers(name))
