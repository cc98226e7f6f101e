"""Settings that a run does not read: whoever sets one by hand is told, since nothing else would show it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from unift.config import needs
from unift.config.identity import flat
from unift.config.resolve import preset_settings
from unift.config.sections import METHOD_SECTIONS, Config, Rules
from unift.config.stages import stages
from unift.config.words import ANNEALINGS, BASELINES, INTOS, LOSSES, NORMS, TOKENS

# What a rule of the hints reads, where hints end at cuts; beside ``cuts`` and ``members``.
SHOWN: Mapping[str, str] = {
    "none": "",
    "all": "",
    "constant": "high draw",
    "cosine": "high low until draw",
    "uniform": "",
    "staircase": "until stages",
    "window": "high low until",
    "adaptive": "high target rate draw",
    "bisection": "target",
}


def _shows(name: str) -> Callable[[Rules], bool]:
    def read(s: Rules) -> bool:
        return name in SHOWN[s.show.schedule].split() and not (name == "draw" and s.show.unit == "tokens")

    return read


def _sampled(s: Rules) -> bool:
    return s.sample.completions > 0


def _pushed(s: Rules) -> bool:
    """An advantage of the policy stream."""
    loss = LOSSES[s.policy.loss]
    return _sampled(s) and loss.pushes and not loss.sequences


def _credited(s: Rules) -> bool:
    """An advantage that comes from scores."""
    return _pushed(s) and BASELINES[s.credit.baseline].scores


def _pulled(s: Rules) -> bool:
    """Completions that a KL can hold back."""
    return _sampled(s) and LOSSES[s.policy.loss].pushes


def _clips(s: Rules) -> bool:
    return _pushed(s) and (LOSSES[s.policy.loss].clips or s.policy.off_policy == "ratio")


def _supervised(s: Rules) -> bool:
    return s.likelihood.tokens != "none"


def _weighed(s: Rules) -> bool:
    """By the likelihood's weight."""
    return _supervised(s) or s.policy.weight == "complement"


def _rule(*names: str) -> Callable[[Rules], bool]:
    return lambda s: _supervised(s) and s.likelihood.rule in names


def _off_policy(s: Rules) -> bool:
    return _pushed(s) and s.policy.off_policy != "none"


def _norms(s: Rules) -> bool:
    return any(NORMS[n].micro for n in (s.policy.norm, s.likelihood.norm, s.policy.entropy_norm) if n is not None)


def _partition(s: Rules) -> bool:
    return _sampled(s) and BASELINES[s.credit.baseline].solution


def _annealed(s: Rules) -> bool:
    return _weighed(s) and ANNEALINGS[s.likelihood.schedule].final


