"""The loop: rows -> hints -> groups of completions -> scores -> credit -> packs -> loss -> one optimizer step.

Which rows, hints and tokens are functions of (seed, step, row, sample); weights, optimizer and row memory are the whole
state, and what was sampled is on disk before it trains. ``step.py`` is what happens in a step.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from unift import processes
from unift.config import launcher, needs
from unift.config.identity import config_hash
from unift.config.sections import Config, Rules
from unift.config.stages import Moment, Stage, longest, stages
from unift.files import sync, writing
from unift.model import checkpointing, critic, quantize
from unift.model.limits import check_positions, longest_context, use_threads
from unift.model.load import load_policy, load_tokenizer, pick_device, save_adapter, save_pretrained
from unift.model.policy import Policy
from unift.rewards import open_scorer
from unift.rows import dataset
from unift.rows.tasks.format import check_format, meant_right
from unift.sampling.ahead import Drawing
from unift.sampling.engines.choose import open_engine
from unift.training import evaluate
from unift.training.evaluate import Answers, Judge
from unift.training.optimizer import check_optimizers, make_optimizer
from unift.training.progress import Metrics, Report, Run, State, Watch, silent, unwatched
from unift.training.reference import Reference
from unift.training.row_memory import RowMemory
from unift.training.run import check_trackers, checkpoint, claim, open_run, rollouts, trackers, write_result
from unift.training.run.metrics import append_metrics, rewind_metrics
from unift.training.step import one_step
from unift.types import ConfigError, Given, Stopped, UniftError

T = TypeVar("T")


def train(
    config: Config, folder: Path, report: Report = silent, given: Given | None = None, watch: Watch = unwatched
) -> dict[str, Any]:
    """Run, or continue, the run in ``folder``; returns its result (also written to ``result.json``).

    ``given``: rows and reward that the settings cannot name. ``watch`` is told how far an evaluation is. Under torchrun or
    accelerate launch every process calls this; they share the work and all return the result.
    Raises Stopped once a signal, or a true answer of ``report``, asked for it and the run was saved.
    """
    given = given or Given()
    check_trackers(config)
    check_optimizers(config, launcher.shards(config.model) and processes.size() > 1)
    use_threads(config.threads)
    device = pick_device(config.model.device)
    quantize.check(config.model, device)
    with processes.joined(device.type == "cuda"), asked_to_stop() as asked:
        tokenizer = load_tokenizer(config.model)
        data = dataset.encode(tokenizer, dataset.load(config, given.rows), config)
        check_positions(config, data)
        processes.agree("settings and rows", (config_hash(config), data.fingerprint))
        with claim(folder):
            finished = processes.lead("the run folder", lambda: open_run(folder, config, data.fingerprint))
            if finished is not None:
                return finished
            with open_scorer(config.reward, data.train.rows, given.reward) as scorer, trackers(config, folder) as track:
                judged_rows = meant_right(data.train.rows, config.sample.label)
                check_format(judged_rows, config.reward.function, config.reward.rule, scorer.answer)
                doubts = scorer.check(data.train.rows[0]).warnings
                if doubts and processes.first():
                    print(f"note: {'; '.join(doubts)}. unift doctor looks at more rows", file=sys.stderr, flush=True)
                policy = load(config, tokenizer)
                with open_engine(config.engine, policy, folder, longest_context(config, data)) as engine:
                    with memory_told(config):
                        return run_to_end(
                            Run(config, folder, policy, engine, scorer, data, report, track, watch), asked
                        )


def load(config: Config, tokenizer: Any, frozen: bool = False) -> Policy:
    """The policy that a run begins with; of several processes that share its weights, this one's part. frozen: it is not
    trained."""
    torch.manual_seed(config.seed)  # LoRA's initial values; nothing else draws from torch
    policy = load_policy(config.model, tokenizer, longest(config))
    if processes.size() == 1 or not launcher.shards(config.model):
        return policy
    valued = any(needs.critic(stage.rules) for stage in stages(config))
    masters = not frozen and all(stage.rules.train.master_weights for stage in stages(config))
    return policy.sharded(critic.new_critic(policy) if valued else None, masters)


def run_to_end(run: Run, asked: threading.Event) -> dict[str, Any]:
    """All steps that are left, then the result."""
    base = begin(run)
    for stage in run.left():
        state = begin_stage(run, stage)
        over = run.position >= stage.stop
        while not over:
            began, step, before = time.perf_counter(), run.done, run.position
            used = run.used()
            metrics = one_step(run, Moment(run.config.seed, step, stage, run.place(stage)), state)
            over = run.advance(stage, cost_of(run, metrics, used))
            if run.budget is not None:
                metrics["budget/schedule"] = run.position / run.total
            if over or due(run.config.eval.every, before, run.position):
                if state.ahead is not None:
                    state.ahead.wait()  # the evaluation brings newer weights
                metrics |= evaluated(run, last=over and stage is run.stages[-1])
            wanted = log_step(run, step + 1, metrics, time.perf_counter() - began)
            stop = any(processes.gather("whether to stop", bool(wanted or asked.is_set())))
            saving = time.perf_counter()
            if stop or over or due(run.config.save.every, step, step + 1):
                save(run, step + 1, state, metrics.get("eval/test/accuracy"))
            run.saving = time.perf_counter() - saving
            if stop:
                raise Stopped(f"stopped after step {step + 1} of {run.expected()}, which is saved in {run.folder}")
    return finish(run, base)


def due(every: int, before: float, after: float) -> bool:
    """Whether a multiple of ``every`` lies between the two."""
    return every > 0 and after // every > before // every


def cost_of(run: Run, metrics: Metrics, used: float) -> float:
    """What the step has used of the budget: counted tokens since ``used``, or the first process's seconds."""
    if run.budget is None:
        return 0.0
    if run.budget.kind == "seconds":
        return processes.lead("the seconds of a step", lambda: float(metrics["time/step"]))
    return run.used() - used


