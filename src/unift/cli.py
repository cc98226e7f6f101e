"""The command line. Heavy imports happen inside the verbs, so that help is quick."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from unift.types import ConfigError, UniftError

if TYPE_CHECKING:
    from unift.config import Config

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Unified Fine-Tuning: train a reasoning model from worked solutions and a way to check answers.",
)
data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Make, look at and convert rows.")
app.add_typer(data_app, name="data")

DEMO = "lock"
Settings = Annotated[Optional[list[str]], typer.Argument(help="settings as key=value, e.g. train.lr=1e-6")]
ConfigFile = Annotated[Optional[Path], typer.Option("--config", "-c", help="YAML file of settings")]
Recipe = Annotated[Optional[str], typer.Option(help="a tuned task of the package (unift show --recipes)")]
Method = Annotated[Optional[str], typer.Option("--method", "-m", help="preset (unift show lists them)")]
RunFolder = Annotated[Optional[Path], typer.Option("--run", help="run folder; an existing one is continued")]


def _is_demo(config: Path | None, recipe: str | None, overrides: dict[str, Any]) -> bool:
    """Without rows and model of one's own, the embedded task and base are used."""
    return config is None and recipe is None and not (overrides.keys() & {"data", "model"})


def _resolve(config: Path | None, recipe: str | None, method: str | None, settings: list[str] | None) -> Config:
    from unift.config import parse_overrides, read_yaml, resolve

    overrides = parse_overrides(settings or [])
    if _is_demo(config, recipe, overrides):
        recipe = DEMO
    file = read_yaml(config) if config else {}
    return resolve(method, recipe=recipe, file=file, overrides=overrides)


def _folder(config: Config, run: Path | None) -> Path:
    from unift.config import config_hash

    if run is not None or config.run:
        return run or Path(str(config.run))
    return Path("runs") / f"{config.method}-{config_hash(config)}"


def _quiet_libraries() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.disable_progress_bar()


@app.command()
def train(
    settings: Settings = None,
    config: ConfigFile = None,
    recipe: Recipe = None,
    method: Method = None,
    run: RunFolder = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show config, batch arithmetic and schedule; train nothing")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="print nothing while training")] = False,
) -> None:
    """Train, or continue the run in an existing folder. Without settings: the embedded demo with its baselines."""
    from unift.config import parse_overrides

    resolved = _resolve(config, recipe, method, settings)
    folder = _folder(resolved, run)
    if dry_run:
        from unift.dry_run import describe

        typer.echo(describe(resolved, folder))
        return
    demo = _is_demo(config, recipe, parse_overrides(settings or [])) and method is None and not quiet
    _quiet_libraries()
    if demo:
        from unift.demo import run_demo

        run_demo(resolved, folder, list(settings or []), DEMO)
        return
    from unift.display import Live, Quiet
    from unift.loop import train as run_training

    with (Quiet() if quiet else Live()) as display:
        result = run_training(resolved, folder, display.update)
    if not quiet:
        typer.echo(_summary(result))
        typer.echo(f"run folder: {folder}")


def _summary(result: dict[str, Any]) -> str:
    lines = []
    for name in ("base", "test", "train"):
        a = result.get(name)
        if a:
            label = {"base": "before, held-out", "test": "after, held-out", "train": "after, training rows"}[name]
            lines.append(f"{label}: {100 * a['accuracy']:.1f} % [{100 * a['low']:.1f}, {100 * a['high']:.1f}] of {a['n']}")
    for name, a in result.get("test", {}).get("pass@k", {}).items():
        lines.append(f"{name}: {100 * a['accuracy']:.1f} % [{100 * a['low']:.1f}, {100 * a['high']:.1f}]")
    return "\n".join(lines)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="run folder, model folder, or embedded:NAME")],
    settings: Settings = None,
    config: ConfigFile = None,
    recipe: Recipe = None,
    split: Annotated[str, typer.Option(help="test or train")] = "test",
    samples: Annotated[int, typer.Option(help="sampled completions a row for pass@k; 0 = greedy only")] = 0,
) -> None:
    """Accuracy without hints, with intervals, on a split. A run folder brings its own settings."""
    from unift.config import parse_overrides, read_yaml, resolve

    _quiet_libraries()
    folder = Path(model)
    stored = folder / "config.yaml"
    if stored.is_file():
        weights = folder / "model"
        if not weights.is_dir():
            raise ConfigError(f"{folder} holds an unfinished run (no model/). Continue it first, or name a checkpoint's model/")
        over = parse_overrides([*(settings or []), f"model.path={weights}", "model.lora=null", "model.gguf=null"])
        resolved = resolve(None, file=read_yaml(stored), overrides=over)
    else:
        resolved = _resolve(config, recipe or (None if config else DEMO), None, [*(settings or []), f"model.path={model}"])
    from unift.evaluate_run import evaluate_split

    typer.echo(evaluate_split(resolved, split, samples))


