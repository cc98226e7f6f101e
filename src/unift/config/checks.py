"""Settings that must fit each other, before anything is loaded. Every error names both settings and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unift.config.budget import parse
from unift.config.identity import flat
from unift.config.packaged import nearest, preset_names
from unift.config.sections import Config, Rules
from unift.config.stages import stages
from unift.config.surroundings import BESIDE, Engine
from unift.config.words import ANNEALINGS, BASELINES, INTOS, LOSSES, NORMS, SCHEDULES, SOURCES, TOKENS
from unift.types import HANDED, ConfigError


def check(config: Config) -> None:
    """Numbers that must fit each other, before anything is loaded."""
    for phase in (stage.rules for stage in stages(config)):
        train, sample = phase.train, phase.sample
        if train.prompts % train.updates:
            raise ConfigError(
                f"train.prompts={train.prompts} does not divide into train.updates={train.updates} equal updates; "
                f"use a multiple of {train.updates}"
            )
        norms = (phase.policy.norm, phase.likelihood.norm, phase.policy.entropy_norm or phase.policy.norm)
        counted = [name for name in norms if NORMS[name].micro]
        if counted:
            if train.micro_prompts is None:
                raise ConfigError(f"norm {counted[0]} needs train.micro_prompts (prompts of a micro-batch)")
            if (train.prompts // train.updates) % train.micro_prompts:
                raise ConfigError(
                    f"train.micro_prompts={train.micro_prompts} does not divide the "
                    f"{train.prompts // train.updates} prompts of an update"
                )
        loss = LOSSES[phase.policy.loss]
        compared = BASELINES[phase.credit.baseline].compares and loss.pushes and not loss.sequences
        if sample.completions == 1 and compared and not sample.demonstration:
            raise ConfigError(
                f"sample.completions=1 leaves baseline {phase.credit.baseline!r} nothing to compare with: every "
                "advantage would be 0. Use 2 or more, or credit.baseline=none"
            )
        silent = phase.likelihood.tokens == "none" or phase.likelihood.weight == 0
        pairs = (sample.rejected is not None or sample.label is not None) and loss.sequences
        if (sample.completions == 0 or not loss.pushes) and silent and not pairs:
            raise ConfigError(
                f"nothing to learn from: sample.completions={sample.completions}, policy.loss={phase.policy.loss} and no "
                "likelihood. Set likelihood.tokens and likelihood.weight, or sample completions"
            )
        if config.engine.gap == "correct" and loss.sequences:
            raise ConfigError(
                f"engine.gap=correct weighs tokens one by one; policy.loss={phase.policy.loss} compares whole sequences. Use "
                "warn or fail"
            )
        if sample.draft != "none" and config.engine.kind not in ("auto", "native"):
            raise ConfigError(
                f"sample.draft={sample.draft} is of the native engine; found engine.kind={config.engine.kind}. Set it to none"
            )
        if config.engine.overlap:
            _check_overlap(phase)
        _check_together(phase)
        if phase.show.low > phase.show.high:
            raise ConfigError(f"show.low={phase.show.low} is above show.high={phase.show.high}")
    served = [key for key in ("url", "folder", "transfer") if getattr(config.engine, key) != getattr(Engine(), key)]
    if served and config.engine.kind == "auto":
        raise ConfigError(
            f"engine.{served[0]} is of a server, and engine.kind=auto samples in this process. Set engine.kind=vllm (unift serve), "
            "or leave it out"
        )
    if config.engine.overlap and config.engine.kind not in BESIDE:
        raise ConfigError(
            f"engine.overlap=true draws completions while this process trains; engine.kind={config.engine.kind} draws them with "
            "this process's own weights, cores and PyTorch settings. Use engine.kind=vllm (unift serve), or leave it out"
        )
    if config.train.budget is not None:
        parse(config.train.budget, "train.budget")
        if config.engine.overlap:
            raise ConfigError(
                "engine.overlap=true with train.budget: how far the schedules are in a step is known once the step before it has "
                "been paid for, and by then its hints are drawn. Set train.steps instead of the budget, or leave the overlap out"
            )
    for name in config.baselines:
        if name not in preset_names():
            raise ConfigError(f"baselines: unknown method {name!r}{nearest(name, preset_names())}")
    if config.data.task and config.data.train:
        raise ConfigError("data.task (generated rows) and data.train (a file) are both set; keep one")
    if not (config.data.task or config.data.train):
        raise ConfigError("no rows: set data.train=FILE, or data.task to a built-in task, or use --recipe")


def check_model(config: Config, user: Mapping[str, Any]) -> None:
    """Rows of one's own train a model of one's own. ``user``: what was set by hand, in a file or on the command line.

    The default and those of recipes are toys of a few thousand parameters that know one task's letters.
    """
    if config.data.train and not flat(user).get("model.path"):
        found = f"data.train={config.data.train!r} without model.path: set model.path=FOLDER"
        if config.data.train == HANDED:
            found = "train=... without model=...: pass model=FOLDER (or a loaded model and its tokenizer)"
        raise ConfigError(
            f"{found}, the Hugging Face model to train. The default, {config.model.path!r}, is a toy that knows its own task alone"
        )


def _check_overlap(phase: Rules) -> None:
    """What a step that is drawn before the one before it has trained cannot know, and what no weights correct."""
    if phase.sample.completions == 0:
        return
    if SCHEDULES[phase.show.schedule].follows:
        raise ConfigError(
            f"engine.overlap=true draws a step's hints before the step before it is scored; show.schedule={phase.show.schedule} "
            "follows those scores. Use another schedule, or leave the overlap out"
        )
    if LOSSES[phase.policy.loss].sequences:
        raise ConfigError(
            f"engine.overlap=true weighs tokens one by one for the older weights that drew them; policy.loss={phase.policy.loss} "
            "compares whole sequences. Leave the overlap out"
        )
    if SOURCES[phase.sample.source].reference:
        raise ConfigError(
            f"engine.overlap=true is for completions of the policy; sample.source={phase.sample.source} draws them from the "
            "model that the phase began with. Leave the overlap out"
        )


def _check_together(phase: Rules) -> None:
    """Settings of different sections that only make sense together."""
    sample, likelihood, g = phase.sample, phase.likelihood, phase.sample.completions
    schedule, loss, baseline = (
        SCHEDULES[phase.show.schedule],
        LOSSES[phase.policy.loss],
        BASELINES[phase.credit.baseline],
    )
    tokens, demonstrated = TOKENS[likelihood.tokens], sample.demonstration
    falling = ", ".join(name for name, word in SCHEDULES.items() if word.falls)
    wants = [
        (tokens.own and g == 0, f"likelihood.tokens={likelihood.tokens} needs sample.completions > 0"),
        (likelihood.gate is not None and g == 0, "likelihood.gate needs completions, whose success rate it compares"),
        (
            likelihood.gate is not None and not (tokens.hint and not tokens.own),
            f"likelihood.gate chooses groups whose hint or demo is supervised; found likelihood.tokens={likelihood.tokens}",
        ),
        (
            likelihood.buffer > 0 and (likelihood.gate is None or not tokens.demo),
            "likelihood.buffer holds gated rows: it needs likelihood.gate and likelihood.tokens=demo",
        ),
        (
            (sample.first_eos or sample.instruction is not None) and not (sample.first and tokens.own),
            "sample.first_eos and sample.instruction are of supervised first tokens: they need sample.first and "
            "likelihood.tokens=own",
        ),
        (
            phase.reference.clamp is not None and INTOS[phase.reference.into].reward,
            "reference.clamp limits the KL term of the loss; with reference.into=reward there is none",
        ),
        (
            ANNEALINGS[likelihood.schedule].hint and not schedule.falls,
            f"likelihood.schedule={likelihood.schedule} follows a falling hint; found show.schedule={phase.show.schedule}. "
            f"Use one of {falling}",
        ),
        (
            phase.policy.weight == "complement" and likelihood.weight > 1,
            f"policy.weight=complement is 1 - likelihood.weight, which is negative at {likelihood.weight}",
        ),
        (
            phase.show.members is not None and not 0 < phase.show.members <= g,
            f"show.members={phase.show.members}, but a group has sample.completions={g}",
        ),
        (
            demonstrated and phase.policy.off_policy == "none" and not loss.sequences,
            "sample.demonstration=true puts the solution into the group: policy.off_policy must say how it pushes",
        ),
        (
            schedule.follows and g == 0,
            f"show.schedule={phase.show.schedule} follows the success of completions; sample.completions is 0",
        ),
        (
            phase.show.unit == "tokens" and schedule.counts,
            f"show.schedule={phase.show.schedule} counts cuts: use show.unit=cuts",
        ),
        (
            (phase.inputs.noise != "none" or phase.inputs.own > 0) and g > 0,
            "inputs.noise and inputs.own perturb supervised phases only; completions are sampled from clean inputs. "
            "Set sample.completions=0",
        ),
        (
            phase.inputs.noise != "none" and phase.inputs.own > 0,
            f"inputs.noise={phase.inputs.noise} and inputs.own={phase.inputs.own} both change the embeddings; keep one",
        ),
        (
            sample.refill > 0 and not (loss.pushes and baseline.scores),
            "sample.refill replaces groups whose scores are all equal; here the policy stream does not look at scores",
        ),
        (
            loss.sequences and not NORMS[phase.policy.norm].sequences,
            f"policy.loss={phase.policy.loss} counts sequences: use policy.norm=seq_mean_token_sum",
        ),
        (
            sample.rejected is not None and not (loss.sequences and demonstrated),
            "sample.rejected names what the solution is preferred to: it needs a policy.loss of sequences "
            f"({', '.join(name for name, word in LOSSES.items() if word.sequences)}) and sample.demonstration=true",
        ),
        (
            sample.label is not None and not (loss.labels and demonstrated),
            "sample.label names the score of the solution: it needs policy.loss=una and sample.demonstration=true",
        ),
        (
            loss.sequences and likelihood.tokens != "none",
            f"policy.loss={phase.policy.loss} has the solution as a member (sample.demonstration); set likelihood.tokens=none",
        ),
        (
            baseline.solution and not (demonstrated and SOURCES[sample.source].reference and g > 0),
            f"credit.baseline={phase.credit.baseline} sets the solution against completions of the reference: it needs "
            "sample.demonstration=true, sample.source=reference and completions",
        ),
        (
            baseline.solution and sample.temperature != 1,
            f"credit.baseline={phase.credit.baseline} divides by the reference's own probability of a completion: "
            "sample.temperature must be 1",
        ),
    ]
    for wrong, text in wants:
        if wrong:
            raise ConfigError(text)
