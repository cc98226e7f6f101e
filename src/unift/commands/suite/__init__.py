"""``unift eval MODEL --suite uft``: the paper's columns for any model, greedy and pass@k, from local files.

Rows are answered in blocks; a block's records are on disk before the next begins, so a killed evaluation goes on where it
was, with any number of processes. Under torchrun or accelerate launch each process answers its share of a block.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unift import processes
from unift.commands.suite import records
from unift.commands.suite.columns import Problems, key, read_problems
from unift.commands.suite.export import check_kinds, export
from unift.commands.suite.table import measured, text_of
from unift.config.sections import Config
from unift.files import write_atomic
from unift.types import DataError, Row

if TYPE_CHECKING:
    from unift.rewards.pool import Scorer
    from unift.rows.tokens import Encoded
    from unift.sampling.engines.base import Engine

TOKENS = 1024  # of an answer, as in the paper, where no setting says otherwise and the model has the positions
BLOCK = 256  # answers of a block and process: as many as are sampled side by side
Say = Callable[[str], None]


@dataclass(frozen=True)
class Order:
    """What is asked for. ``places``: files and folders of rows; ``samples`` a row for pass@k, 0 for greedy alone."""

    suite: str
    places: Sequence[str | Path]
    folder: Path
    samples: int = 0
    rows: int | None = None  # the first so many of each column
    exports: Sequence[str] = ()  # "lm-eval", "inspect": see `export`


def evaluate_suite(config: Config, order: Order, say: Say = lambda text: None) -> dict[str, Any]:
    """Answer and judge all rows that are not yet judged; the result, also in ``result.json`` and ``table.md``.

    ``config``: model, seed, reward.rule and lengths (`answer_tokens`); every column is judged by its built-in verifier.
    Raises DataError before the model is loaded for rows that are missing or do not fit.
    """
    from unift.model.limits import use_threads
    from unift.model.load import load_policy, load_tokenizer, pick_device
    from unift.sampling.engines.choose import open_engine
    from unift.training.run import claim, write_result
    from unift.training.run.checkpoint import fingerprint

    check_kinds(order.exports)
    problems = read_problems(order.suite, order.places, order.rows)
    use_threads(config.threads)
    with processes.joined(pick_device(config.model.device).type == "cuda"), claim(order.folder):
        encoded = _encoded(load_tokenizer(config.model), problems)
        prompt = max(len(e.prompt) for column in encoded.values() for e in column)
        most = answer_tokens(config, prompt)
        policy = load_policy(config.model, None, prompt + most)
        weights = fingerprint(policy)
        settings = _settings(config, order, most) | {"weights": weights}
        processes.lead("the folder of the suite", lambda: records.open_folder(order.folder, settings))
        began, done = time.perf_counter(), {}
        with open_engine(config.engine, policy, order.folder, prompt + most) as engine:
            engine.sync(policy, lambda: weights)
            answers = _Answerer(engine, policy.tokenizer, order.samples, config.seed, most)
            for name, rows in problems.columns.items():
                work = _Column(name, problems.titles[name], rows, encoded[name])
                done[name] = _judged(answers, config, order, work, say)
        seconds = time.perf_counter() - began
        result = measured(problems, done, order.samples, config.seed) | {"settings": settings, "seconds": seconds}
        result |= {"model": config.model.path, "method": config.method, "seed": config.seed}
        for kind in order.exports:
            processes.lead(
                f"the export for {kind}", lambda kind=kind: export(kind, order.folder, problems, done, result)
            )

        def write() -> None:
            write_atomic(order.folder / "table.md", text_of(result) + "\n")
            write_result(order.folder, result)

        processes.lead("the result of the suite", write)
    return result


def answer_tokens(config: Config, prompt: int) -> int:
    """Length limit of an answer: eval.max_tokens, or else 1,024 and what the model's positions leave beyond the longest
    prompt. DataError where a prompt and its answer do not fit."""
    from unift.model.limits import positions, text_settings

    there = positions(text_settings(config.model.path))
    wanted = config.eval.max_tokens or min(TOKENS, (there or prompt + TOKENS) - prompt)
    if there is not None and (wanted < 1 or prompt + wanted > there):
        raise DataError(
            f"the longest prompt ({prompt} tokens) and an answer ({max(wanted, 1)}) take more than the {there} positions "
            f"of the model. Lower eval.max_tokens to {max(there - prompt, 0)} or less, or take the row out"
        )
    return wanted


def _settings(config: Config, order: Order, most: int) -> dict[str, Any]:
    """What decides the numbers, beside rows and weights."""
    return {
        "suite": order.suite,
        "dtype": config.model.dtype,
        "autocast": config.model.autocast,
        "samples": order.samples,
        "seed": config.seed,
        "max_tokens": most,
        "rule": config.reward.rule,
        "answer": config.reward.answer,
    }


def _encoded(tokenizer: Any, problems: Problems) -> dict[str, list[Encoded]]:
    """Prompts alone: solutions are not read. What is too long for the model is said by `answer_tokens`."""
    from unift.rows.tokens import encode_rows

    return {
        name: encode_rows(
            tokenizer, [replace(r, steps=(), ending="") for r in rows], sys.maxsize, source=problems.titles[name]
        )
        for name, rows in problems.columns.items()
    }


@dataclass(frozen=True)
class _Answerer:
    """Who answers: greedily, and ``samples`` times by draws of ``seed``, in at most ``most`` tokens."""

    engine: Engine
    tokenizer: Any
    samples: int
    seed: int
    most: int


@dataclass(frozen=True)
class _Column:
    name: str
    title: str
    rows: Sequence[Row]
    encoded: Sequence[Encoded]


def _judged(answers: _Answerer, config: Config, order: Order, column: _Column, say: Say) -> list[Mapping[str, Any]]:
    """Records of all rows of a column, in their order: those on disk, and new ones."""
    from unift.rewards import open_scorer

    known = processes.lead("records so far", lambda: records.read(order.folder, column.name))
    todo = [i for i, row in enumerate(column.rows) if key(row) not in known]
    before = f", {len(column.rows) - len(todo)} judged before" if len(todo) < len(column.rows) else ""
    say(f"{column.title}: {len(column.rows)} rows{before}")
    if todo:
        reward = config.reward.model_copy(update={"function": "auto"})
        block = max(BLOCK // (1 + order.samples), 8) * processes.size()
        with open_scorer(reward, column.rows) as scorer:
            for first in range(0, len(todo), block):
                new = _answered(answers, scorer, column, todo[first : first + block])
                processes.lead("records", lambda new=new: records.append(order.folder, column.name, new))
                known |= {record["key"]: record for record in new}
                say(f"{column.title}: {len(column.rows) - len(todo) + min(first + block, len(todo))} rows judged")
    return [known[key(row)] for row in column.rows]


def _answered(answers: _Answerer, scorer: Scorer, column: _Column, block: Sequence[int]) -> list[dict[str, Any]]:
    """Records of these rows, in their order: each process answers its share, all get the whole."""
    from unift.sampling.engines.base import Request
    from unift.sampling.groups import completed
    from unift.training.evaluate import Answers, draws_of

    own = [block[i] for i in processes.share(len(block))]
    rows, prompts = [column.rows[i] for i in own], [(column.encoded[i].prompt, column.encoded[i].shown) for i in own]
    ask = partial(completed, answers.engine, answers.tokenizer)
    groups = ask([Request(prompt, None, shown) for prompt, shown in prompts], answers.most)
    if answers.samples:
        wanted = Answers(answers.samples, answers.seed)
        drawn = [
            Request(prompt, draws_of(row, wanted, answers.most), shown)
            for row, (prompt, shown) in zip(rows, prompts, strict=True)
        ]
        groups = [g + more for g, more in zip(groups, ask(drawn, answers.most, wanted.temperature), strict=True)]
    flat = [(row, sample) for row, group in zip(rows, groups, strict=True) for sample in group]
    outcomes = iter(scorer.score([row for row, _ in flat], [sample.text for _, sample in flat]))
    found: list[dict[str, Any]] = []
    for row, group in zip(rows, groups, strict=True):
        first, *rest = [records.answer(sample, next(outcomes)) for sample in group]
        found.append({"key": key(row), "id": row.id, "greedy": first, "samples": rest})
    return processes.interleave(processes.gather("a block of the suite", found))


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result of an evaluated suite, None where it is not finished."""
    path = folder / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
