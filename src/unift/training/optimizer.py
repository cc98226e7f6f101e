"""What steps the weights: AdamW in three forms, Muon, and either of them over copies of the weights (`MasterWeights`).

bfloat16 weights lose small updates (``model/precision.py``). Their float32 copies do not: the optimizer steps those, and each
weight becomes its copy, rounded once. Gradients of such weights are float32 too, so that many micro-batches add up. Where
weights are sharded, the shards are these copies (``model/sharding.py``), and the optimizer steps them as they are.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unift import processes
from unift.config import words
from unift.config.sections import Config, Train
from unift.config.stages import stages
from unift.model import precision
from unift.model.policy import Policy
from unift.model.sharding import assign, full, sharded
from unift.types import ConfigError

Parameters = Sequence[nn.Parameter]
Make = Callable[[Parameters], Optimizer]


def make_optimizer(policy: Policy, train: Train) -> Optimizer:
    """The optimizer of ``train.optimizer`` over what is trained. Warns where the weights cannot hold its updates.

    Sets the type of the weights' gradients, and begins from weights as the model sees them: float32 shards of bfloat16 weights
    are rounded to these. Raises ConfigError for an optimizer that is not installed.
    """
    parameters = policy.parameters()
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if (seen := policy.seen(name, p)) is not p:
                p.copy_(seen)
    half = [p for p in parameters if _half(p)]
    for p in (p for p in half if not sharded(p)):  # FSDP2 settles the type of its own
        _set_gradient_type(p, torch.float32 if train.master_weights else p.dtype)
    if not train.master_weights:
        said = precision.warning(precision.of_model(parameters), train.lr)
        if said and processes.first():
            warnings.warn(said, RuntimeWarning, stacklevel=2)
    ends = {id(m.weight) for m in (policy.embeddings, policy.head) if m is not None}
    matrix = [p.ndim == 2 and id(p) not in ends and p.shape[0] > 1 for p in parameters]

    def make(own: Parameters) -> Optimizer:
        return MAKERS[train.optimizer](own, matrix, train)

    place = torch.device("cpu") if train.offload_optimizer else None
    elsewhere = place is not None and any(p.device != place for p in parameters)
    if not elsewhere and not (half and train.master_weights):
        return make(parameters)

    def copied(p: Tensor) -> bool:
        return (place is not None and p.device != place) or (train.master_weights and _half(p))

    return MasterWeights(parameters, make, train.lr, copied, place)


def check_optimizers(config: Config, shards: bool = False) -> None:
    """Raise ConfigError, before a model is loaded, for an optimizer whose package is not installed, or that cannot step weights
    in shards."""
    trains = [stage.rules.train for stage in stages(config)]
    if shards:
        _check_shards(config, trains)
    for name in {train.optimizer for train in trains}:
        if name == "adamw_8bit":
            _eight_bit()
        if name == "muon" and not hasattr(torch.optim, "Muon"):
            raise ConfigError(
                f"train.optimizer=muon needs torch 2.9 or newer, found {torch.__version__}: use adamw_fused"
            )


def _check_shards(config: Config, trains: Sequence[Train]) -> None:
    if any(train.optimizer == "adamw_8bit" for train in trains):
        raise ConfigError(
            "train.optimizer=adamw_8bit scales its state by blocks of a process's own part of a weight, so that updates and "
            "checkpoints of sharded weights would depend on the number of processes: use adamw_fused, whose state is shared out, "
            "or model.shard=none"
        )
    if any(train.optimizer == "muon" and train.offload_optimizer for train in trains):
        raise ConfigError(
            "train.optimizer=muon gathers whole matrices on the GPUs, and with train.offload_optimizer=true its state is not "
            "there: set one of them otherwise, or model.shard=none"
        )
    if config.model.dtype == "bfloat16" and config.model.lora is None and len({t.master_weights for t in trains}) > 1:
        raise ConfigError(
            "train.master_weights differs between the phases, and with model.shard=full the shards are float32 copies in all "
            "phases or in none: set it once, for the whole run"
        )


def set_rate(optimizer: Optimizer, lr: float) -> None:
    """Learning rate of the next step, in every group."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def _half(p: Tensor) -> bool:
    return p.dtype in (torch.bfloat16, torch.float16)


