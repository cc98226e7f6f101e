"""The estimate of a step's time, by hand: one layer of width 2, and assumptions that are round numbers."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from unift.commands.doctor import throughput
from unift.commands.doctor.throughput import Batch, Machine, best_share, step

# Layer: q, k, v, o of 2 x 2, three of 2 x 3, two norms of 2: 38 numbers; head of 5 x 2, tied.
SHAPES = {"hidden_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 3, "vocab_size": 5,
          "tie_word_embeddings": True}  # fmt: skip
LAYERS, HEAD = 38, 10
BATCH = Batch(prompts=8, group=2, updates=2, prefix=4, completion=6, longest=10)
MACHINE = Machine(
    operations=1000, bandwidth=100, train_share=0.5, prefill_share=0.4, decode_share=0.5, round_seconds=0.25,
    running=8, link_near=10, link_far=5, disk=4, other_seconds=3,
)  # fmt: skip


def test_parameters():
    assert throughput.weights(SHAPES) == (LAYERS, HEAD)
    untied = SHAPES | {"tie_word_embeddings": False}
    assert throughput.weights(untied) == (LAYERS, HEAD) and throughput.numbers(untied) == LAYERS + 2 * HEAD


def test_operations_of_a_group():
    """4 + 2 x 6 tokens through the layer, the head at 12, attention over 8 + 2 (24 + 18) pairs at 4 operations a number of
    the queries; six passes: forward, backward (2), once more for checkpoints, reference, log-probs before the updates."""
    forward = 2 * LAYERS * 16 + 2 * HEAD * 12 + 4 * 2 * (8 + 2 * (24 + 18))
    assert throughput.group_operations(SHAPES, BATCH) == 6 * forward
    plain = Batch(8, 2, 1, 4, 6, 10, reference=False, checkpointing=False)
    assert throughput.group_operations(SHAPES, plain) == 3 * forward


def test_a_step_of_one_gpu():
    """16 completions, 8 side by side: 12 rounds and 4 of the longest; a round reads 2 x 48 bytes of weights and 8 x (4 + 3)
    tokens of 2 x 2 x 2 bytes, at 50 a second, which takes longer than its operations at 400."""
    got = step(SHAPES, BATCH, MACHINE, 1, 0)
    a_round = (96 + 8 * 7 * 8) / 50 + 0.25
    assert a_round > 2 * 48 * 8 / 400
    assert got.sampling == pytest.approx(16 * a_round + 8 * 2 * LAYERS * 4 / 400)
    assert got.training == pytest.approx(8 * throughput.group_operations(SHAPES, BATCH) / 500)
    assert (got.sync, got.other, got.sampled) == (0, 3, 96)
    assert got.tokens_per_second == pytest.approx(96 / (got.sampling + got.training + 3))


def test_a_step_of_several_gpus():
    """4 prompts an update on 3 of 5: two groups on the busiest; gradients of 48 x 4 bytes, two updates, around a ring of 3.
    2 sample 4 groups each; 48 weights of 2 bytes are written and read at 4 a second."""
    got = step(SHAPES, BATCH, MACHINE, 5, 2)
    work = 2 * 2 * throughput.group_operations(SHAPES, BATCH) / 500
    assert got.training == pytest.approx(work + 2 * 2 * (2 / 3) * 192 / 10)
    assert got.sampling == pytest.approx((6 + 4) * ((96 + 8 * 7 * 8) / 50 + 0.25) + 4 * 2 * LAYERS * 4 / 400)
    assert got.sync == 2 * 96 / 4
    far = step(SHAPES, BATCH, MACHINE, 11, 2)
    assert far.training == pytest.approx(work / 2 + 2 * 2 * (8 / 9) * 192 / 5), (
        "more than 8 train: one group each, a slower link"
    )


def test_rounds_that_are_bound_by_their_products():
    fast = Machine(**{**vars(MACHINE), "bandwidth": 1e9})
    assert step(SHAPES, BATCH, fast, 1, 0).sampling == pytest.approx(
        16 * (2 * 48 * 8 / 400 + 0.25) + 8 * 2 * LAYERS * 4 / 400
    )


def test_the_best_share_is_the_shortest_step():
    shares = [step(SHAPES, BATCH, MACHINE, 8, n).seconds for n in range(1, 8)]
    assert best_share(SHAPES, BATCH, MACHINE, 8) == 1 + shares.index(min(shares))
    assert best_share(SHAPES, BATCH, MACHINE, 1) == 0


def test_ends_of_the_range_hold_the_middle():
    for low, middle, high in zip(*(vars(m).items() for m in (throughput.LOW, Machine(), throughput.HIGH))):
        a, b, c = low[1], middle[1], high[1]
        assert a <= b <= c or a >= b >= c, low[0]


def test_the_tool_takes_assumptions(monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    tool = importlib.import_module("estimate")
    tool.main([])
    first = capsys.readouterr().out
    assert first.split("\n\n", 1)[1].strip() == throughput.table()
    tool.main(["--completion", "1024", "--disk", "5e9", "--no-reference"])
    assert capsys.readouterr().out != first
    tool.main(["--shares"])
    assert "Qwen/Qwen2.5-3B: " in capsys.readouterr().out
