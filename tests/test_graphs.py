"""Captured decoding steps against the same steps without: on recorded operations, which is all that a CUDA graph is."""

from __future__ import annotations

from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
from captured import KINDS, Recorders, schedule, step
from hypothesis import given, settings
from hypothesis import strategies as st
from tape import TapeRecorder
from test_scheduler import PROMPTS, TOKENIZER, make_policy, same
from tiny_models import CONTEXT, random_prompts
from transformers import Cache

from lit_rlvr.engines import Sampling, graphs, in_process
from lit_rlvr.engines.decoding import Output
from lit_rlvr.engines.graph_draws import DrawGraphs
from lit_rlvr.engines.graph_steps import StepGraphs
from lit_rlvr.engines.graphs import bucket
from lit_rlvr.engines.prefill import prefill
from lit_rlvr.engines.sampler import draw_named
from lit_rlvr.engines.scheduler import Scheduler
from lit_rlvr.engines.slots import SlotCache, WholeLayer

pytestmark = pytest.mark.usefixtures("unread")
LAWS = settings(max_examples=10, deadline=None, derandomize=True)


@pytest.fixture
def narrow_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage that grows and moves while tiny models decode."""
    monkeypatch.setattr(graphs, "SPARE", 16)


@pytest.mark.usefixtures("narrow_storage")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_rows", [3, 64])
def test_the_same_as_without_graphs(kind: str, max_rows: int) -> None:
    """Ragged prompts, rows that end and begin, storage that grows and moves."""
    policy, recorders = KINDS[kind](), Recorders()
    wanted, _ = schedule(policy, None, max_rows)
    with patch.object(Scheduler, "_forward", autospec=True, side_effect=Scheduler._forward) as without:
        got, scheduler = schedule(policy, recorders, max_rows)
    same(got, wanted)
    assert without.call_count == 1
    assert scheduler.graphs is not None
    assert isinstance(scheduler.out.drawer, DrawGraphs)
    widths = len(recorders.made) - 1  # draws have the other
    assert widths > 1


@LAWS
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    samples=st.integers(1, 4),
    max_rows=st.integers(1, 12),
    patience=st.sampled_from([0, 1, 8]),
    spare=st.sampled_from([1, 16, 40]),
)
def test_any_rows_in_any_order(lengths: list[int], samples: int, max_rows: int, patience: int, spare: int) -> None:
    """Whatever is decoded together, in float64."""
    policy, prompts = make_policy().double(), random_prompts(lengths)
    uid = torch.tensor([(1, draw, sample) for draw in range(len(prompts)) for sample in range(samples)])
    with pytest.MonkeyPatch.context() as change:
        change.setattr(graphs, "SPARE", spare)
        change.setattr(graphs, "PATIENCE", patience)
        found = []
        for recorder in (None, TapeRecorder):
            out = Output(TOKENIZER, in_process.end_tokens(policy, TOKENIZER), uid, Sampling(max_new_tokens=30), 3)
            with torch.no_grad():
                Scheduler(policy, [None, None], prompts, samples, max_rows, out, recorder).run()
            found.append(out.finish())
    same(found[1], found[0])


def test_bfloat16_is_as_exact_as_without() -> None:
    """Against float64 of the same weights, on the same tokens: the errors of one step are of one size."""
    policy, whole = make_policy().bfloat16(), make_policy().bfloat16().double()
    errors = []
    for one in (StepGraphs.next_logits, None):
        taken = step(policy, one is not None)
        errors.append((taken.double() - step(whole, False)).norm())
    assert 0 < errors[0] < 1.5 * errors[1]


@pytest.mark.usefixtures("narrow_storage")
def test_rows_out_of_use_stay_finite_and_touch_nothing() -> None:
    """A graph of 4 rows for 3, after a move to the left of what was left behind: slots in use keep what they hold."""
    policy = make_policy()
    with torch.no_grad():
        logits, prompts = prefill(policy, [PROMPTS[2]] * 4, 2)
        cache = SlotCache([None, None], 4)
        cache.admit(prompts, torch.arange(4), torch.full((4,), 9), 9)
        steps = StepGraphs(policy, cache, logits, TapeRecorder)
        token, position = torch.tensor([5, 6, 7, 8]), torch.full((4,), 9)
        steps.next_logits(token, position)
        steps.position.fill_(CONTEXT - 1)  # as far back as any row could have reached
        steps.token.fill_(3)
        cache.keep(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), 3, 10)
        before = [[storage[:3, :, :10].clone() for storage in layer.storage] for layer in cache.slots]
        steps.next_logits(token[:3], position[:3] + 1)
    assert list(steps.graphs.replays) == [4]
    for layer, kept in zip(cache.slots, before, strict=True):
        for storage, old in zip(layer.storage, kept, strict=True):
            assert torch.equal(storage[:3, :, :10], old)
            assert storage.isfinite().all()
            assert storage[3, :, 10].any()


def test_few_captures() -> None:
    """One per number of rows and width; a quick descent is decoded with what is there."""
    _, scheduler = schedule(make_policy(), TapeRecorder)
    assert scheduler.graphs is not None
    assert scheduler.graphs.width == 64  # 9 + 40, then a multiple of 16
    assert set(scheduler.graphs.graphs.wanted) > set(scheduler.graphs.graphs.replays)
    assert scheduler.graphs.graphs.captures <= len({bucket(rows, 21) for rows in range(1, 22)}) // 2


@pytest.mark.usefixtures("narrow_storage")
def test_each_width_has_memory_of_its_own() -> None:
    """CUDA refuses a pool all of whose graphs are gone; and a graph of narrower storage would read what is freed."""
    recorders = Recorders()
    _, scheduler = schedule(make_policy(), recorders, 3)
    assert scheduler.graphs is not None
    steps, draws = scheduler.graphs.graphs, cast(DrawGraphs, scheduler.out.drawer).graphs
    assert draws is not None
    assert steps.captures + draws.captures == sum(len(recorder.tapes) for recorder in recorders.made)
    assert recorders.made[-1] is steps.recorder
    assert {recorder.purpose for recorder in recorders.made} == {"decoding steps", "draws of tokens"}
    assert len(steps.recorder.tapes) == len(steps.replays) < steps.captures


def unmasked(self: StepGraphs, rows: int) -> None:
    """A step that looks at columns that hold nothing."""
    cache: Any = Cache(layers=[WholeLayer(layer, rows, self.column) for layer in self.cache.slots])
    self.logits[:rows].copy_(self.policy.next_logits(self.token[:rows], None, self.position[:rows], cache))


def test_a_model_that_takes_the_mask_in_another_way(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Is decoded without graphs from the second step on, and says so."""
    policy = make_policy()
    wanted, _ = schedule(policy, None)
    monkeypatch.setattr(StepGraphs, "_step", unmasked)
    got, scheduler = schedule(policy, TapeRecorder)
    same(got, wanted)
    assert scheduler.graphs is None
    assert "decoded without them" in caplog.text


