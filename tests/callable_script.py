"""A script whose rewards live in ``__main__``, as in a notebook; run by test_reward_callables.py, which reads its lines."""

import functools
import json
import os
import sys
import threading
from dataclasses import dataclass

sys.path[:0] = sys.argv[1:2]

from unift.rewards.identity import describe  # noqa: E402  (after the search path)
from unift.rewards.pool import Scorer  # noqa: E402
from unift.types import RewardError, Row, Score  # noqa: E402

ROW = Row("r", "2+2?", (), "4", "4", extra={"bonus": 0.25})
SCALE = 0.5
FILE, LOCK = open(os.devnull), threading.Lock()


@dataclass
class Settings:
    scale: float


def helper(text):
    return SCALE * float(text)


def plain(completion, row):
    return Score(helper(completion), note=str(os.getpid()))


def trl(completions, bonus, **columns):
    return [None if text == "none" else float(text) + bonus[0] for text in completions]


def verl(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(solution_str) * 2, "acc": solution_str == ground_truth}


def scaled(completion, row, scale=1.0):
    return float(completion) * scale


def made(scale):
    def inner(completion, row):
        return float(completion) * scale

    return inner


class Judge:
    def __init__(self, scale):
        self.settings = Settings(scale)

    def __call__(self, completion, row):
        return float(completion) * self.settings.scale

    def method(self, completion, row):
        return self(completion, row) + 1


class OnGpu:
    is_cuda = True


OnGpu.__module__ = "torch"
MODEL = [OnGpu()]

REWARDS = {
    "plain": plain,
    "trl": trl,
    "verl": verl,
    "partial": functools.partial(scaled, scale=3.0),
    "lambda": lambda completion, row: float(completion) * SCALE,
    "closure": made(4.0),
    "object": Judge(5.0),
    "method": Judge(6.0).method,
    "list": [(plain, 1.0), {"function": trl, "weight": 0.5}],
}
BAD = {
    "file": lambda completion, row: float(FILE.read()),
    "lock": functools.partial(scaled, scale=LOCK),
    "helper": lambda completion, row: unsendable(),
    "model": lambda completion, row: float(len(MODEL)),
    "large": functools.partial(scaled, scale=bytes(65 << 20)),
    "unknown": lambda text: 1.0,
}


def unsendable():
    with LOCK:
        return 1.0


print(json.dumps({name: describe(reward) for name, reward in REWARDS.items()}))
print(json.dumps([describe(made(4.5)), describe(functools.partial(scaled, scale=3.5)), describe(Judge(5.5))]))
values = {}
for name, reward in REWARDS.items():
    with Scorer(reward, workers=1) as scorer:
        one = scorer.score([ROW], ["4"])[0]
        values[name] = [one.value, one.right, dict(one.parts), one.note not in ("", str(os.getpid()))]
print(json.dumps(values))
errors = {}
for name, reward in BAD.items():
    try:
        Scorer(reward)
        errors[name] = "none"
    except RewardError as error:
        errors[name] = str(error)
print(json.dumps(errors))
