"""``unift methods``: the family as a table, generated from the presets. What is shown, sampled, credited, and pushed."""

from __future__ import annotations

from unift.config import needs
from unift.config.packaged import preset_names
from unift.config.resolve import resolve
from unift.config.sections import Rules
from unift.config.stages import stages
from unift.config.words import (
    ANNEALINGS,
    BASELINES,
    INTOS,
    KEEPS,
    LOSSES,
    NOISES,
    OFF_POLICY,
    RULES,
    SCHEDULES,
    SOURCES,
    TOKENS,
    filled,
)

HEAD = ("method", "shown", "sampled", "credit", "policy stream", "likelihood stream", "needs")


def _shown(s: Rules) -> str:
    show, word = s.show, SCHEDULES[s.show.schedule]
    text = filled(word.text, show)
    if not word.graded:
        return text
    return (
        text
        + (f", to {show.members} member" if show.members else "")
        + (", in tokens" if show.unit == "tokens" else "")
    )


def _sampled(s: Rules) -> str:
    sample = s.sample
    parts: list[str] = []
    if sample.completions:
        parts.append(f"{sample.completions}{SOURCES[sample.source].text}")
    if sample.first:
        parts.append(f"first {sample.first} tokens")
    if sample.refill:
        parts.append("silent groups replaced")
    if sample.demonstration:
        parts.append("+ the solution")
    return ", ".join(parts) or "-"


def _credit(s: Rules) -> str:
    loss, baseline, c = LOSSES[s.policy.loss], BASELINES[s.credit.baseline], s.credit
    if not s.sample.completions or not loss.pushes:
        return "-"
    if loss.credit:
        return loss.credit
    text = filled(baseline.text, c)
    if c.positive != 1:
        text += f", positive times {c.positive:g}" + (f" exp({c.positive_entropy:g} H)" if c.positive_entropy else "")
    if c.scale != "none" and baseline.compares:
        text = f"({text}) / std"
    if s.reference.kl:
        text += INTOS[s.reference.into].text
    return text + (", whitened" if c.whiten else "")


def _policy(s: Rules) -> str:
    p, loss = s.policy, LOSSES[s.policy.loss]
    if (not s.sample.completions and not s.sample.rejected and not s.sample.label) or not loss.pushes:
        return "-"
    text = filled(loss.text, p)
    if p.off_policy != "none":
        part = f", top {100 * p.off_policy_top:g} %" if p.off_policy_top < 1 else ""
        text += f"; solution: {OFF_POLICY[p.off_policy].text}{part}"
    if loss.sequences:
        return text
    return f"{text}; {p.norm}" + ("; times 1 - likelihood" if p.weight == "complement" else "")


def _likelihood(s: Rules) -> str:
    k = s.likelihood
    if k.tokens == "none" or not k.weight:
        return "-"
    own = KEEPS[k.keep].text if TOKENS[k.tokens].own else ""
    text = f"{k.weight:g} {filled(RULES[k.rule].text, k)} on {k.tokens}{own}"
    if k.entropy:
        text += f" times exp({k.entropy:g} H)"
    text += filled(ANNEALINGS[k.schedule].text, k)
    if k.gate is not None:
        text += f", where at most {100 * k.gate:g} % succeed"
    if k.buffer:
        text += f", {k.buffer} at a time"
    noise = NOISES[s.inputs.noise].text or ("own guesses" if s.inputs.own else "")
    return text + (f"; inputs: {noise}" if noise else "")


def _needs(s: Rules) -> str:
    names = ("solutions", "verifier", "reference", "old", "critic")
    return ", ".join(n for n in names if getattr(needs, n)(s)) or "-"


def rows() -> list[tuple[str, ...]]:
    """One row a preset; a preset of phases has one row a phase."""
    out: list[tuple[str, ...]] = []
    for name in preset_names():
        config = resolve(name, overrides={"data": {"task": "lock"}})
        found = stages(config)
        for number, s in enumerate(stage.rules for stage in found):
            label = name if len(found) == 1 else f"{name}, phase {number + 1}: {s.method}"
            out.append((label, _shown(s), _sampled(s), _credit(s), _policy(s), _likelihood(s), _needs(s)))
    return out


def table() -> str:
    """Markdown."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows())])
