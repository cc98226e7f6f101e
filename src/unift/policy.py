"""The policy: load, adapt, log-probs of packed groups, save.

Any Hugging Face causal LM. On the shared-prefix path the trunk runs once over the flat tokens of a pack; the language
model head runs only at positions that carry a loss, in chunks, and its logits are recomputed in the backward pass. Models
that this does not reproduce take the plain path (``plain.py``); ``forward.py`` decides when the model is loaded.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unift import attention, forward, matmul, plain, processes
from unift.packs import COMPLETION, PackedBatch
from unift.types import ConfigError

if TYPE_CHECKING:
    from unift.config import Lora
    from unift.config import Model as ModelConfig

CHUNK = 1024  # loss positions whose logits exist at one time,
LOGITS = 2**25  # or fewer, so that these are no more than so many numbers (128 MiB)
KEEP = 2**27  # logits of a pack are kept for the backward pass up to so many numbers (0.5 GiB), else made again
PACK_STEPS = 8  # sampled tokens from which it pays to rearrange the weights for decoding


@dataclass
class Policy:
    """A causal LM seen as trunk and head. ``model`` may be wrapped by LoRA adapters; ``base`` is what lies below."""

    model: nn.Module
    tokenizer: Any
    device: torch.device
    lora: bool = False
    autocast: str = "none"  # bfloat16 products: none, sample, all
    why_plain: str = ""  # why the model takes the plain path; empty on the shared-prefix path
    cuda_graphs: bool = True  # the sampler may record its steps on a GPU
    cached: bool = False  # the plain sampler may use the model's own cache
    critic: nn.Linear | None = None  # value head, while a phase with a critic runs

    @property
    def shared(self) -> bool:
        """Read off the model itself, so that no copy of it can be taken for what it is not."""
        return self.base.config._attn_implementation == attention.NAME

    @property
    def path(self) -> str:
        """For people: ``shared``, or ``plain`` with the reason."""
        return "shared" if self.shared else f"plain ({self.why_plain})"

    @property
    def base(self) -> Any:
        return self.model.get_base_model() if self.lora else self.model  # type: ignore[operator]

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
        """Context of a sampler that makes ``steps`` tokens a row: its precision, and weights laid out for few rows."""
        pays = self.device.type == "cpu" and steps >= PACK_STEPS
        packed = matmul.packed(self.model, bfloat16=self.autocast != "none") if pays else nullcontext()
        with self.precision(sampling=True), packed:
            yield

    def hidden(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        layout: attention.Layout,
        delta_TD: Tensor | None = None,
        inputs_fixed: bool = False,
    ) -> Tensor:
        """Last hidden states [T, width] of a flat row of tokens. ``delta_TD`` is added to the input embeddings;
        ``inputs_fixed``: no gradient through these."""
        given: dict[str, Tensor] = {"input_ids": tokens_T[None]}
        if delta_TD is not None:
            clean_TD = self.embeddings(tokens_T)
            given = {"inputs_embeds": ((clean_TD.detach() if inputs_fixed else clean_TD) + delta_TD)[None]}
        thin = self.device.type == "cpu" and len(tokens_T) < matmul.THIN
        with attention.layout(layout), matmul.small(thin):
            out = self.trunk(**given, position_ids=positions_T[None], use_cache=False)
        return out.last_hidden_state[0]

    def logits(self, hidden_SD: Tensor) -> Tensor:
        head = self.head
        with matmul.small(self.device.type == "cpu" and head.weight.numel() < matmul.LARGE):
            if type(head) is nn.Linear:
                return head.forward(hidden_SD)  # with a packed weight while sampling
            return torch.nn.functional.linear(hidden_SD, head.weight, head.bias)

    def tokens_forwarded(self, batch: PackedBatch) -> int:
        """Tokens that the forward of a pack computes, without padding."""
        return len(batch.tokens_T) if self.shared else plain.Rows(batch).total


# ---------------------------------------------------------------------------------------------- log-probs


class _ChunkedLogProb(torch.autograd.Function):
    """log softmax(scale * (h W' + b))[target] and entropy, without ever holding [S, vocabulary].

    dL/dlogits = g * (onehot - p) - g_H * p * (log p + H). Up to KEEP numbers, log p is kept for the backward pass; above,
    logits are made again chunk by chunk (one extra product).
    """

    @staticmethod
    def forward(ctx, hidden_SD, weight_VD, bias_V, target_S, scale_S, chunk, keep):
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
    def _z(hidden_SD, weight_VD, bias_V, scale_S, rows):
        z = torch.nn.functional.linear(hidden_SD[rows], weight_VD, bias_V)
        z = z if z.dtype == torch.float64 else z.float()
        return z.mul_(scale_S[rows, None].to(z.dtype))

    @staticmethod
    def backward(ctx, g_logp, g_entropy):
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
    chunk = max(min(chunk, LOGITS // len(weight_VD)), 1)
    return _ChunkedLogProb.apply(hidden_SD, weight_VD, bias_V, target_S, scale_S, chunk, keep)  # type: ignore[return-value]


def logprobs(policy: Policy, batch: PackedBatch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(l_S, entropy_S) of a pack. Completions use logits / temperature as the sampler did; hints and demonstrations
    are scored under the untempered policy (trap 8)."""
    scale_S = scale_of(batch, temperature)
    if not policy.shared:
        with policy.precision(sampling=False):
            return plain.logprobs(policy.base, batch, scale_S)
    with policy.precision(sampling=False):
        hidden_TD = policy.hidden(batch.tokens_T, batch.positions_T, batch.layout, batch.delta_TD, batch.inputs_fixed)
    return head_logprobs(policy, hidden_TD.index_select(0, batch.at_S), batch.target_S, scale_S)


def head_logprobs(policy: Policy, hidden_SD: Tensor, target_S: Tensor, scale_S: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the targets from the last hidden states, in the precision of the policy."""
    weight, bias = policy.head.weight, policy.head.bias
    if policy.autocast == "all":  # explicitly: the backward pass runs outside of autocast
        hidden_SD, weight = hidden_SD.bfloat16(), weight.bfloat16()
        bias = None if bias is None else bias.bfloat16()
    return chunked_logprobs(hidden_SD, weight, bias, target_S, scale_S)


def scale_of(batch: PackedBatch, temperature: float) -> Tensor:
    """Factor of the logits: 1/T at sampled tokens, 1 at tokens of the data."""
    return torch.where(batch.role_S == COMPLETION, 1.0 / temperature, 1.0)


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
    if folder.is_file() and folder.suffix != ".gguf":
        raise ConfigError(f"model.path={path!r} is a file of an unknown kind; expected a folder or a .gguf file")
    if folder.is_dir() and not (folder / "config.json").is_file() and not any(folder.glob("*.gguf")):
        raise ConfigError(
            f"model.path={path!r}: the folder has no config.json, so it is no Hugging Face model. Expected config.json, "
            "weights (*.safetensors) and a tokenizer (tokenizer.json), or a .gguf file"
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


def expected_path(config: ModelConfig, longest: float) -> str:
    """What ``load`` would choose as far as class and config tell, without reading weights. For people."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if config.forward == "plain":
        return "plain (model.forward=plain)"
    gguf = _gguf(config)
    settings = AutoConfig.from_pretrained(
        str(locate(config.path)), local_files_only=True, **({"gguf_file": gguf} if gguf else {})
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    reason = forward.obstacle(model, longest)
    if reason and config.forward == "shared":
        raise ConfigError(
            f"model.forward=shared does not fit: {type(model).__name__}: {reason}. Use model.forward=auto"
        )
    if reason:
        return f"plain ({type(model).__name__}: {reason})"
    return "shared, if the logits agree when the model is loaded"


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is some. Of several processes on a machine, each takes the GPU of its own number.

    Raises ConfigError where the machine does not have the device.
    """
    try:
        device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        if device.type != "cuda" or processes.size() == 1:
            torch.empty(1, device=device)
            return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        gpus = torch.cuda.device_count()
        found = f"{gpus} CUDA device{'s' * (gpus != 1)}"
        reason = str(error).strip().partition("\n")[0][:120]
        raise ConfigError(
            f"model.device={name!r} cannot be used ({reason}). torch {torch.__version__} sees the CPU and {found}: "
            "use auto, cpu or cuda:N"
        ) from error
    if device.index is not None:
        raise ConfigError(
            f"model.device={name!r} is one GPU for {processes.size()} processes: say cuda, and each takes its own"
        )
    if processes.local_rank() >= torch.cuda.device_count():
        raise ConfigError(
            f"no GPU is left for process {processes.local_rank()} of this machine: found {torch.cuda.device_count()}. "
            "Start as many processes as there are GPUs, or set model.device=cpu"
        )
    return torch.device("cuda", processes.local_rank())


def load(config: ModelConfig, tokenizer: Any = None, longest: float = math.inf) -> Policy:
    """Read the model, settle its forward path (``model.forward``), and add LoRA adapters if asked.

    longest: tokens of the longest sequence of the run, which an attention window must not cut on the shared-prefix path.
    """
    from transformers import AutoModelForCausalLM

    attention.register()
    folder, gguf = locate(config.path), _gguf(config)
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(config)
    device = pick_device(config.device)
    try:
        extra = {"gguf_file": gguf} if gguf else {}
        dtype = getattr(torch, config.dtype)
        model = AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True, dtype=dtype, **extra)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no causal language model could be read from {folder}: {error}") from error
    if device.type == "cpu":
        matmul.route()
    model = model.to(device=device).eval()  # type: ignore[call-arg]  # eval: no dropout; gradients flow all the same
    model.config.use_cache = False
    if gguf:
        _forget_gguf(model)
    policy = Policy(model, tokenizer, device, autocast=config.autocast, cuda_graphs=config.cuda_graphs)
    forward.choose(policy, config.forward, longest)
    if config.lora is not None:
        policy.model, policy.lora = _adapt(model, config.lora), True
    return policy


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
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        target_modules=lora.targets,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, settings)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(
            f"model.lora.targets={lora.targets!r} does not fit {type(model).__name__}: {error} Name other model.lora.targets"
        ) from error


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
