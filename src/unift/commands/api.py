"""unift from Python: what the commands do, for a notebook or a script. Each command is a thin layer over these functions.

>>> import unift
>>> rows = [{"prompt": f"{a} + {a} =", "steps": [f" {a + a}"], "answer": str(a + a), "task": "math"} for a in range(9)]
>>> unift.load_rows(rows)[2].steps
(' 4',)
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unift.commands import settings as layers
from unift.commands.settings import DEMO, OnStep
from unift.config.resolve import preset_settings, read_yaml, resolve
from unift.config.sections import Config
from unift.types import ConfigError, Given, Row, UniftError

if TYPE_CHECKING:
    from unift.training.evaluate import Evaluation

Rows = Any  # a path, an iterable of mappings or Rows, a datasets.Dataset, a pandas frame


@dataclass(frozen=True)
class RunFolder:
    """A run folder and what is in it, whether the run is finished or not."""

    folder: Path

    @property
    def config(self) -> Config:
        return resolve(None, file=read_yaml(self.folder / "config.yaml"))

    @property
    def result(self) -> dict[str, Any] | None:
        """Accuracies and counts; None while the run is not finished."""
        from unift.training.run import read_result

        return read_result(self.folder)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One mapping a step, the untouched model's evaluation first. ``pandas.DataFrame(run.metrics)`` reads it."""
        from unift.training.run.metrics import read_metrics

        return read_metrics(self.folder / "metrics.jsonl")

    def rollouts(self, step: int) -> list[Any]:
        """The groups of a step (from 1, as in the metrics) with hints, completions and scores. UniftError without any."""
        from unift.training.run.rollouts import read_rollouts

        stored = read_rollouts(self.folder, step - 1)
        if stored is None:
            raise UniftError(f"{self.folder} holds no rollouts of step {step}: {self._no_rollouts(step)}")
        return stored[1]

    def _no_rollouts(self, step: int) -> str:
        """Why a step has none, and what to do."""
        config = self.config
        done = max([m["step"] for m in self.metrics], default=0) if (self.folder / "metrics.jsonl").is_file() else 0
        if not 1 <= step <= done:
            return f"steps count from 1, and the run has made {done}"
        if not config.save.rollouts:
            return (
                "its settings have save.rollouts=false; train into another folder with save.rollouts=true to keep them"
            )
        return f"method {config.method!r} samples nothing there, or save.rollouts=true was not set then"

    def model(self) -> tuple[Any, Any]:
        """(model, tokenizer) after the run, or of its last checkpoint while it is not finished."""
        from transformers import AutoTokenizer

        from unift.model.folder import model_settings
        from unift.model.vision import model_class

        folder = self.folder / "model"
        if not folder.is_dir():
            saved = sorted((self.folder / "checkpoints").glob("step_*/model"))
            if not saved:
                raise UniftError(f"{self.folder} holds no model yet: the run has saved nothing")
            folder = saved[-1]
        model = model_class(model_settings(folder)).from_pretrained(str(folder), local_files_only=True)
        return model, AutoTokenizer.from_pretrained(str(folder), local_files_only=True)

    def report(self, out: str | Path | None = None) -> Path:
        """Write the run as one HTML file; returns its path."""
        from unift.commands.report import write

        return write(self.folder, Path(out) if out else None)


@dataclass(frozen=True)
class Comparison:
    """What `compare` leaves: one result a run, and table and reading as text."""

    folder: Path
    results: Sequence[dict[str, Any]]
    text: str

    def run(self, method: str, seed: int = 0) -> RunFolder:
        return load_run(self.folder / f"{method}-seed{seed}")

    def report(self, out: str | Path | None = None) -> Path:
        return RunFolder(self.folder).report(out)

    def __str__(self) -> str:
        return self.text


def load_run(folder: str | Path) -> RunFolder:
    """An existing run. ConfigError where there is none."""
    if not (Path(folder) / "config.yaml").is_file():
        raise ConfigError(f"{folder} is no run folder: it has no config.yaml")
    return RunFolder(Path(folder))


def load_rows(source: Rows, *, format: str = "auto", limit: int | None = None, steps: bool = False) -> list[Row]:
    """Rows of a path, ``hf:NAME``, an iterable of mappings, a ``datasets.Dataset`` or a pandas frame, in any accepted layout.

    steps: refuse rows without a worked solution. Raises DataError with file or list, row number and column.
    """
    from unift.rows.readers import read_rows, rows_of

    if isinstance(source, (str, Path)):
        return read_rows(str(source), format=format, limit=limit, need_steps=steps)
    return rows_of(source, format=format, limit=limit, need_steps=steps)


def preset(method: str) -> dict[str, Any]:
    """The settings of a method, as a nested dict.

    >>> preset("uft")["show"]["schedule"]
    'cosine'
    """
    return preset_settings(method)


# ---------------------------------------------------------------------------------------------- verbs


