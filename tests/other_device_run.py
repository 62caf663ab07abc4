"""Trains every case on the CPU and on a device of its own, and compares them; test_other_device.py starts it."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import other_device
import torch
from lit_rlvr_callbacks import (
    ClipCov,
    DefectPenalty,
    EntropyAdvantage,
    EntropyBonus,
    EntropyTopK,
    KLCov,
    NegativeReinforcement,
    PerplexityShaping,
    PositionShaping,
    PositiveNegative,
    StageDetector,
    TruncatedImportance,
    ZeroVariance,
)
from runs import EvenTask, Recorder, tiny_module
from tiny_models import build, char_tokenizer, random_prompts
from torch import Tensor
from torch.testing import assert_close

from lit_rlvr import Batch, RLVRDataModule
from lit_rlvr.advantages import Raw
from lit_rlvr.critic import Critic
from lit_rlvr.engines import InProcessEngine, Sampling, in_process
from lit_rlvr.gae import GAE
from lit_rlvr.kl import KLPenalty
from lit_rlvr.lora import LoRA
from lit_rlvr.losses import GSPO
from lit_rlvr.policy import Policy
from lit_rlvr.report import Report
from lit_rlvr.rollout_pages import RolloutPages
from lit_rlvr.saving import SavePolicy
from lit_rlvr.settings import Evaluation
from lit_rlvr.shaping import DynamicSampling, OverlongPenalty

STEPS = 4


class Inexact(InProcessEngine):
    """Its log-probabilities are not believed."""

    def exact(self, precision: str) -> bool:
        return False


CASES: dict[str, Callable[[], tuple[dict[str, Any], list[Any]]]] = {
    "shared": lambda: ({}, [PerplexityShaping(0.3), EntropyTopK(0.1)]),
    "padded": lambda: ({"batch": Batch(4, 4, 2, layout="padded")}, [PositionShaping(), EntropyTopK(0.2)]),
    "packed": lambda: (
        {"batch": Batch(4, 4, 2, layout="packed", micro_tokens=60)},
        [ZeroVariance(), PositiveNegative(0.5)],
    ),
    "kl": lambda: (
        {"kl": KLPenalty(beta=0.5), "dynamic_sampling": DynamicSampling(3), "gradient_checkpointing": True},
        [StageDetector(), DefectPenalty(run=2)],
    ),
    "ppo": lambda: (
        {"advantage": GAE(), "critic": Critic(lr=1e-2), "kl": KLPenalty(beta=0.5, where="reward")},
        [EntropyTopK(0.3, scope="mini_batch")],
    ),
    "steps": lambda: (
        {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=1.0)},
        [
            EntropyAdvantage(0.05, scope="mini_batch"),
            ClipCov(0.05, low=0.0),
            KLCov(0.05, 0.7),
            EntropyBonus(0.1, target=9.0, delta=0.1),
        ],
    ),
    "gspo": lambda: ({"loss": GSPO()}, []),
    "micro": lambda: ({"batch": Batch(4, 4, 2, micro_rows=3)}, [EntropyTopK(0.2, scope="micro_batch")]),
    "inexact": lambda: ({"engine": Inexact()}, [TruncatedImportance(1.0)]),
    "negative": lambda: ({"advantage": Raw(), "overlong": OverlongPenalty(8)}, [NegativeReinforcement()]),
    "evaluated": lambda: (
        {
            "evaluations": {
                "sampled": Evaluation(samples=2, max_new_tokens=8),
                "cut": Evaluation(top_p=0.9, top_k=5, max_new_tokens=8),
                "greedy": Evaluation(temperature=0, max_new_tokens=8),
            },
            "sampling": Sampling(max_new_tokens=12, stop=["7"]),
            "engine": InProcessEngine(max_rows=3),
        },
        [],
    ),
}
if find_spec("peft") is not None:
    CASES["lora"] = lambda: ({"lora": LoRA(), "kl": KLPenalty(beta=0.5)}, [])


DECODED = ("qwen3", "gemma2", "gemma3", "plain")
"""Kinds of models that are decoded alone; ``plain``, over transformers' cache."""


def run(case: str, folder: Path, device: torch.device) -> Any:
    """What a case gives on a device: every step's metrics, and the weights at the end."""
    if case in DECODED:
        return decode(case, device)
    options, callbacks = CASES[case]()
    recorder = Recorder()
    files = [Report(), RolloutPages(), SavePolicy()] if case == "evaluated" else []
    elsewhere = device.type != "cpu"
    trainer = pl.Trainer(
        max_steps=STEPS,
        strategy=other_device.strategy() if elsewhere else "auto",
        accelerator="auto" if elsewhere else "cpu",
        callbacks=[*callbacks, *files, recorder],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=0.5,
    )
    trainer.fit(tiny_module(**options), datamodule=RLVRDataModule(EvenTask(), eval_prompts=8))
    skip = ("time/", "rollout/tokens_per_s")
    metrics = [{n: v for n, v in step.items() if not n.startswith(skip)} for step in recorder.metrics]
    return metrics, {name: host(weight) for name, weight in recorder.weights.items()}


def decode(case: str, device: torch.device) -> Any:
    """Tokens and their facts, drawn from a model of one kind by rows that take turns."""
    policy = Policy(build("qwen3" if case == "plain" else case).double()).to(device)
    assert policy.device == device
    uid = torch.cartesian_prod(torch.zeros(1, dtype=torch.int64), torch.arange(4), torch.arange(3))
    with patch.object(in_process, "windows", lambda config: None) if case == "plain" else nullcontext():
        out = InProcessEngine(max_rows=5).generate(
            policy, char_tokenizer(), random_prompts([3, 7, 5, 2]), uid, Sampling(max_new_tokens=12, stop=["7"]), 0
        )
    assert out.entropies is not None
    return [host(facts) for facts in (out.ids, out.mask, out.logprobs, out.entropies, out.truncated)]


def host(tensor: Tensor) -> Tensor:
    """A tensor's numbers on the CPU."""
    return other_device.raw(tensor.data).cpu()


def main(cases: list[str]) -> None:
    """Compare ``cases``."""
    torch.set_num_threads(1)
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            with other_device.available() as reads:
                found = run(case, Path(folder) / "other", other_device.device())
            expected = run(case, Path(folder) / "cpu", torch.device("cpu"))
        try:
            assert_close(found, expected)
        except AssertionError as error:
            sys.exit(f"{case}: {error}")
        assert reads, "nothing was computed on the device"
        print(f"{case}: {dict(reads)}")


if __name__ == "__main__":
    main(sys.argv[1:])
