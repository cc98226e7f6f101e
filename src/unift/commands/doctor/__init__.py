"""``unift doctor``: what can be checked before time is spent. Reads rows, tokenizer and reward; loads no weights,
but for a server's."""

from __future__ import annotations

import math
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unift.types import Row, UniftError

if TYPE_CHECKING:
    from unift.config.sections import Config
    from unift.rows.dataset import Data, Dataset
LISTED = 10  # targets that are shown with their reason
DEMONSTRATIONS = 50  # training rows whose own solution is scored


@dataclass(frozen=True)
class Check:
    """``text`` says what was found and, where ``ok`` is false, what to do."""

    name: str
    ok: bool
    text: str


def diagnose(config: Config) -> list[Check]:
    """Every check, in the order in which a run would meet its problem. Never raises on a person's mistake."""
    checks = [packages(), threads(config)]
    model, weights = _guard("model", lambda: find_model(config))
    checks.append(model)
    tokenizer_check, tokenizer = _guard("tokenizer", lambda: load_tokenizer(config)) if weights else (None, None)
    checks += [tokenizer_check] if tokenizer_check else []
    if weights:
        checks.append(_guard("forward", lambda: (forward_path(config), True))[0])
        checks.append(_guard("precision", lambda: (weights_move(config, weights[0]), True))[0])
    rows_check, data = _guard("rows", lambda: load_rows(config))
    checks.append(rows_check)
    if data is not None:
        if tokenizer is not None:
            lengths, encoded = _guard("lengths", lambda: measure(config, tokenizer, data))
            checks.append(lengths)
            if encoded:
                checks.append(_guard("room", lambda: (room(config, encoded), True))[0])
                if config.engine.kind == "vllm":
                    checks.append(_guard("engine", lambda: (try_engine(config, tokenizer, encoded), True))[0])
        checks.append(_guard("reward", lambda: try_reward(config, data.train))[0])
    checks.append(_guard("disk", lambda: (disk(config, weights), True))[0])
    return checks


def _guard(name: str, check: Callable[[], tuple[Check, Any]]) -> tuple[Check, Any]:
    """(check, what it loaded); an error becomes a failing check, whatever its kind: the others shall still run."""
    try:
        return check()
    except UniftError as error:
        return Check(name, False, str(error)), None
    except Exception as error:
        return Check(name, False, f"{type(error).__name__}: {error}"), None


def try_engine(config: Config, tokenizer: Any, data: Data) -> Check:
    """The one check that loads weights: a server has to show that it samples from them."""
    from unift.commands.doctor import engine

    return Check("engine", *engine.check(config, tokenizer, data))


# ---------------------------------------------------------------------------------------------- environment


def packages() -> Check:
    """The versions that unift's own metadata asks for."""
    from packaging.requirements import Requirement

    missing, found = [], {}
    for text in metadata.requires("unift") or []:
        need = Requirement(text)
        if need.marker and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            found[need.name] = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            missing.append(f"{need} (not installed)")
            continue
        if not need.specifier.contains(found[need.name], prereleases=True):
            missing.append(f"{need} (found {found[need.name]})")
    if missing:
        wanted = " ".join(f"'{text.split(' (')[0]}'" for text in missing)
        return Check("packages", False, f"{'; '.join(missing)}. Do: pip install {wanted}")
    main = ", ".join(f"{name} {found[name]}" for name in ("torch", "transformers", "accelerate") if name in found)
    return Check("packages", True, f"Python {platform.python_version()}, {main}; {len(found)} requirements met")


def threads(config: Config) -> Check:
    import torch

    from unift.rows.crew import cores as usable

    cores = usable()
    used = config.threads or torch.get_num_threads()
    device, cuda = config.model.device, torch.cuda.is_available()
    if device.startswith("cuda") and not cuda:
        return Check(
            "device", False, f"model.device={device!r}, but torch {torch.__version__} sees no CUDA. Use device=auto"
        )
    where = torch.cuda.get_device_name(0) if cuda and device != "cpu" else "CPU"
    if used > cores:
        return Check(
            "device", False, f"{used} threads on {cores} usable cores slow each other down. Set threads={cores}"
        )
    return Check("device", True, f"{where}, {used} threads on {cores} cores")


