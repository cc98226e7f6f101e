"""The page of a run: it holds what the run measured, nothing that the model wrote is markup, and it needs no other file."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from unift.commands import report
from unift.commands.report import cards, charts, comparison, words
from unift.commands.report.findings import findings
from unift.commands.report.gather import read_run, run_folders, settings_of
from unift.config.identity import to_yaml
from unift.config.resolve import resolve
from unift.training.run.rollouts import write_rollouts
from unift.types import Group, Sample, Score, UniftError

NASTY = "<script>alert(1)</script><img src=x onerror=alert(2)></pre></details>\"'&amp;\x00\u202e"
VOID = {"meta", "path", "use", "rect", "br"}


class Page(HTMLParser):
    """Elements with their attributes, and the visible text; a tag closed in the wrong order is an error."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.stack = [], [], "", []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag != "meta":
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if "style" not in self.stack:
            self.text += data


def sample(text, value, error=""):
    score = None if error else Score(value, value >= 1, {"format": 0.5}, note=NASTY)
    return Sample([5, 6, 1], [-0.1] * 3, True, text, score, error)


def make_run(folder, steps=30, done=30, seed=0, method="uft", rollouts=True):
    """A run folder with the files of the loop, written by its own functions where they exist."""
    folder.mkdir(parents=True)
    settings = resolve(method, recipe="lock", overrides={"train": {"steps": steps}, "seed": seed})
    (folder / "config.yaml").write_text(to_yaml(settings))
    (folder / "environment.json").write_text(
        json.dumps({"python": "3.11", "packages": {"torch": "2.13.0"}, "cuda": None})
    )
    base = {"accuracy": 0.1, "low": 0.08, "high": 0.13, "n": 500}
    lines = [{"step": 0, "base": base, "eval/test/accuracy": 0.1}]
    for step in range(1, done + 1):
        line = {
            "step": step,
            "reward": step / steps,
            "hint/fraction": 0.5,
            "entropy": 1.0,
            "kl": float("nan"),
            "grad/norm": 1.0,
        }
        line |= {"time/generate": 0.02, "time/update": 0.03, "time/step": 0.06, "time/elapsed": 0.06 * step}
        line |= {"tokens/per_second": 1000.0, "tokens/shared_ratio": 0.4, "tokens/sampled": 50 * step}
        lines.append(line | ({"eval/test/accuracy": 0.5} if step % 10 == 0 else {}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if rollouts:
        group = Group(
            3,
            "row-3",
            [1],
            [2],
            1,
            5,
            [sample("good", 1.0), sample(NASTY, 0.0), sample("bad", 0.0, f"exception: {NASTY}")],
        )
        for step in range(done):
            write_rollouts(folder, step, "0", [group] * 4, [(f"prompt {NASTY}", f"hint {NASTY}")] * 4)
    if done == steps:
        a = {"accuracy": 0.5, "low": 0.456, "high": 0.544, "n": 500}
        passes = {"pass@4": {"accuracy": 0.75, "low": 0.7, "high": 0.8}}
        result = {
            "method": method,
            "seed": seed,
            "steps": steps,
            "seconds": 61.0,
            "tokens_sampled": 20000,
            "tokens_trained": 300,
        }
        result |= {
            "base": base,
            "test": a | {"pass@k": passes},
            "train": a,
            "scorer": {"train": {"total": 90, "exceptions": 30}, "eval": {"total": 6}},
        }
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_a_run_as_a_page(tmp_path):
    text = report.write(make_run(tmp_path / "run")).read_text()
    page = Page(text)
    for shown in ("45.6 to 54.4 %", "pass@4", "70 to 80 %", "+40.0 points", "do not overlap", "30 exceptions of 90", "finished",
                  "30 steps of 32 prompts with 8 completions each", "train.lr", "2.13.0", "row-3", "hint: 1 of 5 pieces"):  # fmt: skip
        assert shown in page.text, shown
    for title in ("Accuracy without hint", "Reward while training", "Entropy", "Gradient norm", "Time of a step"):
        assert title in page.text
    assert "KL to the reference" not in page.text  # NaN throughout: nothing to draw
    # scores 1 and 0, the failed one left out: mean 1/2, sample std sqrt(1/2), so +-(1/2) / sqrt(1/2) = +-0.71
    assert "advantage +0.71" in page.text and "advantage -0.71" in page.text and page.text.count("no score") > 0


def test_hostile_text_stays_text(tmp_path):
    text = report.write(make_run(tmp_path / "run")).read_text()
    page = Page(text)
    assert not {"script", "img", "iframe", "object", "link", "base", "form"} & set(page.tags)
    assert not [k for k, _ in page.attributes if k.startswith("on")]
    assert "<script>alert(1)</script><img src=x onerror=alert(2)></pre></details>\"'&amp;\\u0000\\u202e" in page.text
    assert "\x00" not in text and "\u202e" not in text


def test_no_other_resource(tmp_path):
    text = report.write(make_run(tmp_path / "run")).read_text()
    page = Page(text)
    targets = [v for k, v in page.attributes if k in ("href", "xlink:href", "src", "srcset", "action", "data")]
    ids = [v for k, v in page.attributes if k == "id"]
    assert targets and all(t.startswith("#") and t[1:] in ids for t in targets)
    assert len(ids) == len(set(ids))
    style = re.findall(r"<style>.*?</style>", text, flags=re.S)
    assert style and not any("url(" in s.replace("url(#", "") or "@import" in s for s in style)
    assert "default-src 'none'" in text
    assert not re.search(r"#0[1-4]0[1-4]\d\d", text)  # every colour of a picture is one of the page's


def test_an_unfinished_run_and_damaged_files(tmp_path):
    run = make_run(tmp_path / "run", done=12)
    with open(run / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 13, "rew')
    path = sorted((run / "rollouts").glob("*"))[-1]
    path.write_bytes(path.read_bytes()[:40])
    (run / "environment.json").unlink()
    page = Page(report.write(run, tmp_path / "page.html").read_text())
    assert "not finished: 12 of 30 steps" in page.text and "step 10, held-out" in page.text
    assert "1 of 14 lines left out" in page.text and f"{path.name} was left out" in page.text
    assert not (run / "report.html").exists()
    bare = Page(report.write(make_run(tmp_path / "bare", done=0, rollouts=False)).read_text())
    assert "not finished: 0 of 30 steps" in bare.text


def test_the_page_stays_small(tmp_path):
    run = make_run(tmp_path / "run", rollouts=False)
    long = [Sample([1] * 9, [0.0] * 9, False, f"{n}<" * 40_000, Score(0.0), "") for n in range(9)]
    groups = [Group(n, str(n), [1], [], 0, 5, long) for n in range(6)]
    for step in range(30):
        write_rollouts(run, step, "0", groups, [("&" * 50_000, "")] * 6)
    read = read_run(run)
    assert [s.number for s in read.rollouts] == [1, 5, 9, 13, 18, 22, 26, 30] and read.rollout_steps == 30
    page = Page(report.write(run).read_text())
    assert (run / "report.html").stat().st_size < 3_000_000
    assert "characters left out" in page.text and "more completions of this group are not shown" in page.text
    assert "8 of 30 stored steps" in page.text
    little = cards.rollouts(read, page=30_000)
    assert len(little.encode()) < 40_000 and "more groups were left out" in little


def test_settings_of_the_run_come_first(tmp_path):
    found = settings_of(read_run(make_run(tmp_path / "run")))
    origins = {s.key: s.origin for s in found}
    assert (
        origins["train.steps"] == "this run"
        and origins["show.schedule"] == "preset"
        and origins["save.keep"] == "this run"
    )
    assert origins["reward.timeout"] == "default" and origins["likelihood.weight"] == "this run"
    ranks = [("this run", "preset", "default").index(s.origin) for s in found]
    assert ranks == sorted(ranks)
    phases = {s.key: s for s in settings_of(read_run(make_run(tmp_path / "two", method="sft-rft")))}
    assert phases["phase 2: method"].value == "rft" and phases["phase 1: train.decay"].origin == "this run"


def test_long_curves_are_means_of_stretches():
    import numpy as np

    x, y = charts.thin(np.arange(1000.0), np.arange(1000.0) % 2)
    assert len(x) == charts.POINTS and x[0] == 0.5 and x[-1] > 997 and set(y) <= {0.5, 1 / 3, 2 / 3}


def test_a_comparison(tmp_path):
    for seed in range(2):
        make_run(tmp_path / f"uft-seed{seed}", seed=seed, rollouts=seed == 0)
        make_run(tmp_path / f"rft-seed{seed}", seed=seed, method="rft", done=30 - 20 * seed, rollouts=False)
    page = Page(report.write(tmp_path).read_text())
    assert (
        "3 of 4 runs finished" in page.text and "uft-seed1" in page.text and "not finished: 10 of 30 steps" in page.text
    )
    assert "UFT: 50.0 % on held-out rows without hints; level with RFT." in page.text
    assert "script" not in page.tags and "Mean over seeds; shaded: their range." in page.text


def test_values_of_a_setting_are_not_read_as_one_method(tmp_path):
    """Of `unift compare --vary`: results call every run by its method, folders by what was changed. Each has a hue of its own."""
    arms = {"uft": 0.5, **{f"uft-show.cuts={n}": 0.1 * n for n in range(1, 6)}}
    for arm, share in arms.items():
        run = make_run(tmp_path / f"{arm}-seed0", rollouts=False)
        found = json.loads((run / "result.json").read_text())
        found["test"] = {"accuracy": share, "low": share - 0.01, "high": share + 0.01, "n": 10_000}
        (run / "result.json").write_text(json.dumps({k: v for k, v in found.items() if k != "train"}))
    page = Page(report.write(tmp_path).read_text())
    said = "UFT: 50.0 % on held-out rows without hints; level with uft-show.cuts=5 (the best of the others)."
    assert said in page.text
    assert len({comparison._colour(arm, list(arms)) for arm in arms}) == len(arms)


def test_the_sentence_says_how_many_rows_are_solved(tmp_path):
    for solved, said in (
        ("all", "80 solved rows of the built-in task lock:"),
        ("20", "80 rows of the built-in task lock, of which 20 are"),
    ):
        run = make_run(tmp_path / solved, rollouts=False)
        text = (run / "config.yaml").read_text()
        assert "  solved: all\n" in text
        (run / "config.yaml").write_text(text.replace("  solved: all\n", f"  solved: {solved}\n"))
        assert said in words.sentence(read_run(run))


def test_runs_are_ordered_by_seed_and_comparison(tmp_path):
    for name in ("uft-seed10", "uft-seed2", "sft-seed0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("train: {steps: 1}")
    assert [p.name for p in run_folders(tmp_path)] == ["sft-seed0", "uft-seed2", "uft-seed10"]
    (tmp_path / "compare.json").write_text(json.dumps([{"method": "uft", "seed": 10}]))
    assert [p.name for p in run_folders(tmp_path)] == ["uft-seed10", "sft-seed0", "uft-seed2"]


def test_mistakes_are_named(tmp_path):
    run = make_run(tmp_path / "run", rollouts=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.yaml").write_text("method: uft")
    cases = [
        (tmp_path / "none", None, "does not exist"),
        (run / "config.yaml", None, "is a file; expected a run folder"),
        (tmp_path / "empty", None, "holds no run"),
        (tmp_path / "bad", None, "train.steps is missing"),
        (run, tmp_path, "is a folder, expected the name of a file"),
        (run, tmp_path / "none" / "page.html", "does not exist. Make it first"),
    ]
    for source, out, said in cases:
        with pytest.raises(UniftError, match=re.escape(said)):
            report.write(source, out)
    (run / "metrics.jsonl").write_text("[1]\n")
    with pytest.raises(UniftError, match="no metrics of a step"):
        report.write(run)


def test_settings_of_another_version_still_give_a_page(tmp_path):
    run = make_run(tmp_path / "run")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text + "unheard: 1\n")
    page = Page(report.write(run).read_text())
    assert (
        "does not accept the stored settings" in page.text and "unheard" in page.text and "advantage +" not in page.text
    )


def test_the_verb(tmp_path):
    run = make_run(tmp_path / "run")
    out = tmp_path / "page.html"
    words = [sys.executable, "-m", "unift", "report", str(run), "--out", str(out)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and str(out) in done.stdout and Page(out.read_text()).text
    wrong = subprocess.run([*words[:4], str(tmp_path / "none")], capture_output=True, text=True)
    assert wrong.returncode == 2 and "does not exist" in wrong.stderr and "Traceback" not in wrong.stderr


def test_rollouts_without_scores_are_shown(tmp_path):
    run = make_run(tmp_path / "run", rollouts=False)
    group = Group(0, "row", [1], [], 0, 5, [sample("x", 0.0, "timeout")] * 2)
    write_rollouts(run, 0, "0", [group], [("p", "")])
    (read,) = read_run(run).rollouts
    assert read.groups[0].kind == "scorer failed" and read.groups[0].completions[0].times == 2
    assert "Scorer failed: timeout" in Page(report.write(run).read_text()).text
    assert gzip.decompress(next((run / "rollouts").glob("*")).read_bytes())


def test_completions_without_an_answer_are_named(tmp_path):
    """A reward of 0 because the answer stands elsewhere is another trouble than a wrong one."""
    for share, told in ((0.4, True), (0.05, False)):
        make_run(tmp_path / str(share))
        path = tmp_path / str(share) / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines[0]["answer"] = "boxed"
        path.write_text("\n".join(json.dumps(m | {"completions/no_answer": share}) for m in lines))
        found = [text for _, text in findings(read_run(tmp_path / str(share)))]
        assert any("had no answer" in text and "boxed" in text for text in found) == told
