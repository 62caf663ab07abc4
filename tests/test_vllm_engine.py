"""The vLLM engine against a server without a model: what it asks, what it makes of the answers, what it refuses."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_vllm import END, FakeVLLM, serving
from rollouts import ThreadedReduce, run_ranks
from runs import TINY, train
from tiny_models import VOCABULARY, build, char_tokenizer

from lit_rlvr import Batch, RLVRModule, Sampling
from lit_rlvr.engines import Generation, VLLMServerEngine, vllm_broadcast, vllm_engine, vllm_push
from lit_rlvr.engines.vllm_engine import shared_memory
from lit_rlvr.policy import Policy
from lit_rlvr.reduce import LocalReduce
from lit_rlvr.weights import named_weights

TOKENIZER, HERE = char_tokenizer(), LocalReduce()
HIDDEN = 16
PROMPTS = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]]


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[FakeVLLM, str]]]:
    """Starts servers that end with the test."""
    with ExitStack() as stack:

        def start(vocabulary: int = VOCABULARY, hidden: int = HIDDEN, **changed: Any) -> tuple[FakeVLLM, str]:
            fake = FakeVLLM(vocabulary, hidden, **changed)
            return fake, stack.enter_context(serving(fake))

        yield start


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits between two tries."""
    monkeypatch.setattr("lit_rlvr.engines.vllm_client.time.sleep", lambda seconds: None)


def make_policy() -> Policy:
    return Policy(build("qwen3")).eval()


def make_uid(prompts: int, samples: int, first: int = 0) -> torch.Tensor:
    return torch.tensor([(2, 100 + p, first + s) for p in range(prompts) for s in range(samples)])


def ready(*addresses: str, **options: Any) -> VLLMServerEngine:
    """An engine that has pushed a policy's weights."""
    engine = VLLMServerEngine(list(addresses), **options)
    engine.setup()
    engine.sync(make_policy(), 0, HERE)
    return engine


def generate(engine: VLLMServerEngine, samples: int = 2, sampling: Sampling | None = None, **more: Any) -> Generation:
    prompts = more.pop("prompts", PROMPTS)
    uid = more.pop("uid", make_uid(len(prompts), samples))
    return engine.generate(make_policy(), TOKENIZER, prompts, uid, sampling or Sampling(), more.pop("seed", 7))


# -- meeting a server --------------------------------------------------------------------------------------------------


def test_making_an_engine_contacts_nobody() -> None:
    engine = VLLMServerEngine(["http://127.0.0.1:9", "http://localhost:9"])
    assert not engine.exact("32-true")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"addresses": []}, "engine.addresses needs the address of a vLLM server"),
        ({"addresses": ["127.0.0.1:8000"]}, "an address looks like http://127.0.0.1:8000"),
        ({"addresses": ["http://localhost:1", "http://localhost:1/"]}, "has the same server twice"),
        (
            {"addresses": ["http://node7:8000"], "transport": "files"},
            "set engine.folder to a folder that this machine",
        ),
        ({"sleep_level": 3}, "engine.sleep_level must be 0, 1 or 2, got 3"),
        ({"retries": -1}, "engine.retries must be at least 0, got -1"),
        ({"timeout": 0}, "engine.timeout must be above 0, got 0"),
        ({"requests": 0}, "engine.requests must be above 0, got 0"),
        ({"file_megabytes": 0}, "engine.file_megabytes must be above 0, got 0"),
        ({"transport": "pigeon"}, "engine.transport must be auto, files, gloo or nccl, got 'pigeon'"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        VLLMServerEngine(**{"addresses": ["http://127.0.0.1:9"], **options})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"version": "0.31.4"}, "is vLLM 0.31.4, and only versions"),
        ({"version": "0.33.0"}, "is vLLM 0.33.0, and only versions"),
        ({"development": False}, "VLLM_SERVER_DEV_MODE=1"),
        ({"logprobs_mode": "raw_logprobs"}, "reports raw_logprobs, which leave the temperature out"),
        ({"worker": ""}, "--worker-extension-cls lit_rlvr_worker.WeightReceiver"),
        ({"protocol": 0}, "another version of lit-rlvr"),
    ],
)
def test_a_server_that_would_not_do_is_refused(changed: dict[str, Any], said: str, serve: Any) -> None:
    _, address = serve(**changed)
    with pytest.raises(ValueError, match=said):
        VLLMServerEngine([address]).setup()


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.32.1.dev3+gabc"])
def test_supported_versions_are_met(version: str, serve: Any) -> None:
    _, address = serve(version=version, context=77)
    engine = VLLMServerEngine([address])
    engine.setup()
    assert [s.context for s in engine.served] == [77]


