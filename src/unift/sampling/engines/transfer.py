"""Weights from the trainer's GPU to those of a vLLM server over NCCL, by vLLM's own weight transfer.

Not tested on a GPU: written against the interface of vLLM 0.32, which must be installed beside unift for it. The server is
started with ``--weight-transfer-config '{"backend": "nccl"}'`` (`unift serve --nccl`).
"""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from unift.sampling.engines.http import Call, Server
from unift.types import ConfigError, EngineError

KNOWN = ("0.32.",)  # versions of vLLM whose interface this is
_open: dict[str, Any] = {}  # by URL: the sender, which meets the server's workers once


def send(server: Server, weights: Mapping[str, Tensor]) -> None:
    """All weights, by the first process alone. Raises ConfigError where vLLM or a GPU is missing, EngineError at the deadline."""
    _check(server)
    done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            _send(server, weights)
            done.put(None)
        except BaseException as error:
            done.put(error)

    threading.Thread(target=work, name="unift: weights", daemon=True).start()
    try:
        error = done.get(timeout=server.timeout)
    except queue.Empty:
        raise EngineError(
            f"{server.url} did not take the weights over NCCL within {server.timeout:g} s: trainer and server must reach each "
            "other's GPUs. Use engine.transfer=folder"
        ) from None
    if error is not None:
        raise EngineError(f"{server.url} did not take the weights over NCCL: {error}") from error


def _check(server: Server) -> None:
    if not torch.cuda.is_available():
        raise ConfigError("engine.transfer=nccl goes from GPU to GPU, and torch sees none. Use engine.transfer=folder")
    try:
        own = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        raise ConfigError(
            "engine.transfer=nccl needs vllm installed beside unift, too. Install the server's version, or use "
            "engine.transfer=folder"
        ) from None
    theirs = str(server.ask(Call("named its version", "/version")).get("version"))
    if not (own.startswith(KNOWN) and theirs.startswith(KNOWN)):
        raise ConfigError(
            f"engine.transfer=nccl knows vLLM {', '.join(v + 'x' for v in KNOWN)}; found {own} here and {theirs} at {server.url}. "
            "Use engine.transfer=folder"
        )


def _send(server: Server, weights: Mapping[str, Tensor]) -> None:
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource  # type: ignore[import-not-found]

    class Source(WeightSource):  # pyright: ignore[reportUntypedBaseClass]
        weights: Mapping[str, Tensor]

        def metadata(self) -> list[Any]:
            return [ParamMeta(name, w.dtype, tuple(w.shape)) for name, w in self.weights.items()]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return ((name, w.detach().cuda().contiguous()) for name, w in self.weights.items())

    if server.url not in _open:
        _open[server.url] = _meet(server, Source())
    sender = _open[server.url]
    sender.source.weights = weights
    sender.send_weights()


def _meet(server: Server, source: Any) -> Any:
    from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient  # type: ignore[import-not-found]
    from vllm.distributed.weight_transfer.nccl_engine import (  # type: ignore[import-not-found]
        NCCLTrainerInitInfo,
        NCCLTrainerWeightTransferEngine,
    )

    workers = int(server.ask(Call("counted its workers", "/get_world_size"))["world_size"])
    with socket.socket() as found:
        found.bind(("", 0))
        port = found.getsockname()[1]
    here = socket.gethostbyname(socket.gethostname())
    return NCCLTrainerWeightTransferEngine.trainer_init(
        NCCLTrainerInitInfo(master_address=here, master_port=port, world_size=workers + 1),
        client=HTTPVLLMWeightSyncClient(server.url, timeout=server.timeout),
        source=source,
    )
