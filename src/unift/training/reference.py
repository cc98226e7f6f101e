"""The policy that a phase began with: log-probs for a KL or a rule, and a sampler for its completions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from unift.model.logprobs import logprobs
from unift.model.packs import PackedBatch
from unift.model.policy import Policy
from unift.training.run import checkpoint


class Reference:
    """With new LoRA adapters and at the start of a run: these switched off. Otherwise a frozen copy of the weights.

    ``twin`` loads the policy anew, for weights in shards: those cannot be copied.
    """

    def __init__(
        self,
        policy: Policy,
        folder: Path,
        start: int,
        temperature: float,
        twin: Callable[[], Policy] | None = None,
    ) -> None:
        self.temperature = temperature
        self.live = policy if policy.lora and start == 0 and not policy.continues else None
        if self.live is None:
            self.frozen = (
                twin() if twin is not None else replace(policy, model=copy.deepcopy(policy.model), critic=None)
            )
            if start > 0:
                checkpoint.restore(folder, start, self.frozen, None)
            self.frozen.model.requires_grad_(False)

    @contextmanager
    def policy(self) -> Iterator[Policy]:
        if self.live is None:
            yield self.frozen
            return
        with self.live.model.disable_adapter():  # type: ignore[operator]
            yield self.live

    def __call__(self, batch: PackedBatch) -> Tensor:
        with self.policy() as policy:
            return logprobs(policy, batch, self.temperature)[0]
