"""``unift methods``: the family as a table, generated from the presets. What is shown, sampled, credited, and pushed."""

from __future__ import annotations

from unift import needs
from unift.config import Config, Phase, plan, preset_names, resolve
from unift.settings import SEQUENCE_LOSSES

HEAD = ("method", "shown", "sampled", "credit", "policy stream", "likelihood stream", "needs")


def _shown(s: Config | Phase) -> str:
    show = s.show
    if show.schedule == "none":
        return "nothing"
    if show.schedule == "all":
        return "all"
    text = {
        "cosine": f"cosine {show.high:g} to {show.low:g}, {100 * show.until:g} % of the steps",
        "constant": f"constant {show.high:g}",
        "uniform": "uniform",
        "staircase": f"stages, {100 * show.until:g} % of the steps",
        "window": f"uniform in a window below {show.high:g}",
        "adaptive": f"a length a row, aim {show.target:g}",
        "bisection": "an interval a row",
    }[show.schedule]
    return (
        text
        + (f", to {show.members} member" if show.members else "")
        + (", in tokens" if show.unit == "tokens" else "")
    )


def _sampled(s: Config | Phase) -> str:
    sample = s.sample
    parts: list[str] = []
    if sample.completions:
        parts.append(f"{sample.completions}" + (" of the reference" if sample.source == "reference" else ""))
    if sample.first:
        parts.append(f"first {sample.first} tokens")
    if sample.refill:
        parts.append("silent groups replaced")
    if sample.demonstration:
        parts.append("+ the solution")
    return ", ".join(parts) or "-"


def _credit(s: Config | Phase) -> str:
    if not s.sample.completions or s.policy.loss == "none":
        return "-"
    if s.policy.loss in SEQUENCE_LOSSES:
        return "right before wrong" if s.policy.loss == "dpo" else "the score"
    c = s.credit
    names = {
        "group_mean": "r - mean",
        "leave_one_out": "r - mean of the others",
        "none": "r",
        "sign": "+1 / -1",
        "critic": "GAE",
        "partition": f"solution against the others, {c.score}",
    }
    text = names[c.baseline]
    if c.positive != 1:
        text += f", positive times {c.positive:g}" + (f" exp({c.positive_entropy:g} H)" if c.positive_entropy else "")
    if c.scale != "none" and c.baseline in ("group_mean", "leave_one_out"):
        text = f"({text}) / std"
    if s.reference.into == "reward" and s.reference.kl:
        text += ", KL in r"
    return text + (", whitened" if c.whiten else "")


def _policy(s: Config | Phase) -> str:
    p = s.policy
    if (not s.sample.completions and not s.sample.rejected) or p.loss == "none":
        return "-"
    bounds = {"clip": f" {p.low:g}/{p.high:g}", "gspo": f" {p.low:g}/{p.high:g}", "cispo": f" {p.high:g}"}
    text = p.loss + bounds.get(p.loss, "")
    if p.off_policy != "none":
        part = f", top {100 * p.off_policy_top:g} %" if p.off_policy_top < 1 else ""
        text += f"; solution: {p.off_policy}{part}"
    if p.loss in SEQUENCE_LOSSES:
        return text
    return f"{text}; {p.norm}" + ("; times 1 - likelihood" if p.weight == "complement" else "")


def _likelihood(s: Config | Phase) -> str:
    k = s.likelihood
    if k.tokens == "none" or not k.weight:
        return "-"
    own = f" ({k.keep.replace('_', ' ')})" if "own" in k.tokens and k.keep != "all" else ""
    text = f"{k.weight:g} {k.rule} on {k.tokens}{own}"
    if k.entropy:
        text += f" times exp({k.entropy:g} H)"
    if k.schedule != "constant":
        text += f", {k.schedule}" + (f" to {k.final:g}" if k.schedule == "cosine" else "")
    if k.gate is not None:
        text += f", where at most {100 * k.gate:g} % succeed"
    if k.buffer:
        text += f", {k.buffer} at a time"
    noise = s.inputs.noise if s.inputs.noise != "none" else "own guesses" if s.inputs.own else ""
    return text + (f"; inputs: {noise}" if noise else "")


def _needs(s: Config | Phase) -> str:
    names = ("solutions", "verifier", "reference", "old", "critic")
    return ", ".join(n for n in names if getattr(needs, n)(s)) or "-"


def rows() -> list[tuple[str, ...]]:
    """One row a preset; a preset of phases has one row a phase."""
    out: list[tuple[str, ...]] = []
    for name in preset_names():
        config = resolve(name, overrides={"data": {"task": "lock"}})
        spans = plan(config)
        for number, (_, _, s) in enumerate(spans):
            label = name if len(spans) == 1 else f"{name}, phase {number + 1}: {s.method}"
            out.append((label, _shown(s), _sampled(s), _credit(s), _policy(s), _likelihood(s), _needs(s)))
    return out


def table() -> str:
    """Markdown."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows())])