def test_no_server_is_said_after_all_tries() -> None:
    engine = VLLMServerEngine(["http://127.0.0.1:9"], retries=2)
    with pytest.raises(ConnectionError, match=r"there is no vLLM server at http://127\.0\.0\.1:9; start one with"):
        engine.setup()
    assert engine.metrics(HERE)["engine/retries"] == 2


def test_a_silent_server_is_told_from_none(serve: Any) -> None:
    fake, address = serve()
    engine = ready(address, timeout=0.05, retries=1)
    fake.choices = lambda fake, body: threading.Event().wait(0.5)
    with pytest.raises(ConnectionError, match=r"did not answer /inference/v1/generate within 0.05 seconds"):
        generate(engine, prompts=[[5]])


@pytest.mark.parametrize("sizes", [(VOCABULARY + 1, HIDDEN), (VOCABULARY, HIDDEN * 2)])
def test_another_model_is_refused_before_weights_are_sent(sizes: tuple[int, int], serve: Any) -> None:
    fake, address = serve(*sizes)
    with pytest.raises(ValueError, match=rf"another model than the policy: .* {sizes[0]} and {sizes[1]}, the policy's"):
        ready(address)
    assert fake.bodies("/collective_rpc") == [{"method": "lit_rlvr_about", "kwargs": {}}]


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_bytes", [1, 3000, 2**20])
@pytest.mark.parametrize("transport", ["files", "gloo"])
def test_every_server_gets_the_policys_weights(file_bytes: int, transport: Any, serve: Any, tmp_path: Path) -> None:
    """In parts of any size, whose files are gone afterwards; then the cache is emptied and the weights are named."""
    (one, first), (two, second) = serve(), serve()
    engine = VLLMServerEngine([first, second], folder=str(tmp_path), transport=transport)
    policy = make_policy()
    engine.file_bytes = file_bytes
    engine.setup()
    for step in range(2):
        with torch.no_grad():
            policy.hf.get_input_embeddings().weight.add_(1.0)
        engine.sync(policy, step, HERE)
        for fake in (one, two):
            wanted = dict(named_weights(policy))
            assert fake.weights.keys() == wanted.keys()
            assert all(torch.equal(fake.weights[name], tensor) for name, tensor in wanted.items())
            assert fake.name == engine.version
            assert fake.name.endswith(f"-{step}")
            assert [path for _, path, _, _ in fake.asked][-2:] == ["/reset_prefix_cache", "/update_weight_version"]
    calls = [body["method"].removeprefix("lit_rlvr_") for body in one.bodies("/collective_rpc")]
    loads = {1: len(list(named_weights(policy))), 3000: 7, 2**20: 1}[file_bytes]
    join, load = {"files": ([], "load"), "gloo": (["join"], "receive")}[transport]
    assert calls == ["about", *join, *2 * ["begin", *[load] * loads, "finish"]]
    numbers = [b["kwargs"]["number"] for b in one.bodies("/collective_rpc") if b["method"] == f"lit_rlvr_{load}"]
    assert numbers == [*range(loads), *range(loads)]
    assert list(tmp_path.iterdir()) == []


