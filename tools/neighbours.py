"""Small tables of what UFT's neighbours claim, one command each, written into the pages of docs/methods.

    python tools/neighbours.py sft-then-dpo FOLDER      rate of SFT against accuracy before and after DPO     sft-small-lr.md
    python tools/neighbours.py first-tokens FOLDER      UPFT over the number of first tokens                  upft.md
    python tools/neighbours.py labels FOLDER            UNA with a binary and with a score column             una.md
    python tools/neighbours.py vote FOLDER              greedy, majority and reranking after ReFT             reft.md

FOLDER gets a folder a run; the studies share what they have in common, and a repeated command runs what is missing.
--seeds (3), --workers (1); --finished starts nothing and writes the table of the runs that are there. Countdown and the lock on
their embedded bases, one thread a run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pages

from unift.commands.compare import Job, run_many, train_job
from unift.commands.compare.table import accuracy_of
from unift.rows.inspect import write_rows
from unift.rows.tasks import make_rows
from unift.rows.tasks.lock import LETTERS, code_table
from unift.types import Row

PAGES = Path(__file__).resolve().parents[1] / "docs" / "methods"
QUICK = ["eval.every=0", "save.every=0", "eval.train_rows=0"]
RATES = ("1e-4", "3e-4", "1e-3", "4e-3")
MIDDLE = "1e-3"  # the rate whose models the other studies begin with
FIRST = (2, 6, 14, 28)  # tokens; Countdown's longest completion has 28
WRONG = 3  # answers with false codes beside each solution of the lock


class Study:
    """Runs of one folder, by name and seed."""

    def __init__(self, folder: Path, seeds: int, workers: int, finished: bool = False) -> None:
        self.folder, self.seeds, self.workers, self.finished = folder, range(seeds), workers, finished

    def job(self, name: str, seed: int, recipe: str, method: str, *settings: str) -> Job:
        return train_job(method, seed, recipe, self.folder, [*QUICK, *settings], name)

    def run(self, make: Callable[[str, int], Job], names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        """Results of ``make(name, seed)``, seeds in order; with ``finished``, those that are there."""
        keys = [(name, seed) for seed in self.seeds for name in names]
        if self.finished:
            files = [(name, make(name, seed).folder / "result.json") for name, seed in keys]
            there = [(name, json.loads(file.read_text())) for name, file in files if file.is_file()]
            return {name: [r for n, r in there if n == name] for name in names}
        found = run_many(
            [make(*key) for key in keys], self.workers, lambda text: print(text, file=sys.stderr, flush=True)
        )
        return {name: [r for (n, _), r in zip(keys, found, strict=True) if n == name] for name in names}

    def sft(self, names: Sequence[str] = (f"sft-{MIDDLE}",)) -> dict[str, list[dict[str, Any]]]:
        """SFT on Countdown at the rates of the names "sft-RATE"."""
        return self.run(
            lambda name, s: self.job(
                name, s, "countdown", "sft", "train.steps=150", f"train.lr={name.removeprefix('sft-')}"
            ),
            names,
        )

    def model(self, name: str, seed: int) -> str:
        return f"model.path={self.folder / f'{name}-seed{seed}' / 'model'}"


def percent(runs: Sequence[dict[str, Any]]) -> str:
    """Held-out accuracy in per cent: mean, 95 % interval (Student's t over seeds, never narrower than Wilson's), each seed."""
    if not runs:
        return "- | - | -"
    middle, low, high = accuracy_of(runs)
    each = " ".join(f"{100 * r['test']['accuracy']:.1f}" for r in runs)
    return f"{100 * middle:.1f} | {100 * max(low, 0):.1f} to {100 * min(high, 1):.1f} | {each}"


def sft_then_dpo(study: Study) -> str:
    """DPO on pairs of the model's own completions, from each model of SFT; at one rate and number of steps."""
    before = study.sft([f"sft-{rate}" for rate in RATES])
    more = ("train.steps=30", "train.lr=1e-4", "policy.beta=0.1")
    after = study.run(
        lambda name, s: study.job(
            name, s, "countdown", "dpo", *more, study.model(f"sft-{name.removeprefix('dpo-')}", s)
        ),
        [f"dpo-{rate}" for rate in RATES],
    )
    lines = ["| rate of SFT | after SFT | 95 % | each seed | after DPO | 95 % | each seed |", "|---" * 7 + "|"]
    for rate in RATES:
        both = percent(before[f"sft-{rate}"]), percent(after[f"dpo-{rate}"])
        lines.append(f"| {rate} | {both[0]} | {both[1]} |")
    return "\n".join(lines)


