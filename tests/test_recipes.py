"""The settings files of examples/cluster: each resolves, says the paper's numbers where it claims to, and fits its card by the
estimate; the scripts beside them run end to end in tests/test_cluster.py."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import char_tokenizer, saved_llama

from unift.commands.doctor import sizes
from unift.commands.doctor.dry_run import describe
from unift.commands.settings import resolved
from unift.config.identity import flat
from unift.config.resolve import resolve
from unift.config.stages import stages
from unift.hints.schedules import expected_share
from unift.model import architecture, memory
from unift.rows.inspect import write_rows
from unift.rows.tasks import make_rows

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "cluster"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml") if not path.name.startswith("accelerate"))
PAPER = [name for name in FILES if name.startswith("uft_")]

spec = importlib.util.spec_from_file_location("docs_tool", ROOT / "tools" / "docs.py")
docs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(docs)


@pytest.fixture
def place(tmp_path):
    """The folder as a user copies it, with rows beside the files and a small model."""
    folder = tmp_path / "cluster"
    shutil.copytree(FOLDER, folder)
    for split in ("train", "test"):
        rows = make_rows("countdown", 12, 0, split, numbers=3, style="short")
        for kind in ("jsonl", "parquet"):
            write_rows(rows, folder / f"{split}.{kind}")
    saved_llama(tmp_path / "model", char_tokenizer(), positions=32768)  # as many as the named ones have, or nearly
    return folder


def test_every_recipe_is_here():
    models = {yaml.safe_load((FOLDER / name).read_text())["model"]["path"] for name in PAPER}
    sizes_of_qwen = {f"Qwen/Qwen2.5-{size}" for size in ("0.5B", "1.5B", "3B")}
    assert models == sizes_of_qwen | {f"meta-llama/Llama-3.2-{size}" for size in ("1B", "3B")}
    assert set(FILES) - set(PAPER) == {"one_gpu.yaml", "one_node.yaml", "two_nodes.yaml", "lora_24gb.yaml"}


@pytest.mark.parametrize("name", FILES)
def test_a_dry_run_takes_it(place, name):
    """With rows and a small model in place of the named ones: every other setting of the file is kept."""
    model = str(place.parent / "model")
    config = resolved(config=place / name, settings={"model.path": model})
    told = describe(config, place.parent / "run")
    assert "rows: 12 for training, 12 held out" in told and "memory: 0.0 M parameters" in told
    values, wanted = flat(config.model_dump()), flat(yaml.safe_load((FOLDER / name).read_text()))
    for key, value in wanted.items():
        if key not in ("model.path", "data.train", "data.test"):
            assert values[key] == value, key
    assert Path(config.data.train).parent == place


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_settings(name):
    """Table 1 of arXiv 2505.16984, and the public code where the paper is silent (clip, entropy, batches in prompts)."""
    c = resolve(None, file=yaml.safe_load((FOLDER / name).read_text()))
    assert (c.train.steps, c.train.prompts, c.sample.completions, c.train.updates) == (500, 256, 4, 4)
    assert c.train.prompts // c.train.updates == 64 and c.train.micro_prompts == 4
    assert (c.show.low, c.show.high, c.show.cuts, c.show.until * c.train.steps) == (0.05, 0.95, 5, 300)
    assert (c.train.lr, c.train.decay, c.train.warmup, c.train.clip_norm) == (1e-6, "constant", 0, 1.0)
    assert c.train.optimizer.startswith("adamw") and c.train.master_weights and "8bit" not in c.train.optimizer
    assert (c.reference.kl, c.likelihood.weight, c.policy.entropy) == (0.001, 0.001, 0.001)
    assert (c.policy.low, c.policy.high, c.sample.temperature, c.sample.max_tokens) == (0.2, 0.2, 1.0, 1024)
    assert (c.reward.format_score, c.eval.every, c.eval.samples, c.seed) == (0.1, 25, 0, 0)
    shares = [expected_share(c.show, t, c.train.steps) for t in (0, 149, 299, 300)]
    assert shares == pytest.approx([0.949975, 0.5, 0.05, 0.0], abs=1e-6)  # eq. B.1


@pytest.mark.parametrize("method", ["sft-paper", "rft-paper", "sft-rft-paper", "r3-paper", "stage-paper"])
def test_the_papers_baselines_take_the_same_files(method):
    for name in PAPER:
        file = yaml.safe_load((FOLDER / name).read_text())
        c = resolve(method, file=file)
        assert c.method == method and c.model.path == file["model"]["path"]
        assert all(stage.rules.train.token_budget == 16384 for stage in stages(c))


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("Qwen/Qwen2.5-0.5B", 494_032_768),
        ("Qwen/Qwen2.5-1.5B", 1_543_714_304),
        ("Qwen/Qwen2.5-3B", 3_085_938_688),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("meta-llama/Llama-3.2-3B", 3_212_749_824),
    ],
)
def test_shapes_are_those_of_the_models(name, numbers):
    """Parameters as the checkpoints have them: the estimate leaves out the last norm and Qwen's biases of q, k and v."""
    shapes = sizes.MODELS[name]
    q, kv = architecture.heads(shapes)
    biases = shapes["num_hidden_layers"] * (q + 2 * kv) if "Qwen" in name else 0
    assert architecture.parameters(shapes) + shapes["hidden_size"] + biases == numbers


@pytest.mark.parametrize("name", FILES)
def test_it_fits_its_card(name):
    config, processes, card = docs.cluster_recipes()[name]
    assert sizes.peak(sizes.MODELS[config.model.path], config, processes) <= sizes.ROOM * card * 2**30


def test_what_shards_and_servers_save():
    """Parts of what stays and of gradients; all weights once, while they are gathered."""
    shapes = sizes.MODELS["Qwen/Qwen2.5-7B"]
    config = resolve(None, file=yaml.safe_load((FOLDER / "two_nodes.yaml").read_text()))
    n = architecture.parameters(shapes)
    stays = (6 + 8 + 4) * n  # float32 and the products' bfloat16 copies, AdamW's state, the reference
    gathered = 4 * n * 13 / 14  # more than the gradients' part, a layer and the activations
    assert sizes.peak(shapes, config, 14) == pytest.approx(memory.PROCESS + stays / 14 + gathered)
    assert sizes.peak(shapes, config, 1) > memory.PROCESS + stays + 4 * n
    node = yaml.safe_load((FOLDER / "one_node.yaml").read_text())
    served, alone = (resolve(None, file=node | {"engine": {"kind": kind}}) for kind in ("vllm", "auto"))
    shapes = sizes.MODELS["Qwen/Qwen2.5-3B"]
    assert sizes.peak(shapes, served, 6) == sizes.peak(shapes, served, 1) < sizes.peak(shapes, alone, 6)


@pytest.mark.parametrize("name", ["one_node.sh", "slurm.sbatch"])
def test_scripts_are_shell(name):
    if shutil.which("bash") is None:
        pytest.skip("bash is missing")
    assert subprocess.run(["bash", "-n", FOLDER / name], capture_output=True).stderr == b""
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is missing")
    done = subprocess.run(["shellcheck", "--severity=warning", FOLDER / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
