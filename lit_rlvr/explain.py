"""``lit-rlvr explain``: the run's arithmetic in words and numbers, without loading weights."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from lit_rlvr.cluster import Sampler, Work, estimate_lines
from lit_rlvr.credit import CreditCallback, all_callbacks, credit_chain, describe_chain
from lit_rlvr.engines import InProcessEngine, VLLMColocatedEngine, VLLMInProcessEngine
from lit_rlvr.explain_memory import keeps_whole, memory_of, memory_table, micro_rows, own_rows
from lit_rlvr.facts import Cluster, Facts
from lit_rlvr.machines import Machines
from lit_rlvr.memory import Memory
from lit_rlvr.sharding import FSDP2Strategy, compute_precision


def explain(
    module: Any, data: Any, trainer: Any, cluster: Cluster, asked: dict[str, Any], machines: Machines | None = None
) -> None:
    """Print the explanation.

    Args:
        module: The RLVRModule, without weights.
        data: The RLVRDataModule.
        trainer: A Trainer with the run's callbacks.
        cluster: Where the run would go.
        asked: The ``trainer`` section of the configuration.
        machines: Where to estimate the time of a phase, in place of ``cluster``.
    """
    if machines is not None:
        cluster = Cluster(machines.devices, sharded=True)
    elif isinstance(asked.get("strategy"), FSDP2Strategy):
        asked["strategy"].check_devices(cluster.devices)
    out = Console(highlight=False, soft_wrap=True)
    chain = credit_chain(all_callbacks(trainer))
    facts = Facts.of(module, data)
    for title, lines in (
        ("Not known here", [*facts.notes, *unknown_devices(asked, machines)]),
        ("Phase", phase_lines(module, facts, asked)),
        ("Devices", device_lines(module, cluster, facts, asked)),
        ("Algorithm", algorithm_lines(module)),
        ("Credit", [describe_chain(chain), *chain_lines(module, chain)]),
        ("Passes over a phase's rollouts", pass_lines(module, chain, asked)),
        ("Evaluation", evaluation_lines(module, facts, asked)),
    ):
        if lines:
            out.print(f"[bold]{title}[/bold]")
        for line in lines:
            out.print(f"  {line}", markup=False)
    out.print("[bold]Memory of one device[/bold]")
    memory = memory_of(module, cluster, facts, asked)
    out.print(memory_table(memory))
    if machines is not None:
        out.print(f"[bold]A phase on {machines.nodes} x {machines.each} {machines.kind}, estimated[/bold]")
        work, sampler = work_of(module, chain, cluster, facts), sampler_of(module, cluster, memory)
        for line in estimate_lines(work, machines, memory.training, sampler):
            out.print(f"  {line}", markup=False)


def unknown_devices(asked: dict[str, Any], machines: Machines | None) -> list[str]:
    """A sentence where the number of devices is for the machine to say.

    >>> unknown_devices({"devices": 2}, None)
    []
    """
    if machines is not None or str(asked.get("devices")) not in ("auto", "-1"):
        return []
    return [f"devices {asked['devices']} is what the run finds; here it counts as 1, so say a number"]


def phase_lines(module: Any, facts: Facts, asked: dict[str, Any]) -> list[str]:
    """Prompts, responses, steps and tokens."""
    batch, limit, problems = module.batch, module.sampling.max_new_tokens, facts.problems
    rows, steps = batch.prompts * batch.responses, batch.steps_per_phase
    each = rows // batch.minibatches
    lines = [
        f"{batch.prompts} prompts x {batch.responses} responses = {rows} rollouts of at most {limit} tokens per phase",
        f"{batch.epochs} pass(es) x {batch.minibatches} mini-batch(es) = {steps} optimiser step(s) per phase, each on "
        f"{batch.prompts // batch.minibatches} prompts x {batch.responses} responses = {each} rollouts",
        f"at most {rows * limit:,} response tokens per phase, {each * facts.width(module):,} tokens with prompts per "
        "step",
    ]
    if problems is not None:
        lines.append(
            f"{problems} training problems, longest prompt {facts.prompt} tokens: {-(-problems // batch.prompts)} "
            "phases see each once"
        )
    if (most := asked.get("max_steps") or -1) > 0:
        phases = -(-most // steps)
        passes = "" if problems is None else f", {phases * batch.prompts / problems:.2g} passes over the problems"
        lines.append(f"max_steps {most} = {phases} phases, {phases * rows:,} rollouts{passes}")
        if most % steps:
            lines.append(f"max_steps is no multiple of {steps}: the last phase's rollouts are not all used")
    else:
        lines.append(f"max_steps is not set: the run ends {end_without_steps(asked)}")
    if module.scheduler is not None:
        lines.append(scheduler_line(module, steps))
    context = getattr(facts.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and facts.width(module) > context:
        lines.append(f"prompt and response may take {facts.width(module)} tokens: the model's context is {context}")
    if module.dynamic_sampling is not None:
        most_rounds = module.dynamic_sampling.max_rounds
        lines.append(
            f"groups that are all right or all wrong are dropped and replaced in up to {most_rounds} round(s): 1x the "
            f"rollouts where none is, 2x where every other one is, {most_rounds}x = {most_rounds * rows:,} at the most"
        )
    return lines


def end_without_steps(asked: dict[str, Any]) -> str:
    """When Lightning ends a run that has no number of steps.

    >>> end_without_steps({}), end_without_steps({"max_time": "00:08:00:00"})
    ('after 1,000 passes over the problems', 'after max_time, 00:08:00:00')
    """
    epochs, time = asked.get("max_epochs"), asked.get("max_time")
    if time is not None and (epochs or -1) < 0:
        return f"after max_time, {time}"
    epochs = 1000 if epochs is None else epochs  # Lightning's default
    return "when it is stopped" if epochs < 0 else f"after {epochs:,} passes over the problems"


def scheduler_line(module: Any, steps: int) -> str:
    """What the learning rate does in optimiser steps, and in phases."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    scheduler = module.scheduler(module.optimizer([parameter]))
    name = type(scheduler).__name__
    line = f"the learning-rate scheduler {name} counts optimiser steps: {steps} per phase"
    if (total := getattr(scheduler, "total_iters", None)) is not None:
        line += f"; it ends after {total} steps = {total / steps:g} phases"
    return line