def train(
    method: str | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    train: Rows = None,
    test: Rows = None,
    reward: Any = None,
    run: str | Path | None = None,
    recipe: str | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    on_step: OnStep | None = None,
    quiet: bool = False,
    **settings: Any,
) -> RunFolder:
    """Train, or continue the run in an existing folder.

    model: a path, ``embedded:NAME``, or a loaded ``PreTrainedModel`` with its tokenizer. A loaded model stays as it is: its
        weights are kept in the run folder and training starts from those, so the run can be continued without it.
    train, test: rows as `load_rows` takes them.
    reward: what ``reward.function`` takes, or a function (unift's, TRL's or verl's form, also one of a notebook), or a list of
        {"function": ..., "weight": ...}.
    run: the run folder; default runs/<method>-<hash of the settings>.
    on_step: called as ``on_step(step, metrics)`` after every step; a true answer saves the run and stops it.
    settings: by dotted names, ``**{"train.lr": 1e-6}``. Every name: docs/config.md.

    Interrupted (Ctrl-C) it saves and returns; the same call continues. Raises UniftError with one clear line.

    >>> import tempfile
    >>> run = train(
    ...     "uft", recipe="lock", run=tempfile.mkdtemp(), quiet=True,
    ...     **{"train.steps": 2, "train.prompts": 2, "data.train_rows": 8, "data.test_rows": 4},
    ... )
    >>> run.result["steps"], [m["step"] for m in run.metrics]
    (2, [0, 1, 2])
    """
    given, over = _handed_over(settings, train=train, test=test, reward=reward)
    loaded = model if hasattr(model, "save_pretrained") else None
    if train is not None:
        over.setdefault("data.task", None)  # rows of the caller's own take the place of a recipe's generated ones
    if model is not None:
        over["model.path"] = layers.handed(type(model).__name__) if loaded is not None else str(model)
    found = layers.resolved(method, recipe=recipe, config=config, settings=over, rows=given.rows.get("train", []))
    folder = layers.folder_of(found, run)
    if loaded is not None:
        from unift.model.load import keep_model

        path = keep_model(loaded, tokenizer, folder / layers.BASE)
        found = found.model_copy(update={"model": found.model.model_copy(update={"path": str(path)})})
    layers.run_training(found, folder, given, on_step, quiet)
    return RunFolder(folder)


def evaluate(
    model: Any,
    rows: Rows = None,
    *,
    tokenizer: Any = None,
    samples: int = 0,
    vote: bool = False,
    reward: Any = None,
    recipe: str | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    split: str = "test",
    **settings: Any,
) -> Evaluation:
    """Accuracy without hints: greedy, and pass@k from ``samples`` completions a row. Nothing is written.

    vote: also the accuracy of the majority's answer among the samples, and of the likeliest sample.

    model: a run folder (which brings its own settings) or `RunFolder`, a model folder, ``embedded:NAME``, or a loaded model
    with its tokenizer. rows: as `load_rows` takes them; default: the ``split`` of the run or of the recipe.

    >>> found = evaluate("embedded:lock", recipe="lock", **{"data.test_rows": 4})
    >>> found.greedy.n, found.greedy.accuracy
    (4, 0.0)
    """
    from unift.training.evaluate import evaluate_split

    if rows is not None and split != "test":
        raise ConfigError(
            f"found rows and split={split!r}: rows that are handed over are the ones evaluated, leave split out"
        )
    given, over = _handed_over(settings, train=None, test=rows, reward=reward)
    over |= {"data.task": None} if rows is not None else {}
    with tempfile.TemporaryDirectory(prefix="unift-eval-") as folder:
        if hasattr(model, "save_pretrained"):
            from unift.model.load import keep_model

            model = keep_model(model, tokenizer, Path(folder) / layers.BASE)
        found = settings_of_split(model, recipe, config, over)
        layers.quiet_libraries(found)
        return evaluate_split(found, split, samples, given, vote)


def evaluate_suite(
    model: Any,
    data: Sequence[str | Path] | str | Path,
    *,
    suite: str = "uft",
    out: str | Path | None = None,
    samples: int = 0,
    rows: int | None = None,
    export: Sequence[str] = (),
    recipe: str | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
    **settings: Any,
) -> dict[str, Any]:
    """Accuracy on a suite of problem sets (docs/suite.md), greedy and pass@k: the result, also kept in ``out``.

    model: a run folder or `RunFolder`, a model folder or ``embedded:NAME``. data: folders or files of rows. out: default
    ``suite`` in a run folder, else runs/suite-<model>; the same call continues there. rows: the first so many of each
    column. export: "lm-eval", "inspect". say: told how far it is. Answers have at most eval.max_tokens, else what the run
    sampled, else 1,024 tokens.
    """
    from unift.commands.suite import Order
    from unift.commands.suite import evaluate_suite as run_suite
    from unift.config.stages import evaluation_tokens

    places = [data] if isinstance(data, (str, Path)) else list(data)
    folder = _folder_of(model)
    of_run, over = (folder / "config.yaml").is_file(), dict(settings)
    if not of_run and places:  # settings name rows; a suite reads its own
        over |= {"data.test": str(places[0])}
    found = settings_of(model, recipe, config, over)
    if of_run and found.eval.max_tokens is None:
        found = found.model_copy(
            update={"eval": found.eval.model_copy(update={"max_tokens": evaluation_tokens(found)})}
        )
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in str(folder).strip("/"))
    place = Path(out) if out else folder / "suite" if of_run else Path("runs") / f"suite-{name}"
    layers.quiet_libraries(found)
    return run_suite(found, Order(suite, places, place, samples, rows, list(export)), say) | {"folder": str(place)}


