"""Rows: layouts, round trips, and errors that name file, row and column."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from conftest import FakeTokenizer, settings

from unift.config.surroundings import WeightedReward
from unift.rows.inspect import inspect, overlap, write_rows
from unift.rows.readers import read_rows, rows_of, split_steps
from unift.rows.tasks import get_task, make_rows
from unift.rows.tasks.format import answer_rule, check_answers, contradictions
from unift.rows.tokens import check_tokenizer, encode_row
from unift.types import DataError, Row

GOOD = {"prompt": "2+2=", "steps": ["4\n"], "ending": "<answer>4</answer>", "answer": "4"}


def write(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


@pytest.mark.parametrize(("name", "task", "n"), [("countdown", "countdown", 10_240), ("logic", "knights", 4_500)])
def test_released_files(data_folder, name, task, n):
    """They load as they are, and every demonstration earns full reward."""
    rows = read_rows(str(data_folder / name / "train.parquet"))
    assert len(rows) == n and {r.task for r in rows} == {task}
    assert all(get_task(task).score(r.solution, r).right for r in rows)


def test_released_math(data_folder):
    rows = read_rows(str(data_folder / "math" / "rows.parquet"))
    assert len(rows) == 512 and {r.task for r in rows} == {"math"}
    assert all(get_task("math").score(r.solution, r).right for r in rows[:100])
    assert contradictions(rows) == []


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("task", ["countdown", "jigsaw", "knights", "lock"])
def test_round_trip(tmp_path, suffix, task):
    rows = make_rows(task, 20, 0, "train")
    write_rows(rows, tmp_path / f"rows{suffix}")
    again = read_rows(str(tmp_path / f"rows{suffix}"))
    for a, b in zip(rows, again, strict=True):
        assert (a.id, a.prompt, a.steps, a.ending, a.answer, a.task) == (
            b.id,
            b.prompt,
            b.steps,
            b.ending,
            b.answer,
            b.task,
        )
        assert get_task(task).score(b.solution, b).right
        assert get_task(task).canonical(a) == get_task(task).canonical(b) and a.images == b.images


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("more", [{}, {"answer": "4"}, {"color": "red"}])
def test_round_trip_without_a_solution(tmp_path, suffix, more):
    rows = rows_of([{"prompt": "p"} | more, {"prompt": "q"} | more], need_steps=False)
    write_rows(rows, tmp_path / f"rows{suffix}")
    assert read_rows(str(tmp_path / f"rows{suffix}"), need_steps=False) == rows


def test_other_layouts(tmp_path):
    said = {"role": "assistant", "content": "a.\nb"}
    trl = {"prompt": [{"role": "user", "content": "2+2?"}], "completion": [said], "answer": "4"}
    (row,) = read_rows(write(tmp_path / "t.jsonl", trl))
    assert row.steps == ("a.\n", "b") and row.prompt[0]["content"] == "2+2?"
    (row,) = read_rows(write(tmp_path / "g.jsonl", {"question": "q", "answer": "7", "metadata": {}}), need_steps=False)
    assert (row.prompt, row.answer, row.steps) == ("q", "7", ())
    (row,) = read_rows(write(tmp_path / "s.jsonl", {"prompt": "p", "solution": "One. Two.", "answer": "2"}))
    assert row.steps == ("One. ", "Two.") and row.ending == "\n<answer> 2 </answer>"


@pytest.mark.parametrize("saved", [False, True], ids=["files", "save_to_disk"])
def test_hub_folders(tmp_path, monkeypatch, saved):
    """A data set of the Hub as a folder, offline: data files with split names, or what datasets saved itself."""
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    parts = {"train": datasets.Dataset.from_list([GOOD | {"prompt": f"{i}+2="} for i in range(5)])}
    parts["test"] = datasets.Dataset.from_list([GOOD | {"prompt": "9+9="}])
    folder = tmp_path / "set"
    if saved:
        datasets.DatasetDict(parts).save_to_disk(folder)
    else:
        for name, part in parts.items():
            part.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    assert [r.prompt for r in read_rows(f"hf:{folder}")] == [f"{i}+2=" for i in range(5)]
    assert [r.prompt for r in read_rows(f"hf:{folder}", split="test")] == ["9+9="]
    with pytest.raises(DataError, match=r"split 'none'\) could not be loaded"):
        read_rows(f"hf:{folder}", split="none")
    from unift.config.resolve import parse_overrides, resolve
    from unift.rows.dataset import load

    data = load(
        resolve(
            "rft",
            overrides=parse_overrides(
                [
                    "model.path=embedded:lock",
                    "reward.function=math",
                    f"data.train=hf:{folder}",
                    f"data.test=hf:{folder}",
                ]
            ),
        )
    )
    assert (len(data.train), [r.prompt for r in data.test]) == (5, ["9+9="])


def test_rows_from_the_hub_are_not_asked_for_offline(monkeypatch):
    """The command line forbids the hub, but for rows that shall come from it."""
    import os

    from unift.commands.settings import quiet_libraries
    from unift.config.sections import Config, Data

    for data, offline in ((("rows.jsonl", None), "1"), (("hf:owner/name", None), None), ((None, "hf:x"), None)):
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        quiet_libraries(Config(data=Data(train=data[0], test=data[1])))
        assert os.environ.get("HF_HUB_OFFLINE") == offline
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_inspect_is_short(data_folder):
    """Dozens of lengths become three numbers."""
    from unift.rows.inspect import inspect

    shown = inspect(read_rows(str(data_folder / "logic" / "train.parquet"), limit=300))
    assert len(shown["steps per row (min, median, max)"]) == 3
    assert inspect(make_rows("lock", 5, 0, "train"))["steps per row"] == {5: 5}
    lacking = [{"prompt": "a"}, {"prompt": "b", "answer": "1"}, {"prompt": "c", "steps": ["2"], "answer": 0}]
    found = inspect(rows_of(lacking, need_steps=False))
    assert (found["without answer"], found["without solution"]) == (1, 2)  # 0 is an answer


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "p", "color": "red"},
        {"prompt": "p", "steps": ["a"]},
        {"prompt": [{"role": "user", "content": "p"}], "reward_model": {"style": "model"}, "data_source": "x"},
        {"prompt": "p", "completion": "c"},
        {"question": "q", "metadata": {}, "solution": "s"},
    ],
)
def test_rows_may_lack_an_answer(tmp_path, record):
    """In every layout; nothing is written for it into the solution. A built-in verifier refuses such rows by number."""
    rows = read_rows(write(tmp_path / "rows.jsonl", GOOD if "steps" in record else record, record), need_steps=False)
    assert rows[1].answer is None and "None" not in rows[1].solution and "answer>" not in rows[1].solution
    check_answers(rows, "mine.py:score", "rows.jsonl, row")
    check_answers(rows, [WeightedReward(function="mine.py:score")], "rows.jsonl, row")
    for function in ("auto", "math", [WeightedReward(function="mine.py:score"), WeightedReward(function="math")]):
        with pytest.raises(DataError, match=r"rows.jsonl, row [12], column 'answer': missing; the verifier needs it"):
            check_answers(rows, function, "rows.jsonl, row")
    assert answer_rule(rows[1:]) == "tags"


@pytest.mark.parametrize(("task", "found"), [(None, "missing"), ("algebra", "found 'algebra'")])
def test_a_row_without_a_built_in_task(tmp_path, monkeypatch, task, found):
    """reward.function=auto takes the verifier from the row: one row of many without it is an error by number, in memory and on
    disk, not a failed score in the middle of a run."""
    from unift.rows.large import open_rows

    file = write(tmp_path / "rows.jsonl", GOOD | {"task": "math"}, GOOD | {"prompt": "1+1=", "task": task})
    rows = read_rows(file)
    with pytest.raises(DataError, match=rf"rows.jsonl, row 2, column 'task': {found}, .*reward.function=math for all"):
        check_answers(rows, "auto", f"{file}, row")
    for function in ("math", "mine.py:score"):
        check_answers(rows, function, f"{file}, row")
    monkeypatch.setattr("unift.rows.store.LARGE", 1)
    monkeypatch.setenv("UNIFT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=rf"rows.jsonl, column 'task': {found}, "):
        check_answers(open_rows(file, need_steps=True), "auto", f"{file}, row")


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({k: v for k, v in GOOD.items() if k != "prompt"}, r"row 2, column 'prompt'"),
        ({k: v for k, v in GOOD.items() if k != "steps"}, r"row 2, column 'steps': no worked solution"),
        (GOOD | {"steps": []}, r"row 2, column 'steps': the solution is empty"),
        (GOOD | {"steps": ["a", 3]}, r"row 2, column 'steps': expected a list of texts"),
        (GOOD | {"prompt": " "}, r"row 2, column 'prompt'"),
    ],
)
def test_bad_rows(tmp_path, record, said):
    with pytest.raises(DataError, match=f"bad.jsonl, {said}"):
        read_rows(write(tmp_path / "bad.jsonl", GOOD, record))


def test_bad_files(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_rows(str(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="empty"):
        read_rows(str(tmp_path / "empty.jsonl"))
    (tmp_path / "torn.jsonl").write_text(json.dumps(GOOD) + '\n{"prompt": ')
    with pytest.raises(DataError, match="line 2: not valid JSON"):
        read_rows(str(tmp_path / "torn.jsonl"))
    (tmp_path / "x.parquet").write_text("not parquet")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        read_rows(str(tmp_path / "x.parquet"))


def test_overlap_is_by_canonical_form():
    a = make_rows("countdown", 5, 0, "train")
    moved = Row("other", a[2].prompt + " ", a[2].steps, a[2].ending, a[2].answer, a[2].task)
    assert overlap(a, [moved]) == ["other"]
    assert overlap(a, make_rows("countdown", 50, 1, "test")) == []


@pytest.mark.parametrize("task", ["countdown", "jigsaw", "knights", "lock"])
def test_splits_never_overlap(task):
    """Any seed of one split against any seed of the other, and every demonstration is right."""
    t = get_task(task)
    train = [r for seed in (0, 1) for r in make_rows(task, 60, seed, "train")]
    test = [r for seed in (0, 5) for r in make_rows(task, 60, seed, "test")]
    assert not {t.canonical(r) for r in train} & {t.canonical(r) for r in test}
    assert all(t.score(r.solution, r).right for r in train + test)


def test_split_steps_gives_back_the_text():
    for text in ("a\nb\n\nc", "One. Two! Three?", "single", "x\n", "a. b\nc"):
        assert "".join(split_steps(text)) == text


@pytest.mark.parametrize(
    "payload",
    ["47**76**55", "47//76", "(" * 5000, "1" * 5000, "__import__('os')", "", "４７", "47 76", "-" * 999 + "47"],
)
def test_hostile_countdown_answers(payload):
    """The published exploits, and more: scored 0, at once, without evaluation."""
    row = make_rows("countdown", 1, 0, "train")[0]
    assert get_task("countdown").score(f"<answer>{payload}</answer>", row).value == 0.0


def test_lock_hint_alone_earns_nothing():
    row = make_rows("lock", 1, 0, "train")[0]
    score = get_task("lock").score
    assert score(row.solution, row).right and not score("", row, hint="".join(row.steps)).right
    assert score(row.ending, row, hint="".join(row.steps)).right


# ---------------------------------------------------------------------------------------------- tokens


@pytest.fixture(scope="module")
def smol(smollm):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm.parent, gguf_file=smollm.name)


def test_hints_are_token_slices(smol):
    """Every hint is a prefix of one tokenisation, and never shows a part of the next step."""
    for task in ("countdown", "knights"):
        for row in make_rows(task, 30, 0, "train"):
            e = encode_row(smol, row, 4096)
            text = smol.decode(e.prompt + e.solution[:-1])
            spoken = row.prompt + row.solution
            assert text == spoken and e.solution[-1] == smol.eos_token_id and not e.forced
            for j in range(e.n_steps + 1):
                shown = smol.decode(e.prompt + e.solution[: e.step_ends[j]])
                assert (row.prompt + "".join(row.steps[:j])).startswith(shown)
            assert e.hint(0, 5) == [] and e.hint(min(5, e.n_steps), 5) == e.solution[: e.step_ends[-1]]


def test_prompt_has_the_same_tokens_with_and_without_a_solution(smol):
    row = make_rows("countdown", 1, 0, "train")[0]
    bare = Row(row.id, row.prompt, (), "", row.answer)
    assert encode_row(smol, row, 4096).prompt == encode_row(smol, bare, 4096).prompt


def test_tokenizer_without_eos_or_pad():
    class NoEos(FakeTokenizer):
        eos_token_id = None

    class NoPad(FakeTokenizer):
        pad_token_id = None

    with pytest.raises(DataError, match="no EOS"):
        check_tokenizer(NoEos())
    with pytest.raises(DataError, match="no pad"):
        check_tokenizer(NoPad())
    with pytest.raises(DataError, match="fast tokenizer"):
        check_tokenizer(FakeTokenizer())


@pytest.mark.parametrize("source", ["aime", "amc", "openai/gsm8k", "minerva", "olympiad_bench", "math500", "cais/hle"])
def test_rows_of_the_paper_s_evaluation_file(tmp_path, source):
    """Their hint is one empty text: rows without a solution, which are judged as mathematics."""
    record = {"prompt": [{"role": "user", "content": "6*7?"}], "hint": [""], "answer": "", "data_source": source}
    record["reward_model"] = {"ground_truth": {"question": "6*7?", "target": "42"}, "style": "rule"}
    path = tmp_path / "others.jsonl"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    (row,) = read_rows(str(path), need_steps=False)
    assert (row.task, row.steps, row.extra["data_source"]) == ("math", (), source)
    assert get_task("math").score("<answer>42.0</answer>", row).right
    with pytest.raises(DataError, match="row 1, column 'steps': no worked solution"):
        read_rows(str(path))


@pytest.mark.parametrize("column", ["prompt", "id", "answer", "task", "extra", "deep", "x\ud800"])
def test_half_a_surrogate_pair_is_named(column):
    """JSON can spell it, UTF-8 cannot: hashes, rollouts and files of rows would end in a traceback."""
    given = {"prompt": "a", "steps": ["b"], "answer": "c", "task": "math", column: "\ud800"}
    given |= {"deep": [{"k": ("\udc00",)}]} if column == "deep" else {}
    with pytest.raises(DataError, match="row 2, column '.*' is no character"):
        rows_of([{"prompt": "a", "answer": "1"}, given], need_steps=False)
    if column == "answer":
        with pytest.raises(DataError, match="row 1, column 'answer'"):
            rows_of([Row("r", "p", ("s",), "", "\ud800", "math", {})])


@pytest.mark.parametrize(
    ("place", "form"),
    [("boxed", "So it is $\\boxed{{{}}}$."), ("hash", "#### {}"), ("tags", "It is\n<answer> {} </answer>")],
)
@pytest.mark.parametrize("column", ["steps", "solution"])
def test_the_mark_of_a_solution_is_its_ending(place, form, column):
    """Without an ending, as MATH and GSM8K have it: the text stays, and no step shows the answer."""
    texts = [["A first thought.\n", "\n", "Another. ", "\n", form.format(n)] for n in range(1, 5)]
    given = [
        {"prompt": f"q{n}", column: t if column == "steps" else "".join(t), "answer": str(n), "task": "math"}
        for n, t in enumerate(texts, start=1)
    ]
    rows = rows_of(given)
    assert [row.solution for row in rows] == ["".join(t) for t in texts]
    assert answer_rule(rows) == place and not any(str(n) in "".join(row.steps) for n, row in enumerate(rows, start=1))
    assert all(row.steps[0].startswith("A first thought.\n") for row in rows)
    plain = rows_of([*given, {"prompt": "q", "steps": ["It is 9."], "answer": "9", "task": "math"}])
    assert answer_rule(plain) == "tags" and all(row.ending.endswith("</answer>") for row in plain)
    wrong = [given[0], given[1] | {"answer": "77"}, given[2] | {"answer": "78"}]
    with pytest.raises(
        DataError, match="mine, row 2, column 'answer': '77', but .* ends with '2'; 2 of the 3 rows tried"
    ):
        rows_of(wrong, "mine")
    told = rows_of(
        [row | {"ending": ""} for row in wrong]
    )  # an ending of their own, if it is empty: nothing is written
    assert [(n, other) for n, _, other in contradictions(told)] == [(2, "2"), (3, "3")]
    assert inspect(told)["of these, the first"] == ["row 2: 2, not 77", "row 3: 3, not 78"]


def test_a_solution_that_says_otherwise_is_counted():
    """One of many is no error, but told; a heading is no answer; tags written behind a solution do not hide its own mark."""
    given = [
        {"prompt": f"q{n}", "steps": [f"It is $\\boxed{{{n}}}$."], "answer": str(n), "task": "math"} for n in range(5)
    ]
    given[3]["answer"] = "7"
    headed = {"prompt": "h", "steps": ["#### Step 1\n", "It is 9."], "answer": "9", "task": "math"}
    for rows in (rows_of(given), rows_of([*given, headed])):
        assert [(n, row.answer, other) for n, row, other in contradictions(rows)] == [(4, "7", "3")]
        assert inspect(rows)["solution ends with another answer"] == 1
    assert rows_of([headed] * 3)[0].ending == "\n<answer> 9 </answer>"
    assert not contradictions([replace(row, task="mine") for row in rows_of(given)]), "no task of ours, no mark of ours"


def test_doctor_names_a_row_that_contradicts_itself():
    from unift.commands.doctor import try_reward

    texts = [("It is $\\boxed{4}$.", "4"), ("It is $\\boxed{5}$.", "6"), ("It is $\\boxed{6}$.", "6")]
    rows = rows_of(
        [{"id": a + b, "prompt": a + b, "steps": [a], "answer": b, "task": "math"} for a, b in texts]
        + [{"id": "plain", "prompt": "p", "steps": ["It is 9."], "answer": "9", "task": "math"}]
    )
    assert all(row.ending.startswith("\n<answer>") for row in rows)  # the verifier accepts all of them
    check, _ = try_reward(settings("uft"), rows)
    assert not check.ok and "ends with '5', its column 'answer' has '6'" in check.text
    check, _ = try_reward(settings("uft"), [rows[0], *rows[2:]])
    assert check.ok


def test_one_solution_without_the_mark_of_its_answer(tmp_path):
    """One row of many takes the mark of all others for a step: inspect and doctor say so, and name the row."""
    from unift.commands.doctor import load_rows
    from unift.config.resolve import parse_overrides, resolve
    from unift.rows.inspect import inspect

    def rows(bare):
        return [
            {"prompt": f"{n}+1=", "answer": str(n + 1), "task": "math",
             "solution": f"One more than {n}.\nThat is {n + 1}.\n" + ("" if n in bare else f"#### {n + 1}")}
            for n in range(8)
        ]  # fmt: skip

    for bare, said in (
        ((), ""),
        ((5,), "7 of 8 .* row 6 does not"),
        ((2, 5), r"2 do \(the first: row 3\) not"),
        (range(8), ""),
    ):
        file = write(tmp_path / "rows.jsonl", *rows(bare))
        settings = ["model.path=embedded:lock", f"data.train={file}"]
        check, _ = load_rows(resolve("uft", overrides=parse_overrides(settings)))
        found = str(inspect(read_rows(file)).get("faulty", ""))
        assert check.ok == (not said) and bool(found) == bool(said)
        assert re.search(said, found) and re.search(said, check.text)
