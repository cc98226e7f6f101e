"""The settings, typed: a section for each question that a method answers, and the whole of a run. How layers become one
config is in ``resolve.py``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from unift.config import words
from unift.config.surroundings import Data, Engine, Eval, Log, Lora, Model, Reward, Save, Section

__all__ = [
    "Config",
    "Credit",
    "Data",
    "Engine",
    "Eval",
    "Inputs",
    "Likelihood",
    "Log",
    "Lora",
    "Model",
    "Phase",
    "PolicyStream",
    "Pull",
    "Reward",
    "Rules",
    "SampleFrom",
    "Save",
    "Section",
    "Show",
    "Train",
]

Beta = Annotated[float, Field(ge=0, lt=1)]


class Show(Section):
    """How much of the solution is revealed before the model speaks."""

    schedule: words.ScheduleName = Field(
        default="none", description="how the share p that is shown goes over the steps"
    )
    high: float = Field(
        default=0.95,
        ge=0,
        le=1,
        description="p at the first step (cosine, window, adaptive), or p throughout (constant)",
    )
    low: float = Field(default=0.05, ge=0, le=1, description="p at the last hinted step (cosine, window)")
    until: float = Field(
        default=0.6, ge=0, le=1, description="share of the steps with hints (cosine, staircase, window); then none"
    )
    draw: words.DrawName = Field(
        default="binomial",
        description="k ~ Binomial(cuts, p), k one of the two whole numbers around cuts * p with this mean, or k = round(cuts * p)",
    )
    stages: Literal["equal", "floored"] = Field(
        default="equal",
        description="staircase: T_hint / (num + 1) steps each, or as floored by the official code of UFT",
    )
    unit: Literal["cuts", "tokens"] = Field(
        default="cuts", description="a hint ends at a cut, or after any token of the steps"
    )
    cuts: int = Field(default=5, ge=1, description="the solution is cut into at most this many pieces")
    members: int | None = Field(
        default=None,
        ge=1,
        description="so many completions of a group begin with the hint, the others without; null = all",
    )
    target: float = Field(
        default=0.5, ge=0, le=1, description="success rate of a row's group that adaptive and bisection aim at"
    )
    rate: float = Field(default=0.4, gt=0, le=1, description="adaptive: change of p is rate * (target - success rate)")


class SampleFrom(Section):
    """How many completions of each prompt+hint are sampled, and from where."""

    completions: int = Field(default=8, ge=0, description="G; 0 = none (supervised)")
    temperature: float = Field(
        default=1.0,
        ge=1e-3,
        le=1e3,
        description="divides the logits when sampling and in the completions' log-probs; hints at 1",
    )
    max_tokens: int = Field(default=64, ge=1, description="length limit of a completion, tokens")
    source: words.SourceName = Field(
        default="policy", description="who samples: the policy, or the model the phase began with"
    )
    draft: Literal["none", "solution", "last"] = Field(
        default="none",
        description="tokens to check several at a time: of the row's solution, or of its last completions too; samples stay as "
        "they are (native engine on a CPU)",
    )
    demonstration: bool = Field(default=False, description="the solution is one more member of the group, with score 1")
    rejected: str | None = Field(default=None, description="column with an answer that the solution is preferred to")
    label: str | None = Field(
        default=None,
        description="column with the score of the row's solution, 0 to 1 or true and false (una); rows may lack it: score 1",
    )
    refill: int = Field(
        default=0, ge=0, description="rounds in which groups without signal are replaced by other prompts"
    )
    first: int | None = Field(
        default=None, ge=1, description="sample only so many tokens of a completion; null = to its end"
    )
    full: float = Field(
        default=0.0, ge=0, le=1, description="share of the prompts that are sampled to the end in spite of first"
    )
    first_eos: bool = Field(default=False, description="the first tokens are supervised with an EOS after them")
    instruction: str | None = Field(
        default=None, description="text after the prompt under which the first tokens are supervised, not sampled"
    )


class Credit(Section):
    """What each completion is worth: scores of a group -> advantages."""

    baseline: words.BaselineName = Field(default="group_mean", description="what a score is compared with")
    scale: words.ScaleName = Field(default="sample_std", description="what the difference is divided by, in a group")
    epsilon: float = Field(default=1e-6, ge=0, description="added to the std")
    whiten: bool = Field(
        default=False, description="advantages have mean 0 and std 1 over all sampled tokens of a step"
    )
    overlong: int = Field(
        default=0, ge=0, description="the score falls linearly by 1 over the last so many tokens of max_tokens"
    )
    positive: float = Field(default=1.0, ge=0, description="factor of positive advantages")
    positive_entropy: float = Field(
        default=0.0, description="positive advantages times exp(this * H), H the policy's mean entropy"
    )
    sequence_logp: words.SequenceLogpName = Field(
        default="sum", description="partition: log-prob of a sequence, sum log pi (against log P0) or mean log pi"
    )
    tau: float = Field(default=1.0, gt=0, description="partition: temperature of the sequences' log-probs")
    momentum: float = Field(default=0.85, gt=0, le=1, description="partition: weight of the newest estimate of a row's")
    gamma: float = Field(default=1.0, ge=0, le=1, description="discount of later tokens' rewards (critic)")
    lam: float = Field(default=0.95, ge=0, le=1, description="GAE's lambda (critic)")
    value_weight: float = Field(default=2.5, ge=0, description="of the squared error of the critic")
    value_clip: float | None = Field(
        default=0.2, gt=0, description="the critic's value moves at most so far in a step; null = freely"
    )


class PolicyStream(Section):
    """How the completions push their log-probs."""

    loss: words.LossName = Field(default="clip", description="surrogate of the policy gradient")
    low: float = Field(default=0.2, ge=0, description="ratio is clipped below 1 - low")
    high: float = Field(default=0.2, ge=0, description="ratio is clipped above 1 + high")
    dual_clip: float | None = Field(default=None, gt=1, description="cap of the ratio where the advantage is negative")
    norm: words.NormName = Field(default="token_mean", description="what the sum over completion tokens is divided by")
    entropy: float = Field(default=0.0, ge=0, description="weight of the entropy bonus")
    entropy_tokens: Literal["completions", "all"] = Field(
        default="completions",
        description="where it acts: sampled tokens, or every token with a loss, the solution's too",
    )
    entropy_norm: words.NormName | None = Field(
        default=None, description="its normaliser, over those tokens; null = that of the completions' policy stream"
    )
    weight: float | Literal["complement"] = Field(
        default=1.0, description="of the stream; complement = 1 - likelihood.weight"
    )
    off_policy: words.OffPolicyName = Field(
        default="none", description="how tokens of the solution inside a group push with the group's advantage"
    )
    off_policy_top: float = Field(
        default=1.0, gt=0, le=1, description="share of them, by entropy, that keep the advantage"
    )
    threshold: float = Field(default=0.1, gt=0, description="gamma of shaped: A * pi / (pi + threshold)")
    beta: float = Field(
        default=0.1,
        gt=0,
        description="implicit reward beta * log(pi / reference) of dpo and una; weight of the odds ratio of orpo",
    )


class Likelihood(Section):
    """How the solution's tokens, or own completions taken as one, push their log-probs."""

    tokens: words.TokensName = Field(
        default="none", description="the revealed steps, the whole solution + EOS, own completions, or the last two"
    )
    keep: words.KeepName = Field(default="all", description="which own completions; right ones without repeats")
    rule: words.RuleName = Field(default="nll", description="what each token adds, as a function of its log-prob")
    weight: float = Field(default=0.0, ge=0, description="of the stream in the loss")
    norm: words.NormName = Field(default="token_mean", description="what the sum over its tokens is divided by")
    schedule: words.AnnealingName = Field(
        default="constant", description="the weight stays, falls by a cosine to final, or falls with the hint's p"
    )
    final: float = Field(default=0.0, ge=0, description="weight at the end of the cosine")
    until: float = Field(default=1.0, gt=0, le=1, description="share of the steps over which the cosine falls")
    entropy: float = Field(
        default=0.0, description="weight times exp(this * H), H the policy's mean entropy on completions"
    )
    gate: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="supervise only groups with at most this success rate, in place of their completions",
    )
    buffer: int = Field(
        default=0, ge=0, description="gated rows wait for an update of their own until so many have come"
    )
    scope: Literal["token", "sequence"] = Field(
        default="token", description="importance weighs tokens alone, or whole sequences by their mean"
    )
    clip: float = Field(
        default=0.28, gt=0, description="ratio above 1 + clip has no gradient; importance is at most clip"
    )
    threshold: float = Field(default=0.1, gt=0, description="probability where the weight of trust and shaped bends")
    beta: float = Field(default=0.1, gt=0, description="implicit reward beta * log(pi / reference) of the divergences")
    gamma: float = Field(default=0.95, ge=0, le=1, description="discount of later tokens' losses in tail")


