"""Everything a page needs, read from a run folder, with a choice of its stored rollouts: few steps, few groups, few
completions, so that the page stays small."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from unift.config.identity import flat
from unift.config.packaged import preset_names
from unift.config.resolve import preset_settings, read_yaml, validate
from unift.config.sections import Config, Credit, Phase
from unift.config.stages import stages
from unift.credit.advantages import advantages
from unift.training.run import read_object, read_result
from unift.training.run.metrics import read_metrics
from unift.training.run.rollouts import PICTURES, UNREADABLE, read_records
from unift.types import ConfigError, UniftError

CONFIG = "config.yaml"


@dataclass(frozen=True)
class RunData:
    """A run as far as it went. ``config``: None if this version of unift does not accept the stored settings."""

    folder: Path
    settings: Mapping[str, Any]  # config.yaml as it stands
    config: Config | None
    metrics: Sequence[Mapping[str, Any]]  # one mapping a finished step; step 0 is the untouched base
    result: Mapping[str, Any] | None  # result.json; None: not finished
    environment: Mapping[str, Any]
    rollouts: Sequence[Step]
    rollout_steps: int  # steps with stored rollouts, of which the above are a choice
    stopped: bool  # a loss or gradient was not finite
    remarks: Sequence[str]  # what could not be read

    @property
    def method(self) -> str:
        return str(self.settings.get("method", "unknown method"))

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def arm(self) -> str:
        """The method, with what was changed of it in a comparison: ``uft-show.cuts=1`` of the folder ``uft-show.cuts=1-seed0``."""
        changed, seed, _ = self.name.rpartition("-seed")
        return changed if seed and changed.startswith(f"{self.method}-") and "=" in changed else self.method

    @property
    def done(self) -> int:
        """Finished steps."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def total(self) -> int:
        share = self.metrics[-1].get("budget/schedule") if self.metrics else None
        if self.settings["train"].get("budget") and share:
            return max(self.done, round(self.done / share))
        return int(self.settings["train"]["steps"])

    @property
    def base(self) -> Mapping[str, Any] | None:
        """Accuracy of the untouched model: {"accuracy", "low", "high", "n"}; None without held-out rows."""
        first = self.metrics[0].get("base") if self.metrics else None
        return (self.result or {}).get("base") or first or None

    @property
    def watched(self) -> int:
        """Held-out rows of an evaluation while training."""
        rows = self.base["n"] if self.base else 0
        return min(rows, (self.settings.get("eval") or {}).get("subset") or rows)


def run_folders(source: Path) -> list[Path]:
    """The run folder itself, or the runs directly below it, in the order of compare.json, then by name."""
    if not source.is_dir():
        what = "is a file" if source.exists() else "does not exist"
        raise UniftError(f"{source} {what}; expected a run folder, or a folder of runs as `unift compare` leaves it")
    if (source / CONFIG).is_file():
        return [source]
    found = sorted((p.parent for p in source.glob(f"*/{CONFIG}")), key=lambda p: _natural(p.name))
    if not found:
        raise UniftError(
            f"{source} holds no run: found neither {CONFIG} nor folders with one. Expected the folder given to "
            "`unift train --run` or `unift compare --run`"
        )
    try:
        order = [f"{r['method']}-seed{r['seed']}" for r in json.loads((source / "compare.json").read_text())]
    except (OSError, ValueError, KeyError, TypeError):
        order = []
    return sorted(found, key=lambda p: order.index(p.name) if p.name in order else len(order))


def _natural(name: str) -> tuple[str, int]:
    """uft-seed2 before uft-seed10."""
    head = name.rstrip("0123456789")
    return head, int(name[len(head) :] or -1)


