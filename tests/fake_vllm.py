"""A server that speaks vLLM's routes, with a model of its own that it reads from the folder it is given: completions and
log-probs are real, and weights that do not arrive are not there. ``mode`` names a fault.

    python tests/fake_vllm.py FOLDER [MODE [AFTER [SECONDS]]]    prints its URL, and ends with its standard input

With ``--model`` it takes the command line of a vLLM server, and serves the folder that `unift serve` made.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from unift import rng
from unift.config.surroundings import Model
from unift.model.load import load_policy
from unift.rows.pictures import picture
from unift.sampling.engines import native
from unift.sampling.engines.base import Request
from unift.sampling.engines.served import write_model
from unift.types import Shown

VERSION = "default"  # of a server that nobody gave weights


class Fake:
    """``after``: requests for completions after which ``mode`` begins. ``seconds``: that a completion takes at least. ``at``: host
    and port; 0 is a free one. ``made``: the folder is there already; else it is made of ``model``."""

    def __init__(
        self,
        folder: Path,
        mode: str = "",
        after: int = 0,
        length: int = 64,
        seconds: float = 0.0,
        at=("127.0.0.1", 0),
        made: bool = False,
        model: str = "embedded:lock",
    ) -> None:
        if not made:
            write_model(load_policy(Model(path=model, device="cpu")), folder)
        self.folder, self.mode, self.after, self.length, self.seconds = folder, mode, after, length, seconds
        self.asked, self.resets = 0, 0
        self.pictures: list[list[str]] = []  # of each request that had some
        self.known: set[str] = set()  # pictures whose numbers the scheduler believes to be there
        self.lost = False  # and are not, since the weights changed
        self.lock, self.stopped = threading.Lock(), threading.Event()
        self.start_over()
        self.server = ThreadingHTTPServer(at, self.handler())
        self.server.daemon_threads = True
        self.url = f"http://{at[0]}:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def start_over(self) -> None:
        self.policy, self.version = load_policy(Model(path=str(self.folder), device="cpu")), VERSION

    def close(self) -> None:
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def faulty(self) -> bool:
        return self.asked > self.after

    # ------------------------------------------------------------------------------------------ routes

    def get(self, path: str) -> object:
        if path == "/v1/models":
            return {"data": [{"id": "policy", "max_model_len": self.length, "root": str(self.folder)}]}
        if path == "/is_paused":
            return {"is_paused": self.mode == "paused" and self.faulty}
        if path == "/weight_info":
            return {"weight_version": self.version}
        return {} if path == "/health" else None

    def post(self, path: str, body: dict) -> object:
        if path == "/update_weight_version":
            self.version = body["new_version"]
            return {}
        if path == "/reset_prefix_cache":
            self.resets += 1
            return {"success": self.mode != "cache stays"}
        if path == "/reset_encoder_cache":
            self.known, self.lost = set(), False
            return {}
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            if self.mode != "keeps weights":
                self.reload(Path(body["kwargs"]["weights_path"]))
            return {"results": [None]}
        return self.complete(body) if path == "/inference/v1/generate" else None

    @torch.no_grad()
    def reload(self, folder: Path) -> None:
        new = load_file(folder / "model.safetensors")
        if self.mode == "keeps head":
            new.pop("lm_head.weight")
        if self.mode == "keeps tower":
            new = {name: w for name, w in new.items() if "vision_model" not in name and "connector" not in name}
        self.lost = True
        for name, p in self.policy.base.named_parameters(remove_duplicate=False):
            if name in new:
                p.copy_(new[name])

    def complete(self, body: dict) -> object:
        with self.lock:
            self.asked += 1
            if self.faulty and self.mode == "restarts" and self.version != VERSION:
                self.start_over()
        self.stopped.wait(self.seconds)
        if self.faulty and self.mode in ("stalls", "paused"):
            self.stopped.wait(60)
        if self.faulty and self.mode == "dies":
            threading.Thread(target=self.close, daemon=True).start()
            raise ConnectionError
        if self.faulty and self.mode == "fails":
            raise RuntimeError("EngineCore encountered an issue")
        if self.faulty and self.mode == "nonsense":
            return {"choices": [{"index": 0, "text": "hello"}] * body["sampling_params"]["n"]}
        p = body["sampling_params"]
        n, width = p["n"], p["max_tokens"]
        greedy = p["temperature"] == 0
        draws = None
        if not greedy:
            draws = np.stack([rng.uniforms("fake", p["seed"] + j, shape=(width,)) for j in range(n)])
        prompt, shown = self.prompt(body)
        with self.lock:
            (samples,) = native.generate(
                self.policy, [Request(prompt, draws, shown)], width, 1.0 if greedy else p["temperature"]
            )
            version = self.version
        if self.faulty and self.mode == "too few":
            samples = samples[:-1]
        if self.faulty and self.mode == "cut":
            for s in samples:
                s.tokens, s.logps = s.tokens[:1], s.logps[:1]
        said = body.get("return_token_ids") and self.mode != "old"
        return {
            "prompt_token_ids": prompt if said else None,
            "choices": [
                {
                    "index": j,
                    "token_ids": s.tokens,
                    "logprobs": {"content": [{"token_id": t, "logprob": l} for t, l in zip(s.tokens, s.logps)]},
                    "finish_reason": "stop" if s.finished else "length",
                    "weight_versions": [{"version": version, "tokens": len(s.tokens)}],
                }
                for j, s in enumerate(samples)
            ],
        }

    def prompt(self, body: dict) -> tuple[list[int], Shown | None]:
        """The prompt with as many placeholders of each picture as its own processor makes, as vLLM does it; and the pictures."""
        urls, tokens = [part["url"] for part in body.get("content_parts", [])], body["token_ids"]
        if self.mode == "old":  # a server that knows no such part of a call
            urls = []
        if not urls:
            return tokens, None
        if self.mode == "no pictures":
            raise ValueError("At most 0 image(s) may be provided in one prompt.")
        with self.lock:
            self.pictures.append(urls)
            if self.lost and self.known & set(urls):
                raise RuntimeError("Encoder cache miss")
            self.known |= set(urls)
        found, reader, tokenizer = [picture(url, "fake") for url in urls], self.policy.reader, self.policy.tokenizer
        left, out = iter(found), []
        for token in tokens:
            if token != tokenizer.convert_tokens_to_ids(reader.token):
                out.append(token)
                continue
            text = reader.expand(reader.token, [next(left)], "fake")
            out += tokenizer(text, add_special_tokens=False)["input_ids"]
            if self.mode == "other processor":
                out += tokenizer(" ", add_special_tokens=False)["input_ids"]
        assert next(left, None) is None, "fewer places than pictures"
        return out, Shown(tuple(found), len(out))

    # ------------------------------------------------------------------------------------------ HTTP

    def handler(fake) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None: ...

            def do_GET(self) -> None:
                if fake.faulty and fake.mode in ("stalls",):
                    fake.stopped.wait(60)
                self.answer(lambda: fake.get(self.path))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])) or b"{}")
                self.answer(lambda: fake.post(self.path, body))

            def answer(self, made) -> None:
                try:
                    found, status = made(), 200
                except ConnectionError:
                    self.close_connection = True
                    self.connection.close()
                    return
                except (RuntimeError, ValueError) as error:
                    found, status = {"error": str(error)}, 400 if isinstance(error, ValueError) else 500
                if found is None:
                    found, status = {"detail": "Not Found"}, 404
                text = b"<html>hello</html>" if fake.mode == "html" else json.dumps(found).encode()
                try:
                    self.send_response(status)
                    self.send_header("content-length", str(len(text)))
                    self.end_headers()
                    self.wfile.write(text)
                except OSError:
                    self.close_connection = True

        return Handler


def wait(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)


def as_server() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path)
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--max-model-len", type=int)
    order, _ = parser.parse_known_args()
    fake = Fake(order.model, length=order.max_model_len, at=(order.host, order.port), made=True)
    fake.stopped.wait()


@contextmanager
def apart(folder: Path, mode: str = "", after: int = 0, seconds: float = 0.0) -> Iterator[str]:
    """The URL of one in a process of its own: this one may train meanwhile, whose switches of PyTorch are its own."""
    command = [sys.executable, __file__, str(folder), mode, str(after), str(seconds)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "--model" in sys.argv:
        as_server()
        sys.exit()
    place, mode, after, seconds = [*sys.argv[1:], "", "0", "0"][:4] if len(sys.argv) == 2 else sys.argv[1:]
    with Fake(Path(place), mode, int(after), seconds=float(seconds)) as served:
        print(served.url, flush=True)
        sys.stdin.read()
