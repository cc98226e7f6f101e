"""A decode step recorded as a CUDA graph: its hundreds of small kernels are launched by one call.

What is recorded must do the same work at the same addresses each time and must not wait for the device; the sampler's fixed
caches see to that. A step that cannot be recorded is launched kernel by kernel, and a line says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

PAYS = 16  # steps of the same shape from which recording one pays


class Recorded:
    """``step`` as a callable that is launched as a graph where there are enough calls to come. Each call does one step."""

    def __init__(self, step: Callable[[], None]) -> None:
        self.step, self.usable = step, True
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()
        self.forget()

    def forget(self) -> None:
        """Tensors were replaced or have other shapes: what was recorded is void."""
        self._graph, self._warm = None, False

    def __call__(self, to_come: int) -> None:
        """One step. ``to_come``: steps of this shape that are left, this one included."""
        if self._graph is None and (not self.usable or to_come < PAYS):
            self.step()
        elif not self._warm:  # libraries set themselves up in the first step, which must not be recorded
            self._on_stream()
        else:
            if self._graph is None:
                self._graph = self._record()
            self._graph.replay() if self._graph is not None else self.step()

    def _on_stream(self) -> None:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.step()
        torch.cuda.current_stream().wait_stream(self.stream)
        self._warm = True

    def _record(self) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: NCCL's watchdog may ask for its events meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                self.step()  # nothing runs
            return graph
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.usable = False
            reason = str(error).strip().partition("\n")[0][:200]
            warnings.warn(f"decode steps are not recorded as CUDA graphs ({reason})", RuntimeWarning, stacklevel=2)
            return None
