"""The loop, top to bottom:

    rows -> prompts with hints -> groups of completions -> scores -> advantages -> packs -> optimizer steps

Which rows, hints and tokens are functions of (seed, step, row, sample), so continuing a run needs weights, optimizer
state and a step number, and nothing else. Groups that were sampled and scored are on disk before they train.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unift import checkpoint, credit, dataset, evaluate, hints, rng, update
from unift import config as configuration
from unift import policy as policies
from unift.batch import PackedBatch, items_of
from unift.config import Config, Phase
from unift.encode import Encoded
from unift.engines.native import Request
from unift.policy import Policy
from unift.rewards import Scorer, score_groups
from unift.run import open_run, trackers, write_result
from unift.types import Group, Row, UniftError

Report = Callable[[dict[str, Any], int], None]


def train(config: Config, folder: Path, report: Report = lambda metrics, total: None) -> dict[str, Any]:
    """Run, or continue, the run in ``folder``; returns its result (also written to ``result.json``)."""
    torch.set_num_threads(config.threads or torch.get_num_threads())
    tokenizer = policies.load_tokenizer(config.model)
    data = dataset.load(config)
    train_rows, test_rows = dataset.encode(tokenizer, data, config)
    finished = open_run(folder, config, data.fingerprint)
    if finished is not None:
        return finished
    reward = config.reward
    with (
        Scorer(
            reward.function,
            workers=reward.workers,
            timeout=reward.timeout,
            error_rate=reward.error_rate,
            format_score=reward.format_score,
            rule=reward.rule,
            memory_mb=reward.memory_mb,
        ) as scorer,
        trackers(config, folder) as track,
    ):
        scorer.check(data.train[0])
        torch.manual_seed(config.seed)  # LoRA's initial values; nothing else draws from torch
        policy = policies.load(config.model, tokenizer)
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
        self.counters = {"tokens_sampled": 0, "tokens_trained": 0, "seconds": 0.0, "best": -1.0, "best_step": 0, "seen": 0}
        self.saving = 0.0  # seconds of the checkpoint after the last step, which the next step's metrics report
        self.metrics_file = folder / "metrics.jsonl"

    # ------------------------------------------------------------------------------------------ the whole run

    def go(self) -> dict[str, Any]:
        saved = checkpoint.steps_saved(self.folder)
        done = saved[-1] if saved else 0
        base = self._begin(done)
        for start, stop, settings in self.spans:
            if stop <= done:
                continue
            optimizer = update.make_optimizer(self.policy, settings.train)
            reference = self._reference(start, settings)
            if done > start:
                self.counters |= checkpoint.restore(self.folder, done, self.policy, optimizer)["counters"]
            elif done == start and done > 0:
                self.counters |= checkpoint.restore(self.folder, done, self.policy, None)["counters"]
            for step in range(max(start, done), stop):
                began = time.perf_counter()
                metrics = self.step(step, start, stop, settings, optimizer, reference)
                finished = step + 1
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
        if self.config.save.rollouts:
            (self.folder / "rollouts").mkdir(exist_ok=True)
        earlier = checkpoint.rewind_metrics(self.metrics_file, done)
        if earlier and earlier[0]["step"] == 0:
            for record in earlier:
                self.report(record, self.total)
            return earlier[0]["base"]
        base = asdict(self._greedy(self.data.test, self.test_encoded)) if self.data.test else {}
        self._log(0, {"base": base} | ({"eval/test/accuracy": base["accuracy"]} if base else {}))
        return base

    def _finish(self, base: dict[str, Any]) -> dict[str, Any]:
        result: dict[str, Any] = {
            "method": self.config.method,
            "seed": self.config.seed,
            "steps": self.total,
            "seconds": self.counters["seconds"],
            "tokens_sampled": self.counters["tokens_sampled"],
            "tokens_trained": self.counters["tokens_trained"],
            "reward_seen": self.counters["seen"],
            "base": base,
            "scorer": dict(self.scorer.counts),
        }
        if self.data.test:
            result["test"] = asdict(self._greedy(self.data.test, self.test_encoded))
            if self.config.eval.samples:
                s = self.config.eval.samples
                args = (self.policy, self.scorer, self.data.test, self.test_encoded, self._eval_tokens(), s)
                result["test"]["pass@k"] = evaluate.pass_curve(*args, self.config.seed)
        first = slice(0, 500)
        result["train"] = asdict(self._greedy(self.data.train[first], self.encoded[first]))
        policies.save_pretrained(self.policy, self.folder / "model")
        write_result(self.folder, result)
        return result

    # ------------------------------------------------------------------------------------------ one step

    def step(
        self,
        step: int,
        start: int,
        stop: int,
        settings: Config | Phase,
        optimizer: torch.optim.Optimizer,
        reference: Callable[[PackedBatch], Tensor] | None,
    ) -> dict[str, Any]:
        """Everything between two optimizer states. ``step`` counts from 0 over the run, schedules from ``start``."""
        clock = Clock()
        groups = self._groups(step, start, stop, settings, clock)
        scores = [[s.score.value for s in g.samples if s.score is not None] for g in groups]
        advantages = [credit.advantages(r, settings.credit) for r in scores]
        demos = [self.encoded[g.row].solution for g in groups] if settings.likelihood.tokens == "demo" else None
        for group in groups:  # a sample whose scorer failed takes no part
            group.samples = [s for s in group.samples if s.score is not None]
        items = items_of(groups, advantages, demos)
        updates = update.prepare(self.policy, items, settings, reference)
        clock.lap("reference")
        lr = update.learning_rate(settings.train, step - start, stop - start)
        every = self.config.log.gradients_every
        measure = bool(every) and step % every == 0
        dump = self.folder / "nonfinite" / f"{checkpoint.step_name(step)}.pt"
        parts = [
            update.apply(self.policy, optimizer, packs, settings, lr, measure, dump) for packs in updates
        ]
        clock.lap("update")
        metrics: dict[str, Any] = {k: float(np.mean([p[k] for p in parts if k in p])) for k in parts[0]}
        for name in ("tokens/forwarded", "tokens/supervised"):
            metrics[name] = sum(p[name] for p in parts)
        sampled = sum(len(s.tokens) for g in groups for s in g.samples)
        plain = sum(len(i.prompt + i.hint) * max(len(i.members), 1) + sum(len(m.tokens) for m in i.members) for i in items)
        self.counters["tokens_sampled"] += sampled
        self.counters["tokens_trained"] += int(metrics["tokens/supervised"])
        self.counters["seen"] += sum(r >= 1 for group in scores for r in group)
        metrics |= group_metrics(groups, scores, settings)
        metrics |= {
            "hint/prob": hints.probability(settings.show, step - start, stop - start),
            "tokens/sampled": self.counters["tokens_sampled"],
            "tokens/trained": self.counters["tokens_trained"],
            "tokens/shared_ratio": 1 - metrics["tokens/forwarded"] / max(plain, 1),
            "tokens/per_second": (sampled or metrics["tokens/supervised"]) / clock.total(),
            **clock.laps,
            "time/checkpoint": self.saving,
            "time/step": clock.total(),
        }
        if settings.sample.completions:
            metrics |= {f"reward/{k}": v for k, v in self.scorer.counts.items() if k != "total"}
        return metrics

    def _groups(self, step: int, start: int, stop: int, settings: Config | Phase, clock: Clock) -> list[Group]:
        """The step's groups with scores: from disk if these very weights sampled them before a kill, else sampled now."""
        seed, n = self.config.seed, settings.train.prompts
        keep = self.config.save.rollouts and settings.sample.completions > 0
        weights = checkpoint.fingerprint(self.policy) if keep else ""
        clock.lap("save")
        if keep:
            stored = checkpoint.read_rollouts(self.folder, step)
            if stored is not None and stored[0] == weights:
                clock.lap("generate")
                return stored[1]
        groups = []
        for index in hints.rows_of_step(seed, step, n, len(self.encoded)):
            row, e = self.data.train[index], self.encoded[index]
            k = hints.draw(settings.show, seed, step - start, stop - start, row.id, e.n_steps)
            shown = e.hint(k, settings.show.cuts)
            groups.append(Group(index, row.id, e.prompt, shown, k, min(settings.show.cuts, e.n_steps)))
        if settings.sample.completions == 0:
            return groups
        shape = (settings.sample.completions, settings.sample.max_tokens)
        # The position in the batch is part of the address: a small data set may bring a row twice in one step.
        requests = [
            Request(g.prompt + g.hint, rng.uniforms("sample", seed, step, i, g.row_id, shape=shape))
            for i, g in enumerate(groups)
        ]
        sampled = evaluate.complete(self.policy, requests, settings.sample.max_tokens, settings.sample.temperature)
        for group, samples in zip(groups, sampled, strict=True):
            group.samples = samples
        clock.lap("generate")
        hint_texts = self.policy.tokenizer.batch_decode([g.hint for g in groups], skip_special_tokens=True)
        score_groups(self.scorer, self.data.train, groups, hint_texts)
        clock.lap("score")
        if keep:
            prompts = self.policy.tokenizer.batch_decode([g.prompt for g in groups], skip_special_tokens=True)
            texts = list(zip(prompts, hint_texts, strict=True))
            checkpoint.write_rollouts(self.folder, step, weights, groups, texts)
            clock.lap("save")
        return groups

    # ------------------------------------------------------------------------------------------ pieces

    def _reference(self, start: int, settings: Config | Phase) -> Callable[[PackedBatch], Tensor] | None:
        """Log-probs under the weights that the phase began with; with LoRA, the adapters switched off."""
        if settings.reference.kl == 0:
            return None
        t = settings.sample.temperature
        if self.policy.lora and start == 0:

            def without_adapters(batch: PackedBatch) -> Tensor:
                with self.policy.model.disable_adapter():  # type: ignore[operator]
                    return policies.logprobs(self.policy, batch, t)[0]

            return without_adapters
        frozen = replace(self.policy, model=copy.deepcopy(self.policy.model), tokenizer=None)
        if start > 0:
            checkpoint.restore(self.folder, start, frozen, None)
        frozen.model.requires_grad_(False)
        return lambda batch: policies.logprobs(frozen, batch, t)[0]

    def _due(self, every: int, finished: int, stop: int) -> bool:
        return finished == stop or (every > 0 and finished % every == 0)

    def _eval_tokens(self) -> int:
        return self.config.eval.max_tokens or max(s.sample.max_tokens for _, _, s in self.spans)

    def _greedy(self, rows: Sequence[Row], encoded: Sequence[Encoded]) -> evaluate.Accuracy:
        return evaluate.greedy(self.policy, self.scorer, rows, encoded, self._eval_tokens())

    def _accuracy(self) -> float:
        return self._greedy(self.data.test, self.test_encoded).accuracy if self.data.test else 0.0

    def _log(self, step: int, metrics: dict[str, Any]) -> None:
        record = {"step": step, **metrics}
        checkpoint.append_metrics(self.metrics_file, record)
        self.track(record, step)
        self.report(record, self.total)

    def _save(self, finished: int, optimizer: torch.optim.Optimizer) -> None:
        state = {
            "counters": self.counters,
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


def group_metrics(groups: Sequence[Group], scores: Sequence[Sequence[float]], settings: Config | Phase) -> dict[str, Any]:
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
        by_hint.setdefault(group.cuts, []).extend(values)
    return metrics | {f"reward/by_hint/{k}": float(np.mean(v)) for k, v in sorted(by_hint.items()) if v}


def read_result(folder: Path) -> dict[str, Any]:
    path = folder / "result.json"
    if not path.is_file():
        raise UniftError(f"{folder} has no result.json: the run is not finished. Continue it with the same command")
    return json.loads(path.read_text())
