"""The critic of PPO: a value model, its clipped loss, and its settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_rlvr.devices import send
from lit_rlvr.layout import Layout, Reader
from lit_rlvr.meter import Meter
from lit_rlvr.microbatch import cut
from lit_rlvr.minibatch import MiniBatch
from lit_rlvr.policy import load_policy
from lit_rlvr.reduce import Reduce
from lit_rlvr.segments import Pack, hidden_states
from lit_rlvr.sharding import sync_gradients
from lit_rlvr.types import RolloutBatch

if TYPE_CHECKING:
    from lit_rlvr.module import RLVRModule


@dataclass(frozen=True)
class Critic:
    """A value model of its own beside the policy. It sees every response token, whatever the callbacks choose.

    Its parameters are a second group of the optimizer, and are clipped apart from the policy's.

    Args:
        model: Folder or name of the model that it starts from; null: the policy's. Its head starts at zero.
        lr: Learning rate; null: the policy's.
        clip: The value loss is at least that of the value moved by at most this from the old one; null: not clipped.

    Raises:
        ValueError: For a learning rate or clip of at most 0.
    """

    model: str | None = None
    lr: float | None = None
    clip: float | None = 0.2

    def __post_init__(self) -> None:
        if self.lr is not None and self.lr <= 0:
            raise ValueError(f"critic.lr must be > 0, got {self.lr}")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"critic.clip must be > 0, got {self.clip}; leave it null to switch it off")

    def loss(self, values: Tensor, old: Tensor, returns: Tensor) -> tuple[Tensor, Tensor]:
        """Half the squared error of each value, clipped, and whether the clip holds it back; any one shape.

        Source: PPO's reference implementation; max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2.
        """
        plain = (values - returns) ** 2
        if self.clip is None:
            return plain / 2, torch.zeros_like(plain, dtype=torch.bool)
        near = old + (values - old).clamp(-self.clip, self.clip)
        clipped = (near - returns) ** 2
        return torch.maximum(plain, clipped) / 2, clipped > plain


class ValueModel(nn.Module):
    """A causal language model's body with one output per token.

    Args:
        path: A Hugging Face model folder or name.
        dtype: Dtype of the body; the head is float32, or float64 for a float64 body.
        gradient_checkpointing: Recompute activations in the backward pass.
        layout: How rows are laid out for it, as for a policy.
        empty: On the meta device, without weights: for a strategy that fills it in.
    """

    def __init__(
        self,
        path: str,
        dtype: str,
        *,
        gradient_checkpointing: bool = False,
        layout: Layout | None = "padded",
        empty: bool = False,
    ) -> None:
        super().__init__()
        policy = load_policy(path, dtype, gradient_checkpointing=gradient_checkpointing, layout=layout, empty=empty)
        hf, self.layout, self.narrowed = policy.hf, policy.layout, policy.narrowed
        self.body: Any = hf.base_model
        size = hf.config.get_text_config().hidden_size
        wide = torch.float64 if dtype == "float64" else torch.float32
        self.head = nn.Linear(size, 1, dtype=wide, device="meta" if empty else None)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def hf(self) -> Any:
        """The Hugging Face model, as of a policy."""
        return self.body

    def forward(self, ids: Tensor, index: Tensor, pack: Pack | None = None) -> Tensor:
        """Values [M] of the states at the flat places ``index`` [M] of ``ids`` [N, S], or of a pack [1, S]."""
        hidden = hidden_states(self.body, ids, pack)
        with torch.autocast(ids.device.type, enabled=False):
            values: Tensor = self.head(hidden.flatten(0, 1)[index].to(self.head.weight.dtype)).squeeze(-1)
        return values.clone()  # FSDP2 warns of views


@torch.no_grad()
def score_values(critic: Any, rollout: RolloutBatch, budget: int, device: torch.device, reduce: Reduce) -> Tensor:
    """The critic's value of the state before each response token [B, T]; 0 off the mask. Every rank calls it."""
    values = torch.zeros_like(rollout.old_logprobs)
    scored = []
    for micro, _ in cut(rollout, rollout.response_mask, budget, None, Reader.of(critic, device), reduce):
        scored.append(((micro.row, micro.column), critic(micro.ids, micro.index, micro.pack)))
    for where, own in scored:  # fetched at the end: a GPU would be idle after every micro-batch
        values[where] = own.to(values)
    return values


def value_losses(module: RLVRModule, mini: MiniBatch, meter: Meter) -> Iterator[tuple[Tensor, bool]]:
    """The critic's loss on each micro-batch of all response tokens; the flag marks the last.

    It is averaged like every term that is about all response tokens.
    """
    assert module.critic_settings is not None
    mask, budget, scale = mini.rollout.response_mask, module.batch.micro_tokens, module.reduce.world_size
    reader = Reader.of(module.critic, module.device)
    for micro, last in cut(mini.rollout, mask, budget, None, reader, module.reduce):
        where = (micro.row, micro.column)
        assert mini.rollout.values is not None
        assert mini.returns is not None
        old, returns, share = (
            send(t[where], micro.ids.device) for t in (mini.rollout.values, mini.returns, mini.share)
        )
        sync_gradients(module.critic, module.trainer.strategy, last)
        values = module.critic(micro.ids, micro.index, micro.pack)
        each, held = module.critic_settings.loss(values, old.to(values), returns.to(values))
        loss = (share * each).sum() / (mini.share_denominator or 1.0)
        meter.add(value_loss=loss.detach(), value_clip=held.sum(), values=float(len(each)))
        yield loss * scale, last
