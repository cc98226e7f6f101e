"""The first screen of a run's page: is it learning, what holds it back, what to try next. Every cause is a measured share
above a limit that stands here; none is guessed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from unift.commands.display import FAILURES, failures
from unift.commands.report.charts import series
from unift.commands.report.gather import RunData
from unift.intervals import wilson

GOOD, PLAIN, WATCH = "good", "plain", "watch"
LAST = 0.1  # "at the end" is the mean over the last tenth of the steps
MANY = 0.1  # share of completions that are cut, or without an answer, above which it is said
MOST = 0.8  # share of groups without a signal above which it is said
HINTED = 0.02  # share of the solution above which a step has hints
GAP = 0.02  # mean difference of log-probs between sampler and trainer
SHORT = 0.25  # of their length at its longest, below which completions have shrunk
LOST = 0.1  # of the reward under hints: what is left without them, below which it is lost


@dataclass(frozen=True)
class Cause:
    """What holds a run back, with its figure, and what to try."""

    name: str
    text: str
    advice: str


def percent(share: float) -> str:
    """12.3 %; without a decimal where there is none, 95 % and 100 %."""
    return f"{100 * share:.1f}".removesuffix(".0") + " %"


def at_end(run: RunData, name: str) -> float | None:
    """Mean of a metric over the last tenth of its points, None if the run has none."""
    _, y = series(run.metrics, name)
    return float(np.mean(y[-max(1, round(LAST * len(y))) :])) if len(y) else None


def at_start(run: RunData, name: str) -> float | None:
    _, y = series(run.metrics, name)
    return float(np.mean(y[: max(1, round(LAST * len(y)))])) if len(y) else None


def latest(run: RunData) -> tuple[Mapping[str, float], int] | None:
    """(held-out accuracy with its interval, step): of the result, or the last evaluation of an unfinished run."""
    test = (run.result or {}).get("test")
    if test:
        return test, run.done
    x, y = series(run.metrics, "eval/test/accuracy")
    if not len(x) or not run.base:
        return None
    n = run.watched
    low, high = wilson(y[-1] * n, n)
    return {"accuracy": float(y[-1]), "low": low, "high": high, "n": n}, int(x[-1])


# ---------------------------------------------------------------------------------------------- is it learning


def verdict(run: RunData) -> tuple[str, str]:
    """(kind, answer) to "is it learning?"."""
    if run.done == 0:
        return PLAIN, "Not known: no step is finished yet."
    now, base = latest(run), run.base
    if now and base:
        after, step = now
        gain = 100 * (after["accuracy"] - base["accuracy"])
        change = (
            f"{percent(base['accuracy'])} before, {percent(after['accuracy'])} at step {step:,}, {gain:+.1f} points"
        )
        if after["low"] > base["high"]:
            return GOOD, f"Yes: held-out accuracy without hints rose, and the 95 % intervals do not overlap ({change})."
        if after["high"] < base["low"]:
            return WATCH, f"No, it gets worse: held-out accuracy is below the base's interval ({change})."
        if not run.result and (at_end(run, "hint/fraction") or 0.0) > HINTED and _sampled(run):
            return PLAIN, (
                f"Too early to say: hints are still shown, and accuracy without them moves when they go ({change})."
            )
        return (WATCH if run.result else PLAIN), f"Not measurably: the intervals overlap ({change})."
    first, last = at_start(run, "reward"), at_end(run, "reward")
    if first is None or last is None:
        return (
            PLAIN,
            "Not known: there are no held-out rows (data.test), and nothing is sampled that a reward could judge.",
        )
    kind = PLAIN if last > first else WATCH
    word = "rose" if last > first else "did not rise"
    return (
        kind,
        f"Not known beyond the training rows (no data.test): their reward {word}, from {first:.3f} to {last:.3f}.",
    )


# ---------------------------------------------------------------------------------------------- what holds it back


def causes(run: RunData) -> list[Cause]:
    """What holds the run back, the gravest first; empty where these numbers show nothing."""
    unseen, shrunk, known = _no_reward(run), _shrunk(run), [*_hints(run), _easy(run)]
    equal = None if unseen or shrunk or any(known) else _equal(run)  # else it is said why groups have no signal
    answers = None if shrunk else _no_answer(run)
    found = [_not_finite(run), _errors(run), unseen, shrunk, answers, _cut(run), *known, _unsolved(run), equal]
    return [cause for cause in [*found, _fallen(run), _gap(run), _overfit(run)] if cause is not None]


def next_steps(run: RunData) -> list[str]:
    """What to try, of the causes in their order, or from the outcome."""
    advice = [cause.advice for cause in causes(run)]
    if advice:
        return list(dict.fromkeys(advice))
    kind, _ = verdict(run)
    if not run.result:
        return [f"Let it go on: {run.done:,} of {run.total:,} steps are done. The same command continues it."]
    if kind == GOOD:
        return ["More seeds say how sure it is: unift compare --methods NAME,... --seeds 3."]
    return ["More steps (train.steps), another train.lr (unift compare with several), or more rows."]


def _sampled(run: RunData) -> bool:
    return bool(len(series(run.metrics, "reward")[0]))


def _not_finite(run: RunData) -> Cause | None:
    if not run.stopped:
        return None
    text = "A loss or gradient was not finite and stopped the run; the batch is in nonfinite/."
    return Cause("not finite", text, "Lower train.lr, set train.clip_norm, and look at the rewards of that batch.")


def _errors(run: RunData) -> Cause | None:
    counts = dict(((run.result or {}).get("scorer") or {}).get("train") or {})
    if not counts and run.metrics:
        last = run.metrics[-1]
        counts = {n: int(last[f"reward/{n}"]) for n in FAILURES if last.get(f"reward/{n}")}
    listed = failures(counts)
    if not listed:
        return None
    of = f" of {counts['total']:,} completions" if counts.get("total") else ""
    text = f"The scorer failed: {listed}{of}. Such a completion takes no part in training; see Rollouts."
    return Cause(
        "reward errors", text, "Mend the reward (unift doctor runs it), or raise reward.timeout if it is slow."
    )


def _no_reward(run: RunData) -> Cause | None:
    _, reward = series(run.metrics, "reward")
    if not len(reward):
        return None
    seen = (run.result or {}).get("reward_seen")
    if (seen if seen is not None else float(reward.max())) > 0:
        return None
    text = f"No completion has earned the reward in {len(reward):,} steps: the policy has nothing to learn from."
    return Cause(
        "no reward seen", text,
        "Begin from what the model can do: longer hints for longer (show.high, show.until; method uft), supervised steps first "
        "(method sft-rft), more completions a prompt, or easier rows. unift doctor checks that the solutions earn the reward.",
    )  # fmt: skip


def _no_answer(run: RunData) -> Cause | None:
    lost = at_end(run, "completions/no_answer")
    if lost is None or lost <= MANY:
        return None
    where = next((str(m["answer"]) for m in run.metrics if "answer" in m), "the place of reward.answer")
    text = (
        f"{percent(lost)} of the completions at the end had no answer where it is looked for ({where}; reward.answer)."
    )
    return Cause(
        "no answer", text, "Ask for the answer's place in the prompt, or set reward.answer to where the model puts it."
    )


def _shrunk(run: RunData) -> Cause | None:
    """Completions end at once and earn nothing: a policy that has learnt to stop, which no later step undoes."""
    (_, lengths), (_, rewards) = series(run.metrics, "completions/mean_length"), series(run.metrics, "reward")
    length, wrong, reward = (at_end(run, n) for n in ("completions/mean_length", "groups/all_wrong", "reward"))
    if length is None or wrong is None or reward is None or length >= SHORT * lengths.max():
        return None
    if wrong <= MOST or reward > rewards.max() / 2:
        return None
    text = (
        f"Completions have shrunk from {lengths.max():.0f} tokens to {length:.0f}, and {percent(wrong)} of the groups at the end "
        f"were all wrong."
    )
    penalty = (run.settings.get("credit") or {}).get("overlong", 0)
    escape = " without the penalty on length, which a short completion escapes (credit.overlong=0)," if penalty else ""
    return Cause(
        "shrunk completions",
        text,
        f"Begin again{escape} with a lower train.lr, a KL to the reference (reference.kl), or a likelihood beside the reward "
        "(method uft or uft-whole).",
    )


def _cut(run: RunData) -> Cause | None:
    cut = at_end(run, "completions/clipped_ratio")
    if cut is None or cut <= MANY:
        return None
    text = f"{percent(cut)} of the completions at the end were cut at the length limit (sample.max_tokens)."
    return Cause(
        "cut", text, "Raise sample.max_tokens; if completions never end, look whether solutions do (Rollouts)."
    )


def _hints(run: RunData) -> list[Cause | None]:
    """Too short: hinted groups stay all wrong. Too long: they are all right. Gone too soon: the reward goes with them."""
    steps = [m for m in run.metrics if "hint/fraction" in m and "groups/all_wrong" in m]
    hinted = [m for m in steps if m["hint/fraction"] > HINTED]
    if not hinted:
        return []
    share = float(np.mean([m["hint/fraction"] for m in hinted]))
    wrong, right = (float(np.mean([m[f"groups/all_{w}"] for m in hinted])) for w in ("wrong", "right"))
    shown = f"with {percent(share)} of the solution shown on average"
    if wrong > MOST:
        text = f"Hints are too short: {percent(wrong)} of the groups that had them were all wrong, {shown}."
        return [
            Cause(
                "hints too short", text, "Show more: raise show.high and show.low, or method adaptive (a length a row)."
            )
        ]
    if right > MOST:
        text = f"Hints are too long: {percent(right)} of the groups that had them were all right, {shown}."
        return [
            Cause(
                "hints too long", text, "Show less: lower show.high or show.until, or method adaptive (a length a row)."
            )
        ]
    bare = [m["reward"] for m in steps if m["hint/fraction"] <= HINTED and m["step"] > hinted[-1]["step"]]
    with_hints = float(np.mean([m["reward"] for m in hinted]))
    if not bare or with_hints <= 0 or float(np.mean(bare)) >= LOST * with_hints:
        return []
    text = (
        f"The reward went with the hints: {with_hints:.3f} on average while they were shown, {np.mean(bare):.3f} in the "
        f"{len(bare):,} steps after."
    )
    return [
        Cause(
            "hints gone too soon",
            text,
            "Let hints go later (show.until), and raise likelihood.weight.",
        )
    ]


def _unsolved(run: RunData) -> Cause | None:
    """What the solved rows teach does not reach the others."""
    bare, solved = at_end(run, "reward/without_solution"), at_end(run, "reward/with_solution")
    if bare is None or solved is None or solved <= 0 or bare >= LOST * solved:
        return None
    share = at_end(run, "groups/without_solution") or 0.0
    text = (
        f"Rows without a solution earn next to nothing: {bare:.3f} on average at the end, {solved:.3f} where there is one; they "
        f"are {percent(share)} of the groups."
    )
    return Cause(
        "rows without a solution",
        text,
        "They learn from what the others teach: hints for longer (show.until), a higher likelihood.weight, solutions for more "
        "rows (data.solved).",
    )


def _easy(run: RunData) -> Cause | None:
    flat, right = at_end(run, "frac_reward_zero_std"), at_end(run, "groups/all_right")
    if flat is None or right is None or right <= MOST or (at_end(run, "hint/fraction") or 0.0) > HINTED:
        return None
    fit = (run.result or {}).get("train")
    if fit and fit["high"] < MOST:  # the few groups of the last steps say otherwise
        return None
    text = f"The rows are solved: {percent(right)} of the groups at the end were all right, so they have no advantage."
    return Cause("rows solved", text, "Harder or more rows; further steps on these teach nothing.")


def _equal(run: RunData) -> Cause | None:
    flat = at_end(run, "frac_reward_zero_std")
    if flat is None or flat <= MOST:
        return None
    entropy = at_end(run, "entropy")
    said = "" if entropy is None else f" (entropy {entropy:.2g} nats a token)"
    text = (
        f"The completions of a prompt earn the same: {percent(flat)} of the groups at the end had no advantage{said}."
    )
    return Cause(
        "equal completions",
        text,
        "More completions a prompt (sample.completions), a policy that stays open (policy.entropy, a lower train.lr), or other "
        "rows for such groups (sample.refill).",
    )


def best_evaluation(run: RunData) -> tuple[float, int] | None:
    """(held-out accuracy, step) of the best evaluation, where its interval lies above that of the `latest`."""
    x, y = series(run.metrics, "eval/test/accuracy")
    now = latest(run)
    if not len(x) or now is None:
        return None
    best, n = int(np.argmax(y)), run.watched
    return (float(y[best]), int(x[best])) if wilson(y[best] * n, n)[0] > now[0]["high"] else None


def _fallen(run: RunData) -> Cause | None:
    best, now = best_evaluation(run), latest(run)
    if best is None or now is None or best[1] >= now[1]:
        return None
    text = (
        f"Held-out accuracy was {percent(best[0])} at step {best[1]:,} and fell to {percent(now[0]['accuracy'])}; the 95 % "
        "intervals do not overlap."
    )
    return Cause(
        "fell back",
        text,
        "A lower rate, or one that falls (train.lr, train.decay=cosine); likelihood that stays when hints go (method uft-whole); "
        "fewer steps.",
    )


def _gap(run: RunData) -> Cause | None:
    gap = at_end(run, "sampling/sampling_logp_difference/mean")
    if gap is None or gap <= GAP:
        return None
    if at_end(run, "sampling/staleness"):
        text = f"One update moves the log-prob of a sampled token by {gap:.3g} in the mean: completions are that far off-policy."
        return Cause("sampler gap", text, "Lower train.lr, or draw with the newest weights: engine.overlap=false.")
    text = (
        f"Sampler and trainer disagree by {gap:.3g} in the mean log-prob of a sampled token: the completions are not quite "
        "on-policy."
    )
    return Cause("sampler gap", text, "Sample in the precision of training: model.autocast=none, model.dtype=float32.")


def _overfit(run: RunData) -> Cause | None:
    fit, now = (run.result or {}).get("train"), latest(run)
    if not fit or not now or fit["low"] <= now[0]["high"]:
        return None
    gap = 100 * (fit["accuracy"] - now[0]["accuracy"])
    text = (
        f"Training rows are solved in {percent(fit['accuracy'])} of cases, held-out rows {gap:.0f} points less: part of what "
        "was learned is the rows themselves."
    )
    return Cause(
        "rows learned by heart",
        text,
        "More rows, fewer supervised steps, or more of the reward (method sft-rft or uft).",
    )
