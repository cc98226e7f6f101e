"""Draws are functions of their address, and of nothing else."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from unift import rng

ADDRESSES = [("hint", 0, 3, "row-7"), ("rows", 1, 0), ("sample", 2**40, 5, "ü\n", 1)]


def test_same_address_same_numbers_in_any_order():
    first = [rng.uniforms(*a, shape=5) for a in ADDRESSES]
    again = [rng.uniforms(*a, shape=5) for a in reversed(ADDRESSES)][::-1]
    assert all(np.array_equal(x, y) for x, y in zip(first, again, strict=True))
    assert np.array_equal(rng.uniforms(*ADDRESSES[0], shape=3), first[0][:3])


def test_same_numbers_in_another_process():
    """Hash randomisation and start-up state of the interpreter do not matter."""
    code = f"import json; from unift import rng; print(json.dumps([rng.uniforms(*a, shape=3).tolist() for a in {ADDRESSES!r}]))"
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONUTF8": "1"}
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        assert json.loads(out.stdout) == [rng.uniforms(*a, shape=3).tolist() for a in ADDRESSES]


def test_global_generators_are_neither_read_nor_moved():
    np.random.seed(0)
    random.seed(0)
    expected = rng.uniforms("hint", 0, 0, "r", shape=4)
    states = np.random.get_state()[1].copy(), random.getstate()
    np.random.rand(3)
    assert np.array_equal(rng.uniforms("hint", 0, 0, "r", shape=4), expected)
    np.random.seed(0)
    rng.generator("hint", 0, 0, "r").permutation(9)
    assert np.array_equal(np.random.get_state()[1], states[0]) and random.getstate() == states[1]


def test_parts_are_told_apart():
    different = [
        ("a", 1), ("a", "1"), ("a", 1.0), ("a", True), (1, "a"), ("a1",), ("a", 1, ""), ("a", "", 1), ("a",), (),
        ("a", -1), ("a", None), ("a\x1fint:1",), ("a\x1f", 1), ("a", "\x1f", 1), ("a\x1f\x1fint:1",),
    ]  # fmt: skip
    assert len({rng.key(*a) for a in different}) == len(different)


part = st.one_of(
    st.lists(st.sampled_from(["a", "\x1f", "str:", "int:", "1"]), max_size=5).map("".join),
    st.integers(-3, 3),
    st.booleans(),
    st.none(),
)


@given(st.lists(part, max_size=4), st.lists(part, max_size=4))
def test_keys_are_equal_only_for_equal_addresses(a, b):
    """Row ids are a user's text: whatever they hold, two addresses never share a stream."""
    same = [(type(x), x) for x in a] == [(type(x), x) for x in b]
    assert (rng.key(*a) == rng.key(*b)) == same


def test_uniforms_are_uniform_across_addresses():
    """First numbers of neighbouring addresses: Kolmogorov-Smirnov, range, and no correlation with the neighbour."""
    from scipy.stats import kstest

    n = 20_000
    u = np.array([rng.uniforms("hint", 0, i // 100, f"row{i % 100}", shape=1)[0] for i in range(n)])
    assert u.dtype == np.float64 and 0 <= u.min() and u.max() < 1
    assert kstest(u, "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 4 / np.sqrt(n)
    assert rng.uniforms("x", shape=(3, 4)).shape == (3, 4)
