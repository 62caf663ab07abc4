"""Engines: what turns prompts into responses."""

from lit_rlvr.engines.base import Engine, Generation, Sampling
from lit_rlvr.engines.in_process import InProcessEngine
from lit_rlvr.engines.vllm_colocated import VLLMColocatedEngine
from lit_rlvr.engines.vllm_in_process import VLLMInProcessEngine
from lit_rlvr.engines.vllm_server import VLLMServerEngine

__all__ = [
    "Engine", "Generation", "InProcessEngine", "Sampling", "VLLMColocatedEngine", "VLLMInProcessEngine",
    "VLLMServerEngine",
]  # fmt: skip
