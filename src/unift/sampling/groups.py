"""The groups of a step: which prompt, which hint, which completions. Every draw is addressed (see ``rng``)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from unift.config import needs
from unift.config.sections import Rules
from unift.config.stages import Moment
from unift.credit.members import cut_short, fails
from unift.hints import schedules
from unift.rewards import score_groups
from unift.rewards.pool import Scorer
from unift.rows.dataset import Split
from unift.sampling.engines.base import Draws, Engine, Request, Watch, unwatched
from unift.types import Group, Row, Sample, Score


def completed(
    engine: Engine,
    tokenizer: Any,
    requests: Sequence[Request],
    max_tokens: int,
    temperature: float = 1.0,
    watch: Watch = unwatched,
) -> list[list[Sample]]:
    """Samples of every request, with their texts. ``watch`` is told the number of requests that are done.

    All processes call this together where the weights are sharded, also those without a request."""
    with engine.sampling():
        groups = engine.generate(requests, max_tokens, temperature, watch)
    flat = [s for g in groups for s in g]
    # What ends a completion is no part of its text, also where the tokenizer does not call it special.
    spoken = [s.tokens[:-1] if s.finished else s.tokens for s in flat]
    texts = tokenizer.batch_decode(spoken, skip_special_tokens=True)
    for sample, text in zip(flat, texts, strict=True):
        sample.text = text
    return groups


def hinted(indices: Sequence[int], split: Split, moment: Moment, known: Mapping[str, schedules.Span]) -> list[Group]:
    """Groups with their prompts and hints, without completions. ``known``: what was learnt about rows, by id."""
    show, groups = moment.rules.show, []
    for index in indices:
        row, e = split.rows[index], split.encoded[index]
        at, span = schedules.At(moment.seed, moment.within, moment.stage.total, row.id), known.get(row.id)
        if show.unit == "tokens":
            most = e.steps_tokens
            k = math.floor(schedules.share(show, at, span) * most + 1e-9)
            group = Group(index, row.id, e.prompt, e.solution[:k], k, most)
        else:
            k = schedules.draw(show, at, e.n_steps, span)
            group = Group(index, row.id, e.prompt, e.hint(k, show.cuts), k, min(show.cuts, e.n_steps))
        groups.append(replace(group, shown=e.shown, solved=e.n_steps > 0))
    return groups


@dataclass
class _Wanted:
    """Requests of one length limit, and whose each is: a group, and the hint that its members alone have seen."""

    max_tokens: int
    requests: list[Request] = field(default_factory=list[Request])
    owners: list[tuple[Group, list[int]]] = field(default_factory=list[tuple[Group, list[int]]])

    def add(self, group: Group, given: list[int], draws: Draws, texts: Sequence[list[int]]) -> None:
        if draws.n:
            hint = given or group.hint
            # What follows the hint, where a text begins with it; of others, parts may come.
            drafts = [t[len(hint) :] if t[: len(hint)] == hint else t for t in texts]
            self.requests.append(Request(group.prompt + hint, draws, group.shown, drafts))
            self.owners.append((group, given))


def complete(
    engine: Engine,
    tokenizer: Any,
    groups: Mapping[int, Group],
    moment: Moment,
    attempt: int = 0,
    drafts: Mapping[int, Sequence[list[int]]] = MappingProxyType({}),
) -> None:
    """Sample the completions of these groups. Where only some members see the hint, it becomes a part of those.

    groups: by position in the batch of all processes, which is part of the address of a group's random numbers, since a small
    data set may bring a row twice in one step.
    drafts: by the same position, texts that may come after a group's prompt (``sample.draft``).
    """
    sample, members, seed, step = moment.rules.sample, moment.rules.show.members, moment.seed, moment.step
    whole = _Wanted(sample.max_tokens)
    short = _Wanted(min(sample.first or sample.max_tokens, sample.max_tokens))  # only the first tokens
    for i, group in groups.items():
        place = ("sample", seed, step, i, group.row_id, *([attempt] if attempt else []))
        draws = Draws(place, sample.completions, sample.completions, sample.max_tokens)
        wanted = short if cut_short(sample, seed, step, group.row_id) else whole
        if members is None:
            wanted.add(group, [], draws, drafts.get(i, ()))
            continue
        bare, hint = sample.completions - members, group.hint
        group.hint = []
        wanted.add(group, [], replace(draws, n=bare), drafts.get(i, ()))
        wanted.add(group, hint, replace(draws, n=members, first=bare), drafts.get(i, ()))
    with engine.sampling():  # once, though not every process has requests of both lengths
        for wanted in (whole, short):
            if not wanted.requests:
                continue
            sampled = completed(engine, tokenizer, wanted.requests, wanted.max_tokens, sample.temperature)
            for (group, given), samples in zip(wanted.owners, sampled, strict=True):
                if given:
                    samples = [replace(s, tokens=given + s.tokens, given=len(given)) for s in samples]
                group.samples += samples
    for group in groups.values():
        group.shown = None  # no more is asked for: what travels to other processes stays small


def judge(scorer: Scorer, rows: Sequence[Row], groups: Sequence[Group], rules: Rules, tokenizer: Any) -> None:
    """Scores of all samples; a hint that one sample alone has seen is told to the scorer for that sample only."""
    if not needs.verifier(rules):
        for s in (s for g in groups for s in g.samples):
            s.score = Score(0.0, None, note="not scored")
        return
    views: list[Group] = []
    for g in groups:
        views += [replace(g, hint=s.tokens[: s.given], samples=[s]) for s in g.samples if s.given]
        views.append(replace(g, samples=[s for s in g.samples if not s.given]))
    texts = tokenizer.batch_decode([v.hint for v in views], skip_special_tokens=True)
    score_groups(scorer, rows, views, texts)


def replaceable(group: Group, rules: Rules) -> bool:
    """Whether ``sample.refill`` replaces the group: its scores are all equal, with the solution's 1 where that is a member, and no
    ``likelihood.gate`` supervises it, which takes up what completions fail at."""
    gate = rules.likelihood.gate
    if gate is not None and group.solved and fails(group, gate):
        return False
    member = rules.sample.demonstration and group.solved
    return equal_scores(group) and not (
        member and any(s.score is not None and s.score.value != 1 for s in group.samples)
    )


def equal_scores(group: Group) -> bool:
    """All scores equal: nothing to tell its completions apart."""
    return len({s.score.value for s in group.samples if s.score is not None}) <= 1
