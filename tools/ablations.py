"""The paper's ablations on a small combination lock or on a language model: runs, a table and a figure for docs/ablations.md.

    python tools/ablations.py FOLDER [--recipe lock] [--seeds 3] [--workers 1] [--print]

FOLDER gets what `unift compare --vary` leaves, a folder each command; --print shows the commands instead of running them. A
repeated command runs what is missing; --finished writes the page from the runs that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pages

from unift.commands.compare import Job, run_many, train_job, vary
from unift.commands.compare.table import Result
from unift.config.resolve import parse_overrides, resolve

DOCS = Path(__file__).resolve().parents[1] / "docs"
SMALL = (
    *("data.options.letters=6", "data.options.keys=1", "data.test_rows=300", "sample.max_tokens=12"),
    *("train.steps=100", "train.prompts=16", "reference.kl=0.0", "eval.every=0", "eval.train_rows=0", "save.every=0"),
)


@dataclass(frozen=True)
class Study:
    """One `unift compare --vary`. ``titles``: of the panels, by key."""

    folder: str
    method: str
    titles: Mapping[str, str]
    varied: Sequence[str]
    settings: Sequence[str] = ()
    recipe: str = "lock"


LOCK = (
    Study("rft", "rft", {}, (), SMALL),
    Study(
        "uft",
        "uft",
        {
            "show.cuts": "number of cuts L",
            "show.until": "hinted stretch T_hint",
            "likelihood.weight": "likelihood weight",
            "show.draw": "length law",
            "show.schedule": "hint schedule",
        },
        (
            "show.cuts=1",
            "show.until=0.3,0.9",
            "likelihood.weight=0.001,0.2,0.5",
            "show.draw=two_point",
            "show.schedule=uniform,staircase",
        ),
        (*SMALL, "likelihood.weight=2.0"),
    ),
    Study(
        "no-likelihood",
        "uft",
        {"show.schedule": "hint schedule, no likelihood"},
        ("show.schedule=uniform,staircase",),
        (*SMALL, "likelihood.weight=0.0"),
    ),
    Study(
        "sft-rft",
        "sft-rft",
        {"phases.0.share": "share of SFT in sft-rft"},
        ("phases.0.share=0.1,0.6; phases.1.share=0.9,0.4",),
        SMALL,
    ),
)
SMOLLM2 = (
    Study(
        "uft",
        "uft",
        LOCK[1].titles,
        (
            "show.until=0.3,0.9",
            "likelihood.weight=0.0,0.001,0.5",
            "show.schedule=uniform",  # the staircase is the method stage
            "show.cuts=1",
            "show.draw=two_point",
        ),
        recipe="smollm2",
    ),
    Study("sft-rft", "sft-rft", LOCK[3].titles, LOCK[3].varied, recipe="smollm2"),
)
RECIPES = {
    "lock": (LOCK, "ablations"),
    "smollm2": (SMOLLM2, "ablations-smollm2"),
}  # studies; block of the page and figure


def jobs_of(study: Study, folder: Path, seeds: int) -> list[Job]:
    """The runs of the study's command, seed by seed."""
    arms = vary.arms([study.method], study.varied)
    return [
        train_job(a.method, seed, study.recipe, folder / study.folder, [*study.settings, *a.settings], a.name)
        for seed in range(seeds)
        for a in arms
    ]


def panels_of(study: Study, results: Sequence[Result]) -> dict[str, list[vary.Line]]:
    arms = vary.arms([study.method], study.varied)
    configs = {
        a.name: resolve(a.method, recipe=study.recipe, overrides=parse_overrides([*study.settings, *a.settings]))
        for a in arms
    }
    found = vary.panels(arms, configs, results)
    return {study.titles[key]: lines for key, lines in found.items() if lines[1:]}


def command(study: Study, seeds: int) -> str:
    words = [*(f'--vary "{v}"' for v in study.varied), " ".join(study.settings)]
    head = f"unift compare --recipe {study.recipe} --methods {study.method} --seeds {seeds} --run FOLDER/{study.folder}"
    return " \\\n  ".join(filter(None, [head, *words]))


def finished(jobs: Sequence[Job]) -> list[Result]:
    files = [(job, job.folder / "result.json") for job in jobs]
    return [json.loads(path.read_text()) | {"method": job.method} for job, path in files if path.is_file()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe", choices=RECIPES, default="lock")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--print", action="store_true")
    parser.add_argument("--finished", action="store_true")
    args = parser.parse_args()
    studies, name = RECIPES[args.recipe]
    if args.print:
        print("\n\n".join(command(study, args.seeds) for study in studies))
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    panels: dict[str, list[vary.Line]] = {}
    for study in studies:
        jobs = jobs_of(study, args.folder.absolute(), args.seeds)
        if not args.finished:
            run_many(jobs, args.workers, lambda text: print(text, file=sys.stderr, flush=True))
        panels |= panels_of(study, finished(jobs))
    body = vary.table(panels)
    pages.put(DOCS / "ablations.md", name, body)
    vary.figure(panels, DOCS / f"{name}.png")
    print(body)


if __name__ == "__main__":
    main()
