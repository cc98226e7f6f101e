"""vLLM in a process and environment of its own, asked over HTTP; nothing of it is imported here. `unift serve` starts one.

Token ids (and pictures) go in; ids, log-probs and the version of the weights come out, one request a group, so that a prompt
with its hint is computed once. After an update the weights go through a folder that both see (or from GPU to GPU,
``transfer.py``), the prefix cache is emptied, and the version is set: every completion names the one that it was sampled with.
"""

from __future__ import annotations

import math
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from unift import processes
from unift.config.surroundings import Engine as Settings
from unift.model.policy import Policy
from unift.sampling.engines import draw, pictures, served
from unift.sampling.engines.base import Draws, Request, Watch, unwatched
from unift.sampling.engines.http import Call, Server
from unift.types import ConfigError, EngineError, Sample

COLDEST = 0.01  # vLLM takes a lower temperature for this one
BARRED = -100.0  # added to the logits of ids that are no token
NONE = -9999.0  # what vLLM answers in place of a log-prob that is -inf or NaN
GENERATE = "/inference/v1/generate"
ABOVE_ZERO = 1e-3  # rounding that a log-prob may have


def connect(settings: Settings, folder: Path, longest: int) -> VLLM:
    """The engine at ``engine.url``. Raises EngineError where no server answers there, or one that cannot do the work."""
    server = Server(settings.url.rstrip("/"), settings.timeout)
    found = server.ask(Call("listed its models", "/v1/models"))
    try:
        (card,) = found["data"]
        name, limit, root = str(card["id"]), int(card["max_model_len"]), str(card["root"])
    except (KeyError, TypeError, ValueError):
        raise EngineError(
            f"{server.url}/v1/models names no model with a max_model_len (found {found!r:.200}): it is no vLLM server with "
            "one model. Look at engine.url"
        ) from None
    if longest > limit:
        raise EngineError(
            f"{server.url} takes {limit} tokens of prompt and completion, the run needs {longest}: it would cut completions "
            f"without a word. Start it with --max-model-len {longest} (unift serve --length {longest})"
        )
    if server.ask(Call("said whether it is paused", "/is_paused")).get("is_paused"):
        raise EngineError(f"{server.url} is paused (someone sent /pause). Send POST {server.url}/resume")
    if served.tied(root):
        raise EngineError(
            f"{server.url} serves {root}, whose embeddings and head are tied: it would keep the old head when it takes new "
            "weights. Start it from a folder that unift serve made"
        )
    # Part of every version, so that what another run left in the server is never taken for this one's.
    own = processes.lead("the engine", lambda: secrets.token_hex(4))
    place = Path(settings.folder or folder / "engine").absolute()
    return VLLM(server, name, limit, place, own, settings.transfer, private=settings.folder is None)


