"""FSDP2: weights, gradients and optimizer state spread over the devices, layer by layer.

Our :class:`~lit_rlvr.policy.Policy` is the root, so that its ``forward`` and ``next_logits`` are the only places where
weights are gathered; decoder layers are gathered one at a time. Gradients are reduced after every micro-batch, so no
device ever holds a whole gradient, unless ``sync: last`` asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from lit_rlvr import fsdp1
from lit_rlvr.fsdp1 import FSDP1Strategy
from lit_rlvr.policy import DTYPES, Policy, load_policy
from lit_rlvr.waiting import HOURS, time_limit


class FSDP2Strategy(ModelParallelStrategy):
    """PyTorch's ``fully_shard`` over all devices of all nodes.

    The first process reads the model and hands out the parts, so others never hold a whole copy, except while they
    generate: rollouts gather the weights once, to decode without communication.

    Args:
        param_dtype: Dtype in which weights are gathered and computed with; null: that of ``model.dtype``. With
            ``bfloat16`` and ``model.dtype`` float32 the optimizer works on float32 weights.
        cpu_offload: Keep weights, gradients and optimizer state in CPU memory, and step the optimizer there.
        sync: When gradients are averaged over devices and spread. ``each``: after every micro-batch. ``last``: once per
            optimiser step, after its last one; until then every device holds the whole gradients, in the dtype that
            they are averaged in (4 bytes per trained parameter), which ``lit-rlvr explain`` counts. Changes speed and
            memory, never the gradient.
        save_distributed_checkpoint: Every process writes its part into a folder; false: one process writes one file,
            which other strategies can open too.
        process_group_backend: Of ``torch.distributed``; null: nccl on GPUs (with gloo for ``cpu_offload``), else gloo.
        timeout_hours: How long a process waits for the others before the run ends with an error: longer than sampling
            on one device may take longer than on another.

    Gradients are averaged over devices in float32, or in float64 for float64 weights.

    Raises:
        ValueError: For ``sync: last`` on a single device, whose gradients are never spread, and for ``timeout_hours``
            that is no time.
    """

    def __init__(
        self,
        param_dtype: Literal["bfloat16", "float32"] | None = None,
        cpu_offload: bool = False,
        sync: Literal["each", "last"] = "each",
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout_hours: float = HOURS,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=time_limit(timeout_hours),
        )
        self.param_dtype, self.cpu_offload, self.sync = param_dtype, cpu_offload, sync

    def check_devices(self, number: int) -> None:
        """Refuse what makes no sense on so many devices.

        Raises:
            ValueError: For ``sync: last`` on one.
        """
        if self.sync == "last" and number == 1:
            raise ValueError(
                "trainer.strategy.sync: last spares a single device nothing, because its gradients are whole; leave it "
                "at each"
            )

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        self.check_devices(self._data_parallel_size)
        super().setup_environment()

    def model_to_device(self) -> None:
        """Move what Lightning would move, apart from an offloaded policy and critic."""
        module: Any = self.lightning_module
        if not self.cpu_offload:
            super().model_to_device()
            return
        offloaded = module.policy, module.critic
        module.policy = module.critic = None
        super().model_to_device()
        module.policy, module.critic = offloaded

    def _get_process_group_backend(self) -> str:
        if self._process_group_backend is None and self.cpu_offload and self.root_device.type == "cuda":
            return "cpu:gloo,cuda:nccl"  # the optimizer's norms and checkpoints are reduced on the CPU
        return super()._get_process_group_backend()


def compute_precision(strategy: Strategy | str | None, dtype: str, precision: str) -> str:
    """The Trainer's ``precision``, or what the weights' dtype makes of it: ``bf16-true`` for bfloat16 weights."""
    narrowed = isinstance(strategy, FSDP2Strategy | FSDP1Strategy) and strategy.param_dtype == "bfloat16"
    return "bf16-true" if narrowed or dtype == "bfloat16" else precision


def open_model(load: Callable[..., Any], path: str, dtype: str, strategy: Strategy | None, **options: Any) -> Any:
    """Load a policy or a critic in the way of a strategy: whole, or spread over its devices; every rank calls it.

    Args:
        load: ``load_policy`` or ``ValueModel``.
        path: Model folder or name.
        dtype: Dtype of the weights.
        strategy: The run's strategy, whose process group is running; None: there is no run.
        options: More arguments of ``load``.
    """
    if isinstance(strategy, ModelParallelStrategy):
        return load_sharded(path, dtype, strategy, load, **options)
    model = load(path, dtype, **options)
    return fsdp1.wrap(model, strategy) if isinstance(strategy, FSDP1Strategy) else model


def load_sharded(
    path: str, dtype: str, strategy: ModelParallelStrategy, load: Callable[..., Any] = load_policy, **options: Any
) -> Any:
    """Load a policy or a critic that is spread over the strategy's devices by FSDP2; every rank calls it.

    The first rank reads and checks the weights, on the CPU; the others are given their parts.

    Args:
        path: Model folder or name.
        dtype: Dtype of the weights.
        strategy: A strategy whose process group is running.
        load: ``load_policy`` or ``ValueModel``.
        options: More arguments of ``load``.

    Raises:
        ValueError: On every rank, when the first cannot load the model.
    """
    full: Any = None
    facts: dict[str, Any] = {}
    if strategy.global_rank == 0:
        try:
            full = load(path, dtype, **options)
            facts = {"buffers": dict(full.named_buffers())}
        except Exception as error:  # whatever it is, the others are waiting to hear of it
            facts = {"error": str(error) or type(error).__name__}
    facts = strategy.broadcast(facts)
    if "error" in facts:
        raise ValueError(f"{path} cannot be loaded: {facts['error']}")
    model = load(path, dtype, empty=True, **options)
    offload = isinstance(strategy, FSDP2Strategy) and strategy.cpu_offload
    shard(model, strategy)
    model.to_empty(device="cpu" if offload else strategy.root_device)
    if isinstance(model, Policy):
        model.placed = strategy.root_device if offload else None
    whole = {} if full is None else full.state_dict()
    set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    _set_buffers(model, facts["buffers"], strategy.root_device)
    return model


def shard(model: Any, strategy: ModelParallelStrategy) -> None:
    """Apply ``fully_shard`` to the decoder layers and then to the policy or critic, of which the head comes apart.

    Inputs are not cast: with bfloat16 weights, FSDP2 would round every float that is given to ``forward``, old
    log-probabilities and advantages included.

    Raises:
        ValueError: When the model does not name its decoder layers.
    """
    names = set(model.hf._no_split_modules or [])
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ValueError(f"{type(model.hf).__name__} does not name its decoder layers, so it cannot be sharded")
    options: dict[str, Any] = {
        "mesh": strategy.device_mesh["data_parallel"],
        "reshard_after_forward": True,
        "mp_policy": MixedPrecisionPolicy(cast_forward_inputs=False),
    }
    if isinstance(strategy, FSDP2Strategy):
        own = model.hf.dtype
        narrow = DTYPES[strategy.param_dtype] if strategy.param_dtype else own
        if own == torch.float64 and narrow != own:
            raise ValueError(f"model.dtype float64 and param_dtype {strategy.param_dtype} contradict each other")
        wide, model.narrowed = torch.float64 if own == torch.float64 else torch.float32, narrow
        options["mp_policy"] = MixedPrecisionPolicy(narrow, wide, cast_forward_inputs=False)
        pin = torch.cuda.is_available()
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=pin) if strategy.cpu_offload else OffloadPolicy()
    for layer in layers:
        fully_shard(layer, **options)
    if not isinstance(model, Policy):  # a critic's head has its own dtype, and computes in it
        fully_shard(model.head, **{**options, "mp_policy": MixedPrecisionPolicy(cast_forward_inputs=False)})
    fully_shard(model, **options)
    if isinstance(model, Policy):
        register_fsdp_forward_method(model, "next_logits")


def sync_gradients(model: Any, strategy: Strategy, last: bool) -> None:
    """Say, before a micro-batch's backward pass, whether its gradients are averaged over devices and spread.

    The last one's are, together with what the others have left. Micro-batches are as many on every rank. Weights are
    let go of after each: only the gradients stay.

    Args:
        model: The policy or the critic.
        strategy: The run's strategy; only an ``FSDP2Strategy`` with ``sync: last`` waits. DDP averages once per step by
            itself, because backward passes inside of ``training_step`` come before it listens.
        last: Whether it is the step's last micro-batch.
    """
    if isinstance(strategy, FSDP2Strategy) and strategy.sync == "last":
        model.set_requires_gradient_sync(last)


def _set_buffers(model: nn.Module, buffers: dict[str, Tensor], device: torch.device) -> None:
    """Give a model that was made without weights its buffers; rotary frequencies are in no state dict."""
    for name, value in buffers.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, value.to(device))


@contextmanager
def gathered(policy: nn.Module) -> Iterator[None]:
    """Inside, a sharded policy has all of its weights on every device, gathered once; every rank enters it.

    Ranks may then run different numbers of forward passes. For a policy that is not sharded it does nothing.
    """
    if isinstance(policy, FullyShardedDataParallel):
        with fsdp1.gathered(policy):
            yield
        return
    parts = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)


def whole_weights(policy: nn.Module, trained_only: bool = False) -> dict[str, Tensor]:
    """The state dict with whole tensors on the CPU; every rank calls it, of a sharded policy only the first has it."""
    if isinstance(policy, FullyShardedDataParallel):
        return fsdp1.whole_weights(policy)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    weights: dict[str, Any] = get_model_state_dict(policy, options=options)
    return weights
