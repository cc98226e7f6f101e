"""The embedded base of Countdown: small, the script's own tokenizer and texts, and it knows what its page says and no more."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from conftest import script

from unift import rng
from unift.config.resolve import resolve
from unift.config.sections import Model
from unift.model.load import load_policy, load_tokenizer, locate
from unift.rows.tasks import get_task, make_rows
from unift.sampling.engines.base import Request
from unift.sampling.engines.choose import in_process
from unift.sampling.groups import completed
from unift.types import Row

score = get_task("countdown").score


@pytest.fixture(scope="module")
def tool():
    return script(Path(__file__).parents[2] / "tools" / "make_countdown_base.py")


@pytest.fixture(scope="module")
def base():
    model = Model(path="embedded:countdown", device="cpu")
    return load_policy(model, load_tokenizer(model))


def rows_of(n):
    return make_rows("countdown", n, 0, "test", **resolve("uft", recipe="countdown").data.options)


def sampled(base, rows, completions, limit=28):
    """Texts at temperature 1, ``completions`` a row."""
    ids = base.tokenizer([row.prompt for row in rows])["input_ids"]
    requests = [
        Request(p, rng.uniforms("base", 0, row.id, shape=(completions, limit)))
        for p, row in zip(ids, rows, strict=True)
    ]
    return [[s.text for s in group] for group in completed(in_process(base), base.tokenizer, requests, limit)]


def test_size_and_tokenizer(base, tool):
    folder = locate("embedded:countdown")
    assert sum(f.stat().st_size for f in folder.iterdir()) < 1_000_000
    for row in rows_of(50):
        text = row.prompt + "".join(row.steps) + row.ending
        ids = base.tokenizer(text)["input_ids"]
        assert base.tokenizer.decode(ids) == text and base.tokenizer.unk_token_id not in ids
        assert ids == tool.pairs_of_digits()(text)["input_ids"]
        assert (
            len(ids) - len(base.tokenizer(row.prompt)["input_ids"])
            < resolve("uft", recipe="countdown").sample.max_tokens
        )


def test_texts_of_the_script(tool):
    """All steps are true and agree with the answer; only the two-number problems are solved."""
    draws = random.Random(1)
    for _ in range(500):
        prompt, solution = tool.base_text(draws)
        *steps, answer = solution.split("\n")
        for a, sign, b, result in (re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", step).groups() for step in steps):
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": int(a) / int(b)}[
                sign
            ] == int(result)
        given, _, target = prompt.rstrip(":").partition(" = ")
        numbers, value = [int(n) for n in given.split()], int(steps[-1].partition("=")[2])
        row = Row(id="", prompt=prompt, steps=(), ending="", answer={"numbers": numbers, "target": target or value})
        found = score(answer, row)
        if len(numbers) == 2 or not target:
            assert found.right, (prompt, solution)
        assert len(steps) == len(numbers) - 1


def test_knows_two_numbers_and_not_three(base, tool):
    """Greedy, it solves problems of two numbers. Of three it writes readable answers that are right by luck, about 2.5e-5."""
    draws = random.Random(2)
    texts = [
        text for text in (tool.base_text(draws) for _ in range(500)) if " = " in text[0] and text[0].count(" ") == 3
    ]
    rows = []
    for prompt, solution in texts:
        a, b, _, target = prompt.rstrip(":").split()
        answer = {"numbers": [int(a), int(b)], "target": int(target)}
        rows.append(Row(id=prompt, prompt=prompt, steps=(), ending=solution, answer=answer))
    ids = base.tokenizer([row.prompt for row in rows])["input_ids"]
    groups = completed(in_process(base), base.tokenizer, [Request(p, None) for p in ids], 28)
    right = sum(score(g[0].text, row).right for g, row in zip(groups, rows, strict=True))
    assert right >= 0.9 * len(rows)

    rows = rows_of(32)
    verdicts = [score(text, row) for row, texts in zip(rows, sampled(base, rows, 64), strict=True) for text in texts]
    assert sum(v.right for v in verdicts) <= 2
    assert sum(v.parts["format"] for v in verdicts) >= 0.9 * len(verdicts)