@dataclass
class VLLM:
    """``limit``: tokens of a prompt with its completion. ``folder``: of the weights, seen by the server under this path."""

    server: Server
    model: str
    limit: int
    folder: Path
    own: str
    transfer: str
    version: str = ""
    ends: list[int] = field(default_factory=list[int])
    barred: dict[int, float] = field(default_factory=dict[int, float])
    placeholders: frozenset[int] = frozenset()  # of pictures; none: a model of text
    closed: bool = False
    private: bool = False  # nobody else has files in the folder: it lies in that of the run

    # ------------------------------------------------------------------------------------------ weights

    def sync(self, policy: Policy, version: Callable[[], str]) -> None:
        self.ends, self.barred = draw.ending(policy), _barred(policy)
        self.placeholders = frozenset() if policy.reader is None else policy.reader.placeholders
        wanted = f"{self.own}-{version()}"
        with policy.whole():
            self.version = processes.lead(
                "the weights of the server", lambda: self._bring(lambda: served.state(policy), wanted)
            )

    def sampling(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _bring(self, state: Callable[[], Mapping[str, Tensor]], version: str) -> str:
        """The server has these weights under this version, or EngineError."""
        if self._has() == version:
            return version
        if self.transfer == "nccl":
            from unift.sampling.engines import transfer

            transfer.send(self.server, state())
        else:
            self._reload(state(), version)
        self._forget()
        self.server.ask(Call("took the version of its weights", "/update_weight_version", {"new_version": version}))
        found = self._has()
        if found != version:
            raise EngineError(
                f"{self.server.url} says that its weights are {found!r} after it was sent {version!r}: another run sends it "
                "weights, too, or it was started again. One server serves one run"
            )
        return version

    def _has(self) -> Any:
        return self.server.ask(Call("named its weights", "/weight_info")).get("weight_version")

    def _reload(self, weights: Mapping[str, Tensor], version: str) -> None:
        place = self.folder / f"weights-{version}"
        served.write(weights, place)
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(place)}}
        try:
            self.server.ask(
                Call(f"read weights from {place}, which it must see under this path", "/collective_rpc", body)
            )
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _forget(self) -> None:
        """Empty what was computed by the old weights: the prefix cache, refused while a request still runs, and then what the
        tower made of pictures."""
        end = time.monotonic() + self.server.timeout
        call = Call("emptied its prefix cache", "/reset_prefix_cache", {})
        while self.server.ask(call).get("success") is not True:
            if time.monotonic() > end:
                raise EngineError(
                    f"{self.server.url} could not empty its prefix cache within {self.server.timeout:g} s: requests of someone "
                    "else hold it. One server serves one run"
                )
            time.sleep(0.2)
        if self.placeholders:
            self.server.ask(Call("emptied its cache of pictures", "/reset_encoder_cache", {}))

    # ------------------------------------------------------------------------------------------ completions

    def generate(
        self, requests: Sequence[Request], max_tokens: int, temperature: float = 1.0, watch: Watch = unwatched
    ) -> list[list[Sample]]:
        if not self.version:
            raise EngineError("an engine was asked for completions before it was given weights")
        results: list[list[Sample]] = [[] for _ in requests]
        done = 0

        def seen(index: int, answer: Any) -> None:
            nonlocal done
            if self.closed:  # asked from another thread (sampling/ahead.py), whose run is over
                raise EngineError(f"the run that asked {self.server.url} has ended")
            results[index] = self._samples(answer, requests[index], max_tokens)
            done += 1
            watch(done)

        self.server.ask_all([self._call(r, max_tokens, temperature) for r in requests], seen)
        return results

    def _call(self, request: Request, max_tokens: int, temperature: float) -> Call:
        if len(request.prompt) + max_tokens > self.limit:
            raise EngineError(
                f"a prompt of {len(request.prompt)} tokens and a completion of {max_tokens} take more than the {self.limit} "
                f"that {self.server.url} was started with (--max-model-len)"
            )
        asked: dict[str, Any] = {"n": request.samples, "max_tokens": max_tokens, "stop_token_ids": self.ends}
        asked |= {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "logprobs": 0, "ignore_eos": True, "detokenize": False}
        if self.barred:
            asked["logit_bias"] = {str(i): bias for i, bias in self.barred.items()}
        if request.draws is None:
            asked["temperature"] = 0.0
        elif not isinstance(request.draws, Draws):
            raise EngineError("uniforms cannot be sent to a server: name them by their address (Draws)")
        elif temperature < COLDEST:
            raise ConfigError(
                f"sample.temperature={temperature:g}: vLLM takes it for {COLDEST:g}, so log-probs would not be the trainer's. "
                f"Use {COLDEST:g} or more"
            )
        else:
            asked |= {"temperature": temperature, "seed": request.draws.seed()}
        body = {"model": self.model, "token_ids": request.prompt, "sampling_params": asked}
        if (shown := request.shown) is None:
            return Call("completed prompts", GENERATE, body)
        what = "completed a prompt with pictures"
        return Call(what, GENERATE, lambda: body | pictures.asked(request.prompt, shown), pictures.REFUSED)

    def _samples(self, answer: Any, request: Request, max_tokens: int) -> list[Sample]:
        """The completions of one request, looked at closely: what is wrong here would train silently."""
        try:
            if request.shown:
                pictures.check(self.server.url, answer.get("prompt_token_ids"), request.prompt, self.placeholders)
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            if len(choices) != request.samples:
                self._wrong(f"{len(choices)} completions of a prompt, expected {request.samples}")
            return [self._sample(choice, max_tokens) for choice in choices]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EngineError(
                f"{self.server.url} completed a prompt with an answer of an unknown form ({type(error).__name__}: {error}): "
                f"{answer!r:.200}. vLLM 0.32 and later are known"
            ) from error

    def _sample(self, choice: Mapping[str, Any], max_tokens: int) -> Sample:
        tokens = [int(t) for t in choice["token_ids"]]
        content = choice["logprobs"]["content"]
        logps = [float(c["logprob"]) for c in content]
        versions = {str(span["version"]) for span in choice["weight_versions"]}
        if versions != {self.version}:
            self._wrong(
                f"a completion by weights {', '.join(sorted(versions)) or 'without a version'}, expected {self.version}: it was "
                "started again, or another run sends it weights"
            )
        if choice["finish_reason"] not in ("stop", "length"):
            self._wrong(f"a completion that ended by {choice['finish_reason']!r}: someone stopped its requests")
        if not tokens or len(tokens) > max_tokens:
            self._wrong(f"a completion of {len(tokens)} tokens, expected 1 to {max_tokens}")
        finished = tokens[-1] in self.ends
        if len(tokens) < max_tokens and not finished:
            self._wrong(f"a completion that was cut after {len(tokens)} of {max_tokens} tokens without an end token")
        if any(t in self.ends for t in tokens[:-1]):
            self._wrong("a completion that goes on after its end token")
        if [int(c["token_id"]) for c in content] != tokens:
            self._wrong("log-probs of other tokens than it sampled")
        if min(tokens) < 0 or any(t in self.barred for t in tokens):
            self._wrong(f"ids that are no tokens ({min(tokens)} to {max(tokens)})")
        if not all(math.isfinite(l) and NONE < l < ABOVE_ZERO for l in logps):
            self._wrong(f"log-probs that are none ({min(logps)} to {max(logps)}): its weights may not be finite")
        return Sample(tokens, logps, finished)

    def _wrong(self, what: str) -> None:
        raise EngineError(
            f"{self.server.url} answered with {what}. The same command continues from the last checkpoint"
        )

    def close(self) -> None:
        """The server goes on; weights that were put into the folder do not. What others have there stays."""
        self.closed = True
        if not processes.first():
            return
        if self.private:  # with what a killed attempt left
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        for left in self.folder.glob(f"*weights-{self.own}-*"):
            shutil.rmtree(left, ignore_errors=True)
        with suppress(OSError):  # someone's files
            self.folder.rmdir()


def _barred(policy: Policy) -> dict[int, float]:
    """Ids that the head has logits for and the tokenizer no token, with what is added to their logits."""
    if policy.token_ids is None:
        return {}
    known = set(policy.token_ids.tolist())
    return {i: BARRED for i in range(policy.head.weight.shape[0]) if i not in known}