# ---------------------------------------------------------------------------------------------- model


def parameters(folder: Path) -> int:
    """Number of parameters from the headers of the weight files; 0 if there are none. GGUF: an upper bound."""
    from safetensors import safe_open

    from unift.model.folder import reading

    count = 0
    for path in folder.glob("*.safetensors"):
        with reading("weights", folder), safe_open(path, "np") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    other = [*folder.glob("*.gguf"), *folder.glob("pytorch_model*.bin")] if not count else []
    return count + sum(2 * path.stat().st_size for path in other)


def find_model(config: Config) -> tuple[Check, tuple[Path, int] | None]:
    from unift.model import architecture
    from unift.model.load import locate

    folder = locate(config.model.path)
    count, bound = parameters(folder), "" if any(folder.glob("*.safetensors")) else "at most "
    if not count:
        text = (
            f"{folder} holds no weights (*.safetensors, *.gguf, pytorch_model*.bin). Set model.path to a complete model"
        )
        return Check("model", False, text), None
    if bound:
        with suppress(Exception):  # what is wrong with it, `forward_path` says
            built = architecture.of(config.model)
            count, bound = (built.numbers, "") if built else (count, bound)
    text = f"{folder}, {bound}{count / 1e6:,.2f} M parameters, {config.model.dtype}"
    return Check("model", True, text), (folder, count)


def forward_path(config: Config) -> Check:
    """Shared prefixes, or the model's own forward and why."""
    from unift.config.stages import longest
    from unift.model.load import expected_path

    return Check("forward", True, expected_path(config.model, longest(config)))


def weights_move(config: Config, folder: Path) -> Check:
    """Can the weights hold the updates of the smallest learning rate of the run?"""
    from unift.config.stages import stages
    from unift.model import precision

    trained = config.model.dtype
    if trained == "bfloat16" and config.model.lora:
        trained = "LoRA adapters (float32)"
    elif trained == "bfloat16" and all(stage.rules.train.master_weights for stage in stages(config)):
        trained = "float32 copies of the bfloat16"
    lr = min(stage.rules.train.lr for stage in stages(config))
    said = precision.warning(precision.of_folder(folder), lr) if trained == "bfloat16" else ""
    return Check("precision", not said, said or f"{trained} weights hold updates of train.lr={lr:g}")


def load_tokenizer(config: Config) -> tuple[Check, Any]:
    from unift.model.load import load_tokenizer as load
    from unift.rows.chat import turn
    from unift.rows.tokens import check_tokenizer

    tokenizer = load(config.model)
    check_tokenizer(tokenizer)
    template = "with" if getattr(tokenizer, "chat_template", None) else "without"
    text = f"{len(tokenizer):,} tokens, EOS {tokenizer.eos_token!r}, pad {tokenizer.pad_token!r}, {template} a chat template"
    closes = turn(tokenizer).end
    if closes != (tokenizer.eos_token_id,):
        text += f" that closes a turn with {tokenizer.decode(closes)!r}"
    return Check("tokenizer", True, text), tokenizer


# ---------------------------------------------------------------------------------------------- rows


