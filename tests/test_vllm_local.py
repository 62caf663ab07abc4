"""The in-process vLLM engine against a vLLM without a model: options, requests, weights, sleep, and what it refuses."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_local_vllm import LLM, FakePackage, installed
from rollouts import ThreadedReduce, run_ranks
from runs import TINY, train
from tiny_models import build, char_tokenizer

from lit_rlvr import Batch, RLVRModule, Sampling
from lit_rlvr.engines import Generation, VLLMInProcessEngine
from lit_rlvr.engines.vllm_responses import request
from lit_rlvr.lora import LoRA, add_adapters
from lit_rlvr.policy import Policy
from lit_rlvr.reduce import LocalReduce
from lit_rlvr.report import Report
from lit_rlvr.weights import named_weights

TOKENIZER, HERE = char_tokenizer(), LocalReduce()
PROMPTS = [[5, 6, 7], [8]]
UID = torch.tensor([(2, 100 + p, 3 + s) for p in range(2) for s in range(3)])


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FakePackage]]:
    """Makes the package importable until the test ends."""
    for name in ("VLLM_LOGGING_LEVEL", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(installed(**options))


def make_policy() -> Policy:
    policy = Policy(build("qwen3")).eval()
    policy.hf.config.name_or_path = "some/model"
    return policy


def started(fake: FakePackage, **options: Any) -> tuple[VLLMInProcessEngine, LLM]:
    """An engine that has a policy's weights, and its LLM."""
    engine = VLLMInProcessEngine(**options)
    engine.setup()
    engine.sync(make_policy(), 0, HERE)
    return engine, fake.made[-1]


def generate(engine: VLLMInProcessEngine, sampling: Sampling | None = None, **more: Any) -> Generation:
    given = {"prompts": PROMPTS, "uid": UID, **more}
    return engine.generate(make_policy(), TOKENIZER, given["prompts"], given["uid"], sampling or Sampling(), 7)


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sleep_level": 3}, "engine.sleep_level must be 0, 1 or 2, got 3"),
        ({"options": {"model": "x"}}, "engine.options has model, which the engine sets"),
        ({"options": {"logprobs_mode": "raw_logprobs"}}, "engine.options has logprobs_mode, which the engine sets"),
        ({"options": {"enable_sleep_mode": True}}, "engine.options has enable_sleep_mode, which the engine sets"),
        (
            {"options": {"tensor_parallel_size": 2}},
            "has tensor_parallel_size: 2, but .* VLLMColocatedEngine with devices_per_server",
        ),
        (
            {"options": {"data_parallel_size": 2}},
            "has data_parallel_size: 2, but .* VLLMColocatedEngine with devices_per_server",
        ),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        VLLMInProcessEngine(**options)


def test_an_unknown_option_is_refused_as_it_starts(install: Any) -> None:
    install()
    with pytest.raises(ValueError, match="max_model_length, which vLLM does not know; did you mean max_model_len"):
        started(install(), options={"max_model_length": 9})


def test_without_vllm_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the run begins; making an engine needs nothing."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    engine = VLLMInProcessEngine()
    assert not engine.exact("32-true")
    with pytest.raises(ValueError, match=r"needs vLLM in this environment .*: pip install 'lit-rlvr\[vllm\]' 'vllm<0"):
        engine.setup()


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0"])
def test_other_versions_are_refused(version: str, install: Any) -> None:
    install(version=version)
    with pytest.raises(ValueError, match=f"has vLLM {version}, and only versions .* are supported"):
        VLLMInProcessEngine().setup()


def test_sleep_is_refused_where_there_is_none(install: Any) -> None:
    fake = install()
    with pytest.raises(ValueError, match=r"vLLM cannot sleep on this platform \(cpu\); set engine.sleep_level to 0"):
        started(fake, sleep_level=1)
    assert not fake.made


def test_overlap_is_refused() -> None:
    with pytest.raises(ValueError, match="VLLMInProcessEngine samples in the process that trains"):
        VLLMInProcessEngine().check_overlap()


def test_what_vllm_is_started_with(install: Any) -> None:
    """No weights from the disk, log-probabilities at the sampling temperature, and this process's rank."""
    fake = install()
    engine, llm = started(fake, options={"max_model_len": 99, "tensor_parallel_size": 1})
    engine.close()
    assert llm.made == {
        "model": "some/model", "load_format": "dummy", "enable_sleep_mode": False, "max_model_len": 99,
        "tensor_parallel_size": 1, "logprobs_mode": "processed_logprobs",
        "distributed_executor_backend": "external_launcher",
        "worker_extension_cls": "lit_rlvr.engines.server_side.lit_rlvr_worker.WeightReceiver",
    }  # fmt: skip
    (environment,) = fake.started
    wanted = {
        "RANK": "0", "LOCAL_RANK": "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "group": 1,
    }  # fmt: skip
    assert {name: environment.get(name) for name in wanted} == wanted


