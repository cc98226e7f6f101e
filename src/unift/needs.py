"""What a method needs, read off its settings: the loop asks before it pays for something, `unift methods` prints it."""

from __future__ import annotations

from unift.config import Config, Phase
from unift.settings import REFERENCE_RULES


def reference(s: Config | Phase) -> bool:
    """The model that the phase began with: for a KL, a rule that compares with it, or to sample from."""
    pulls = s.reference.kl != 0 or s.policy.loss in ("dpo", "una")
    pulls = pulls or (s.credit.baseline == "partition" and s.credit.score == "ratio")
    return pulls or s.likelihood.rule in REFERENCE_RULES or s.sample.source == "reference"


def old(s: Config | Phase) -> bool:
    """Log-probs at the start of a step: several updates a step, with a ratio in one of the streams."""
    ratio = s.likelihood.tokens != "none" and s.likelihood.rule == "ratio"
    pushes = s.sample.completions > 0 and s.policy.loss in ("clip", "cispo", "gspo")
    return s.train.updates * s.train.epochs > 1 and (ratio or pushes)


def critic(s: Config | Phase) -> bool:
    return s.sample.completions > 0 and s.credit.baseline == "critic"


def verifier(s: Config | Phase) -> bool:
    """Scores of completions: to push the policy, to choose own completions, to gate, or to set a row's hint."""
    if s.sample.completions == 0:
        return False
    pushed = s.policy.loss != "none" and s.credit.baseline != "partition"
    used = pushed or s.likelihood.keep != "all" or s.likelihood.gate is not None
    return used or s.show.schedule in ("adaptive", "bisection")


def demonstrations(s: Config | Phase) -> bool:
    """Whole solutions with a loss of their own, as data or as members of a group."""
    return s.likelihood.tokens in ("demo", "demo+own") or s.sample.demonstration


def solutions(s: Config | Phase) -> bool:
    return s.show.schedule != "none" or s.likelihood.tokens == "hint" or demonstrations(s)
