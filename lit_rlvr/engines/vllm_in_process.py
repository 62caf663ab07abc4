"""Sampling from a vLLM in each rank's own process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lit_rlvr.engines.base import Engine, Generation, Sampling, check_context
from lit_rlvr.engines.in_process import end_tokens
from lit_rlvr.engines.vllm_local import LocalVLLM, check_options, check_vllm
from lit_rlvr.engines.vllm_responses import response_tensors, sampling_parameters
from lit_rlvr.policy import Policy
from lit_rlvr.reduce import Reduce, on_every_rank
from lit_rlvr.weights import named_weights


class VLLMInProcessEngine(Engine):
    """Samples from a vLLM that every rank has in its own process, on its own device.

    vLLM is installed in the environment that trains. Before a phase is sampled, each rank copies the policy's weights
    into those of its vLLM, from memory to memory, a linear layer at a time. A prompt's responses are one request, so
    the prompt is computed once. Their random numbers are fixed by (seed, phase, draw, sample); the responses still
    depend a little on what else is computed at the time, because that changes how sums are rounded. Old
    log-probabilities come from the training model; vLLM's are compared with them.

    Args:
        options: vLLM's own options, as ``vllm.LLM`` takes them: ``{gpu_memory_utilization: 0.4, max_model_len: 9000}``.
        sleep_level: 0: vLLM keeps its memory while the policy learns. 1: it gives up the cache, and moves weights to
            the host's memory. 2: it gives up both, because weights are copied again anyway. Above 0 on GPUs only.

    Raises:
        ValueError: For an option out of range, or one that the engine sets itself.
    """

    def __init__(self, options: dict[str, Any] | None = None, sleep_level: int = 0) -> None:
        if sleep_level not in (0, 1, 2):
            raise ValueError(f"engine.sleep_level must be 0, 1 or 2, got {sleep_level}")
        self.options, self.sleep_level = dict(options or {}), sleep_level
        check_options(self.options)
        self.vllm: LocalVLLM | None = None
        self._pushed: int | None = None
        self._asleep = False
        self._seconds = 0.0

    def exact(self, precision: str) -> bool:
        return False

    def check_overlap(self) -> None:
        raise ValueError(
            "model.overlap needs servers with devices of their own, and VLLMInProcessEngine samples in the process "
            "that trains; start servers with lit-rlvr serve and use VLLMServerEngine"
        )

    def setup(self) -> None:
        """Look for vLLM, and forget which weights it has: another run may have other weights after as many steps."""
        check_vllm()
        self._pushed = None

    def sync(self, policy: Policy, version: int, reduce: Reduce) -> None:
        started = time.perf_counter()
        if self.vllm is None:
            on_every_rank(lambda: self._start(policy, reduce.rank), reduce)
        vllm, asleep, self._asleep = self.vllm, self._asleep, False
        assert vllm is not None
        if asleep:
            on_every_rank(lambda: vllm.wake("weights"), reduce)
        if renewed := self._pushed != version:
            weights = named_weights(policy)
            on_every_rank(lambda: vllm.load(weights), reduce, meanwhile=weights)
        if asleep:  # after the weights, which take some memory on their way
            on_every_rank(lambda: vllm.wake("kv_cache"), reduce)
        if renewed:
            vllm.forget()
            self._pushed = version
        self._seconds += time.perf_counter() - started

    def _start(self, policy: Policy, rank: int) -> None:
        model = str(policy.hf.config.name_or_path)
        self.vllm = LocalVLLM(model, policy.device, rank, self.options, self.sleep_level > 0)

    def rest(self, reduce: Reduce) -> None:
        if self.sleep_level and not self._asleep:
            assert self.vllm is not None
            self.vllm.sleep(self.sleep_level)
            self._asleep = True
            if self.sleep_level == 2:
                self._pushed = None

    def generate(
        self,
        policy: Policy,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        uid: Tensor,
        sampling: Sampling,
        seed: int,
    ) -> Generation:
        assert self.vllm is not None, "sync comes before sampling"
        if not prompts:
            return response_tensors([], [], [])
        raisable = ", or raise engine.options.max_model_len"
        check_context(max(map(len, prompts)), sampling, self.vllm.context, "vLLM's", raisable)
        ends = end_tokens(policy, tokenizer).tolist()
        groups = uid.reshape(len(prompts), -1, 3)
        return self.vllm.sample(prompts, [sampling_parameters(rows, sampling, seed, ends) for rows in groups])

    def metrics(self, reduce: Reduce) -> dict[str, float]:
        metrics = {"time/sync_s": self._seconds}
        self._seconds = 0.0
        return metrics

    def close(self) -> None:
        if self.vllm is not None:
            self.vllm.close()
        self.vllm, self._asleep, self._pushed = None, False, None