def test_a_server_is_told_where_files_are(serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the root on, because it may have been started in another folder."""
    fake, address = serve()
    monkeypatch.chdir(tmp_path)
    engine = VLLMServerEngine([address], folder="weights")
    engine.setup()
    engine.sync(make_policy(), 0, HERE)
    files = [b["kwargs"]["file"] for b in fake.bodies("/collective_rpc") if b["method"] == "lit_rlvr_load"]
    assert {Path(file).parent.parent for file in files} == {tmp_path / "weights"}


@pytest.mark.parametrize("transport", ["files", "gloo"])
def test_matrices_are_rounded_to_what_the_server_computes_in(transport: str, serve: Any) -> None:
    """Which halves what is sent; vectors stay, since servers keep some in float32."""
    fake, address = serve(dtype="torch.bfloat16")
    ready(address, transport=transport)
    for name, tensor in named_weights(make_policy()):
        assert torch.equal(fake.weights[name], tensor.to(fake.weights[name].dtype)), name
    kinds = {(tensor.dim(), tensor.dtype) for tensor in fake.weights.values()}
    assert kinds == {(1, torch.float32), (2, torch.bfloat16)}


@pytest.mark.parametrize(
    ("transport", "changed", "why"),
    [
        ("nccl", {}, "there is no NCCL for a broadcast here"),
        (
            "nccl",
            {"nccl": [2, 27, 5]},
            "has NCCL 2.27.5 and training has no NCCL; NCCL connects processes",
        ),
        ("gloo", {"replicas": 2}, "has 2 replicas of the model"),
        ("gloo", {"joins": False}, "out of reach"),
    ],
)
def test_files_replace_a_broadcast_that_does_not_come_about(
    transport: str, changed: dict[str, Any], why: str, serve: Any, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once per run, with one line that says why; and without a folder for files, with an error."""
    monkeypatch.setattr(vllm_broadcast, "JOIN_SECONDS", 1.0)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    (_, good), (fake, bad) = serve(), serve(**changed)
    engine = ready(good, bad, transport=transport, retries=0)
    engine.sync(make_policy(), 1, HERE)
    said = [record.getMessage() for record in caplog.records if "weights go through files" in record.getMessage()]
    assert len(said) == 1
    assert why in said[0]
    methods = [body["method"] for body in fake.bodies("/collective_rpc")]
    assert (methods.count("lit_rlvr_load"), methods.count("lit_rlvr_receive")) == (2, 0)
    alone = VLLMServerEngine([good, bad], transport=transport, retries=0)  # type: ignore[arg-type]
    alone.setup()
    alone.folder = None
    with pytest.raises(RuntimeError, match=f"cannot be broadcast .*{why}.* set engine.folder"):
        alone.sync(make_policy(), 0, HERE)


def test_servers_elsewhere_are_sent_a_broadcast() -> None:
    """Files need a folder that both sides see, a broadcast does not; on one machine shared memory is faster."""
    ways = {}
    for host in ("127.0.0.1", "node7"):
        for folder in (None, "/shared"):
            engine = VLLMServerEngine([f"http://{host}:8000"], folder=folder)
            ways[host, folder] = engine.backend, engine.folder
    assert ways == {
        ("127.0.0.1", None): (None, shared_memory()), ("127.0.0.1", "/shared"): (None, Path("/shared")),
        ("node7", None): ("gloo", None), ("node7", "/shared"): ("gloo", Path("/shared")),
    }  # fmt: skip


def test_a_server_that_does_not_receive_is_said_at_once(serve: Any) -> None:
    """Nobody waits for it: neither the trainer nor the other server, whose part never comes whole."""
    (good, first), (bad, second) = serve(), serve()
    engine, policy = VLLMServerEngine([first, second], transport="gloo", retries=0), make_policy()
    engine.setup()
    engine.sync(policy, 0, HERE)
    bad.group = None
    with pytest.raises(RuntimeError, match="not in the group"):
        engine.sync(policy, 1, HERE)
    engine.setup()  # a new run makes a new group
    engine.sync(policy, 1, HERE)
    assert good.name == bad.name == engine.version


@pytest.mark.parametrize("transport", ["files", "gloo"])
def test_a_failed_push_does_not_wait_for_a_server_that_hangs(transport: Any, serve: Any) -> None:
    """It is said at once, and nothing that still waits keeps the process alive."""
    (bad, first), (hung, second) = serve(), serve()
    engine, policy, before = VLLMServerEngine([first, second], transport=transport, retries=0), make_policy(), alive()
    engine.setup()
    engine.sync(policy, 0, HERE)
    bad.group, bad.fails = None, "lit_rlvr_load" if transport == "files" else ""
    hung.takes_part.clear()
    try:
        with pytest.raises(RuntimeError, match={"files": "out of luck", "gloo": "not in the group"}[transport]):
            engine.sync(policy, 1, HERE)
        assert all(thread.daemon for thread in alive() - before)
    finally:
        hung.takes_part.set()


def test_a_failed_sample_does_not_wait_for_a_server_that_hangs(serve: Any) -> None:
    """Nor for the prompts before the one that failed."""
    (hung, first), (bad, second) = serve(), serve()
    engine, before, end = ready(first, second, retries=0), alive(), threading.Event()
    hung.choices = lambda fake, body: end.wait()
    bad.choices = lambda fake, body: []
    try:
        with pytest.raises(RuntimeError, match="gave 0 responses instead of 2"):
            generate(engine)
        assert all(thread.daemon for thread in alive() - before)
    finally:
        end.set()


def alive() -> set[threading.Thread]:
    """This process's threads."""
    return set(threading.enumerate())


def test_weights_are_pushed_once_per_change(serve: Any) -> None:
    """The same number of steps means the same weights, until another run begins."""
    fake, address = serve()
    engine, policy, names = VLLMServerEngine([address]), make_policy(), []
    for begin, step in ((True, 0), (False, 0), (False, 3), (False, 3), (True, 3)):
        if begin:
            engine.setup()
        engine.sync(policy, step, HERE)
        names.append(fake.name)
    assert [names.index(name) for name in names] == [0, 0, 2, 2, 4]


def test_weights_that_the_policy_lacks_are_an_error(serve: Any) -> None:
    fake, address = serve()
    fake.missing = ["lm_head.weight"]
    with pytest.raises(RuntimeError, match=r"weights that the policy has not, .*: lm_head.weight"):
        ready(address)
    assert fake.name == "default"


def test_a_server_that_works_for_others_is_an_error(serve: Any) -> None:
    """Its cache would go on with old weights."""
    fake, address = serve()
    fake.busy = True
    with pytest.raises(RuntimeError, match="a server serves one run"):
        ready(address)
    assert fake.name == "default"


@pytest.mark.parametrize("level", [1, 2])
def test_servers_sleep_between_phases(level: int, serve: Any) -> None:
    """Weights that slept in the host's memory are still there; at level 2 they are pushed again, before the cache."""
    fake, address = serve(enable_sleep_mode=True)
    engine = ready(address, sleep_level=level)
    generate(engine)
    engine.rest(HERE)
    engine.rest(HERE)
    assert fake.asleep
    assert [query for _, path, query, _ in fake.asked if path == "/sleep"] == [{"level": [str(level)]}]
    pushed, before = fake.name, len(fake.asked)
    engine.sync(make_policy(), 0, HERE)
    generate(engine)
    assert not fake.asleep
    assert (fake.name == pushed) == (level == 1)
    order = [query.get("tags", path) for _, path, query, _ in fake.asked[before:]]
    assert order[0] == ["weights"]
    assert order.index(["kv_cache"]) == len(order) - 1 - len(PROMPTS)
    assert order.count("/collective_rpc") == (0 if level == 1 else 3)


@pytest.mark.parametrize("level", [1, 2])
def test_a_server_wakes_up_once_no_rank_holds_memory(level: int, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is another process, so what training has kept of its peak, on any rank, is not the server's to take."""
    ranks = threading.local()
    fake, address = serve(enable_sleep_mode=True)
    monkeypatch.setattr(vllm_engine, "give_back_unused", lambda device: fake.held.discard(ranks.own))

    def gather(policy: Policy) -> Iterator[tuple[str, torch.Tensor]]:
        fake.held.add(ranks.own)
        yield from named_weights(policy)

    monkeypatch.setattr(vllm_push, "named_weights", gather)

    def run(reduce: ThreadedReduce) -> None:
        ranks.own, policy = reduce.rank, make_policy()
        engine = VLLMServerEngine([address], sleep_level=level, retries=0)
        engine.setup()
        engine.sync(policy, 0, reduce)
        for phase in (1, 2):
            engine.rest(reduce)
            fake.held.add(reduce.rank)  # learns
            engine.sync(policy, phase, reduce)
            assert not fake.asleep

    run_ranks(2, run)
    assert fake.called("/wake_up") == 4


def test_servers_that_another_run_left_asleep_are_woken(serve: Any) -> None:
    """Also by a run that would not have sent them to sleep."""
    fake, address = serve(enable_sleep_mode=True)
    ready(address, sleep_level=2).rest(HERE)
    generate(ready(address, sleep_level=0))
    assert not fake.asleep


def test_without_sleep_nobody_is_sent_to_bed(serve: Any) -> None:
    fake, address = serve()
    ready(address).rest(HERE)
    assert not fake.called("/sleep")
    with pytest.raises(ValueError, match="cannot sleep; start it with --enable-sleep-mode"):
        ready(address, sleep_level=1)


# -- sampling ----------------------------------------------------------------------------------------------------------


def test_everything_that_shapes_the_distribution_is_said(serve: Any) -> None:
    """Nothing is left to the server's defaults, which may come from the model's generation_config.json."""
    fake, address = serve()
    sampling = Sampling(temperature=0.7, max_new_tokens=9, top_p=0.9, top_k=5, stop=["ab"])
    generate(ready(address), 3, sampling, prompts=[[5, 6, 7]])
    (body,) = fake.bodies("/inference/v1/generate")
    seed = body["sampling_params"].pop("seed")
    assert 0 <= seed < 2**63 - 3
    assert body == {
        "model": "served",
        "token_ids": [5, 6, 7],
        "sampling_params": {
            "n": 3, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "max_tokens": 9, "stop_token_ids": [END],
            "stop": ["ab"], "detokenize": True, "skip_special_tokens": False, "spaces_between_special_tokens": False,
            "logprobs": 0,
        },
    }  # fmt: skip


def test_answers_become_tensors(serve: Any) -> None:
    """Rows in the order of prompts and samples, whatever order they come in; the end token is part of the response."""
    fake, address = serve()

    def choices(fake: FakeVLLM, body: dict[str, Any]) -> list[dict[str, Any]]:
        long = [len(body["token_ids"]), *[20] * len(body["token_ids"])]
        return [fake.choice(1, [30, END]), fake.choice(0, long, "length")]

    fake.choices = choices
    out = generate(ready(address))
    rows = [row[mask].tolist() for row, mask in zip(out.ids, out.mask, strict=True)]
    assert rows == [r for p in PROMPTS for r in ([len(p), *[20] * len(p)], [30, END])]
    assert out.truncated.tolist() == [True, False] * 4
    assert out.entropies is None
    assert not out.ids[~out.mask].any()
    assert torch.equal(out.logprobs, out.ids / -4)
    assert out.ids.shape == (8, 5)


def test_no_prompts_no_requests(serve: Any) -> None:
    fake, address = serve()
    out = generate(ready(address), prompts=[], uid=torch.zeros(0, 3, dtype=torch.int64))
    assert out.ids.shape == out.mask.shape == out.logprobs.shape == (0, 0)
    assert not fake.called("/inference/v1/generate")


def test_prompts_are_spread_evenly(serve: Any) -> None:
    """Over all servers of one process, without a change of the responses."""
    alone = generate(ready(serve()[1]), prompts=PROMPTS * 3)
    servers = [serve() for _ in range(3)]
    together = generate(ready(*(address for _, address in servers)), prompts=PROMPTS * 3)
    assert [fake.called("/inference/v1/generate") for fake, _ in servers] == [4, 4, 4]
    assert torch.equal(together.ids, alone.ids)


def test_a_seed_belongs_to_its_sample(serve: Any) -> None:
    """Parts of groups and prompts in another order have the same responses; other seeds, phases and draws do not."""
    engine, uid = ready(serve()[1]), make_uid(4, 4)
    whole = generate(engine, uid=uid).ids[:, 0].view(4, 4)
    part = generate(engine, uid=make_uid(4, 2, first=2)).ids[:, 0].view(4, 2)
    assert torch.equal(part, whole[:, 2:])
    turned = generate(engine, prompts=PROMPTS[::-1], uid=uid.view(4, 4, 3).flip(0).reshape(-1, 3)).ids[:, 0]
    assert torch.equal(turned.view(4, 4).flip(0), whole)
    assert len({tuple(row) for row in whole.tolist()}) == 4
    others = [
        generate(engine, uid=uid + torch.tensor(by), seed=s)
        for by, s in (((1, 0, 0), 7), ((0, 9, 0), 7), ((0, 0, 0), 8))
    ]
    for other in others:
        assert not torch.equal(other.ids[:, 0].view(4, 4), whole)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda c: c[0].update(finish_reason="abort"), "broke off a response: abort"),
        (lambda c: c.pop(), "gave 1 responses instead of 2"),
        (lambda c: c[1]["weight_versions"][0].update(version="default"), "sampled from weights default instead of"),
        (lambda c: c[0]["logprobs"]["content"].pop(), "not those of the tokens that it sampled"),
    ],
)
def test_answers_that_cannot_be_learnt_from_are_errors(spoil: Any, said: str, serve: Any) -> None:
    """A broken response, too few, weights of before a restart, tokens without their own log-probability."""
    fake, address = serve()

    def choices(fake: FakeVLLM, body: dict[str, Any]) -> list[dict[str, Any]]:
        made = [fake.choice(i, [20 + i, END]) for i in range(2)]
        spoil(made)
        return made

    fake.choices = choices
    with pytest.raises(RuntimeError, match=said):
        generate(ready(address))