@contextmanager
def asked_to_stop() -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets, so that a run can be saved first. The second signal ends it at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield event
        return

    def ask(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()
        print("\nunift: stopping after this step, which is saved; once more to stop at once", flush=True)

    names = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) is not signal.SIG_IGN]  # as under nohup
    before = {n: signal.signal(n, ask) for n in names}
    try:
        yield event
    finally:
        for n, old in before.items():
            signal.signal(n, old)


@contextmanager
def memory_told(config: Config) -> Iterator[None]:
    """Memory that ran out is one clear error: what takes less of it, with which the run goes on."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        largest = max(stage.rules.train.token_budget for stage in stages(config))
        raise UniftError(
            f"memory ran out: {str(error).splitlines()[0]:.200}. Run the same command with less of it, which continues from the "
            f"last complete checkpoint: train.token_budget below {largest}, train.gradient_checkpointing=true (unift train "
            "--dry-run estimates both), or fewer other processes on the device"
        ) from error


# ---------------------------------------------------------------------------------------------- beginnings and ends


def begin(run: Run) -> dict[str, Any]:
    """Find the last checkpoint; evaluate the untouched model, or read what an earlier attempt measured. Returns that."""
    for stage in run.stages:
        check_path(run.policy, stage.rules)
    saved = processes.lead("the list of checkpoints", lambda: checkpoint.steps_saved(run.folder))
    run.done = saved[-1] if saved else 0
    if run.budget is not None and run.done > 0:  # how far the schedules were decides which stage goes on
        run.progress.recall(checkpoint.counters(run.folder, run.done), {}, {})
    earlier = processes.lead("the metrics so far", lambda: rewind_metrics(run.folder / "metrics.jsonl", run.done))
    if earlier and earlier[0]["step"] == 0:
        for record in earlier if processes.first() else ():
            run.report(record, run.expected())
        run.progress.judged |= earlier[0].get("judged", {})  # a checkpoint, if there is one, knows more
        return earlier[0]["base"]
    right = announced(run, "held-out rows", run.data.test) if run.data.test.rows else []
    base = asdict(evaluate.accuracy(right)) if right else {}
    first = {"forward": run.policy.path, "base": base, "judged": dict(run.progress.judged), "answer": run.scorer.answer}
    log(run, 0, first | (tested(run, right) if right else {}))
    return base


def begin_stage(run: Run, stage: Stage) -> State:
    """A new optimizer and reference, and no memory of rows; or those of the checkpoint in the middle of the stage."""
    rules = stage.rules
    run.policy.critic = critic.new_critic(run.policy) if needs.critic(rules) else None
    checkpointing.use(run.policy.model, rules.train.gradient_checkpointing)
    optimizer = make_optimizer(run.policy, rules.train)
    reference = None
    if needs.reference(rules):
        twin = None if run.policy.root is None else partial(load, run.config, run.policy.tokenizer, frozen=True)
        reference = Reference(run.policy, run.folder, run.start_of(stage), rules.sample.temperature, twin)
    state = State(optimizer, reference)
    if run.done > 0:  # at the start of a phase, too: each begins from the checkpoint, with a new optimizer
        within = run.done > run.start_of(stage)
        stored = checkpoint.restore(run.folder, run.done, run.policy, optimizer if within else None)
        run.progress.recall(stored["counters"], stored["scorer"]["train"], stored["scorer"]["eval"])
        recent = stored["scorer"]["recent"]
        run.scorer.recall([recent[i] for i in processes.share(len(recent))])
        if within:
            state.memory = RowMemory.load(stored.get("memory"))
            state.ahead = drawn_ahead(run, stage)
    if len(run.progress.starts) <= run.stages.index(stage):
        run.progress.starts.append(run.start_of(stage))
    return state


def drawn_ahead(run: Run, stage: Stage) -> Drawing | None:
    """What the last checkpoint, in the middle of the stage, holds of the next step's completions."""
    if not (run.config.engine.overlap and stage.rules.sample.completions and run.done < stage.stop):
        return None
    path = run.folder / "checkpoints" / checkpoint.step_name(run.done) / checkpoint.AHEAD
    weights, groups = processes.lead("what was drawn ahead", lambda: rollouts.read(path, checkpoint.DAMAGED))
    return Drawing(run.done, weights, groups)


