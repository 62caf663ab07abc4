"""A vLLM server's HTTP side without a model: what the engine asks for, in the shapes that vLLM 0.32 answers with."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from lit_rlvr.engines.server_side.lit_rlvr_worker import PROTOCOL, Group, own_address, places, unpack

END = 1


class FakeVLLM:
    """State and answers of a server.

    Attributes:
        asked: Every request: method, path, query and body.
        weights: The weights in use.
        name: Their version.
        fails: A method of the workers that fails.
        fail: How many of the next requests to a path are answered with status 500.
        choices: Makes the choices of a sampling request's body; by default responses that end after two tokens.
        asleep: What has no memory: ``weights``, ``kv_cache``.
        takes_part: Weights are taken in once this is set.
        held: Who holds memory that the server needs to wake up; it refuses to as long as there is somebody.
    """

    def __init__(self, vocabulary: int, hidden: int, **changed: Any) -> None:
        self.asked: list[tuple[str, str, dict[str, Any], Any]] = []
        self.weights: dict[str, Tensor] = {}
        self.name = "default"
        self.fail: dict[str, int] = {}
        self.fails = ""
        self.missing: list[str] = []
        self.asleep = set[str]()
        self.held = set[int]()
        self.takes_part = threading.Event()
        self.takes_part.set()
        self.busy = False
        self.choices: Any = None
        self.aborted = threading.Event()
        self.lock = threading.Lock()
        self._loading: dict[str, Tensor] | None = None
        self.version = changed.pop("version", "0.32.0")
        self.development = changed.pop("development", True)
        self.context = changed.pop("context", 4096)
        self.about = {
            "vocabulary": vocabulary, "hidden": hidden, "protocol": changed.pop("protocol", PROTOCOL),
            "nccl": changed.pop("nccl", None),
        }  # fmt: skip
        self.joins = changed.pop("joins", True)
        self.replicas = changed.pop("replicas", 1)
        self.group: Group | None = None
        self.worker = changed.pop("worker", "lit_rlvr_worker.WeightReceiver")
        self.model = {
            "logprobs_mode": "processed_logprobs", "dtype": "torch.float32", "enable_sleep_mode": False, **changed,
        }  # fmt: skip

    def answer(self, method: str, path: str, query: dict[str, Any], body: Any) -> tuple[int, Any]:
        """Status and JSON for a request."""
        with self.lock:
            self.asked.append((method, path, query, body))
            if self.fail.get(path, 0):
                self.fail[path] -= 1
                return 500, {"error": {"message": "out of luck"}}
        if path == "/collective_rpc":
            if "weights" in self.asleep and body["method"] != "lit_rlvr_about":
                return 500, {"error": {"message": "an illegal memory access was encountered"}}
            if body["method"] == self.fails:
                return 500, {"error": {"message": "out of luck"}}
            try:
                return 200, {"results": [getattr(self, body["method"])(**body["kwargs"])]}
            except RuntimeError as error:
                return 500, {"error": {"message": str(error)}}
        name = path.strip("/").replace("/", "_")
        if not hasattr(self, f"on_{name}") or (name == "server_info" and not self.development):
            return 404, {"detail": "Not Found"}
        answer: tuple[int, Any] = getattr(self, f"on_{name}")(query, body)
        return answer

    def lit_rlvr_about(self) -> dict[str, Any]:
        return self.about

    def lit_rlvr_begin(self) -> dict[str, Any]:
        self._loading = {}
        return {}

    def lit_rlvr_load(self, file: str, number: int) -> dict[str, Any]:
        assert self._loading is not None
        self.takes_part.wait()
        loaded = load_file(file)
        assert not loaded.keys() & self._loading.keys()
        self._loading |= loaded
        return {}

    def lit_rlvr_join(self, host: str, port: int, first: int, **options: Any) -> dict[str, Any]:
        if not self.joins:
            raise RuntimeError("out of reach")
        store = dist.TCPStore(host, port, is_master=False)
        self.group = Group(store, first, address=own_address(host), device=torch.device("cpu"), **options)
        return {}

    def lit_rlvr_receive(self, number: int, weights: list[Any]) -> dict[str, Any]:
        assert self._loading is not None
        if self.group is None:
            raise RuntimeError("not in the group")
        self.takes_part.wait()
        buffer = self.group.empty(places(weights)[-1])
        self.group.broadcast(buffer).wait()
        self._loading |= dict(unpack(buffer, weights))
        return {}

    def lit_rlvr_finish(self) -> dict[str, Any]:
        assert self._loading
        self.weights, self._loading = self._loading, None
        return {"missing": self.missing}

    def on_version(self, query: Any, body: Any) -> tuple[int, Any]:
        return 200, {"version": self.version}

    def on_health(self, query: Any, body: Any) -> tuple[int, Any]:
        return 200, None

    def on_server_info(self, query: Any, body: Any) -> tuple[int, Any]:
        assert query == {"config_format": ["json"]}
        parallel = {"worker_extension_cls": self.worker, "data_parallel_size": self.replicas}
        return 200, {"vllm_config": {"model_config": self.model, "parallel_config": parallel}}

    def on_v1_models(self, query: Any, body: Any) -> tuple[int, Any]:
        return 200, {"data": [{"id": "served", "max_model_len": self.context}]}

    def on_reset_prefix_cache(self, query: Any, body: Any) -> tuple[int, Any]:
        return 200, {"success": not self.busy}

    def on_update_weight_version(self, query: Any, body: Any) -> tuple[int, Any]:
        self.name = body["new_version"]
        return 200, {"success": True}

    def on_is_sleeping(self, query: Any, body: Any) -> tuple[int, Any]:
        return 200, {"is_sleeping": bool(self.asleep)}

    def on_sleep(self, query: Any, body: Any) -> tuple[int, Any]:
        """At level 2 the weights are gone."""
        assert self.model["enable_sleep_mode"]
        if query["level"] == ["2"]:
            self.weights, self.name = {}, "dropped"
        self.asleep = {"weights", "kv_cache"}
        return 200, {"status": "sleeping"}

    def on_wake_up(self, query: Any, body: Any) -> tuple[int, Any]:
        """There is room for the cache once weights have taken the memory that they need on their way."""
        tags = set(query.get("tags", ("weights", "kv_cache")))
        room = not self.held and (tags == {"weights"} or (self.weights and "weights" not in self.asleep))
        if not room:
            return 500, {"error": {"message": "CUDA Error: out of memory"}}
        self.asleep -= tags
        return 200, {"status": "sleeping" if self.asleep else "awake", "tags": query.get("tags")}

    def on_abort_requests(self, query: Any, body: Any) -> tuple[int, Any]:
        assert body == {}
        self.aborted.set()
        return 200, {"status": "aborted", "aborted": 1}

    def on_inference_v1_generate(self, query: Any, body: Any) -> tuple[int, Any]:
        if self.asleep:  # a server would let it wait
            return 503, {"error": {"message": "asleep"}}
        sampling = body["sampling_params"]
        if self.choices is not None:
            return 200, {"choices": self.choices(self, body)}
        # The first token tells whose response it is.
        first = [2 + (sampling["seed"] + i) % (self.about["vocabulary"] - 2) for i in range(sampling["n"])]
        return 200, {"choices": [self.choice(i, [token, END]) for i, token in enumerate(first)]}

    def choice(self, index: int, tokens: list[int], reason: str = "stop") -> dict[str, Any]:
        """A response; the log-probability of a token is minus a quarter of it."""
        scores = [{"token_id": t, "logprob": -t / 4, "rank": 1, "top_logprobs": []} for t in tokens]
        spans = [{"version": self.name, "start": 0, "end": len(tokens)}]
        return {
            "index": index, "finish_reason": reason, "stop_reason": None, "token_ids": tokens,
            "logprobs": {"content": scores}, "weight_versions": spans,
        }  # fmt: skip

    def bodies(self, path: str) -> list[Any]:
        """The bodies of all requests to a path."""
        return [body for _, asked, _, body in self.asked if asked == path]

    def called(self, path: str) -> int:
        """How often a path was asked for."""
        return len(self.bodies(path))


@contextmanager
def serving(fake: FakeVLLM, port: int = 0) -> Iterator[str]:
    """Serve on 127.0.0.1 and give the address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            split = urlsplit(self.path)
            raw = self.rfile.read(int(self.headers.get("content-length", 0)))
            body = json.loads(raw) if raw else None
            status, answer = fake.answer(self.command, split.path, parse_qs(split.query), body)
            content = b"" if answer is None else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = handle_any  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def main() -> None:
    """As a process of its own, started with vLLM's options: a server of the tiny built-in model, until it is ended."""
    import sys

    with serving(FakeVLLM(22, 64, enable_sleep_mode=True), int(sys.argv[sys.argv.index("--port") + 1])):
        threading.Event().wait()


if __name__ == "__main__":
    main()
