"""The policy: a Hugging Face causal language model behind three calls, the only roads to its weights."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from lit_rlvr.head import TokenLoss, chunked_logprobs, selected_loss
from lit_rlvr.layout import Layout, check_packs, choose_layout
from lit_rlvr.logits import LogitTransform, logit_transform
from lit_rlvr.lora import LoRA, add_adapters, base_of, merge_folder
from lit_rlvr.products import head_logits
from lit_rlvr.segments import Pack, hidden_states

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Policy(nn.Module):
    """A causal language model that gives log-probabilities, losses and next-token logits.

    Args:
        hf: Any ``...ForCausalLM`` of transformers with a plain linear head.

    Raises:
        ValueError: When the model's logits are not ``linear(hidden)`` up to a known scale and soft-cap.
    """

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        self.hf = hf
        head = hf.get_output_embeddings()
        if type(head) is not nn.Linear:
            raise ValueError(
                f"{type(hf).__name__} has a {type(head).__name__} as its head; only a plain nn.Linear works"
            )
        self.transform = logit_transform(hf)
        self.layout: Layout = "padded"
        """How rows are laid out for it."""
        self.placed: torch.device | None = None
        """Where it computes, if its weights wait elsewhere."""
        self.narrowed: torch.dtype | None = None
        """What it computes in, if sharding narrows its weights."""
        self.train(hf.training)

    @property
    def device(self) -> torch.device:
        return self.placed or self.hf.device

    @property
    def context_length(self) -> int | None:
        """Longest sequence the model accepts, in tokens, or None where its configuration does not say."""
        return getattr(self.hf.config.get_text_config(), "max_position_embeddings", None)

    def forward(
        self,
        ids: Tensor,
        index: Tensor,
        targets: Tensor,
        temperature: float = 1.0,
        token_loss: TokenLoss | None = None,
        pack: Pack | None = None,
    ) -> Any:
        """Score ``targets``, or with ``token_loss`` take the loss over them with the selected head.

        Args:
            ids: Sequences [N, S], padded on the right; causal attention then needs no mask. Or a pack [1, S].
            index: Flat places in [N * S] of the hidden states that predict the targets [M].
            targets: Token ids [M].
            temperature: Sampling temperature.
            token_loss: A token-separable loss; see :func:`lit_rlvr.head.selected_loss`.
            pack: Which sequences a pack is made of; the policy's ``layout`` must not be ``padded``.

        Returns:
            (log-probabilities [M], entropies [M]) in nats, or the scalar loss.
        """
        hidden = hidden_states(self.hf.base_model, ids, pack)
        picked = hidden.flatten(0, 1)[index]
        head: Any = self.hf.get_output_embeddings()
        options: dict[str, Any] = {"bias": head.bias, "transform": self._at(temperature)}
        if token_loss is None:
            return chunked_logprobs(picked, head.weight, targets, **options)
        return selected_loss(picked, head.weight, targets, token_loss, **options)

    def next_logits(
        self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Any, last: Tensor | None = None
    ) -> Tensor:
        """Logits [N, V] (before temperature) of the token after ``ids``, extending ``cache`` in place.

        Args:
            ids: New tokens [N, S].
            mask: True on real tokens of cache and ``ids`` together [N, total], or None where all are real. Or what is
                added to the attention's scores [N, 1, S, total].
            positions: Position of each new token [N, S].
            cache: A transformers ``Cache``.
            last: Place of each row's last token among the new ones [N]; None: at the end of all.
        """
        out = self.hf.base_model(
            input_ids=ids,
            attention_mask=mask.long() if mask is not None and mask.dtype == torch.bool else mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        hidden: Tensor = out.last_hidden_state
        ends = hidden[:, -1] if last is None else hidden[torch.arange(len(hidden), device=hidden.device), last]
        return self.transform(head_logits(self.hf.get_output_embeddings(), ends))

    def _at(self, temperature: float) -> LogitTransform:
        return LogitTransform(self.transform.scale, self.transform.softcap, temperature)


@torch.no_grad()
def check_head(policy: Policy) -> None:
    """Compare our logits with the model's own on two tokens.

    Raises:
        ValueError: When they differ: the model does something to its logits that is not reproduced here.
    """
    ids = torch.tensor([[0, 1]], device=policy.device)
    hidden = policy.hf.base_model(input_ids=ids, use_cache=False).last_hidden_state
    head: Any = policy.hf.get_output_embeddings()
    ours = policy.transform(head(hidden))
    theirs = policy.hf(input_ids=ids, use_cache=False).logits.to(ours.dtype)
    # Both sides are one matrix product of the same numbers, in bfloat16 rounded a few times (2^-8 relative each).
    tolerance = 2e-2 if policy.hf.dtype == torch.bfloat16 else 1e-5
    if not torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance):
        raise ValueError(
            f"{type(policy.hf).__name__} changes its logits in a way that is not reproduced here "
            f"(largest difference {(ours - theirs).abs().max():.3g}); this model cannot be trained"
        )


def recompute_activations(hf: PreTrainedModel) -> None:
    """Have a model compute its activations again in the backward pass instead of keeping them."""
    # transformers 5.20 renamed the method.
    enable: Any = getattr(hf, "activation_checkpointing_enable", None) or hf.gradient_checkpointing_enable
    enable()


def load_policy(
    path: str,
    dtype: str = "float32",
    *,
    gradient_checkpointing: bool = False,
    lora: LoRA | None = None,
    layout: Layout | None = "padded",
    empty: bool = False,
) -> Policy:
    """Load a causal language model from a folder or a hub name, ready for training.

    Dropout is switched off: a probability ratio compares two policies, not two dropout masks.

    Args:
        path: A Hugging Face model folder or name, or a folder of adapters, which are merged into their model. Code
            from the hub is never run.
        dtype: ``float32``, ``bfloat16`` or ``float64``.
        gradient_checkpointing: Recompute activations in the backward pass.
        lora: Adapters to train instead of the weights.
        layout: How rows will be laid out for it; null: :func:`~lit_rlvr.layout.choose_layout` says.
        empty: On the meta device, without weights, unchecked: for a strategy that fills it in.

    Raises:
        ValueError: For an unknown dtype, a head that is not supported, or a layout that the model does not allow.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    base = base_of(path)
    config = AutoConfig.from_pretrained(base)
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for name, value in part.to_dict().items():
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(part, name, 0.0)
    # transformers before 5.20 chooses sdpa for models whose attention has a soft-cap, which sdpa leaves out.
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    attention: dict[str, Any] = {"attn_implementation": "eager"} if capped else {}
    if empty:
        with torch.device("meta"):
            hf = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], **attention)
        with suppress(OSError):  # it has none, and what follows from its configuration is right
            hf.generation_config = GenerationConfig.from_pretrained(base)
    else:
        hf = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=DTYPES[dtype], **attention)
        if base != path:
            hf = merge_folder(hf, path)
    if lora is not None:
        add_adapters(hf, lora)
    if gradient_checkpointing:
        recompute_activations(hf)
    policy = Policy(hf)
    if not empty:
        check_head(policy)
    policy.layout = choose_layout(hf, layout)
    if not empty and policy.layout != "padded":
        check_packs(hf)
    return policy.train()
