"""Trains a few steps of every case and saves gradients, metrics and choices; test_ddp.py starts it with torchrun."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lit_rlvr_callbacks import ClipCov, EntropyAdvantage, EntropyBonus, EntropyTopK, KLCov, PerplexityShaping
from runs import TINY, EvenTask, Recorder, tiny_module, tiny_trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lit_rlvr import Batch, RLVRDataModule
from lit_rlvr.critic import Critic
from lit_rlvr.engines import Generation, InProcessEngine, Sampling
from lit_rlvr.fsdp1 import FSDP1Strategy
from lit_rlvr.gae import GAE
from lit_rlvr.kl import KLPenalty
from lit_rlvr.lora import LoRA
from lit_rlvr.models import resolve_model
from lit_rlvr.policy import Policy, load_policy
from lit_rlvr.shaping import DynamicSampling
from lit_rlvr.sharding import FSDP2Strategy

STEPS = 6


class Recorded(NamedTuple):
    """Every step's gradients and metrics, the weights at the end, the tokens that learnt in each step, the collectives
    of a generation, and how often gradients were reduced in each step."""

    gradients: list[dict[str, Tensor]]
    metrics: list[dict[str, float]]
    weights: dict[str, Tensor]
    chosen: list[list[tuple[int, ...]]]
    collectives: int = 0
    reductions: tuple[int, ...] = ()


# In ``ragged`` every mini-batch has one prompt, so one of two ranks has nothing to learn from.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "kl": {"kl": KLPenalty(beta=0.5)},
    "dynamic": {"dynamic_sampling": DynamicSampling(3), "gradient_checkpointing": True},
    "ragged": {"batch": Batch(prompts=3, responses=4, minibatch_prompts=1, micro_tokens=40)},
    "ppo": {"advantage": GAE(), "critic": Critic(lr=1e-2), "kl": KLPenalty(beta=0.5, where="reward")},
    "steps": {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=1.0)},
    "bfloat16": {
        "dtype": "float32",
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.03),
        "batch": Batch(4, 4, 2, micro_tokens=50),  # several micro-batches, which two processes cut in another way
    },
}
if find_spec("peft") is not None:
    CASES["lora"] = {"lora": LoRA(), "kl": KLPenalty(beta=0.5)}
"""In ``ragged`` every mini-batch has one prompt, so one of two ranks has nothing to learn from; in ``steps`` callbacks
act in every optimiser step, and these are large."""


def cases(strategy: str) -> list[str]:
    """What a strategy can do."""
    if strategy == "fsdp_offload":
        return ["kl", "bfloat16"]  # a checkpoint and a critic are for resume_run.py
    left_out = {"fsdp1": ["lora"], "fsdp_last": ["plain", "dynamic", "steps", "lora"]}  # it differs from fsdp in little
    return [case for case in CASES if case not in left_out.get(strategy, [])]


class Traffic(TorchDispatchMode):
    """Counts collectives."""

    collectives = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.collectives += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


class Decodes(Callback):
    """Before training, decodes on every rank another number of responses, and counts collectives."""

    collectives = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        rank = trainer.global_rank
        uid = torch.tensor([[0, 0, sample] for sample in range(1 + rank)])
        with Traffic() as traffic:
            sampling = Sampling(max_new_tokens=3 + 5 * rank)
            pl_module.engine.generate(pl_module.policy, pl_module.tokenizer, [[5, 6]], uid, sampling, 0)
        self.collectives = traffic.collectives


class Reductions(TorchDispatchMode):
    """Counts reductions of gradients: of tensors above the size of anything else that a step reduces."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "reduce" in func.__name__:
            tensors = [t for given in args for t in (given if isinstance(given, list) else [given])]
            self.number += max(t.numel() for t in tensors if isinstance(t, Tensor)) > 1000
        return func(*args, **(kwargs or {}))


