"""Options that do not go together are refused before anything runs, in a sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning.pytorch as pl

if TYPE_CHECKING:
    from lit_rlvr.module import RLVRModule


def check_algorithm(module: RLVRModule) -> None:
    """Refuse combinations of the module's own options.

    Raises:
        ValueError: Saying what to change.
    """
    if module.sampling.truncates:
        raise ValueError(
            "training rollouts are drawn from the full distribution: sampling needs temperature > 0, top_p: 1 and "
            "top_k: 0 (evaluations may truncate)"
        )
    smallest = module.advantage.smallest_group
    if module.batch.responses < smallest:
        raise ValueError(
            f"advantage {type(module.advantage).__name__} compares at least {smallest} responses per prompt, but "
            f"batch.responses is {module.batch.responses}; raise it, or use advantage: Raw"
        )
    if module.dynamic_sampling is not None and module.batch.responses < 2:
        raise ValueError("dynamic_sampling keeps groups with right and wrong responses: batch.responses must be >= 2")
    overlong, limit = module.overlong, module.sampling.max_new_tokens
    if overlong is not None and overlong.width(limit) > limit:
        raise ValueError(
            f"overlong.buffer={overlong.buffer} is wider than sampling.max_new_tokens={limit}: every response would be "
            "punished"
        )
    if module.reference_path is not None and module.kl is None:
        raise ValueError("a reference model is given, but nothing uses it: kl is null")


def check_trainer(module: RLVRModule, trainer: pl.Trainer) -> None:
    """Refuse Trainer options that the loop cannot honour.

    Raises:
        ValueError: Saying what to change.
    """
    _ = module.data  # refuses another data module, or none
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            "trainer.accumulate_grad_batches must be 1: one training step is one optimiser step; lower "
            "batch.micro_tokens to save memory"
        )
    if not trainer.val_check_interval:
        raise ValueError("trainer.val_check_interval must be above 0; use a large number to validate rarely")
    if str(trainer.precision).startswith("16"):
        raise ValueError("trainer.precision 16 needs loss scaling, which the loop does not support; use bf16")
    if module.dtype_name == "float64" and "bf16" in str(trainer.precision):
        raise ValueError(f"dtype float64 and trainer.precision {trainer.precision} contradict each other")
