"""Suites of problem sets: which row belongs where, evaluations that go on after a kill, exports, the paper's table."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import char_tokenizer

import unift
from unift.commands.compare import suites
from unift.commands.suite import records, table
from unift.commands.suite.columns import SUITES, key, read_problems
from unift.commands.suite.export import process_results
from unift.config.resolve import resolve
from unift.intervals import wilson
from unift.rows.readers import rows_of
from unift.types import ConfigError, DataError, UniftError

SHARES = {"countdown": "countdown", "aime": "aime", "minerva": "minerva", "openai/gsm8k": "gsm8k"}


def released(source, number, **more):
    """A row in the released layout; without steps but for Countdown."""
    truth = {"question": f"{number}?", "target": str(number)}
    if source == "countdown":
        truth = {"numbers": [number, 1], "target": number + 1}
    if source == "kk_logic":
        truth = {"names": ["Zoey"], "solution": [True], "solution_text_format": "(1) Zoey is a knight"}
    return {
        "prompt": [{"role": "user", "content": f"{source} {number}? <answer> "}], "hint": [""], "answer": "",
        "data_source": source, "reward_model": {"ground_truth": truth, "style": "rule"}, **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """data/<name>/test.jsonl of four columns, and a train file that must not be read."""
    root = tmp_path_factory.mktemp("released")
    files = {"countdown": ["countdown"] * 5, "others": ["aime"] * 3 + ["minerva"] * 7 + ["openai/gsm8k"] * 4}
    for name, sources in files.items():
        (root / name).mkdir()
        lines = [json.dumps(released(source, i)) for i, source in enumerate(sources)]
        (root / name / "test.jsonl").write_text("\n".join(lines))
        (root / name / "train.jsonl").write_text(json.dumps(released("amc", 1)))
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model whose letters are its tokens and that says digits and spaces, so that some answers are right."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer, place = char_tokenizer(), tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), **size, max_position_embeddings=128, eos_token_id=2, pad_token_id=0,
                    bos_token_id=1, tie_word_embeddings=False, initializer_range=0.5)
    )  # fmt: skip
    spoken = torch.tensor([tokenizer.convert_tokens_to_ids(c) for c in "0123456789 "])
    with torch.no_grad():
        others = torch.ones(len(tokenizer), dtype=torch.bool).index_fill(0, spoken, False)
        made.lm_head.weight[others] = 0.0
        made.lm_head.weight[spoken] *= 3.0
    made.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def run(model, data, out, *words, **options):
    return unift.evaluate_suite(
        model,
        data,
        out=out,
        **{"samples": 2, "eval.max_tokens": 1, "threads": 1, "reward.answer": "last_number"} | options,
    )


# ---------------------------------------------------------------------------------------------- rows


def test_rows_go_to_their_columns(folder):
    found = read_problems("uft", [folder])
    assert {name: len(rows) for name, rows in found.columns.items()} == {
        "aime": 3, "countdown": 5, "minerva": 7, "gsm8k": 4,
    }  # fmt: skip
    assert found.missing == ["MATH(3,4,5)", "AMC", "Logic", "MATH500", "Olympiad"]
    assert all(not row.steps and row.task in ("countdown", "math") for rows in found.columns.values() for row in rows)
    assert read_problems("uft", [folder], 2).columns["minerva"] == found.columns["minerva"][:2]


def test_every_source_of_the_release_has_a_column():
    sources = ["aime", "amc", "openai/gsm8k", "minerva", "olympiad_bench", "math500", "countdown", "kk_logic"]
    sources.append("DigitalLearningGmbH/MATH-lighteval")
    rows = [rows_of([released(s, 1)], need_steps=False)[0] for s in sources]
    held = [[c.name for c in SUITES["uft"] if c.holds(row)] for row in rows]
    assert all(len(names) == 1 for names in held) and len({names[0] for names in held}) == 9


@pytest.mark.parametrize(("level", "held"), [("Level 2", False), ("Level 3", True), ("Level 5", True), (None, True)])
def test_mathematics_has_levels_three_to_five(level, held):
    (row,) = rows_of([released("DigitalLearningGmbH/MATH-lighteval", 1, level=level)], need_steps=False)
    assert any(c.holds(row) for c in SUITES["uft"]) == held


def test_a_problem_in_two_files_counts_once_and_others_are_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "data")
    lines = [json.dumps(released(source, 1)) for source in ("aime", "cais/hle")]
    (tmp_path / "data" / "more.jsonl").write_text("\n".join(lines))
    found = read_problems("uft", [tmp_path / "data"])
    assert len(found.columns["aime"]) == 3
    assert found.notes == [
        "1 rows of 'cais/hle' belong to no column and were left out",
        "1 rows stand in more than one file and count once",
    ]


def test_no_rows_is_an_error(folder, tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match="no file of rows"):
        read_problems("uft", [tmp_path])
    (tmp_path / "a.jsonl").write_text(json.dumps(released("cais/hle", 1)))
    with pytest.raises(DataError, match=r"suite 'uft' is empty.*expected one of .*aime.*found rows: 1 of 'cais/hle'"):
        read_problems("uft", [tmp_path])
    with pytest.raises(DataError, match="no such file or folder"):
        read_problems("uft", [tmp_path / "none"])
    with pytest.raises(ConfigError, match="needs the problems"):
        read_problems("uft", [])
    with pytest.raises(ConfigError, match="'uff' is unknown. Did you mean 'uft'"):
        read_problems("uff", [folder])


def test_the_released_rows(data_folder):
    """Real rows: the training rows of two columns and half a column of mathematics."""
    files = [data_folder / "countdown" / "train.parquet", data_folder / "logic" / "train.parquet", data_folder / "math"]
    found = read_problems("uft", files)
    assert {n: len(rows) for n, rows in found.columns.items()} == {"math": 512, "countdown": 10240, "logic": 4500}
    assert {row.task for row in found.columns["logic"]} == {"knights"}


# ---------------------------------------------------------------------------------------------- evaluations


def test_numbers_are_those_of_an_evaluation_of_the_same_rows(folder, model, tmp_path):
    """Greedy and pass@k of a column are what `evaluate` finds on its rows alone, whose draws have the same addresses."""
    found = run(model, folder, tmp_path / "out", samples=8)
    rows = read_problems("uft", [folder]).columns["minerva"]
    alone = unift.evaluate(
        model, rows, samples=8, **{"eval.max_tokens": 1, "threads": 1, "reward.answer": "last_number"}
    )
    column = found["columns"]["minerva"]
    assert (column["accuracy"], column["n"]) == (alone.greedy.accuracy, 7)
    assert column["pass@k"] == alone.pass_at and 0 < alone.pass_at["pass@8"]["accuracy"] < 1
    kept = records.read(tmp_path / "out", "minerva")
    assert [kept[key(row)]["id"] for row in rows] == [row.id for row in rows]
    assert {len({a["text"] for r in kept.values() for a in r["samples"]})} != {1}, "the samples are all alike"
    assert found["missing"] == ["MATH(3,4,5)", "AMC", "Logic", "MATH500", "Olympiad"]
    assert json.loads((tmp_path / "out" / "result.json").read_text())["columns"] == found["columns"]
    assert "| Minerva | 7 |" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.parametrize("left", [0, 1, 6])
def test_a_torn_evaluation_goes_on(folder, model, tmp_path, left):
    """What is on disk is not answered again; a line that a kill tore is."""
    whole = run(model, folder, tmp_path / "whole")
    out = tmp_path / "torn"
    shutil.copytree(tmp_path / "whole", out)
    (out / "result.json").unlink()
    path = records.path_of(out, "minerva")
    lines = path.read_bytes().split(b"\n")
    marked = [line.replace(b'"key"', b'"kept": true, "key"', 1) for line in lines[:left]]
    path.write_bytes(b"".join(line + b"\n" for line in marked) + lines[left][: len(lines[left]) // 2])
    again = run(model, folder, out)
    assert again["columns"] == whole["columns"] and again["average"] == whole["average"]
    assert sum("kept" in r for r in records.read(out, "minerva").values()) == left


def test_another_evaluation_is_refused_and_more_rows_are_not(folder, model, tmp_path):
    run(model, [folder / "countdown"], tmp_path / "out", samples=0)
    more = run(model, folder, tmp_path / "out", samples=0)
    assert list(more["columns"]) == ["aime", "countdown", "minerva", "gsm8k"]
    with pytest.raises(ConfigError, match=r"another evaluation:\s+samples: 0 -> 2"):
        run(model, folder, tmp_path / "out")
    other = tmp_path / "model"
    shutil.copytree(model, other)
    from safetensors.torch import load_file, save_file

    weights = load_file(other / "model.safetensors")
    save_file({k: v * 1.01 for k, v in weights.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="weights: '"):
        run(other, folder, tmp_path / "out", samples=0)


def test_damaged_records_are_one_line(folder, model, tmp_path):
    run(model, [folder / "countdown"], tmp_path / "out", samples=0)
    path = records.path_of(tmp_path / "out", "countdown")
    path.write_text("[1]\n" + path.read_text())
    with pytest.raises(UniftError, match="line 1 is no record of a row"):
        run(model, [folder / "countdown"], tmp_path / "out", samples=0)


def test_prompts_beyond_the_positions_are_refused(folder, model, tmp_path):
    with pytest.raises(DataError, match="128 positions"):
        run(model, folder, tmp_path / "out", **{"eval.max_tokens": 128})
    free = unift.evaluate_suite(model, folder, out=tmp_path / "free", rows=1, **{"threads": 1})
    longest = max(
        len(row.prompt.rstrip()) for rows in read_problems("uft", [folder], 1).columns.values() for row in rows
    )
    assert free["settings"]["max_tokens"] == 128 - longest


COMMAND = [sys.executable, "-m", "unift", "eval"]


def command(model, folder, out, *more):
    settings = ["eval.max_tokens=1", "threads=1", "reward.answer=last_number"]
    return [
        *COMMAND,
        str(model),
        "--suite",
        "uft",
        "--data",
        str(folder),
        "--out",
        str(out),
        "--samples",
        "2",
        *more,
        *settings,
    ]


@pytest.mark.slow
def test_a_killed_evaluation_goes_on(folder, model, tmp_path):
    """SIGKILL once the first column is on disk; the same command ends with the numbers of one that was never killed."""
    whole = run(model, folder, tmp_path / "whole")
    child = subprocess.Popen(command(model, folder, tmp_path / "out"), stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not records.path_of(tmp_path / "out", "aime").is_file() and time.monotonic() < until:
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "out" / "result.json").is_file()
    said = subprocess.run(command(model, folder, tmp_path / "out"), capture_output=True, text=True, check=True).stdout
    assert "AIME: 3 rows, 3 judged before" in said
    assert json.loads((tmp_path / "out" / "result.json").read_text())["columns"] == whole["columns"]


@pytest.mark.dist
def test_two_processes_find_what_one_finds(folder, model, tmp_path):
    whole = run(model, folder, tmp_path / "whole")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    both = [
        subprocess.Popen(
            command(model, folder, tmp_path / "two"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | world | {"RANK": str(i), "LOCAL_RANK": str(i)},
        )
        for i in range(2)
    ]  # fmt: skip
    said = [child.communicate(timeout=240) for child in both]
    assert [child.returncode for child in both] == [0, 0], said
    assert "Minerva" in said[0][0] and not said[1][0]
    assert json.loads((tmp_path / "two" / "result.json").read_text())["columns"] == whole["columns"]
    for name in whole["columns"]:
        one, two = (records.path_of(tmp_path / where, name).read_text() for where in ("whole", "two"))
        assert one == two


def test_suite_options_belong_to_a_suite(folder, tmp_path):
    done = subprocess.run([*COMMAND, "embedded:lock", "--data", str(folder)], capture_output=True, text=True)
    assert done.returncode == 2 and "add --suite uft" in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------- numbers


def test_average_interval_is_the_spread_of_independent_columns():
    """Against draws: the standard error of a mean of independent shares, for shares where Wilson is near the normal one."""
    shares, n = np.array([0.3, 0.5, 0.7]), 2000
    columns = [dict(zip(("low", "high"), wilson(p * n, n), strict=True), accuracy=p) for p in shares]
    found = table.average(columns)
    draws = np.random.default_rng(0).binomial(n, shares, (200_000, 3)).mean(1) / n
    assert found["accuracy"] == pytest.approx(0.5)
    low, high = np.quantile(draws, [0.025, 0.975])
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=3e-4)


def test_the_paper_s_table():
    def one(**shares):
        columns = {
            n: {"accuracy": p, "n": 50, **dict(zip(("low", "high"), wilson(50 * p, 50)))} for n, p in shares.items()
        }
        return {"columns": columns}

    text = suites.compared(
        {"base": [one(math=0.0, gsm8k=0.1)], "uft": [one(math=0.5, gsm8k=0.2), one(math=0.7, gsm8k=0.4)]}, "uft"
    )
    head, _, base, uft = text.splitlines()
    assert head == "| method | seeds | MATH(3,4,5) | GSM8K | average |"
    assert base.startswith("| base | 1 | 0.00 [0.0, 7.1] | 10.00 [") and " | 5.00 [" in base
    assert uft.startswith("| uft | 2 | 60.00 [") and "| 30.00 [" in uft and "| 45.00 [" in uft


# ---------------------------------------------------------------------------------------------- exports


@pytest.fixture(scope="module")
def exported(folder, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported")
    return out, run(model, folder, out, export=["lm-eval", "inspect"])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_export_for_the_harness(exported):
    """Names of lm-evaluation-harness 0.4.13: a task's keys, and those of result_schema.SampleResult."""
    import yaml

    out, result = exported
    text = (out / "lm-eval" / "unift_minerva.yaml").read_text()
    assert "process_results: !function 'utils.process_results'\n" in text
    task = yaml.safe_load(text.replace("!function ", ""))
    assert (task["dataset_path"], task["test_split"], task["output_type"]) == ("json", "test", "generate_until")
    docs = lines(out / "lm-eval" / "unift_minerva.jsonl")
    assert task["dataset_kwargs"]["data_files"]["test"] == str(out / "lm-eval" / "unift_minerva.jsonl")
    (group,) = [yaml.safe_load((out / "lm-eval" / "unift_uft.yaml").read_text())]
    assert group["task"] == [f"unift_{name}" for name in result["columns"]]
    (samples,) = (out / "lm-eval" / "results").glob("*/samples_unift_minerva_*.jsonl")
    kept = lines(samples)
    assert set(kept[0]) == {
        "doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics", "doc_hash",
        "prompt_hash", "target_hash", "acc",
    }  # fmt: skip
    assert [s["doc"] for s in kept] == docs and not docs[0]["prompt"].endswith(" ")
    assert np.mean([s["acc"] for s in kept]) == result["columns"]["minerva"]["accuracy"]
    (aggregated,) = (out / "lm-eval" / "results").glob("*/results_*.json")
    whole = json.loads(aggregated.read_text())
    assert whole["results"]["unift_minerva"]["acc,none"] == result["columns"]["minerva"]["accuracy"]
    assert whole["n-samples"]["unift_aime"] == {"original": 3, "effective": 3}