class Pull(Section):
    """The pull towards the model that the phase began with, on completions only."""

    kl: float = Field(default=0.0, ge=0, description="weight of the KL term; 0 = none")
    estimator: words.EstimatorName = Field(default="k3", description="of the loss term")
    clamp: float | None = Field(
        default=None, gt=0, description="most that one token's loss term can be; beyond it no gradient; null = no limit"
    )
    into: words.IntoName = Field(
        default="loss", description="a term of the loss, or taken off each token's reward (k1, l - l_ref)"
    )


class Inputs(Section):
    """What is done to the input embeddings while log-probs are taken (supervised phases; never when sampling)."""

    noise: words.NoiseName = Field(default="none", description="what is added to the embeddings")
    scale: float = Field(
        default=5.0,
        gt=0,
        description="uniform: NEFTune's alpha; gaussian: signal-to-noise ratio; adversarial: norm a sequence",
    )
    copy_weight: float = Field(
        default=1.0, gt=0, description="adversarial: weight of the perturbed copy beside the clean one"
    )
    own: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of the model's own greedy prediction in a response token's embedding",
    )


class Train(Section):
    steps: int = Field(default=500, ge=1, description="of the whole run, all phases together")
    budget: str | None = Field(
        default=None,
        description="sampled=2M, trained=2M (tokens), tokens=4M (both added up) or seconds=60: the run goes on until so "
        "much is used, and train.steps is the unit in which schedules and phases count its share",
    )
    prompts: int = Field(default=32, ge=1, description="prompts a step (rows, not completions)")
    updates: int = Field(default=1, ge=1, description="optimizer updates a step; must divide prompts")
    epochs: int = Field(default=1, ge=1, description="passes over the groups of a step, each of so many updates")
    lr: float = Field(default=1e-6, gt=0, description="highest learning rate")
    optimizer: words.OptimizerName = Field(
        default="adamw_fused",
        description="AdamW, fused where the device has it, or with 8-bit state (bitsandbytes, torchao); Muon for matrices",
    )
    master_weights: bool = Field(
        default=True, description="bfloat16 weights have float32 copies, which the optimizer steps"
    )
    offload_optimizer: bool = Field(default=False, description="its state, and those copies, are in the CPU's memory")
    decay: words.DecayName = Field(default="constant", description="of the learning rate, after the warm-up")
    warmup: int = Field(default=0, ge=0, description="steps of linear warm-up")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.999), description="of AdamW")
    weight_decay: float = Field(default=0.0, ge=0, description="of AdamW")
    clip_norm: float | None = Field(default=1.0, gt=0, description="of the whole gradient; null = no clipping")
    skip_norm: float | None = Field(
        default=None, gt=0, description="an update whose gradient, before clipping, is longer than this is left out"
    )
    token_budget: int = Field(
        default=16384,
        ge=1,
        description="tokens of one forward; changes memory, not the update: a larger group is divided",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="layers keep their inputs alone and are computed again in the backward pass: less memory, more time",
    )
    micro_prompts: int | None = Field(
        default=None, ge=1, description="prompts of a micro-batch (microbatch_token_mean only)"
    )


