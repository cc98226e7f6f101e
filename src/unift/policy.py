"""The policy: load, adapt, log-probs of packed groups, save.

Any Hugging Face causal LM with softmax attention. The trunk runs once over the flat tokens of a pack; the language
model head runs only at positions that carry a loss, in chunks, and its logits are recomputed in the backward pass.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unift import attention, matmul
from unift.types import ConfigError

if TYPE_CHECKING:
    from unift.batch import PackedBatch
    from unift.config import Lora
    from unift.config import Model as ModelConfig

CHUNK = 1024  # loss positions whose logits exist at one time
KEEP = 2**27  # logits of a pack are kept for the backward pass up to so many numbers (0.5 GiB), else made again


@dataclass
class Policy:
    """A causal LM seen as trunk and head. ``model`` may be wrapped by LoRA adapters; ``base`` is what lies below."""

    model: nn.Module
    tokenizer: Any
    device: torch.device
    lora: bool = False
    autocast: str = "none"  # bfloat16 products: none, sample, all

    @property
    def base(self) -> Any:
        return self.model.get_base_model() if self.lora else self.model  # type: ignore[operator]

    @property
    def trunk(self) -> nn.Module:
        return self.base.base_model

    @property
    def head(self) -> nn.Linear:
        return self.base.get_output_embeddings()

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def precision(self, sampling: bool) -> Any:
        """Context in which trunk and head multiply in bfloat16, where the setting asks for it."""
        on = self.autocast == "all" or (sampling and self.autocast == "sample")
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=on)

    def hidden(self, tokens_T: Tensor, positions_T: Tensor, layout: attention.Layout) -> Tensor:
        """Last hidden states [T, width] of a flat row of tokens."""
        thin = self.device.type == "cpu" and len(tokens_T) < matmul.THIN
        with attention.layout(layout), matmul.small(thin):
            out = self.trunk(input_ids=tokens_T[None], position_ids=positions_T[None], use_cache=False)
        return out.last_hidden_state[0]

    def logits(self, hidden_SD: Tensor) -> Tensor:
        weight = self.head.weight
        with matmul.small(self.device.type == "cpu" and weight.numel() < matmul.LARGE):
            return torch.nn.functional.linear(hidden_SD, weight, self.head.bias)


# ---------------------------------------------------------------------------------------------- log-probs


class _ChunkedLogProb(torch.autograd.Function):
    """log softmax(scale * (h W' + b))[target] and entropy, without ever holding [S, vocabulary].

    dL/dlogits = g * (onehot - p) - g_H * p * (log p + H). Up to KEEP numbers, log p is kept for the backward pass; above,
    logits are made again chunk by chunk (one extra product).
    """

    @staticmethod
    def forward(ctx, hidden_SD, weight_VD, bias_V, target_S, scale_S, chunk, keep):  # noqa: ANN001, ANN205
        logp, entropy, lse, kept = [], [], [], []
        for part in range(0, len(target_S), chunk):
            z = _ChunkedLogProb._z(hidden_SD, weight_VD, bias_V, scale_S, slice(part, part + chunk))
            norm = z.logsumexp(-1)
            logq = z.sub_(norm[:, None])
            logp.append(logq.gather(1, target_S[part : part + chunk, None])[:, 0])
            lse.append(norm)
            entropy.append(-(logq.exp() * logq).sum(-1))
            kept.append(logq)
            if len(target_S) * len(weight_VD) > keep:
                kept.clear()
        ctx.save_for_backward(hidden_SD, weight_VD, bias_V, target_S, scale_S, torch.cat(lse), torch.cat(entropy))
        ctx.chunk, ctx.kept = chunk, kept
        return torch.cat(logp), torch.cat(entropy)

    @staticmethod
    def _z(hidden_SD, weight_VD, bias_V, scale_S, rows):  # noqa: ANN001, ANN205
        z = torch.nn.functional.linear(hidden_SD[rows], weight_VD, bias_V)
        z = z if z.dtype == torch.float64 else z.float()
        return z.mul_(scale_S[rows, None].to(z.dtype))

    @staticmethod
    def backward(ctx, g_logp, g_entropy):  # noqa: ANN001, ANN205
        hidden, weight, bias, target, scale, lse, entropy = ctx.saved_tensors
        g_hidden = torch.empty_like(hidden)
        g_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        g_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        use_entropy = bool(g_entropy.any())
        for number, part in enumerate(range(0, len(target), ctx.chunk)):
            rows = slice(part, part + ctx.chunk)
            if ctx.kept:
                logq = ctx.kept[number]
            else:
                logq = _ChunkedLogProb._z(hidden, weight, bias, scale, rows).sub_(lse[rows, None])
            p = logq.exp()
            g = p * -g_logp[rows, None] if use_entropy else p.mul_(-g_logp[rows, None])
            if use_entropy:
                g -= g_entropy[rows, None] * p * (logq + entropy[rows, None])
            g.scatter_add_(1, target[rows, None], g_logp[rows, None])
            g = g.mul_(scale[rows, None].to(g.dtype)).to(hidden.dtype)
            g_hidden[rows] = g @ weight
            if g_weight is not None:
                torch.addmm(g_weight, g.T, hidden[rows], out=g_weight)
            if g_bias is not None:
                g_bias += g.sum(0)
        return g_hidden, g_weight, g_bias, None, None, None, None


def chunked_logprobs(
    hidden_SD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_S: Tensor,
    scale_S: Tensor,
    chunk: int = CHUNK,
    keep: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [S] of ``target_S`` under softmax(scale * logits), in float32 (float64 stays)."""
    keep = KEEP if keep is None else keep
    return _ChunkedLogProb.apply(hidden_SD, weight_VD, bias_V, target_S, scale_S, chunk, keep)  # type: ignore[return-value]


def logprobs(policy: Policy, batch: PackedBatch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(l_S, entropy_S) of a pack. Completions use logits / temperature as the sampler did; hints and demonstrations
    are scored under the untempered policy (trap 8)."""
    from unift.batch import COMPLETION

    with policy.precision(sampling=False):
        hidden_TD = policy.hidden(batch.tokens_T, batch.positions_T, batch.layout)
    scale_S = torch.where(batch.role_S == COMPLETION, 1.0 / temperature, 1.0)
    head, hidden_SD = policy.head, hidden_TD.index_select(0, batch.at_S)
    weight, bias = head.weight, head.bias
    if policy.autocast == "all":  # explicitly: the backward pass runs outside of autocast
        hidden_SD, weight = hidden_SD.bfloat16(), weight.bfloat16()
        bias = None if bias is None else bias.bfloat16()
    return chunked_logprobs(hidden_SD, weight, bias, batch.target_S, scale_S)


# ---------------------------------------------------------------------------------------------- load


def locate(path: str) -> Path:
    """Folder of a model: a real folder, ``embedded:NAME`` in the package, or a GGUF file's folder."""
    if path.startswith("embedded:"):
        root = Path(str(resources.files("unift") / "assets"))
        folder = root / path.split(":", 1)[1]
        if not folder.is_dir():
            known = sorted(f.name for f in root.iterdir() if f.is_dir() and not f.name.startswith("_"))
            raise ConfigError(f"model.path={path!r}: no such base in the package. Known: {', '.join(known)}")
        return folder
    folder = Path(path).expanduser()
    if not folder.exists():
        raise ConfigError(
            f"model.path={path!r} is neither a folder nor embedded:NAME. unift does not download models: "
            "fetch the folder first, for example with `hf download`"
        )
    return folder.parent if folder.is_file() else folder


def _gguf(config: ModelConfig) -> str | None:
    return Path(config.path).name if config.path.endswith(".gguf") else config.gguf


def load_tokenizer(config: ModelConfig) -> Any:
    from transformers import AutoTokenizer

    folder, gguf = locate(config.path), _gguf(config)
    try:
        extra = {"gguf_file": gguf} if gguf else {}
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, **extra)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer could be read from {folder}: {error}") from error


def pick_device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(config: ModelConfig, tokenizer: Any = None) -> Policy:
    """Read the model, add LoRA adapters if asked, and check that the shared-prefix path gives the model's own logits."""
    from transformers import AutoModelForCausalLM

    attention.register()
    folder, gguf = locate(config.path), _gguf(config)
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(config)
    try:
        extra = {"gguf_file": gguf} if gguf else {}
        dtype = getattr(torch, config.dtype)
        model = AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True, dtype=dtype, **extra)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no causal language model could be read from {folder}: {error}") from error
    device = pick_device(config.device)
    if device.type == "cpu":
        matmul.route()
    model = model.to(device=device).eval()  # type: ignore[call-arg]  # eval: no dropout; gradients flow all the same
    model.config.use_cache = False
    if gguf:
        _forget_gguf(model)
    check_attention(model, device)
    if config.lora is not None:
        model = _adapt(model, config.lora)
    return Policy(model, tokenizer, device, lora=config.lora is not None, autocast=config.autocast)


def _forget_gguf(model: Any) -> None:
    """The weights are plain floats now; transformers would refuse to save what it still calls a quantized model."""
    model.hf_quantizer = None
    model.is_quantized = False
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)


