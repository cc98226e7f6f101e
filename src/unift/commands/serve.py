"""``unift serve``: a vLLM server with the flags that a run needs, started from a folder whose head is a weight of its own.

vLLM runs in an environment of its own (its requirements pin other versions); nothing of it is imported here.
"""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from unift.types import ConfigError

MODULE = "vllm.entrypoints.openai.api_server"
BLOCK = 32  # tokens of a block of the prefix cache on the CPU: only whole blocks are shared


@dataclass(frozen=True)
class Order:
    """``length``: tokens of a prompt with its completion. ``samples``: completions that a copy decodes side by side.
    ``copies``: of the model, each on ``parts`` GPUs of its own (data and tensor parallelism)."""

    model: str
    folder: Path
    python: str
    length: int
    samples: int
    port: int
    dtype: str
    cpu: bool
    nccl: bool
    host: str = "127.0.0.1"
    copies: int = 1
    parts: int = 1


def environment(order: Order) -> dict[str, str]:
    """What the server needs beside its flags. Its routes for weights ask no one who they are: it listens on loopback unless
    the order names another address."""
    found = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return found | ({"VLLM_CPU_KVCACHE_SPACE": "1"} if order.cpu else {})


def command(order: Order) -> list[str]:
    """The server's command line."""
    line = [order.python, "-m", MODULE, "--model", str(order.folder), "--served-model-name", "policy"]
    line += ["--host", order.host, "--port", str(order.port), "--dtype", order.dtype]
    line += ["--max-model-len", str(order.length), "--max-num-seqs", str(order.samples)]
    # log-probs after the temperature; no settings of the model's own; versions of weights in every answer
    line += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "1", "--generation-config", "vllm"]
    line += ["--enable-scale-out"]
    if order.copies > 1:
        line += ["--data-parallel-size", str(order.copies)]
    if order.parts > 1:
        line += ["--tensor-parallel-size", str(order.parts)]
    if order.nccl:
        line += ["--weight-transfer-config", '{"backend": "nccl"}']
    if order.cpu:  # seeds and chunks of a prompt do not go together there
        line += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(order.length)]
        line += ["--block-size", str(BLOCK), "--enforce-eager"]
    return line


def text(order: Order) -> str:
    """The line for a shell."""
    return " ".join([*(f"{k}={v}" for k, v in environment(order).items()), *map(shlex.quote, command(order))])


def make_folder(order: Order) -> None:
    """The model as a server can take new weights for it: adapters merged, embeddings and head apart."""
    from unift.config.surroundings import Model
    from unift.model.load import load_policy
    from unift.sampling.engines.served import check_place, write_model

    check_place(order.folder)
    policy = load_policy(Model(path=order.model, dtype="float32" if order.dtype == "float32" else "bfloat16"))
    shape = policy.base.config.get_text_config()
    size = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    if order.cpu and (size < 32 or size % 16):  # 32, 64, 80, 96, 112, 128, ...
        raise ConfigError(
            f"{order.model} has attention heads of {size} numbers; vLLM on the CPU takes 32, 64, 80 and other multiples "
            "of 16 from 32 on, and fails at the first request otherwise. Use engine.kind=native"
        )
    write_model(policy, order.folder)


def start(order: Order) -> None:
    """Become the server. Raises ConfigError where the interpreter is not there."""
    import shutil

    found = shutil.which(order.python)
    if found is None:
        raise ConfigError(
            f"--python {order.python} is no interpreter. Name the one of the environment that holds vLLM, or print the line "
            "with --print"
        )
    make_folder(order)
    sys.stdout.flush()
    os.execve(found, command(order), {**os.environ, **environment(order)})
