"""Evaluation on held-out prompts: named ways of drawing responses, each with its own metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lit_rlvr.collect import decode
from lit_rlvr.metrics import EvaluationMetrics
from lit_rlvr.settings import Evaluation
from lit_rlvr.types import EncodedPrompt

if TYPE_CHECKING:
    from lit_rlvr.module import RLVRModule

EVALUATION_PHASE = -1
"""Takes the place of the phase in the random numbers, so that every evaluation draws with the same ones."""


class Evaluator(torch.nn.Module):
    """Draws responses in every configured way and keeps their metrics.

    Args:
        evaluations: The ways, by name.
    """

    def __init__(self, evaluations: dict[str, Evaluation]) -> None:
        super().__init__()
        self.evaluations = evaluations
        self.latest: dict[str, float] = {}
        self.latest_step = -1
        self.metrics = torch.nn.ModuleDict({n: EvaluationMetrics(e.samples, e.pass_k) for n, e in evaluations.items()})

    def update(self, module: RLVRModule, prompts: Sequence[EncodedPrompt]) -> None:
        """Evaluate this rank's ``prompts`` in every way."""
        if not prompts:
            return
        for name, evaluation in self.evaluations.items():
            n = evaluation.samples
            rows = [(EVALUATION_PHASE, p.prompt.index, s) for p in prompts for s in range(n)]
            tokens = [p.tokens for p in prompts]
            uid = torch.tensor(rows)
            sampling = evaluation.sampling(module.sampling.max_new_tokens)
            out = module.engine.generate(module.policy, module.tokenizer, tokens, uid, sampling, module.seed)
            texts = decode(module.tokenizer, out)
            verdicts = module.data.verifier([p.prompt for p in prompts for _ in range(n)], texts)
            metrics = self.metrics[name]
            assert isinstance(metrics, EvaluationMetrics)
            metrics.update(verdicts.scores, out)

    def finish(self, step: int) -> dict[str, float]:
        """``<way>/<metric>`` over all ranks; kept as ``latest`` with its optimiser ``step``, and starts afresh."""
        out: dict[str, float] = {}
        for name, metrics in self.metrics.items():
            assert isinstance(metrics, EvaluationMetrics)
            out |= {f"{name}/{metric}": value for metric, value in metrics.compute().items()}
        self.latest, self.latest_step = out, step
        return out

    def run(self, module: RLVRModule) -> dict[str, float]:
        """Evaluate all validation prompts at once, outside of the Trainer's own validation; every rank calls it."""
        for ticket in module.data.val_dataloader():
            module.validation_step(ticket, 0)
        return self.finish(module.trainer.global_step)