def test_the_harness_s_hook_judges_as_unift_does(exported):
    out, _ = exported
    doc = lines(out / "lm-eval" / "unift_minerva.jsonl")[2]  # the sixth row of its file
    assert process_results(doc, ["it is 5"]) == {"acc": 1.0} and process_results(doc, ["it is 6"]) == {"acc": 0.0}
    counted = lines(out / "lm-eval" / "unift_countdown.jsonl")[3]
    assert process_results(counted | {"answer_place": "tags"}, ["<answer>3+1</answer>"]) == {"acc": 1.0}
    (samples,) = (out / "lm-eval" / "results").glob("*/samples_unift_minerva_*.jsonl")
    assert all(process_results(s["doc"], s["resps"][0]) == {"acc": s["acc"]} for s in lines(samples))


def test_export_for_inspect(exported):
    out, result = exported
    (log,) = (out / "inspect").glob("*_unift-minerva_*.json")
    found = json.loads(log.read_text())
    assert (found["version"], found["status"], len(found["samples"])) == (2, "success", 7)
    assert {"created", "task", "dataset", "model", "config"} <= set(found["eval"])
    (score,) = found["results"]["scores"]
    assert score["metrics"]["accuracy"]["value"] == result["columns"]["minerva"]["accuracy"]
    assert {"id", "epoch", "input", "target", "messages", "output", "scores"} <= set(found["samples"][0])
    (sampled,) = (out / "inspect").glob("*_unift-minerva-sampled_*.json")
    both = json.loads(sampled.read_text())
    assert [s["epoch"] for s in both["samples"]] == [1] * 7 + [2] * 7
    accuracy = both["results"]["scores"][0]["metrics"]["accuracy"]["value"]
    assert accuracy == pytest.approx(result["columns"]["minerva"]["pass@k"]["pass@1"]["accuracy"])


