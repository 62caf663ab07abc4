"""The benchmarks' arithmetic, by hand; that they run is in test_benchmarks_run.py."""

from __future__ import annotations

import json
from dataclasses import replace
from mmap import PAGESIZE, mmap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import suite
from benchmarks.__main__ import asked, main, parser
from benchmarks.ceilings import Ceilings, fastest, shapes
from benchmarks.cluster import this_machine, work_of
from benchmarks.compare import Side, costs, median, per_token, rates, ratios, spread
from benchmarks.gate import Clock, Memory
from benchmarks.head_side import Work
from benchmarks.models import SIZES, Size, configuration, prompt_ids, questions, responses
from benchmarks.ours import Given
from benchmarks.predictions import PREDICTIONS
from benchmarks.scaling import by_length, by_rows, tokens
from benchmarks.settings import HeadSettings, Settings
from benchmarks.step import SIDES, Asked, sides
from benchmarks.table import BEGIN, END, predicted, put, read, render
from benchmarks.tune import candidates
from lit_rlvr.cluster import rollout, training

HAND = Size(10, 4, 2, 6, 2, 1, 3, prompts=2, responses=3, prompt_tokens=5, new_tokens=7)


def side(name: str, *samples: dict[str, float]) -> Side:
    """A side that has run."""
    return Side(name, "ours", Settings("", HAND), samples=list(samples))


def flat(rate: float) -> Ceilings:
    """A machine on which every product is as fast."""
    return Ceilings(dict.fromkeys(shapes(HAND), rate), bandwidth=1e3, nominal=0.0)


def test_parameters_of_a_size() -> None:
    """Queries and what follows attention have 4 x 6 weights, keys and values 4 x 3, three of 4 x 6 after them."""
    assert HAND.body == 2 * (2 * 24 + 2 * 12 + 3 * 24)
    assert HAND.head == 40
    for size in (HAND, SIZES["S"]):
        from transformers import Qwen3ForCausalLM

        with torch.device("meta"):
            model = Qwen3ForCausalLM(configuration(size))
        assert sum(p.numel() for p in model.parameters() if p.dim() == 2) == size.body + size.head


def test_ratios_are_of_rounds_and_per_token() -> None:
    fast = side("a", {"step": 3.0, "rollout": 1.0, "tokens": 10}, {"step": 5.0, "rollout": 1.0, "tokens": 20})
    slow = side("b", {"step": 6.0, "rollout": 3.0, "tokens": 10}, {"step": 9.0, "rollout": 3.0, "tokens": 10})
    assert (costs(slow, "train"), median(fast, "step"), rates(fast)) == ([3.0, 6.0], 4.0, [10.0, 20.0])
    assert per_token(fast, "train") == [0.2, 0.2]
    assert ratios(slow, fast, "rollout") == pytest.approx({"median": 4.5, "low": 3.0, "high": 6.0})
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}


def test_every_side_gets_the_same_prompts_and_responses() -> None:
    rows = responses(HAND, 3)
    assert rows == responses(HAND, 3)
    assert rows != responses(HAND, 4)
    assert [len(row) for row in rows] == [7] * 6
    assert [text.replace("t", "").split() for text in questions(HAND, 2)] == [
        [str(i) for i in row] for row in prompt_ids(HAND, 2)
    ]
    ragged = [row for number in range(50) for row in responses(HAND, number, ends=2)]
    assert {len(row) for row in ragged} == set(range(1, 8))
    for row in ragged:
        assert row.count(1) <= 1
        assert (row[-1] == 1) or len(row) == 7
        assert 1 not in row[:-1]


def test_given_responses_reach_our_side() -> None:
    engine = Given(Settings("", HAND, ends=2))
    first, second = engine.generate(), engine.generate()
    for number, made in enumerate((first, second)):
        rows = responses(HAND, number, ends=2)
        assert [made.ids[i][made.mask[i]].tolist() for i in range(6)] == rows
        assert made.truncated.tolist() == [len(row) == 7 for row in rows]
    assert first.entropies is not None
    assert float(first.entropies[~first.mask].abs().sum()) == 0


def test_the_ways_through_the_head_agree() -> None:
    """Same loss and gradients for the same tokens, and the masked full logits are the selected head's."""
    results: dict[str, tuple[torch.Tensor, ...]] = {}
    roads: tuple[Any, ...] = ("full", "chunked", "selected", "every")
    for rho in (0.2, 1.0):
        for road in roads:
            work = Work(HeadSettings(road, 37, 8, 25, rho))
            loss = getattr(work, road)()
            loss.backward()
            assert work.hidden.grad is not None
            assert work.weight.grad is not None
            results[road] = (loss.detach(), work.hidden.grad, work.weight.grad)
        assert len(work.chosen) == (5 if rho == 0.2 else 25)
        for road in ("chunked", "selected", *(("every",) if rho == 1.0 else ())):
            torch.testing.assert_close(results[road], results["full"])


