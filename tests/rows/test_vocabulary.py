"""Characters that a tokenizer lacks, ids that stand for no token, and a tokenizer that does not fit its model."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import char_tokenizer, chat_tokenizer, saved_llama
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from unift.config.resolve import parse_overrides, resolve
from unift.config.sections import Model
from unift.model.load import load_policy, load_tokenizer
from unift.rows.dataset import encode
from unift.rows.tokens import encode_row
from unift.sampling.engines.base import Request
from unift.sampling.engines.choose import generate
from unift.types import ConfigError, DataError, Row


def row(prompt, steps=("19+35\n", "=54\n"), ending="<answer> 54 </answer>"):
    messages = prompt if isinstance(prompt, str) else tuple(prompt)
    return Row("r1", messages, tuple(steps), ending, "54", "math", {})


# ---------------------------------------------------------------------------------------------- what the tokenizer lacks


def without_unknown():
    tokenizer = char_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["unk_token"] = "[none]"
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="</s>", pad_token="<pad>"
    )


def drops_unknown():
    """BPE without an unknown token leaves out what it has no piece for, and says nothing."""
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(["<pad>", "</s>", *"abc Q"])}, merges=[]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")


@pytest.mark.parametrize("where", ["prompt", "steps"])
@pytest.mark.parametrize(
    "tokenizer, said",
    [(char_tokenizer, r"no token for 'é' \(U\+00E9\)"), (drops_unknown, r"no token for 'é' \(U\+00E9\)"),
     (without_unknown, "the tokenizer cannot read the text")],
)  # fmt: skip
def test_a_text_that_the_tokenizer_cannot_spell_is_one_line(tokenizer, said, where):
    tokenizer = tokenizer()
    bad = row("Q é" if where == "prompt" else "Q", ("aéb",) if where == "steps" else ("ab",), "c")
    with pytest.raises(DataError, match=said) as error:
        encode_row(tokenizer, bad, 500, 2, "rows.jsonl")
    assert str(error.value).startswith("rows.jsonl, row 2 (id r1): ") and "\n" not in str(error.value)
    assert encode_row(tokenizer, row("Q a", ("ab",), "c"), 500).solution[-1] == tokenizer.eos_token_id


def test_the_unknown_token_itself_may_be_written():
    tokenizer = char_tokenizer()
    tokenizer.backend_tokenizer.add_special_tokens(["<unk>"])
    assert tokenizer.unk_token_id in encode_row(tokenizer, row("What is <unk>?", ("a",), ""), 500).prompt


def test_the_file_of_a_row_is_named(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Q é", "steps": ["a"], "answer": "1", "task": "math"}) + "\n")
    config = resolve("sft", overrides=parse_overrides([f"data.train={rows}", "model.path=embedded:lock"]))
    from unift.rows.dataset import load

    with pytest.raises(DataError, match=rf"{rows}, row 1 \(id .*no token for 'é'"):
        encode(char_tokenizer(), load(config), config)


# ---------------------------------------------------------------------------------------------- vocabulary


@pytest.mark.parametrize("forward", ["shared", "plain"])
def test_rows_without_a_token_are_never_sampled(tmp_path, forward):
    """A head of 400 rows for 266 tokens: half of the mass lies beyond; log-probs are those of the whole softmax."""
    tokenizer = chat_tokenizer()
    path = saved_llama(tmp_path / "base", tokenizer, vocab=400)
    policy = load_policy(Model(path=path, device="cpu", forward=forward))
    prompt, n = [20, 21, 22], len(tokenizer)
    uniforms = torch.rand(16, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    uniforms[0] = 1 - 2**-53  # the last token that there is
    samples = generate(policy, [Request(prompt, uniforms), Request(prompt, None)], 12)
    drawn = [t for group in samples for s in group for t in s.tokens]
    assert max(drawn) < n and len(set(drawn)) > 20
    assert samples[0][0].tokens[0] == n - 1
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    for s in samples[0][:4]:
        tokens = torch.tensor(prompt + s.tokens)
        with torch.no_grad():
            logp = model(tokens[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert logp.exp()[:, n:].sum(-1).max() > 0.05, "nothing lies beyond: the test would say nothing"
        own = logp.gather(1, tokens[len(prompt) :, None])[:, 0]
        assert (own - torch.tensor(s.logps)).abs().max() < 1e-4
    # The distribution is that of the model, given that it is a token.
    many = generate(
        policy, [Request(prompt, torch.arange(0.5, 2000).div(2000).double().numpy()[:, None])], 1, rows=4000
    )[0]
    with torch.no_grad():
        p = model(torch.tensor([prompt])).logits[0, -1, :n].softmax(-1)
    share = torch.bincount(torch.tensor([s.tokens[0] for s in many]), minlength=n) / 2000
    assert (share - p).abs().max() < 1e-3


def test_ids_between_others_without_a_token_are_never_sampled(tmp_path):
    tokenizer = chat_tokenizer()
    path = saved_llama(tmp_path / "base", tokenizer)
    policy = load_policy(Model(path=path, device="cpu"))
    known = sorted(set(range(len(tokenizer))) - {5, 100, 101, 265})
    policy.tokenizer = type("Holes", (), {"get_vocab": lambda self: {str(i): i for i in known}, "eos_token_id": 2})()
    uniforms = torch.linspace(0, 1 - 1e-9, 3000, dtype=torch.float64).numpy()[:, None]
    drawn = {s.tokens[0] for s in generate(policy, [Request([20], uniforms)], 1, rows=4000)[0]}
    assert drawn <= set(known) and len(drawn) > 100


def test_a_tokenizer_longer_than_the_embedding_is_one_line(tmp_path):
    tokenizer = chat_tokenizer()
    tokenizer.add_tokens(["<new>"])
    path = saved_llama(tmp_path / "base", tokenizer, vocab=len(tokenizer) - 1)
    said = rf"tokens up to id {len(tokenizer) - 1} \('<new>'\), the model's embedding has {len(tokenizer) - 1} rows.*resize"
    with pytest.raises(ConfigError, match=said):
        load_tokenizer(Model(path=path, device="cpu"))  # before any weights are read
    with pytest.raises(ConfigError, match=said):
        load_policy(Model(path=path, device="cpu"), tokenizer)