def test_what_is_too_long_for_the_server_is_refused(serve: Any) -> None:
    engine = ready(serve()[1], serve(context=20)[1])
    generate(engine, sampling=Sampling(max_new_tokens=16))
    with pytest.raises(ValueError, match=r"a prompt of 4 tokens and max_new_tokens=17 exceed .* context of 20 tokens"):
        generate(engine, sampling=Sampling(max_new_tokens=17))


def test_failures_are_repeated_and_counted(serve: Any) -> None:
    """A server that stumbles is asked again; one that goes on stumbling is an error, with its words."""
    fake, address = serve()
    engine = ready(address)
    fake.fail = {"/inference/v1/generate": 3}
    generate(engine, prompts=[[5]])
    assert engine.metrics(HERE)["engine/retries"] == 3
    fake.fail = {"/inference/v1/generate": 4}
    with pytest.raises(RuntimeError, match="refused /inference/v1/generate: out of luck"):
        generate(engine, prompts=[[5]])


def test_what_a_server_refuses_is_not_repeated(serve: Any) -> None:
    fake, address = serve()
    engine = ready(address)
    with pytest.raises(RuntimeError, match="refused /nowhere: Not Found"):
        engine.clients[0].ask("POST", "/nowhere", json={})
    assert fake.called("/nowhere") == 1


