"""PyTorch's first FSDP, for those who have it in use; :mod:`lit_rlvr.sharding` is about its successor.

The policy is a root of its own and decoder layers are its parts. Lightning would make the whole module the root, inside
whose forward pass no backward pass may run, and a step here has several. Outside of ``forward`` weights are pieces of
flat tensors, so generation runs while they are gathered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.distributed.tensor import DTensor

from lit_rlvr.policy import DTYPES, Policy
from lit_rlvr.waiting import HOURS, time_limit

METADATA = "meta.pt"
"""Lightning's name for the file with everything but tensors, in a folder of shards."""


class FSDP1Strategy(FSDPStrategy):
    """Lightning's ``FSDPStrategy`` with the options that matter here; it runs on CPUs too.

    Every process reads the model. Rollouts are sampled with the weights gathered in ``model.dtype``. Checkpoints are
    folders with the part of every process, in the form that ``FSDP2Strategy`` reads and writes.

    Args:
        param_dtype: Dtype in which weights are gathered and computed with while learning and scoring; null: that of
            ``model.dtype``. With ``bfloat16`` and ``model.dtype`` float32 the optimizer works on float32 weights.
        sharding_strategy: ``FULL_SHARD`` spreads weights, gradients and optimizer state; ``SHARD_GRAD_OP`` keeps the
            weights gathered between the forward and the backward pass.
        process_group_backend: Of ``torch.distributed``; null: nccl on GPUs, else gloo.
        timeout_hours: How long a process waits for the others before the run ends with an error: longer than sampling
            on one device may take longer than on another.

    Gradients are averaged over devices in float32, or in float64 for float64 weights.

    Raises:
        ValueError: For ``timeout_hours`` that is no time.
    """

    def __init__(
        self,
        param_dtype: Literal["bfloat16", "float32"] | None = None,
        sharding_strategy: Literal["FULL_SHARD", "SHARD_GRAD_OP"] = "FULL_SHARD",
        process_group_backend: str | None = None,
        timeout_hours: float = HOURS,
    ) -> None:
        super().__init__(
            sharding_strategy=sharding_strategy,
            state_dict_type="sharded",
            process_group_backend=process_group_backend,
            timeout=time_limit(timeout_hours),
        )
        self.param_dtype = param_dtype
        self.mesh: DeviceMesh

    def setup_environment(self) -> None:
        if self.num_nodes * self.num_processes < 2:
            raise ValueError("PyTorch's first FSDP needs at least two processes; use configs/strategy/single.yaml")
        super().setup_environment()
        self.mesh = init_device_mesh(self.root_device.type, (self.world_size,))

    @property
    def precision_plugin(self) -> Any:
        """One that changes nothing: Lightning's would convert weights, and reduce in bfloat16."""
        return Precision()

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        given = "32-true" if precision_plugin is None else precision_plugin.precision
        if given != "32-true":
            raise ValueError(
                f"trainer.precision {given} is not used under PyTorch's first FSDP; leave it out, and set "
                "trainer.strategy.param_dtype"
            )

    def _setup_model(self, model: nn.Module) -> nn.Module:
        """Leave the module as it is: policy and critic are wrapped where they are loaded."""
        return model.to(self.root_device)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.model is not None
        return get_model_state_dict(self.model)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        assert self.model is not None
        state: dict[str, Any] = get_optimizer_state_dict(self.model, getattr(optimizer, "_optimizer", optimizer))
        return state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        path = Path(self.broadcast(filepath))
        path.mkdir(parents=True, exist_ok=True)
        optimizers = checkpoint.pop("optimizer_states", [])
        shards = {"state_dict": checkpoint.pop("state_dict")}
        shards |= {f"optimizer_{number}": state for number, state in enumerate(optimizers)}
        save(shards, checkpoint_id=path)
        if self.is_global_zero:
            torch.save(checkpoint, path / METADATA)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path, model = Path(self.broadcast(checkpoint_path)), self.model
        assert model is not None
        weights = {"state_dict": get_model_state_dict(model)}
        load(weights, checkpoint_id=path)
        set_model_state_dict(model, weights["state_dict"])
        for number, optimizer in enumerate(self.optimizers):
            name = f"optimizer_{number}"
            state = {name: get_optimizer_state_dict(model, optimizer)}
            load(state, checkpoint_id=path)
            set_optimizer_state_dict(model, optimizer, state[name])
        metadata: dict[str, Any] = torch.load(path / METADATA, weights_only=weights_only)
        return metadata

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing: ``load_checkpoint`` has done it."""


def wrap(model: Any, strategy: FSDP1Strategy) -> FullyShardedDataParallel:
    """Spread a policy or a critic over the strategy's devices; every rank calls it.

    Args:
        model: The model, on the CPU; its ``hf`` names its decoder layers.
        strategy: A strategy whose process group is running.

    Raises:
        ValueError: When the model does not name its decoder layers, or the options contradict its dtype.
    """
    hf = model.hf
    names = set(hf._no_split_modules or [])
    layers = {module for module in model.modules() if type(module).__name__ in names}
    if not layers:
        raise ValueError(f"{type(hf).__name__} does not name its decoder layers, so it cannot be sharded")
    narrow = DTYPES[strategy.param_dtype] if strategy.param_dtype else hf.dtype
    if hf.dtype == torch.float64 and narrow != hf.dtype:
        raise ValueError(f"model.dtype float64 and param_dtype {strategy.param_dtype} contradict each other")
    wide, model.narrowed = torch.float64 if hf.dtype == torch.float64 else torch.float32, narrow

    def precision(dtype: torch.dtype) -> MixedPrecision:
        return MixedPrecision(dtype, wide, cast_forward_inputs=False, cast_root_forward_inputs=False)

    def part(module: nn.Module) -> bool | dict[str, Any]:
        if not isinstance(model, Policy) and module is model.head:  # it has its own dtype, and computes in it
            return {"mixed_precision": precision(wide)}
        return module in layers

    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=CustomPolicy(part),
        mixed_precision=precision(narrow),
        sharding_strategy=strategy.sharding_strategy,
        device_id=strategy.root_device,
        device_mesh=strategy.mesh,
        use_orig_params=True,
    )


@contextmanager
def gathered(policy: FullyShardedDataParallel) -> Iterator[None]:
    """Inside, every device has all weights, gathered once, and layers run without communication."""
    parts: list[Any] = FullyShardedDataParallel.fsdp_modules(policy)
    with FullyShardedDataParallel.summon_full_params(policy, writeback=False):
        for part in parts:
            part.forward = part.module.forward  # its own would let go of the weights after each pass
        try:
            yield
        finally:
            for part in parts:
                del part.forward


def whole_weights(policy: FullyShardedDataParallel) -> dict[str, Tensor]:
    """The state dict with whole tensors on the CPU, on the first rank alone; every rank calls it."""
    weights: dict[str, Tensor] = {}
    shards: dict[str, Any] = get_model_state_dict(policy)
    for name, shard in shards.items():
        full: Tensor = shard.full_tensor() if isinstance(shard, DTensor) else shard
        if policy.rank == 0:
            weights[name] = full.detach().cpu().clone()
    return weights
