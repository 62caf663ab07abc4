"""Starting servers: the command, a process of a run's own, and what runs inside vLLM's workers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rollouts import ThreadedReduce, run_ranks
from runs import TINY, train
from safetensors.torch import save_file
from transformers import AutoTokenizer

from lit_rlvr import Batch, RLVRModule, Sampling
from lit_rlvr.__main__ import main
from lit_rlvr.engines import VLLMColocatedEngine, vllm_launch
from lit_rlvr.engines.server_side.lit_rlvr_worker import PROTOCOL, Group, places, unpack
from lit_rlvr.engines.vllm_client import RECEIVER
from lit_rlvr.models import resolve_model
from lit_rlvr.policy import load_policy
from lit_rlvr.reduce import LocalReduce

FAKE = Path(__file__).parent / "fake_vllm.py"


# -- the command -------------------------------------------------------------------------------------------------------


def test_serve_becomes_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what the engine needs, the built-in model made, and vLLM's options passed on."""
    started: list[Any] = []
    monkeypatch.setattr(vllm_launch, "check_python", lambda python: None)
    monkeypatch.setattr(os, "execvpe", lambda *arguments: started.append(arguments))
    main(["serve", TINY, "--python", "py", "--port=81", "--max-model-len", "99", "--host=::1"])
    ((program, command, environment),) = started
    assert program == "py"
    assert command == [
        "py", "-m", "vllm.entrypoints.openai.api_server", "--model", resolve_model(TINY), "--host", "::1", "--port",
        "81", "--logprobs-mode", "processed_logprobs", "--enable-scale-out", "--worker-extension-cls",
        "lit_rlvr_worker.WeightReceiver", "--max-model-len", "99",
    ]  # fmt: skip
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"
    folder = Path(environment["PYTHONPATH"].split(os.pathsep)[0])
    assert [file.name for file in folder.glob("*.py")] == ["lit_rlvr_worker.py"]


def test_a_server_has_no_place_in_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its processes meet by themselves, also where torchrun started the run."""
    place = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "node1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in {**place, "HF_HOME": "/cache"}.items():
        monkeypatch.setenv(name, value)
    environment = vllm_launch.server_environment()
    assert environment["HF_HOME"] == "/cache"
    assert not environment.keys() & place.keys()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([TINY, "--python", "nowhere/python"], "there is no Python at nowhere/python"),
        ([TINY, "--python", sys.executable], "there is no vLLM in the environment of"),
    ],
)
def test_serve_without_vllm_says_how_to_get_it(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_an_environment_that_does_not_answer_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where its files take minutes to be read."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 100\n")
    python.chmod(0o755)
    monkeypatch.setattr(vllm_launch, "PYTHON_SECONDS", 0.2)
    with pytest.raises(ValueError, match=r"did not start within 0.2 seconds; is its environment on a slow filesystem"):
        vllm_launch.check_python(str(python))


def test_a_run_without_vllm_ends_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large model is not loaded for nothing."""
    monkeypatch.setattr("lit_rlvr.engines.vllm_colocated.ServerProcess", None)
    with pytest.raises(ValueError, match=r"there is no vLLM .*; give vLLM an environment .*pip install 'vllm<0.33,>=0"):
        VLLMColocatedEngine(sys.executable).setup()


