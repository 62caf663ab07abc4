"""Correct for an engine whose probabilities are not the training model's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from lit_rlvr.credit import CreditCallback, CreditContext
from lit_rlvr.reduce import mean
from lit_rlvr.scoring import engine_is_exact
from lit_rlvr.types import Credit, RolloutBatch

if TYPE_CHECKING:
    from lit_rlvr.module import RLVRModule


class TruncatedImportance(CreditCallback):
    """Multiply the weight by min(pi_old / pi_engine, cap), as a constant; the denominator stays.

    pi_old is the training model's probability under the policy that the phase began with, and pi_engine what the engine
    reported for the same token; with ``model.overlap`` that is a probability under weights that are one phase older. At
    ``level: sequence`` the ratio is that of the whole response, the product over its tokens. With ``above: mask`` a
    ratio above the cap becomes 0 instead of the cap.

    Source: TIS, Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training", with a cap
    of 2; the four combinations are TRL's ``vllm_importance_sampling_mode``, whose cap is 3.

    Args:
        cap: Largest ratio.
        level: One ratio per ``token`` or per ``sequence``.
        above: ``truncate`` ratios above the cap to it, or ``mask`` them: weight 0.
        stages: Act only in these stages.
        name: Name in logs and checkpoints.

    Raises:
        ValueError: For a ``cap`` of at most 0, or an unknown word.
    """

    corrects_engine = True

    def __init__(
        self,
        cap: float = 2.0,
        level: Literal["token", "sequence"] = "token",
        above: Literal["truncate", "mask"] = "truncate",
        stages: list[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(stages, name)
        if cap <= 0:
            raise ValueError(f"TruncatedImportance.cap is the largest ratio and must be > 0, got {cap}")
        if level not in ("token", "sequence") or above not in ("truncate", "mask"):
            raise ValueError(
                "TruncatedImportance.level must be token or sequence and above truncate or mask; "
                f"got {level!r} and {above!r}"
            )
        self.cap, self.level, self.above, self.token_level = cap, level, above, level == "token"

    def check(self, module: RLVRModule) -> None:
        if engine_is_exact(module):
            raise ValueError(
                f"{self.state_key} would change nothing: engine {type(module.engine).__name__} reports the training "
                "model's own log-probabilities; take the callback out"
            )

    def assign(self, credit: Credit, rollout: RolloutBatch, ctx: CreditContext) -> Credit:
        if rollout.engine_logprobs is None:
            raise ValueError(f"{self.state_key} needs the engine's log-probabilities beside the training model's")
        mask = rollout.response_mask
        log_ratio = (rollout.old_logprobs.double() - rollout.engine_logprobs.double()) * mask
        ratio = (log_ratio if self.level == "token" else log_ratio.sum(-1, keepdim=True)).exp().expand_as(log_ratio)
        over = ratio > self.cap
        factor = ratio.clamp(max=self.cap) if self.above == "truncate" else ratio.masked_fill(over, 0.0)
        ctx.log("mean_weight", mean(ctx.reduce, factor, mask))
        ctx.log("truncated", mean(ctx.reduce, over, mask))
        return replace(credit, weight=credit.weight * factor.to(credit.weight))
