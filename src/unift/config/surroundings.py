"""What a run needs besides its method, typed: model, rows, reward, evaluations, checkpoints, logs. And what a section is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

LARGEST = 2**63 - 1  # of a whole number


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _kinds(cls, value: Any, info: ValidationInfo) -> Any:
        """true and false are no numbers, texts and numbers are not true or false: pydantic alone would take
        ``train.steps=true`` for 1 and ``save.rollouts="no"`` for false."""
        kinds = _leaves(cls.model_fields[str(info.field_name)].annotation)
        several = isinstance(value, (list, tuple))
        for item in cast("Sequence[Any]", value) if several else [value]:
            if isinstance(item, bool) and kinds & {int, float} and bool not in kinds:
                raise PydanticCustomError("kind", "expected a number")
            if item is not None and not isinstance(item, bool) and bool in kinds:
                raise PydanticCustomError("kind", "expected true or false")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _fits(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) > LARGEST:
            raise PydanticCustomError("size", "expected a whole number that fits 64 bits")
        return value


def _leaves(annotation: Any) -> set[type]:
    """The types that a setting may have: {int, NoneType} of ``int | None``, {str} of a Literal of words."""
    args = get_args(annotation)
    if not args:
        return {annotation if isinstance(annotation, type) else type(annotation)}
    return set[type]().union(*map(_leaves, args))


class Lora(Section):
    rank: int = Field(default=16, ge=1, description="of the adapters")
    alpha: float = Field(default=32, gt=0, description="adapters are scaled by alpha / rank")
    targets: str | list[str] = Field(default="all-linear", description="names of the layers that get one")


class Model(Section):
    path: str = Field(
        default="embedded:lock",
        description="folder, .gguf file, owner/name on the Hub, embedded:NAME (a base inside unift) or package:NAME (a model "
        "inside an installed Python package)",
    )
    gguf: str | None = Field(default=None, description="name of the GGUF file inside the folder")
    dtype: Literal["float32", "bfloat16", "float64"] = Field(default="float32", description="of the weights")
    quantize: Literal["nf4", "fp4"] | None = Field(
        default=None,
        description="the frozen weights below adapters in 4 bits (QLoRA; a GPU and bitsandbytes); null = as model.dtype",
    )
    device: str = Field(default="auto", description="cpu, cuda, cuda:1; auto: cuda if there is one")
    forward: Literal["auto", "shared", "plain"] = Field(
        default="auto", description="shared prefixes, or the model's own forward"
    )
    autocast: Literal["none", "sample", "all"] = Field(
        default="none",
        description="products in bfloat16 (weights stay float32): nowhere, in sampling, in sampling and training",
    )
    cuda_graphs: bool = Field(
        default=True, description="on a GPU, sampling replays recorded steps; false: launches every kernel"
    )
    shard: Literal["auto", "none", "full"] = Field(
        default="auto",
        description="of several processes each holds all weights (none) or a part (full, FSDP2); auto: full where "
        "accelerate's config file asks for FSDP",
    )
    freeze_vision: bool = Field(
        default=False,
        description="of a model that takes pictures, leave tower and connector as they are; no adapters there either",
    )
    lora: Lora | None = Field(
        default=None, description="train low-rank adapters only; true, a rank, or the keys below; null = all weights"
    )

    @field_validator("lora", mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        """``true`` and ``16`` for what they are meant to be."""
        if isinstance(value, bool):
            return {} if value else None
        return {"rank": value} if isinstance(value, int) else value


BESIDE = ("vllm",)  # engines that sample outside of this process


class Engine(Section):
    """Who completes the prompts: this process, or a server beside it."""

    kind: Literal["auto", "native", "plain", "vllm"] = Field(
        default="auto",
        description="native: shared prefixes, in this process; plain: the model's own forward; auto: the one that fits the "
        "model; vllm: a server (unift serve)",
    )
    url: str = Field(default="http://127.0.0.1:8000", description="vllm: where the server answers")
    timeout: float = Field(
        default=600.0, gt=0, description="vllm: seconds that no answer comes, after which the run ends with the cause"
    )
    folder: str | None = Field(
        default=None,
        description="vllm: where weights are put for the server, which must see the same path; null = engine in the run folder",
    )
    transfer: Literal["folder", "nccl"] = Field(
        default="folder", description="vllm: how weights travel; nccl: from GPU to GPU, not tested"
    )
    overlap: bool = Field(
        default=False,
        description="vllm: the completions of the next step are drawn while this one trains, by weights that are one step older; "
        "ratios and weights take the sampler's own log-probs",
    )
    gap: Literal["warn", "correct", "fail"] = Field(
        default="warn",
        description="where log-probs of trainer and sampler differ: say so or stop above gap_limit; correct: weigh every "
        "sampled token by min(p_trainer / p_sampler, cap)",
    )
    gap_limit: float = Field(
        default=0.1, gt=0, description="mean difference of a step's log-probs, nats, above which gap=warn and fail act"
    )
    cap: float = Field(
        default=2.0,
        gt=0,
        description="of the importance weights of gap=correct, and of overlap where the loss has no ratio",
    )


class Data(Section):
    task: str | None = Field(default=None, description="built-in generator: chain, countdown, jigsaw, knights, lock")
    options: dict[str, Any] = Field(default_factory=dict, description="of the generator")
    train: str | None = Field(default=None, description="file of rows, or hf:owner/name")
    test: str | None = Field(default=None, description="held-out rows; null = no evaluation")
    format: str = Field(default="auto", description="unift, verl, trl, reasoning-gym; auto: by the columns")
    train_rows: int | None = Field(default=None, ge=1, description="first so many of the file, or so many generated")
    test_rows: int | None = Field(default=None, ge=1, description="the same of held-out rows")
    solved: Annotated[int, Field(ge=1)] | Literal["all", "some"] = Field(
        default="all",
        description="which training rows have a worked solution, where the method learns from one. all: a row without is an "
        "error; some: a row without is trained by its reward alone, and left out where there is none; a number: the first so "
        "many, all others lose theirs",
    )
    seed: int = Field(default=0, description="of the generator and of the split; apart from the run's seed")
    max_prompt: int = Field(
        default=2048, ge=1, description="tokens of prompt + whole solution; a longer row is an error"
    )


class WeightedReward(Section):
    """One of several rewards. Text alone stands for weight 1."""

    function: str = Field(description="as reward.function")
    weight: float = Field(default=1.0, description="of its value in the score")

    @model_validator(mode="before")
    @classmethod
    def _of_text(cls, found: Any) -> Any:
        return {"function": found} if isinstance(found, str) else found


OneOrMore = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[WeightedReward], Field(min_length=1), Tag("list")],
    Discriminator(lambda found: "list" if isinstance(found, list) else "text"),  # one message for a mistake, not two
]


class Reward(Section):
    function: OneOrMore = Field(
        default="auto",
        description="auto (the row's task), a task's name, module:function or file.py:function; or a list of these, "
        "each alone (weight 1) or as {function, weight}, whose weighted sum is the score",
    )
    format_score: float = Field(default=0.0, lt=1, description="for a parsable wrong answer")
    rule: Literal["unift", "paper"] = Field(
        default="unift", description="paper: the official graders of UFT, for comparison"
    )
    answer: Literal["auto", "tags", "boxed", "hash", "last_number"] = Field(
        default="auto", description="where the answer stands; auto: where the training rows' own solutions have it"
    )
    workers: int = Field(default=1, ge=1, description="processes that score")
    timeout: float = Field(default=5.0, gt=0, description="seconds of CPU time for one completion")
    wall_timeout: float | None = Field(
        default=None, gt=0, description="seconds of wall clock for one completion; default 10 times reward.timeout"
    )
    error_rate: float = Field(default=0.1, ge=0, le=1, description="of failed scores above which the run stops")
    memory_mb: int | None = Field(
        default=None, ge=1, description="MiB that a worker may take beyond what it holds once the reward is loaded"
    )
    environment: list[str] = Field(
        default_factory=list, description="variables that the reward sees although they look like secrets"
    )


class Eval(Section):
    every: int = Field(default=50, ge=0, description="steps; 0 = only at the end")
    rows: int | None = Field(default=None, ge=1, description="first so many rows of the test split")
    subset: int | None = Field(
        default=None, ge=1, description="first so many of them while training; the base and the end are judged on all"
    )
    train_rows: int | None = Field(
        default=100, ge=0, description="first so many training rows, at the end of a run; 0 = none, null = all"
    )
    samples: int = Field(
        default=0, ge=0, description="sampled completions a row for pass@k at the end; 0 = greedy only"
    )
    max_tokens: int | None = Field(default=None, ge=1, description="default: sample.max_tokens")


class Save(Section):
    every: int = Field(default=50, ge=0, description="steps between checkpoints; 0 = only at the end")
    keep: int = Field(default=2, ge=1, description="last so many are kept, and the best")
    rollouts: bool = Field(default=True, description="what every step sampled, with scores")


class Log(Section):
    gradients_every: int = Field(
        default=10, ge=0, description="steps between measurements of both streams' gradients; 0 = never"
    )
    trackers: list[Literal["wandb", "tensorboard", "trackio"]] = Field(
        default_factory=list[Literal["wandb", "tensorboard", "trackio"]], description="through accelerate"
    )
