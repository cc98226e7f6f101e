"""``unift data``: rows made, looked at and converted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Make, look at and convert rows.")
Limit = Annotated[Optional[int], typer.Option(min=1, help="first so many rows")]
Split = Annotated[str, typer.Option(help="of a data set hf:NAME")]


@app.command("make")
def make(
    task: Annotated[str, typer.Argument(help="chain, countdown, jigsaw, knights or lock")],
    out: Annotated[Path, typer.Argument(help="file to write: .jsonl or .parquet")],
    n: Annotated[int, typer.Option("--n", min=1, help="rows")] = 1000,
    split: Annotated[str, typer.Option(help="train or test; they never overlap")] = "train",
    seed: int = 0,
    option: Annotated[Optional[list[str]], typer.Option(help="generator option, key=value")] = None,
) -> None:
    """Generate problems with step-wise solutions."""
    from unift.config.resolve import parse_overrides
    from unift.rows.inspect import check_writable, write_rows
    from unift.rows.tasks import make_rows

    check_writable(out)
    rows = make_rows(task, n, seed, split, **parse_overrides(option or []))
    write_rows(rows, out)
    typer.echo(f"{len(rows)} rows -> {out}")


@app.command("inspect")
def inspect_rows(path: str, format: str = "auto", split: Split = "train", limit: Limit = None) -> None:
    """Count rows, steps and lengths, and show one row."""
    import json

    from unift.rows.inspect import inspect
    from unift.rows.readers import read_rows

    rows = read_rows(path, format=format, split=split, limit=limit, need_steps=False)
    typer.echo(json.dumps(inspect(rows), indent=1, ensure_ascii=False, default=str))


@app.command("convert")
def convert(source: str, out: Path, format: str = "auto", split: Split = "train", limit: Limit = None) -> None:
    """Read any accepted layout and write unift's (.jsonl or .parquet)."""
    from unift.rows.inspect import check_writable, write_rows
    from unift.rows.readers import read_rows

    check_writable(out)
    rows = read_rows(source, format=format, split=split, limit=limit, need_steps=False)
    write_rows(rows, out)
    typer.echo(f"{len(rows)} rows -> {out}")
