"""A run's settings as a sentence, and numbers as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unift.commands.report.diagnosis import percent
from unift.commands.report.gather import RunData
from unift.config import words
from unift.config.sections import Rules


def title(run: RunData) -> str:
    return f"{run.method} on {subject(run.settings)}"


def state(run: RunData) -> tuple[str, str]:
    """(kind of badge, words)."""
    if run.result:
        return "good", "finished"
    if run.stopped:
        return "watch", f"stopped at step {run.done:,} of {run.total:,}: not finite"
    return "watch", f"not finished: {run.done:,} of {run.total:,} steps"


def sentence(run: RunData) -> str:
    """What the run is, in one sentence."""
    model = (run.settings.get("model") or {}).get("path", "a model")
    start = f"{run.method.upper() if len(run.method) <= 3 else run.method} fine-tunes {model} on {_rows(run.settings)}"
    if run.config is None:
        return f"{start}: {run.total:,} steps."
    c = run.config
    if c.model.lora:
        start += f" through LoRA adapters of rank {c.model.lora.rank}"
    if not c.phases:
        return f"{start}: {run.total:,} steps of {_stretch(c)}; seed {c.seed}."
    phases = "; then ".join(f"{p.method} for {percent(p.share)} of the steps, {_stretch(p)}" for p in c.phases)
    return f"{start}: {run.total:,} steps in {len(c.phases)} phases: {phases}; seed {c.seed}."


def subject(settings: Mapping[str, Any]) -> str:
    data = settings.get("data") or {}
    return str(data.get("task") or str(data.get("train") or "rows").rstrip("/").split("/")[-1])


def _rows(settings: Mapping[str, Any]) -> str:
    data = settings.get("data") or {}
    count = f"{data['train_rows']:,} " if isinstance(data.get("train_rows"), int) else ""
    solved = data.get("solved")
    some = (
        f", of which {f'{solved:,}' if isinstance(solved, int) else 'some'} are solved"
        if solved not in (None, "all")
        else ""
    )
    if data.get("task"):
        return f"{count}{'' if some else 'solved '}rows of the built-in task {data['task']}{some}"
    return f"{count}rows of {data.get('train')}{some}"


def _stretch(s: Rules) -> str:
    sample = s.sample
    parts = [
        f"{s.train.prompts} prompts" + (f" with {sample.completions} completions each" if sample.completions else "")
    ]
    if sample.completions:
        parts.append(words.filled(words.SCHEDULES[s.show.schedule].sentence, s.show))
    else:
        whole = words.TOKENS[s.likelihood.tokens].demo
        parts.append("no sampling, the whole solution is learned" if whole else "no sampling")
    if s.likelihood.weight and words.TOKENS[s.likelihood.tokens].alone:
        parts.append(f"likelihood of the hint weighs {s.likelihood.weight:g}")
    if s.reference.kl and sample.completions:
        parts.append(f"KL weighs {s.reference.kl:g}")
    return ", ".join([*parts, f"learning rate {s.train.lr:g}"])


def count(n: float) -> str:
    """1234567 -> 1.23 M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if n >= size:
            return f"{n / (1e3 if unit == 'k' else size):.3g} {unit}"
    return f"{n:,.0f}"


def interval_text(a: Mapping[str, Any]) -> str:
    return f"{percent(a['low']).removesuffix(' %')} to {percent(a['high'])}"
