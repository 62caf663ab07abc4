"""Single functions out of TRL's source files, without the 10 seconds that importing its trainer takes."""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor


@lru_cache
def trl_function(file: str, name: str, **names: Any) -> Any:
    """Compile the function or method ``name`` of trl's ``file``; ``names`` are the globals it needs beside torch."""
    spec = find_spec("trl")
    if spec is None or spec.origin is None:
        pytest.skip("trl is not installed")
    tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name]
    assert len(found) == 1, f"trl's {file} holds {len(found)} definitions of {name}"
    namespace: dict[str, Any] = {"torch": torch, **names}
    exec(compile(ast.Module(body=[found[0]], type_ignores=[]), file, "exec"), namespace)
    return namespace[name]


def trl_entropy_mask(entropies: Tensor, mask: Tensor, rho: float, everywhere: Tensor | None = None) -> Tensor:
    """TRL's mask of the tokens whose entropy reaches the (1 - rho) quantile.

    Args:
        entropies: This rank's entropies [B, T].
        mask: This rank's response tokens [B, T].
        rho: TRL's ``top_entropy_quantile``.
        everywhere: The entropies of all ranks' response tokens, where there are several.
    """

    def gather(own: Tensor) -> Tensor:
        return own if everywhere is None else everywhere

    accelerator = SimpleNamespace(pad_across_processes=lambda own, **_: own, gather=gather)
    method = trl_function("trainer/grpo_trainer.py", "get_high_entropy_mask")
    found: Tensor = method(SimpleNamespace(accelerator=accelerator), entropies, mask, 1 - rho)
    return found


def trl_loss(
    logprobs: Tensor,
    inputs: dict[str, Tensor],
    kind: str,
    beta: float,
    delta: float | None,
    entropies: Tensor | None = None,
    **others: Any,
) -> tuple[Any, Any]:
    """TRL's own GRPOTrainer._compute_loss on given log-probabilities; returns the loss and its metrics."""
    metrics: Any = {"train": defaultdict(list)}
    seen = torch.zeros_like(logprobs) if entropies is None else entropies
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, seen, None),
        get_high_entropy_mask=lambda entropies, mask, q: trl_entropy_mask(entropies, mask, 1 - q),
        args=SimpleNamespace(delta=delta, use_bias_correction_kl=False, steps_per_generation=1),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        model=SimpleNamespace(training=True),
        loss_type=kind,
        beta=beta,
        epsilon_low=0.2,
        epsilon_high=0.28,
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        max_completion_length=10,
        current_gradient_accumulation_steps=1,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics=metrics,
    )
    vars(trainer).update(others)
    compute = trl_function("trainer/grpo_trainer.py", "_compute_loss", nanmin=torch.min, nanmax=torch.max)
    return compute(trainer, None, inputs), metrics["train"]
