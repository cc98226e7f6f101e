"""The stored curves of tests/curves: what a change that should not move numbers must leave alone (CONTRIBUTING.md).

What is asserted holds on any CPU. Kernels round differently by 1e-7, and AdamW's first update, the sign of each
gradient, makes more of it: with torch's AVX-512 kernels and with its plain ones (ATEN_CPU_CAPABILITY=default) the first
step differs by less than 1e-5 and all twelve by 4e-4. So the first step is held to 1e-4 and later ones to 1e-3. A sampled
token changes when its uniform number falls within that difference of a boundary: hardly in one step's 200 tokens, but
some time later, and then rewards jump. So tokens are compared in the first step, the curves of sampling methods over
three, and sft, which samples nothing, over all twelve. ``python tools/curves.py check`` compares everything, bit for bit.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("curves", ROOT / "tools" / "curves.py")
assert spec is not None and spec.loader is not None
curves = importlib.util.module_from_spec(spec)
spec.loader.exec_module(curves)


@pytest.mark.parametrize("method", curves.METHODS)
def test_stored_curves(method):
    stored = json.loads((ROOT / "tests" / "curves" / f"{method}.json").read_text())
    new = curves.record(method)
    assert len(stored["steps"]) == len(new["steps"]) == curves.STEPS
    assert new["tokens"] == stored["tokens"]
    compared = curves.STEPS if method == "sft" else 3
    for number, (a, b) in enumerate(zip(stored["steps"][:compared], new["steps"], strict=False), start=1):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert b[key] == pytest.approx(value, rel=1e-4 if number == 1 else 1e-3, abs=1e-6), f"step {number}, {key}"


def test_stored_curves_hold_something():
    """Rewards that vary, gradients that are not zero, tokens of every group: an empty curve would guard nothing."""
    for method in curves.METHODS:
        stored = json.loads((ROOT / "tests" / "curves" / f"{method}.json").read_text())
        steps = stored["steps"]
        assert all(s["grad/norm"] > 1e-3 for s in steps) and len({s["loss"] for s in steps}) == curves.STEPS
        assert [len(group) for group in stored["tokens"]] == ([] if method == "sft" else [4] * 4)
        if method != "sft":
            assert len({s["reward"] for s in steps}) > 3


def test_a_moved_number_is_found():
    stored = json.loads((ROOT / "tests" / "curves" / "uft.json").read_text())
    assert curves.compare(stored, stored) == []
    moved = json.loads(json.dumps(stored))
    moved["steps"][4]["loss"] *= 1 + 2**-52
    moved["tokens"][2][1][0] += 1
    assert [(s, k) for s, k, _ in curves.compare(stored, moved)] == [(1, "tokens"), (5, "loss")]
