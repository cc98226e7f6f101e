"""May libraries ask the Hub? Models in folders need nothing from it, so they may not; what the settings name there may be fetched.

huggingface_hub and datasets read HF_HUB_OFFLINE once, when they are imported, so a variable that is set early holds for
whatever the process does later: a name on the Hub after a folder, in one notebook. No torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")  # either forbids all requests
OURS = "UNIFT_KEEPS_OFFLINE"  # it was unift that forbade them, not the person; processes that are started inherit it


def forbid() -> None:
    """No library asks the Hub from here on, but within `allowed`. What a person has set stays."""
    if not any(name in os.environ for name in OFFLINE):
        os.environ |= {OFFLINE[0]: "1", OURS: "1"}


@contextmanager
def allowed() -> Generator[None, None, None]:
    """Lift what `forbid` forbade while something is fetched that the settings name. Offline by a person's wish stays so."""
    if OURS not in os.environ:
        yield
        return
    import huggingface_hub.constants as constants

    loaded = [constants]
    if "datasets" in sys.modules and "HF_DATASETS_OFFLINE" not in os.environ:
        loaded.append(sys.modules["datasets"].config)
    before = [vars(module)["HF_HUB_OFFLINE"] for module in loaded]
    for module in loaded:
        vars(module)["HF_HUB_OFFLINE"] = False
    try:
        yield
    finally:
        for module, value in zip(loaded, before, strict=True):
            vars(module)["HF_HUB_OFFLINE"] = value
