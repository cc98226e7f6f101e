"""Prompts as chat templates write them, and what ends a turn: templates of four families, as short as they can be."""

from __future__ import annotations

import json
import re

import pytest
import torch
from conftest import CHAT_TOKENS, chat_tokenizer, saved_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from unift.config.resolve import parse_overrides, resolve
from unift.config.sections import Model
from unift.model.load import load_policy, save_pretrained
from unift.rows.tokens import encode_row
from unift.sampling.engines.base import Request
from unift.sampling.engines.choose import generate
from unift.types import DataError, Row

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
    " {{ m.content }} </s>{% endif %}{% endfor %}"
)
THINKS = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
BARE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
FAMILIES = {"chatml": (CHATML, "<|im_end|>"), "gemma": (GEMMA, "<end_of_turn>"), "phi": (PHI, "<|end|>"),
            "llama2": (LLAMA2, "</s>"), "bare": (BARE, "</s>"), "none": (None, "</s>")}  # fmt: skip


def row(prompt, steps=("19+35\n", "=54\n"), ending="<answer> 54 </answer>"):
    messages = prompt if isinstance(prompt, str) else tuple(prompt)
    return Row("r1", messages, tuple(steps), ending, "54", "math", {})


def user(text="What is 19+35?"):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def whole(tokenizer, encoded):
    return tokenizer.decode(encoded.prompt + encoded.solution)


# ---------------------------------------------------------------------------------------------- the end of a turn