def finish(run: Run, base: dict[str, Any]) -> dict[str, Any]:
    """Evaluate, save the final model, write the result."""
    config, progress = run.config, run.progress
    result: dict[str, Any] = {
        "method": config.method,
        "seed": config.seed,
        "steps": run.done if run.budget else run.total,
        "seconds": progress.seconds,
        "seconds_training": progress.training,
        "tokens_sampled": progress.tokens_sampled,
        "tokens_trained": progress.tokens_trained,
        "reward_seen": progress.seen,
        "base": base,
    } | ({"completions": progress.completions} if run.budget else {})
    if run.data.test.rows:
        if not progress.tested:  # no step was left to do
            evaluated(run, last=True)
        result["test"] = dict(progress.tested)
        if config.eval.samples:
            answers = Answers(config.eval.samples, config.seed)
            curve = judged(
                run, "samples of held-out rows", lambda judge: evaluate.pass_curve(judge, run.data.test, answers)
            )
            result["test"]["pass@k"] = curve
    if config.eval.train_rows != 0:
        rows = run.data.train.first(config.eval.train_rows or len(run.data.train.rows))
        result["train"] = asdict(evaluate.accuracy(announced(run, "training rows", rows)))
    run.track(
        {f"result/{k}/accuracy": result[k]["accuracy"] for k in ("test", "train") if k in result}, result["steps"]
    )
    result["scorer"] = {"train": progress.scored, "eval": progress.judged}

    def write() -> None:
        checkpoint.name_best(run.folder, progress.best_step)  # a kill may have come before it
        with writing("the final model", run.folder):
            save_pretrained(run.policy, run.folder / "model")
            save_adapter(run.policy, config.model, run.folder / "adapter")
        write_result(run.folder, result)

    with run.policy.whole():
        processes.lead("the final model", write)
    return result


def check_path(policy: Policy, rules: Rules) -> None:
    """A critic and changed inputs read and write inside the trunk, which the plain path leaves to the model. Drafts are checked
    by the native engine, on a CPU."""
    if rules.sample.draft != "none" and not (policy.shared and policy.device.type == "cpu"):
        found = f"found device {policy.device.type}, path {policy.path}"
        raise ConfigError(
            f"sample.draft={rules.sample.draft} works on a CPU on the shared-prefix path only; {found}. Set it to none"
        )
    wants = "a critic" if needs.critic(rules) else "changed input embeddings" if needs.changed_inputs(rules) else ""
    if wants and not policy.shared:
        raise ConfigError(
            f"method {rules.method} needs {wants}, which works on the shared-prefix path only; this model takes the "
            f"plain one: {policy.why_plain}. Use another method or another model"
        )


