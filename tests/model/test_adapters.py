"""Hub names and adapters: a name is found in the Hub's cache without a network, and an adapter that was saved trains on."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import char_tokenizer
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from unift.config.resolve import HUB_NAME, parse_overrides, resolve
from unift.config.sections import Lora, Model
from unift.model import lora
from unift.model.folder import base_name, locate
from unift.model.load import load_policy, load_tokenizer, save_adapter, save_pretrained
from unift.sampling.engines.base import Request
from unift.sampling.engines.choose import generate
from unift.training.loop import train
from unift.training.reference import Reference
from unift.types import ConfigError

SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZE, vocab_size=100, eos_token_id=2, pad_token_id=0, bos_token_id=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    char_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def model(path: Path | str, **lora: object) -> Model:
    return Model(path=str(path), device="cpu", lora=Lora(**lora) if lora else None)


def trained(base: Path, folder: Path) -> Path:
    """An adapter of rank 3 whose numbers are as large as if it were trained."""
    config = model(base, rank=3, alpha=5, targets=["q_proj", "down_proj"])
    policy = load_policy(config)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, p in policy.named_parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=draw))
    save_adapter(policy, config, folder / "adapter")
    save_pretrained(policy, folder / "merged")
    return folder / "adapter"


def logits(found) -> torch.Tensor:
    with torch.no_grad():
        return found(torch.arange(3, 23)[None]).logits.log_softmax(-1)


def test_a_saved_adapter_is_the_trained_one(base: Path, tmp_path: Path) -> None:
    """On its base through peft, merged, and continued by unift: the same log-probs to 1e-6 relative to their size."""
    adapter = trained(base, tmp_path)
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    peft = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))
    again = load_policy(model(adapter))
    untouched = logits(AutoModelForCausalLM.from_pretrained(base))
    assert (peft - untouched).abs().max() > 0.01
    assert torch.allclose(peft, merged, rtol=1e-6, atol=1e-6)
    save_pretrained(again, tmp_path / "again")
    assert torch.allclose(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), merged, rtol=1e-6, atol=1e-6
    )
    assert again.lora and len(again.named_parameters()) == 2 * 2 * 2  # 2 layers, 2 targets, A and B
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"rank": 8}, r"model.lora.rank=8 contradicts the adapter in .*, which has 3"),
        ({"alpha": 7}, r"model.lora.alpha=7.* contradicts"),
        ({"targets": ["v_proj"]}, r"model.lora.targets=\['v_proj'\] contradicts"),
    ],
)
def test_settings_that_contradict_an_adapter_are_refused(base: Path, tmp_path: Path, lora: dict, said: str) -> None:
    adapter = trained(base, tmp_path)
    with pytest.raises(ConfigError, match=said):
        load_policy(model(adapter, **lora))
    load_policy(model(adapter, rank=3, alpha=5, targets=["down_proj", "q_proj"]))  # what agrees is no contradiction


def test_the_reference_of_a_continued_adapter_is_the_policy_that_began(base: Path, tmp_path: Path) -> None:
    policy = load_policy(model(trained(base, tmp_path)))
    with Reference(policy, tmp_path, 0, 1.0).policy() as reference:
        assert reference.model is not policy.model and reference.base is not policy.base
        begun = lora.merged_state(policy.base)
        assert all(torch.equal(begun[name], tensor) for name, tensor in lora.merged_state(reference.base).items())
        assert all(
            layer.active_adapters and not layer.disable_adapters for layer in lora.adapted(reference.base).values()
        )


def changed(adapter: Path, **settings: object) -> Path:
    """The adapter with other settings in its adapter_config.json."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return adapter


def test_an_adapter_that_was_trained_with_dropout_goes_on_without(base: Path, tmp_path: Path) -> None:
    adapter = changed(trained(base, tmp_path), lora_dropout=0.5)
    policy = load_policy(model(adapter))
    assert not any(m.training for m in policy.model.modules())
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    request = Request(list(range(3, 23)), None)
    greedy = [generate(policy, [request], 6)[0][0] for _ in range(2)]
    assert greedy[0] == greedy[1]
    assert greedy[0].logps[0] == pytest.approx(float(merged[0, -1].max()), abs=1e-5)