# -- several ranks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("servers", "calls"), [(1, [6]), (2, [3, 3]), (4, [2, 2, 1, 1])])
def test_ranks_share_the_servers(servers: int, calls: list[int], serve: Any) -> None:
    """Each has its own, as far as they go; rank 0 pushes, once, to all."""
    fakes = [serve() for _ in range(servers)]

    def run(reduce: ThreadedReduce) -> str | None:
        engine = VLLMServerEngine([address for _, address in fakes])
        engine.setup()
        engine.sync(make_policy(), 5, reduce)
        generate(engine, prompts=PROMPTS[:3], uid=make_uid(3, 2))
        engine.rest(reduce)
        return engine.version

    assert len(set(run_ranks(2, run))) == 1
    assert [fake.called("/inference/v1/generate") for fake, _ in fakes] == calls
    for fake, _ in fakes:
        assert [b["method"] for b in fake.bodies("/collective_rpc")].count("lit_rlvr_finish") == 1


def test_a_failed_push_fails_on_every_rank(serve: Any) -> None:
    """Instead of leaving the others waiting."""
    fake, address = serve()
    fake.missing = ["lm_head.weight"]

    def run(reduce: ThreadedReduce) -> str:
        engine = VLLMServerEngine([address])
        engine.setup()
        with pytest.raises(RuntimeError, match="another model") as caught:
            engine.sync(make_policy(), 0, reduce)
        return str(caught.value)

    first, second = run_ranks(2, run)
    assert second == f"on rank 0: {first}"