def gradient_type(p: Tensor) -> torch.dtype:
    """Of a weight's gradient; its own, unless it has a float32 copy."""
    return getattr(p, "grad_dtype", None) or p.dtype


def no_gradient(p: Tensor) -> Tensor:
    """Zeros that may stand for the gradient of a weight."""
    return torch.zeros_like(p, dtype=gradient_type(p))


def _set_gradient_type(p: Tensor, dtype: torch.dtype) -> None:
    if not hasattr(p, "grad_dtype"):
        if dtype == p.dtype:
            return
        raise ConfigError(
            f"train.master_weights=true needs a torch whose bfloat16 weights may have float32 gradients (Tensor.grad_dtype), "
            f"found {torch.__version__}: update torch, or use model.dtype=float32 with model.autocast=all"
        )
    p.grad = None
    p.grad_dtype = dtype


# ---------------------------------------------------------------------------------------------- copies


class MasterWeights(Optimizer):
    """Steps copies of parameters, then writes them back: in float32 where these have 16 bits, and on ``device`` with all of the
    optimizer's state where one is given (CPU offload).

    The copies are made at the first step, of the weights as they are then. ``state[p]`` of a parameter is what the inner
    optimizer keeps for its copy, and ``master``, the copy itself: a checkpoint holds both, so a run goes on exactly.
    """

    def __init__(
        self,
        parameters: Parameters,
        make: Make,
        lr: float,
        copied: Callable[[Tensor], bool],
        device: torch.device | None = None,
    ) -> None:
        super().__init__(parameters, {"lr": lr})
        self._make, self._copied, self._device = make, copied, device
        self._inner: Optimizer | None = None
        self._copies: list[nn.Parameter] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if self._inner is None:
            self._inner = self._begun()
        own = self.param_groups[0]["params"]
        for p, copy in zip(own, self._copies, strict=True):
            if copy is not p:
                copy.grad = None if p.grad is None else p.grad.to(device=copy.device, dtype=copy.dtype)
        set_rate(self._inner, self.param_groups[0]["lr"])
        self._inner.step()
        for p, copy in zip(own, self._copies, strict=True):
            self.state[p] = dict(self._inner.state[copy])
            if copy is not p:
                copy.grad = None
                p.copy_(copy)
                self.state[p]["master"] = copy.detach()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """What ``state_dict`` gave. Nothing is cast: a copy of a bfloat16 weight stays float32."""
        own = self.param_groups[0]["params"]
        self.state.clear()
        for number, values in state_dict["state"].items():
            self.state[own[number]] = dict(values)
        self._inner = None

    def _begun(self) -> Optimizer:
        own = self.param_groups[0]["params"]
        self._copies = [self._copy(p) for p in own]
        inner = self._make(self._copies)
        order = [c for group in inner.param_groups for c in group["params"]]
        place = {id(c): n for n, c in enumerate(order)}
        kept = {
            place[id(c)]: {name: value for name, value in self.state[p].items() if name != "master"}
            for p, c in zip(own, self._copies, strict=True)
            if self.state.get(p)
        }
        if any(kept.values()):
            inner.load_state_dict({"state": kept, "param_groups": inner.state_dict()["param_groups"]})
        return inner

    def _copy(self, p: nn.Parameter) -> nn.Parameter:
        if not self._copied(p):
            return p
        value: Tensor = self.state.get(p, {}).get("master", p.detach())
        dtype = torch.float32 if _half(p) else p.dtype
        return nn.Parameter(value.to(device=self._device or p.device, dtype=dtype, copy=True))


# ---------------------------------------------------------------------------------------------- optimizers