@pytest.mark.parametrize("more", [{}, {"temperature": 0.7}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.8}])
def test_draws_of_every_kind(more: dict[str, Any]) -> None:
    """Fewer rows than the graph has, logits that are there already or are not, and other names each time."""
    generator = torch.Generator().manual_seed(0)
    sampling, memory = Sampling(**more), torch.zeros(6, 300)
    draws = DrawGraphs(memory, sampling, 9, TapeRecorder)
    for rows in (6, 3, 5, 1):
        logits, name = torch.randn(rows, 300, generator=generator), torch.randint(99, (rows, 4), generator=generator)
        wanted = draw_named(logits, name, sampling, 9)
        for given_as in (logits, memory[:rows].copy_(logits)):
            assert all(torch.equal(*pair) for pair in zip(draws(given_as, name, sampling, 9), wanted, strict=True))
    assert draws.graphs is not None
    assert draws.graphs.captures == 1


@pytest.mark.parametrize(
    ("rows", "wanted"), [(1, 1), (2, 2), (3, 3), (5, 6), (7, 8), (97, 128), (130, 192), (200, 250)]
)
def test_numbers_of_rows(rows: int, wanted: int) -> None:
    """Less than a third more than there are, and never more than slots."""
    assert bucket(rows, 250) == wanted
