"""lit-rlvr's own credit callbacks. See ``callbacks/README.md`` for a table and for how to write one."""

from lit_rlvr_callbacks.clip_cov import ClipCov
from lit_rlvr_callbacks.defect_penalty import DefectPenalty
from lit_rlvr_callbacks.entropy_advantage import EntropyAdvantage
from lit_rlvr_callbacks.entropy_bonus import EntropyBonus
from lit_rlvr_callbacks.entropy_topk import EntropyTopK
from lit_rlvr_callbacks.kl_cov import KLCov
from lit_rlvr_callbacks.mask_truncated import MaskTruncated
from lit_rlvr_callbacks.negative_reinforcement import NegativeReinforcement
from lit_rlvr_callbacks.perplexity import PerplexityShaping
from lit_rlvr_callbacks.position import PositionShaping
from lit_rlvr_callbacks.positive_negative import PositiveNegative
from lit_rlvr_callbacks.stage import StageDetector
from lit_rlvr_callbacks.truncated_importance import TruncatedImportance
from lit_rlvr_callbacks.zero_variance import ZeroVariance

__all__ = [
    "ClipCov",
    "DefectPenalty",
    "EntropyAdvantage",
    "EntropyBonus",
    "EntropyTopK",
    "KLCov",
    "MaskTruncated",
    "NegativeReinforcement",
    "PerplexityShaping",
    "PositionShaping",
    "PositiveNegative",
    "StageDetector",
    "TruncatedImportance",
    "ZeroVariance",
]
