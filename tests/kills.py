"""A run that ends in the middle of its work, as a kill ends it: nothing is saved on the way out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest


class Killed(Exception):
    pass


@contextmanager
def killed(
    module: ModuleType, name: str, at: int, after: bool = False, error: type[BaseException] = Killed
) -> Iterator[None]:
    """A run inside ends with ``error`` where this function of the loop begins its step ``at``, counted from 0, or ``after`` it;
    it is a failure if the run does not."""
    real = getattr(module, name)

    def stop(run, moment, *rest):
        if moment.step != at:
            return real(run, moment, *rest)
        if after:
            real(run, moment, *rest)
        raise error

    with pytest.MonkeyPatch.context() as patch, pytest.raises(error):
        patch.setattr(module, name, stop)
        yield
