"""Rows and results of a suite in the formats of other evaluation packages. Nothing of them is imported.

lm-eval   lm-evaluation-harness 0.4: a task (YAML, JSONL) a column, a group of all, results as its ``--log_samples`` has them
inspect   inspect-ai 0.3: a dataset (``json_dataset``) a column, and logs for ``inspect view`` and ``read_eval_log``
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from unift._version import __version__
from unift.commands.suite.columns import Problems
from unift.files import write_atomic
from unift.rows.tasks.base import nearest
from unift.types import ConfigError, Row

Records = Mapping[str, Sequence[Mapping[str, Any]]]
METRIC = "acc"


def check_kinds(kinds: Sequence[str]) -> None:
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"--export {kind!r} is unknown.{nearest(kind, KINDS)}")


def export(kind: str, folder: Path, problems: Problems, done: Records, result: Mapping[str, Any]) -> Path:
    """Write the rows and what was answered under ``folder/<kind>``; returns that folder.

    result: of the suite. Earlier logs there stay; those of this result take a name of their time.
    """
    check_kinds([kind])
    out = folder / kind
    out.mkdir(parents=True, exist_ok=True)
    KINDS[kind](out, problems, done, result)
    return out


def task_name(column: str) -> str:
    return f"unift_{column}"


def _record(row: Row) -> dict[str, Any]:
    prompt = row.prompt if isinstance(row.prompt, str) else [dict(m) for m in row.prompt]
    return {"id": row.id, "prompt": prompt, "answer": row.answer, "task": row.task, "extra": dict(row.extra)}


def row_of(record: Mapping[str, Any]) -> Row:
    """The row that an exported record holds, without its solution."""
    prompt = record["prompt"] if isinstance(record["prompt"], str) else tuple(record["prompt"])
    return Row(record["id"], prompt, (), "", record["answer"], record["task"], record["extra"])


def _target(row: Row) -> str:
    """The expected answer as a text for people; verdicts are unift's."""
    answer = row.answer
    found = answer.get("target", answer.get("solution_text_format")) if isinstance(answer, Mapping) else answer
    return str(found if found is not None else json.dumps(answer, default=str))


def _prompt(row: Row) -> str:
    """As one text, without the spaces at its end, which belong to the answer (`rows.tokens`); of messages, their contents:
    the harness applies the model's template itself."""
    return row.prompt.rstrip(" ") if isinstance(row.prompt, str) else "\n".join(m["content"] for m in row.prompt)


# ---------------------------------------------------------------------------------------------- lm-evaluation-harness


class _Function(str):
    """The name of a Python function in a task's YAML: ``!function file.name``."""


class _Dumper(yaml.SafeDumper):
    pass


def _function_tag(dumper: yaml.SafeDumper, value: _Function) -> yaml.ScalarNode:
    return dumper.represent_scalar("!function", str(value))


_Dumper.add_representer(_Function, _function_tag)

UTILS = '''"""Verdicts of unift's verifiers for lm-evaluation-harness."""

from unift.commands.suite.export import process_results  # noqa: F401
'''


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The harness's hook: {"acc": 1.0} for a right answer by unift's own verifier, which never runs the model's text."""
    from unift.rows.tasks import get_task

    row = row_of(json.loads(doc["row"]))
    score = get_task(row.task).score(results[0], row, rule=doc["rule"], answer=doc["answer_place"])
    return {METRIC: float(score.right)}


