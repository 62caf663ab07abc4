"""A vLLM in this process: starting it beside training, which goes on as if it were not there, weights, sampling."""

# pyright: reportMissingImports=false
from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lit_rlvr.engines.base import Generation
from lit_rlvr.engines.server_side.lit_rlvr_worker import WeightReceiver
from lit_rlvr.engines.vllm_client import SUPPORTED
from lit_rlvr.engines.vllm_responses import response_tensors
from lit_rlvr.near import did_you_mean

dist: Any = torch.distributed
"""Its annotations leave some of its functions out."""

OURS: dict[str, Any] = {
    "logprobs_mode": "processed_logprobs",
    "distributed_executor_backend": "external_launcher",
    "worker_extension_cls": f"{WeightReceiver.__module__}.{WeightReceiver.__qualname__}",
}
"""Options without which the engine would not work."""

OWN = ("model", "enable_sleep_mode", *OURS)
"""Options that the engine sets."""

SPREAD = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "prefill_context_parallel_size")
"""Options that spread a model over processes."""

SURROUNDINGS = {
    # One log for both: vLLM's has some lines for every update of the weights.
    "VLLM_LOGGING_LEVEL": "WARNING",
    # On a CPU vLLM would tie this process's threads, which are training's too, to cores of its choice.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
"""Environment variables of vLLM that have another default here."""

PUT_BACK = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LD_PRELOAD", "VLLM_ENABLE_V1_MULTIPROCESSING")
"""Environment variables that are training's again once vLLM has started."""

TALKATIVE = "vllm.model_executor.model_loader.reload.layerwise"
"""A logger that warns of every layer without weights of its own, at every update; weights are counted here."""


def check_vllm() -> None:
    """Refuse to run without vLLM, or with another version.

    Raises:
        ValueError: Saying what to do.
    """
    for name, value in SURROUNDINGS.items():
        os.environ.setdefault(name, value)
    try:
        import vllm
    except ImportError as error:
        raise ValueError(
            f"VLLMInProcessEngine needs vLLM in this environment ({error}): pip install 'lit-rlvr[vllm]' "
            f"'vllm{SUPPORTED}'; with vLLM in an environment of its own, use VLLMColocatedEngine; without vLLM, "
            "--config configs/engine/in_process.yaml"
        ) from error
    if not SUPPORTED.contains(vllm.__version__, prereleases=True):
        raise ValueError(f"this environment has vLLM {vllm.__version__}, and only versions {SUPPORTED} are supported")


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options of vLLM that the engine sets, or that spread a model.

    Raises:
        ValueError: Naming the first.
    """
    for name, value in options.items():
        if name in OWN:
            raise ValueError(f"engine.options has {name}, which the engine sets; leave it out")
        if name in SPREAD and value != 1:
            raise ValueError(
                f"engine.options has {name}: {value}, but VLLMInProcessEngine has a whole model on every rank's "
                "device; for a model that takes several, use VLLMColocatedEngine with devices_per_server"
            )


class LocalVLLM:
    """A vLLM in this process, on one device. All ranks make theirs at the same time.

    Args:
        model: Folder or hub name; its weights are not read.
        device: Where.
        rank: This process's, among all.
        options: vLLM's own, as ``vllm.LLM`` takes them.
        sleeps: Whether it will ever sleep.

    Raises:
        ValueError: For an option that vLLM does not know, and for sleep where there is none.
    """

    def __init__(self, model: str, device: torch.device, rank: int, options: Mapping[str, Any], sleeps: bool) -> None:
        from vllm import LLM, EngineArgs, SamplingParams
        from vllm.platforms import current_platform

        known = [field.name for field in fields(EngineArgs)]
        for name in options:
            if name not in known:
                raise ValueError(f"engine.options has {name}, which vLLM does not know{did_you_mean(name, known)}")
        if sleeps and not current_platform.is_sleep_mode_available():
            raise ValueError(
                f"vLLM cannot sleep on this platform ({current_platform.device_type}); set engine.sleep_level to 0"
            )
        given = {"load_format": "dummy", "enable_sleep_mode": sleeps, **options, **OURS}
        self._parameters: Any = SamplingParams
        with beside_training(device, rank) as self._group:
            self.llm: Any = LLM(model=model, **given)
        logging.getLogger(TALKATIVE).setLevel(logging.ERROR)

    @property
    def context(self) -> int:
        """Longest prompt and response together, in tokens."""
        return int(self.llm.llm_engine.model_config.max_model_len)

    def load(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Copy weights into those that they replace, as they come.

        Raises:
            RuntimeError: When the model has others.
        """
        self.llm.collective_rpc("lit_rlvr_begin")
        self.llm.collective_rpc("lit_rlvr_use", args=(weights,))
        missing = [name for said in self.llm.collective_rpc("lit_rlvr_finish") for name in said["missing"]]
        if missing:
            raise RuntimeError(
                "vLLM's model has weights that the policy has not, so it is another model: " + ", ".join(missing[:5])
            )

    def forget(self) -> None:
        """Forget what was computed with other weights."""
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM is still sampling, and would go on with what it computed from old weights")

    def sleep(self, level: int) -> None:
        """Give up memory: the cache, and at level 2 the weights too, which level 1 keeps in the host's memory."""
        self.llm.sleep(level=level)

    def wake(self, what: str) -> None:
        """Take memory back: ``weights`` or ``kv_cache``. First vLLM empties this process's cache, training's too."""
        self.llm.wake_up(tags=[what])

    def sample(self, prompts: Sequence[Sequence[int]], parameters: Sequence[dict[str, Any]]) -> Generation:
        """Responses to prompts.

        Args:
            prompts: Tokens.
            parameters: Of each, as :func:`~lit_rlvr.engines.vllm_responses.sampling_parameters` has them.

        Raises:
            RuntimeError: When responses are missing, or were broken off.
        """
        asked = [self._parameters(**named, flat_logprobs=True) for named in parameters]
        given = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        answers = self.llm.generate(given, asked, use_tqdm=False)
        responses = []
        for answer, wanted in zip(answers, asked, strict=True):
            if len(answer.outputs) != wanted.n:
                raise RuntimeError(f"vLLM gave {len(answer.outputs)} responses instead of {wanted.n}")
            responses += sorted(answer.outputs, key=lambda response: int(response.index))
        for response in responses:
            if response.finish_reason not in ("stop", "length"):
                raise RuntimeError(f"vLLM broke off a response: {response.finish_reason}")
        return response_tensors(
            [list(response.token_ids) for response in responses],
            [[*zip(r.logprobs.token_ids, r.logprobs.logprobs, strict=True)] for r in responses],
            [response.finish_reason == "length" for response in responses],
        )

    def close(self) -> None:
        """End it, and give its memory back."""
        with keeping_default_group():
            self.llm.llm_engine.engine_core.shutdown()
        self.llm = None
        if self._group is not None:
            dist.destroy_process_group()


@contextmanager
def beside_training(device: torch.device, rank: int) -> Iterator[Any]:
    """Where vLLM may start, which takes a process to be its own.

    Gives the default process group if it was made for vLLM, which joins the one that there is.
    """
    before, set_threads = {name: os.environ.get(name) for name in PUT_BACK}, torch.set_num_threads
    group = None
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        group = dist.group.WORLD
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(device.index or 0), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    try:
        with isolate_rng(include_cuda=device.type == "cuda"):
            yield group
    except BaseException:
        if group is not None and dist.is_initialized():
            dist.destroy_process_group()
        raise
    finally:
        torch.set_num_threads = set_threads  # replaced on a CPU by one that does nothing
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def keeping_default_group() -> Iterator[None]:
    """Where vLLM may end, which destroys all process groups, also the default one; that is training's."""
    destroy = dist.destroy_process_group

    def others(group: Any = None) -> None:
        if group is not None and group is not dist.group.WORLD:
            destroy(group)

    with patch.object(dist, "destroy_process_group", others):
        yield
