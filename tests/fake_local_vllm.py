"""The package vllm without a model: what an engine in the same process asks, in the shapes of vLLM 0.32."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

END = 1


@dataclass
class EngineArgs:
    """Some of vLLM's options."""

    model: str
    dtype: str = "auto"
    load_format: str = "auto"
    max_model_len: int = 64
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    enable_sleep_mode: bool = False
    logprobs_mode: str = "raw_logprobs"
    distributed_executor_backend: str | None = None
    worker_extension_cls: str = ""
    tensor_parallel_size: int = 1


@dataclass
class SamplingParams:
    """Those that the engine sets; others are refused."""

    n: int
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    seed: int
    stop_token_ids: list[int]
    stop: list[str]
    detokenize: bool
    skip_special_tokens: bool
    spaces_between_special_tokens: bool
    logprobs: int
    flat_logprobs: bool


@dataclass
class LLM:
    """Keeps a copy of the weights that it is given, and what it was told.

    Attributes:
        done: Calls in their order.
        weights: The weights in use.
        hook: Called with each weight as it comes.
        broken: What finish reasons or counts are instead of the right ones.
    """

    made: dict[str, Any]
    done: list[Any] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    hook: Any = None
    busy: bool = False
    reason: str = "stop"
    lost: int = 0
    wrong: int = 0

    def __post_init__(self) -> None:
        args = EngineArgs(**self.made)
        config = SimpleNamespace(max_model_len=args.max_model_len)
        core = SimpleNamespace(shutdown=self.shutdown)
        self.llm_engine = SimpleNamespace(model_config=config, engine_core=core)

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        self.done.append(method)
        if method == "lit_rlvr_use":
            for name, tensor in args[0]:
                if self.hook is not None:
                    self.hook(name, tensor)
                self.weights[name] = tensor.clone()
        return [{"missing": self.missing} if method == "lit_rlvr_finish" else {}]

    def reset_prefix_cache(self) -> bool:
        self.done.append("reset_prefix_cache")
        return not self.busy

    def sleep(self, level: int) -> None:
        self.done.append(f"sleep {level}")

    def wake_up(self, tags: list[str]) -> None:
        self.done.append(f"wake {tags}")

    def generate(self, prompts: list[Any], params: list[SamplingParams], use_tqdm: bool) -> list[Any]:
        """Responses of two tokens, the first of which tells whose it is; in reverse order of their index."""
        assert not use_tqdm
        self.done.append((prompts, params))
        answers = []
        for one in params:
            outputs = []
            for i in reversed(range(one.n - self.lost)):
                tokens = [2 + (one.seed + i) % 20, END]
                scores = SimpleNamespace(token_ids=[t + self.wrong for t in tokens], logprobs=[-t / 4 for t in tokens])
                outputs.append(SimpleNamespace(index=i, token_ids=tokens, logprobs=scores, finish_reason=self.reason))
            answers.append(SimpleNamespace(outputs=outputs))
        return answers

    def shutdown(self) -> None:
        """Destroys every process group, as vLLM does."""
        self.done.append("shutdown")
        if dist.is_initialized():
            dist.destroy_process_group()


class FakePackage:
    """The package, and every LLM that was made of it.

    Args:
        version: Of the package.
        sleeps: Whether the platform can.
    """

    def __init__(self, version: str, sleeps: bool) -> None:
        self.made: list[LLM] = []
        self.started: list[dict[str, Any]] = []
        self.fails: Exception | None = None
        self.package, self.platforms = ModuleType("vllm"), ModuleType("vllm.platforms")
        parts = {"__version__": version, "EngineArgs": EngineArgs, "SamplingParams": SamplingParams, "LLM": self.make}
        vars(self.package).update(parts)
        platform = SimpleNamespace(is_sleep_mode_available=lambda: sleeps, device_type="cpu")
        vars(self.platforms)["current_platform"] = platform

    def make(self, **options: Any) -> LLM:
        """An LLM, which does to the process what vLLM does."""
        import os
        import random

        self.started.append({**os.environ, "group": dist.is_initialized() and dist.get_world_size()})
        torch.manual_seed(0)
        random.seed(0)
        torch.set_num_threads = lambda number: None
        os.environ |= {"LD_PRELOAD": "something", "LOCAL_WORLD_SIZE": "1"}
        if self.fails is not None:
            raise self.fails
        self.made.append(LLM(options))
        return self.made[-1]


@contextmanager
def installed(version: str = "0.32.0", sleeps: bool = False) -> Iterator[FakePackage]:
    """The package can be imported."""
    fake = FakePackage(version, sleeps)
    names = {"vllm": fake.package, "vllm.platforms": fake.platforms}
    with pytest.MonkeyPatch.context() as patch:  # of these two alone: what is imported meanwhile stays imported
        for name, module in names.items():
            patch.setitem(sys.modules, name, module)
        yield fake