# ---------------------------------------------------------------------------------------------- evaluation


def evaluated(run: Run, last: bool) -> Metrics:
    """Accuracy on the test rows, as metrics; nothing without test rows. After the ``last`` step on all of them, for the result."""
    if not run.data.test.rows:
        return {}
    if not last:
        return tested(run, judged(run, "held-out rows", partial(evaluate.greedy, split=subset(run))))
    right = announced(run, "held-out rows", run.data.test)
    run.progress.tested = asdict(evaluate.accuracy(right))
    return tested(run, right)


def subset(run: Run) -> dataset.Split:
    """What is evaluated while training."""
    return run.data.test.first(run.config.eval.subset or len(run.data.test.rows))


def tested(run: Run, right: Sequence[bool]) -> Metrics:
    """Metrics of the subset, of verdicts on it or on all test rows."""
    found = evaluate.accuracy(right[: run.config.eval.subset])
    return {"eval/test/accuracy": found.accuracy, "eval/test/low": found.low, "eval/test/high": found.high}


def announced(run: Run, what: str, split: dataset.Split) -> list[bool]:
    """Verdicts before and after all steps, where nothing else says what the run is at."""
    run.watch(what, 0, len(split.rows))
    return judged(run, what, partial(evaluate.greedy, split=split))


def judged(run: Run, what: str, evaluation: Callable[[Judge], T]) -> T:
    """The evaluation's result; what became of its completions, in all processes, is added to ``progress.judged``."""
    before = list(run.scorer.counts.values())
    watch = partial(run.watch, what)
    result = evaluation(Judge(run.policy, run.engine, run.scorer, run.eval_tokens, watch))
    new = [n - old for n, old in zip(run.scorer.counts.values(), before, strict=True)]
    for name, n in zip(run.scorer.counts, processes.sums("an evaluation", new), strict=True):
        run.progress.judged[name] += int(n)
    return result


# ---------------------------------------------------------------------------------------------- files


def log_step(run: Run, finished: int, metrics: Metrics, seconds: float) -> Any:
    """Metrics of a step to file, trackers and people; returns what the report says."""
    run.progress.training += metrics["time/step"]
    run.progress.seconds += seconds
    return log(run, finished, metrics | {"time/elapsed": run.progress.seconds})


def log(run: Run, step: int, metrics: Metrics) -> Any:
    if not processes.first():
        return None
    record = {"step": step, **metrics}
    append_metrics(run.folder / "metrics.jsonl", record)
    run.track(record, step)
    return run.report(record, run.expected())


def save(run: Run, finished: int, state: State, accuracy: float | None) -> None:
    """A checkpoint, by the first process, or by all of them where the weights are sharded. ``accuracy``: of its evaluation,
    where there was one; checkpoints/best names the best of those."""
    if processes.size() > 1 and run.policy.root is None:
        processes.agree(f"weights after step {finished} (checksum)", checkpoint.fingerprint(run.policy))
    recent = processes.interleave(processes.gather("a checkpoint", run.scorer.recent))
    progress = run.progress
    if accuracy is not None and accuracy > progress.best:
        progress.best, progress.best_step = accuracy, finished
    stored = {
        "counters": progress.counters(),
        "scorer": {"train": progress.scored, "eval": progress.judged, "recent": recent},
        "memory": state.memory.dump(),
        "data": run.data.fingerprint,
        "config": config_hash(run.config),
        "seed": run.config.seed,
    }

    def tidy() -> None:
        checkpoint.name_best(run.folder, progress.best_step)
        starts = [run.start_of(stage) for stage in run.stages]
        checkpoint.prune(run.folder, run.config.save.keep, [*starts, progress.best_step])

    ahead = None
    if state.ahead is not None:  # its weights are gone once this process is: what they drew is part of the state
        groups = processes.interleave(processes.gather("what was drawn ahead", state.ahead.share()))
        ahead = rollouts.encoded(finished, state.ahead.weights, groups, [("", "")] * len(groups))
    # On disk before the checkpoint that they are rewound to: what a power cut takes of them is not written again.
    processes.lead("the metrics so far", lambda: sync(run.folder / "metrics.jsonl"))
    checkpoint.save(run.folder, finished, run.policy, state.optimizer, stored, ahead)
    processes.lead("a checkpoint", tidy)