def device_lines(module: Any, cluster: Cluster, facts: Facts, asked: dict[str, Any]) -> list[str]:
    """What one device does."""
    batch, width = module.batch, facts.width(module)
    rows, fit = own_rows(module, cluster), micro_rows(module, cluster, width)
    kind = "weights and optimizer state spread over them" if cluster.sharded else "each with a whole copy"
    if batch.micro_rows is None:
        holds = f"micro_tokens {batch.micro_tokens:,} holds {fit} of the longest ({width} tokens)"
    else:
        holds = f"micro_rows {batch.micro_rows} takes {fit} at a time, at most {fit * width:,} tokens"
    lines = [
        f"{cluster.devices} device(s), {kind}" if cluster.devices > 1 else "1 device",
        f"each learns from {rows} rollouts per step; {holds}, so about {-(-rows // fit)} forward and backward "
        "pass(es) per step",
    ]
    if keeps_whole(module, cluster, facts, asked):
        lines.append("gradients are averaged after the last of them, and whole on each device until then (sync: last)")
    elif cluster.sharded and cluster.devices > 1:
        lines.append("gradients are averaged over the devices and spread after each of them")
    if isinstance(module.engine, VLLMColocatedEngine | VLLMInProcessEngine):
        shared = getattr(module.engine, "devices_per_server", 1)
        who = "each has a vLLM too" if shared == 1 else f"every {shared} have a vLLM too"
        lines.append(f"{who}, whose memory is not counted below")
    return lines


def algorithm_lines(module: Any) -> list[str]:
    """Every part of the algorithm that is on."""
    parts = {name: getattr(module, name) for name in ("advantage", "loss", "aggregation", "kl", "overlong")}
    parts |= {"dynamic_sampling": module.dynamic_sampling, "critic": module.critic_settings, "lora": module.lora}
    return [f"{name}: {value!r}" for name, value in parts.items() if value is not None]


def chain_lines(module: Any, chain: list[CreditCallback]) -> list[str]:
    """Options of each callback, on what it acts, and what that costs."""
    return [f"{c.state_key}({options(c)}): {', '.join(scope_words(module, c))}" for c in chain]


def options(callback: CreditCallback) -> str:
    """Those that a callback was made with and keeps under their own names, apart from what is said elsewhere.

    >>> from lit_rlvr.credit import CreditCallback
    >>> options(CreditCallback())
    ''
    """
    names = [name for name in inspect.signature(type(callback)).parameters if name not in ("name", "stages", "scope")]
    found = {name: getattr(callback, name, None) for name in names}
    return ", ".join(f"{name}={value!r}" for name, value in found.items() if value is not None)


