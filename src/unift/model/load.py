"""A model's folder: found, read, adapted (LoRA) and saved; and the device that it is put on."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from unift import processes
from unift.files import publish_folder, writing
from unift.model import attention, lora, matmul, paths, quantize, sharding, vision
from unift.model.folder import adapter_folder, adapter_settings, base_name, locate, model_settings, reading
from unift.model.policy import Policy
from unift.rows import processor, tokens
from unift.types import ConfigError

if TYPE_CHECKING:
    from unift.config.sections import Model as ModelConfig


def _gguf(config: ModelConfig) -> str | None:
    """Name of the GGUF file in the model's folder, None where the model is in Hugging Face's layout. ConfigError where the folder
    holds nothing but GGUF files and none is named."""
    if config.path.endswith(".gguf"):
        return Path(config.path).name
    if config.gguf:
        return config.gguf
    folder = locate(config.path)
    files = sorted(file.name for file in folder.glob("*.gguf"))
    if files and not (folder / "config.json").is_file():
        raise ConfigError(f"model.path={config.path!r} holds GGUF files and no config.json: set model.gguf={files[0]}")
    return None


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's tokenizer, with its processor of pictures. An adapter's is the one beside it, where there is one: with that chat
    template and those ends it was trained."""
    from transformers import AutoTokenizer

    folder, adapter, gguf = locate(config.path), adapter_folder(config.path), _gguf(config)
    beside = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    source = adapter if adapter is not None and beside else folder
    with reading("tokenizer", source):
        extra = {"gguf_file": gguf} if gguf and not beside else {}
        tokenizer = AutoTokenizer.from_pretrained(str(source), local_files_only=True, **extra)
    known = {} if gguf else model_settings(folder)
    if known.get(vision.TOWER):
        with reading("processor", folder):
            tokenizer = vision.load_reader(tokenizer, source if vision.has_processor(source) else folder, known)
    if known:
        size = (known.get("text_config") or known).get("vocab_size")
        if isinstance(size, int):
            tokens.check_rows(tokenizer, size)
    return tokenizer


def expected_path(config: ModelConfig, longest: float) -> str:
    """What ``load`` would choose as far as class and config tell, without reading weights. For people."""
    if config.forward == "plain":
        return "plain (model.forward=plain)"
    model = blank(config)
    reason = paths.obstacle(model, longest)
    if reason and config.forward == "shared":
        raise ConfigError(
            f"model.forward=shared does not fit: {type(model).__name__}: {reason}. Use model.forward=auto"
        )
    if reason:
        return f"plain ({type(model).__name__}: {reason})"
    return "shared, if the logits agree when the model is loaded"


def blank(config: ModelConfig) -> Any:
    """The model without numbers, from its config alone."""
    from transformers import AutoConfig

    gguf, folder = _gguf(config), locate(config.path)
    with reading("config", folder):
        extra = {"gguf_file": gguf} if gguf else {}
        settings = AutoConfig.from_pretrained(str(folder), local_files_only=True, **extra)
    with torch.device("meta"):
        return vision.model_class(settings).from_config(settings)


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


def load_policy(config: ModelConfig, tokenizer: Any = None, longest: float = math.inf) -> Policy:
    """Read the model, settle its forward path (``model.forward``), and add LoRA adapters if asked.

    longest: tokens of the longest sequence of the run, which an attention window must not cut on the shared-prefix path.
    """
    attention.register()
    folder, gguf = locate(config.path), _gguf(config)
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(config)
    device = pick_device(config.device)
    quantize.check(config, device)
    with reading("causal language model", folder):
        extra = {"gguf_file": gguf} if gguf else {}
        extra |= quantize.arguments(config, device)
        dtype = getattr(torch, config.dtype)
        kind = vision.model_class({} if gguf else model_settings(folder))
        model = kind.from_pretrained(str(folder), local_files_only=True, dtype=dtype, **extra)
    if device.type == "cpu":
        matmul.route()
    else:
        matmul.unroute()
    tokens.check_rows(tokenizer, len(model.get_input_embeddings().weight))  # type: ignore[arg-type]
    if config.quantize is None:
        model = model.to(device=device)  # type: ignore[call-arg]
    else:
        quantize.check_layers(model)
    model.eval()  # no dropout; gradients flow all the same
    for settings in vision.configs(model):
        settings.use_cache = False
    if gguf:
        _forget_quantizer(model)
    # What unpacks 4-bit weights allocates as it goes, and has not been seen in a recorded step.
    graphs = config.cuda_graphs and config.quantize is None
    policy = Policy(model, tokenizer, device, autocast=config.autocast, cuda_graphs=graphs)
    paths.choose(policy, config.forward, longest)
    policy.model, policy.continues = trained_part(model, config)
    policy.lora = policy.model is not model
    if config.quantize is not None:  # once peft has seen it: what is saved is dense
        _forget_quantizer(model)
    return policy


