"""The pieces of a run's page. Each is a function of the run and returns markup, or None where there is nothing to show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from unift.commands import display
from unift.commands.report import words
from unift.commands.report.charts import Line, Look, chart, series
from unift.commands.report.diagnosis import at_end, causes, latest, next_steps, percent, verdict
from unift.commands.report.findings import PARTS, details, findings, time_spent
from unift.commands.report.gather import RunData, settings_of
from unift.commands.report.markup import Content, Html, table, tag
from unift.config.stages import stages
from unift.intervals import wilson

SPLIT = {name: f"c{i}" for i, name in enumerate((*PARTS, "other in a step", "evaluations and checkpoints"), 1)}


# ---------------------------------------------------------------------------------------------- numbers


def header(run: RunData) -> Html:
    kind, text = words.state(run)
    title = tag("h1", words.title(run), " ", tag("span", text, cls=f"badge {kind}"))
    return Html(title + tag("p", words.sentence(run), cls="lead"))


def cards(run: RunData) -> Html:
    """The few numbers to look at first."""
    found: list[tuple[str, str]] = []
    now, base = latest(run), run.base
    if now:
        after, step = now
        when = "" if run.result else f", at step {step:,}"
        found.append((percent(after["accuracy"]), f"held-out accuracy, no hint ({words.interval_text(after)}{when})"))
        if base:
            gain = 100 * (after["accuracy"] - base["accuracy"])
            found.append((f"{gain:+.1f}", f"points against the base ({percent(base['accuracy'])})"))
    reward = at_end(run, "reward")
    if reward is not None:
        found.append((f"{reward:.3f}", "mean reward, last tenth of the steps"))
    found.append((f"{run.done:,}", f"of {run.total:,} steps"))
    elapsed = series(run.metrics, "time/elapsed")[1]
    if len(elapsed):
        found.append((display.duration(float(elapsed[-1])), "training time"))
    speed = series(run.metrics, "tokens/per_second")[1]
    if len(speed):
        found.append((f"{np.median(speed):,.0f}", "tokens a second (median)"))
    sampled, trained = (series(run.metrics, f"tokens/{n}")[1] for n in ("sampled", "trained"))
    if len(sampled) and sampled[-1]:
        found.append((words.count(sampled[-1]), "tokens sampled"))
    if len(trained) and trained[-1]:
        found.append((words.count(trained[-1]), "tokens trained on"))
    return tag("div", [tag("div", tag("b", big), tag("span", small), cls="card") for big, small in found], cls="cards")


def accuracies(run: RunData) -> Html | None:
    """Every measured accuracy with its interval, drawn on one scale."""
    result = run.result or {}
    rows: list[tuple[str, Mapping[str, Any], bool]] = []
    if run.base:
        rows.append(("base, held-out", run.base, True))
    now = latest(run)
    if now:
        rows.append(("after, held-out" if run.result else f"step {now[1]:,}, held-out", now[0], False))
    rows += [(f"{name}, held-out", a, False) for name, a in ((result.get("test") or {}).get("pass@k") or {}).items()]
    if result.get("train"):
        rows.append(("after, training rows", result["train"], True))
    if not rows:
        return None
    note = (
        "Dot: accuracy without hints (greedy; pass@k: at least one right of k sampled completions). Bar: 95 % interval over rows, "
        "Wilson's, for pass@k from a bootstrap. It says nothing about other seeds."
    )
    return Html(tag("div", [bar(*row) for row in rows], cls="bars") + tag("p", note, cls="note"))


def bar(label: Content, a: Mapping[str, Any], muted: bool = False) -> Html:
    low, middle, high = (100 * min(max(float(a[k]), 0.0), 1.0) for k in ("low", "accuracy", "high"))
    marks = [tag("i", style=f"left:{low:.2f}%;width:{high - low:.2f}%"), tag("b", style=f"left:{middle:.2f}%")]
    of = f", n = {a['n']:,}" if "n" in a else ""
    value = tag("span", percent(a["accuracy"]), " ", tag("small", f"{words.interval_text(a)}{of}"), cls="value")
    return tag(
        "div",
        tag("span", label, cls="label"),
        tag("div", marks, cls="track muted" if muted else "track"),
        value,
        cls="bar",
    )


def readings(run: RunData) -> Html:
    """All findings, where the first screen does not stand above them."""
    return _listed(findings(run))


def more(run: RunData) -> Html:
    return _listed(details(run))


def _listed(found: Iterable[tuple[str, str]]) -> Html:
    return tag("ul", [tag("li", text, cls=kind) for kind, text in found], cls="findings")


def diagnosis(run: RunData) -> Html:
    """Is it learning, what holds it back, what to try next."""
    held = [("watch", cause.text) for cause in causes(run)] or [("plain", "Nothing that these numbers show.")]
    answers = (
        ("Is it learning?", [verdict(run)]),
        ("What holds it back", held),
        ("What to try next", [("plain", text) for text in next_steps(run)]),
    )
    return tag("div", [tag("div", tag("h3", title), _listed(found)) for title, found in answers], cls="short")


# ---------------------------------------------------------------------------------------------- curves


def accuracy_chart(run: RunData) -> Html | None:
    x, y = series(run.metrics, "eval/test/accuracy", 100)
    base = run.base
    if not base or not len(x):
        return None
    n = run.watched
    bounds = np.array([wilson(v / 100 * n, n) for v in y]) * 100
    lines = [Line("held-out", "c1", x, y, marker=len(x) < 60, low=bounds[:, 0], high=bounds[:, 1])]
    level = y[0] if x[0] == 0 else 100 * base["accuracy"]
    lines.append(Line("base", "c7", np.array([0.0, run.total]), np.array([level, level]), dashed=True))
    of = "" if n == base["n"] else f"the first {n:,} of "
    note = f"Greedy, {of}{base['n']:,} held-out rows. Shaded: 95 % Wilson interval."
    return _chart(run, "Accuracy without hint", lines, unit="%", limits=(0, 100), note=note)


def reward_chart(run: RunData) -> Html | None:
    lines = [
        _line(run, "reward", "all prompts", "c1", raw=True),
        _line(run, "reward/by_hint/0", "prompts without a hint", "c2", raw=True),
        _line(run, "reward/without_solution", "rows without a solution", "c4", raw=True),
    ]
    return _chart(run, "Reward while training", lines, limits=(0, 1), note="Mean over the completions of a step.")


def hint_chart(run: RunData) -> Html | None:
    lines = [
        _line(run, "hint/fraction", "drawn", "c3", raw=True, unit=100),
        _line(run, "hint/prob", "schedule", "c7", dashed=True, unit=100),
    ]
    return _chart(run, "Share of the solution that is shown", lines, unit="%", limits=(0, 100))


def learning_charts(run: RunData) -> list[Html]:
    groups = [
        _line(run, "groups/all_right", "all right", "c3", raw=True, unit=100),
        _line(run, "groups/all_wrong", "all wrong", "c2", raw=True, unit=100),
        _line(run, "frac_reward_zero_std", "all scores equal", "c7", raw=True, unit=100),
    ]
    lengths = [
        _line(run, "completions/mean_length", "all", "c1", raw=True),
        _line(run, "completions/mean_terminated_length", "ended by themselves", "c5", raw=True),
    ]
    return _present(
        accuracy_chart(run),
        reward_chart(run),
        hint_chart(run),
        _chart(run, "Groups without a signal", groups, unit="% of groups", limits=(0, 100),
               note="Completions with equal scores have no advantage: such a group teaches nothing but its hint."),
        _chart(run, "Length of completions", lengths, unit="tokens"),
        _chart(run, "Completions cut at the length limit", [_line(run, "completions/clipped_ratio", "cut", "c2", 100, raw=True)],
               unit="%", limits=(0, 5)),
    )  # fmt: skip


def update_charts(run: RunData) -> list[Html]:
    loss = [_line(run, "loss/policy", "policy", "c1", raw=True), _line(run, "loss/hint", "likelihood", "c5", raw=True)]
    norms = [
        _line(run, "grad/norm", "whole gradient, before clipping", "c7", raw=True),
        _line(run, "grad/policy_norm", "policy stream", "c1"),
        _line(run, "grad/hint_norm", "likelihood stream", "c5"),
    ]
    clip = [
        _line(run, "clip_ratio/low_mean", "below", "c2", raw=True, unit=100),
        _line(run, "clip_ratio/high_mean", "above", "c1", raw=True, unit=100),
    ]
    gap = [
        _line(run, "sampling/sampling_logp_difference/mean", "mean", "c1", raw=True),
        _line(run, "sampling/sampling_logp_difference/max", "largest", "c2", raw=True),
    ]
    return _present(
        _chart(run, "Loss", loss),
        _chart(run, "Gradient norm", norms, log=True, note="The streams are measured every log.gradients_every steps."),
        _chart(run, "Cosine of the two streams' gradients", [_line(run, "grad/cosine", "cosine", "c4")], limits=(-1, 1),
               note="Below 0, reward and hints pull the weights in opposite directions; 0 also where one of them is silent."),
        _chart(run, "Entropy", [_line(run, "entropy", "per completion token", "c3", raw=True)], unit="nats", limits=(0, 0)),
        _chart(run, "KL to the reference", [_line(run, "kl", "per completion token", "c4", raw=True)], unit="nats"),
        _chart(run, "Clipped tokens", clip, unit="% of tokens", limits=(0, 0.1),
               note="Only updates after the first of a step (train.updates) can clip; with engine.overlap, all."),
        _chart(run, "Sampler against trainer", gap, unit="difference of log-probs", log=True,
               note="At the start of a step; rounding only, if both are the same model."),
        _chart(run, "Learning rate", [_line(run, "lr", "lr", "c7")]),
    )  # fmt: skip


def speed_charts(run: RunData) -> list[Html]:
    return _present(
        _chart(run, "Time of a step", _split_lines(run), unit="ms, mean", stacked=True),
        _chart(run, "Tokens a second", [_line(run, "tokens/per_second", "sampled", "c1", raw=True)], limits=(0, 1),
               note="Sampled tokens over the time of the whole step; trained tokens where nothing is sampled."),
        _chart(run, "Tokens saved by the shared prefix", [_line(run, "tokens/shared_ratio", "of an update", "c3", 100, raw=True)],
               unit="%", limits=(0, 100)),
    )  # fmt: skip


def time_bar(run: RunData) -> Html | None:
    """Where the whole time went."""
    spent = time_spent(run.metrics)
    if not spent:
        return None
    total = sum(spent.values())
    parts = [tag("i", cls=SPLIT[n], style=f"width:{100 * s / total:.2f}%") for n, s in spent.items()]
    names = [
        tag("span", tag("i", cls=SPLIT[n]), f"{n} {display.duration(s)} ({percent(s / total)})")
        for n, s in spent.items()
    ]
    return Html(tag("div", parts, cls="split") + tag("div", names, cls="split-legend"))


def _split_lines(run: RunData) -> list[Line]:
    """Milliseconds of each part, on the steps that have a total; a part that a step does not have took none."""
    steps = [m for m in run.metrics if isinstance(m.get("time/step"), (int, float))]
    x = np.array([m["step"] for m in steps], dtype=float)
    named = {p: 1000 * np.array([m.get(f"time/{p}") or 0.0 for m in steps]) for p in PARTS}
    whole = 1000 * np.array([m["time/step"] for m in steps])
    named["other in a step"] = np.maximum(whole - sum(named.values()), 0.0) if steps else whole
    return [Line(p, SPLIT[p], x, y) for p, y in named.items() if len(y) and y.sum() > 0.005 * whole.sum()]


def _line(run: RunData, name: str, label: str, colour: str, unit: float = 1.0, **look: Any) -> Line:
    """A metric of the run, times ``unit``; ``look``: raw, dashed of `Line`."""
    return Line(label, colour, *series(run.metrics, name, unit), **look)


def _chart(run: RunData, title: str, lines: Sequence[Line], **options: Any) -> Html | None:
    marks = [stage.start for stage in stages(run.config)[1:]] if run.config and not run.config.train.budget else []
    return chart(title, lines, Look(total=run.total, marks=marks, **options))


def _present(*charts: Html | None) -> list[Html]:
    return [c for c in charts if c is not None]


def grid(charts: Iterable[Html]) -> Html | None:
    charts = list(charts)
    return tag("div", charts, cls="charts") if charts else None


# ---------------------------------------------------------------------------------------------- settings, environment


def settings_tables(run: RunData) -> Html:
    titles = {
        "this run": "Set for this run, beyond the method's preset",
        "preset": f"Set by the preset {run.method}",
        "default": "Left at the default",
    }
    found = settings_of(run)
    parts: list[Html] = []
    for origin, heading in titles.items():
        own = [s for s in found if s.origin == origin]
        if not own:
            continue
        rows = [
            [tag("code", s.key), tag("code", s.value), *([tag("code", s.default)] if origin != "default" else [])]
            for s in own
        ]
        head = ["setting", "value", "default"][: 2 if origin == "default" else 3]
        body = table(head, rows)
        if origin == "default":
            parts.append(tag("details", tag("summary", heading, tag("small", f"{len(own)} settings")), body))
        else:
            parts += [tag("h3", heading), body]
    return Html("".join(parts))


def environment_table(run: RunData) -> Html | None:
    named = {"data": "fingerprint of the training rows", "cuda": "GPU"}
    rows: list[list[Content]] = []
    for name, value in run.environment.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{k} {v}" for k, v in value.items() if v is not None)
        rows.append([named.get(name, name), "none" if value is None else str(value)])
    return table(["", ""], rows) if rows else None