def load_rows(config: Config) -> tuple[Check, Dataset | None]:
    from unift.config import needs
    from unift.config.stages import stages
    from unift.rows.dataset import load
    from unift.rows.tasks import canonical
    from unift.rows.tasks.format import partly_marked

    data = load(config)
    train, test = [canonical(r) for r in data.train], [canonical(r) for r in data.test]
    twice, shared = len(train) - len(set(train)), len(set(train) & set(test))
    steps = [len(r.steps) for r in data.train]
    bare = sum(n == 0 for n in steps)
    text = f"{len(train)} for training, {len(test)} held out; {min(steps)} to {max(steps)} steps a solution"
    faults = [said] if (said := partly_marked(data.train)) else []
    if shared:
        faults.append(f"{shared} held-out problems are also training problems: remove them from one side")
    if twice > len(train) // 10:
        faults.append(f"{twice} training rows repeat another row's problem: remove the copies")
    elif twice:
        text += f"; {twice} repeat another row's problem"
    if bare and any(needs.solutions(stage.rules) for stage in stages(config)):
        if config.data.solved == "all":
            faults.append(
                f"{bare} training rows have no steps, so method {config.method!r} has nothing to show: add steps"
            )
        text += f"; {bare} without a solution"
    if not test:
        text += "; nothing measures accuracy (set data.test)"
    return Check("rows", not faults, "; ".join([text, *faults])), data