def test_inspect_reads_the_export(exported):
    log = pytest.importorskip("inspect_ai.log", reason="inspect-ai is not installed")
    dataset = pytest.importorskip("inspect_ai.dataset", reason="inspect-ai is not installed")
    out, result = exported
    found = [log.read_eval_log(info) for info in log.list_eval_logs(str(out / "inspect"))]
    assert len(found) == 2 * len(result["columns"])
    assert len(dataset.json_dataset(str(out / "inspect" / "unift_minerva.jsonl"))) == 7


def test_the_harness_runs_the_export(exported, model):
    """The package itself, on the same model: the same answers, hashes and accuracy."""
    tasks = pytest.importorskip("lm_eval.tasks", reason="lm-evaluation-harness is not installed")
    import lm_eval

    out, result = exported
    manager = tasks.TaskManager(include_path=str(out / "lm-eval"), include_defaults=False)
    arguments = {"pretrained": str(model), "dtype": "float32", "add_bos_token": False}
    found = lm_eval.simple_evaluate(
        model="hf", model_args=arguments, tasks=["unift_uft"], task_manager=manager, log_samples=True, device="cpu",
        bootstrap_iters=0,
    )  # fmt: skip
    for name, column in result["columns"].items():
        (ours,) = (out / "lm-eval" / "results").glob(f"*/samples_unift_{name}_*.jsonl")
        theirs = sorted(found["samples"][f"unift_{name}"], key=lambda s: s["doc_id"])
        same = ("resps", "acc", "doc_hash", "prompt_hash", "target_hash", "target")
        assert [[s[k] for k in same] for s in lines(ours)] == [[s[k] for k in same] for s in theirs]
        assert found["results"][f"unift_{name}"]["acc,none"] == column["accuracy"]