@pytest.mark.parametrize("special", [True, False], ids=["special", "added"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_solution_ends_as_the_template_ends_a_turn(family, special):
    """The tokens of prompt and solution are those of the whole conversation, up to the end of the assistant's turn."""
    template, end = FAMILIES[family]
    tokenizer = chat_tokenizer(template, special=special)
    if template is None:
        e = encode_row(tokenizer, row("What is 19+35? "), 500)
        assert tokenizer.decode(e.solution) == " 19+35\n=54\n<answer> 54 </answer></s>"
        return
    e = encode_row(tokenizer, row([user()]), 500)
    assert tokenizer.convert_ids_to_tokens(e.solution[-1]) == end
    spoken = tokenizer.apply_chat_template(
        [user(), assistant("19+35\n=54\n<answer> 54 </answer>")], tokenize=True, return_dict=False
    )
    if family == "bare":
        spoken = [*spoken[:-1], tokenizer.eos_token_id]  # its line end closes nothing
    text = tokenizer.decode(spoken)
    if family == "llama2":  # the template's space in front of the answer is no part of a prompt
        text = text.replace("[/INST] ", "[/INST]")
    assert text.startswith(tokenizer.decode(e.prompt + e.solution))


def test_a_rendered_text_ends_its_turn_too():
    """Rows of verl hold the rendered conversation as one text, with the first words of the answer or without."""
    tokenizer = chat_tokenizer(CHATML)
    rendered = tokenizer.apply_chat_template([user()], tokenize=False, add_generation_prompt=True)
    end = CHAT_TOKENS.index("<|im_end|>")
    for prompt in (rendered, rendered + "Let me solve it.\n<think>", rendered.replace("assistant\n", "assistant")):
        assert encode_row(tokenizer, row(prompt), 500).solution[-1] == end
    tokenizer.chat_template = THINKS  # read anew; a text may leave its <think> out
    assert encode_row(tokenizer, row(rendered), 500).solution[-1] == end
    tokenizer.chat_template = CHATML
    closed = rendered + "It is 54.<|im_end|>\n"
    for prompt in ("What is 19+35?", closed, "What does <|im_end|> mean?"):
        assert encode_row(tokenizer, row(prompt), 500).solution[-1] == tokenizer.eos_token_id


def test_a_solution_that_brings_its_end_gets_no_second_one():
    tokenizer = chat_tokenizer(CHATML)
    e = encode_row(tokenizer, row([user()], ending="<answer> 54 </answer><|im_end|>"), 500)
    assert whole(tokenizer, e).endswith("</answer><|im_end|>") and whole(tokenizer, e).count("<|im_end|>") == 2
    assert encode_row(tokenizer, row("Hi", ending="!</s>"), 500).solution.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize(
    "template, eos, ends", [(CHATML, None, [2, 4]), (GEMMA, None, [2, 6]), (CHATML, [7, 4], [2, 4, 7]), (None, 2, 2)]
)
def test_sampler_and_saved_model_stop_at_the_same_tokens(tmp_path, template, eos, ends):
    policy = load_policy(Model(path=saved_llama(tmp_path / "base", chat_tokenizer(template), eos=eos), device="cpu"))
    assert policy.end_ids == ([ends] if isinstance(ends, int) else ends)
    save_pretrained(policy, tmp_path / "model")
    stored = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert stored["eos_token_id"] == ends
    # Every end token, made the likeliest by far, ends a completion here and there.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for end in policy.end_ids:
        for some in (policy.base, model):
            handle = some.get_output_embeddings().register_forward_hook(lambda m, a, z, end=end: z.index_fill(-1, torch.tensor([end]), 99.0))  # fmt: skip
            if some is model:
                out = some.generate(torch.tensor([[20, 21]]), max_new_tokens=5, do_sample=False)
                assert out[0].tolist() == [20, 21, end]
            else:
                (sample,) = generate(policy, [Request([20, 21], None)], 5)[0]
                assert sample.tokens == [end] and sample.finished
            handle.remove()


def test_a_trained_model_stops_where_its_solutions_end(tmp_path):
    """A run on chat rows; the folder it writes, read by transformers alone, answers and stops."""
    from unift.training.loop import train

    base, rows = saved_llama(tmp_path / "base", chat_tokenizer(GEMMA)), tmp_path / "rows.jsonl"
    records = [{"prompt": [user(q)], "steps": [f"{q}!\n"], "ending": "", "answer": q, "task": "math"} for q in "ab"]
    rows.write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "mine.py").write_text("def score(completion, row):\n    return float(row.answer in completion)\n")
    words = [f"data.train={rows}", f"model.path={base}", "train.steps=40", "train.prompts=2", "train.lr=0.01", "train.warmup=0",
             "eval.every=0", "save.every=0", "sample.max_tokens=8", "threads=1", f"reward.function={tmp_path / 'mine.py'}:score"]  # fmt: skip
    train(resolve("sft", overrides=parse_overrides(words)), tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    asked = tokenizer.apply_chat_template(
        [user("b")], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**asked, max_new_tokens=20, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert tokenizer.decode(out) == "b!\n<end_of_turn>"


# ---------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("template, begins", [(GEMMA, "<s><start_of_turn>"), (CHATML, "<|im_start|>user")])
def test_one_bos_as_the_template_has_it(template, begins):
    tokenizer = chat_tokenizer(template)
    e = encode_row(tokenizer, row([user()]), 500)
    rendered = tokenizer.apply_chat_template([user()], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(e.prompt) == rendered and rendered.startswith(begins)
    if template == GEMMA:  # rendered before: the same tokens
        assert encode_row(tokenizer, row(rendered), 500).prompt == e.prompt
        assert encode_row(tokenizer, row(rendered), 500).solution == e.solution
    assert tokenizer.decode(encode_row(tokenizer, row("plain text"), 500).prompt) == "<s>plain text"


@pytest.mark.parametrize("family", ["chatml", "gemma", "phi", "llama2"])
@pytest.mark.parametrize("words", ["Let me think.", "Let me think.\n", "Let me think. "])
def test_a_last_message_of_the_assistant_is_continued(family, words):
    """The conversation with prefill + solution as its answer, token for token, whatever the template trims."""
    template, end = FAMILIES[family]
    tokenizer = chat_tokenizer(template)
    e = encode_row(tokenizer, row([user(), assistant(words)]), 500)
    answer = f"{words}19+35\n=54\n<answer> 54 </answer>"
    rendered = tokenizer.apply_chat_template([user(), assistant(answer)], tokenize=False)
    assert whole(tokenizer, e) == rendered[: rendered.rindex(end) + len(end)]
    assert tokenizer.decode(e.prompt).endswith(
        "Let me think." + ("\n" if words[-1] == "\n" and family != "gemma" else "")
    )
    assert tokenizer.decode(e.hint(1, 2)).strip() == "19+35"


def test_an_assistant_message_without_text_only_opens_the_turn():
    tokenizer = chat_tokenizer(CHATML)
    assert encode_row(tokenizer, row([user(), assistant("")]), 500) == encode_row(tokenizer, row([user()]), 500)


@pytest.mark.parametrize(
    "messages, template, said",
    [
        ([{"role": "system", "content": "Reason."}, user()], GEMMA, r"\(system, user\): no system role here"),
        (
            [{"content": "no role"}],
            CHATML.replace("m.role", "m['role'] | upper + 1"),
            r"refuses these messages \(None\)",
        ),
        ([user()], "{{ messages[7].content.x.y }}", r"refuses these messages \(user\): .*undefined|has no element"),
        ([user()], "{% for m in messages %}", r"refuses these messages \(user\): Unexpected end of template"),
        ([assistant("a")], "{{ messages[0]['role'] }}", "refuses these messages .assistant.: "),
    ],
)
def test_what_a_template_refuses_is_one_line(messages, template, said):
    with pytest.raises(DataError, match=said) as error:
        encode_row(chat_tokenizer(template), row(messages), 500, 3, "rows.jsonl")
    assert str(error.value).startswith("rows.jsonl, row 3 (id r1): ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "prompt, steps, shown, doubled",
    [
        ([user()], ("<think>\n19+35\n", "=54\n"), "assistant\n<think>\n19+35\n", True),
        ([user()], ("<think>", "\n19+35\n", "=54\n"), "assistant\n<think>\n19+35\n", True),
        ([user()], ("\n<think> 19+35\n", "=54\n"), "assistant\n<think>\n 19+35\n", True),
        ("Q <think> ", ("<think> 19+35\n", "=54\n"), "Q <think> 19+35\n", True),
        ("Q <think>", ("<think>\n19+35\n", "=54\n"), "Q <think>\n19+35\n", True),
        ("Q <reasoning>\n", ("<reasoning>\n19+35\n", "=54\n"), "Q <reasoning>\n19+35\n", True),
        ("Q", ("<think>\n19+35\n", "=54\n"), "Q<think>\n19+35\n", False),
        ("Q <think>", ("<reason>\n19+35\n", "=54\n"), "Q <think><reason>\n19+35\n", False),
    ],
)
def test_a_tag_that_prompt_and_solution_open_is_opened_once(prompt, steps, shown, doubled):
    tokenizer = chat_tokenizer(THINKS, bos=False)
    e = encode_row(tokenizer, row(prompt, steps), 500)
    text = whole(tokenizer, e)
    assert shown + "=54\n<answer> 54 </answer>" in text
    tag = re.search("<[a-z]+>", "".join(steps)).group()
    assert text.count(tag) == 1 and e.doubled == (tag if doubled else "")
    assert tokenizer.decode(e.prompt + e.solution[: e.step_ends[-1]]).endswith(shown + "=54\n")
    assert e.n_steps == len(steps)


# ---------------------------------------------------------------------------------------------- doctor


def test_doctor_says_how_a_turn_ends_and_what_is_left_out(tmp_path):
    from unift.commands.doctor import diagnose

    base, rows = saved_llama(tmp_path / "base", chat_tokenizer(THINKS)), tmp_path / "rows.jsonl"
    record = {
        "prompt": [user()],
        "steps": ["<think>\n54\n"],
        "ending": "<answer> 54 </answer>",
        "answer": "54",
        "task": "math",
    }
    rows.write_text(json.dumps(record) + "\n")
    found = {
        c.name: c
        for c in diagnose(resolve("sft", overrides=parse_overrides([f"data.train={rows}", f"model.path={base}"])))
    }
    assert "closes a turn with '<|im_end|>'" in found["tokenizer"].text
    assert "in 1 of 1 rows the prompt ends with <think> and the solution begins with it" in found["lengths"].text
