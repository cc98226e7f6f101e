"""What a method needs, read off its words: the loop asks before it pays for something, `unift methods` prints it."""

from __future__ import annotations

from unift.config.sections import Rules
from unift.config.words import BASELINES, INTOS, KEEPS, LOSSES, RULES, SCHEDULES, SOURCES, TOKENS


def reference(s: Rules) -> bool:
    """The model that the phase began with: for a KL, a rule that compares with it, or to sample from."""
    return reference_logps(s) or s.reference.kl != 0 or SOURCES[s.sample.source].reference


def reference_logps(s: Rules) -> bool:
    """The loss itself looks at log-probs under the reference: its KL term, a policy loss, or a likelihood rule."""
    pulls = s.reference.kl != 0 and not INTOS[s.reference.into].reward
    return pulls or LOSSES[s.policy.loss].reference or RULES[s.likelihood.rule].reference


def old(s: Rules) -> bool:
    """Log-probs at the start of a step: several updates a step, with a ratio in one of the streams."""
    ratio = s.likelihood.tokens != "none" and RULES[s.likelihood.rule].ratio
    pushes = s.sample.completions > 0 and LOSSES[s.policy.loss].ratio
    return s.train.updates * s.train.epochs > 1 and (ratio or pushes)


def completions(s: Rules) -> bool:
    return s.sample.completions > 0


def critic(s: Rules) -> bool:
    return s.sample.completions > 0 and BASELINES[s.credit.baseline].critic


def verifier(s: Rules) -> bool:
    """Scores of completions: to push the policy, to choose own completions, to gate, or to set a row's hint."""
    if s.sample.completions == 0:
        return False
    pushed = LOSSES[s.policy.loss].pushes and BASELINES[s.credit.baseline].scores
    used = pushed or KEEPS[s.likelihood.keep].verdicts or s.likelihood.gate is not None
    return used or SCHEDULES[s.show.schedule].follows


def demonstrations(s: Rules) -> bool:
    """Whole solutions with a loss of their own, as data or as members of a group."""
    return TOKENS[s.likelihood.tokens].demo or s.sample.demonstration


def hints(s: Rules) -> bool:
    """Some of the solution is shown."""
    return SCHEDULES[s.show.schedule].shows


def solutions(s: Rules) -> bool:
    return hints(s) or TOKENS[s.likelihood.tokens].alone or demonstrations(s)


def only_solved(s: Rules) -> bool:
    """A row without a worked solution teaches nothing: no completion is sampled, or its worth is measured by the solution."""
    return solutions(s) and (not completions(s) or BASELINES[s.credit.baseline].solution)


def own_hints(s: Rules) -> bool:
    """A hint that some members alone have seen is supervised."""
    return TOKENS[s.likelihood.tokens].alone and s.likelihood.weight > 0


def solution_pushes(s: Rules) -> bool:
    """Tokens of the solution inside a group push with the group's advantage, too."""
    return s.policy.off_policy != "none" or LOSSES[s.policy.loss].sequences


def changed_inputs(s: Rules) -> bool:
    """Something is done to the input embeddings of a supervised phase."""
    return s.inputs.noise != "none" or s.inputs.own > 0