WHOLE = ("train.steps", "train.budget")  # of the whole run, phases or not
Reads = Callable[[Rules], bool]
# Setting -> (the setting that decides, whether a stage reads it). What is not here is always read, or checked elsewhere.
READ: Mapping[str, tuple[str, Reads]] = {
    **{f"show.{name}": ("show.schedule", _shows(name)) for name in ("high", "low", "until", "draw", "stages", "target", "rate")},
    "sample.source": ("sample.completions", _sampled),
    "sample.draft": ("sample.completions", _sampled),
    "sample.full": ("sample.first", lambda s: s.sample.first is not None),
    "credit.baseline": ("policy.loss", _pushed),
    "credit.scale": ("credit.baseline", lambda s: _pushed(s) and BASELINES[s.credit.baseline].compares),
    "credit.whiten": ("policy.loss", _credited),
    "credit.overlong": ("credit.baseline", _credited),
    "credit.positive": ("policy.loss", _credited),
    "credit.positive_entropy": ("policy.loss", _credited),
    **{f"credit.{name}": ("credit.baseline", _partition) for name in ("sequence_logp", "tau", "momentum")},
    **{f"credit.{name}": ("credit.baseline", needs.critic) for name in ("gamma", "lam", "value_weight", "value_clip")},
    **{f"policy.{name}": ("policy.loss", _clips) for name in ("low", "high", "dual_clip")},
    "policy.entropy_tokens": ("policy.entropy", lambda s: s.policy.entropy > 0),
    "policy.entropy_norm": ("policy.entropy", lambda s: s.policy.entropy > 0),
    "policy.off_policy_top": ("policy.off_policy", _off_policy),
    "policy.threshold": ("policy.off_policy", lambda s: _off_policy(s) and s.policy.off_policy == "shaped"),
    "policy.beta": ("policy.loss", lambda s: LOSSES[s.policy.loss].sequences),
    **{f"likelihood.{name}": ("likelihood.tokens", _supervised) for name in ("rule", "norm")},
    **{f"likelihood.{name}": ("likelihood.tokens", _weighed) for name in ("weight", "schedule", "entropy")},
    "likelihood.keep": ("likelihood.tokens", lambda s: TOKENS[s.likelihood.tokens].own),
    "likelihood.final": ("likelihood.schedule", _annealed),
    "likelihood.until": ("likelihood.schedule", _annealed),
    "likelihood.scope": ("likelihood.rule", _rule("importance")),
    "likelihood.clip": ("likelihood.rule", _rule("ratio", "importance")),
    "likelihood.threshold": ("likelihood.rule", _rule("trust", "shaped")),
    "likelihood.beta": ("likelihood.rule", _rule("total_variation", "pearson", "hellinger")),
    "likelihood.gamma": ("likelihood.rule", _rule("tail")),
    "reference.kl": ("sample.completions", _pulled),
    "reference.estimator": ("reference.kl", lambda s: _pulled(s) and s.reference.kl != 0 and not INTOS[s.reference.into].reward),
    "reference.into": ("reference.kl", lambda s: _pulled(s) and s.reference.kl != 0),
    "inputs.scale": ("inputs.noise", lambda s: s.inputs.noise != "none"),
    "inputs.copy_weight": ("inputs.noise", lambda s: s.inputs.noise == "adversarial"),
    "train.micro_prompts": ("policy.norm", _norms),
}  # fmt: skip


def sampling_by_hand(config: Config) -> list[str]:
    """A line for each stage that samples although its preset does not: a sample.completions that was meant for the methods beside
    sft makes it another method, which also learns from rewards."""
    lines: list[str] = []
    for number, stage in enumerate(stages(config)):
        method, completions = stage.rules.method, stage.rules.sample.completions
        if _pushed(stage.rules) and preset_settings(method).get("sample", {}).get("completions") == 0:
            name = f"phases.{number}.sample.completions" if config.phases else "sample.completions"
            lines.append(
                f"{method} samples nothing by its preset; with {name}={completions} it also learns from the reward of completions, "
                f"so it is {method} no more. Leave it out, and each method samples what its preset says"
            )
    return lines


def unread(config: Config, by_hand: Mapping[str, Any]) -> list[str]:
    """A line for each setting, of those that were set by hand, which no stage of the run reads, or which a phase replaces.
    ``by_hand``: as in a file.

    A whole config, as a run writes it, is nobody's wish for each of its settings.
    """
    if by_hand.keys() >= Config.model_fields.keys():
        return []
    every, lines = [stage.rules for stage in stages(config)], sampling_by_hand(config)
    listed = by_hand.get("phases")
    places = {str(n): phase for n, phase in enumerate(cast("list[Any]", listed))} if isinstance(listed, list) else {}
    set_by_hand = flat({**by_hand, "phases": places} if places else by_hand)
    for name, value in set_by_hand.items():
        first, place, own = (*name.split(".", 2), "", "")[:3]
        rules = every
        if first == "phases" and place.isdecimal() and int(place) < len(config.phases):
            if own in WHOLE:
                lines.append(
                    f"{name}={value} has no effect: {own} is of the whole run, of which each phase has its share"
                )
            rules = [config.phases[int(place)]]
        decides, read = READ.get(own if rules is not every else name, ("", lambda s: True))
        if not any(map(read, rules)):
            found = " or ".join(dict.fromkeys(f"{_value(s, decides)}" for s in rules))
            lines.append(f"{name}={value} has no effect with {decides}={found}")
        elif first in METHOD_SECTIONS and name not in WHOLE:
            lines += [
                f"{name}={value} does not reach phase {n} ({phase.method}), which has {_value(phase, name)} of its own: "
                f"set phases.{n}.{name}"
                for n, phase in enumerate(config.phases)
                if _value(phase, name) != _value(config, name)
                and f"phases.{n}.{name}" not in set_by_hand
                and read(phase)
            ]
    return lines


def _value(rules: Rules, name: str) -> Any:
    section, key = name.split(".", 1)
    return getattr(getattr(rules, section), key)
