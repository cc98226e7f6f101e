"""The groups of a step: which prompt, which hint, which completions. Every draw is addressed (see ``rng``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from unift import evaluate, hints, needs, rng
from unift.config import Config, Phase
from unift.encode import Encoded
from unift.engines.native import Request
from unift.memory import Memory
from unift.policy import Policy
from unift.rewards import Scorer, score_groups
from unift.types import Group, Row, Score

Settings = Config | Phase


def begin(
    indices: Sequence[int], rows: Sequence[Row], encoded: Sequence[Encoded], settings: Settings, memory: Memory,
    seed: int, step: int, phase: tuple[int, int],
) -> list[Group]:  # fmt: skip
    """Groups with their prompts and hints, without completions. ``phase``: its first step, its number of steps."""
    show, (start, total), groups = settings.show, phase, []
    for index in indices:
        row, e = rows[index], encoded[index]
        at, known = hints.At(seed, step - start, total, row.id), memory.hints.get(row.id)
        if show.unit == "tokens":
            most = e.steps_tokens
            k = math.floor(hints.share(show, at, known) * most + 1e-9)
            groups.append(Group(index, row.id, e.prompt, e.solution[:k], k, most))
        else:
            k = hints.draw(show, at, e.n_steps, known)
            groups.append(Group(index, row.id, e.prompt, e.hint(k, show.cuts), k, min(show.cuts, e.n_steps)))
    return groups


def complete(
    policy: Policy,
    groups: Sequence[Group],
    places: Sequence[int],
    settings: Settings,
    seed: int,
    step: int,
    attempt: int = 0,
) -> None:
    """Sample the completions of these groups. Where only some members see the hint, it becomes a part of those.

    places: each group's position in the batch of all processes. It is part of the address of its random numbers, since a
    small data set may bring a row twice in one step.
    """
    sample, members = settings.sample, settings.show.members
    shape = (sample.completions, sample.max_tokens)
    requests: list[list[Request]] = [[], []]  # sampled to the end; only the first tokens
    owners: list[list[tuple[Group, list[int]]]] = [[], []]
    for i, group in zip(places, groups, strict=True):
        place = (
            ("sample", seed, step, i, group.row_id) if not attempt else ("sample", seed, step, i, group.row_id, attempt)
        )
        uniforms = rng.uniforms(*place, shape=shape)
        short = (
            sample.first is not None
            and float(rng.uniforms("full", seed, step, group.row_id, shape=1)[0]) >= sample.full
        )
        if members is None:
            requests[short].append(Request(group.prompt + group.hint, uniforms))
            owners[short].append((group, []))
            continue
        bare, hint = sample.completions - members, group.hint
        group.hint = []
        for part, given in ((uniforms[:bare], []), (uniforms[bare:], hint)):
            if len(part):
                requests[short].append(Request(group.prompt + given, part))
                owners[short].append((group, given))
    for short, length in ((0, sample.max_tokens), (1, min(sample.first or sample.max_tokens, sample.max_tokens))):
        if not requests[short]:
            continue
        sampled = evaluate.complete(policy, requests[short], length, sample.temperature)
        for (group, given), samples in zip(owners[short], sampled, strict=True):
            if given:
                samples = [replace(s, tokens=given + s.tokens, given=len(given)) for s in samples]
            group.samples += samples


def score(scorer: Scorer, rows: Sequence[Row], groups: Sequence[Group], settings: Settings, policy: Policy) -> None:
    """Scores of all samples; a hint that one sample alone has seen is told to the scorer for that sample only."""
    if not needs.verifier(settings):
        for s in (s for g in groups for s in g.samples):
            s.score = Score(0.0, None, note="not scored")
        return
    views: list[Group] = []
    for g in groups:
        views += [replace(g, hint=s.tokens[: s.given], samples=[s]) for s in g.samples if s.given]
        views.append(replace(g, samples=[s for s in g.samples if not s.given]))
    texts = policy.tokenizer.batch_decode([v.hint for v in views], skip_special_tokens=True)
    score_groups(scorer, rows, views, texts)


def without_signal(group: Group) -> bool:
    """All scores equal: nothing to tell its completions apart."""
    return len({s.score.value for s in group.samples if s.score is not None}) <= 1