# -- a server of a run's own -------------------------------------------------------------------------------------------


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs start a server without a model; the commands that they would have started one with."""
    seen: list[list[str]] = []
    true_command = vllm_launch.server_command

    def command(python: str, model: str, host: str, port: int, options: list[str]) -> list[str]:
        seen.append(true_command(python, model, host, port, options))
        return [sys.executable, str(FAKE), "--port", str(port)]

    monkeypatch.setattr("lit_rlvr.engines.vllm_colocated.server_command", command)
    monkeypatch.setattr("lit_rlvr.engines.vllm_colocated.check_python", lambda python: None)
    return seen


def test_a_run_starts_and_ends_its_own_server(fakes: list[list[str]]) -> None:
    """On the policy's own folder, once per run."""
    engine = VLLMColocatedEngine("py", ["--max-model-len=99"])
    module = RLVRModule(TINY, batch=Batch(prompts=2, responses=2), engine=engine, sampling=Sampling(max_new_tokens=4))
    started: list[Any] = []
    true_start = engine.start

    def start(*arguments: Any) -> None:
        true_start(*arguments)
        started.append(engine.process)

    engine.start = start  # type: ignore[method-assign]
    train(module, 2)
    assert [command[:5] + command[-1:] for command in fakes] == [
        ["py", "-m", "vllm.entrypoints.openai.api_server", "--model", resolve_model(TINY), "--max-model-len=99"]
    ]
    assert len(started) == 1
    assert started[0].process.poll() is not None
    assert engine.process is None