class Rules(Section):
    """What a method says: everything between rows and an optimizer step."""

    method: str = Field(description="preset; the phase may change any key of its sections")
    show: Show = Show()
    sample: SampleFrom = SampleFrom()
    credit: Credit = Credit()
    policy: PolicyStream = PolicyStream()
    likelihood: Likelihood = Likelihood()
    reference: Pull = Pull()
    inputs: Inputs = Inputs()
    train: Train = Train()


class Phase(Rules):
    """One stretch of a run with its own method (SFT, then RFT). The optimizer and the KL reference start anew."""

    share: float = Field(gt=0, le=1, description="of train.steps")


class Config(Rules):
    method: str = Field(default="uft", description="preset; unift show lists them")  # pyright: ignore[reportIncompatibleVariableOverride]
    seed: int = Field(default=0, description="of hints, order of rows and sampled tokens")
    run: str | None = Field(default=None, description="run folder; default runs/<method>-<hash>")
    threads: int | None = Field(default=None, ge=1, description="of torch; default: all cores")
    baselines: list[str] = Field(default_factory=list, description="methods trained beside this one for comparison")
    model: Model = Model()
    engine: Engine = Engine()
    data: Data = Data()
    reward: Reward = Reward()
    phases: list[Phase] = Field(
        default_factory=list[Phase], description="methods that follow each other, in place of the one above"
    )
    eval: Eval = Eval()
    save: Save = Save()
    log: Log = Log()


METHOD_SECTIONS = tuple(name for name in Rules.model_fields if name != "method")