def test_work_of_the_scaling() -> None:
    assert [tokens(size) for size in by_length(HAND, (1, 2))] == [4 * 6, 4 * 7]
    assert [size.rows for size in by_rows(HAND, (1, 3))] == [3, 9]


def test_options_of_trl_that_are_tried() -> None:
    assert candidates(12) == [
        {"per_device_train_batch_size": 4},
        {"per_device_train_batch_size": 4, "cache_implementation": "static"},
    ]
    sizes = [options["per_device_train_batch_size"] for options in candidates(64)]
    assert sizes == [4, 8, 8, 16, 32]


def test_the_command_line_reaches_every_side() -> None:
    given = parser().parse_args(
        ["train", "--size", "M", "--ends", "3", "--batch", '{"micro_tokens": 64}', "--engine", '{"max_rows": 2}']
    )
    ours, every_token, theirs, tuned = sides(asked(given), "there")
    assert [s.name for s in (ours, every_token, theirs)] == ["lit-rlvr", "lit-rlvr, all tokens", "TRL"]
    for one in (ours, every_token, theirs, tuned):
        assert isinstance(one.settings, Settings)
        assert (one.settings.work, one.settings.ends, one.settings.size) == ("train", 3, SIZES["M"])
        assert Settings.read(one.settings.written()) == one.settings
    assert isinstance(ours.settings, Settings)
    assert ours.settings.select == "random"
    assert (ours.settings.micro_tokens, ours.settings.engine) == (64, {"max_rows": 2})
    assert tuned.environment
    assert not theirs.environment


def test_trl_is_tuned_where_its_options_are_known() -> None:
    """On a CPU they are; on a GPU its default would be measured twice under two names."""
    assert Asked("step", "M").names == SIDES[:4]
    assert Asked("step", "0.6B", "cuda").names == SIDES[:3]
    assert Asked("rollout", "0.6B", "cuda").names == ("lit-rlvr", "TRL")
    words = ["step", "--size", "0.6B", "--device", "cuda", "--sides", "TRL tuned"]
    with pytest.raises(SystemExit, match='error: "TRL tuned" has no options of its own on a GPU'):
        asked(parser().parse_args(words))
    options = {"per_device_train_batch_size": 16}
    (found,) = sides(asked(parser().parse_args([*words, "--trl", json.dumps(options)])), "there")
    assert isinstance(found.settings, Settings)
    assert (found.settings.trl, found.settings.dtype) == (options, "bfloat16")
    assert not found.environment
    with pytest.raises(SystemExit, match='--trl is for "TRL tuned", which is not among --sides'):
        asked(parser().parse_args(["train", "--sides", "TRL", "--trl", json.dumps(options)]))


def test_the_cluster_estimate_knows_this_machine() -> None:
    """At full ceilings: all multiplications of a step but the last token's, which the floors leave out."""
    settings = Settings("", HAND, rho=0.5)
    work, machine = work_of(settings), this_machine(flat(2.0), "cpu")
    assert (work.body, work.head, work.size, work.chosen) == (HAND.body, HAND.head, 4, 0.5)
    assert machine.device.flops == 2.0
    share = 0.4
    layers = 2 * HAND.body * 12 + 2 * 2 * 6 * 12**2
    assert training(work, machine).seconds == pytest.approx(6 * (3 * layers + 3 * 2 * 40 * 7 * 0.5) / (2 * share))
    assert rollout(work, machine).bound == "multiplications"
    narrow = replace(settings, device="cuda")
    assert work_of(narrow).scorings == 1  # bfloat16 rollouts do not give the training model's entropies
    assert work_of(replace(narrow, rho=1.0)).scorings == work.scorings == 0


def test_clocks_and_memory_of_this_process() -> None:
    clock, memory = Clock("cpu"), Memory("cpu")
    start = clock.now()
    least = fastest(clock, lambda: sum(range(20_000)))
    assert 0 < least <= clock.since(start)
    before = memory.forget()
    with mmap(-1, 64 * 2**20) as block:  # not torch's: it may get memory that this process has kept
        for page in range(0, len(block), PAGESIZE):
            block[page] = 1
        assert memory.peak() - before > 60


