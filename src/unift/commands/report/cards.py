"""The rollouts on the page: prompt, hint, completions, scores. All of it is text of a model or a file: escaped, bounded."""

from __future__ import annotations

import base64
from pathlib import Path

from unift.commands.report.gather import Completion, Group, RunData, Step
from unift.commands.report.markup import Content, Html, fold, tag

TEXT = 4000  # characters of a prompt, hint or completion; the middle of a longer one is left out
PAGE = 1_500_000  # bytes of rollouts; the rest is left out


def rollouts(run: RunData, page: int = PAGE) -> Html | None:
    if not run.rollout_steps:
        return None
    spent, blocks, left_out = 0, [], 0
    for number, step in enumerate(run.rollouts):
        groups = []
        for group in step.groups:
            block = _group(group)
            size = len(block.encode())
            if spent + size > page:
                left_out += 1
                continue
            spent += size
            groups.append(block)
        counts = tag("small", f"{len(groups)} of {step.size} groups, {_scores(step)}")
        blocks.append(fold([f"Step {step.number:,}", counts], groups, opened=number == len(run.rollouts) - 1))
    groups_shown = max((len(s.groups) for s in run.rollouts), default=0)
    note = (
        f"A choice, not all: {len(run.rollouts)} of {run.rollout_steps:,} stored steps, at most {groups_shown} groups of a step "
        "(one of each kind before a second: mixed scores, failed scorer, all wrong, all right), and of a group "
        f"the best, the worst and a few more. Texts are cut in the middle beyond {TEXT:,} characters. "
        "So counts here are no statistics; the curves are. "
        "All rollouts, with tokens and log-probs: rollouts/step_*.jsonl.gz."
    )
    over = tag("p", f"{left_out} more groups were left out to keep this page small.", cls="note") if left_out else None
    return Html(tag("p", note, cls="note") + "".join(blocks) + (over or ""))


def _scores(step: Step) -> str:
    values = [c.value for g in step.groups for c in g.completions for _ in range(c.times) if c.value is not None]
    return f"scores {min(values):g} to {max(values):g}" if values else "no scores"


def _group(group: Group) -> Html:
    shown = f"hint: {group.cuts} of {group.cuts_total} pieces" if group.cuts else "no hint"
    facts = [group.kind, shown, f"{group.size} completions", f"row {group.row_id}"]
    text = tag("pre", cut(group.prompt), tag("mark", cut(group.hint)) if group.hint else None)
    meta = tag("p", [tag("span", fact) for fact in facts], cls="meta")
    if group.pictures:
        beside = tag("div", [_picture(p) for p in group.pictures], cls="pictures")
        text = tag("div", beside, text, cls="shown")
    return tag("div", meta, text, [_completion(c) for c in group.completions], _rest(group), cls="group")


def _picture(path: Path) -> Html:
    return Html(f'<img alt="picture" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">')


def _rest(group: Group) -> Html | None:
    left = group.size - sum(c.times for c in group.completions)
    return tag("p", f"{left} more completions of this group are not shown.", cls="note") if left else None


def _completion(c: Completion) -> Html:
    right = c.correct if c.correct is not None else (c.value is not None and c.value >= 1)
    facts: list[Content] = []
    if c.value is None:
        facts.append(tag("b", "no score", cls="wrong"))
    else:
        facts.append(tag("b", f"score {c.value:g}", cls="right" if right else "wrong"))
    if c.advantage is not None:
        facts.append(f"advantage {c.advantage:+.2f}")
    facts += [f"{name} {value:g}" for name, value in c.parts.items()]
    facts.append(f"{c.tokens} tokens" if c.finished else f"{c.tokens} tokens, cut at the limit")
    if c.times > 1:
        facts.append(f"{c.times} times the same")
    meta = tag("p", [tag("span", fact) for fact in facts], cls="meta")
    text = tag("pre", cut(c.text) if c.text else tag("span", "(empty)", cls="cutoff"))
    error = tag("p", f"Scorer failed: {cut(c.error)}", cls="error") if c.error else None
    note = tag("p", "Scorer's note: ", cut(c.note), cls="note") if c.note else None
    return tag("div", meta, text, error, note, cls="completion")


def cut(text: str) -> Content:
    """The text, or its two ends with the number of characters left out between them."""
    if len(text) <= TEXT:
        return text
    head, tail = 2 * TEXT // 3, TEXT // 3
    gap = tag("span", f" ... {len(text) - head - tail:,} characters left out ... ", cls="cutoff")
    return [text[:head], gap, text[-tail:]]