def test_an_adapter_whose_file_lacks_layers_is_refused(base: Path, tmp_path: Path) -> None:
    """peft starts those anew: what was learnt in them would be gone."""
    adapter = trained(base, tmp_path)
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({n: w for n, w in weights.items() if "layers.1.mlp" not in n}, path)
    with pytest.raises(
        ConfigError, match=r"does not fit LlamaForCausalLM: Found missing adapter keys .*layers\.1\.mlp"
    ):
        load_policy(model(adapter))
    save_file({n.replace("model.layers", "model.text.layers"): w for n, w in weights.items()}, path)
    with pytest.raises(ConfigError, match="does not fit LlamaForCausalLM"):
        load_policy(model(adapter))


def test_an_adapter_of_another_kind_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    adapter = trained(base, tmp_path)
    plain = json.loads((adapter / "adapter_config.json").read_text())
    for key in lora.ODD:
        changed(adapter, **(plain | {key: ["q_proj"]}))
        with pytest.raises(ConfigError, match=f"has {key}: only plain LoRA is continued"):
            load_policy(model(adapter))


def test_an_adapters_own_tokenizer_goes_on(base: Path, tmp_path: Path) -> None:
    """Saved beside an adapter by whoever trained it, often with a chat template that the base does not have."""
    adapter = trained(base, tmp_path)
    assert load_tokenizer(model(adapter)).chat_template is None
    template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    char_tokenizer(template=template).save_pretrained(adapter)
    assert load_tokenizer(model(adapter)).chat_template == template
    for path in adapter.glob("*token*"):
        path.unlink()
    assert load_tokenizer(model(adapter)).get_vocab() == char_tokenizer().get_vocab()


def test_an_adapter_without_its_base_is_one_clear_line(base: Path, tmp_path: Path) -> None:
    adapter = trained(base, tmp_path)
    shutil.rmtree(base)
    with pytest.raises(ConfigError, match="the base of this adapter cannot be had: model.path="):
        load_policy(model(adapter))


def test_a_run_saves_its_adapter_and_another_run_continues_it(base: Path, tmp_path: Path) -> None:
    def run(path: Path, name: str, *more: str) -> Path:
        own = [f"model.path={path}", "train.steps=2", "train.prompts=2", "sample.completions=2", "data.train_rows=6",
               "data.test_rows=2", "eval.every=0", "threads=1", "train.lr=0.01", *more]  # fmt: skip
        train(resolve("sft", recipe="lock", overrides=parse_overrides(own)), tmp_path / name)
        return tmp_path / name / "adapter"

    first = run(base, "first", "model.lora={rank: 2}")
    second = run(first, "second")
    found = []
    for name, adapter in (("first", first), ("second", second)):
        peft = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))
        merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / name / "model"))
        assert torch.allclose(peft, merged, rtol=1e-6, atol=1e-6)
        found.append(merged)
    assert (found[0] - found[1]).abs().max() > 1e-4  # the second trained on


# ---------------------------------------------------------------------------------------------- the Hub


def cached(base: Path, home: Path, name: str) -> None:
    """``base`` as the Hub's own cache holds a model."""
    folder = home / "hub" / f"models--{name.replace('/', '--')}"
    shutil.copytree(base, folder / "snapshots" / ("0" * 40))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)


LOAD = """
import socket, sys
def refused(*a, **k): raise AssertionError("a connection was tried")
socket.socket.connect = refused
from unift.config.sections import Model
from unift.model.load import load_policy
from unift.types import UniftError
try:
    policy = load_policy(Model(path=sys.argv[1], device="cpu"))
    print("loaded", sum(p.numel() for p in policy.model.parameters()))
except UniftError as error:
    print(error)
"""


def test_a_name_is_found_in_the_hubs_cache(base: Path, tmp_path: Path) -> None:
    """In processes of their own, since huggingface_hub reads HF_HOME once."""
    cached(base, tmp_path / "home", "own/tiny")
    cached(base, tmp_path / "home", "own/partial")
    next((tmp_path / "home" / "hub").glob("*partial/snapshots/*/model.safetensors")).unlink()
    said = {}
    for name, offline in (("own/tiny", "0"), ("own/partial", "1"), ("own/missing", "1")):
        env = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": offline}
        env.pop("HF_HUB_CACHE", None)
        done = subprocess.run([sys.executable, "-c", LOAD, name], env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said[name] = done.stdout.strip()
    expected = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(base).parameters())
    assert said["own/tiny"] == f"loaded {expected}"
    for name in ("own/partial", "own/missing"):
        assert said[name].startswith(f"model.path={name!r} is no folder, is not whole in the Hub's cache")
        assert "\n" not in said[name] and f"hf download {name}" in said[name]