@pytest.mark.slow
@pytest.mark.parametrize(("size", "machines"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_ranks_have_servers_beside_them(
    size: int, machines: int, fakes: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One each, or one for two; the first rank of each machine looks after those that are there."""
    policy, tokenizer = load_policy(resolve_model(TINY)), AutoTokenizer.from_pretrained(resolve_model(TINY))
    own, world = threading.local(), 2 * machines
    monkeypatch.setattr("socket.gethostname", lambda: f"node{own.rank * machines // world}")

    def rank(reduce: ThreadedReduce) -> tuple[str | None, list[str], list[str], list[str], str | None]:
        own.rank = reduce.rank
        engine = VLLMColocatedEngine("py", devices_per_server=size, sleep_level=2)
        for phase in range(2):
            engine.sync(policy, phase, reduce)
            engine.generate(policy, tokenizer, [[5, 6]], torch.tensor([(0, 0, 0)]), Sampling(max_new_tokens=4), 0)
            reduce.gather("sampled")
            engine.rest(reduce)
        address = engine.process and engine.process.address
        everyone, share = [c.address for c in engine.clients], [c.address for c, _ in engine.share()]
        kept = [client.address for client in engine.kept()]
        engine.close()
        return address, everyone, share, kept, engine.version

    results = run_ranks(world, rank, timeout=120)
    assert len({version for *_, version in results}) == 1
    for machine in range(machines):
        here = results[2 * machine : 2 * machine + 2]
        started = [address for address, *_ in here if address]
        assert len(set(started)) == 2 // size
        assert [everyone for _, everyone, *_ in here] == [started, started]
        assert [share for _, _, share, *_ in here] == ([[a] for a in started] if size == 1 else [started, started])
        assert [kept for *_, kept, _ in here] == [started, []]
    assert all(("--tensor-parallel-size=2" in command) == (size == 2) for command in fakes)
    assert all("--enable-sleep-mode" in command for command in fakes)


def test_ranks_that_cannot_be_shared_out_are_refused(fakes: list[list[str]]) -> None:
    with pytest.raises(ValueError, match=r"devices_per_server is 2, but .* has 1 ranks of the run"):
        VLLMColocatedEngine("py", devices_per_server=2).start(policy_on(torch.device("cpu")), LocalReduce())
    assert fakes == []


def policy_on(device: torch.device) -> Any:
    """As much of a policy as starting a server looks at."""
    return SimpleNamespace(device=device, hf=SimpleNamespace(config=SimpleNamespace(name_or_path="")))


def test_a_server_that_does_not_start_is_shown(monkeypatch: pytest.MonkeyPatch, fakes: list[list[str]]) -> None:
    """With the last lines that it wrote."""
    code = "print('first'); print('no memory left'); raise SystemExit(3)"
    monkeypatch.setattr("lit_rlvr.engines.vllm_colocated.server_command", lambda *_: [sys.executable, "-c", code])
    engine = VLLMColocatedEngine("py")
    with pytest.raises(RuntimeError, match=r"ended with exit code 3 as it started:\nfirst\nno memory left"):
        engine.start(policy_on(torch.device("cpu")), LocalReduce())
    assert engine.process is None


@pytest.mark.parametrize(
    ("visible", "index", "size", "wanted"),
    [(None, 1, 1, ["1"]), ("4,6", 1, 1, ["6"]), ("GPU-a,GPU-b", 0, 1, ["GPU-a"]), ("4,6,7,5", None, 2, ["4,6", "7,5"])],
)
def test_a_server_is_on_the_ranks_own_gpus(
    visible: str | None, index: int | None, size: int, wanted: list[str], monkeypatch: pytest.MonkeyPatch, fakes: Any
) -> None:
    """Their names are those that the run has for them."""
    environments: dict[int, dict[str, str]] = {}

    class Process:
        def __init__(self, command: Any, environment: dict[str, str], address: str, *more: Any) -> None:
            self.address, self.environment = address, environment

        def wait_until_ready(self, seconds: float) -> None:
            environments[len(environments)] = self.environment

        def stop(self) -> None:
            pass

    monkeypatch.setattr("lit_rlvr.engines.vllm_colocated.ServerProcess", Process)
    monkeypatch.setattr(VLLMColocatedEngine, "meet", lambda self: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    def rank(reduce: Any) -> None:
        engine = VLLMColocatedEngine("py", sleep_level=1, devices_per_server=size)
        engine.start(policy_on(torch.device("cuda", reduce.rank if index is None else index)), reduce)
        engine.close()

    if index is None:
        run_ranks(4, rank)
    else:
        rank(LocalReduce())
    assert sorted(e["CUDA_VISIBLE_DEVICES"] for e in environments.values()) == wanted
    assert "--enable-sleep-mode" in fakes[0]


ABANDONS = """
import os, sys, time
from pathlib import Path
from lit_rlvr.engines.vllm_launch import ServerProcess
server = ServerProcess(["sleep", "100"], dict(os.environ), "", Path(sys.argv[1]))
while b"sleep" not in Path(f"/proc/{server.process.pid}/cmdline").read_bytes():
    time.sleep(0.01)
print(server.process.pid, flush=True)
time.sleep(100)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel does it")
@pytest.mark.timeout(120)
@pytest.mark.slow
def test_a_run_that_is_killed_takes_its_server_with_it(tmp_path: Path) -> None:
    """Also when it is given no chance to end it."""
    command = [sys.executable, "-c", ABANDONS, str(tmp_path / "server.log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        server = int(run.stdout.readline())
        assert alive(server)
        run.kill()
    while alive(server):
        time.sleep(0.01)


def alive(process: int) -> bool:
    """Whether a process runs; one that nobody has asked about since it ended does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"start_seconds": 0}, "engine.start_seconds must be above 0, got 0"),
        ({"devices_per_server": 0}, "engine.devices_per_server must be at least 1, got 0"),
        (
            {"options": ["--tensor-parallel-size=2"]},
            "has --tensor-parallel-size=2; set engine.devices_per_server instead",
        ),
        ({"options": ["--tensor_parallel_size", "2"]}, "set engine.devices_per_server instead"),
        ({"options": ["-tp", "2"]}, "engine.options has -tp; set engine.devices_per_server instead"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        VLLMColocatedEngine("py", **options)


# -- inside vLLM -------------------------------------------------------------------------------------------------------


class Model(torch.nn.Linear):
    """Loads what it is given, and says so."""

    def load_weights(self, weights: Any) -> set[str]:
        given = dict(weights)
        if "bad" in given:
            raise AssertionError
        self.loads, self.given = [*getattr(self, "loads", []), *given], given
        return set(given)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A worker with the methods of the shipped file, in a process without vLLM."""
    events: list[str] = []

    @contextmanager
    def current(config: Any) -> Any:
        yield

    config, reload = ModuleType("vllm.config"), ModuleType("vllm.model_executor.model_loader.reload")
    vars(config).update(set_current_vllm_config=current)
    vars(reload).update(
        initialize_layerwise_reload=lambda model: events.append("begin"),
        finalize_layerwise_reload=lambda model, config: events.append("end"),
    )
    parents = ("vllm", "vllm.model_executor", "vllm.model_executor.model_loader")
    for module in (*map(ModuleType, parents), config, reload):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.syspath_prepend(vllm_launch.SERVER_SIDE)
    shipped = __import__("lit_rlvr_worker")
    model, sizes = Model(2, 2), SimpleNamespace(get_vocab_size=lambda: 7, get_hidden_size=lambda: 5)
    made = type("Worker", (shipped.WeightReceiver,), {"get_model": lambda self: model})()
    made.vllm_config, made.events, made.model = SimpleNamespace(model_config=sizes), events, model
    made.rank, made.device = 1, torch.device("cpu")
    made.model_runner = SimpleNamespace(reset_lora_state=lambda: events.append("lora"))
    assert f"lit_rlvr_worker.{shipped.WeightReceiver.__name__}" == RECEIVER
    yield made
    del sys.modules["lit_rlvr_worker"]


def file(folder: Path, *names: str) -> str:
    """A safetensors file with weights of these names."""
    path = folder / f"{'-'.join(names)}.safetensors"
    save_file({name: torch.ones(2) for name in names}, path)
    return str(path)


def test_an_update_goes_file_by_file(worker: Any, tmp_path: Path) -> None:
    """A request that is repeated loads nothing twice, and what no file had is named."""
    assert worker.lit_rlvr_about() == {"vocabulary": 7, "hidden": 5, "protocol": PROTOCOL, "nccl": None}
    for _ in range(2):
        worker.lit_rlvr_begin()
        worker.lit_rlvr_load(file(tmp_path, "weight"), 0)
        worker.lit_rlvr_load(file(tmp_path, "weight"), 0)
        worker.lit_rlvr_load(file(tmp_path, "other"), 1)
        assert worker.lit_rlvr_finish() == {"missing": ["bias"]}
        assert worker.lit_rlvr_finish() == {"missing": []}
    assert worker.model.loads == ["weight", "other"] * 2
    assert worker.events == ["begin", "end", "lora"] * 2


def test_an_update_is_broadcast(worker: Any) -> None:
    """The worker's rank is the server's first and its own among the server's; repeated parts are not waited for."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    options: dict[str, Any] = {"size": 4, "backend": "gloo", "seconds": 20.0}
    with ThreadPoolExecutor(4) as pool:
        joining = pool.submit(worker.lit_rlvr_join, host="127.0.0.1", port=store.port, first=2, **options)
        rest = {"address": "127.0.0.1", "device": torch.device("cpu"), **options}
        stores = [dist.TCPStore("127.0.0.1", store.port, is_master=False) for _ in range(2)]
        groups = [pool.submit(Group, other, rank, **rest) for rank, other in enumerate(stores, start=1)]
        ours = Group(store, 0, **rest)
        others = [group.result() for group in groups]
        assert joining.result() == {}
        weights = [["weight", "bfloat16", [3]], ["bias", "float32", [2, 1]]]
        buffer = ours.empty(places(weights)[-1])
        sent = dict(unpack(buffer, weights))
        sent["weight"].copy_(torch.tensor([1.5, -2.0, 3.0]))
        sent["bias"].copy_(torch.tensor([[0.1], [0.2]]))
        worker.lit_rlvr_begin()
        receiving = pool.submit(worker.lit_rlvr_receive, 0, weights)
        for other in others:
            pool.submit(lambda other: other.broadcast(other.empty(len(buffer))).wait(), other)
        ours.broadcast(buffer).wait()
        receiving.result()
    assert worker.lit_rlvr_receive(0, weights) == {}
    assert worker.lit_rlvr_finish() == {"missing": []}
    assert worker.model.loads == ["weight", "bias"]
    assert all(torch.equal(worker.model.given[name], tensor) for name, tensor in sent.items())


class NCCL:
    """Stands in for a group of GPUs, where there are none."""

    Options = SimpleNamespace

    def __init__(self, *arguments: Any) -> None:
        self.done: list[str] = []
        NCCL.made.append(self)

    made: list[NCCL] = []  # noqa: RUF012

    def broadcast(self, buffer: Any, root: int) -> Any:
        return SimpleNamespace(wait=lambda: self.done.append("broadcast"))

    def abort(self) -> None:
        self.done.append("abort")

    def _set_default_timeout(self, limit: Any) -> None:
        pass


def test_a_group_of_gpus_is_aborted(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the worker joins another: what waits on a GPU for members that have left would wait for ever."""
    monkeypatch.setattr(NCCL, "made", [])
    shipped = sys.modules["lit_rlvr_worker"]
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", NCCL, raising=False)
    monkeypatch.setattr(shipped.Group, "empty", lambda self, size: torch.empty(size))
    monkeypatch.setattr(dist, "TCPStore", lambda *_, **__: dist.HashStore())
    worker.device = torch.device("cuda")
    for _ in range(2):
        worker.lit_rlvr_join("127.0.0.1", 1, first=1, size=2, backend="nccl", seconds=1.0)
    assert [group.done for group in NCCL.made] == [["broadcast", "abort"], ["broadcast"]]


@pytest.mark.parametrize("gpus", [False, True])
def test_a_worker_tells_its_nccl(gpus: bool, worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 3))
    assert worker.lit_rlvr_about()["nccl"] == ([2, 28, 3] if gpus else None)


def test_a_restarted_server_is_in_no_group(worker: Any) -> None:
    worker.lit_rlvr_begin()
    with pytest.raises(RuntimeError, match="is not in the trainer's group any more"):
        worker.lit_rlvr_receive(0, [["weight", "float32", [2]]])


def test_an_update_that_failed_is_begun_again(worker: Any, tmp_path: Path) -> None:
    """Nothing is loaded after a failure, a repeated request gives the same answer, and a new update is a whole one."""
    with pytest.raises(RuntimeError, match="out of turn"):
        worker.lit_rlvr_load(file(tmp_path, "weight"), 0)
    worker.lit_rlvr_begin()
    with pytest.raises(RuntimeError, match="out of turn"):
        worker.lit_rlvr_load(file(tmp_path, "weight"), 1)
    for name in ("bad", "weight"):
        with pytest.raises(RuntimeError, match="new weights could not be loaded: AssertionError"):
            worker.lit_rlvr_load(file(tmp_path, name), 0)
    worker.lit_rlvr_begin()
    worker.lit_rlvr_load(file(tmp_path, "weight", "bias"), 0)
    assert worker.lit_rlvr_finish() == {"missing": []}
    assert worker.model.loads == ["weight", "bias"] or worker.model.loads == ["bias", "weight"]


def test_packed_copies_of_tied_heads_are_renewed(worker: Any, tmp_path: Path) -> None:
    """On a CPU a head computes with a copy; layers that gave their weight up for it have nothing to renew it from."""
    packed: list[str] = []
    method = SimpleNamespace(process_weights_after_loading=lambda layer: packed.append(layer.name))
    for name, size in (("head", 4), ("linear", 0)):
        layer = torch.nn.Linear(1, 1)
        layer.weight = torch.nn.Parameter(torch.zeros(size))
        vars(layer).update(cpu_linear=None, quant_method=method, name=name)
        worker.model.add_module(name, layer)
    worker.lit_rlvr_begin()
    worker.lit_rlvr_load(file(tmp_path, "weight"), 0)
    worker.lit_rlvr_finish()
    assert packed == ["head"]