# -- in a run ----------------------------------------------------------------------------------------------------------


def test_a_run_pushes_before_every_phase(serve: Any) -> None:
    """Training scores the responses itself, and logs how far the server's log-probabilities are from its own."""
    fake, address = serve(22, 64)
    seen: list[dict[str, torch.Tensor]] = []

    def choices(fake: FakeVLLM, body: dict[str, Any]) -> list[dict[str, Any]]:
        seen.append(fake.weights)
        n = body["sampling_params"]["n"]
        return [fake.choice(i, [3 + i, END] if i % 2 else [3 + i, 4, END]) for i in range(n)]

    fake.choices = choices
    module = RLVRModule(
        TINY, batch=Batch(prompts=4, responses=4, minibatch_prompts=2), sampling=Sampling(max_new_tokens=12),
        engine=VLLMServerEngine([address]), optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    )  # fmt: skip
    recorder = train(module, 6)
    assert fake.called("/update_weight_version") == 3
    assert len(seen) == 12
    assert all(weights is seen[4 * (i // 4)] for i, weights in enumerate(seen))
    embeddings = [weights["model.embed_tokens.weight"] for weights in seen[::4]]
    assert not torch.equal(embeddings[0], embeddings[1])
    assert not torch.equal(embeddings[1], embeddings[2])
    for step in recorder.metrics[::2]:
        assert step["engine/retries"] == 0
        assert step["time/sync_s"] > 0
        assert step["rollout/engine_ratio_max"] >= step["rollout/engine_ratio"] >= step["rollout/engine_ratio_min"]
        assert step["rollout/engine_ratio_max"] != 1
        assert 0 < step["rollout/entropy"] < 22


def test_what_is_not_known_is_not_logged(serve: Any) -> None:
    """Without a scoring pass, which one update per phase does not need, nobody has taken the entropies."""
    _, address = serve(22, 64)
    batch, engine = Batch(prompts=2, responses=4), VLLMServerEngine([address])
    recorder = train(RLVRModule(TINY, batch=batch, sampling=Sampling(max_new_tokens=12), engine=engine), 2)
    for step in recorder.metrics:
        assert step["rollout/length"] == 2
        assert "rollout/entropy" not in step
        assert "credit/entropy_positive" not in step