def test_clocks_and_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of a GPU: events in milliseconds, which count once it has caught up, and torch's own bytes."""
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("record")

        def elapsed_time(self, end: Event) -> float:
            assert end is not self
            assert done == ["record", "record", "wait"]
            return 1500.0

    stand_in = {
        "Event": Event, "synchronize": lambda: done.append("wait"), "memory_allocated": lambda: 3 * 2**20,
        "max_memory_allocated": lambda: 7 * 2**20, "reset_peak_memory_stats": lambda: done.append("forget"),
    }  # fmt: skip
    for name, value in stand_in.items():
        monkeypatch.setattr(torch.cuda, name, value)
    clock, memory = Clock("cuda"), Memory("cuda")
    assert clock.since(clock.now()) == 1.5
    assert (memory.forget(), memory.peak(), done[-1]) == (3.0, 7.0, "forget")


def test_tables_are_made_of_lines(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    facts = {"processor": "X", "cores": 2, "load": 0.1, "command": "python -m benchmarks step"}
    lines: list[dict[str, Any]] = [
        {"benchmark": "step", "kind": "ratio", "size": "S", "ends": 0, "part": "step", "side": "TRL", "over": "ours",
         "median": 2.345678, "low": 2.0, "high": 3.0, **facts},
        {"benchmark": "step", "kind": "memory", "size": "S", "ends": 0, "side": "TRL", "peak": 1234.5, "loaded": 9.0,
         "extra": 1225.5, **facts},
    ]  # fmt: skip
    file.write_text("noise\n" + "\n".join(map(json.dumps, lines)))
    given = parser().parse_args(["table", str(file)])
    assert given.files == [str(file)]
    text = render(read([file]))
    assert "| size | part | side | over | median | low | high |" in text
    assert "| S | step | TRL | ours | 2.35 | 2 | 3 |" in text
    assert "| size | side | peak (MiB) | loaded (MiB) | extra (MiB) |" in text
    assert "| S | TRL | 1,234 | 9 | 1,226 |" in text
    assert "Measured on: processor X, cores 2." in text
    assert text.count("Command: `python -m benchmarks step`") == 1
    with pytest.raises(ValueError, match="no result of a benchmark"):
        render([{"a": 1}])
    with pytest.raises(ValueError, match="no table for lines of the kind 'odd'"):
        render([{"benchmark": "step", "kind": "odd"}])


def test_refused_command_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for options in (["step", "--size", "XL"], ["nothing"], ["rollout", "--sides", "else"]):
        with pytest.raises(SystemExit):
            parser().parse_args(options)
    assert "invalid choice" in capsys.readouterr().err
    with pytest.raises(ValueError, match="model M is not measured on cuda"):
        suite.chosen(["M"], "cuda")
    assert suite.chosen([], "cpu") == ["S", "M"]
    given = parser().parse_args(["all", "--device", "cuda", "--sizes", "S"])
    with pytest.raises(SystemExit, match="error: model S is not measured on cuda"):
        given.run(given)
    given = parser().parse_args(["all", "--quick", "--sizes", "S"])
    with pytest.raises(SystemExit, match="error: --quick runs a tiny model"):
        given.run(given)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["benchmarks", "floors", "--device", "cuda"])
    with pytest.raises(SystemExit, match="error: --device cuda: PyTorch sees no GPU here"):
        main()
    namespace = SimpleNamespace(benchmark="cluster", size="M", device="cpu", repeats=1, sides=[], ends=0, select="top")
    assert asked(SimpleNamespace(**vars(namespace), batch={}, engine={}, trl={})).work == "step"  # type: ignore[arg-type]


def test_tables_are_put_into_a_page(tmp_path: Path) -> None:
    """Between its markers, again and again."""
    page = put("one", f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert page == f"before\n{BEGIN}\n\none\n{END}\nafter\n"
    assert put("one", page) == page
    with pytest.raises(ValueError, match="the page needs the lines"):
        put("one", "nothing")
    results = Path(__file__).parent.parent / "docs" / "benchmarks.md"
    assert put("one", results.read_text()).count("\none\n") == 1


def test_predictions_find_what_was_measured() -> None:
    """Each names a line that benchmarks print, and no two the same number."""
    first = PREDICTIONS[0]
    line = {"benchmark": "step", "kind": "ratio", "size": "S", "ends": 0, "part": "step", "side": "TRL", "median": 2.5}
    assert first.measured([line]) == 2.5
    assert first.measured([{**line, "size": "M"}]) is None
    assert "| step on S, TRL / ours | 1.8 | 2.5 |" in predicted([line])
    assert len({json.dumps([p.where, p.column]) for p in PREDICTIONS}) == len(PREDICTIONS)