def test_an_unknown_export_is_refused_before_anything(folder, tmp_path):
    with pytest.raises(ConfigError, match="'lmeval' is unknown. Did you mean 'lm-eval'"):
        run("embedded:lock", folder, tmp_path / "out", export=["lmeval"])
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- comparisons


@pytest.mark.slow
def test_compare_judges_base_and_runs(folder, model, tmp_path):
    """`unift compare --suite uft` on rows of one's own, without held-out rows: the paper's table, kept for the next time."""
    train = tmp_path / "rows.jsonl"
    train.write_text(
        "\n".join(
            json.dumps({"prompt": f"{i}? <answer>", "steps": [f" {i}", " </answer>"], "answer": i, "task": "math"})
            for i in range(8)
        )
    )
    words = [
        sys.executable, "-m", "unift", "compare", "--methods", "sft,uft", "--seeds", "1", "--run", str(tmp_path / "out"),
        "--suite", "uft", "--data", str(folder), "--rows", "3", f"data.train={train}", f"model.path={model}",
        "train.steps=2", "train.prompts=4", "sample.completions=2", "sample.max_tokens=8", "eval.train_rows=0",
    ]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "suite.md").read_text()
    assert [line.split(" | ")[0] for line in text.splitlines()[2:5]] == ["| base", "| sft", "| uft"]
    assert (
        "| method | seeds | AIME | Countdown | Minerva | GSM8K | average |" in text
        and text.splitlines()[0] in done.stdout
    )
    kept = json.loads((tmp_path / "out" / "suite.json").read_text())
    assert kept["uft"][0]["settings"]["max_tokens"] == kept["base"][0]["settings"]["max_tokens"] == 8
    assert kept["sft"][0]["settings"]["weights"] != kept["base"][0]["settings"]["weights"]
    again = subprocess.run(words, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.count("(finished before)") == 5


def test_a_comparison_without_the_suite_s_rows_trains_nothing(tmp_path):
    from unift.commands.compare import Plan, compare_methods
    from unift.commands.compare.suites import SuitePlan

    with pytest.raises(DataError, match="no such file or folder"):
        compare_methods(Plan(["uft"], 1, "lock", tmp_path / "out", suite=SuitePlan("uft", [str(tmp_path / "none")])))
    assert not (tmp_path / "out").exists()


def test_the_default_methods_of_the_paper_exist():
    from unift.commands.compare.suites import METHODS

    assert [resolve(m, recipe="lock").method for m in METHODS.split(",")] == ["sft", "rft", "sft-rft", "r3", "uft"]