def read_run(folder: Path, steps: int = 8, groups: int = 3, samples: int = 4) -> RunData:
    """``steps``, ``groups``, ``samples``: at most so many rollouts (steps, groups of a step, different completions)."""
    remarks: list[str] = []
    settings = read_yaml(folder / CONFIG)
    try:
        int(settings["train"]["steps"])
    except (KeyError, TypeError, ValueError):
        raise UniftError(
            f"{folder / CONFIG} is not the settings of a run: train.steps is missing or no number. It is written by "
            "`unift train`; restore it, or name another folder"
        ) from None
    try:
        config = validate(settings)
        stages(config)
    except ConfigError as error:
        config = None
        remarks.append(f"This version of unift does not accept the stored settings ({error}); advantages are left out.")
    metrics = _metrics(folder / "metrics.jsonl", remarks)
    environment = folder / "environment.json"
    shown, available = choose(folder, config, steps, groups, samples, remarks)
    return RunData(
        folder=folder,
        settings=settings,
        config=config,
        metrics=metrics,
        result=_or_remark(lambda: read_result(folder), remarks) or None,
        environment=_or_remark(lambda: read_object(environment), remarks) if environment.is_file() else {},
        rollouts=shown,
        rollout_steps=available,
        stopped=(folder / "nonfinite").is_dir() and any((folder / "nonfinite").iterdir()),
        remarks=remarks,
    )


def _or_remark(read: Callable[[], dict[str, Any] | None], remarks: list[str]) -> dict[str, Any]:
    """What was read; nothing, and a remark, where it is damaged."""
    try:
        return read() or {}
    except UniftError as error:
        remarks.append(f"{error}.")
        return {}


def _metrics(path: Path, remarks: list[str]) -> list[dict[str, Any]]:
    records = read_metrics(path)
    written = sum(bool(line.strip()) for line in path.read_bytes().splitlines()) if path.is_file() else 0
    if written > len(records):
        remarks.append(
            f"metrics.jsonl: {written - len(records)} of {written} lines left out, from the first that is torn. "
            "The last line of a run that was killed, or is being written, may be."
        )
    return records


@dataclass(frozen=True)
class Setting:
    key: str
    value: str
    default: str
    origin: str  # "this run": in neither the preset nor the defaults; "preset": by the method; "default"


def settings_of(run: RunData) -> list[Setting]:
    """Every setting, those of this run first, then those of the method's preset, then what is left at its default."""
    defaults = Config().model_dump(mode="json")
    preset = _preset(run.method)
    phases, planned = run.settings.get("phases") or [], preset.get("phases") or []
    found = _compared({k: v for k, v in run.settings.items() if k != "phases"}, defaults, preset)
    for number, phase in enumerate(phases):
        plan = planned[number] if number < len(planned) else {}
        blank = Phase(method="", share=1).model_dump(mode="json")
        found += _compared(phase, blank, _preset(str(phase.get("method"))) | plan, f"phase {number + 1}: ")
    rank = ("this run", "preset", "default")
    return sorted(found, key=lambda s: rank.index(s.origin))


def _preset(method: str) -> dict[str, Any]:
    return preset_settings(method) if method in preset_names() else {}


def _compared(
    tree: Mapping[str, Any], defaults: Mapping[str, Any], preset: Mapping[str, Any], head: str = ""
) -> list[Setting]:
    known, planned, found = flat(defaults), flat(preset), []
    for key, value in flat(tree).items():
        default = known.get(key)
        if value == planned.get(key, default):
            origin = "default" if value == default else "preset"
        else:  # also where a recipe sets back to the default what the preset had changed
            origin = "this run"
        found.append(Setting(head + key, text_of(value), text_of(default), origin))
    return found