def test_a_local_folder_asks_no_hub(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = trained(base, tmp_path)

    def refused(*_: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.chdir(tmp_path)
    for path in (base, "base", adapter):
        load_policy(model(path), load_tokenizer(model(path)))


def test_a_model_inside_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found without an import of the package; a package without a model, or none at all, is an error that says what to do."""
    for name, files in (("carrier", ("model.gguf", "__init__.py")), ("bare", ("__init__.py",))):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text("raise RuntimeError" if file.endswith(".py") else "")
    monkeypatch.syspath_prepend(tmp_path)
    assert locate("package:carrier") == tmp_path / "carrier"
    assert base_name("package:carrier") == str(tmp_path / "carrier")
    with pytest.raises(ConfigError, match="holds no model"):
        locate("package:bare")
    for name in ("no_such_package_here", "json.decoder", "../carrier", ""):
        with pytest.raises(ConfigError, match="no Python package .* is installed. Install the one that carries"):
            locate(f"package:{name}")


def test_the_recipe_finds_the_model_of_its_package(smollm: Path) -> None:
    found = resolve("uft", recipe="smollm2").model
    assert locate(found.path) / str(found.gguf) == smollm


def test_names(tmp_path: Path) -> None:
    assert HUB_NAME.fullmatch("Qwen/Qwen2.5-0.5B") and not HUB_NAME.fullmatch("./models/own")
    for path in ("/no/where/at/all", "nowhere", "../own/model"):
        with pytest.raises(ConfigError, match="neither a folder nor embedded:NAME, nor the name of a model on the Hub"):
            locate(path)


FETCH = """
import sys
from unift.commands.settings import quiet_libraries
from unift.model.folder import locate
from unift.rows.readers import read_rows
from unift.types import UniftError
quiet_libraries()  # an earlier call of the same process, on a local model
locate("embedded:lock")
import datasets  # which keeps what the variables say now
for fetch in (lambda: locate("own/missing"), lambda: read_rows("hf:own/rows")):
    try:
        fetch()
    except UniftError as error:
        print(error)
"""


@pytest.mark.parametrize("wish", [None, "1"], ids=["unset", "offline"])
def test_what_is_named_on_the_hub_is_asked_for(tmp_path: Path, wish: str | None) -> None:
    """The commands keep libraries off the Hub, but for a model or rows that the settings name there; a person's wish stays."""
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {k: v for k, v in os.environ.items() if "OFFLINE" not in k and not k.lower().endswith("_proxy")}
    env |= {
        "HF_HOME": str(tmp_path),
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_DISABLE_XET": "1",
    }
    env |= {"HF_HUB_OFFLINE": wish} if wish else {}
    done = subprocess.run([sys.executable, "-c", FETCH], env=env, cwd=tmp_path, capture_output=True, text=True)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    assert "model.path='own/missing' is no folder" in done.stdout and "hf:own/rows" in done.stdout
    found = {name for name in ("own/missing", "own/rows") if any(name in path for path in asked)}
    assert found == (set() if wish else {"own/missing", "own/rows"}), (asked, done.stdout)


def test_a_run_folder_or_a_gguf_folder_is_no_model_by_itself(tmp_path: Path) -> None:
    """The message names what to set: the run's model, or the file."""
    run = tmp_path / "run"
    (run / "checkpoints" / "step_000002" / "model").mkdir(parents=True)
    (run / "config.yaml").write_text("method: uft\n")
    with pytest.raises(ConfigError, match="is a run folder, no model: the run has saved none yet. Continue it first"):
        locate(str(run))
    (run / "checkpoints" / "step_000002" / "model" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"it is in .*step_000002/model \(the last checkpoint's"):
        locate(str(run))
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"it is in .*/run/model$"):
        locate(str(run))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "own.Q4.gguf").write_text("")
    with pytest.raises(ConfigError, match=r"holds GGUF files and no config.json: set model.gguf=own.Q4.gguf$"):
        load_tokenizer(model(tmp_path / "weights"))
