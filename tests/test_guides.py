"""The guides for movers: their code runs, says the same as the other library's script, and names settings that exist."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import yaml

from unift.config.sections import Config, Lora
from unift.model.load import locate

DOCS = Path(__file__).parents[1] / "docs"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def blocks(page, language):
    return re.findall(
        rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def names(page):
    """(the other library's names, ours) of the table of names."""
    text = (DOCS / page).read_text(encoding="utf-8").partition("## Names")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `")]
    return [(re.findall(r"`([^`]+)`", left), re.findall(r"`([^`]+)`", right)) for left, right in rows]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The embedded lock base with a chat template, as a person's own model has one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, base = tmp_path_factory.mktemp("mine"), locate("embedded:lock")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder)
    return folder


def executed(page, model, tmp_path, monkeypatch):
    """The page's run: its first block and the one that imports unift, with the model's folder put in."""
    monkeypatch.chdir(tmp_path)
    python = blocks(page, "python")
    ours = [block for block in python if "import unift" in block]
    assert len(ours) == 1 and "/models/mine" in ours[0]
    space = {"__name__": "__main__"}  # as in a script or a notebook
    exec(compile(python[0], page, "exec"), space)
    exec(compile(ours[0].replace("/models/mine", str(model)), page, "exec"), space)
    return space["run"], space


def test_trl(model, tmp_path, monkeypatch):
    run, space = executed("from-trl.md", model, tmp_path, monkeypatch)
    (call,) = [
        node for node in ast.walk(ast.parse(next(b for b in blocks("from-trl.md", "python") if "from trl" in b)))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "GRPOConfig"
    ]  # fmt: skip
    trl = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    batch = trl["per_device_train_batch_size"] * trl["gradient_accumulation_steps"]
    c = run.config
    assert c.train.prompts * c.sample.completions == batch and c.sample.completions == trl["num_generations"]
    assert (c.train.steps, c.train.lr, c.sample.max_tokens) == (
        trl["max_steps"], trl["learning_rate"], trl["max_completion_length"],
    )  # fmt: skip
    assert (c.reference.kl, c.policy.low, c.policy.high) == (trl["beta"], trl["epsilon"], trl["epsilon"])
    assert (c.train.decay, c.policy.norm, trl["loss_type"]) == (trl["lr_scheduler_type"], "token_mean", "dapo")
    assert (c.credit.scale, c.credit.epsilon) == ("sample_std", 1e-4)
    assert c.seed == trl["seed"] and c.policy.loss == "clip" and c.likelihood.tokens == "none"
    assert c.train.weight_decay == trl.get("weight_decay", 0.0) and c.train.clip_norm == trl.get("max_grad_norm", 1.0)
    learnt(run)
    sample = run.rollouts(1)[0].samples[0]
    assert sample.score.value == space["share_of_allowed_digits"]([sample.text], ["02468"])[0]


def test_verl(model, tmp_path, monkeypatch):
    run, space = executed("from-verl.md", model, tmp_path, monkeypatch)
    words = shlex.split(blocks("from-verl.md", "bash")[0].replace("\\\n", " "))
    verl = {w.partition("=")[0].rpartition("actor_rollout_ref.")[2]: w.partition("=")[2] for w in words if "=" in w}
    verl = {name: yaml.safe_load(value) for name, value in verl.items()}
    c = run.config
    assert c.train.prompts == verl["data.train_batch_size"] and c.sample.completions == verl["rollout.n"]
    assert c.train.prompts // c.train.updates == verl["actor.ppo_mini_batch_size"]
    assert (c.train.lr, c.train.weight_decay) == (float(verl["actor.optim.lr"]), verl["actor.optim.weight_decay"])
    assert c.reference.clamp == 10.0 and verl["actor.use_kl_loss"] is True  # a constant of verl's kl_penalty
    assert (c.reference.kl, c.policy.dual_clip) == (verl["actor.kl_loss_coef"], verl["actor.clip_ratio_c"])
    assert (c.sample.max_tokens, c.train.steps) == (
        verl["data.max_response_length"],
        verl["trainer.total_training_steps"],
    )
    learnt(run)
    sample = run.rollouts(1)[0].samples[0]
    assert sample.score.value == space["compute_score"]("digits", sample.text, "02468")


def learnt(run):
    """The mean reward of the last steps is above that of the first ones: the reward reached the weights."""
    rewards = [m["reward"] for m in run.metrics[1:]]
    assert len(rewards) == run.config.train.steps
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.05, rewards


def test_the_shell_command_of_the_verl_page_is_its_python_run():
    from unift.config.resolve import dotted

    command = next(b for b in blocks("from-verl.md", "bash") if b.startswith("unift train"))
    words = [w for w in shlex.split(command.replace("\\\n", " ")) if "=" in w]
    shell = {k: float(v) if k == "train.lr" else v for k, v in dotted(words).items()}
    tree = ast.parse(next(b for b in blocks("from-verl.md", "python") if "import unift" in b))
    (call,) = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "unift.train"]
    python = {}
    for k in call.keywords:
        if k.arg is None:
            python |= ast.literal_eval(k.value)
    assert python == {k: v for k, v in shell.items() if k.split(".")[0] not in ("data", "reward", "model")}


def exists(name):
    """Whether a dotted name is a setting."""
    section, _, field = name.partition(".")
    part = Config.model_fields[section].annotation
    return field in part.model_fields


@pytest.mark.parametrize("page", ["from-trl.md", "from-verl.md"])
def test_the_names_are_settings(page):
    found = [name for _, ours in names(page) for name in ours if "." in name and not name.endswith(".py:name")]
    assert len(found) > 20 and [name for name in found if not exists(name)] == []
    assert not exists("train.learning_rate") and exists("model.lora") and Lora


def test_every_argument_of_the_trl_script_is_in_its_table():
    known = {name for theirs, _ in names("from-trl.md") for name in theirs} | {"output_dir", "bf16", "seed"}
    block = next(b for b in blocks("from-trl.md", "python") if "from trl" in b)
    assert set(re.findall(r"(\w+)=", block.partition("GRPOConfig(")[2].partition("\n)")[0])) <= known


def test_the_names_of_trl():
    """Where it is installed: its config has every name that the table gives it."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    other = {"reward_funcs", "peft_config"}  # arguments of the trainer
    fields = set(trl.GRPOConfig.__dataclass_fields__)
    assert {name for theirs, _ in names("from-trl.md") for name in theirs} - other <= fields


def test_from_python(tmp_path, monkeypatch):
    """All of the page's code, in its order."""
    monkeypatch.chdir(tmp_path)
    space = {"__name__": "__main__"}
    for block in blocks("python.md", "python"):
        exec(compile(block, "python.md", "exec"), space)
    assert [m["step"] for m in space["metrics"]] == [0, 1, 2, 3, 4] and space[
        "run"
    ].result is None  # stopped by on_step
    sample = space["groups"][0].samples[0]
    assert 0 <= sample.score.value <= 1 and space["report"].is_file()
    assert space["settings"]["show"]["schedule"] == "cosine"
    assert space["found"].greedy.n == 5 and sum(p.numel() for p in space["model"].parameters()) > 80_000