def measure(config: Config, tokenizer: Any, data: Dataset) -> tuple[Check, Data | None]:
    """Lengths in tokens of every row, and how many prompts cannot be told apart from their solution by tokens."""
    from unift.rows.dataset import encode

    try:
        both = encode(tokenizer, data, config)
    except UniftError as error:
        faults = _unfit(config, tokenizer, data)
        total = len(data.train) + len(data.test)
        count = f"{len(faults)} of {total} rows cannot be encoded. First: {faults[0]}" if faults else str(error)
        return Check("lengths", False, count), None
    encoded, limit = [*both.train.encoded, *both.test.encoded], config.data.max_prompt
    prompt, solution = max(len(e.prompt) for e in encoded), max(len(e.solution) for e in encoded)
    forced = sum(e.forced for e in encoded)
    text = f"longest prompt {prompt} tokens, longest solution {solution} tokens (data.max_prompt {limit})"
    doubled = [e.doubled for e in encoded if e.doubled]
    if doubled:
        text += (
            f"; in {len(doubled)} of {len(encoded)} rows the prompt ends with {doubled[0]} and the solution begins with it: the "
            "solution's is left out"
        )
    if forced > len(encoded) // 100:
        text += (
            f"; in {forced} of {len(encoded)} rows a token spans the end of the prompt, so the boundary is forced: "
            "end the prompt with a line break or another mark of its own"
        )
    return Check("lengths", forced <= len(encoded) // 100, text), both


def _unfit(config: Config, tokenizer: Any, data: Dataset) -> list[str]:
    """What is wrong with each row that cannot be encoded."""
    from unift.rows.dataset import named
    from unift.rows.tokens import encode_row

    faults: list[str] = []
    for rows, source in ((data.train, config.data.train), (data.test, config.data.test)):
        for number, row in enumerate(rows, start=1):
            try:
                encode_row(tokenizer, row, config.data.max_prompt, number, named(source))
            except UniftError as error:
                faults.append(str(error))
    return faults


def room(config: Config, data: Data) -> Check:
    """Do solutions fit into a completion, and prompt, hint and completion into the model's positions?"""
    from unift.config.stages import evaluation_tokens, stages
    from unift.model import limits

    encoded = [*data.train.encoded, *data.test.encoded]
    most = max(evaluation_tokens(config), *(stage.rules.sample.max_tokens for stage in stages(config)))
    longer = sum(len(e.solution) > most for e in encoded)
    try:
        limits.check_positions(config, data)
    except UniftError as error:
        return Check("room", False, str(error))
    context = limits.longest_context(config, data)
    positions = limits.positions(limits.text_settings(config.model.path))
    if longer > len(encoded) // 10:
        need = max(len(e.solution) for e in encoded)
        text = (
            f"{longer} of {len(encoded)} solutions are longer than sample.max_tokens={most}: without a hint the model cannot "
            f"write them. Set sample.max_tokens={need} or more"
        )
        return Check("room", False, text)
    known = f", the model has {positions} positions" if positions else ""
    return Check(
        "room", True, f"up to {context} tokens with a completion of {most}{known}; {longer} solutions are longer"
    )


# ---------------------------------------------------------------------------------------------- reward


def try_reward(config: Config, rows: Sequence[Row]) -> tuple[Check, Any]:
    """The reward must load, give the demonstrations full marks and an empty text less."""
    from unift.rewards import open_scorer
    from unift.rows.tasks.format import check_format, contradictions, meant_right
    from unift.types import Score

    r = config.reward
    with open_scorer(r, rows) as scorer:
        meant = meant_right(rows, config.sample.label)
        taken = isinstance(config.data.solved, int)  # such rows keep the ending of a solution without steps
        whole = (row for row in meant if (row.steps or not taken) and row.solution.strip())
        some = list(islice(whole, DEMONSTRATIONS))
        found = scorer.check(some[0] if some else replace(rows[0], steps=(), ending=""))
        outcomes = scorer.score(some, [row.solution for row in some])
    right = sum(isinstance(o, Score) and o.right for o in outcomes)
    faults = list(found.warnings)
    if right < len(some):
        first = next(row.id for row, o in zip(some, outcomes) if not (isinstance(o, Score) and o.right))
        faults.append(f"row {first!r} is the first whose own solution is not accepted: mend the row or the reward")
    faults += [
        f"row {row.id!r} ends with {other!r}, its column 'answer' has {row.answer!r:.60}: mend the row"
        for _, row, other in contradictions(some)[:1]
        if "task" in found.kind.split("+")
    ]
    try:
        check_format(meant, r.function, r.rule, scorer.answer)
    except UniftError as error:
        faults.append(str(error))
    text = f"{found.reward} ({found.kind}): accepts {right} of {len(some)} demonstrations tried"
    if "task" in found.kind.split("+"):
        text += f"; answers stand in {scorer.answer}" + (" (reward.answer=auto)" if r.answer == "auto" else "")
        text += text_targets(rows)
    return Check("reward", not faults, "; ".join([text, *faults])), found


def text_targets(rows: Sequence[Row]) -> str:
    """The rows whose mathematical target cannot be read, so that only the same text is right. "" if there are none."""
    from unift.rows.tasks.math import unreadable_targets

    found = unreadable_targets(rows)
    if not found:
        return ""
    some = "; ".join(f"row {number} {gold[:60]!r} ({reason})" for number, _, gold, reason in found[:LISTED])
    more = f"; and rows {', '.join(str(number) for number, *_ in found[LISTED:])}" if len(found) > LISTED else ""
    return f"; {len(found)} targets cannot be read as mathematics and are compared as text alone: {some}{more}"


# ---------------------------------------------------------------------------------------------- disk


def disk(config: Config, weights: tuple[Path, int] | None) -> Check:
    """Room for the checkpoints (weights and both moments of AdamW), the best one, one being written, and the model."""
    folder = Path(config.run or "runs").absolute()
    place = next(p for p in (folder, *folder.parents) if p.exists())
    if not os.access(place, os.W_OK) or not place.is_dir():
        return Check("disk", False, f"cannot write to {place}. Name another run folder with --run")
    from unift.model.limits import BYTES

    free, gib = shutil.disk_usage(place).free, 2**30
    if weights is None:
        return Check("disk", True, f"{free / gib:.1f} GiB free at {place}")
    size = weights[1] * BYTES[config.model.dtype]
    need = size * (3 * (config.save.keep + 2 + len(config.phases)) + 1) if config.model.lora is None else 2 * size
    text = f"the run needs about {need / 2**20:,.0f} MiB, {free / gib:.1f} GiB are free at {place}"
    return Check(
        "disk", free > need, text if free > need else f"{text}. Free some, lower save.keep, or use another --run"
    )
