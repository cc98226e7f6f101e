"""Rows on disk are the rows in memory: same rows, ids, fingerprint, errors; and a run on them is the same run."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import pytest

from unift.rows import crew, large, store
from unift.rows.dataset import Dataset
from unift.rows.inspect import overlap
from unift.rows.large import open_rows
from unift.rows.readers import read_rows
from unift.rows.tasks import make_rows
from unift.types import DataError

PLAIN = [
    {"prompt": f"How much is {n} + 1?", "steps": [f"{n} + 1 ", f"is {n + 1}. "], "answer": n + 1, "level": n % 3}
    for n in range(300)
]


@pytest.fixture(autouse=True)
def on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every file is a large one here, and the cache is the test's own."""
    monkeypatch.setattr(store, "LARGE", 0)
    monkeypatch.setenv("UNIFT_CACHE", str(tmp_path / "cache"))


def write(path: Path, records: list, zipped: bool = False) -> Path:
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(content) if zipped else content)
    return path


def parquet(path: Path, records: list) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(records), path)
    return path


def test_rows_on_disk_are_the_rows_in_memory(tmp_path: Path) -> None:
    boxed = [
        {"prompt": f"Find {n}.", "steps": ["So. ", f"It is $\\boxed{{{n}}}$."], "answer": str(n), "task": "math"}
        for n in range(90)
    ]
    twice = [*PLAIN, PLAIN[3], PLAIN[250], PLAIN[3]]
    odd = [{"prompt": "é \U0001f600 \x85 x", "answer": float("nan"), "steps": ["a"], "id": 0}, *PLAIN]
    files = [
        write(tmp_path / "plain.jsonl", PLAIN),
        write(tmp_path / "zipped.jsonl.gz", PLAIN, zipped=True),
        write(tmp_path / "twice.jsonl", twice),
        write(tmp_path / "boxed.jsonl", boxed),
        write(tmp_path / "odd.jsonl", odd),
        parquet(tmp_path / "plain.parquet", PLAIN),
    ]
    (tmp_path / "list.jsonl").write_text(json.dumps(PLAIN, indent=1))
    for file in (*files, tmp_path / "list.jsonl"):
        for limit in (None, 70):
            here, there = read_rows(str(file), limit=limit), open_rows(str(file), limit=limit)
            assert isinstance(there, store.StoredRows), file
            assert repr(list(there)) == repr(here), file
            assert Dataset(there, []).fingerprint == Dataset(here, []).fingerprint
            assert repr(there[-1]) == repr(here[-1]) and repr(list(there[5:9])) == repr(here[5:9])
            with pytest.raises(IndexError):
                there[len(here)]


def test_a_saved_data_set_is_read_from_its_folder(tmp_path: Path) -> None:
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list(PLAIN)}).save_to_disk(str(tmp_path / "saved"))
    there = open_rows(f"hf:{tmp_path / 'saved'}")
    assert isinstance(there, store.StoredRows) and list(there) == read_rows(f"hf:{tmp_path / 'saved'}")


@pytest.mark.parametrize(
    "records",
    [
        [*PLAIN, {"prompt": "x", "steps": "no list"[0:0] or ["a", 3], "answer": 1}],
        [*PLAIN, {"prompt": "", "steps": ["a"], "answer": 1}],
        [*PLAIN, {"prompt": "x", "answer": 1}],
        [*PLAIN, ["no mapping"]],
        [
            {"prompt": "a", "steps": ["x"], "answer": 1, "id": "q"},
            {"prompt": "b", "steps": ["x"], "answer": 1, "id": "q"},
        ],
        [{"prompt": "\ud800", "steps": ["x"], "answer": 1}],
    ],
)
def test_errors_are_those_of_rows_in_memory(tmp_path: Path, records: list) -> None:
    file = str(write(tmp_path / "rows.jsonl", records))
    with pytest.raises(DataError) as here:
        read_rows(file)
    with pytest.raises(DataError) as there:
        open_rows(file)
    assert str(there.value) == str(here.value)


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", PLAIN)
    file.write_bytes(file.read_bytes() + b'{"prompt": \n')
    with pytest.raises(DataError, match=r"rows.jsonl, line 301: not valid JSON"):
        open_rows(str(file))


def test_a_second_start_reads_the_cache_and_a_changed_file_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "rows.jsonl", PLAIN)
    first = list(open_rows(str(file)))
    made: list[int] = []
    build = store._build
    monkeypatch.setattr(store, "_build", lambda *a: made.append(1) or build(*a))
    assert list(open_rows(str(file))) == first and not made
    write(file, PLAIN[:-1])
    assert len(open_rows(str(file))) == 299 and made == [1]
    with pytest.raises(DataError, match="row 2"):
        open_rows(str(write(file, [PLAIN[0], {"prompt": "b", "answer": 3}])))
    assert not [p for p in store.cache().iterdir() if p.name.startswith(".")]  # nothing half written stays


def test_what_json_cannot_hold_is_read_into_memory(tmp_path: Path) -> None:
    from datetime import date

    file = parquet(tmp_path / "dates.parquet", [record | {"day": date(2026, 1, 1)} for record in PLAIN])
    rows = open_rows(str(file))
    assert isinstance(rows, list) and rows == read_rows(str(file))
    assert not list(store.cache().iterdir())


def test_held_out_problems_among_rows_on_disk_are_found(tmp_path: Path) -> None:
    from unift.rows.inspect import write_rows

    rows = make_rows("countdown", 40, 0, "train")
    write_rows(rows, tmp_path / "rows.jsonl")
    train = open_rows(str(tmp_path / "rows.jsonl"))
    test = [*make_rows("countdown", 5, 0, "test"), rows[7], rows[3]]
    assert overlap(train, test) == overlap(list(train), test) == [rows[7].id, rows[3].id]


