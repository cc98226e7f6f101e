"""Rows from files and the Hub, in four layouts. Errors name file, row (from 1) and column.

unift          prompt [, steps, answer, ending | solution | completion] [, id, task, any other column]
UFT / verl     prompt (chat list), hint (list), answer (whole target text), reward_model.ground_truth, data_source
TRL            prompt, completion (text or messages) [, answer | solution]
reasoning-gym  question, answer, metadata [, solution]

A row may lack its answer: only built-in verifiers need one (`rows.tasks.format.check_answers`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import NoneType
from typing import Any, TypeGuard, cast

from unift.config import hub
from unift.rows import pictures
from unift.rows.files import records, streamed, streams
from unift.rows.ids import told_apart
from unift.rows.tasks.base import content_id, is_list_or_tuple, is_mapping
from unift.rows.tasks.format import all_marked, ending_of, with_own_ending
from unift.types import DataError, Row

# data_source of the UFT release -> built-in task; every source whose name holds "math" is mathematics, too
_MATH = ("math", "aime", "amc", "openai/gsm8k", "gsm8k", "minerva", "olympiad_bench", "cais/hle", "hiyouga/geometry3k")
_PUZZLES = {"kk_logic": "knights"} | {name: name for name in ("chain", "countdown", "jigsaw", "knights", "lock")}
WRITTEN = {
    "id",
    "prompt",
    "steps",
    "ending",
    "answer",
    "task",
}  # every row that `rows.inspect.write_rows` wrote has them
TASK_OF = _PUZZLES | dict.fromkeys(_MATH, "math")


def read_rows(
    path: str, *, format: str = "auto", split: str | None = None, limit: int | None = None, need_steps: bool = True
) -> list[Row]:
    """Rows of a file, or of ``hf:owner/name`` (the datasets library and a network are then needed) or ``hf:FOLDER``, a
    folder of data files or one that datasets saved. split: of a Hub data set, "train" by default.

    need_steps: refuse rows without a worked solution. Raises DataError.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit}: expected 1 row or more")
    found = _hub(path[3:], split or "train") if path.startswith("hf:") else _first(path, limit)
    return rows_of(found, path, format=format, limit=limit, need_steps=need_steps)


def _first(path: str, limit: int | None) -> list[Any]:
    """Records of a file. Of one that can be read row by row no more than are wanted, however large it is."""
    file = Path(path).expanduser()
    if limit is None or not file.is_file() or not file.stat().st_size or not streams(file):
        return records(path)
    return list(islice(streamed(path), limit))


def rows_of(
    source: Any, name: str = "rows", *, format: str = "auto", limit: int | None = None, need_steps: bool = True
) -> list[Row]:
    """Rows of an iterable of mappings (or of Rows), of a ``datasets.Dataset`` or of a pandas frame; ``name`` is what messages
    call it. Raises DataError."""
    if hasattr(source, "to_list"):  # datasets
        source = pictures.packed_columns(source).to_list()
    elif hasattr(source, "to_dict") and hasattr(source, "columns"):  # pandas
        source = [{name: _of_frame(value) for name, value in record.items()} for record in source.to_dict("records")]
    if isinstance(source, (str, bytes)) or is_mapping(source) or not isinstance(source, Iterable):
        splits = f" of {', '.join(map(repr, source))}: hand over one of them" if is_mapping(source) else ""
        raise DataError(f"{name}: expected a list of mappings, found {type(source).__name__}{splits}")
    records = list(cast("Iterable[Any]", source))[:limit]
    if not records:
        raise DataError(f"{name} holds no rows")
    if all(isinstance(record, Row) for record in records):
        for number, row in enumerate(records, start=1):
            _check_text(row, f"{name}, row {number}")
            check_steps(row, f"{name}, row {number}", need_steps)
        return told_apart(records, name)
    found = [
        (check_steps(row, f"{name}, row {number}", need_steps), written)
        for number, (row, written) in enumerate(read_records(records, name, format), start=1)
    ]
    return told_apart(list(ended(found, all_marked(with_written_ending(found), name))), name)