def first_tokens(study: Study) -> str:
    """UPFT from a model of SFT: t first tokens, and once with the EOS after them that needs an instruction."""
    before = study.sft()[f"sft-{MIDDLE}"]
    more = ("train.steps=30", "train.lr=1e-4", "sample.max_tokens=28")

    def make(name: str, seed: int) -> Job:
        own = [f"sample.first={name.split('-')[1]}", f"sample.first_eos={'true' if name.endswith('eos') else 'false'}"]
        return study.job(name, seed, "countdown", "upft", *more, *own, study.model(f"sft-{MIDDLE}", seed))

    names = [*(f"upft-{t}" for t in FIRST), "upft-6-eos"]
    after = study.run(make, names)
    lines = ["| first tokens | held-out % | 95 % | each seed | tokens sampled |", "|---" * 5 + "|"]
    lines.append(f"| before | {percent(before)} | - |")
    for name in names:
        label = name.removeprefix("upft-").replace("-eos", ", then EOS under the plain prompt")
        sampled = f"{mean(r['tokens_sampled'] for r in after[name]):,.0f}" if after[name] else "-"
        lines.append(f"| {label} | {percent(after[name])} | {sampled} |")
    return "\n".join(lines)


def graded_rows(split: str, wrong: int = WRONG) -> list[Row]:
    """80 solved locks of the split, each also with answers of 1, 2, ... ``wrong`` false codes. Column ``score``: the share of
    right codes; ``right``: whether all are."""
    out: list[Row] = []
    for row in make_rows("lock", 80, 0, split, length=5):
        table, key = code_table(row.answer["table_seed"]), "ABCDEFGHIJ".index(row.steps[0])
        for bad in range(wrong + 1):
            steps = list(row.steps)
            for place in range(bad):
                at = 1 + (place + bad) % (len(steps) - 1)
                letter = steps[at][0]
                steps[at] = f"{letter}{(int(table[LETTERS.index(letter), key]) + 1 + place) % 10}"
            extra = {"score": 1 - bad / (len(steps) - 1), "right": bad == 0}
            out.append(replace(row, id=f"{row.id}-{bad}", steps=tuple(steps), extra=extra))
    return out


def labels(study: Study) -> str:
    """The same graded answers to four methods; the lock's recipe and rate, nothing is sampled."""
    places = {name: study.folder / f"{name}.jsonl" for name in ("graded", "solved", "test")}
    study.folder.mkdir(parents=True, exist_ok=True)
    if not all(map(Path.is_file, places.values())):
        rows = graded_rows("train")
        write_rows(rows, places["graded"])
        write_rows([row for row in rows if row.extra["right"]], places["solved"])
        write_rows(make_rows("lock", 500, 0, "test", length=5), places["test"])
    una = (
        "una",
        "graded",
        "sample.completions=0",
        "train.prompts=64",
        f"data.train_rows={80 * (WRONG + 1)}",
        "policy.beta=0.3",
    )
    arms: dict[str, tuple[str, ...]] = {
        "sft, solutions alone": ("sft", "solved"),
        "sft, all answers": ("sft", "graded", "train.prompts=64", f"data.train_rows={80 * (WRONG + 1)}"),
        "una, binary column": (*una, "sample.label=right"),
        "una, score column": (*una, "sample.label=score"),
    }

    def make(name: str, seed: int) -> Job:
        method, rows, *own = arms[name]
        files = (
            "data.task=null",
            f"data.train={places[rows]}",
            f"data.test={places['test']}",
            "model.path=embedded:lock",
        )
        return study.job(
            name.replace(", ", "-").replace(" ", "-"), seed, "lock", method, "train.steps=600", *own, *files
        )

    found = study.run(make, list(arms))
    lines = ["| method | written right, % | 95 % | each seed | solution likelier, % of pairs |", "|---" * 5 + "|"]
    lines.append(f"| base | - | - | - | {100 * ranked('embedded:lock'):.1f} |")
    for name, runs in found.items():
        folders = [make(name, r["seed"]).folder / "model" for r in runs]
        lines.append(f"| {name} | {percent(runs)} | {' '.join(f'{100 * ranked(str(f)):.1f}' for f in folders)} |")
    return "\n".join(lines)


