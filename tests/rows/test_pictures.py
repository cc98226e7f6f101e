"""Rows with pictures: every form in which data sets write them, their identity, and what is refused."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
import vision_zoo as zoo

from unift.config.resolve import parse_overrides, resolve
from unift.rows import dataset, pictures, processor, store
from unift.rows.inspect import overlap, write_rows
from unift.rows.large import open_rows
from unift.rows.readers import read_rows, rows_of
from unift.rows.tokens import encode_row
from unift.types import ConfigError, DataError

RED = zoo.noise(1)
TEXT = {"type": "text", "text": "How many?"}


def one(**columns):
    base = {"prompt": [{"role": "user", "content": [{"type": "image"}, TEXT]}], "steps": [" 3."], "answer": "3"}
    return rows_of([base | columns])[0]


def pixels(row):
    return [np.asarray(pictures.opened(found)).tolist() for found in row.images]


@pytest.fixture
def reader():
    _, made = zoo.idefics3()
    processor.attach(made.tokenizer, made, [made.image_token_id])
    return made.tokenizer


# ---------------------------------------------------------------------------------------------- forms


def test_every_form_of_a_picture_is_the_same_picture(tmp_path):
    import datasets

    (tmp_path / "red.png").write_bytes(zoo.png(RED))
    packed = base64.b64encode(zoo.png(RED)).decode()
    forms = [
        str(tmp_path / "red.png"),
        f"file://{tmp_path}/red.png",
        zoo.png(RED),
        {"bytes": zoo.png(RED), "path": None},
        {"bytes": packed, "path": "elsewhere.png"},
        {"bytes": None, "path": str(tmp_path / "red.png")},
        f"data:image/png;base64,{packed}",
        RED,
    ]
    rows = [one(images=[form]) for form in forms] + [one(image=form) for form in forms]
    table = {"prompt": ["How many?"], "image": [RED], "answer": ["3"], "steps": [[" 3."]]}
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "image": datasets.Image(),
            "answer": datasets.Value("string"),
            "steps": datasets.List(datasets.Value("string")),
        }
    )
    rows += rows_of(datasets.Dataset.from_dict(table, features=features))
    listed = datasets.Features(
        {k: v for k, v in features.items() if k != "image"} | {"images": datasets.List(datasets.Image())}
    )
    several = {k: v for k, v in table.items() if k != "image"} | {"images": [[RED]]}
    rows += rows_of(datasets.Dataset.from_dict(several, features=listed))
    expected = np.asarray(RED).tolist()
    assert [pixels(row) for row in rows] == [[expected]] * len(rows)
    files = rows[: len(forms) - 1]
    assert len({row.id for row in files}) == 1, "the bytes of a file are its identity, wherever they come from"


def test_parts_bring_their_own_pictures_or_take_those_of_the_column():
    other = zoo.noise(2)
    url = f"data:image/png;base64,{base64.b64encode(zoo.png(other)).decode()}"
    content = [
        {"type": "image"},
        TEXT,
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image", "image": RED},
    ]
    row = one(prompt=[{"role": "user", "content": content}], images=[other])
    assert row.prompt[0]["content"] == "<image>How many?<image><image>"
    assert pixels(row) == [np.asarray(x).tolist() for x in (other, other, RED)]


def test_rows_of_trl_and_verl_load_as_they_are(reader):
    trl = {
        "prompt": [{"role": "user", "content": "How many?"}],
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": "3."}]}],
        "images": [RED],
    }
    verl = {
        "data_source": "hiyouga/geometry3k",
        "prompt": [{"role": "user", "content": "<image>How many?"}],
        "images": [{"bytes": zoo.png(RED), "path": None}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "3"},
        "extra_info": {"split": "train", "index": 0, "answer": "3", "question": "<image>How many?"},
    }
    for record, steps in ((trl, ("3.",)), (verl, ())):
        (row,) = rows_of([record], need_steps=False)
        assert row.steps == steps and len(row.images) == 1 and "images" not in row.extra
        made = encode_row(reader, row, 200)
        text = reader.decode(made.prompt)
        assert text == (
            "<|im_start|>User:<fake_token_around_image><global-img><image><image><image><image><fake_token_around_image>"
            "How many?<end_of_utterance>\nAssistant:"
        )
        assert made.shown.prompt == len(made.prompt) and made.shown.pictures == row.images
    assert row.task == "math" and row.answer == "3"


def test_a_text_prompt_shows_its_pictures_where_its_marks_are(reader):
    expanded = "<fake_token_around_image><global-img>" + "<image>" * 4 + "<fake_token_around_image>"
    for prompt, text in (
        ("Look: <image> How many?", f"Look: {expanded} How many?"),
        ("How many?", f"{expanded}How many?"),
    ):
        made = encode_row(reader, one(prompt=prompt, images=[RED]), 200)
        assert reader.decode(made.prompt) == text


def test_text_rows_of_a_model_with_a_tower_go_through_its_template(reader):
    row = one(prompt=[{"role": "user", "content": "How many?"}])
    made = encode_row(reader, row, 200)
    assert reader.decode(made.prompt) == "<|im_start|>User: How many?<end_of_utterance>\nAssistant:"
    assert made.shown is None


# ---------------------------------------------------------------------------------------------- identity, files


def test_what_a_picture_holds_is_a_part_of_the_row(tmp_path):
    a, b = one(images=[RED]), one(images=[zoo.noise(2)])
    assert a.id != b.id
    prints = {dataset.Dataset([row], []).fingerprint for row in (a, b)}
    assert len(prints) == 2
    assert overlap([a], [b]) == [] and overlap([a], [a]) == [a.id]
    same = rows_of(
        [{"id": "x", "prompt": "Q", "images": [RED]}, {"id": "x", "prompt": "Q", "images": [RED]}], need_steps=False
    )
    assert [row.id for row in same] == ["x", "x-2"]
    with pytest.raises(DataError, match="'x' is the id of row 1, too"):
        rows_of([{"id": "x", "prompt": "Q", "images": [p]} for p in (RED, zoo.noise(2))], need_steps=False)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_files_hold_rows_with_pictures(tmp_path, kind, monkeypatch):
    """Written, read, and read row by row from the cache: the same rows."""
    (tmp_path / "red.png").write_bytes(zoo.png(RED))
    (tmp_path / "in.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"<image>Q{i}", "image": "red.png", "answer": "3", "steps": [" 3."]}) + "\n"
            for i in range(3)
        )
    )
    rows = [*read_rows(str(tmp_path / "in.jsonl")), one(images=[RED, zoo.noise(2)], prompt="<image>a<image>b")]
    assert rows[0].images[0].path == str(tmp_path / "red.png")
    write_rows(rows, tmp_path / f"rows.{kind}")
    back = read_rows(str(tmp_path / f"rows.{kind}"))
    assert [(r.prompt, pixels(r)) for r in back] == [(r.prompt, pixels(r)) for r in rows]
    monkeypatch.setattr(store, "LARGE", 10)
    monkeypatch.setenv("UNIFT_CACHE", str(tmp_path / "cache"))
    lazy = open_rows(str(tmp_path / f"rows.{kind}"))
    assert isinstance(lazy, store.StoredRows) and lazy.facts.pictures
    assert list(lazy) == back and [pixels(r) for r in lazy] == [pixels(r) for r in back]
    assert dataset.Dataset(lazy, []).fingerprint == dataset.Dataset(back, []).fingerprint


def test_a_picture_that_changes_is_an_error(tmp_path):
    path = tmp_path / "red.png"
    path.write_bytes(zoo.png(RED))
    row = one(images=[str(path)])
    path.write_bytes(zoo.png(zoo.noise(2)))
    with pytest.raises(DataError, match="has changed since the rows were read"):
        pictures.opened(row.images[0])


# ---------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "columns, words",
    [
        ({"images": []}, "row 1, column 'prompt': 1 places for pictures, but only 0"),
        ({"images": [RED, RED]}, "1 marks <image>, but 2 pictures"),
        ({"images": ["nowhere.png"]}, "row 1, column 'images': no such picture: 'nowhere.png'"),
        ({"images": ["https://example.org/a.png"]}, "lies on the network"),
        ({"images": [b"no picture"]}, "the picture cannot be read (unknown format)"),
        ({"images": [7]}, "expected a picture (path, bytes, {bytes, path} or a Pillow image), found int 7"),
        ({"images": [{"bytes": "%%", "path": None}]}, "expected the bytes of a picture in base64"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "video"}]}], "images": [RED]},
            "parts of type text or image",
        ),
        (
            {"completion": [{"role": "assistant", "content": [{"type": "image"}]}], "images": [RED]},
            "a picture stands in the answer",
        ),
    ],
)
def test_rows_that_do_not_fit_are_named(columns, words):
    with pytest.raises(DataError) as error:
        one(**columns)
    assert words in str(error.value) and "row 1" in str(error.value)


def test_damaged_and_huge_pictures_are_named(reader, monkeypatch):
    whole = zoo.png(zoo.noise(1, 64, 64))
    with pytest.raises(DataError, match="row 1 .*the picture cannot be read"):
        encode_row(reader, one(images=[whole[: len(whole) // 2]]), 200, 1)
    monkeypatch.setattr(pictures, "PIXELS", 1000)
    with pytest.raises(DataError, match="32 x 32 pixels, more than 1,000"):
        one(images=[zoo.png(RED)])


def test_a_model_of_text_and_stray_placeholders_are_refused(reader):
    from conftest import char_tokenizer

    with pytest.raises(DataError, match="the row has pictures, and model.path is a model of text alone"):
        encode_row(char_tokenizer(template="{{ messages }}"), one(images=[RED]), 200, 1)
    with pytest.raises(DataError, match="1 places for pictures .*, the row 0 pictures"):
        encode_row(reader, one(prompt="Say <image>"), 200, 1)
    with pytest.raises(DataError, match="the solution holds a placeholder"):
        encode_row(reader, one(images=[RED], steps=[" <image>"]), 200, 1)


@pytest.mark.parametrize(
    "method, setting, words",
    [
        ("neftune", "train.steps=1", "changes input embeddings"),
    ],
)
def test_settings_that_do_not_go_with_pictures(reader, method, setting, words):
    config = resolve(method, overrides=parse_overrides(["data.train=rows.jsonl", "model.path=x", setting]))
    with pytest.raises(ConfigError, match=words):
        dataset.encode(reader, dataset.Dataset([one(images=[RED])], []), config)
