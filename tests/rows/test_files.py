"""Rows are the same whatever file holds them: JSON Lines, JSON lists, CSV, TSV, Parquet, gzipped or not."""

from __future__ import annotations

import csv
import gzip
import io
import json
from datetime import date

import pytest

from unift.rows.inspect import write_rows
from unift.rows.readers import read_rows, rows_of
from unift.rows.tasks import make_rows
from unift.types import DataError

ROWS = [
    {"prompt": 'Say "a, b"\u2028\n', "steps": ["one\n", "two, 2\n"], "ending": "[1] end", "answer": "4", "id": "1"},
    {"prompt": "été\t漢字 [x]", "steps": ["first. "], "ending": "", "answer": "[1, 2]", "id": "2"},
    {"prompt": "p", "steps": ["s"], "ending": ".", "answer": {"letters": "ab", "keys": 2}, "id": "3", "task": "lock"},
]


def table(delimiter):
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ["id", "prompt", "steps", "ending", "answer", "task"], delimiter=delimiter)
    writer.writeheader()
    for row in ROWS:
        cells = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in row.items()}
        writer.writerow(cells)
    return out.getvalue()


TEXTS = {
    "rows.jsonl": "\n".join(map(json.dumps, ROWS)) + "\n",
    "list.jsonl": json.dumps(ROWS),
    "pretty.jsonl": json.dumps(ROWS, indent=2),
    "rows.json": "\ufeff" + json.dumps(ROWS),
    "rows.ndjson": "\r\n".join(map(json.dumps, ROWS)),
    "rows.csv": "\ufeff" + table(","),
    "rows.tsv": table("\t"),
}


def parts(rows):
    return [(r.id, r.prompt, r.steps, r.ending, r.answer, r.task) for r in rows]


EXPECTED = [(r["id"], r["prompt"], tuple(r["steps"]), r["ending"], r["answer"], r.get("task", "")) for r in ROWS]


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", TEXTS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name, packed):
    content = TEXTS[name].encode()
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(content) if packed else content)
    found = parts(read_rows(str(path), format="unift"))
    if name.endswith((".csv", ".tsv")):  # an empty cell is missing: the ending is then written from the answer
        assert found[1][3] == "\n<answer> [1, 2] </answer>"
        found[1] = (*found[1][:3], "", *found[1][4:])
    assert found == EXPECTED


def test_gzip_is_known_by_its_bytes(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(gzip.compress(TEXTS["rows.jsonl"].encode()))
    assert parts(read_rows(str(tmp_path / "rows.jsonl"))) == EXPECTED


def test_a_table_of_plain_texts(tmp_path):
    """As a spreadsheet saves it: a solution in one cell is cut into steps, numbers stay the texts they are."""
    (tmp_path / "rows.csv").write_text('question,prompt,solution,answer\r\n-,2+2=,"Two and two.\nFour.",4\r\n')
    (row,) = read_rows(str(tmp_path / "rows.csv"))
    assert (row.prompt, row.steps, row.answer) == ("2+2=", ("Two and two.\n", "Four."), "4")
    (tmp_path / "chat.csv").write_text('prompt,steps,answer\n"[{""role"": ""user"", ""content"": ""hi""}]",a,1\n')
    (row,) = read_rows(str(tmp_path / "chat.csv"))
    assert row.prompt == ({"role": "user", "content": "hi"},)


def test_parquet_and_json_lines_of_a_task(tmp_path):
    rows = make_rows("lock", 5, 0, "train")
    for name in ("rows.parquet", "rows.jsonl"):
        write_rows(rows, tmp_path / name)
        assert read_rows(str(tmp_path / name)) == rows


def test_of_a_few_first_rows_no_more_is_read(tmp_path):
    """A file may be larger than the memory."""
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"p{n}", "steps": ["s"], "answer": n}) for n in range(5)]
    file.write_text("\n".join([*lines[:3], '{"torn', *lines[3:]]))
    assert [row.prompt for row in read_rows(str(file), limit=3)] == ["p0", "p1", "p2"]
    with pytest.raises(DataError, match="line 4: not valid JSON"):
        read_rows(str(file), limit=4)


def test_a_column_of_any_row_is_written(tmp_path):
    """Also where the first row lacks it."""
    records = [
        {"prompt": "p", "steps": ["s"], "answer": "1"},
        {"prompt": "q", "steps": ["s"], "answer": "1", "worse": "no"},
    ]
    for name in ("rows.jsonl", "rows.parquet"):
        write_rows(rows_of(records), tmp_path / name)
        assert [row.extra.get("worse") for row in read_rows(str(tmp_path / name))] == [None, "no"], name


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("rows.parquet", [{"answer": "4"}, {"answer": 4}], "column 'answer': a Parquet column cannot hold its values .*Write .jsonl"),
        ("rows.parquet", [{"about": {}}, {}], "column 'about': a Parquet column cannot hold its values .*Write .jsonl"),
        ("rows.jsonl", [{}, {"day": date(2026, 1, 1)}], "row 2: JSON cannot hold it .*Write .parquet"),
        ("rows.jsonl", [{"blob": b"x"}, {}], "row 1: JSON cannot hold it .*Write .parquet"),
    ],
)  # fmt: skip
def test_what_a_kind_of_file_cannot_hold_is_said(tmp_path, name, more, said):
    rows = rows_of([{"prompt": f"p{n}", "steps": ["s"]} | own for n, own in enumerate(more)])
    with pytest.raises(DataError, match=said):
        write_rows(rows, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_frame_of_a_parquet_file_is_its_rows(tmp_path):
    """pandas gives arrays where the file has lists, also inside mappings, and NA where a row has nothing."""
    pandas = pytest.importorskip("pandas")
    records = [
        {"prompt": [{"role": "user", "content": "a"}], "steps": ["x", "y"], "answer": {"numbers": [1, 2]}, "n": 1},
        {"prompt": [{"role": "user", "content": "b"}], "steps": None, "answer": {"numbers": [3]}, "n": None},
    ]
    file = tmp_path / "rows.parquet"
    pandas.DataFrame(records).to_parquet(file)
    expected = rows_of(records, need_steps=False)
    assert rows_of(pandas.read_parquet(file), need_steps=False) == expected
    assert rows_of(pandas.read_parquet(file).convert_dtypes(), need_steps=False) == expected
    write_rows(rows_of(pandas.read_parquet(file), need_steps=False), tmp_path / "again.jsonl")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
@pytest.mark.parametrize(
    ("layout", "record"),
    [
        (
            "trl",
            {"prompt": "p", "solution": "42"},
        ),  # TRL's data for a reward alone: the solution is what it compares with
        ("trl", {"prompt": "p", "completion": "one. two.", "solution": "42", "hint": ["x"]}),
        ("unift", {"prompt": [{"role": "user", "content": "q"}], "reward_model": {"ground_truth": "3"}, "answer": "4"}),
        ("reasoning-gym", {"question": "q", "answer": "3", "solution": "one. two.", "metadata": {"k": 1}}),
    ],
)
def test_what_was_written_is_read_as_it_was(tmp_path, name, layout, record):
    """Whatever columns of another layout came along."""
    rows = rows_of([record, record | {"answer": "5"}], format=layout, need_steps=False)
    write_rows(rows, tmp_path / name)
    assert read_rows(str(tmp_path / name), need_steps=False) == rows
