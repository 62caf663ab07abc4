"""Evaluation on held-out prompts: named ways of drawing responses, each with its own metrics."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn

from lit_rlvr.collect import decode, rest
from lit_rlvr.data import EvalTicket
from lit_rlvr.metrics import EvaluationMetrics
from lit_rlvr.reduce import on_every_rank
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
        self.benchmarks: list[str] = []
        self.metrics = torch.nn.ModuleDict({n: EvaluationMetrics(e.samples, e.pass_k) for n, e in evaluations.items()})

    def prepare(self, benchmarks: list[str], device: torch.device) -> None:
        """Have metrics for every way and held-out set; every rank calls it with the same sets."""
        self.benchmarks = benchmarks
        for way, evaluation in self.evaluations.items():
            for benchmark in benchmarks:
                if f"{way}/{benchmark}" not in self.metrics:
                    metrics = EvaluationMetrics(evaluation.samples, evaluation.pass_k)
                    self.metrics[f"{way}/{benchmark}"] = metrics.to(device)

    def update(self, module: RLVRModule, prompts: Sequence[EncodedPrompt]) -> None:
        """Evaluate this rank's ``prompts``, which may be none, in every way; every rank calls it.

        Raises:
            Exception: On every rank, what went wrong on one.
        """
        if module.ahead is not None:
            module.ahead.wait(module.reduce)
        module.engine.sync(module.policy, module.trainer.global_step, module.reduce)
        for name in self.evaluations:
            on_every_rank(partial(self._draw, module, prompts, name), module.reduce)

    def _draw(self, module: RLVRModule, prompts: Sequence[EncodedPrompt], name: str) -> None:
        """Evaluate this rank's ``prompts`` in one way."""
        evaluation = self.evaluations[name]
        n = evaluation.samples
        rows = [(EVALUATION_PHASE, p.prompt.index, s) for p in prompts for s in range(n)]
        tokens = [p.tokens for p in prompts]
        uid = torch.tensor(rows, dtype=torch.int64).view(-1, 3)
        sampling = evaluation.sampling(module.sampling.max_new_tokens)
        out = module.engine.generate(module.policy, module.tokenizer, tokens, uid, sampling, module.seed)
        texts = decode(module.tokenizer, out)
        verdicts = module.data.verifier([p.prompt for p in prompts for _ in range(n)], texts)
        for benchmark in self.benchmarks or (None,):
            of_set = [i for i, p in enumerate(prompts) if p.prompt.benchmark == benchmark]
            own = [i * n + s for i in of_set for s in range(n)]
            metrics = self._metrics(name, benchmark)
            metrics.update([verdicts.scores[i] for i in own], out.rows(torch.tensor(own, dtype=torch.int64)))

    def _metrics(self, way: str, benchmark: str | None) -> EvaluationMetrics:
        metrics = self.metrics[way if benchmark is None else f"{way}/{benchmark}"]
        assert isinstance(metrics, EvaluationMetrics)
        return metrics

    def finish(self, step: int) -> dict[str, float]:
        """``<way>/<metric>`` over all ranks; kept as ``latest`` with its optimiser ``step``, and starts afresh.

        With several held-out sets, ``<way>/<set>/<metric>`` too, and ``<way>/<metric>`` is the mean over the sets.
        """
        out: dict[str, float] = {}
        for way in self.evaluations:
            if not self.benchmarks:
                out |= {f"{way}/{metric}": value for metric, value in self._metrics(way, None).compute().items()}
                continue
            each = {benchmark: self._metrics(way, benchmark).compute() for benchmark in self.benchmarks}
            for metric in dict.fromkeys(metric for values in each.values() for metric in values):
                values = [of_set[metric] for of_set in each.values() if metric in of_set]
                out[f"{way}/{metric}"] = sum(values) / len(values)
            out |= {f"{way}/{b}/{metric}": value for b, values in each.items() for metric, value in values.items()}
        self.latest, self.latest_step = out, step
        return out

    def run(self, module: RLVRModule) -> dict[str, float]:
        """Evaluate all validation prompts at once, outside of the Trainer's own validation; every rank calls it."""
        for ticket in module.data.val_dataloader():
            module.validation_step(ticket, 0)
        metrics = self.finish(module.trainer.global_step)
        rest(module.engine, module.reduce)
        return metrics


class EvaluationSteps(pl.LightningModule):
    """The part of the module that evaluates: Lightning's validation and test loops.

    Args:
        evaluations: The ways of evaluating, by name.
    """

    def __init__(self, evaluations: dict[str, Evaluation]) -> None:
        super().__init__()
        self.evaluator = Evaluator(evaluations)

    def validation_step(self, batch: EvalTicket, batch_idx: int) -> None:
        module: Any = self
        prompts = module.data.encoded(batch.split)[batch.start : batch.stop]
        self.evaluator.prepare(module.data.benchmarks(batch.split), module.device)
        self.evaluator.update(module, prompts[module.reduce.rank :: module.reduce.world_size])

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def test_step(self, batch: EvalTicket, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _report(self, split: str) -> None:
        """Log what was evaluated; during training by ourselves, because Lightning would count one step less."""
        step = self.trainer.global_step
        metrics = {f"{split}/{name}": value for name, value in self.evaluator.finish(step).items()}
        module: Any = self
        rest(module.engine, module.reduce)
        training = self.trainer.state.fn == TrainerFn.FITTING
        self.log_dict(metrics, logger=False if training else None)  # None: True, without a warning where there is none
        if training and not self.trainer.sanity_checking:
            self.emit(metrics, step)

    def emit(self, metrics: dict[str, float], step: int) -> None:
        """Send metrics to every logger once, as of optimiser step ``step`` (from 1), and to ``callback_metrics``."""
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=step)
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
