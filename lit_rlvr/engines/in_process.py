"""Generation with the policy itself: no second copy of the weights, exact log-probabilities and entropies."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lit_rlvr.engines import graphs, plain, room
from lit_rlvr.engines.base import Engine, Generation, Sampling, check_context
from lit_rlvr.engines.capture import CudaRecorder, Recorder
from lit_rlvr.engines.decoding import Output
from lit_rlvr.engines.graphs import why_not
from lit_rlvr.engines.narrow import narrowed_linears
from lit_rlvr.engines.scheduler import Scheduler
from lit_rlvr.engines.slots import SPARE, windows
from lit_rlvr.engines.unrecorded import unrecorded
from lit_rlvr.matmul import packed_linears
from lit_rlvr.policy import Policy
from lit_rlvr.reduce import Reduce
from lit_rlvr.sharding import gathered

log = logging.getLogger(__name__)


class InProcessEngine(Engine):
    """Samples from the policy module in this process.

    Each prompt is prefilled once and its cache is repeated over the group; rows leave the batch as they finish, and
    waiting ones take their place. Every random number is a function of (seed, phase, draw, sample, position), so
    responses do not depend on how rows are batched or spread over ranks. Architectures that keep more than each
    layer's own keys and values (linear attention, state spaces, chunked attention) are decoded batch after batch, over
    transformers' own cache.

    Args:
        max_rows: Most responses decoded at a time; bounds the memory of the key-value cache. On a CUDA device they are
            fewer where the memory that is free has no room for so many of the longest possible length.
        pack_weights: On an x86 CPU in float32, decode with copies of the linear layers' weights in an order that
            multiplies faster. They take as much memory as the weights, until the rollout is over.
        graphs: Capture decoding steps as CUDA graphs, which saves launching hundreds of kernels per token. Keys and
            values then get room for 256 tokens more at a time, not 64, and for as many more than the longest row needs,
            or an eighth. Null: on a CUDA device, where the model allows it: not with sliding windows, a dynamic rotary
            embedding, or weights that are spread over devices. Each rollout compares a step with the same step without
            graphs, and goes on without them if they differ.

    Raises:
        ValueError: For ``max_rows`` below 1.
        RuntimeError: With ``graphs: true``, when CUDA cannot capture; with null this is a warning, and the rollout goes
            on without graphs.
    """

    def __init__(self, max_rows: int = 256, pack_weights: bool = True, graphs: bool | None = None) -> None:
        if max_rows < 1:
            raise ValueError(f"engine.max_rows must be at least 1, got {max_rows}")
        self.max_rows, self.pack_weights, self.graphs = max_rows, pack_weights, graphs
        self._steps, self._rows = 0, 0
        self._said = False
        """Whether it has been said that fewer rows fit."""

    def exact(self, precision: str) -> bool:
        return precision in ("32-true", "32", "64-true", "64")

    @torch.no_grad()
    def generate(
        self,
        policy: Policy,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        uid: Tensor,
        sampling: Sampling,
        seed: int,
    ) -> Generation:
        samples = len(uid) // max(len(prompts), 1)
        assert samples * len(prompts) == len(uid)
        assert all(prompts)
        out = Output(tokenizer, end_tokens(policy, tokenizer), uid.to(policy.device), sampling, seed)
        was_training = policy.training
        policy.eval()
        try:
            packed = packed_linears(policy) if self.pack_weights else nullcontext()
            with gathered(policy), packed, narrowed_linears(policy, policy.device), unrecorded(policy):
                self._check_context(policy, prompts, sampling)  # in here: alone, a rank would miss the gathering
                if len(uid):
                    self._decode(policy, prompts, samples, out)
        finally:
            policy.train(was_training)
        self._steps, self._rows = self._steps + out.steps, self._rows + out.drawn
        return out.finish()

    def metrics(self, reduce: Reduce) -> dict[str, float]:
        rows, steps = reduce.sum(torch.tensor([self._rows, self._steps])).tolist()
        self._steps, self._rows = 0, 0
        return {"engine/rows": rows / steps if steps else 0.0}

    def _check_context(self, policy: Policy, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        limit = policy.context_length
        if limit is not None:
            check_context(max(map(len, prompts), default=0), sampling, limit, "the model's")

    def _decode(self, policy: Policy, prompts: Sequence[Sequence[int]], samples: int, out: Output) -> None:
        reach = windows(policy.hf.config)
        recorder = self._recorder(policy, reach)
        spare = SPARE if recorder is None else graphs.SPARE
        new = out.sampling.max_new_tokens
        needs = partial(room.needs, policy, prompts, samples, new, spare, reach is not None)
        rows = self._rows_that_fit(policy.device, min(self.max_rows, samples * len(prompts)), needs)
        if reach is None:
            plain.decode(policy, prompts, samples, rows, out)
        else:
            Scheduler(policy, reach, prompts, samples, rows, out, recorder).run()

    def _rows_that_fit(self, device: torch.device, wanted: int, needs: Callable[[], room.Needs]) -> int:
        """As many as are wanted, or fit into memory; random numbers do not depend on what is decoded together."""
        free = room.free_memory(device)
        if free is None:
            return wanted
        needed = needs()
        fitting = needed.rows(free)
        if fitting < wanted and not self._said:
            log.warning(
                "%d rows at a time fit into the free memory of %s, not %d: the longest may take "
                "%.2f GiB, and %.1f GiB are free",
                fitting, device, wanted, needed.row / 2**30, free / 2**30,
            )  # fmt: skip
            self._said = True
        return min(wanted, fitting)

    def _recorder(self, policy: Policy, reach: list[int | None] | None) -> Callable[[str], Recorder] | None:
        """Makes what captures steps; None: they are not captured."""
        if self.graphs is False:
            return None
        reason = why_not(policy, reach)
        if reason is None:
            return partial(CudaRecorder, policy.device, bool(self.graphs))
        if self.graphs:
            raise ValueError(f"engine.graphs: true is not possible: {reason}; leave it null")
        return None


def end_tokens(policy: Policy, tokenizer: Any) -> Tensor:
    """Every token that ends a response: the tokenizer's, the model's and its generation configuration's."""
    ends: set[int] = set()
    for source in (tokenizer, policy.hf.config, policy.hf.generation_config):
        value = getattr(source, "eos_token_id", None)
        ends.update(value if isinstance(value, list) else [] if value is None else [value])
    return torch.tensor(sorted(ends), dtype=torch.int64)
