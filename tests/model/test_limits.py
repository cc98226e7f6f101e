"""Threads, positions and memory: against the model itself, and the same for whoever asks."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import vision_zoo as zoo
from conftest import settings

from unift.commands import doctor
from unift.commands.doctor import dry_run, speed
from unift.config.sections import Lora, Model
from unift.model import architecture, limits, memory
from unift.model.load import load_policy, load_tokenizer, locate, save_adapter
from unift.rows import dataset
from unift.rows.crew import cores
from unift.types import ConfigError, DataError


@pytest.mark.parametrize("base", ["lock", "countdown"])
def test_parameters_from_shapes_are_those_of_the_model(base):
    config = settings("uft", f"model.path=embedded:{base}")
    found = architecture.parameters(limits.model_settings(locate(config.model.path)))
    model = load_policy(config.model).base
    own = sum(p.numel() for p in model.parameters())  # tied weights once
    assert abs(found - own) <= model.config.hidden_size, "all but the last norm"


def numbers(parameters):
    return sum(p.numel() for p in parameters)


@pytest.mark.parametrize("kind", ["gpt2", "gpt-oss", "lfm2", "qwen2"])
def test_a_model_is_counted_on_its_own_class(kind, tmp_path):
    """Biases, experts, convolutions, other names of the shapes: none of them is in the formula."""
    import transformers as t

    size = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    size |= {"intermediate_size": 48, "num_key_value_heads": 2}
    make = {
        "gpt2": lambda: t.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64),
        "gpt-oss": lambda: t.GptOssConfig(**size, head_dim=8, num_local_experts=6, num_experts_per_tok=2),
        "lfm2": lambda: t.Lfm2Config(**size, full_attn_idxs=[1]),
        "qwen2": lambda: t.Qwen2Config(**size),
    }
    model = t.AutoModelForCausalLM.from_config(make[kind]())
    model.config.save_pretrained(tmp_path)  # and no weights
    built = architecture.of(Model(path=str(tmp_path)))
    assert built.numbers == built.trained == numbers(model.parameters()) and not built.adapted
    assert architecture.inner(built.shapes) == {"gpt2": 4 * 32, "gpt-oss": 2 * 48}.get(kind, 48)
    assert architecture.from_shapes(built.shapes, Model(path="x")).numbers != built.numbers


def test_experts_are_those_that_a_token_passes():
    sizes = {"hidden_size": 8, "intermediate_size": 100, "moe_intermediate_size": 6, "num_experts_per_tok": 4}
    assert architecture.inner(sizes) == 24 and architecture.inner(sizes | {"shared_expert_intermediate_size": 5}) == 29
    assert architecture.inner({"hidden_size": 8, "intermediate_size": 7, "num_experts_per_tok": 2}) == 14
    assert architecture.inner({"hidden_size": 8}) == 32


@pytest.mark.parametrize("lora", [None, Lora(rank=3), Lora(rank=2, targets=["q_proj", "embed_tokens"])])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_tower_is_counted_and_trained_or_not(lora, frozen, tmp_path):
    base = zoo.saved(tmp_path)
    config = Model(path=str(base), device="cpu", lora=lora, freeze_vision=frozen)
    built, policy = architecture.of(config), load_policy(config)
    assert built.trained == numbers(policy.parameters())
    assert built.numbers == numbers(load_policy(Model(path=str(base), device="cpu")).base.parameters())
    assert built.adapted == policy.lora
    text = numbers(policy.base.get_decoder().parameters())
    assert built.numbers > 1.2 * text, "else the tower is too small to tell"


def test_a_continued_adapter_is_what_trains(tmp_path):
    config = settings("uft", "model.path=embedded:lock", "model.device=cpu").model
    config = config.model_copy(update={"lora": Lora(rank=3, alpha=5, targets=["q_proj", "down_proj"])})
    policy = load_policy(config)
    save_adapter(policy, config, tmp_path / "adapter")
    built = architecture.of(Model(path=str(tmp_path / "adapter")))
    assert built.adapted and built.trained == numbers(policy.parameters()) < built.numbers / 10


def lock(*items):
    config = settings("uft", "data.train_rows=6", "data.test_rows=4", *items)
    return config, dataset.encode(load_tokenizer(config.model), dataset.load(config), config)


@pytest.mark.parametrize("most", [100, 239, 240, 256])
def test_doctor_and_train_agree_on_the_room(most):
    config, data = lock(f"sample.max_tokens={most}", "show.schedule=none" if most == 256 else "seed=0")
    room = doctor.room(config, data)
    try:
        limits.check_positions(config, data)
    except DataError as error:
        assert not room.ok and room.text == str(error)
    else:
        assert room.ok


def test_the_edge_of_the_room():
    """Each context is counted token by token: the largest limit that fits is one below the first that does not."""
    config, data = lock("sample.max_tokens=1", "eval.max_tokens=1")
    longest = max(len(e.prompt) + e.step_ends[-1] for e in data.train.encoded)
    room = 256 - longest
    for most in (room, room + 1):
        config, data = lock(f"sample.max_tokens={most}", "eval.max_tokens=1")
        if most == room:
            limits.check_positions(config, data)
        else:
            with pytest.raises(DataError, match="more than the 256 positions"):
                limits.check_positions(config, data)


@pytest.mark.parametrize("kind", ["gpt2", "gptj", "mpt", "llama"])
def test_positions_have_several_names(kind, tmp_path):
    """As the model's own class says: GPT-2's config.json has no max_position_embeddings, and its table ends all the same."""
    import transformers as t

    own = {
        "gpt2": t.GPT2Config(n_positions=77),
        "gptj": t.GPTJConfig(n_positions=77),
        "mpt": t.MptConfig(max_seq_len=77),
    }
    own.get(kind, t.LlamaConfig(max_position_embeddings=77)).save_pretrained(tmp_path)
    assert limits.positions(limits.text_settings(str(tmp_path))) == 77
    assert limits.positions({}) is None


def shortened(tmp_path, most):
    """The lock with fewer positions."""
    shutil.copytree(locate("embedded:lock"), tmp_path / "model", dirs_exist_ok=True)
    found = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(found | {"max_position_embeddings": most}))
    return f"model.path={tmp_path / 'model'}"


@pytest.mark.parametrize("method", ["sft", "luffy"])
def test_a_solution_that_is_trained_on_needs_positions_too(method, tmp_path):
    """Whole solutions count where they have a loss, not where hints alone are shown."""
    few = ["sample.max_tokens=1", "eval.max_tokens=1", "train.prompts=2"]
    config = settings(method, "data.train_rows=6", "data.test_rows=4", *few)
    data = dataset.encode(load_tokenizer(config.model), dataset.load(config), config)
    most = max(len(e.prompt) + len(e.solution) for e in data.train.encoded)
    for there in (most, most - 1):
        config = settings(method, "data.train_rows=6", "data.test_rows=4", *few, shortened(tmp_path, there))
        if there == most:
            limits.check_positions(config, data)
        else:
            with pytest.raises(DataError, match=r"data.train, row \d+: the prompt .* and its solution .* trained on"):
                limits.check_positions(config, data)
    limits.check_positions(settings("rft", *few, shortened(tmp_path, most - 1)), data)


def test_a_rejected_answer_needs_positions_too(tmp_path):
    config, data = lock("sample.max_tokens=1", "eval.max_tokens=1", shortened(tmp_path, 40))
    limits.check_positions(config, data)
    longer = replace(data.train, rejected=[None, [5] * 36, *[None] * 4])
    with pytest.raises(DataError, match="data.train, row 2: the prompt .* and its rejected answer .36., which"):
        limits.check_positions(config, replace(data, train=longer))


def test_the_hint_of_one_phase_and_the_completion_of_another_are_no_sequence(tmp_path):
    """SFT shows whole solutions, RFT samples behind bare prompts: the longest of either, not the sum."""
    phases = "phases=[{method: sft, share: 0.5}, {method: rft, share: 0.5}]"
    few = ["sample.max_tokens=30", "eval.max_tokens=1", phases]
    config, data = lock(*few)
    most = max(len(e.prompt) for e in data.train.encoded) + config.phases[1].sample.max_tokens
    assert limits.longest_context(config, data) == most
    limits.check_positions(lock(*few, shortened(tmp_path, most))[0], data)
    with pytest.raises(DataError, match="its longest hint .0. and a completion"):
        limits.check_positions(lock(*few, shortened(tmp_path, most - 1))[0], data)


def test_answers_to_training_rows_need_positions_too():
    """They are evaluated last: a run would fail after all its steps."""
    for rows, fits in ((0, True), (1, False), (None, False)):
        config, data = lock(
            "sample.max_tokens=1", "eval.max_tokens=300", f"eval.train_rows={'null' if rows is None else rows}"
        )
        data = replace(data, test=data.test.first(0))
        if fits:
            limits.check_positions(config, data)
        else:
            with pytest.raises(DataError, match="data.train, row 1: .*a completion .300. take more than the 256"):
                limits.check_positions(config, data)


def test_dry_run_and_speed_count_the_same_activations():
    config = settings("uft", "train.token_budget=4096")
    shapes = architecture.of(config.model).shapes
    token = memory.token_bytes(shapes, config.model, False)
    assert f"activations {memory.size(4096 * token)}" in dry_run._memory(config, None)
    tokens, why = speed.budget(config, free=2 * 4096 * token)
    assert tokens == 4096 and f"{token / 1024:,.0f} KiB" in why


@pytest.mark.parametrize("text", ["[1]", "{", "3", "\x00"])
def test_a_damaged_config_json(tmp_path, text):
    shutil.copytree(locate("embedded:lock"), tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="config.json .*fetch the model again"):
        limits.model_settings(tmp_path / "model")
    assert json.loads((locate("embedded:lock") / "config.json").read_text()) == limits.model_settings(
        locate("embedded:lock")
    )


def test_threads():
    limits.use_threads(1)
    limits.use_threads(None)
    with pytest.raises(ConfigError, match=f"threads=10000000: this machine has {cores()} cores"):
        limits.use_threads(10_000_000)
    import torch

    assert torch.get_num_threads() == 1