def _of_frame(value: Any) -> Any:
    """A cell as plain data: NaN (or NA, NaT) where a row has nothing, arrays where a Parquet file has lists."""
    if isinstance(value, float) and value != value or type(value).__name__ in ("NAType", "NaTType"):
        return None
    return _plain(value)


def _plain(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    if is_mapping(value):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if is_list_or_tuple(value) else value


def read_records(records: Iterable[Any], name: str, format: str) -> Iterator[tuple[Row, bool]]:
    """(row, was its ending written for it?) of records of one layout, one by one."""
    layout = ""
    for number, record in enumerate(records, start=1):
        layout = layout or layout_of(record, name, format)
        yield read_record(record, name, number, layout)


def layout_of(first: Any, name: str, format: str) -> str:
    """``format``, or where it is auto, what the first record says. DataError where that is no layout."""
    layout = detect(first, name) if format == "auto" else format
    if layout not in _READERS:
        raise DataError(f"data.format={format!r} is unknown; expected auto, {', '.join(_READERS)}")
    return layout


def read_record(record: Any, name: str, number: int, layout: str) -> tuple[Row, bool]:
    """(row, was its ending written for it?) of the record of row ``number`` (from 1). Raises DataError."""
    where = f"{name}, row {number}"
    if not is_mapping(record):
        raise DataError(f"{where}: expected a mapping of columns, found {type(record).__name__}")
    row = _READERS[layout](pictures.normalised(record, where, name), where)
    _check_text(row, where)
    return row, layout in ("unift", "reasoning-gym") and record.get("ending") is None and bool(row.ending)


def with_written_ending(found: Iterable[tuple[Row, bool]]) -> Iterator[tuple[int, Row]]:
    """(number from 1, row) of the rows whose ending was written for them."""
    return ((number, row) for number, (row, written) in enumerate(found, start=1) if written)


def ended(found: Iterable[tuple[Row, bool]], marked: bool) -> Iterator[Row]:
    """The rows; with the mark of their own solutions as the ending that was written for them, where all are ``marked``."""
    return (with_own_ending(row) if written and marked else row for row, written in found)


def check_steps(row: Row, where: str, need_steps: bool) -> Row:
    """The row; DataError if it has no worked solution and one is needed."""
    if need_steps and not row.steps:
        raise DataError(
            f"{where}, column 'steps': no worked solution, which this method learns from. Give the row one, or set "
            "data.solved=some: such rows are then trained by their reward alone, and left out where there is none"
        )
    return row


def _hub(name: str, split: str) -> list[Any]:
    try:
        import datasets  # pyright: ignore[reportMissingTypeStubs]

        name = str(Path(name).expanduser()) if name.startswith("~") else name
        saved = [f for f in ("dataset_dict.json", "state.json") if (Path(name) / f).is_file()]
        library = cast(Any, datasets)
        with hub.allowed():
            found = library.load_from_disk(name) if saved else library.load_dataset(name, split=split)
        return pictures.packed_columns(found[split] if isinstance(found, library.DatasetDict) else found).to_list()
    except Exception as error:  # the library raises many kinds; all mean that the rows could not be had
        raise DataError(f"hf:{name} (split {split!r}) could not be loaded: {type(error).__name__}: {error}") from error


def detect(record: Any, path: str) -> str:
    """Layout of a file from the columns of its first row."""
    if not is_mapping(record):
        raise DataError(f"{path}, row 1: expected a mapping of columns, found {type(record).__name__} {record!r:.80}")
    columns = set(record)
    if columns >= WRITTEN:
        return "unift"
    if {"prompt", "hint"} <= columns or {"prompt", "reward_model"} <= columns:
        return "verl"
    if "prompt" in columns and columns & {"steps", "ending"}:
        return "unift"
    if "prompt" in columns and "completion" in columns:
        return "trl"
    if {"question", "metadata"} <= columns:
        return "reasoning-gym"
    if "prompt" in columns:
        return "unift"
    raise DataError(
        f"{path}, row 1, column 'prompt': missing. Found columns {sorted(columns)}; expected prompt, steps, answer, or "
        "the layout of UFT/verl, TRL or reasoning-gym"
    )


def split_steps(solution: str) -> tuple[str, ...]:
    """A solution in one text -> steps: at line ends, else at sentence ends. Joined they give back the exact text."""
    parts = re.findall(r"[^\n]*\n+|[^\n]+$", solution)
    if len(parts) <= 1:
        parts = re.findall(r".+?(?:[.!?]\s+|$)", solution, flags=re.DOTALL)
    return tuple(p for p in parts if p)


def _prompt(value: Any, where: str) -> str | tuple[Mapping[str, str], ...]:
    if isinstance(value, str) and value.strip():
        return value
    if is_list_or_tuple(value) and value and all(_is_message(m) for m in value):
        return tuple(dict(m) for m in value)
    found = "nothing" if value is None else f"{value!r:.80}"
    raise DataError(
        f"{where}, column 'prompt': expected a text or a list of messages {{role, content}} with text in them, found {found}"
    )


def _is_message(value: Any) -> bool:
    return is_mapping(value) and isinstance(value.get("content"), str)


def _are_texts(value: object) -> TypeGuard[Sequence[str]]:
    if type(value) is list:  # as JSON has it
        return set(map(type, cast("list[Any]", value))) <= {str}
    return isinstance(value, Sequence) and all(isinstance(s, str) for s in cast("Sequence[Any]", value))


def _steps(value: Any, where: str, column: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return split_steps(value)
    if not _are_texts(value):
        raise DataError(f"{where}, column {column!r}: expected a list of texts, found {value!r:.80}")
    if not value or not "".join(value).strip():
        raise DataError(f"{where}, column {column!r}: the solution is empty")
    return tuple(value)


def _text(value: Any, where: str) -> str:
    """A completion given as text, or the assistant's content of a message list."""
    if value is None or isinstance(value, str):
        return value or ""
    if is_list_or_tuple(value) and all(_is_message(m) for m in value):
        return "".join(m["content"] for m in value)
    raise DataError(f"{where}, column 'completion': expected a text or a list of messages, found {value!r:.80}")


def _string(value: Any, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}, column {column!r}: expected a text, found {type(value).__name__} {value!r:.80}")
    return value


def _check_text(row: Row, where: str) -> None:
    """JSON can spell half a surrogate pair, which no tokenizer takes and no file in UTF-8 holds."""
    if isinstance(row.prompt, str):  # the usual row has few texts, which need not be looked for
        flat = [row.prompt, row.ending, row.id, row.task, row.answer, *row.steps, *row.extra, *row.extra.values()]
        if all(map(_has_no_texts, flat)) and _is_text("".join([v for v in flat if isinstance(v, str)])):
            return
    columns = {"prompt": row.prompt, "steps": row.solution, "id": row.id, "answer": row.answer, "task": row.task}
    for column, value in {**columns, **row.extra}.items():
        for text in _texts([column, value]):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{where}, column {column!r}: {text[error.start]!r} is no character (half a pair)"
                ) from None


def _has_no_texts(value: Any) -> bool:
    """Is it a text itself, or nothing that could hold one?"""
    return type(value) in (str, int, float, bool, NoneType)


def _is_text(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _texts(value: Any) -> list[str]:
    """Every text inside a value of plain data, names of columns included."""
    found: list[str] = []
    todo: list[Any] = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, str):
            found.append(item)
        elif is_mapping(item):
            todo += [*item.keys(), *item.values()]
        elif is_list_or_tuple(item):
            todo += item
    return found


def _build(
    prompt: Any, steps: tuple[str, ...], ending: str, answer: Any, record: Mapping[str, Any], used: Iterable[str]
) -> Row:
    source = str(record.get("task") or record.get("data_source") or "")
    task = TASK_OF.get(source) or ("math" if "math" in source.lower() else source)
    images = pictures.of_record(record)
    apart = {*used, "id", "task", *(["images"] if images else [])}
    extra = {k: v for k, v in record.items() if k not in apart}
    content = prompt if isinstance(prompt, str) else [dict(m) for m in prompt]
    shown = [content, *(found.digest for found in images)] if images else content
    own = _own_id(record) or content_id(shown, steps, ending, answer)
    return Row(own, prompt, steps, ending, answer, task, extra, images)


def _own_id(record: Mapping[str, Any]) -> str:
    """The id that the data gives (0 is one), or an empty text."""
    return "" if record.get("id") is None else str(record["id"])


def _unift(record: Mapping[str, Any], where: str) -> Row:
    """``ending`` is what follows the steps; without one it is written from the answer in answer tags (but see
    `tasks.format.all_marked`)."""
    answer, column = record.get("answer"), "steps" if record.get("steps") is not None else "solution"
    if column == "solution" and record.keys() >= WRITTEN:  # which has none; another layout's column stays one
        column = "steps"
    steps = _steps(record.get(column) or (record.get("completion") if column == "solution" else None), where, column)
    if column == "steps" and record.get("steps") is not None and not record["steps"]:
        raise DataError(f"{where}, column 'steps': the solution is empty")
    ending = record.get("ending")
    if ending is None:
        ending = ending_of(answer) if steps and isinstance(answer, (str, int, float)) else ""
    ending = _string(ending, where, "ending")
    return _build(
        _prompt(record.get("prompt"), where),
        steps,
        ending,
        answer,
        record,
        ("prompt", "steps", "ending", "answer", column),
    )


def _verl(record: Mapping[str, Any], where: str) -> Row:
    """The UFT release: the content of a single user message is the whole prompt text (no template). With pictures, as verl
    writes them, it stays a message."""
    prompt = _prompt(record.get("prompt"), where)
    if not isinstance(prompt, str) and len(prompt) == 1 and not pictures.of_record(record):
        prompt = prompt[0]["content"]
    hint = record.get("hint")
    if is_list_or_tuple(hint) and all(text == "" for text in hint):
        hint = None  # the release's evaluation file: problems without a worked solution
    steps, target = _steps(hint, where, "hint"), _string(record.get("answer") or "", where, "answer")
    judge = record.get("reward_model")
    if judge is not None and not is_mapping(judge):
        raise DataError(
            f"{where}, column 'reward_model.ground_truth': missing, since 'reward_model' is no mapping; found {judge!r:.80}"
        )
    truth = judge.get("ground_truth") if judge is not None else None
    shown = "".join(steps)
    if not target.startswith(shown):
        raise DataError(
            f"{where}, column 'answer': does not begin with the joined hint chunks, so hints are no prefix of it"
        )
    ending = target[len(shown) :]
    return _build(prompt, steps, ending, truth, record, ("prompt", "hint", "answer", "reward_model", "question"))


def _trl(record: Mapping[str, Any], where: str) -> Row:
    answer = record.get("answer", record.get("solution"))
    steps = _steps(_text(record.get("completion"), where), where, "completion")
    return _build(_prompt(record.get("prompt"), where), steps, "", answer, record, ("prompt", "completion", "answer"))


def _gym(record: Mapping[str, Any], where: str) -> Row:
    answer, steps = record.get("answer"), _steps(record.get("solution"), where, "solution")
    ending = ending_of(answer) if steps and answer is not None else ""
    return _build(_prompt(record.get("question"), where), steps, ending, answer, record, ("question", "answer"))


_READERS = {"unift": _unift, "verl": _verl, "trl": _trl, "reasoning-gym": _gym}
