"""Sampling from vLLM servers, which have a copy of the policy that is renewed before every rollout phase."""

from __future__ import annotations

import logging
import tempfile
import time
from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import as_completed
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from lit_rlvr.devices import give_back_unused
from lit_rlvr.engines.background import Background
from lit_rlvr.engines.base import Engine, Generation, Sampling, check_context
from lit_rlvr.engines.in_process import end_tokens
from lit_rlvr.engines.vllm_broadcast import Backend, open_road
from lit_rlvr.engines.vllm_client import Served, VLLMClient
from lit_rlvr.engines.vllm_push import Road, everywhere, push_weights, raise_first
from lit_rlvr.engines.vllm_responses import request, to_generation
from lit_rlvr.policy import Policy
from lit_rlvr.reduce import LocalReduce, Reduce, on_every_rank

log = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")


class VLLMEngine(Engine):
    """What engines with vLLM servers have in common: pushing weights, sampling, sleep.

    Before a phase is sampled, rank 0 pushes the policy's weights to all servers. A prompt's responses are one request,
    so the prompt is computed once. Their random numbers are fixed by (seed, phase, draw, sample); the responses still
    depend a little on what else a server computes at the time, because that changes how sums are rounded.

    Args:
        folder: Where weights wait to be loaded, a file at a time. Null: memory shared on this machine.
        file_megabytes: Size of a file of weights.
        timeout: Seconds that a request may take.
        retries: How often a request is repeated when a server does not answer, or fails.
        requests: Most prompts that are sampled at a time on one server.
        sleep_level: Whether servers give up memory while the policy learns.

    Raises:
        ValueError: For an option out of range.
    """

    def __init__(
        self, folder: str | None, file_megabytes: int, timeout: float, retries: int, requests: int, sleep_level: int
    ) -> None:
        if sleep_level not in (0, 1, 2):
            raise ValueError(f"engine.sleep_level must be 0, 1 or 2, got {sleep_level}")
        if retries < 0:
            raise ValueError(f"engine.retries must be at least 0, got {retries}")
        for name, value in {"file_megabytes": file_megabytes, "timeout": timeout, "requests": requests}.items():
            if value <= 0:
                raise ValueError(f"engine.{name} must be above 0, got {value}")
        self.folder: Path | None = Path(folder) if folder else shared_memory()
        self.backend: Backend | None = None
        self.file_bytes, self.sleep_level, self.requests = file_megabytes * 2**20, sleep_level, requests
        self.timeout, self.retries = timeout, retries
        self.clients: list[VLLMClient] = []
        self.served: list[Served] = []
        self.version: str | None = None
        self._pushed: int | None = None
        self._asleep = False
        self._cancelled = False
        self._road: Road | None = None
        self._reduce: Reduce = LocalReduce()
        self._seconds = 0.0

    @abstractmethod
    def start(self, policy: Policy, reduce: Reduce) -> None:
        """Make sure that ``clients`` reach running servers; every rank calls it before the first sampling of a run."""

    def connect(self, addresses: list[str]) -> None:
        """Make a client for every server; contacts none."""
        self.clients = [VLLMClient(address, self.timeout, self.retries, self.requests) for address in addresses]

    def meet(self) -> None:
        """Ask every server what it is, and whether it sleeps: a run that was killed leaves it as it was."""
        self.served = [client.meet() for client in self.clients]
        self._asleep = any(client.asleep() for client in self.clients)

    def exact(self, precision: str) -> bool:
        return False

    # -- weights -------------------------------------------------------------------------------------------------------

    def setup(self) -> None:
        """Forget which weights were pushed: another run may have other weights after as many steps."""
        self._pushed = None
        self._close_road()

    def sync(self, policy: Policy, version: int, reduce: Reduce) -> None:
        started, self._reduce = time.perf_counter(), reduce
        self._cancelled = False
        if not self.served:
            give_back_unused(policy.device)
            self.start(policy, reduce)
        if asleep := self._asleep:
            self._wake("weights", policy, reduce)
        if self._pushed != version:
            on_every_rank(lambda: self._fits(policy), reduce)
            # No two pushes have the same name, of other runs neither: a server that has lost these weights is found
            # out.
            self.version = reduce.gather(f"{uuid4().hex[:8]}-{version}")[0]
            assert self.version is not None
            dtype = self.served[0].dtype
            road = partial(self._open_road, policy.device)
            push_weights(policy, self.kept(), self.version, dtype, road, self.file_bytes, reduce)
            self._pushed = version
        if asleep:  # after the weights, which take some memory on their way
            self._wake("kv_cache", policy, reduce)
            self._asleep = False
        self._seconds += time.perf_counter() - started

    def kept(self) -> list[VLLMClient]:
        """The servers that this rank looks after, for all ranks: their weights and their sleep."""
        return self.clients if self._reduce.rank == 0 else []

    def _wake(self, what: str, policy: Policy, reduce: Reduce) -> None:
        """Have the servers take memory back, which no rank holds any more: a server is another process."""
        on_every_rank(lambda: give_back_unused(policy.device), reduce)
        on_every_rank(lambda: everywhere(self.kept(), lambda client: client.wake(what)), reduce)

    def _open_road(self, device: torch.device) -> Road:
        """The way for weights, which is opened once in a run."""
        if self._road is None:
            self._road = open_road(self.backend, self.clients, self.served, self.folder, device)
        return self._road

    def _close_road(self) -> None:
        if self._road is not None:
            self._road.close()
        self._road = None

    def _fits(self, policy: Policy) -> None:
        """Refuse servers of another model.

        Raises:
            ValueError: Naming the server and the difference.
        """
        config = policy.hf.config.get_text_config()
        ours = config.vocab_size, config.hidden_size
        for client, served in zip(self.clients, self.served, strict=True):
            theirs = served.vocabulary, served.hidden
            if theirs != ours:
                raise ValueError(
                    f"the vLLM server at {client.address} serves {served.model}, another model than the policy: its "
                    f"vocabulary and hidden size are {theirs[0]} and {theirs[1]}, the policy's {ours[0]} and {ours[1]}"
                )
            if served.dtype != self.served[0].dtype:
                raise ValueError(f"the vLLM server at {client.address} computes in another dtype than the first one")
            if self.sleep_level and not served.sleeps:
                raise ValueError(
                    f"engine.sleep_level is {self.sleep_level}, but the vLLM server at {client.address} cannot sleep; "
                    "start it with --enable-sleep-mode"
                )

    def rest(self, reduce: Reduce) -> None:
        if self.sleep_level and not self._asleep:
            on_every_rank(lambda: everywhere(self.kept(), lambda client: client.sleep(self.sleep_level)), reduce)
            self._asleep = True
            if self.sleep_level == 2:
                self._pushed = None

    # -- sampling ------------------------------------------------------------------------------------------------------

    def generate(
        self,
        policy: Policy,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        uid: Tensor,
        sampling: Sampling,
        seed: int,
    ) -> Generation:
        assert self.version is not None, "sync comes before sampling"
        if not prompts:
            return to_generation([])
        limit, larger = min(served.context for served in self.served), "start the server with a larger --max-model-len"
        check_context(max(map(len, prompts)), sampling, limit, "the vLLM server's", f", or {larger}")
        samples, ends = len(uid) // len(prompts), end_tokens(policy, tokenizer).tolist()
        mine = self.share()

        def ask(i: int) -> list[dict[str, Any]]:
            if self._cancelled:
                raise RuntimeError("sampling was cancelled")
            client, served = mine[i % len(mine)]
            rows = uid[i * samples : (i + 1) * samples]
            choices = client.sample(request(served.model, prompts[i], rows, sampling, seed, ends))
            return self._checked(client, choices, samples)

        with ExitStack() as stack:
            pools = [stack.enter_context(Background(self.requests)) for _ in mine]
            asked = [pools[i % len(mine)].submit(ask, i) for i in range(len(prompts))]
            raise_first(as_completed(asked))
        return to_generation([choice for answer in asked for choice in answer.result()])

    def cancel(self) -> None:
        """Ask for no more, and have this rank's servers break off what they are at."""
        self._cancelled = True
        try:
            everywhere([client for client, _ in self.share()], VLLMClient.abort)
        except (ConnectionError, RuntimeError) as problem:
            log.warning("%s", problem)

    def share(self) -> list[tuple[VLLMClient, Served]]:
        """This rank's servers: every so-many-th, or one that it shares with other ranks."""
        everyone = list(zip(self.clients, self.served, strict=True))
        rank, world = self._reduce.rank, self._reduce.world_size
        return everyone[rank::world] or [everyone[rank % len(everyone)]]

    def _checked(self, client: VLLMClient, choices: list[dict[str, Any]], samples: int) -> list[dict[str, Any]]:
        """A prompt's responses in order, all complete and all drawn from the weights that were pushed."""
        if len(choices) != samples:
            raise RuntimeError(
                f"the vLLM server at {client.address} gave {len(choices)} responses instead of {samples}"
            )
        for choice in choices:
            if choice["finish_reason"] not in ("stop", "length"):
                raise RuntimeError(
                    f"the vLLM server at {client.address} broke off a response: {choice['finish_reason']}"
                )
            used = {span["version"] for span in choice["weight_versions"] or ()}
            if used != {self.version}:
                raise RuntimeError(
                    f"the vLLM server at {client.address} sampled from weights {', '.join(sorted(used))} instead of "
                    f"{self.version}: it was restarted, or another run pushes to it; resume from the last checkpoint"
                )
        return sorted(choices, key=lambda choice: int(choice["index"]))

    # -- around it -----------------------------------------------------------------------------------------------------

    def metrics(self, reduce: Reduce) -> dict[str, float]:
        retried = float(reduce.sum(torch.tensor(sum(client.retried for client in self.clients))))
        metrics = {"engine/retries": retried, "time/sync_s": self._seconds}
        self._seconds = 0.0
        return metrics

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.served = []
        self._close_road()


def shared_memory() -> Path:
    """A folder in memory where there is one, else the folder for temporary files."""
    return SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