def _harness(out: Path, problems: Problems, done: Records, result: Mapping[str, Any]) -> None:
    settings, now = result["settings"], datetime.now(timezone.utc)
    suite, stamp = settings["suite"], now.strftime("%Y-%m-%dT%H-%M-%S.%f")
    write_atomic(out / "utils.py", UTILS)
    configs: dict[str, dict[str, Any]] = {}
    docs: dict[str, list[dict[str, Any]]] = {}
    place = _place(settings)
    for name, rows in problems.columns.items():
        task = task_name(name)
        docs[task] = [
            {
                "id": row.id,
                "prompt": _prompt(row),
                "target": _target(row),
                "rule": settings["rule"],
                "answer_place": place(rows),
                "row": json.dumps(_record(row), ensure_ascii=False, default=str),
            }
            for row in rows
        ]
        write_atomic(out / f"{task}.jsonl", _lines(docs[task]))
        configs[task] = _task(task, out / f"{task}.jsonl", settings["max_tokens"])
        write_atomic(out / f"{task}.yaml", yaml.dump(configs[task], Dumper=_Dumper, sort_keys=False))
    group = {"group": f"unift_{suite}", "task": list(configs), "aggregate_metric_list": [
        {"metric": METRIC, "aggregation": "mean", "weight_by_size": False}], "metadata": {"version": 1.0}}  # fmt: skip
    write_atomic(out / f"unift_{suite}.yaml", yaml.safe_dump(group, sort_keys=False))
    folder = out / "results" / _sanitized(result["model"])
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in done.items():
        task = task_name(name)
        samples = [_sample(i, docs[task][i], record, settings["max_tokens"]) for i, record in enumerate(records)]
        write_atomic(folder / f"samples_{task}_{stamp}.jsonl", _lines(samples))
    write_atomic(folder / f"results_{stamp}.json", json.dumps(_aggregated(configs, result, now), indent=2))


