"""The estimate for machines that are not here: its arithmetic, by hand and in the limits."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import QUICKSTART, cli, succeed
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3Config

from lit_rlvr.cluster import LAUNCHED, USED, Sampler, Work, rollout, scoring, stages, sync, training, warning_line
from lit_rlvr.machines import DEVICES, Device, Machines

WORK = Work(
    parameters=10**9, body=8 * 10**8, head=10**8, layers=10, attention=100, cached=1000, rows=64, prompts=8, prompt=100,
    response=900, scorings=2, learnings=1, recomputed=True, micro_batches=8,
)  # fmt: skip
ONE, NODE, MANY = Machines(1, 1, "H100"), Machines(1, 8, "H100"), Machines(4, 8, "H100")


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings that are reached, of round numbers."""
    monkeypatch.setitem(DEVICES, "H100", Device(flops=1e12, bandwidth=1e12, memory=10e9, link=1e10, network=1e9))
    monkeypatch.setattr("lit_rlvr.cluster.USED", dict.fromkeys(USED, 1.0))


def test_a_cluster_is_nodes_devices_and_kind() -> None:
    assert Machines.of("2x4xA100") == Machines(2, 4, "A100")
    assert (MANY.devices, MANY.narrowest, NODE.narrowest) == (32, 50e9, 450e9)
    for text, sentence in (
        ("8xH100", "must be NODESxDEVICESxKIND"),
        ("8x8xH1000", "no ceilings for 'H1000'"),
        ("0x8xH100", "at least one node"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Machines.of(text)
    mine = Device(flops=1.0, bandwidth=2.0, memory=3.0, link=4.0, network=5.0)
    assert Machines(1, 1, "mine", mine).device is mine


def test_facts_of_a_model() -> None:
    """Eight heads of 16 and two of them stored, in three layers."""
    config = Qwen3Config(hidden_size=64, num_attention_heads=8, num_key_value_heads=2, head_dim=16, num_hidden_layers=3)
    config.vocab_size = 10
    numbers = {"rows": 1, "prompts": 1, "prompt": 2, "response": 3, "scorings": 1, "learnings": 1, "micro_batches": 1}
    config.tie_word_embeddings = True
    work = Work.of(config, 647, recomputed=False, **numbers)
    assert (work.parameters, work.body, work.head) == (647, 7, 640)
    assert (work.layers, work.attention, work.cached) == (3, 128, 2 * 3 * 2 * 16 * 2)
    # Two per weight, and for each token queries with keys and weights with values, over half of the square; the head
    # for response tokens alone.
    layers = 2 * 7 * 5 + 3 * (2 + 2) * 128 * 5**2 / 2
    assert work.forward == layers + 2 * 640 * 3
    assert work.learning == 3 * work.forward
    assert replace(work, chosen=0.5).learning == 3 * layers + 3 * 640 * 3
    config.tie_word_embeddings = False
    apart = Work.of(config, 2 * 640 + 7, size=4, recomputed=False, **numbers)
    assert (apart.body, apart.head, apart.cached) == (7, 640, 2 * work.cached)


@pytest.mark.usefixtures("plain")
def test_multiplications_by_hand() -> None:
    layers, head = 2 * 8 * 10**8 * 1000 + 2 * 10 * 100 * 1000**2, 2 * 10**8 * 900
    assert scoring(WORK, ONE).seconds == pytest.approx(2 * 64 * (layers + head) / 1e12)
    assert scoring(WORK, MANY).seconds == pytest.approx(2 * 64 * (layers + head) / 32e12)
    learnt = training(WORK, ONE)
    assert (learnt.seconds, learnt.bound) == (pytest.approx(64 * (4 * layers + 3 * head) / 1e12), "multiplications")
    assert training(replace(WORK, recomputed=False), ONE).seconds == pytest.approx(3 * 64 * (layers + head) / 1e12)
    fewer = replace(WORK, recomputed=False, chosen=0.2)
    assert training(fewer, ONE).seconds == pytest.approx(3 * 64 * (layers + 0.2 * head) / 1e12)


@pytest.mark.usefixtures("plain")
def test_the_network_by_hand() -> None:
    """Weights of 2 GB are gathered twice, and their gradients spread once, for each of eight micro-batches."""
    moved = training(WORK, MANY)
    assert (moved.seconds, moved.bound) == (pytest.approx(3 * 2e9 * 8 / 1e9), "network")
    assert sync(WORK, MANY).seconds == pytest.approx(2.0)
    assert sync(WORK, NODE).seconds == pytest.approx(0.2)


@pytest.mark.usefixtures("plain")
def test_a_rollout_by_hand() -> None:
    """One device: 8 GB beside the weights hold far more than 64 rows of 1 MB, which are read at half their response.

    Each of 8 prompts is read once.
    """
    prompts = 8 * (2 * 8e8 * 100 + 2 * 10 * 100 * 100**2) / 1e12
    part = rollout(WORK, ONE)
    read = (2e9 + 64 * 1000 * (100 + 450)) / 1e12
    multiplied = 2 * 9e8 * 64 / 1e12
    assert multiplied > read
    assert (part.seconds, part.bound) == (pytest.approx(prompts + 900 * multiplied), "multiplications")
    assert part.memory == 2e9 + 64 * 1e6
    few = replace(WORK, rows=1)
    assert rollout(few, ONE).seconds == pytest.approx(prompts + 900 * (2e9 + 1000 * 550) / 1e12)
    assert rollout(few, ONE).bound == "memory bandwidth"


@pytest.mark.usefixtures("plain")
def test_rows_that_do_not_fit_come_in_waves() -> None:
    """A row of 3 GB: two fit beside the weights."""
    long = replace(WORK, cached=3_000_000)
    part = rollout(long, ONE)
    assert part.how == "replicas of 1 device(s), 2 responses at a time, 32 wave(s)"
    prompts = 8 * (2 * 8e8 * 100 + 2 * 10 * 100 * 100**2) / 1e12
    assert part.seconds == pytest.approx(prompts + 900 * 32 * (2e9 + 2 * 3e6 * 550) / 1e12)


@pytest.mark.usefixtures("plain")
def test_an_engine_decodes_in_its_own_way() -> None:
    """Few rows at a time take more waves; kernels take time to launch; what training keeps leaves less memory."""
    prompts = 8 * (2 * 8e8 * 100 + 2 * 10 * 100 * 100**2) / 1e12
    few = rollout(WORK, ONE, Sampler(most=4))
    assert few.how == "replicas of 1 device(s), 4 responses at a time, 16 wave(s)"
    slow = rollout(WORK, ONE, Sampler(captured=False))
    assert slow.bound == "multiplications"  # 115 ms a step, against 10 layers
    slow = rollout(replace(WORK, layers=1000, attention=0), ONE, Sampler(captured=False))
    assert slow.bound == "launching kernels"
    assert slow.seconds == pytest.approx(8 * 2 * 8e8 * 100 / 1e12 + 900 * 1000 * LAUNCHED)
    long = replace(WORK, cached=3_000_000)
    assert rollout(long, ONE, Sampler(beside=3 * 10**9)).how.startswith("replicas of 1 device(s), 1 responses")
    assert prompts < few.seconds


@pytest.mark.usefixtures("plain")
def test_an_engine_in_process_has_one_device_for_each_copy() -> None:
    with pytest.raises(ValueError, match="use an engine that spreads the weights over more devices"):
        rollout(replace(WORK, parameters=20 * 10**9), MANY, Sampler(each=1))
    tight = replace(WORK, parameters=3 * 10**9)
    assert rollout(tight, MANY).how.startswith("replicas of 2 device(s)")
    assert rollout(tight, MANY, Sampler(each=1)).how.startswith("replicas of 1 device(s)")
    assert rollout(tight, MANY, Sampler(each=4)).how.startswith("replicas of 4 device(s)")


@pytest.mark.usefixtures("plain")
def test_large_models_are_spread_over_a_node() -> None:
    """40 GB of weights want eight devices of 10 GB; a hundred do not fit at all."""
    assert rollout(replace(WORK, parameters=20 * 10**9), MANY).how.startswith("replicas of 8 device(s), 16 responses")
    with pytest.raises(ValueError, match="use a larger node"):
        rollout(replace(WORK, parameters=50 * 10**9), MANY)


@given(st.integers(1, 6), st.integers(1, 4), st.sampled_from(sorted(DEVICES)))
def test_more_machines_never_take_longer(nodes: int, factor: int, kind: str) -> None:
    """Beyond the first node, which has no network to wait for."""
    few, many = Machines(nodes + 1, 8, kind), Machines((nodes + 1) * factor, 8, kind)
    work = replace(WORK, rows=8192, micro_batches=1)
    for one, other in zip(stages(work, few), stages(work, many), strict=True):
        assert other.seconds <= one.seconds * (1 + 1e-9)
        assert math.isfinite(one.seconds)


def test_a_phase_that_no_warning_covers() -> None:
    assert warning_line(0.8 * 65_535) == warning_line(1e6)
    assert "SLURM warns 65535 s before at most, too late here" in warning_line(1e6)
    assert warning_line(0.8 * 65_500).endswith("USR1@65500")


def test_explain_prints_it(tmp_path: Path) -> None:
    """With every assumption, and the memory of a sharded strategy."""
    untracked = "--trainer.logger=false"
    out = succeed(tmp_path, "explain", *QUICKSTART, untracked, "--cluster=2x8xH100").out
    assert "16 device(s), weights and optimizer state spread over them" in out
    assert "A phase on 2 x 8 H100, estimated" in out
    assert "H100: 989 TFLOP/s bfloat16, 3.35 TB/s and 80 GB of memory" in out
    assert "assumed, not measured" in out
    assert "--signal=B:USR1@100" in out
    assert [line.split()[0] for line in out.splitlines() if " s  " in line] == [
        "rollout",
        "scoring",
        "training",
        "sync",
    ]
    assert "estimated" not in succeed(tmp_path, "explain", *QUICKSTART, untracked).out
    refused = cli(tmp_path, "explain", *QUICKSTART, untracked, "--cluster=8xH100")
    assert (refused.code, "cluster must be NODESxDEVICESxKIND, as in 8x8xH100" in refused.err) == (2, True)