@app.command()
def compare(
    settings: Settings = None,
    methods: Annotated[str, typer.Option(help="comma-separated presets")] = "sft,rft,sft-rft,r3,stage,uft",
    seeds: Annotated[int, typer.Option(help="seeds 0..N-1")] = 3,
    recipe: Annotated[str, typer.Option(help="a tuned task of the package")] = DEMO,
    run: Annotated[Path, typer.Option("--run", help="folder of all runs")] = Path("runs/compare"),
    workers: Annotated[int, typer.Option(help="runs side by side, one thread each")] = 2,
) -> None:
    """Several methods, several seeds, one task: a table with intervals and a plot. Repeating the command continues."""
    from unift.compare import compare_methods

    typer.echo(compare_methods(methods.split(","), seeds, recipe, run, list(settings or []), workers))


@app.command()
def show(
    name: Annotated[Optional[str], typer.Argument(help="a method; none lists all")] = None,
    recipes: Annotated[bool, typer.Option("--recipes", help="list recipes, or print the recipe of this name")] = False,
) -> None:
    """Print a preset or a recipe."""
    from unift.config import preset_names, preset_text, recipe_names, recipe_text

    if name is None:
        typer.echo("\n".join(recipe_names() if recipes else preset_names()))
    else:
        typer.echo((recipe_text if recipes else preset_text)(name).rstrip())


@app.command()
def doctor(
    settings: Settings = None,
    config: ConfigFile = None,
    recipe: Recipe = None,
    method: Method = None,
    speed: Annotated[bool, typer.Option("--speed", help="measure the machine and recommend settings instead")] = False,
) -> None:
    """Check environment, rows, reward and tokenizer before time is spent. Exit code 1 if something fails."""
    _quiet_libraries()
    resolved = _resolve(config, recipe, method, settings)
    if speed:
        from unift.speed import checks as measure

        checks = measure(resolved)
    else:
        from unift.doctor import diagnose

        checks = diagnose(resolved)
    for check in checks:
        typer.echo(f"{'ok  ' if check.ok else 'FAIL'} {check.name}: {check.text}")
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


@data_app.command("make")
def data_make(
    task: Annotated[str, typer.Argument(help="countdown, knights or lock")],
    out: Annotated[Path, typer.Argument(help="file to write: .jsonl or .parquet")],
    n: Annotated[int, typer.Option("--n", help="rows")] = 1000,
    split: Annotated[str, typer.Option(help="train or test; they never overlap")] = "train",
    seed: int = 0,
    option: Annotated[Optional[list[str]], typer.Option(help="generator option, key=value")] = None,
) -> None:
    """Generate problems with step-wise solutions."""
    from unift.config import parse_overrides
    from unift.data import write_rows
    from unift.tasks import make_rows

    rows = make_rows(task, n, seed, split, **parse_overrides(option or []))
    write_rows(rows, out)
    typer.echo(f"{len(rows)} rows -> {out}")


@data_app.command("inspect")
def data_inspect(path: str, format: str = "auto", limit: Optional[int] = None) -> None:
    """Count rows, steps and lengths, and show one row."""
    import json

    from unift.data import inspect, read_rows

    typer.echo(json.dumps(inspect(read_rows(path, format=format, limit=limit)), indent=1, ensure_ascii=False, default=str))


@data_app.command("convert")
def data_convert(source: str, out: Path, format: str = "auto", limit: Optional[int] = None) -> None:
    """Read any accepted layout and write unift's (.jsonl or .parquet)."""
    from unift.data import read_rows, write_rows

    rows = read_rows(source, format=format, limit=limit)
    write_rows(rows, out)
    typer.echo(f"{len(rows)} rows -> {out}")


def main() -> None:
    """Entry point: errors a person can mend are printed alone, without a traceback. Exit code 2."""
    try:
        app()
    except UniftError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
