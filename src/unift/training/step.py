"""One step: rows -> hints -> groups of completions -> scores -> credit -> packs -> optimizer updates.

Which rows, hints and tokens are functions of (seed, step, row, sample); what a step changes are the weights, the optimizer,
the row memory and the counts, in this order and at its end, so a step that is killed can be done again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from unift import processes
from unift.config import needs
from unift.config.sections import Rules
from unift.config.stages import Moment
from unift.config.words import SCHEDULES, SOURCES
from unift.credit import assign
from unift.hints import schedules
from unift.model.packs import DEMO, Item, Member, PackedBatch
from unift.rewards import count_outcomes
from unift.rows.dataset import refill_rows, rows_of_step
from unift.sampling.ahead import Drawing
from unift.sampling.groups import complete, hinted, judge, replaceable
from unift.training import annealing, update
from unift.training.progress import Clock, Metrics, Run, State
from unift.training.run import checkpoint
from unift.training.run.metrics import group_metrics, merged
from unift.training.run.rollouts import read_rollouts, write_rollouts
from unift.training.update import Order
from unift.types import Group


def one_step(run: Run, moment: Moment, state: State) -> Metrics:
    """Everything between two optimizer states; returns the step's metrics."""
    clock, stale = Clock(), state.ahead is not None
    groups = groups_of_step(run, moment, state, clock)
    _count(run, groups)
    # This step's weights in place of their schedules.
    rules = annealing.at(moment.rules, moment.within, moment.stage.total, groups)
    items = assign.credited(groups, run.data.train, rules, _models(run, state), (moment.seed, moment.step))
    updates = update.prepare(run.policy, items, rules, state.reference)
    updates += _waiting(run, state, groups, rules)
    shown = _share_shown(state, groups, moment, rules)
    state.memory.see(groups, rules.show)
    state.memory.keep(groups, rules.sample)
    clock.lap("reference")
    order = Order(
        lr=update.learning_rate(rules.train, moment.within, moment.stage.total),
        measure=bool(run.config.log.gradients_every) and moment.step % run.config.log.gradients_every == 0,
        dump=_dump(run.folder, moment.step),
        engine=run.config.engine,
    )
    parts = [update.apply(run.policy, state.optimizer, packs, rules, order) for packs in updates]
    clock.lap("update")
    metrics = merged(parts) | group_metrics(groups, rules) | {"hint/prob": shown}
    if run.config.engine.overlap and needs.completions(rules):
        metrics["sampling/staleness"] = float(stale)
    return metrics | _work(run, groups, items, metrics, rules, clock)


# ---------------------------------------------------------------------------------------------- groups


def groups_of_step(run: Run, moment: Moment, state: State, clock: Clock) -> list[Group]:
    """The step's groups with scores: from disk if these very weights sampled them before a kill, else what was drawn ahead, else
    sampled now. With engine.overlap the next step's completions begin to be drawn as soon as this step's are there."""
    rules, ahead = moment.rules, state.ahead
    rows = rows_of_step(moment.seed, moment.step, rules.train.prompts, run.data.train.trained(rules))
    if not rules.sample.completions:
        return hinted(rows, run.data.train, moment, state.memory.hints)
    keep, own, stored = run.config.save.rollouts, "", None
    if keep or run.config.engine.overlap:
        alike = run.policy.root is None  # then the first process's weights are everyone's
        own = checkpoint.fingerprint(run.policy) if processes.first() or not alike else ""
        own, stored = processes.lead(
            "stored rollouts",
            lambda: (own, _stored(run, moment.step, ahead.weights if ahead else own) if keep else None),
        )
        clock.lap("save")
    sampler = ahead.weights if ahead else own
    early, groups = stored is not None or not rules.sample.refill, list[Group]()
    if ahead is not None:
        groups = ahead.wait()
        clock.laps["time/ahead"] = ahead.seconds
    elif stored is None:
        groups = _drawn(run, rows, moment, state)
    clock.lap("generate")
    state.ahead = _begun(run, moment, own) if early else None
    if stored is not None:
        return stored
    groups = refilled(run, _judged(run, groups, moment, clock), moment, state, clock)
    if not early:
        state.ahead = _begun(run, moment, own)
    if keep and processes.first():
        decode = run.policy.tokenizer.batch_decode
        prompts, shown = (
            decode(x, skip_special_tokens=True) for x in ([g.prompt for g in groups], [g.hint for g in groups])
        )
        images = [run.data.train.rows[g.row].images for g in groups]
        write_rollouts(run.folder, moment.step, sampler, groups, list(zip(prompts, shown, strict=True)), images)
        clock.lap("save")
    return groups


def _stored(run: Run, step: int, weights: str) -> list[Group] | None:
    """The groups of the step if they were sampled by the weights of this fingerprint."""
    stored = read_rollouts(run.folder, step)
    return stored[1] if stored is not None and stored[0] == weights else None


def _begun(run: Run, moment: Moment, weights: str) -> Drawing | None:
    """The next step's completions, which this step's weights begin to draw; None where the next step is not of this stage."""
    if not run.config.engine.overlap or moment.step + 1 >= moment.stage.stop:
        return None
    after = replace(moment, step=moment.step + 1)
    rows = rows_of_step(after.seed, after.step, after.rules.train.prompts, run.data.train.trained(after.rules))
    groups = hinted(rows, run.data.train, after, {})  # nothing is learnt about rows here, see config/checks.py
    run.engine.sync(run.policy, lambda: weights)
    drawing = Drawing(after.step, weights, groups)
    drawing.begin(run.engine, run.policy.tokenizer, after)
    return drawing


