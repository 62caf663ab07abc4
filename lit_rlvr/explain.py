"""``lit-rlvr explain``: the run's arithmetic in words and numbers, without loading weights."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from lit_rlvr.credit import all_callbacks, credit_chain, describe_chain
from lit_rlvr.engines import InProcessEngine
from lit_rlvr.memory import Memory, estimate
from lit_rlvr.models import resolve_model
from lit_rlvr.settings import Batch

SHARDED = ("FSDPStrategy", "ModelParallelStrategy")


@dataclass(frozen=True)
class Cluster:
    """Where the run would go.

    Args:
        devices: Devices over all nodes.
        sharded: Whether weights, gradients and optimizer state are spread over them.
    """

    devices: int
    sharded: bool

    @classmethod
    def of(cls, trainer: dict[str, Any]) -> Cluster:
        """Read the ``trainer`` section of a configuration; ``auto`` counts as one device."""
        devices = trainer.get("devices", 1)
        if isinstance(devices, (list, tuple)):
            each = len(devices)
        else:
            each = int(devices) if str(devices).isdigit() else 1
        strategy = trainer.get("strategy", "auto")
        name = strategy if isinstance(strategy, str) else type(strategy).__name__
        return cls(each * int(trainer.get("num_nodes") or 1), name in SHARDED or name.startswith("fsdp"))


def explain(module: Any, data: Any, trainer: Any, cluster: Cluster, asked: dict[str, Any]) -> None:
    """Print the explanation.

    Args:
        module: The RLVRModule, without weights.
        data: The RLVRDataModule.
        trainer: A Trainer with the run's callbacks.
        cluster: Where the run would go.
        asked: The ``trainer`` section of the configuration.
    """
    out = Console(highlight=False, soft_wrap=True)
    chain = credit_chain(all_callbacks(trainer))
    prompt = longest_prompt(module, data)
    for title, lines in (
        ("Phase", phase_lines(module, data, asked, prompt)),
        ("Devices", device_lines(module, cluster, prompt)),
        ("Algorithm", [*algorithm_lines(module), describe_chain(chain)]),
        ("Evaluation", evaluation_lines(module, data, asked)),
    ):
        out.print(f"[bold]{title}[/bold]")
        for line in lines:
            out.print(f"  {line}", markup=False)
    out.print("[bold]Memory of one device[/bold]")
    out.print(memory_table(memory_of(module, cluster, prompt)))


def longest_prompt(module: Any, data: Any) -> int:
    """Longest training prompt in tokens, as far as the run would use it."""
    lengths = [len(encoded.tokens) for encoded in data.encoded("train")]
    return max(lengths)


def phase_lines(module: Any, data: Any, asked: dict[str, Any], prompt: int) -> list[str]:
    """Prompts, responses, steps and tokens."""
    batch, limit = module.batch, module.sampling.max_new_tokens
    rows, steps = batch.prompts * batch.responses, batch.steps_per_phase
    each, problems = rows // batch.minibatches, len(data.encoded("train"))
    lines = [
        f"{batch.prompts} prompts x {batch.responses} responses = {rows} rollouts of at most {limit} tokens per phase",
        f"{batch.epochs} pass(es) x {batch.minibatches} mini-batch(es) = {steps} optimiser step(s) per phase, each on "
        f"{batch.prompts // batch.minibatches} prompts x {batch.responses} responses = {each} rollouts",
        f"{problems} training problems, longest prompt {prompt} tokens: {-(-problems // batch.prompts)} phases see "
        "each once",
        f"at most {rows * limit:,} response tokens per phase, {each * (limit + prompt):,} tokens with prompts per step",
    ]
    if (most := asked.get("max_steps") or -1) > 0:
        phases = -(-most // steps)
        lines.append(
            f"max_steps {most} = {phases} phases, {phases * rows:,} rollouts, "
            f"{phases * batch.prompts / problems:.2g} passes over the problems"
        )
        if most % steps:
            lines.append(f"max_steps is no multiple of {steps}: the last phase's rollouts are not all used")
    if module.scheduler is not None:
        lines.append(f"the learning-rate scheduler counts optimiser steps: {steps} per phase")
    if module.dynamic_sampling is not None:
        most_rounds = module.dynamic_sampling.max_rounds
        lines.append(f"groups that are all right or all wrong are dropped; up to {most_rounds} round(s) of sampling")
    return lines


def device_lines(module: Any, cluster: Cluster, prompt: int) -> list[str]:
    """What one device does."""
    batch, width = module.batch, prompt + module.sampling.max_new_tokens
    rows = own_rows(module, cluster)
    fit = micro_rows(module, cluster, width)
    kind = "weights and optimizer state spread over them" if cluster.sharded else "each with a whole copy"
    return [
        f"{cluster.devices} device(s), {kind}" if cluster.devices > 1 else "1 device",
        f"each learns from {rows} rollouts per step; micro_tokens {batch.micro_tokens:,} holds {fit} of the longest "
        f"({width} tokens), so at most {-(-rows // fit)} forward and backward pass(es) per step",
    ]


def algorithm_lines(module: Any) -> list[str]:
    """Every part of the algorithm that is on."""
    names = ("advantage", "loss", "aggregation", "kl", "overlong", "dynamic_sampling")
    lines = [f"{name}: {value!r}" for name in names if (value := getattr(module, name)) is not None]
    old = (
        "sampled with the rollouts" if module.engine.exact("32-true") and module.dtype_name != "bfloat16" else "scored"
    )
    return [*lines, f"engine: {type(module.engine).__name__}, old log-probabilities {old}"]


def evaluation_lines(module: Any, data: Any, asked: dict[str, Any]) -> list[str]:
    """What is evaluated, and when."""
    problems, limit = len(data.encoded("val")), module.sampling.max_new_tokens
    lines = [
        f"{name}: {e.samples} response(s) of at most {e.sampling(limit).max_new_tokens} tokens to {problems} problems, "
        f"temperature {e.temperature:g}"
        for name, e in module.evaluator.evaluations.items()
    ]
    interval = asked.get("val_check_interval")
    return [*lines, f"before and after training, and every {interval} optimiser steps"]


def micro_rows(module: Any, cluster: Cluster, width: int) -> int:
    """Rows of full length in a micro-batch, never more than the device has."""
    most: int = module.batch.micro_tokens // width
    return max(1, min(most, own_rows(module, cluster)))


def own_rows(module: Any, cluster: Cluster) -> int:
    """Rollouts that one device learns from per optimiser step."""
    batch: Batch = module.batch
    return -(-batch.prompts * batch.responses // (batch.minibatches * cluster.devices))


def memory_of(module: Any, cluster: Cluster, prompt: int) -> Memory:
    """Estimate one device's memory."""
    width = prompt + module.sampling.max_new_tokens
    own = -(-module.batch.prompts * module.batch.responses // cluster.devices)
    most = module.engine.max_rows if isinstance(module.engine, InProcessEngine) else 0
    probe = module.optimizer([torch.nn.Parameter(torch.zeros(1))])
    return estimate(
        AutoConfig.from_pretrained(resolve_model(module.model)),
        dtype=module.dtype_name,
        micro_rows=micro_rows(module, cluster, width),
        width=width,
        rollout_rows=min(own, most),
        optimizer=type(probe).__name__,
        reference=module.kl is not None,
        gradient_checkpointing=module.gradient_checkpointing,
        parameters_on_device=1 / cluster.devices if cluster.sharded else 1.0,
    )


def memory_table(memory: Memory) -> Table:
    """The estimate as a table."""
    table = Table(box=None, show_header=False, pad_edge=True)
    table.add_column()
    table.add_column(justify="right")
    for f in fields(memory):
        table.add_row(f.name, readable(getattr(memory, f.name)))
    table.add_row("peak of an optimiser step", readable(memory.training), style="bold")
    table.add_row("peak of a rollout", readable(memory.rollout), style="bold")
    return table


def readable(size: int) -> str:
    """Bytes for people.

    >>> readable(1500), readable(3 * 2**30)
    ('1.5 KiB', '3.0 GiB')
    """
    number, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number < 1024 or unit == "TiB":
            break
        number /= 1024
    return f"{number:.1f} {unit}"
