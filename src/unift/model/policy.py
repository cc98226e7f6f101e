"""The policy: any Hugging Face causal LM seen as trunk and head.

On the shared-prefix path the trunk runs once over the flat tokens of a pack. Models that this does not reproduce take
the plain path (``plain.py``); ``paths.py`` decides when the model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from unift.model import attention, matmul, plain, sharding, vision
from unift.model.attention.decode import DecodeLayout
from unift.model.attention.packed import PackedLayout
from unift.model.packs import PackedBatch
from unift.rows import chat, processor, tokens

T = TypeVar("T")
PACK_STEPS = 8  # sampled tokens from which it pays to rearrange the weights for decoding


@dataclass
class Policy:
    """A causal LM seen as trunk and head. ``model`` may be wrapped by LoRA adapters; ``base`` is what lies below."""

    model: nn.Module
    tokenizer: Any
    device: torch.device
    lora: bool = False
    continues: bool = False  # its adapters come from an earlier run: switched off, it is not the policy that began
    autocast: str = "none"  # bfloat16 products: none, sample, all
    why_plain: str = ""  # why the model takes the plain path; empty on the shared-prefix path
    cuda_graphs: bool = True  # the sampler may record its steps on a GPU
    cached: bool = False  # the plain sampler may use the model's own cache
    critic: nn.Linear | None = None  # value head, while a phase with a critic runs
    root: sharding.Root | None = None  # model and critic where their weights are sharded

    def run(self, do: Callable[[], T]) -> T:
        """``do()``, which may read the weights. Everything that does, beside a sampler, runs through here: where the weights
        are sharded, they are gathered for it, and all processes call this together."""
        return do() if self.root is None else sharding.run(self.root, do)

    def whole(self) -> AbstractContextManager[None]:
        """Context in which every process holds all weights, for work without gradient that the others do not share."""
        return sharding.whole(self.root)

    def sharded(self, critic: nn.Linear | None, masters: bool = True) -> Policy:
        """The policy with this process's part of its weights; this one is used up. ``critic``: the value head of any phase.
        masters: the shards of 16-bit weights are float32, for an optimizer to step.

        Raises ConfigError where the model or this torch does not allow it.
        """
        root = sharding.shard(self.model, self.base, self.device, critic, masters, self.shared)
        # A recorded step would hold addresses of weights that are gathered anew for each batch.
        return replace(self, root=root, cuda_graphs=False)

    @property
    def shared(self) -> bool:
        """Read off the model itself, so that no copy of it can be taken for what it is not."""
        return vision.implementation(self.base) == attention.NAME

    @property
    def path(self) -> str:
        """For people: ``shared``, or ``plain`` with the reason."""
        return "shared" if self.shared else f"plain ({self.why_plain})"

    @property
    def base(self) -> Any:
        return self.model.get_base_model() if self.lora else self.model  # type: ignore[operator]

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end a completion, ascending: the tokenizer's EOS, what closes a turn of its chat template, and those
        of the model's generation config. The same set stops the sampler and whoever generates with the saved model."""
        more = getattr(getattr(self.base, "generation_config", None), "eos_token_id", None)
        own = set() if more is None else set(more if isinstance(more, list) else [more])
        return sorted(own | chat.end_ids(self.tokenizer))

    @property
    def reader(self) -> processor.Reader | None:
        """Of pictures; None for a model of text."""
        return processor.reader_of(self.tokenizer)

    @cached_property
    def token_ids(self) -> Tensor | None:
        """Ids that the tokenizer has a token for, int64, where these are not all that the head has logits for; else None.

        Other ids are never sampled. Log-probs are those of the whole softmax in sampler and trainer alike, as they are of
        the saved model: a sampled token comes from this distribution, given that it is a token.
        """
        if not hasattr(self.tokenizer, "get_vocab") or self.head is None:
            return None
        rows = self.head.weight.shape[0]
        ids = [i for i in tokens.token_ids(self.tokenizer) if i < rows]
        return torch.tensor(ids, device=self.device) if len(ids) < rows else None

    def draw(self, scores_NV: Tensor, pick: Callable[[Tensor], Tensor]) -> Tensor:
        """Ids [N] that ``pick`` chooses by their scores among the tokens: f(scores [N, K]) -> columns [N]."""
        if self.token_ids is None:
            return pick(scores_NV)
        k = len(self.token_ids)
        if self._padded:  # a view
            return pick(scores_NV[:, :k])
        return self.token_ids[pick(scores_NV.index_select(1, self.token_ids))]

    @cached_property
    def _padded(self) -> bool:
        """The ids without a token are the last ones."""
        return self.token_ids is not None and int(self.token_ids[-1]) + 1 == len(self.token_ids)

    @property
    def trunk(self) -> nn.Module:
        return self.base.base_model

    @property
    def head(self) -> nn.Linear:
        return self.base.get_output_embeddings()

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What is trained: of the model, then of the critic."""
        own = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        return own + [
            (f"critic.{n}", p) for n, p in (self.critic.named_parameters() if self.critic is not None else ())
        ]

    def seen(self, name: str, p: Tensor) -> Tensor:
        """A trained weight in the type that the model multiplies by: shards may be float32 copies of it (`sharding`)."""
        wide = self.root is not None and self.root.gathered is not None and not name.startswith("critic.")
        return p.to(self.root.gathered) if wide and self.root is not None else p

    def parameters(self) -> list[nn.Parameter]:
        return [p for _, p in self.named_parameters()]

    @property
    def embeddings(self) -> nn.Embedding:
        return self.base.get_input_embeddings()

    def precision(self, sampling: bool) -> Any:
        """Context in which trunk and head multiply in bfloat16, where the setting asks for it."""
        on = self.autocast == "all" or (sampling and self.autocast == "sample")
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=on)

    @contextmanager
    def sampling(self, steps: int) -> Iterator[None]:
        """Context of a sampler that makes ``steps`` tokens a row: its precision, and weights laid out for few rows.
        Sharded weights are whole by then (`whole`)."""
        pays = self.device.type == "cpu" and steps >= PACK_STEPS
        packed = matmul.packed(self.model, bfloat16=self.autocast != "none") if pays else nullcontext()
        with self.precision(sampling=True), packed:
            yield

    def hidden(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        layout: PackedLayout | DecodeLayout,
        delta_TD: Tensor | None = None,
        inputs_fixed: bool = False,
        view: vision.View | None = None,
    ) -> Tensor:
        """Last hidden states [T, width] of a flat row of tokens. ``delta_TD`` is added to the input embeddings;
        ``inputs_fixed``: no gradient through these. ``view``: the pictures that it shows."""
        given: dict[str, Tensor] = {"input_ids": tokens_T[None]}
        if delta_TD is not None:
            clean_TD = self.embeddings(tokens_T)
            given = {"inputs_embeds": ((clean_TD.detach() if inputs_fixed else clean_TD) + delta_TD)[None]}
        thin = self.device.type == "cpu" and len(tokens_T) < matmul.THIN
        more = {"position_ids": positions_T[None]} if view is None else view.for_model(positions_T)
        with attention.layout(layout), matmul.small(thin):
            out = self.trunk(**given, **more, use_cache=False)
        return out.last_hidden_state[0]

    def view(self, batch: PackedBatch) -> vision.View | None:
        """The pictures of a pack as its forward is given them; None where it has none."""
        place = batch.tokens_T, batch.positions_T, batch.layout.spans
        return vision.view(self.base, self.reader, *place, batch.shown)

    def logits(self, hidden_SD: Tensor) -> Tensor:
        head = self.head
        with matmul.small(self.device.type == "cpu" and head.weight.numel() < matmul.LARGE):
            return head(hidden_SD)  # the module itself: it may be packed while sampling, or wrapped by an adapter

    def tokens_forwarded(self, batch: PackedBatch) -> int:
        """Tokens that the forward of a pack computes, without padding."""
        return len(batch.tokens_T) if self.shared else plain.Rows(batch).total
