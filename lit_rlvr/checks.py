"""Options that do not go together are refused before anything runs, in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import FSDPStrategy, StrategyRegistry

from lit_rlvr.engines import InProcessEngine
from lit_rlvr.fsdp1 import FSDP1Strategy
from lit_rlvr.near import did_you_mean

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
    critic, needs = module.critic_settings, module.advantage.needs_critic
    if needs and critic is None:
        raise ValueError(f"advantage {type(module.advantage).__name__} needs values; add a critic: model.critic: {{}}")
    if critic is not None and not needs:
        raise ValueError(
            f"a critic is given, but advantage {type(module.advantage).__name__} does not use it; use advantage: GAE"
        )
    if module.ahead is not None:
        module.engine.check_overlap()
    if module.reference_path is not None and module.kl is None:
        raise ValueError("a reference model is given, but nothing uses it: kl is null")


def check_trainer(module: RLVRModule, trainer: pl.Trainer, strategy: Any = None) -> None:
    """Refuse Trainer options that the loop cannot honour.

    Args:
        module: The module.
        trainer: Its trainer.
        strategy: That of the run, or its name, where the trainer has another; null: the trainer's.

    Raises:
        ValueError: Saying what to change.
    """
    _ = module.data  # refuses another data module, or none
    strategy = strategy or trainer.strategy
    if isinstance(strategy, FSDP1Strategy):
        check_first_fsdp(module)
    elif isinstance(strategy, FSDPStrategy) or strategy in ("fsdp", "fsdp_cpu_offload"):
        raise ValueError(
            "trainer.strategy fsdp would wrap the whole module, in which backward passes inside a step fail; use "
            "--config configs/strategy/fsdp.yaml, or fsdp1.yaml for the same FSDP with the policy as its root"
        )
    if module.critic_settings is not None and trainer.gradient_clip_algorithm == "value":
        raise ValueError("policy and critic are clipped apart, by norm; trainer.gradient_clip_algorithm must be norm")
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


def check_first_fsdp(module: RLVRModule) -> None:
    """Refuse what PyTorch's first FSDP cannot do.

    Raises:
        ValueError: Saying what to change.
    """
    successor = "under PyTorch's first FSDP; use --config configs/strategy/fsdp.yaml, which is its successor"
    if module.lora is not None:
        raise ValueError(f"model.lora does not work {successor}")
    if not isinstance(module.engine, InProcessEngine):
        raise ValueError(f"weights cannot be handed to {type(module.engine).__name__} {successor}")


def check_chain(module: RLVRModule) -> None:
    """Refuse credit callbacks that the module's options cannot serve.

    Raises:
        ValueError: Naming the callback and what to change.
    """
    small = [c.state_key for c in module.chain if c.scope == "micro_batch"]
    if small and module.batch.micro_rows is None:
        raise ValueError(
            f"{small[0]} decides per micro-batch, so that its choice depends on how many responses that has; set "
            "batch.micro_rows"
        )
    if not small and module.batch.micro_rows is not None:
        raise ValueError(
            "batch.micro_rows is for callbacks that decide per micro-batch, and there is none; leave it null, as in "
            "--model.batch.micro_rows=null"
        )
    choosing = [c.state_key for c in module.chain if c.token_level]
    if choosing and module.loss.sequence_level:
        raise ValueError(
            f"{type(module.loss).__name__} has one ratio and one gradient per response, so {choosing[0]} cannot treat "
            "its tokens apart; use level: token"
        )
    if module.ahead is not None and not any(c.corrects_engine and c.stages is None for c in module.chain):
        raise ValueError(
            "model.overlap trains on responses of older weights, which the callback TruncatedImportance corrects for; "
            "add it for all stages, as in --config configs/callbacks/truncated_importance.yaml"
        )
    for callback in module.chain:
        callback.check(module)


def check_trainer_options(options: dict[str, Any], found_here: bool = True) -> None:
    """Refuse Trainer options that Lightning would take for something else, or name the option that it complains about.

    Args:
        options: The ``trainer`` section of a configuration.
        found_here: Whether the devices must be on this machine.

    Raises:
        ValueError: Saying what to change.
    """
    for name, known in (("strategy", StrategyRegistry), ("accelerator", AcceleratorRegistry)):
        names = ["auto", *(["gpu"] if name == "accelerator" else []), *known]
        if isinstance(options.get(name), str) and options[name] not in names:
            hint = did_you_mean(options[name], names) or f"; common are {', '.join(names[:4])}"
            if options[name].lower().startswith("fsdp"):
                hint = "; use --config configs/strategy/fsdp.yaml"
            elif options[name].endswith("Strategy"):
                hint = f"; a class is written {{class_path: {options[name]}}}"
            raise ValueError(f"there is no trainer.{name} {options[name]!r}{hint}")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    there["gpu"] = any(there.values())
    if found_here and not there.get(str(options.get("accelerator")), True):
        raise ValueError(
            f"trainer.accelerator is {options['accelerator']}, but torch finds none here; --trainer.accelerator=cpu "
            "does without, and lit-rlvr doctor lists the devices"
        )
    if (devices := options.get("devices", "auto")) != "auto" and not _are_devices(devices):
        raise ValueError(f"trainer.devices must be auto, a number from 1, or a list of device numbers, got {devices!r}")
    if options.get("accelerator") == "cpu" and devices != "auto" and not str(devices).strip().isdigit():
        raise ValueError(f"trainer.devices must be a number of processes with trainer.accelerator cpu, got {devices!r}")
    if (steps := options.get("max_steps", -1)) is not None and steps < 1 and steps != -1:
        raise ValueError(f"trainer.max_steps must be at least 1, or -1 for no end, got {steps}")
    clip = options.get("gradient_clip_val")
    if clip is not None and clip < 0:
        raise ValueError(f"trainer.gradient_clip_val must be above 0, or null for no clipping, got {clip}")
    root = Path(options.get("default_root_dir") or ".")
    if root.exists() and not root.is_dir():
        raise ValueError(f"trainer.default_root_dir is {root}, which is a file; a run needs a folder")


def _are_devices(devices: Any) -> bool:
    numbers = devices if isinstance(devices, list) else str(devices).strip("[] ,").split(",")
    if not all(str(number).strip().isdigit() for number in numbers):
        return str(devices) == "-1"
    return bool(numbers) and (len(numbers) > 1 or isinstance(devices, list) or int(numbers[0]) > 0)