# -- beside training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [None, RuntimeError("no memory")])
def test_training_does_not_notice(fails: Exception | None, install: Any) -> None:
    """Threads, environment and process groups are as they were, also when vLLM does not start; random numbers too."""
    fake, policy = install(), make_policy()
    fake.fails = fails
    engine = VLLMInProcessEngine()
    engine.setup()
    before = torch.get_rng_state(), random.getstate(), torch.set_num_threads, dict(os.environ)
    if fails is None:
        engine.sync(policy, 0, HERE)
    else:
        with pytest.raises(RuntimeError, match="no memory"):
            engine.sync(policy, 0, HERE)
    if fails is None:
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
    assert (torch.set_num_threads, dict(os.environ)) == before[2:]
    assert dist.is_initialized() == (fails is None)
    engine.close()
    assert not dist.is_initialized()


def test_the_run_keeps_its_process_group(install: Any) -> None:
    """vLLM joins it, and destroys what there is as it ends; the run's own goes on."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        engine, llm = started(install())
        engine.close()
        assert llm.done[-1] == "shutdown"
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total == 1
    finally:
        dist.destroy_process_group()


# -- weights -----------------------------------------------------------------------------------------------------------


def test_weights_are_loaded_once_per_update(install: Any) -> None:
    """All of them, with what was computed from older ones forgotten afterwards."""
    engine, llm = started(install())
    policy = make_policy()
    loading = ["lit_rlvr_begin", "lit_rlvr_use", "lit_rlvr_finish", "reset_prefix_cache"]
    assert llm.done == loading
    engine.sync(policy, 0, HERE)
    assert llm.done == loading
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 1
    engine.sync(policy, 1, HERE)
    assert llm.done == 2 * loading
    torch.testing.assert_close(llm.weights, dict(named_weights(policy)), rtol=0, atol=0)
    engine.setup()  # another run
    engine.sync(policy, 1, HERE)
    assert llm.done == 3 * loading
    engine.close()


def test_a_warm_started_policy_is_not_taken_for_the_one_before(install: Any) -> None:
    """Both are evaluated after no optimiser step, and each with its own weights."""
    fake, seen = install(), list[float]()
    engine, policies = VLLMInProcessEngine(), {name: make_policy() for name in ("base", "warm")}
    for number, policy in enumerate(policies.values()):
        torch.nn.init.constant_(policy.hf.model.norm.weight, number)
    engine.setup()

    def run(module: Any) -> dict[str, float]:
        engine.sync(module.policy, 0, HERE)
        seen.append(float(fake.made[-1].weights["model.norm.weight"].mean()))
        return {}

    module: Any = SimpleNamespace(
        policy=policies["warm"], base="base", open_policy=policies.get, place=lambda policy: policy, engine=engine,
        evaluator=SimpleNamespace(run=run),
    )  # fmt: skip
    trainer: Any = SimpleNamespace(global_step=0)
    Report().on_train_start(trainer, module)
    assert seen == [0, 1]
    engine.close()


def test_weights_are_made_as_they_are_taken(install: Any) -> None:
    """With adapters, which takes memory: those of a decoder layer at a time are there, and no copy of the others."""
    pytest.importorskip("peft", reason="the extra lit-rlvr[lora] is not installed")
    engine, llm = started(install())
    policy = make_policy()
    add_adapters(policy.hf, LoRA())
    own = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
    copies, most = dict[str, Any](), list[int]()

    def look(name: str, tensor: torch.Tensor) -> None:
        from weakref import ref

        if tensor.untyped_storage().data_ptr() not in own:
            copies[name] = ref(tensor)
        layers = {n.split(".")[2] for n, copy in copies.items() if copy() is not None}
        most.append(len(layers))

    llm.hook = look
    engine.sync(policy, 1, HERE)
    assert len({name.split(".")[2] for name in copies}) > 1
    assert max(most) == 1
    engine.close()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"missing": ["a.weight", "b"]}, "vLLM's model has weights that the policy has not, .*: a.weight, b"),
        ({"busy": True}, "vLLM is still sampling"),
    ],
)
def test_an_update_that_went_wrong_ends_the_run(changed: dict[str, Any], said: str, install: Any) -> None:
    engine, llm = started(install())
    vars(llm).update(changed)
    with pytest.raises(RuntimeError, match=said):
        engine.sync(make_policy(), 1, HERE)
    vars(llm).update(missing=[], busy=False)
    engine.sync(make_policy(), 1, HERE)  # is not taken for done
    assert llm.done.count("lit_rlvr_begin") == 3
    engine.close()


def test_a_failure_on_one_rank_is_raised_on_all(install: Any) -> None:
    """And every rank has gone through all weights, which are gathered together where they are sharded."""
    engine, _ = started(install())
    taken: list[Any] = []

    class Broken:
        def load(self, weights: Any) -> None:
            taken.append(weights)
            next(weights)
            raise ValueError("no room")

    def act(reduce: ThreadedReduce) -> str:
        own = VLLMInProcessEngine()
        own.vllm = Broken() if reduce.rank == 1 else engine.vllm  # type: ignore[assignment]
        with pytest.raises((RuntimeError, ValueError)) as raised:
            own.sync(make_policy(), 1, reduce)
        return repr(raised.value)

    assert run_ranks(2, act) == ["RuntimeError('on rank 1: no room')", "ValueError('no room')"]
    assert next(taken[0], None) is None
    engine.close()


def test_sleep_levels(install: Any) -> None:
    """The cache is woken after the weights have come; what level 2 dropped comes again."""
    for level in (1, 2):
        engine, llm = started(install(sleeps=True), sleep_level=level)
        llm.done.clear()
        engine.rest(HERE)
        engine.rest(HERE)
        assert llm.made["enable_sleep_mode"]
        assert llm.done == [f"sleep {level}"]
        engine.sync(make_policy(), 0, HERE)
        loading = ["lit_rlvr_begin", "lit_rlvr_use", "lit_rlvr_finish"] if level == 2 else []
        last = ["reset_prefix_cache"] if level == 2 else []
        assert llm.done[1:] == ["wake ['weights']", *loading, "wake ['kv_cache']", *last]
        engine.close()


def test_it_stays_awake_at_level_0(install: Any) -> None:
    engine, llm = started(install(sleeps=True))
    llm.done.clear()
    engine.rest(HERE)
    assert llm.done == []
    engine.close()


# -- sampling ----------------------------------------------------------------------------------------------------------


def test_a_prompt_is_asked_for_as_of_a_server(install: Any) -> None:
    """One request for all of its responses, with the same seed and the same parameters; answers in order."""
    engine, llm = started(install())
    sampling = Sampling(0.7, 12, top_p=0.9, top_k=5, stop=["7"])
    out = generate(engine, sampling)
    prompts, params = llm.done[-1]
    assert prompts == [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    ends = params[0].stop_token_ids
    assert ends
    for row, (prompt, own) in enumerate(zip(PROMPTS, params, strict=True)):
        body = request("x", prompt, UID[3 * row : 3 * row + 3], sampling, 7, ends)
        assert vars(own) == {**body["sampling_params"], "flat_logprobs": True}
    first = [2 + (own.seed + i) % 20 for own in params for i in range(3)]
    assert out.ids.tolist() == [[token, 1] for token in first]
    assert out.logprobs.tolist() == [[-token / 4, -0.25] for token in first]
    assert not out.truncated.any()
    assert out.entropies is None
    engine.close()


def test_a_rank_without_prompts_asks_for_nothing(install: Any) -> None:
    engine, llm = started(install())
    before = list(llm.done)
    out = generate(engine, prompts=[], uid=torch.empty(0, 3, dtype=torch.int64))
    assert out.ids.shape == out.mask.shape == out.logprobs.shape == (0, 0)
    assert llm.done == before
    engine.close()


def test_too_little_context_is_refused(install: Any) -> None:
    engine, _ = started(install(), options={"max_model_len": 20})
    generate(engine, Sampling(max_new_tokens=17))
    with pytest.raises(ValueError, match=r"3 tokens and max_new_tokens=18 exceed vLLM's context of 20 .*max_model_len"):
        generate(engine, Sampling(max_new_tokens=18))
    engine.close()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"reason": "abort"}, "vLLM broke off a response: abort"),
        ({"lost": 1}, "vLLM gave 2 responses instead of 3"),
        ({"wrong": 1}, "log-probabilities are not those of the tokens that it sampled"),
    ],
)
def test_answers_that_cannot_be_right_are_refused(changed: dict[str, Any], said: str, install: Any) -> None:
    engine, llm = started(install())
    vars(llm).update(changed)
    with pytest.raises(RuntimeError, match=said):
        generate(engine, Sampling(max_new_tokens=12))
    engine.close()


def test_a_run_from_beginning_to_end(install: Any) -> None:
    """Each phase is sampled from its own weights, and says how long copying them took."""
    fake = install(sleeps=True)
    module = RLVRModule(
        TINY, batch=Batch(4, 4, 2), engine=VLLMInProcessEngine({"max_model_len": 200}, 2),
        sampling=Sampling(max_new_tokens=12), optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
    )  # fmt: skip
    recorder = train(module, 4)
    (llm,) = fake.made
    order = [done if isinstance(done, str) else "generate" for done in llm.done]
    loading = ["lit_rlvr_begin", "lit_rlvr_use", "lit_rlvr_finish"]
    again = ["wake ['weights']", *loading, "wake ['kv_cache']", "reset_prefix_cache", "generate", "sleep 2"]
    assert order == [*loading, "reset_prefix_cache", "generate", "sleep 2", *again, "shutdown"]
    assert all(metrics["time/sync_s"] > 0 for metrics in recorder.metrics[::2])
    assert not dist.is_initialized()