def compare(
    methods: Sequence[str] | str,
    *,
    seeds: int = 3,
    recipe: str | None = None,
    run: str | Path = "runs/compare",
    train: Rows = None,
    test: Rows = None,
    model: str | Path | None = None,
    reward: str | None = None,
    workers: int = 2,
    budget: str | None = None,
    vary: Mapping[str, Sequence[Any]] | None = None,
    **settings: Any,
) -> Comparison:
    """Several methods, several seeds, one task, each run in a process of its own; repeating the call continues.

    methods: presets, or "all". train, test: rows as `load_rows` takes them; they are kept in the run folder. model, reward:
    by name, since the runs are processes of their own. budget: of each run, "sampled=2M", "trained=2M" (tokens), "tokens=4M"
    (both added up) or "seconds=60". vary: values by dotted name, each of which is changed alone: {"show.cuts": [1, 2]}.
    """
    from unift.commands.compare import Plan, compare_methods

    if reward is not None and not isinstance(reward, str):
        raise ConfigError("unift.compare starts processes of its own: name the reward, as in reward='file.py:function'")
    over = dict(settings)
    for name, source in (("train", train), ("test", test)):
        if source is not None:
            over[f"data.{name}"] = str(layers.rows_in_file(source, Path(run) / f"{name}.jsonl", load_rows))
    if train is not None:
        over.setdefault("data.task", None)  # as in `train`
    over |= {"model.path": str(model)} if model is not None else {}
    over |= {"reward.function": reward} if reward is not None else {}
    own = bool({"data.train", "data.task"} & over.keys())
    names = [methods] if isinstance(methods, str) else list(methods)
    words = [f"{key}={json.dumps(value)}" for key, value in over.items()]  # JSON is YAML
    plain = lambda value: value if isinstance(value, str) and "," not in value else json.dumps(value)  # noqa: E731
    varied = [f"{key}={','.join(map(plain, values))}" for key, values in (vary or {}).items()]
    text, results = compare_methods(
        Plan(names, seeds, recipe or (None if own else DEMO), Path(run), words, workers, budget, vary=varied)
    )
    return Comparison(Path(run), results, text)


# ---------------------------------------------------------------------------------------------- pieces


def _handed_over(settings: Mapping[str, Any], *, train: Rows, test: Rows, reward: Any) -> tuple[Given, dict[str, Any]]:
    """What the caller hands over instead of naming it, and the settings that say so."""
    over = dict(settings)
    rows: dict[str, list[Row]] = {}
    for name, source in (("train", train), ("test", test)):
        if isinstance(source, (str, Path)):
            over[f"data.{name}"] = str(source)
        elif source is not None:
            rows[name] = load_rows(source)
            over[f"data.{name}"] = layers.handed()
    if isinstance(reward, str):
        over["reward.function"] = reward
    elif reward is not None:
        from unift.rewards.identity import describe

        over["reward.function"] = layers.handed(describe(reward))
    return Given(rows, None if isinstance(reward, str) else reward), over


def _folder_of(model: Any) -> Path:
    return model.folder if isinstance(model, RunFolder) else Path(str(model))


def settings_of(model: Any, recipe: str | None, config: Any, over: Mapping[str, Any]) -> Config:
    """Settings of an evaluation: the run's own where ``model`` is a run folder, else those that were named, else the demo's."""
    folder, over = _folder_of(model), dict(over)
    if over.get("data.test") and not over.get("data.train"):
        over["data.train"] = over["data.test"]  # settings name training rows; an evaluation reads its own split alone
        over.setdefault("data.task", None)  # which takes the place of generated ones
    if not (folder / "config.yaml").is_file():
        own = config is not None or "data.test" in over or "data.task" in over
        default = None if own else DEMO
        return layers.resolved(
            None, recipe=recipe or default, config=config, settings=over | {"model.path": str(model)}
        )
    if not (folder / "model").is_dir():
        raise ConfigError(
            f"{folder} holds an unfinished run (no model/). Continue it first, or name a checkpoint's model/"
        )
    own = {f"model.{name}": value for name, value in layers.trained(folder).items()}
    return resolve(None, file=read_yaml(folder / "config.yaml"), overrides=layers.nested({**over, **own}))


def settings_of_split(model: Any, recipe: str | None, config: Any, over: Mapping[str, Any]) -> Config:
    """As `settings_of`, for rows of the run's own kind: reward.answer=auto is what the run's training rows made of it, which an
    evaluation of other rows does not read."""
    from unift.training.run.metrics import read_metrics

    found, own = settings_of(model, recipe, config, over), read_metrics(_folder_of(model) / "metrics.jsonl", 0)
    if found.reward.answer != "auto" or found.reward.rule != "unift" or not own or "answer" not in own[0]:
        return found
    return found.model_copy(update={"reward": found.reward.model_copy(update={"answer": own[0]["answer"]})})
