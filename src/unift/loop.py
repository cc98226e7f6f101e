"""The loop, top to bottom:

    rows -> prompts with hints -> groups of completions -> scores -> advantages -> packs -> optimizer steps

Which rows, hints and tokens are functions of (seed, step, row, sample), so continuing a run needs weights, optimizer
state and a step number, and nothing else. Groups that were sampled and scored are on disk before they train.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from unift import (
    assign,
    checkpoint,
    critic,
    dataset,
    evaluate,
    hints,
    inputs,
    needs,
    processes,
    sampling,
    schedule,
    update,
)
from unift import config as configuration
from unift import policy as policies
from unift.batch import DEMO, Item, Member
from unift.config import Config, Phase
from unift.encode import Encoded
from unift.memory import Memory
from unift.policy import Policy
from unift.reference import Reference
from unift.rewards import Scorer, count_outcomes
from unift.run import check_trackers, claim, open_run, trackers, write_result
from unift.tasks import answer_rule, check_format
from unift.types import ConfigError, Group, Row, UniftError

T = TypeVar("T")
Report = Callable[[dict[str, Any], int], None]


def train(config: Config, folder: Path, report: Report = lambda metrics, total: None) -> dict[str, Any]:
    """Run, or continue, the run in ``folder``; returns its result (also written to ``result.json``).

    Under torchrun or accelerate launch every process calls this; they share the work and all return the result.
    """
    check_trackers(config)
    torch.set_num_threads(config.threads or torch.get_num_threads())
    with processes.joined(policies.pick_device(config.model.device).type == "cuda"):
        return _train(config, folder, report)


def _train(config: Config, folder: Path, report: Report) -> dict[str, Any]:
    tokenizer = policies.load_tokenizer(config.model)
    data = dataset.load(config)
    train_rows, test_rows = dataset.encode(tokenizer, data, config)
    processes.agree("settings and rows", (configuration.config_hash(config), data.fingerprint))
    with claim(folder):
        finished = processes.lead("the run folder", lambda: open_run(folder, config, data.fingerprint))
        if finished is not None:
            return finished
        reward = config.reward
        answer = answer_rule(data.train, reward.answer, reward.rule)
        check_format(data.train, reward.function, reward.rule, answer)
        with (
            Scorer(
                reward.function,
                workers=reward.workers,
                timeout=reward.timeout,
                error_rate=reward.error_rate,
                format_score=reward.format_score,
                rule=reward.rule,
                answer=answer,
                memory_mb=reward.memory_mb,
            ) as scorer,
            trackers(config, folder) as track,
        ):
            scorer.check(data.train[0])
            torch.manual_seed(config.seed)  # LoRA's initial values; nothing else draws from torch
            policy = policies.load(config.model, tokenizer, configuration.longest(config))
            run = Run(config, folder, policy, scorer, data, train_rows, test_rows, report, track)
            return run.go()


class Run:
    """State of a run between steps: what a checkpoint holds, and what was loaded once."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        policy: Policy,
        scorer: Scorer,
        data: dataset.Dataset,
        train_rows: list[Encoded],
        test_rows: list[Encoded],
        report: Report,
        track: Callable[[dict[str, Any], int], None],
    ) -> None:
        self.config, self.folder, self.policy, self.scorer = config, folder, policy, scorer
        self.data, self.encoded, self.test_encoded = data, train_rows, test_rows
        self.report, self.track = report, track
        self.spans = configuration.plan(config)
        self.total = self.spans[-1][1]
        self.counters = {
            "tokens_sampled": 0, "tokens_trained": 0, "seconds": 0.0, "training": 0.0, "best": -1.0, "best_step": 0, "seen": 0
        }  # fmt: skip
        self.scored = dict.fromkeys(scorer.counts, 0)  # outcomes of training completions
        self.judged = dict.fromkeys(scorer.counts, 0)  # outcomes in evaluations
        columns = {s.sample.rejected for _, _, s in self.spans if s.sample.rejected}
        self.rejected = dataset.encode_column(policy.tokenizer, data.train, columns, config.data.max_prompt)
        self.saving = 0.0  # seconds of the checkpoint after the last step, which the next step's metrics report
        self.metrics_file = folder / "metrics.jsonl"
        self.memory = Memory()

    # ------------------------------------------------------------------------------------------ the whole run

    def go(self) -> dict[str, Any]:
        for _, _, settings in self.spans:
            check_forward(self.policy, settings)
        saved = processes.lead("the list of checkpoints", lambda: checkpoint.steps_saved(self.folder))
        done = saved[-1] if saved else 0
        base = self._begin(done)
        for start, stop, settings in self.spans:
            if stop <= done:
                continue
            self.policy.critic = critic.new_critic(self.policy) if needs.critic(settings) else None
            optimizer = update.make_optimizer(self.policy, settings.train)
            reference = self._reference(start, settings)
            self.memory = Memory()
            if done > 0:  # at the start of a phase, too: each begins from the checkpoint, with a new optimizer
                self._restore(done, optimizer if done > start else None)
            for step in range(max(start, done), stop):
                began = time.perf_counter()
                metrics = self.step(step, start, stop, settings, optimizer, reference)
                finished = step + 1
                self.counters["training"] += metrics["time/step"]
                if self._due(self.config.eval.every, finished, stop):
                    metrics["eval/test/accuracy"] = self._accuracy()
                    if metrics["eval/test/accuracy"] > self.counters["best"]:
                        self.counters |= {"best": metrics["eval/test/accuracy"], "best_step": finished}
                self.counters["seconds"] += time.perf_counter() - began
                self._log(finished, metrics | {"time/elapsed": self.counters["seconds"]})
                saving = time.perf_counter()
                if self._due(self.config.save.every, finished, stop):
                    self._save(finished, optimizer)
                self.saving = time.perf_counter() - saving
            done = max(done, stop)
        return self._finish(base)

    def _begin(self, done: int) -> dict[str, Any]:
        """Evaluate the untouched model, or read what an earlier attempt measured."""
        earlier = processes.lead("the metrics so far", lambda: checkpoint.rewind_metrics(self.metrics_file, done))
        if earlier and earlier[0]["step"] == 0:
            for record in earlier if processes.first() else ():
                self.report(record, self.total)
            self.judged |= earlier[0].get("judged", {})  # a checkpoint, if there is one, knows more
            return earlier[0]["base"]
        base = asdict(self._greedy(self.data.test, self.test_encoded)) if self.data.test else {}
        first_line = {"forward": self.policy.path, "base": base, "judged": dict(self.judged)}
        self._log(0, first_line | ({"eval/test/accuracy": base["accuracy"]} if base else {}))
        return base

    def _finish(self, base: dict[str, Any]) -> dict[str, Any]:
        result: dict[str, Any] = {
            "method": self.config.method,
            "seed": self.config.seed,
            "steps": self.total,
            "seconds": self.counters["seconds"],  # evaluations included
            "seconds_training": self.counters["training"],
            "tokens_sampled": self.counters["tokens_sampled"],
            "tokens_trained": self.counters["tokens_trained"],
            "reward_seen": self.counters["seen"],
            "base": base,
        }
        if self.data.test:
            result["test"] = asdict(self._greedy(self.data.test, self.test_encoded))
            if self.config.eval.samples:
                s = self.config.eval.samples
                args = (self.policy, self.scorer, self.data.test, self.test_encoded, self._eval_tokens(), s)
                result["test"]["pass@k"] = self._judge(lambda: evaluate.pass_curve(*args, self.config.seed))
        first = slice(0, 500)
        result["train"] = asdict(self._greedy(self.data.train[first], self.encoded[first]))
        self.track(
            {f"result/{k}/accuracy": result[k]["accuracy"] for k in ("test", "train") if k in result}, self.total
        )
        result["scorer"] = {"train": self.scored, "eval": self.judged}

        def write() -> None:
            with checkpoint.writing("the final model", self.folder):
                policies.save_pretrained(self.policy, self.folder / "model")
            write_result(self.folder, result)

        processes.lead("the final model", write)
        return result

    # ------------------------------------------------------------------------------------------ one step

    def step(
        self,
        step: int,
        start: int,
        stop: int,
        settings: Config | Phase,
        optimizer: torch.optim.Optimizer,
        reference: Reference | None,
    ) -> dict[str, Any]:
        """Everything between two optimizer states. ``step`` counts from 0 over the run, schedules from ``start``."""
        clock = Clock()
        groups = self._groups(step, start, stop, settings, clock, reference)
        for name, n in count_outcomes(groups).items():
            self.scored[name] += n
        for group in groups:  # a sample whose scorer failed takes no part
            group.samples = [s for s in group.samples if s.score is not None]
        scores = [[s.score.value for s in g.samples if s.score is not None] for g in groups]
        settings = schedule.at(settings, step - start, stop - start, groups)
        place = (self.config.seed, step)
        items = assign.items(groups, self.encoded, self.rejected, settings, self.policy, reference, self.memory, place)
        updates = update.prepare(self.policy, items, settings, reference)
        waited = self.memory.collect(groups, settings.likelihood)
        if waited:  # an update of the likelihood alone
            alone = [Item(self.encoded[r].prompt, [], [Member(self.encoded[r].solution, DEMO)]) for r in waited]
            updates += update.prepare(self.policy, alone, schedule.one_update(settings), reference)
        own_length = settings.show.schedule in ("adaptive", "bisection")
        shown = self.memory.mean_share(groups, settings.show) if own_length else None
        self.memory.see(groups, settings.show)
        clock.lap("reference")
        lr = update.learning_rate(settings.train, step - start, stop - start)
        every = self.config.log.gradients_every
        measure = bool(every) and step % every == 0
        own = "" if processes.first() else f"-process{processes.rank()}"
        dump = self.folder / "nonfinite" / f"{checkpoint.step_name(step)}{own}.pt"
        parts = [update.apply(self.policy, optimizer, packs, settings, lr, measure, dump) for packs in updates]
        clock.lap("update")
        metrics: dict[str, Any] = {k: float(np.mean([p[k] for p in parts if k in p])) for k in parts[0]}
        for name in ("tokens/forwarded", "tokens/supervised"):
            metrics[name] = sum(p[name] for p in parts)
        sampled = sum(s.sampled for g in groups for s in g.samples) + sum(g.discarded for g in groups)
        plain = sum(
            len(i.prompt + i.hint) * max(len(i.members), 1) + sum(len(m.tokens) for m in i.members) for i in items
        )
        self.counters["tokens_sampled"] += sampled
        self.counters["tokens_trained"] += int(metrics["tokens/supervised"])
        self.counters["seen"] += sum(r >= 1 for group in scores for r in group)
        metrics |= group_metrics(groups, scores, settings)
        metrics |= {
            "hint/prob": hints.probability(settings.show, step - start, stop - start) if shown is None else shown,
            "tokens/sampled": self.counters["tokens_sampled"],
            "tokens/trained": self.counters["tokens_trained"],
            "tokens/shared_ratio": 1 - metrics["tokens/forwarded"] / max(plain, 1),
            "tokens/per_second": (sampled or metrics["tokens/supervised"]) / clock.total(),
            **clock.laps,
            "time/checkpoint": self.saving,
            "time/step": clock.total(),
        }
        if settings.sample.completions:
            metrics |= {f"reward/{k}": v for k, v in self.scored.items() if k != "total"}
        return metrics

    def _groups(
        self,
        step: int,
        start: int,
        stop: int,
        settings: Config | Phase,
        clock: Clock,
        reference: Reference | None = None,
    ) -> list[Group]:
        """The step's groups with scores: from disk if these very weights sampled them before a kill, else sampled now."""
        seed, n = self.config.seed, settings.train.prompts
        keep = self.config.save.rollouts and settings.sample.completions > 0
        weights = ""
        if keep:
            weights, stored = processes.lead("stored rollouts", lambda: self._stored(step))
            clock.lap("save")
            if stored is not None:
                clock.lap("generate")
                return stored
        here = (settings, seed, step, (start, stop - start), clock)
        groups = self._sampled(hints.rows_of_step(seed, step, n, len(self.encoded)), 0, *here, reference)
        if settings.sample.completions == 0:
            return groups
        for attempt in range(1, settings.sample.refill + 1):
            silent = [i for i, g in enumerate(groups) if sampling.without_signal(g)]
            if not silent:
                break
            others = hints.refill_rows(seed, step, attempt, len(silent), len(self.encoded))
            for i, fresh in zip(silent, self._sampled(others, attempt, *here, reference), strict=True):
                spent = groups[i].discarded
                if sampling.without_signal(fresh):
                    groups[i].discarded = spent + sum(s.sampled for s in fresh.samples)
                else:
                    fresh.discarded = spent + sum(s.sampled for s in groups[i].samples)
                    groups[i] = fresh
        hint_texts = self.policy.tokenizer.batch_decode([g.hint for g in groups], skip_special_tokens=True)
        if keep and processes.first():
            prompts = self.policy.tokenizer.batch_decode([g.prompt for g in groups], skip_special_tokens=True)
            texts = list(zip(prompts, hint_texts, strict=True))
            checkpoint.write_rollouts(self.folder, step, weights, groups, texts)
            clock.lap("save")
        return groups

    # ------------------------------------------------------------------------------------------ pieces

    def _stored(self, step: int) -> tuple[str, list[Group] | None]:
        """The fingerprint of the weights, and the groups of the step if they were sampled by these weights."""
        weights, stored = checkpoint.fingerprint(self.policy), checkpoint.read_rollouts(self.folder, step)
        return weights, stored[1] if stored is not None and stored[0] == weights else None

    def _sampled(
        self,
        rows: Sequence[int],
        attempt: int,
        settings: Config | Phase,
        seed: int,
        step: int,
        phase: tuple[int, int],
        clock: Clock,
        reference: Reference | None,
    ) -> list[Group]:
        """Groups of these rows with completions and scores.

        Every process draws all rows and hints, samples and scores its share of the groups, and gets those of the others.
        """
        groups = sampling.begin(rows, self.data.train, self.encoded, settings, self.memory, seed, step, phase)
        if settings.sample.completions == 0:
            return groups
        places = processes.share(len(groups))
        own = [groups[i] for i in places]
        if settings.sample.source == "reference":
            assert reference is not None
            with reference.policy() as frozen:
                sampling.complete(frozen, own, places, settings, seed, step, attempt)
        else:
            sampling.complete(self.policy, own, places, settings, seed, step, attempt)
        clock.lap("generate")
        sampling.score(self.scorer, self.data.train, own, settings, self.policy)
        clock.lap("score")
        if processes.size() > 1:
            groups = processes.interleave(processes.gather("the groups of a step", own))
            clock.lap("wait")
        return groups

    def _reference(self, start: int, settings: Config | Phase) -> Reference | None:
        if not needs.reference(settings):
            return None
        return Reference(self.policy, self.folder, start, settings.sample.temperature)

    def _due(self, every: int, finished: int, stop: int) -> bool:
        return finished == stop or (every > 0 and finished % every == 0)

    def _eval_tokens(self) -> int:
        return self.config.eval.max_tokens or max(s.sample.max_tokens for _, _, s in self.spans)

    def _greedy(self, rows: Sequence[Row], encoded: Sequence[Encoded]) -> evaluate.Accuracy:
        return self._judge(lambda: evaluate.greedy(self.policy, self.scorer, rows, encoded, self._eval_tokens()))

    def _judge(self, evaluation: Callable[[], T]) -> T:
        """The evaluation's result; what became of its completions, in all processes, is added to ``judged``."""
        before = list(self.scorer.counts.values())
        result = evaluation()
        new = [n - old for n, old in zip(self.scorer.counts.values(), before, strict=True)]
        for name, n in zip(self.scorer.counts, processes.sums("an evaluation", new), strict=True):
            self.judged[name] += int(n)
        return result

    def _accuracy(self) -> float:
        return self._greedy(self.data.test, self.test_encoded).accuracy if self.data.test else 0.0

    def _log(self, step: int, metrics: dict[str, Any]) -> None:
        if not processes.first():
            return
        record = {"step": step, **metrics}
        checkpoint.append_metrics(self.metrics_file, record)
        self.track(record, step)
        self.report(record, self.total)

    def _restore(self, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        stored = checkpoint.restore(self.folder, step, self.policy, optimizer)
        self.counters |= stored["counters"]
        self.scored |= stored["scorer"]["train"]
        self.judged |= stored["scorer"]["eval"]
        recent = stored["scorer"]["recent"]
        if optimizer is not None:  # a phase begins without memory of its rows
            self.memory = Memory.load(stored.get("memory"))
        self.scorer.recall([recent[i] for i in processes.share(len(recent))])

    def _save(self, finished: int, optimizer: torch.optim.Optimizer) -> None:
        if processes.size() > 1:
            processes.agree(f"weights after step {finished} (checksum)", checkpoint.fingerprint(self.policy))
        recent = processes.interleave(processes.gather("a checkpoint", self.scorer.recent))
        processes.lead("a checkpoint", lambda: self._write(finished, optimizer, recent))

    def _write(self, finished: int, optimizer: torch.optim.Optimizer, recent: list[Any]) -> None:
        state = {
            "counters": self.counters,
            "scorer": {"train": self.scored, "eval": self.judged, "recent": recent},
            "memory": self.memory.dump(),
            "data": self.data.fingerprint,
            "config": configuration.config_hash(self.config),
            "seed": self.config.seed,
        }
        checkpoint.save(self.folder, finished, self.policy, optimizer, state)
        starts = [start for start, _, _ in self.spans]
        best = self.counters["best_step"]
        if best == finished:
            checkpoint.write_atomic(self.folder / "checkpoints" / "best", checkpoint.step_name(best))
        checkpoint.prune(self.folder, self.config.save.keep, [*starts, best])


def check_forward(policy: Policy, settings: Config | Phase) -> None:
    """A critic and changed inputs read and write inside the trunk, which the plain path leaves to the model."""
    wants = "a critic" if needs.critic(settings) else "changed input embeddings" if inputs.active(settings) else ""
    if wants and not policy.shared:
        raise ConfigError(
            f"method {settings.method} needs {wants}, which works on the shared-prefix path only; this model takes the "
            f"plain one: {policy.why_plain}. Use another method or another model"
        )


class Clock:
    """Seconds of the parts of a step, as ``time/<name>``."""

    def __init__(self) -> None:
        self.began = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[f"time/{name}"] = self.laps.get(f"time/{name}", 0.0) + now - self.last
        self.last = now

    def total(self) -> float:
        return time.perf_counter() - self.began


def group_metrics(
    groups: Sequence[Group], scores: Sequence[Sequence[float]], settings: Config | Phase
) -> dict[str, Any]:
    """What the groups show: reward, groups without signal by cause, hints, lengths."""
    shown = [g.cuts / g.cuts_total if g.cuts_total else 0.0 for g in groups]
    metrics: dict[str, Any] = {
        "hint/fraction": float(np.mean(shown)),
        "hint/tokens": float(np.mean([len(g.hint) for g in groups])),
    }
    if settings.sample.completions == 0:
        return metrics
    rewards = [r for group in scores for r in group]
    flat = [len(set(group)) <= 1 for group in scores]
    samples = [s for g in groups for s in g.samples]
    ended = [len(s.tokens) for s in samples if s.finished]
    metrics |= {
        "reward": float(np.mean(rewards)) if rewards else 0.0,
        "reward_std": float(np.mean([np.std(g) for g in scores if g])) if rewards else 0.0,
        "frac_reward_zero_std": float(np.mean(flat)),
        "groups/all_right": float(np.mean([bool(g) and min(g) >= 1 for g in scores])),
        "groups/all_wrong": float(np.mean([bool(g) and max(g) < 1 for g in scores])),
        "completions/mean_length": float(np.mean([len(s.tokens) for s in samples])) if samples else 0.0,
        "completions/clipped_ratio": float(np.mean([not s.finished for s in samples])) if samples else 0.0,
        "completions/mean_terminated_length": float(np.mean(ended)) if ended else 0.0,
    }
    by_hint: dict[int, list[float]] = {}
    for group, values in zip(groups, scores, strict=True):
        if settings.show.unit == "cuts":
            by_hint.setdefault(group.cuts, []).extend(values)
    return metrics | {f"reward/by_hint/{k}": float(np.mean(v)) for k, v in sorted(by_hint.items()) if v}


def read_result(folder: Path) -> dict[str, Any]:
    path = folder / "result.json"
    if not path.is_file():
        raise UniftError(f"{folder} has no result.json: the run is not finished. Continue it with the same command")
    return json.loads(path.read_text())
