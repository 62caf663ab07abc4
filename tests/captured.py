"""What tests of captured decoding share: policies, recorders that are kept, rollouts and single steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tape import TapeRecorder
from test_scheduler import LONG, PROMPTS, SAMPLES, adapted, make_policy, output
from torch import Tensor

from lit_rlvr.engines import Generation
from lit_rlvr.engines.decoding import Output
from lit_rlvr.engines.graph_steps import StepGraphs
from lit_rlvr.engines.prefill import prefill
from lit_rlvr.engines.scheduler import Scheduler
from lit_rlvr.engines.slots import SlotCache, windows
from lit_rlvr.policy import Policy

FULL: dict[str, Any] = {"layer_types": ["full_attention"] * 2}
KINDS: dict[str, Callable[[], Policy]] = {
    "qwen3": make_policy,
    "llama": lambda: make_policy("llama"),
    "gpt2": lambda: make_policy("gpt2"),
    "granite": lambda: make_policy("granite"),
    "gemma2": lambda: make_policy("gemma2", **FULL),
    "gemma3": lambda: make_policy("gemma3", **FULL),
    "grouped": lambda: make_policy("llama", num_attention_heads=4, num_key_value_heads=2),
    "adapters": adapted,
    "eager": lambda: make_policy(attn_implementation="eager"),
}


class Recorders:
    """Makes recorders, and keeps them."""

    def __init__(self) -> None:
        self.made: list[TapeRecorder] = []

    def __call__(self, purpose: str = "") -> TapeRecorder:
        """One more."""
        self.made.append(TapeRecorder(purpose))
        return self.made[-1]


@torch.no_grad()
def schedule(
    policy: Policy, recorder: Any, max_rows: int = 64, out: Output | None = None
) -> tuple[Generation, Scheduler]:
    """Three responses to each prompt, and what decoded them."""
    out = out or output(policy, LONG)
    scheduler = Scheduler(policy, windows(policy.hf.config) or [], PROMPTS, SAMPLES, max_rows, out, recorder)
    scheduler.run()
    return out.finish(), scheduler


@torch.no_grad()
def step(policy: Policy, captured: bool, columns: int = 5, recorder: Any = TapeRecorder) -> Tensor:
    """Logits of the last of a few steps on given tokens, after ragged prompts."""
    token = torch.arange(2, 2 + len(PROMPTS))
    logits, prompts = prefill(policy, PROMPTS, 2)
    cache, position = SlotCache([None, None], len(PROMPTS)), torch.tensor([len(prompt) for prompt in PROMPTS])
    cache.admit(prompts, torch.arange(len(PROMPTS)), position, int(position.max()))
    steps = StepGraphs(policy, cache, logits, recorder)
    for _ in range(columns):
        if captured:
            taken = steps.next_logits(token, position)
            assert taken is not None
            logits = taken
        else:
            longest = int(position.max())
            seen = torch.arange(longest + 1) >= (longest - position)[:, None]
            logits = policy.next_logits(token[:, None], seen, position[:, None], cache)
        position = position + 1
    return logits.clone()


def on_cuda(policy: Policy) -> Policy:
    """The policy as it would be on a GPU, as far as names go."""
    policy.placed = torch.device("cuda")
    return policy
