"""One vLLM server, reached over HTTP: what it is, sampling, weights, sleep."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from ipaddress import ip_address
from threading import Lock
from typing import Any

import torch
from packaging.specifiers import SpecifierSet

from lit_rlvr.engines.server_side.lit_rlvr_worker import PROTOCOL

log = logging.getLogger(__name__)

SUPPORTED = SpecifierSet(">=0.32,<0.33")
"""Versions of vLLM that the tests ran with. Elsewhere the requests below may mean something else."""

RECEIVER = "lit_rlvr_worker.WeightReceiver"
"""The class in that file, as vLLM is told of it."""

CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Served:
    """What a server serves.

    Args:
        model: Its name for requests.
        context: Longest prompt and response together, in tokens.
        dtype: Dtype that it computes in.
        vocabulary: Size of the vocabulary.
        hidden: Width of the hidden states.
        sleeps: Whether it was started with ``--enable-sleep-mode``.
        workers: Its processes that hold weights, of one replica of the model.
        replicas: Copies of the model.
        nccl: Version of NCCL that its PyTorch has; None without GPUs.
    """

    model: str
    context: int
    dtype: torch.dtype
    vocabulary: int
    hidden: int
    sleeps: bool
    workers: int
    replicas: int
    nccl: list[int] | None


class _FailingError(RuntimeError):
    """What a server says when a repeated request may fare better."""


class VLLMClient:
    """Talks to one server; may be used by several threads.

    Args:
        address: ``http://host:port``.
        timeout: Seconds that a request may take.
        retries: How often a request is repeated when the server does not answer, or fails.
        connections: Most requests at a time.

    Raises:
        ImportError: Without the package requests.
    """

    def __init__(self, address: str, timeout: float, retries: int, connections: int) -> None:
        try:
            import requests
            from requests.adapters import HTTPAdapter
        except ImportError as error:
            raise ImportError("the vLLM engine needs the package requests: pip install 'lit-rlvr[vllm]'") from error
        self.address, self.timeout, self.retries = address.rstrip("/"), timeout, retries
        self.retried, self.closed = 0, False
        self._lock, self._requests, self._session = Lock(), requests, requests.Session()
        self._session.trust_env = False  # a proxy for the internet does not lead to a server beside us
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_connections=1, pool_maxsize=connections))

    def ask(self, method: str, path: str, repeats: int | None = None, **options: Any) -> Any:
        """Send a request, repeat it where that may help, and return the answer's JSON.

        Args:
            method: HTTP's.
            path: On the server.
            repeats: How often it may be repeated; null: ``retries`` times.
            options: Of ``requests``: ``json``, ``params``.

        Raises:
            ConnectionError: When there is no answer after all repeats.
            RuntimeError: When the server refuses, or goes on failing; with its words.
        """
        repeated, repeats = 0, self.retries if repeats is None else repeats
        while True:
            try:
                return self._ask_once(method, path, options)
            except (ConnectionError, _FailingError) as problem:
                if repeated == repeats or self.closed:
                    raise
                log.warning("%s; trying again (%d of %d)", problem, repeated + 1, repeats)
            with self._lock:
                self.retried += 1
            time.sleep(min(2.0**repeated, 30.0))
            repeated += 1

    def _ask_once(self, method: str, path: str, options: dict[str, Any]) -> Any:
        try:
            timeout = (CONNECT_SECONDS, self.timeout)
            answer = self._session.request(method, self.address + path, timeout=timeout, **options)
        except (self._requests.ConnectionError, self._requests.Timeout) as error:
            raise ConnectionError(self._silent(path, error)) from error
        if answer.ok:
            return answer.json() if answer.content else None
        kind = _FailingError if answer.status_code >= 500 or answer.status_code == 429 else RuntimeError
        raise kind(f"the vLLM server at {self.address} refused {path}: {_words(answer)}")

    def _silent(self, path: str, error: Exception) -> str:
        if isinstance(error, self._requests.ReadTimeout):
            return (
                f"the vLLM server at {self.address} did not answer {path} within {self.timeout:g} seconds; raise "
                "model.engine.timeout if its work takes longer"
            )
        return f"there is no vLLM server at {self.address}; start one with: lit-rlvr serve MODEL"

    def call(self, method: str, **arguments: Any) -> list[dict[str, Any]]:
        """Call a method on every worker of the server and return what each said."""
        body = {"method": method, "kwargs": arguments}
        results: list[dict[str, Any]] = self.ask("POST", "/collective_rpc", json=body)["results"]
        return results

    def join(self, **arguments: Any) -> None:
        """Have every worker join a group; not repeated, because by then nobody would be waiting there."""
        self.ask("POST", "/collective_rpc", 0, json={"method": "lit_rlvr_join", "kwargs": arguments})

    def meet(self) -> Served:
        """Find out what the server is.

        Raises:
            ValueError: When it is of another version, or was not started as ``lit-rlvr serve`` starts it.
        """
        version = self.ask("GET", "/version")["version"]
        if not SUPPORTED.contains(version, prereleases=True):
            raise ValueError(
                f"the server at {self.address} is vLLM {version}, and only versions {SUPPORTED} are supported"
            )
        config = self._configuration()
        model, parallel = config["model_config"], config["parallel_config"]
        if model["logprobs_mode"] != "processed_logprobs":
            raise ValueError(
                f"the vLLM server at {self.address} reports {model['logprobs_mode']}, which leave the temperature out; "
                "start it with --logprobs-mode processed_logprobs, as lit-rlvr serve does"
            )
        if parallel["worker_extension_cls"].rpartition(".")[2] != RECEIVER.rpartition(".")[2]:
            raise ValueError(
                f"the vLLM server at {self.address} cannot take weights in; start it with --worker-extension-cls "
                f"{RECEIVER}, as lit-rlvr serve does"
            )
        workers, listed = self.call("lit_rlvr_about"), self.ask("GET", "/v1/models")["data"][0]
        about = workers[0]
        if about["protocol"] != PROTOCOL:
            raise ValueError(
                f"the vLLM server at {self.address} has lit_rlvr_worker.py of another version of lit-rlvr; restart it "
                "with this version's"
            )
        dtype = getattr(torch, model["dtype"].rpartition(".")[2])
        return Served(
            model=listed["id"],
            context=listed["max_model_len"],
            dtype=dtype,
            vocabulary=about["vocabulary"],
            hidden=about["hidden"],
            sleeps=bool(model["enable_sleep_mode"]),
            workers=len(workers),
            replicas=int(parallel["data_parallel_size"]),
            nccl=about["nccl"],
        )

    def _configuration(self) -> dict[str, Any]:
        """The server's own configuration, which it shows in development mode only."""
        try:
            shown: dict[str, Any] = self.ask("GET", "/server_info", params={"config_format": "json"})["vllm_config"]
        except RuntimeError as error:
            raise ValueError(
                f"the vLLM server at {self.address} does not allow weights to be changed; start it with "
                "VLLM_SERVER_DEV_MODE=1 in its environment, as lit-rlvr serve does"
            ) from error
        return shown

    def sample(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """Responses to a prompt, tokens in and tokens out."""
        choices: list[dict[str, Any]] = self.ask("POST", "/inference/v1/generate", json=body)["choices"]
        return choices

    def use_weights(self, version: str) -> None:
        """End an update: forget what was computed with the old weights, and name the new ones.

        Raises:
            RuntimeError: When the update left weights as they were, or others still sample from the server.
        """
        missing = [name for worker in self.call("lit_rlvr_finish") for name in worker["missing"]]
        if missing:
            raise RuntimeError(
                f"the vLLM server at {self.address} has weights that the policy has not, so it serves another model: "
                + ", ".join(missing[:5])
            )
        if not self.ask("POST", "/reset_prefix_cache")["success"]:
            raise RuntimeError(
                f"the vLLM server at {self.address} is at work for somebody else, and would go on with what it "
                "computed from old weights; a server serves one run"
            )
        self.ask("POST", "/update_weight_version", json={"new_version": version})

    def abort(self) -> None:
        """Break off all responses; they end with the reason ``abort``."""
        self.ask("POST", "/abort_requests", json={})

    def sleep(self, level: int) -> None:
        """Give up memory: the cache, and at level 2 the weights too, which level 1 keeps in the host's memory."""
        self.ask("POST", "/sleep", params={"level": level})

    def asleep(self) -> bool:
        """Whether it has given up memory, maybe because a run before ended then."""
        return bool(self.ask("GET", "/is_sleeping")["is_sleeping"])

    def wake(self, what: str) -> None:
        """Take the memory of ``weights`` or ``kv_cache`` back; it samples once it has both."""
        self.ask("POST", "/wake_up", params={"tags": what})

    def close(self) -> None:
        """Close the connections; requests that are under way are not repeated."""
        self.closed = True
        self._session.close()


def is_here(host: str) -> bool:
    """Whether a host is this machine, as far as its name tells.

    >>> [is_here(host) for host in ("localhost", "127.0.0.1", "::1", "node7", "192.0.2.7")]
    [True, True, True, False, False]
    """
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _words(answer: Any) -> str:
    """What a server says about an error."""
    try:
        said = answer.json()
        return str(said["error"]["message"] if "error" in said else said["detail"])
    except (ValueError, KeyError, TypeError):
        return f"status {answer.status_code}"
