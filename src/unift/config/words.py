"""The vocabulary of a method as data: every word that its settings may hold, what it says, what it needs, its source.

One entry a word. ``needs``, the checks of settings and ``unift methods`` read these entries and compare no words of their
own; what a word computes stands under the same word in the room that computes it (``SCHEDULES`` in
``hints/schedules.py``, ``RULES`` in ``credit/advantages.py``, ``LOSSES`` in ``objectives/loss.py``, ...). A test holds the
settings' types, the entries and the functions equal.

A text is a template over the settings of its own section; ``{until:%}`` writes a share in per cent.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast


@dataclass(frozen=True)
class Word:
    text: str
    source: str = ""  # paper and equation


class _Template(string.Formatter):
    def format_field(self, value: object, format_spec: str) -> str:
        return f"{100 * value:g} %" if format_spec == "%" and isinstance(value, float) else format(value, format_spec)


def filled(text: str, section: Any) -> str:
    """The text with the settings of ``section`` (a model of ``settings``) in their places."""
    return _Template().vformat(text, (), cast("dict[str, Any]", section.__dict__))


# ---------------------------------------------------------------------------------------------- show

ScheduleName = Literal["none", "all", "cosine", "constant", "uniform", "staircase", "window", "adaptive", "bisection"]


@dataclass(frozen=True)
class Schedule(Word):
    sentence: str = ""  # for the report
    shows: bool = True  # any of the solution
    graded: bool = True  # part of the solution, so that it matters where it is cut
    ends: bool = False  # hints over the first share ``until`` of the steps, then none
    falls: bool = False  # by a curve that a likelihood weight can follow
    follows: bool = False  # the success of a row's own completions: a length a row
    counts: bool = False  # whole cuts, so it has no length in tokens


SCHEDULES: Mapping[ScheduleName, Schedule] = {
    "none": Schedule("nothing", sentence="no hints", shows=False, graded=False),
    "all": Schedule("all", sentence="the whole solution shown", graded=False),
    "cosine": Schedule(
        "cosine {high:g} to {low:g}, {until:%} of the steps",
        "UFT, arXiv 2505.16984, eq. B.1",
        "hints that fade by a cosine from {high:%} to {low:%} of the solution over the first {until:%} of the steps, then none",
        ends=True,
        falls=True,
    ),
    "constant": Schedule("constant {high:g}", sentence="hints of {high:%} of the solution throughout"),
    "uniform": Schedule("uniform", "R3, arXiv 2402.05808", "hints of any length, each as likely"),
    "staircase": Schedule(
        "stages, {until:%} of the steps",
        "the staged baseline of UFT, arXiv 2505.16984",
        "hints that fade in a staircase over the first {until:%} of the steps, then none",
        ends=True,
        counts=True,
    ),
    "window": Schedule(
        "uniform in a window below {high:g}",
        "Prefix-RFT, arXiv 2507.01679",
        "hints drawn from a window below {high:%} that opens over the first {until:%} of the steps, then none",
        ends=True,
        falls=True,
    ),
    "adaptive": Schedule(
        "a length a row, aim {target:g}",
        sentence="hints with a length a row, aimed at {target:%} success",
        follows=True,
    ),
    "bisection": Schedule(
        "an interval a row", "AdaBack, arXiv 2506.18110", "hints bisected a row at {target:%} success", follows=True
    ),
}

DrawName = Literal["binomial", "two_point", "rounded"]

# ---------------------------------------------------------------------------------------------- sample

SourceName = Literal["policy", "reference"]


@dataclass(frozen=True)
class Source(Word):
    reference: bool = False  # the model that the phase began with samples


SOURCES: Mapping[SourceName, Source] = {"policy": Source(""), "reference": Source(" of the reference", reference=True)}

# ---------------------------------------------------------------------------------------------- credit

BaselineName = Literal["group_mean", "leave_one_out", "none", "sign", "critic", "partition"]


@dataclass(frozen=True)
class Baseline(Word):
    compares: bool = False  # completions of a group with each other: equal scores are no credit, and ``scale`` applies
    grouped: bool = False  # one advantage a completion, from the scores of its group
    verdicts: bool = False  # right or wrong counts, not how much a score is
    critic: bool = False  # a value head says what a token was worth before it was sampled
    scores: bool = True  # the verifier's scores count
    solution: bool = False  # the solution stands against completions of the reference


BASELINES: Mapping[BaselineName, Baseline] = {
    "group_mean": Baseline(
        "r - mean", "GRPO, arXiv 2402.03300; Dr.GRPO, arXiv 2503.20783", compares=True, grouped=True
    ),
    "leave_one_out": Baseline("r - mean of the others", "RLOO, arXiv 2402.14740", compares=True, grouped=True),
    "none": Baseline("r", "REINFORCE++, arXiv 2501.03262"),
    "sign": Baseline("+1 / -1", "SRFT, arXiv 2506.19767", grouped=True, verdicts=True),
    "critic": Baseline("GAE", "arXiv 1506.02438, eq. 16; ReFT, arXiv 2401.08967", critic=True),
    "partition": Baseline(
        "solution against the others, {sequence_logp} of log pi", "arXiv 2502.18679", scores=False, solution=True
    ),
}

ScaleName = Literal["sample_std", "population_std", "none"]
SequenceLogpName = Literal["sum", "mean"]


@dataclass(frozen=True)
class SequenceLogp(Word):
    density: bool = False  # a log-probability, which the reference's own is taken off


SEQUENCE_LOGPS: Mapping[SequenceLogpName, SequenceLogp] = {
    "sum": SequenceLogp("sum", "DFT, arXiv 2502.18679", density=True),
    "mean": SequenceLogp("mean", "DFT2, arXiv 2502.18679"),
}

# ---------------------------------------------------------------------------------------------- policy

LossName = Literal["clip", "ratio", "reinforce", "cispo", "gspo", "dpo", "una", "orpo", "none"]


@dataclass(frozen=True)
class Loss(Word):
    """``credit``: what takes the place of advantages in losses of whole sequences."""

    credit: str = ""
    pushes: bool = True
    ratio: bool = False  # to the policy at the start of the step
    clips: bool = False  # that ratio
    whole: bool = False  # which is one of a whole completion
    sequences: bool = False  # of whole sequences, a demonstration among them, as pairs or with scores
    labels: bool = False  # scores of whole sequences, not only pairs
    reference: bool = False


LOSSES: Mapping[LossName, Loss] = {
    "clip": Loss("clip {low:g}/{high:g}", "PPO, arXiv 1707.06347, eq. 7", ratio=True, clips=True),
    "ratio": Loss("ratio", "the official code of LUFFY, ReLIFT and HPT", ratio=True),
    "reinforce": Loss("reinforce", "Williams 1992"),
    "cispo": Loss("cispo {high:g}", "CISPO, arXiv 2506.13585", ratio=True, clips=True),
    "gspo": Loss("gspo {low:g}/{high:g}", "GSPO, arXiv 2507.18071, eq. 5", ratio=True, clips=True, whole=True),
    "dpo": Loss("dpo", "DPO, arXiv 2305.18290, eq. 7", "right before wrong", sequences=True, reference=True),
    "una": Loss("una", "UNA, arXiv 2408.15339", "the score", sequences=True, labels=True, reference=True),
    "orpo": Loss("orpo", "ORPO, arXiv 2403.07691, eqs. 6 and 7", "right before wrong", sequences=True),
    "none": Loss("-", pushes=False),
}

OffPolicyName = Literal["none", "reinforce", "ratio", "shaped", "probability"]
OFF_POLICY: Mapping[OffPolicyName, Word] = {
    "none": Word(""),
    "reinforce": Word("reinforce", "discriminative fine-tuning, arXiv 2502.18679"),
    "ratio": Word("ratio", "Prefix-RFT, arXiv 2507.01679"),
    "shaped": Word("shaped", "LUFFY, arXiv 2504.14945"),
    "probability": Word("probability", "SRFT, arXiv 2506.19767"),
}

# ---------------------------------------------------------------------------------------------- normalisers of both streams

NormName = Literal[
    "token_mean",
    "seq_mean_token_mean",
    "seq_mean_token_sum",
    "seq_mean_token_sum_norm",
    "token_sum_norm",
    "microbatch_token_mean",
]


@dataclass(frozen=True)
class Norm(Word):
    sequences: bool = False  # every sequence of a batch weighs the same, whatever its length
    micro: bool = False  # counts micro-batches, whose size must then be set


NORMS: Mapping[NormName, Norm] = {
    "token_mean": Norm("mean over all tokens", "DAPO, arXiv 2503.14476"),
    "seq_mean_token_mean": Norm("mean over sequences of the mean over tokens", "GRPO, arXiv 2402.03300"),
    "seq_mean_token_sum": Norm("mean over sequences of the sum over tokens", sequences=True),
    "seq_mean_token_sum_norm": Norm(
        "mean over sequences of the sum over tokens / max_tokens", "Dr.GRPO, arXiv 2503.20783"
    ),
    "token_sum_norm": Norm("sum over all tokens / max_tokens", "the official code of LUFFY, ReLIFT and HPT"),
    "microbatch_token_mean": Norm(
        "mean over micro-batches of the mean over tokens", "the official code of UFT", micro=True
    ),
}

# ---------------------------------------------------------------------------------------------- likelihood

TokensName = Literal["none", "hint", "demo", "own", "demo+own"]


@dataclass(frozen=True)
class Tokens(Word):
    hint: bool = False  # the revealed steps
    alone: bool = False  # and nothing beyond them, a hint that one member alone has seen included
    demo: bool = False  # the whole solution
    own: bool = False  # own completions


TOKENS: Mapping[TokensName, Tokens] = {
    "none": Tokens("nothing"),
    "hint": Tokens("the revealed steps", hint=True, alone=True),
    "demo": Tokens("the whole solution + EOS", hint=True, demo=True),
    "own": Tokens("own completions", own=True),
    "demo+own": Tokens("the whole solution and own completions", hint=True, demo=True, own=True),
}

KeepName = Literal["all", "right", "one_right"]


@dataclass(frozen=True)
class Keep(Word):
    verdicts: bool = True  # chosen by the verifier


KEEPS: Mapping[KeepName, Keep] = {
    "all": Keep("", verdicts=False),
    "right": Keep(" (right)"),
    "one_right": Keep(" (one right)"),
}

RuleName = Literal[
    "nll",
    "probability",
    "uncertainty",
    "trust",
    "shaped",
    "ratio",
    "importance",
    "total_variation",
    "pearson",
    "hellinger",
    "tail",
]


@dataclass(frozen=True)
class Rule(Word):
    reference: bool = False  # looks at log(pi / reference)
    ratio: bool = False  # looks at log(pi / policy at the start of the step)


RULES: Mapping[RuleName, Rule] = {
    "nll": Rule("nll"),
    "probability": Rule("probability", "DFT, arXiv 2508.05629, eq. 9"),
    "uncertainty": Rule("uncertainty", "CHORD, arXiv 2508.11408"),
    "trust": Rule("trust", "TrSFT of TRAPO, arXiv 2512.17636"),
    "shaped": Rule("shaped", "LUFFY, arXiv 2504.14945"),
    "ratio": Rule("ratio", "PSFT, arXiv 2508.17784", ratio=True),
    "importance": Rule("importance", "iw-SFT, arXiv 2507.12856", reference=True),
    "total_variation": Rule("total_variation", "after arXiv 2507.00018"),
    "pearson": Rule("pearson", "after arXiv 2507.00018", reference=True),
    "hellinger": Rule("hellinger", "after arXiv 2507.00018", reference=True),
    "tail": Rule("tail", "IFT, arXiv 2405.11870, eq. 21"),
}

AnnealingName = Literal["constant", "cosine", "hint"]


@dataclass(frozen=True)
class Annealing(Word):
    hint: bool = False  # follows the hint's own schedule, which must fall
    final: bool = False  # goes to ``final``


ANNEALINGS: Mapping[AnnealingName, Annealing] = {
    "constant": Annealing(""),
    "cosine": Annealing(", cosine to {final:g}", "CHORD, arXiv 2508.11408", final=True),
    "hint": Annealing(", hint", hint=True),
}

# ---------------------------------------------------------------------------------------------- reference, inputs, train

EstimatorName = Literal["k2", "k3"]
ESTIMATORS: Mapping[EstimatorName, Word] = {
    "k2": Word("d^2 / 2", "Schulman 2020, approximating KL divergence"),
    "k3": Word("exp(d) - d - 1", "Schulman 2020; GRPO, arXiv 2402.03300, eq. 4"),
}

IntoName = Literal["loss", "reward"]


@dataclass(frozen=True)
class Into(Word):
    reward: bool = False


INTOS: Mapping[IntoName, Into] = {
    "loss": Into(""),
    "reward": Into(", KL in r", "REINFORCE++, arXiv 2501.03262", reward=True),
}

NoiseName = Literal["none", "uniform", "gaussian", "adversarial"]


@dataclass(frozen=True)
class Noise(Word):
    drawn: bool = True  # from addressed random numbers; otherwise from the loss itself


NOISES: Mapping[NoiseName, Noise] = {
    "none": Noise(""),
    "uniform": Noise("uniform", "NEFTune, arXiv 2310.05914"),
    "gaussian": Noise("gaussian", "R-SFLLM, arXiv 2407.11654"),
    "adversarial": Noise("adversarial", "arXiv 1605.07725, eq. 5", drawn=False),
}

DecayName = Literal["constant", "cosine", "linear"]

OptimizerName = Literal["adamw", "adamw_fused", "adamw_8bit", "muon"]


@dataclass(frozen=True)
class Optimizer(Word):
    state: float = 8.0  # bytes that it keeps for a number of a float32 weight


OPTIMIZERS: Mapping[OptimizerName, Optimizer] = {
    "adamw": Optimizer("AdamW", "arXiv 1711.05101"),
    "adamw_fused": Optimizer("AdamW in one kernel", "arXiv 1711.05101"),
    "adamw_8bit": Optimizer("AdamW with 8-bit state", "arXiv 2110.02861", state=2 + 8 / 256),
    "muon": Optimizer("Muon for matrices, AdamW for the rest", "arXiv 2502.16982", state=4.0),
}
