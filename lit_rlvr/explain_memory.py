"""What ``explain`` says about one device's memory, and how many rows it holds."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from rich.table import Table

from lit_rlvr.engines import InProcessEngine
from lit_rlvr.facts import Cluster, Facts
from lit_rlvr.fsdp1 import FSDP1Strategy
from lit_rlvr.head import CHUNK_ROWS
from lit_rlvr.lora import adapter_parameters
from lit_rlvr.memory import Memory, Numbers, estimate
from lit_rlvr.settings import Batch
from lit_rlvr.sharding import FSDP2Strategy

PARTS = {
    "reference": "reference model", "optimizer": "optimizer state", "cache": "key-value cache",
    "gathered": "gathered weights, while sampling", "whole_gradients": "whole gradients, between micro-batches",
    "critic_step": "critic's gradients and activations", "gathered_parts": "gathered weights, while training",
    "host": "in the CPU's memory, per device",
}  # fmt: skip
"""Parts of the memory whose own name says too little."""


def memory_of(module: Any, cluster: Cluster, facts: Facts, asked: dict[str, Any]) -> Memory:
    """Estimate one device's memory."""
    width = facts.width(module)
    own = -(-module.batch.prompts * module.batch.responses // cluster.devices)
    most = module.engine.max_rows if isinstance(module.engine, InProcessEngine) else 0
    probe = module.optimizer([torch.nn.Parameter(torch.zeros(1))])
    return estimate(
        facts.config,
        numbers(module, cluster, facts, asked),
        micro_rows=micro_rows(module, cluster, width),
        width=width,
        rollout_rows=min(own, most),
        head_rows=CHUNK_ROWS["cuda" if on_gpu(asked) else "cpu"],
        optimizer=type(probe).__name__,
        reference=module.kl is not None and (module.lora is None or module.reference_path is not None),
        gradient_checkpointing=module.gradient_checkpointing,
        critic=facts.critic,
        adapters=None if module.lora is None else adapter_parameters(facts.config, module.lora),
        packed=packs(module, asked),
        refilled=own > most,
    )


def numbers(module: Any, cluster: Cluster, facts: Facts, asked: dict[str, Any]) -> Numbers:
    """In which numbers the run keeps and computes, and which part of them one device keeps."""
    strategy = asked.get("strategy")
    computes = strategy.param_dtype if isinstance(strategy, FSDP2Strategy | FSDP1Strategy) else None
    return Numbers(
        dtype=module.dtype_name,
        computes=computes,
        samples=computes if isinstance(strategy, FSDP2Strategy) else None,  # the first FSDP gathers them as they are
        autocast=str(asked.get("precision")) in ("bf16-mixed", "bf16"),
        share=1 / cluster.devices if cluster.sharded else 1.0,
        offload=isinstance(strategy, FSDP2Strategy) and strategy.cpu_offload,
        keeps_whole=keeps_whole(module, cluster, facts, asked),
        widens=on_gpu(asked),
    )


def on_gpu(asked: dict[str, Any]) -> bool:
    """Whether the run asks for NVIDIA's GPUs."""
    return str(asked.get("accelerator")) in ("cuda", "gpu")


def packs(module: Any, asked: dict[str, Any]) -> bool:
    """Whether rollouts are decoded with packed copies of the weights, as on a CPU."""
    engine, plain = module.engine, str(asked.get("precision") or "32-true") in ("32-true", "32")
    here = asked.get("accelerator") == "cpu" and module.dtype_name == "float32" and plain
    return here and isinstance(engine, InProcessEngine) and engine.pack_weights


def own_rows(module: Any, cluster: Cluster) -> int:
    """Rollouts that one device learns from per optimiser step."""
    batch: Batch = module.batch
    return -(-batch.prompts * batch.responses // (batch.minibatches * cluster.devices))


def micro_rows(module: Any, cluster: Cluster, width: int) -> int:
    """Rows of full length in a micro-batch, never more than the device has."""
    most: int = module.batch.micro_rows or module.batch.micro_tokens // width
    return max(1, min(most, own_rows(module, cluster)))


def keeps_whole(module: Any, cluster: Cluster, facts: Facts, asked: dict[str, Any]) -> bool:
    """Whether each device holds whole gradients between the micro-batches of a step, of which there are several."""
    strategy = asked.get("strategy")
    several = own_rows(module, cluster) > micro_rows(module, cluster, facts.width(module))
    return cluster.devices > 1 and several and isinstance(strategy, FSDP2Strategy) and strategy.sync == "last"


def memory_table(memory: Memory) -> Table:
    """The estimate as a table, without what takes nothing."""
    table = Table(box=None, show_header=False, pad_edge=True)
    table.add_column()
    table.add_column(justify="right")
    for f in fields(memory):
        if size := getattr(memory, f.name):
            table.add_row(PARTS.get(f.name, f.name), readable(size))
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