def text_of(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if value is None or isinstance(value, (bool, list, dict)):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


@dataclass(frozen=True)
class Completion:
    text: str
    tokens: int
    finished: bool  # ended by itself, not at the length limit
    value: float | None  # None: the scorer failed
    correct: bool | None
    parts: Mapping[str, float]
    note: str
    error: str
    advantage: float | None  # None: no score, or settings that this version does not accept
    times: int = 1  # completions of the group with this very text and verdict


@dataclass(frozen=True)
class Group:
    row_id: str
    prompt: str
    hint: str
    cuts: int
    cuts_total: int
    completions: Sequence[Completion]  # the chosen ones, different from each other
    size: int  # completions in the group
    kind: str
    pictures: Sequence[Path] = ()  # small copies of what the prompt shows


@dataclass(frozen=True)
class Step:
    number: int  # as in metrics.jsonl: finished steps, from 1
    groups: Sequence[Group]
    size: int  # groups in the step


KINDS = ("mixed scores", "scorer failed", "all the same, wrong", "all the same, right")


def choose(
    folder: Path, config: Config | None, steps: int, groups: int, samples: int, remarks: list[str]
) -> tuple[list[Step], int]:
    """(at most ``steps`` steps spread evenly over those stored, the number stored). Unreadable ones become remarks."""
    paths = sorted((folder / "rollouts").glob("step_*.jsonl.gz"))
    numbers = {p: int(p.name[5:].split(".")[0]) for p in paths if p.name[5:].split(".")[0].isdigit()}
    paths = list(numbers)
    picked = [paths[i] for i in sorted({round(x) for x in np.linspace(0, len(paths) - 1, min(steps, len(paths)))})]
    found = []
    for path in picked:
        try:
            found.append(_step(path, numbers[path], config, groups, samples))
        except UNREADABLE as error:
            remarks.append(f"rollouts/{path.name} was left out: it cannot be read ({error!r}).")
    return found, len(paths)


def _step(path: Path, step: int, config: Config | None, groups: int, samples: int) -> Step:
    rule = _credit(config, step)
    found: list[Group] = []
    found.extend(_chosen_group(path.parents[1], record, rule) for record in read_records(path)[1:])
    queues = [[g for g in found if g.kind == kind] for kind in KINDS]
    picked: list[Group] = []
    while len(picked) < groups and any(queues):  # one of each kind before a second of any
        picked += [q.pop(0) for q in queues if q]
    return Step(step + 1, [_fewer(g, samples) for g in picked[:groups]], len(found))


def _credit(config: Config | None, step: int) -> Credit | None:
    if config is None or (config.train.budget and config.phases):  # steps do not say which phase they were of
        return None
    return next((s.rules.credit for s in stages(config) if s.start <= step < s.stop), None)


def _chosen_group(folder: Path, record: Mapping[str, Any], rule: Credit | None) -> Group:
    samples = record["samples"]
    scored = [s for s in samples if s["score"]]
    values = [float(s["score"]["value"]) for s in scored]
    # As in the loop: a sample whose scorer failed takes no part in its group's statistics.
    worth = iter(advantages(values, rule) if rule else [None] * len(values))
    merged: dict[tuple[Any, ...], Completion] = {}
    for s in samples:
        score = s["score"] or {}
        one = Completion(
            text=str(s["completion"]),
            tokens=len(s["tokens"]),
            finished=bool(s["finished"]),
            value=score.get("value"),
            correct=score.get("correct"),
            parts=score.get("parts") or {},
            note=str(score.get("note") or ""),
            error=str(s["error"] or ""),
            advantage=next(worth) if s["score"] else None,
        )
        key = (one.text, one.finished, one.value, one.correct, one.error)
        before = merged.get(key)
        merged[key] = replace(before, times=before.times + 1) if before else one
    return Group(
        row_id=str(record["row_id"]),
        prompt=str(record["prompt"]),
        hint=str(record["hint"]),
        cuts=int(record["cuts"]),
        cuts_total=int(record["cuts_total"]),
        completions=list(merged.values()),
        size=len(samples),
        kind=_kind(samples, values),
        pictures=_pictures(folder, record),
    )


def _pictures(folder: Path, record: Mapping[str, Any]) -> list[Path]:
    """Files that lie in the run's own folder of pictures, whatever the record says."""
    names = [Path(str(name)).name for name in record.get("pictures", [])]
    return [path for name in names if (path := folder / PICTURES / name).is_file()]


def _kind(samples: Sequence[Mapping[str, Any]], values: Sequence[float]) -> str:
    if len(set(values)) > 1:
        return KINDS[0]
    if len(values) < len(samples):
        return KINDS[1]
    return KINDS[3] if values and values[0] >= 1 else KINDS[2]


def _fewer(group: Group, limit: int) -> Group:
    """The best, the worst and a failed one come first; then in the order of the file. Shown from best to worst."""
    ranked = sorted(group.completions, key=lambda c: (c.value is None, -(c.value or 0.0)))
    scored = [c for c in ranked if c.value is not None]
    failed = [c for c in ranked if c.value is None]
    wanted = [*scored[:1], *scored[1:][-1:], *failed[:1], *group.completions]
    keep: list[Completion] = []
    for one in wanted:
        if not any(one is other for other in keep):
            keep.append(one)
    keep = keep[:limit]
    return replace(group, completions=[c for c in ranked if any(c is k for k in keep)])
