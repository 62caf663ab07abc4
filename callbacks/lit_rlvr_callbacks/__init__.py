"""lit-rlvr's own credit callbacks. See ``callbacks/README.md`` for a table and for how to write one."""

from lit_rlvr_callbacks.entropy_topk import EntropyTopK
from lit_rlvr_callbacks.perplexity import PerplexityShaping
from lit_rlvr_callbacks.position import PositionShaping
from lit_rlvr_callbacks.stage import StageDetector

__all__ = ["EntropyTopK", "PerplexityShaping", "PositionShaping", "StageDetector"]