def ranked(path: str) -> float:
    """Share of pairs (solution, answer with false codes) of 80 held-out locks in which the model finds the solution likelier."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from unift.model.folder import locate
    from unift.rows.tokens import encode_row

    torch.set_num_threads(1)
    folder = str(locate(path))
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    found: list[float] = []
    for row in (encode_row(tokenizer, r, 64) for r in graded_rows("test")):
        tokens = torch.tensor([[*row.prompt, *row.solution]])
        with torch.no_grad():
            l_L = model(input_ids=tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
        found.append(float(l_L[len(row.prompt) - 1 :].sum()))
    groups = [found[i : i + WRONG + 1] for i in range(0, len(found), WRONG + 1)]
    return mean(float(g[0] > other) for g in groups for other in g[1:])


def vote(study: Study, samples: int = 16) -> str:
    """`unift eval RUN --samples 16 --vote` of ReFT's runs and of SFT's, whose warm-up and rate they share."""
    runs = study.sft() | study.run(lambda name, s: study.job(name, s, "countdown", "reft", "train.lr=1e-4"), ["reft"])
    kinds = (f"vote@{samples}", f"rerank@{samples}")
    lines = [f"| method | greedy | pass@1 | {' | '.join(kinds)} | pass@{samples} |", "|---" * 6 + "|"]
    for name in (f"sft-{MIDDLE}", "reft"):
        found = [voted(study.folder / f"{name}-seed{r['seed']}", samples) for r in runs[name]]
        cells = [[f[key] for f in found] for key in ("greedy", "pass@1", *kinds, f"pass@{samples}")]
        shown = (f"{100 * mean(c):.1f} ({' '.join(f'{100 * x:.1f}' for x in c)})" for c in cells)
        lines.append(f"| {name.split('-')[0]} | {' | '.join(shown)} |")
    return "\n".join(lines)


def voted(run: Path, samples: int) -> dict[str, float]:
    """Accuracies of a run by name; kept in its folder."""
    path = run / f".vote{samples}.json"
    if not path.is_file():
        from unift import evaluate

        found = evaluate(str(run), samples=samples, vote=True, **{"threads": 1})
        shares = {"greedy": found.greedy.accuracy} | {name: v["accuracy"] for name, v in found.pass_at.items()}
        path.write_text(json.dumps(shares))
    return json.loads(path.read_text())


STUDIES: dict[str, tuple[Callable[[Study], str], str]] = {
    "sft-then-dpo": (sft_then_dpo, "sft-small-lr"),
    "first-tokens": (first_tokens, "upft"),
    "labels": (labels, "una"),
    "vote": (vote, "reft"),
}


def write(name: str, text: str, page: str) -> None:
    """Between the markers of the study in its page; where there are none, the text is only printed."""
    path = PAGES / f"{page}.md"
    if pages.markers(name)[0] in path.read_text(encoding="utf-8"):
        pages.put(path, name, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--finished", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    make, page = STUDIES[args.study]
    text = make(Study(args.folder.absolute(), args.seeds, args.workers, args.finished))
    write(args.study, text, page)
    print(text)


if __name__ == "__main__":
    main()