def _adapt(model: nn.Module, lora: Lora) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.targets, lora_dropout=0.0, task_type="CAUSAL_LM"  # type: ignore[arg-type]
    )
    return get_peft_model(model, settings)  # type: ignore[arg-type]


def check_attention(model: Any, device: torch.device) -> None:
    """Switch the model to unift's attention and compare with its own on a short text. Raises ConfigError if it differs."""
    name = type(model).__name__
    if not getattr(model, "_supports_attention_backend", False):
        raise ConfigError(f"{name} does not let its attention be replaced, which the shared-prefix path needs")
    tokens = torch.arange(1, 9, device=device) % model.config.vocab_size
    with torch.no_grad():
        expected = model(input_ids=tokens[None], use_cache=False).logits[0]
        model.set_attn_implementation(attention.NAME)
        policy = Policy(model, None, device)
        prefix_BP, rest = torch.arange(3)[None], torch.arange(3, 8)[None, None]
        layout = attention.PackedLayout(prefix_BP, rest, torch.arange(8), torch.tensor([3])).to(device)
        try:
            got = policy.logits(policy.hidden(tokens, torch.arange(8, device=device), layout))
        except (NotImplementedError, TypeError, AttributeError) as error:
            raise ConfigError(f"{name}: the shared-prefix path does not fit this model ({error})") from error
    gap = (got.float() - expected.float()).abs().max().item()
    limit = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.25
    if not gap <= limit * max(1.0, expected.abs().max().item()):
        raise ConfigError(
            f"{name}: logits of the shared-prefix path differ from the model's own by {gap:.3g}. The model does "
            "something between its last hidden state and its logits, or in attention, that unift does not reproduce"
        )


# ---------------------------------------------------------------------------------------------- save


def save_pretrained(policy: Policy, folder: Path) -> None:
    """A plain Hugging Face folder (adapters merged) that AutoModelForCausalLM.from_pretrained and vLLM read."""
    shutil.rmtree(folder, ignore_errors=True)
    base = policy.base
    kept = base.config._attn_implementation
    base.config._attn_implementation_internal = None  # not a property of the weights
    base.config.use_cache = True
    try:
        if policy.lora:
            policy.model.merge_adapter()  # type: ignore[operator]
            state = {
                k.replace(".base_layer", ""): v.detach().clone().contiguous()
                for k, v in base.state_dict().items()
                if ".lora_" not in k
            }
            policy.model.unmerge_adapter()  # type: ignore[operator]
            base.save_pretrained(folder, state_dict=state)
        else:
            base.save_pretrained(folder)
    finally:
        base.config._attn_implementation_internal = kept
        base.config.use_cache = False
    policy.tokenizer.save_pretrained(folder)
