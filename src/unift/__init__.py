"""unift: Unified Fine-Tuning (arXiv 2505.16984). One dial from SFT to RFT, and the methods around it.

    import unift

    run = unift.train("uft", model="/models/mine", train=rows, test=test_rows, reward=my_reward, **{"train.lr": 1e-6})
    run.result, run.metrics, run.rollouts(1), run.model(), run.report()

Importing it is light: torch and transformers come with the first call that needs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unift._version import __version__

if TYPE_CHECKING:
    from unift.commands.api import (
        Comparison,
        RunFolder,
        compare,
        evaluate,
        evaluate_suite,
        load_rows,
        load_run,
        preset,
        train,
    )
    from unift.types import Row, Score, UniftError

__all__ = [
    "Comparison",
    "Row",
    "RunFolder",
    "Score",
    "UniftError",
    "__version__",
    "compare",
    "evaluate",
    "evaluate_suite",
    "load_rows",
    "load_run",
    "preset",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'unift' has no attribute {name!r}")
    from unift import types
    from unift.commands import api

    return getattr(types, name) if hasattr(types, name) else getattr(api, name)


def __dir__() -> list[str]:
    return sorted(__all__)