def scope_words(module: Any, callback: CreditCallback) -> list[str]:
    """Scope and cost of one callback.

    A mini-batch is scored once more for the current policy, except in a phase's first step, where that is the old one;
    on a micro-batch the current policy's view comes with the forward pass.
    """
    words: list[str] = [callback.scope]
    if callback.scope == "micro_batch":
        words[0] += f" of {module.batch.micro_rows} responses"
    if callback.reads_current and callback.scope == "mini_batch":
        more = module.batch.steps_per_phase - 1
        words.append(f"reads the current policy: +1 scoring pass in {more} of {more + 1} steps")
    elif callback.reads_current:
        words.append("reads the current policy: no pass of its own")
    if type(callback).penalty is not CreditCallback.penalty:
        words.append("adds to the loss of every response token")
    if type(callback).shape_rewards is not CreditCallback.shape_rewards:
        words.append("shapes rewards")
    return words


def pass_lines(module: Any, chain: list[CreditCallback], asked: dict[str, Any]) -> list[str]:
    """Forward passes beside generation and learning."""
    precision = compute_precision(asked.get("strategy"), module.dtype_name, str(asked.get("precision") or "32-true"))
    read_before = bool(chain) or (module.kl is not None and module.kl.where == "reward")
    if module.engine.exact(precision):
        old = "sampled with the rollouts"
    elif module.batch.steps_per_phase == 1 and not read_before:
        old = "those of the learning pass"
    else:
        old = "+1 scoring pass"
    lines = [f"old log-probabilities: {old} (engine: {type(module.engine).__name__})"]
    if module.kl is not None:
        lines.append("reference: +1 scoring pass")
    if module.critic_settings is not None:
        epochs = module.batch.epochs
        lines.append(f"critic: +1 pass for values, and +1 forward and backward pass in each of {epochs} epoch(s)")
    return lines


def evaluation_lines(module: Any, facts: Facts, asked: dict[str, Any]) -> list[str]:
    """What is evaluated, and when."""
    total = f"{sum(facts.held_out.values())} problems" if facts.held_out else "each held-out problem"
    limit = module.sampling.max_new_tokens
    lines = [
        f"{name}: {e.samples} response(s) of at most {e.sampling(limit).max_new_tokens} tokens to {total}, "
        f"temperature {e.temperature:g}" + (f", top-p {e.top_p:g}" if e.top_p < 1 else "")
        for name, e in module.evaluator.evaluations.items()
    ]
    if sets := [f"{name} {number}" for name, number in facts.held_out.items() if name is not None]:
        lines.append(f"reported for each set and as their mean: {', '.join(sets)}")
    interval = asked.get("val_check_interval")
    return [*lines, f"before and after training, and every {interval} optimiser steps"]


def sampler_of(module: Any, cluster: Cluster, memory: Memory) -> Sampler:
    """How the run's engine decodes, for an estimate of its time."""
    kept, engine = memory.weights + memory.reference + memory.optimizer + memory.critic, module.engine
    if isinstance(engine, InProcessEngine):
        captured = engine.graphs is not False and not (cluster.sharded and cluster.devices > 1)
        return Sampler("the policy itself, in every process", engine.max_rows, 1, captured, kept)
    if isinstance(engine, VLLMInProcessEngine):
        return Sampler("a vLLM in every process", None, 1, True, kept)
    if isinstance(engine, VLLMColocatedEngine):
        return Sampler("vLLM servers on the same devices", None, engine.devices_per_server, True, kept)
    return Sampler("vLLM servers, as if on the same devices")


def work_of(module: Any, chain: list[CreditCallback], cluster: Cluster, facts: Facts) -> Work:
    """What a phase has to do, for an estimate of its time."""
    batch = module.batch
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(facts.config).parameters())
    rescored = sum(c.reads_current and c.scope == "mini_batch" for c in chain) > 0
    critic = module.critic_settings is not None
    return Work.of(
        facts.config,
        parameters,
        rows=batch.prompts * batch.responses,
        prompts=batch.prompts,
        prompt=facts.prompt,
        response=module.sampling.max_new_tokens,
        scorings=1 + (module.kl is not None) + critic + rescored * batch.epochs,
        learnings=batch.epochs * (1 + critic),
        recomputed=module.gradient_checkpointing,
        micro_batches=batch.steps_per_phase
        * -(-own_rows(module, cluster) // micro_rows(module, cluster, facts.width(module))),
    )
