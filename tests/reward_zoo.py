"""Reward functions, well and badly behaved, which the workers of test_rewards.py import by name."""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
import threading
import time

from unift.types import Row, Score

HOARD: list[bytearray] = []


def score(completion: str, row: Row, hint: str = "") -> object:
    """Obeys the completion: "spin 3" hangs, "exit 3" dies, a number is itself."""
    order, _, argument = completion.partition(" ")
    if order == "raise":
        raise ValueError(f"cannot read {argument}")
    if order == "quit":
        sys.exit(argument)
    if order == "spin":
        while True:
            try:
                time.time()
            except BaseException:
                pass
    if order == "native":  # a loop in C that looks at no signal and keeps the interpreter's lock
        return sum(itertools.repeat(0))
    if order == "sleep":
        time.sleep(float(argument or 1000))
        return 0.5
    if order == "exit":
        os._exit(int(argument))
    if order == "segfault":
        ctypes.string_at(0)
    if order == "allocate":
        HOARD.append(bytearray(int(argument) << 20))
        return 0.25
    if order == "spawn":  # leaves a child behind, writes its pid, then hangs
        pid = os.fork()
        if pid == 0:
            time.sleep(1000)
        with open(argument, "w") as file:
            file.write(str(pid))
        time.sleep(1000)
    if order == "later":  # dies when idle
        threading.Timer(0.05, os._exit, [3]).start()
        return 1.0
    if order == "pid":
        return float(os.getpid())
    if order == "modules":
        heavy = [name for name in ("torch", "transformers", "pydantic", "datasets") if name in sys.modules]
        return Score(float(len(heavy)), note=" ".join(heavy))
    if order == "main":
        return Score(1.0, note=str(getattr(sys.modules["__main__"], "__file__", None)))
    if order == "print":
        print("x" * 100_000)
        return 1.0
    if order == "hint":
        return Score(1.0, correct=True, parts={"length": len(hint)}, note=hint)
    values = {"nan": float("nan"), "inf": float("inf"), "none": None, "text": "1.0", "list": [1.0], "": 0.0}
    values |= {"parts": Score(1.0, parts={"x": float("nan")}), "complex": 1j, "bool": True, "right": 1.0}
    return values[completion] if completion in values else float(completion)


def trl(prompts, completions, answer, **columns):
    assert len(prompts) == len(completions) == len(answer) == 1
    text = completions[0] if isinstance(completions[0], str) else completions[0][0]["content"]
    if text == "wrong length":
        return [1.0, 2.0]
    if text == "skip":
        return [None]
    if text == "no list":
        return 1.0
    return [float(text == answer[0])]


def trl_wants_column(completions, colour):
    return [1.0 if colour == ["red"] else 0.0 for _ in completions]


async def trl_async(completions, **kwargs):
    return [float(len(completions[0]))]


def trl_ids(completions, completion_ids):
    return [1.0]


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    if data_source == "dict":
        right = solution_str == ground_truth
        return {"score": 1.0 if right else -1.0, "acc": right, "pred": solution_str, "index": extra_info["index"]}
    if data_source == "empty dict":
        return {"acc": True}
    return float(solution_str == ground_truth)


def unknown(text, truth):
    return 1.0


def needs_more(completion, row, model):
    return 1.0


def always_raises(completion, row):
    raise KeyError("gold")


def always_one(completion, row):
    return 1.0


def never_full(completion, row):
    return 0.5 if completion else 0.0


NOT_A_FUNCTION = 3