# ---------------------------------------------------------------------------------------------- helpers


def parts(file: Path, helpers: int) -> list[store.Part]:
    from unift.rows.files import numbered_lines

    reading = crew.Reading(str(file), "unift", False)
    return list(crew.mapped(crew.chunks(numbered_lines(file, str(file)), reading), helpers))


def test_helpers_make_what_one_process_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same order, whatever they start with; and where they end at once, this process does it all."""
    monkeypatch.setattr(crew, "CHUNK", 2000)
    file = write(tmp_path / "rows.jsonl", [*PLAIN, {"prompt": "é \U0001f600", "answer": float("nan"), "steps": ["a"]}])
    alone = parts(file, 1)
    assert len(alone) > 10 and sum(len(part.texts) for part in alone) == 301
    assert repr(parts(file, 3)) == repr(alone)
    monkeypatch.setattr(crew, "_START", "raise SystemExit(3)")
    assert repr(parts(file, 2)) == repr(alone)


@pytest.mark.parametrize("start", [crew._START, "import os; os.kill(os.getpid(), 9)"])
def test_the_first_bad_row_is_named_whoever_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    monkeypatch.setattr(crew, "CHUNK", 2000)
    monkeypatch.setattr(crew, "_START", start)
    records = [*PLAIN[:150], {"prompt": "", "answer": 1}, *PLAIN[150:], {"prompt": 3}]
    file = write(tmp_path / "rows.jsonl", records)
    file.write_bytes(file.read_bytes() + b'{"prompt": \n')
    with pytest.raises(DataError, match=r"rows.jsonl, row 151, column 'prompt'"):
        parts(file, 2)


def test_a_file_read_by_helpers_is_stored_as_by_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "rows.jsonl", [*PLAIN, PLAIN[7]])
    alone = open_rows(str(file))
    monkeypatch.setattr(large, "PER_HELPER", 1)
    monkeypatch.setattr(crew, "CHUNK", 2000)
    monkeypatch.setattr(crew, "cores", lambda: 3)
    monkeypatch.setenv("UNIFT_CACHE", str(tmp_path / "other"))
    started: list[int] = []
    begin = crew._Helper.__init__
    monkeypatch.setattr(crew._Helper, "__init__", lambda self: started.append(1) or begin(self))
    by_helpers = open_rows(str(file))
    assert isinstance(alone, store.StoredRows) and isinstance(by_helpers, store.StoredRows)
    assert by_helpers.facts == alone.facts and list(by_helpers) == list(alone) and len(started) == 3


# ---------------------------------------------------------------------------------------------- what may go wrong


@pytest.mark.parametrize("name", ["rows.arrow", "facts.json", "problems.npy", "solved.npy"])
@pytest.mark.parametrize("torn", [False, True], ids=["gone", "torn"])
def test_a_damaged_cache_is_made_anew(tmp_path: Path, name: str, torn: bool) -> None:
    file = write(tmp_path / "rows.jsonl", [*PLAIN, {"prompt": "x", "answer": 1}])
    rows = list(open_rows(str(file), need_steps=False))
    (folder,) = store.cache().iterdir()
    whole = (folder / name).read_bytes()
    (folder / name).unlink()
    if torn:
        (folder / name).write_bytes(whole[: len(whole) // 2])
    again = open_rows(str(file), need_steps=False)
    assert isinstance(again, store.StoredRows) and list(again) == rows and list(again.solved) == list(range(300))
    assert (folder / name).read_bytes() == whole


def test_a_folder_that_another_process_made_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be open there."""
    file, build, other = write(tmp_path / "rows.jsonl", PLAIN), store._build, []

    def slow(*a: object) -> bool:
        done = build(*a)
        if not other:
            other.append(1)
            open_rows(str(file))
            (folder,) = (f for f in store.cache().iterdir() if not f.name.startswith("."))
            other.append(folder.stat().st_ino)
        return done

    monkeypatch.setattr(store, "_build", slow)
    rows = open_rows(str(file))
    (folder,) = store.cache().iterdir()
    assert folder.stat().st_ino == other[1] and list(rows) == read_rows(str(file))


def test_copies_are_told_apart_in_linear_time(tmp_path: Path) -> None:
    """The time of the rows, of which half are copies, and not of the square of their number: it was 12 s for 16,000."""
    file = write(
        tmp_path / "rows.jsonl", [{"prompt": f"p{n % 4000}", "steps": ["s"], "answer": 1} for n in range(8000)]
    )
    began = time.process_time()
    rows = open_rows(str(file))
    assert isinstance(rows, store.StoredRows) and len(rows.facts.renamed) == 4000
    with_copies = time.process_time() - began
    write(file, [{"prompt": f"p{n}", "steps": ["s"], "answer": 1} for n in range(8000)])
    began = time.process_time()
    open_rows(str(file))
    assert with_copies < 5 * (time.process_time() - began)


def test_pictures_of_a_later_row_are_those_of_their_own_folder(tmp_path: Path) -> None:
    """Two equal files beside different pictures of one name, where the first row has none."""
    image = pytest.importorskip("PIL.Image")
    records = [*PLAIN[:3], {"prompt": "<image>?", "steps": ["a"], "answer": 1, "image": "x.png"}]
    found = []
    for colour in ("red", "blue"):
        folder = tmp_path / colour
        folder.mkdir()
        image.new("RGB", (2, 2), colour).save(folder / "x.png")
        found.append(open_rows(str(write(folder / "rows.jsonl", records)))[3].images[0])
    assert found[0].digest != found[1].digest and [Path(p.path).parent.name for p in found] == ["red", "blue"]