class CountsReductions(Callback):
    """How often gradients are reduced in each step; a phase's first counts its own large tensors too."""

    def __init__(self) -> None:
        self.reductions: list[int] = []
        self.traffic = Reductions()

    def on_train_batch_start(self, *args: Any) -> None:
        self.traffic = Reductions()
        self.traffic.__enter__()

    def on_after_backward(self, *args: Any) -> None:
        self.traffic.__exit__(None, None, None)
        self.reductions.append(self.traffic.number)


class Chosen(Callback):
    """The tokens of this rank that learn in each step: (phase, draw, sample, position), in order."""

    def __init__(self) -> None:
        self.tokens: list[list[tuple[int, ...]]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        mini = pl_module._mini
        rows, positions = (mini.credit.weight > 0).nonzero(as_tuple=True)
        uid = mini.rollout.uid.to(rows.device)[rows]
        self.tokens.append(sorted(map(tuple, torch.cat([uid, positions[:, None]], 1).tolist())))


class FixedEngine(InProcessEngine):
    """Samples from the float64 model that every case starts from, whatever is trained: the same tokens in bfloat16.

    Its log-probabilities and entropies are taken, so tokens are chosen by numbers that nothing has rounded.
    """

    def exact(self, precision: str) -> bool:
        return True

    def generate(self, policy: Policy, *arguments: Any) -> Generation:
        return super().generate(load_policy(resolve_model(TINY), "float64"), *arguments)


STRATEGIES: dict[str, Callable[[str], Any]] = {
    "ddp": lambda case: "ddp",
    "fsdp": lambda case: FSDP2Strategy(param_dtype="bfloat16" if case == "bfloat16" else None),
    "fsdp_last": lambda case: FSDP2Strategy(param_dtype="bfloat16" if case == "bfloat16" else None, sync="last"),
    "fsdp_offload": lambda case: FSDP2Strategy(
        param_dtype="bfloat16" if case == "bfloat16" else None, cpu_offload=True
    ),
    "fsdp1": lambda case: FSDP1Strategy(
        param_dtype="bfloat16" if case == "bfloat16" else None,
        sharding_strategy="SHARD_GRAD_OP" if case == "kl" else "FULL_SHARD",
    ),
}


def run(case: str, strategy: Any, devices: int, *watching: Callback, **more: Any) -> Recorded:
    """Train a case; ``more`` are further options of the module."""
    options = {"batch": Batch(4, 4, 2, micro_tokens=25), **CASES[case], **more}
    recorder = Recorder()
    callbacks: list[Callback] = [PerplexityShaping(0.3), EntropyTopK(0.1)]
    if case == "steps":
        callbacks = [
            EntropyAdvantage(0.05, scope="mini_batch"),
            ClipCov(0.05, low=0.0),
            KLCov(0.05, 0.7),
            EntropyBonus(0.1, target=9.0, delta=0.1),
        ]
    if case == "bfloat16":
        options["engine"] = FixedEngine()
    mixed = case == "bfloat16" and isinstance(strategy, str) and options["dtype"] == "float32"
    chosen = Chosen()
    module = tiny_module(**options)
    trainer = tiny_trainer(
        STEPS,
        [*callbacks, *watching, recorder, chosen],
        devices=devices,
        strategy=strategy,
        gradient_clip_val=0.5,
        precision="bf16-mixed" if mixed else "32-true",
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=RLVRDataModule(EvenTask()))
    skip = ("time/", "rollout/tokens_per_s", "engine/rows")  # each process decodes its own share
    metrics = [{n: v for n, v in step.items() if not n.startswith(skip)} for step in recorder.metrics]
    return Recorded(recorder.gradients, metrics, recorder.weights, chosen.tokens)


def main(folder: Path, strategies: list[str]) -> None:
    """Run every case under ``strategies`` and write what each rank recorded."""
    torch.set_num_threads(1)
    for strategy in strategies:
        for case in cases(strategy):
            decodes, counts = Decodes(), CountsReductions()
            watching: list[Callback] = [decodes, counts] if case == "kl" else [decodes]
            recorded = run(case, STRATEGIES[strategy](case), 2, *watching)
            recorded = recorded._replace(collectives=decodes.collectives, reductions=tuple(counts.reductions))
            torch.save(tuple(recorded), folder / f"{strategy}_{case}_{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
