"""Rewards: what an answer is worth. Importing this package does not import torch."""

from lit_rlvr.rewards.base import Judgement, Reward
from lit_rlvr.rewards.exact import ExactMatch
from lit_rlvr.rewards.function import PythonFunction
from lit_rlvr.rewards.math_verify import MathVerify

__all__ = ["ExactMatch", "Judgement", "MathVerify", "PythonFunction", "Reward"]
