"""What fails on one process while it samples ends all of them, in a sentence, instead of leaving the others waiting."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from failing_run import CASES
from rollouts import ThreadedReduce, run_ranks
from test_ddp import torchrun

from lit_rlvr.reduce import LocalReduce, on_every_rank


def test_all_ranks_learn_what_each_did() -> None:
    assert run_ranks(3, lambda reduce: on_every_rank(lambda: reduce.rank * 10, reduce)) == [[0, 10, 20]] * 3
    assert on_every_rank(lambda: 5, LocalReduce()) == [5]


@pytest.mark.parametrize(
    ("error", "words"),
    [(ValueError("too long"), "too long"), (KeyError("x"), "KeyError: 'x'"), (RuntimeError(), "RuntimeError: ")],
)
def test_all_ranks_learn_who_failed(error: Exception, words: str) -> None:
    """The one that did raises its own error, with its traceback; what others go through meanwhile is gone through."""
    left = [iter(range(4)) for _ in range(3)]

    def fail() -> None:
        raise error

    def work(reduce: ThreadedReduce) -> str:
        with pytest.raises(type(error) if reduce.rank == 1 else RuntimeError) as caught:
            on_every_rank(fail if reduce.rank == 1 else lambda: None, reduce, meanwhile=left[reduce.rank])
        assert next(left[reduce.rank], None) is None
        assert (caught.value is error) == (reduce.rank == 1)
        return str(caught.value)

    assert run_ranks(3, work) == [f"on rank 1: {words}", str(error), f"on rank 1: {words}"]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_an_engine_that_fails_on_one_process_ends_both(tmp_path: Path) -> None:
    """In a process group that waits half an hour: the time-out here is the shorter one. It can be used afterwards."""
    torchrun("failing_run.py", str(tmp_path), timeout=200)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for case in CASES:
        own, kind, steps = second[case]
        assert own == ("no room for 7 rows" if case[1] == "train" else f"{case[1]} is too much")
        assert steps == (2 if case[1] == "train" else 0)
        words = own if kind == "ValueError" else f"{kind}: {own}"
        assert first[case] == (f"on rank 1: {words}", "RuntimeError", steps)
