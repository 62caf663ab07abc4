"""Engines: what turns prompts into responses."""

from lit_rlvr.engines.base import Engine, Generation, Sampling
from lit_rlvr.engines.in_process import InProcessEngine

__all__ = ["Engine", "Generation", "InProcessEngine", "Sampling"]