def _task(task: str, rows: Path, most: int) -> dict[str, Any]:
    return {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows.resolve())}},
        "test_split": "test",
        "output_type": "generate_until",
        "num_fewshot": 0,
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{target}}",
        "target_delimiter": "",
        "process_results": _Function("utils.process_results"),
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": most},
        "metric_list": [{"metric": METRIC, "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def _sample(number: int, doc: Mapping[str, Any], record: Mapping[str, Any], most: int) -> dict[str, Any]:
    """A line of ``samples_<task>_<time>.jsonl``."""
    text = record["greedy"]["text"]
    asked = {"until": [], "do_sample": False, "max_gen_toks": most}
    return {
        "doc_id": number,
        "doc": dict(doc),
        "target": doc["target"],
        "arguments": {"gen_args_0": {"arg_0": doc["prompt"], "arg_1": asked}},
        "resps": [[text]],
        "filtered_resps": [text],
        "filter": "none",
        "metrics": [METRIC],
        "doc_hash": _hash(json.dumps(doc, indent=2, ensure_ascii=False)),
        "prompt_hash": _hash(doc["prompt"]),
        "target_hash": _hash(doc["target"]),
        METRIC: float(record["greedy"]["right"]),
    }


def _aggregated(configs: Mapping[str, Any], result: Mapping[str, Any], now: datetime) -> dict[str, Any]:
    """``results_<time>.json``."""
    columns = {task_name(name): column for name, column in result["columns"].items()}
    group, model = f"unift_{result['settings']['suite']}", result["model"]
    return {
        "results": {task: _metrics(task, c) for task, c in columns.items()},
        "groups": {group: {"alias": group, f"{METRIC},none": result["average"]["accuracy"]}},
        "group_subtasks": {group: list(columns)},
        "configs": {task: json.loads(json.dumps(config)) for task, config in configs.items()},
        "versions": dict.fromkeys(columns, 1.0),
        "n-shot": dict.fromkeys(columns, 0),
        "higher_is_better": {task: {METRIC: True} for task in columns},
        "n-samples": {task: {"original": c["n"], "effective": c["n"]} for task, c in columns.items()},
        "config": {"model": "unift", "model_args": {"pretrained": model, "dtype": result["settings"]["dtype"]}},
        "date": now.timestamp(),
        "model_source": "unift",
        "model_name": model,
        "model_name_sanitized": _sanitized(model),
        "total_evaluation_time_seconds": str(result["seconds"]),
    }


def _metrics(task: str, column: Mapping[str, Any]) -> dict[str, Any]:
    metrics = {f"{METRIC},none": column["accuracy"], f"{METRIC}_stderr,none": _stderr(column)}
    return {"alias": task, "name": task, "sample_len": column["n"], **metrics}


def _stderr(column: Mapping[str, Any]) -> float:
    """Of a mean of verdicts, with the sample's variance (n - 1), as both packages have it."""
    p, n = column["accuracy"], column["n"]
    return math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else 0.0


# ---------------------------------------------------------------------------------------------- inspect-ai


def _inspect(out: Path, problems: Problems, done: Records, result: Mapping[str, Any]) -> None:
    now = datetime.now(timezone.utc)
    for name, rows in problems.columns.items():
        task = task_name(name)
        samples = [_problem(row) for row in rows]
        write_atomic(out / f"{task}.jsonl", _lines(samples))
        location = str((out / f"{task}.jsonl").resolve())
        answers = {task: [[r["greedy"]] for r in done[name]]}
        if result["settings"]["samples"]:
            answers[f"{task}_sampled"] = [r["samples"] for r in done[name]]
        for log, given in answers.items():
            text = json.dumps(_log(log, samples, location, given, result, now), ensure_ascii=False, indent=1)
            title = _hash(f"{log} {result['settings']} {now}")[:22]
            write_atomic(out / f"{now.strftime('%Y-%m-%dT%H-%M-%S')}+00-00_{log.replace('_', '-')}_{title}.json", text)


def _problem(row: Row) -> dict[str, Any]:
    """A sample of inspect-ai's datasets."""
    prompt = row.prompt if isinstance(row.prompt, str) else [dict(m) for m in row.prompt]
    about = {"task": row.task, "data_source": row.extra.get("data_source"), "answer": row.answer}
    return {
        "id": row.id,
        "input": prompt,
        "target": _target(row),
        "metadata": json.loads(json.dumps(about, default=str)),
    }


def _log(
    task: str,
    samples: Sequence[Mapping[str, Any]],
    location: str,
    answers: Sequence[Sequence[Mapping[str, Any]]],
    result: Mapping[str, Any],
    now: datetime,
) -> dict[str, Any]:
    """An evaluation log, version 2. ``answers``: of each row, one an epoch."""
    model, epochs = f"unift/{_sanitized(result['model'])}", len(answers[0])
    right = [sum(a["right"] for a in given) / epochs for given in answers]
    n, middle = len(right), sum(right) / len(right)
    spread = math.sqrt(sum((r - middle) ** 2 for r in right) / (n - 1) / n) if n > 1 else 0.0
    metrics = {name: {"name": name, "value": value} for name, value in (("accuracy", middle), ("stderr", spread))}
    settings = {"max_tokens": result["settings"]["max_tokens"], "temperature": 1.0 if "sampled" in task else 0.0}
    return {
        "version": 2,
        "status": "success",
        "eval": {
            "created": now.isoformat(timespec="seconds"),
            "task": task,
            "dataset": {"name": task, "location": location, "samples": n, "sample_ids": [s["id"] for s in samples]},
            "model": model,
            "model_generate_config": settings | {"seed": result["settings"]["seed"]},
            "config": {"epochs": epochs, "epochs_reducer": ["mean"]},
            "packages": {"unift": __version__},
            "metadata": dict(result["settings"]),
        },
        "results": {
            "total_samples": n * epochs,
            "completed_samples": n * epochs,
            "scores": [{"name": "unift", "scorer": "unift", "scored_samples": n, "metrics": metrics}],
        },
        "samples": [
            _answered(dict(sample), epoch, given[epoch - 1], model)
            for epoch in range(1, epochs + 1)
            for sample, given in zip(samples, answers, strict=True)
        ],
    }


def _answered(sample: dict[str, Any], epoch: int, answer: Mapping[str, Any], model: str) -> dict[str, Any]:
    said = {"role": "assistant", "content": answer["text"], "source": "generate", "model": model}
    score: dict[str, Any] = {"value": "C" if answer["right"] else "I", "answer": answer["text"]}
    if "note" in answer or "error" in answer:
        score["explanation"] = answer.get("note") or f"the scorer failed: {answer['error']}"
    choice = {"message": said, "stop_reason": "stop" if answer["finished"] else "max_tokens"}
    output = {"model": model, "choices": [choice], "completion": answer["text"]}
    asked = [{"role": "user", "content": sample["input"]}] if isinstance(sample["input"], str) else sample["input"]
    return sample | {"epoch": epoch, "messages": [*asked, said], "output": output, "scores": {"unift": score}}


# ---------------------------------------------------------------------------------------------- both


def _place(settings: Mapping[str, Any]) -> Callable[[Sequence[Row]], str]:
    from unift.rows.tasks.format import answer_rule

    return lambda rows: answer_rule(rows, settings["answer"], settings["rule"])


def _lines(records: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _sanitized(model: str) -> str:
    """A model's path as the name of a folder."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in model).strip("_") or "model"


KINDS: Mapping[str, Callable[[Path, Problems, Records, Mapping[str, Any]], None]] = {
    "lm-eval": _harness,
    "inspect": _inspect,
}