def _drawn(run: Run, rows: Sequence[int], moment: Moment, state: State, attempt: int = 0) -> list[Group]:
    """Groups of these rows. Every process draws all rows and hints, and samples its share of the groups."""
    groups = hinted(rows, run.data.train, moment, state.memory.hints)
    own = {i: groups[i] for i in processes.share(len(groups))}
    solutions, rule = run.data.train.encoded, moment.rules.sample
    drafts = {i: state.memory.drafts(g, solutions[g.row].solution, rule) for i, g in own.items()}
    if SOURCES[moment.rules.sample.source].reference and state.reference is not None:
        with state.reference.policy() as frozen:
            run.engine.sync(frozen, lambda: f"reference-{moment.stage.start}")
            complete(run.engine, run.policy.tokenizer, own, moment, attempt, drafts)
    else:
        run.engine.sync(run.policy, partial(checkpoint.fingerprint, run.policy))
        complete(run.engine, run.policy.tokenizer, own, moment, attempt, drafts)
    return groups


def _judged(run: Run, groups: Sequence[Group], moment: Moment, clock: Clock) -> list[Group]:
    """The groups with scores: every process scores its share, and gets those of the others."""
    own = [groups[i] for i in processes.share(len(groups))]
    judge(run.scorer, run.data.train.rows, own, moment.rules, run.policy.tokenizer)
    clock.lap("score")
    if processes.size() == 1:
        return own
    groups = processes.interleave(processes.gather("the groups of a step", own))
    clock.lap("wait")
    return groups


def refilled(run: Run, groups: list[Group], moment: Moment, state: State, clock: Clock) -> list[Group]:
    """Groups without signal (`replaceable`) are replaced by other rows, ``sample.refill`` times at most (DAPO, arXiv 2503.14476).

    A replaced group's tokens were sampled all the same: the one that stays in its place counts them as discarded.
    """
    groups, rules = list(groups), moment.rules
    for attempt in range(1, rules.sample.refill + 1):
        equal = [i for i, g in enumerate(groups) if replaceable(g, rules)]
        if not equal:
            break
        others = refill_rows(moment.seed, moment.step, attempt, len(equal), run.data.train.trained(rules))
        drawn = _drawn(run, others, moment, state, attempt)
        clock.lap("generate")
        for i, fresh in zip(equal, _judged(run, drawn, moment, clock), strict=True):
            chosen, dropped = (groups[i], fresh) if replaceable(fresh, rules) else (fresh, groups[i])
            chosen.discarded = groups[i].discarded + sum(s.sampled for s in dropped.samples)
            groups[i] = chosen
    return groups


# ---------------------------------------------------------------------------------------------- pieces


def _count(run: Run, groups: Sequence[Group]) -> None:
    """Count outcomes and tokens; a sample whose scorer failed takes no further part."""
    for name, n in count_outcomes(groups).items():
        run.progress.scored[name] += n
    run.progress.completions += sum(len(g.samples) for g in groups)
    run.progress.tokens_sampled += _sampled_tokens(groups)
    for group in groups:
        group.samples = [s for s in group.samples if s.score is not None]
    run.progress.seen += sum(s.score is not None and s.score.value >= 1 for g in groups for s in g.samples)


def _sampled_tokens(groups: Sequence[Group]) -> int:
    return sum(s.sampled for g in groups for s in g.samples) + sum(g.discarded for g in groups)


def _models(run: Run, state: State) -> assign.Models:
    return assign.Models(run.policy, state.reference, state.memory.partition)


def _waiting(run: Run, state: State, groups: Sequence[Group], rules: Rules) -> list[list[PackedBatch]]:
    """An update of the likelihood alone, once enough gated rows wait for one (ReLIFT, arXiv 2506.07527)."""
    rows = [run.data.train.encoded[r] for r in state.memory.collect(groups, rules.likelihood)]
    if not rows:
        return []
    alone = [Item(e.prompt, [], [Member(e.solution, DEMO)], shown=e.shown) for e in rows]
    return update.prepare(run.policy, alone, annealing.one_update(rules), state.reference)


def _share_shown(state: State, groups: Sequence[Group], moment: Moment, rules: Rules) -> float:
    """The schedule's p of this step; mean over the rows where each has its own."""
    if SCHEDULES[rules.show.schedule].follows:
        return state.memory.mean_share(groups, rules.show)
    return schedules.probability(rules.show, moment.within, moment.stage.total)


def _dump(folder: Path, step: int) -> Path:
    """Where the batch goes if something is not finite: a file of this process."""
    own = "" if processes.first() else f"-process{processes.rank()}"
    return folder / "nonfinite" / f"{checkpoint.step_name(step)}{own}.pt"


def _work(
    run: Run, groups: Sequence[Group], items: Sequence[Item], metrics: Metrics, rules: Rules, clock: Clock
) -> Metrics:
    """Tokens and seconds of the step."""
    unshared = sum(
        len(i.prompt + i.hint) * max(len(i.members), 1) + sum(len(m.tokens) for m in i.members) for i in items
    )
    sampled, progress = _sampled_tokens(groups), run.progress
    progress.tokens_trained += int(metrics["tokens/supervised"])
    found: Metrics = {
        "tokens/sampled": progress.tokens_sampled,
        "tokens/trained": progress.tokens_trained,
        "tokens/shared_ratio": 1 - metrics["tokens/forwarded"] / max(unshared, 1),
        "tokens/per_second": (sampled or metrics["tokens/supervised"]) / clock.total(),
        **clock.laps,
        "time/checkpoint": run.saving,
        "time/step": clock.total(),
    }
    if needs.completions(rules):
        found |= {f"reward/{k}": v for k, v in progress.scored.items() if k != "total"}
    return found