def trained_part(model: Any, config: ModelConfig) -> tuple[Any, bool]:
    """The model, frozen or wrapped by adapters as its settings say, and whether the adapters were there before."""
    frozen = vision.outside_text(model) if config.freeze_vision else []
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    adapter = adapter_folder(config.path)
    if adapter is not None:
        return lora.proceed(model, adapter, adapter_settings(config.path) or {}, config.lora), True
    return model if config.lora is None else lora.adapt(model, config.lora, frozen), False


def _forget_quantizer(model: Any) -> None:
    """Plain floats are saved; transformers would save what it still calls a quantized model in a form of its own, or not."""
    model.hf_quantizer = None
    model.is_quantized = False
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)


def save_pretrained(policy: Policy, folder: Path) -> None:
    """A plain Hugging Face folder (adapters merged) that AutoModelForCausalLM.from_pretrained (AutoModelForImageTextToText
    with a vision tower) and vLLM read. Sharded weights
    are whole by then (`Policy.whole`)."""
    shutil.rmtree(folder, ignore_errors=True)
    base = policy.base
    kept = [(settings, settings._attn_implementation) for settings in vision.configs(base)]
    for settings, _ in kept:
        settings._attn_implementation_internal = None  # not a property of the weights
        settings.use_cache = True
    generation = getattr(base, "generation_config", None)
    if generation is not None:
        ends = policy.end_ids
        generation.eos_token_id = ends if len(ends) > 1 else ends[0]
    try:
        if policy.lora:
            base.save_pretrained(folder, state_dict=lora.merged_state(base))
        elif policy.root is not None:
            base.save_pretrained(folder, state_dict=sharding.state(base))
        else:
            base.save_pretrained(folder)
    finally:
        for settings, implementation in kept:
            settings._attn_implementation_internal = implementation
            settings.use_cache = False
    save_tokenizer(policy.tokenizer, folder)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """The tokenizer, and the processor that came with it."""
    reader = processor.reader_of(tokenizer)
    (tokenizer if reader is None else reader.processor).save_pretrained(folder)


def save_adapter(policy: Policy, config: ModelConfig, folder: Path) -> None:
    """LoRA adapters alone, in peft's layout, beside a saved model: ``PeftModel.from_pretrained`` and vLLM put them on their
    base, and ``model.path`` of the folder trains on. Nothing without adapters."""
    if not policy.lora:
        return
    shutil.rmtree(folder, ignore_errors=True)
    lora.save(policy.model, folder, base_name(config.path))
    save_tokenizer(policy.tokenizer, folder)


def keep_model(model: Any, tokenizer: Any, folder: Path) -> Path:
    """Keep a loaded model and its tokenizer in ``folder``, once, so that a run can begin from it and be continued without it.

    The model itself stays as it is. Raises ConfigError for what such a folder cannot hold.
    """
    if (folder / "config.json").is_file():
        return folder
    if tokenizer is None:
        raise ConfigError(f"a loaded model ({type(model).__name__}) needs its tokenizer: pass tokenizer=...")
    if hasattr(model, "peft_config"):
        raise ConfigError(
            "the model has adapters: merge them first (merge_and_unload()), or pass its base and set model.lora"
        )
    if getattr(model, "is_quantized", False):
        raise ConfigError("the model is quantized: its weights cannot be trained. Pass it in a float type")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    with writing("the model that was handed over", folder.parent):
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        publish_folder(temporary, folder)
    return folder