def _adamw(own: Parameters, train: Train, fused: bool) -> Optimizer:
    return torch.optim.AdamW(own, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay, fused=fused)


def _adamw_fused(own: Parameters, train: Train) -> Optimizer:
    return _adamw(own, train, all(p.device.type in ("cpu", "cuda") for p in own))


EIGHT_BIT = ("bitsandbytes", "torchao")  # packages that have it, the preferred one first


def _eight_bit() -> str:
    """The package to take it from. ConfigError where none is installed."""
    found = next((name for name in EIGHT_BIT if importlib.util.find_spec(name)), None)
    if found is None:
        raise ConfigError(
            "train.optimizer=adamw_8bit needs bitsandbytes (or torchao), which is not installed. Install it with `pip "
            "install bitsandbytes`, or use train.optimizer=adamw_fused"
        )
    return found


def _adamw_8bit(own: Parameters, train: Train) -> Optimizer:
    kind = importlib.import_module(f"{_eight_bit()}.optim").AdamW8bit
    return kind(own, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay)


def _make_muon(own: Parameters, train: Train) -> Optimizer:
    return torch.optim.Muon(own, lr=train.lr, weight_decay=train.weight_decay, adjust_lr_fn="match_rms_adamw")


class _MuonOfShards(Optimizer):
    """Muon of sharded matrices. A step of it needs a whole one: each is gathered with gradient and momentum, stepped by every
    process alike, and dealt out again, so that the update is that of one process."""

    def __init__(self, own: Parameters, train: Train) -> None:
        self._train = train
        super().__init__(own, dict(_make_muon(own, train).defaults))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                whole = nn.Parameter(full(p.detach()))
                whole.grad = full(p.grad)
                inner = _make_muon([whole], self._train)
                inner.param_groups = [{**group, "params": [whole]}]
                inner.state[whole] = {name: full(value) for name, value in self.state[p].items()}
                inner.step()
                assign(p, whole.detach())
                for name, value in inner.state[whole].items():
                    self.state[p].setdefault(name, torch.zeros_like(p, dtype=value.dtype, requires_grad=False))
                    assign(self.state[p][name], value)


class _MuonAndAdamW(Optimizer):
    """Two optimizers that share one state; their parameters are the groups of this one, in this order."""

    def __init__(self, matrices: Parameters, others: Parameters, train: Train) -> None:
        self._parts: list[Optimizer] = []
        if matrices:
            kind = _MuonOfShards if any(map(sharded, matrices)) else _make_muon
            self._parts.append(kind(matrices, train))
        if others:
            self._parts.append(_adamw_fused(others, train))
        super().__init__([{"params": part.param_groups[0]["params"]} for part in self._parts], {"lr": train.lr})
        self.param_groups = [group for part in self._parts for group in part.param_groups]
        self._share()

    def _share(self) -> None:
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.state, part.param_groups = self.state, [group]

    def step(self, closure: Any = None) -> None:
        for part in self._parts:
            part.step()

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self._share()


def _muon(own: Parameters, matrix: Sequence[bool], train: Train) -> Optimizer:
    """Muon for the matrices inside the model (Jordan 2024), its step scaled to the size of AdamW's (arXiv 2502.16982), so
    that train.lr means the same; AdamW for embeddings, head, norms and biases."""
    chosen = [p for p, is_matrix in zip(own, matrix, strict=True) if is_matrix]
    others = [p for p, is_matrix in zip(own, matrix, strict=True) if not is_matrix]
    return _MuonAndAdamW(chosen, others, train)


MAKERS: Mapping[words.OptimizerName, Callable[[Parameters, Sequence[bool], Train], Optimizer]] = {
    "adamw": lambda own, matrix, train: _adamw(own, train, fused=False),
    "adamw_fused": lambda own, matrix, train: _adamw_fused(own, train),
    "adamw_8bit": lambda own, matrix, train: _adamw_8bit(own, train),
    "muon": _muon,
}
