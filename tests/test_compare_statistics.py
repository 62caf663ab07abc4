"""Statistics of a comparison: against scipy, by hand, and laws; measures and their table."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from lit_rlvr.compare.measures import Measure, Result, direction, read_history, read_measure, read_result
from lit_rlvr.compare.plot import curve, plot
from lit_rlvr.compare.spec import Comparison, Layer
from lit_rlvr.compare.statistics import Difference, Summary, paired_difference, summarise, verdict
from lit_rlvr.compare.table import compare, make_table, markdown, to_csv, to_json

NUMBERS = st.floats(-100, 100, allow_nan=False, width=32)
BY_SEED = st.dictionaries(st.integers(0, 20), NUMBERS, min_size=2, max_size=12)


def pairs(draw: Any) -> tuple[dict[int, float], dict[int, float]]:
    """Two arms with the same seeds."""
    first = draw(BY_SEED)
    return first, {seed: draw(NUMBERS) for seed in first}


PAIRS = st.composite(pairs)()


def test_a_summary_by_hand() -> None:
    """Squares of the deviations of 1, 2, 6 from 3 sum to 14, divided by 2."""
    assert summarise([1.0, 2.0, 6.0]) == Summary(3, 3.0, math.sqrt(7))
    assert summarise([4.0]) == Summary(1, 4.0, None)
    assert summarise([]) == Summary(0, None, None)


def test_an_interval_by_hand() -> None:
    """Differences 1, 2, 3: mean 2, standard deviation 1, t(2 degrees, 97.5 %) = 4.302653."""
    found = paired_difference({0: 2.0, 1: 4.0, 2: 6.0, 7: 100.0}, {0: 1.0, 1: 2.0, 2: 3.0, 8: -100.0})
    assert found is not None
    assert (found.n, found.mean) == (3, 2.0)
    half = 4.302652729911275 / math.sqrt(3)
    assert (found.low, found.high) == (pytest.approx(2 - half), pytest.approx(2 + half))


def test_one_pair_and_none() -> None:
    assert paired_difference({3: 1.5}, {3: 1.0, 4: 0.0}) == Difference(1, 0.5, None, None)
    assert paired_difference({1: 1.0}, {2: 1.0}) is None


@given(PAIRS, st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_an_interval_is_that_of_the_paired_t_test(
    arms: tuple[dict[int, float], dict[int, float]], level: float
) -> None:
    """Tolerance: scipy's variance loses digits where differences are nearly equal."""
    first, second = arms
    seeds = sorted(first)
    assume(max(first[s] - second[s] for s in seeds) - min(first[s] - second[s] for s in seeds) > 1e-3)
    expected = stats.ttest_rel([first[s] for s in seeds], [second[s] for s in seeds]).confidence_interval(level)
    found = paired_difference(first, second, level)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-6, abs=1e-6)


@given(PAIRS)
def test_an_arm_and_its_baseline_swapped(arms: tuple[dict[int, float], dict[int, float]]) -> None:
    there, back = paired_difference(*arms), paired_difference(*reversed(arms))
    assert there is not None
    assert back is not None
    assert back.mean == -there.mean
    if there.low is not None and there.high is not None:
        assert (back.low, back.high) == (-there.high, -there.low)
    opposite, said = {"better": "worse", "worse": "better"}, verdict(there, "higher")
    assert verdict(back, "higher") == opposite.get(said, said)
    assert verdict(there, "lower") == verdict(back, "higher")


@given(BY_SEED)
def test_an_arm_does_not_differ_from_itself(arm: dict[int, float]) -> None:
    found = paired_difference(arm, arm)
    assert found == Difference(len(arm), 0.0, None, None)
    assert verdict(found, "higher") == verdict(found, None) == "no difference found"


@given(PAIRS, st.dictionaries(st.integers(0, 20), st.integers(-50, 50), min_size=21, max_size=21))
def test_what_a_seed_does_to_both_arms_cancels(
    arms: tuple[dict[int, float], dict[int, float]], shift: dict[int, int]
) -> None:
    first, second = arms
    differences = [first[s] - second[s] for s in first]
    assume(max(differences) - min(differences) > 1e-3)
    moved = paired_difference({s: v + shift[s] for s, v in first.items()}, {s: v + shift[s] for s, v in second.items()})
    still = paired_difference(first, second)
    assert moved is not None
    assert still is not None
    # Sums of numbers up to 150 are off by at most 150 * 2^-52 = 3e-14 each; the quantile is at most 12.7.
    assert (moved.mean, moved.low, moved.high) == pytest.approx((still.mean, still.low, still.high), abs=1e-11)


@given(PAIRS)
def test_more_confidence_is_a_wider_interval(arms: tuple[dict[int, float], dict[int, float]]) -> None:
    half, ninety, most = (paired_difference(*arms, level) for level in (0.5, 0.9, 0.99))
    assert half is not None
    assert ninety is not None
    assert most is not None
    if half.low is None or ninety.low is None or most.low is None:
        assert half.low == ninety.low == most.low
    else:
        assert half.low > ninety.low > most.low


def test_equal_differences_are_no_certainty() -> None:
    """Two seeds that both need 2 steps more say nothing about the spread; rounding makes no spread either."""
    found = paired_difference({0: 24.0, 1: 26.0}, {0: 22.0, 1: 24.0})
    assert found == Difference(2, 2.0, None, None)
    assert verdict(found, "lower") == "the same in every pair: no interval"
    rounded = paired_difference({0: 0.7, 1: 0.71, 2: 0.72}, {0: 0.5, 1: 0.51, 2: 0.52})
    assert rounded is not None
    assert (rounded.mean, rounded.low, rounded.high) == (pytest.approx(0.2), None, None)


@pytest.mark.parametrize(
    ("difference", "better", "words"),
    [
        (Difference(3, 0.2, 0.1, 0.3), "higher", "better"),
        (Difference(3, 0.2, 0.1, 0.3), "lower", "worse"),
        (Difference(3, -0.2, -0.3, -0.1), "higher", "worse"),
        (Difference(3, -0.2, -0.3, -0.1), "lower", "better"),
        (Difference(3, -0.2, -0.3, -0.1), None, "lower"),
        (Difference(3, 0.2, 0.1, 0.3), None, "higher"),
        (Difference(3, 0.2, -0.1, 0.5), "higher", "no difference found"),
        (Difference(3, 0.2, 0.0, 0.4), "higher", "no difference found"),
        (Difference(1, 0.2, None, None), "higher", "one seed: no interval"),
        (Difference(3, 0.2, None, None), "higher", "the same in every pair: no interval"),
        (Difference(3, 0.0, None, None), "higher", "no difference found"),
        (None, "higher", "no seed in common"),
    ],
)
def test_verdicts(difference: Difference | None, better: Any, words: str) -> None:
    assert verdict(difference, better) == words


HISTORY = {"r": {1: 0.0, 3: 0.2, 5: 1.0, 7: 0.6, 9: 0.9}}
RESULT = Result({"greedy/mean_at_1": 0.75, "bad": math.nan}, HISTORY)


@pytest.mark.parametrize(
    ("measure", "value"),
    [
        (Measure("held_out", "greedy/mean_at_1"), 0.75),
        (Measure("held_out", "sampled/mean_at_1"), None),
        (Measure("held_out", "bad"), None),
        (Measure("last", "r", window=2), 0.75),
        (Measure("last", "r", window=9), 0.54),
        (Measure("last", "q"), None),
        (Measure("steps_to", "r", 0.6, window=2), 5.0),
        (Measure("steps_to", "r", 0.6, window=3), 7.0),
        (Measure("steps_to", "r", 0.0, window=1), 1.0),
        (Measure("steps_to", "r", 0.9, window=2), math.inf),
        (Measure("steps_to", "r", 0.1, window=6), math.inf),
        (Measure("steps_to", "q", 0.1), None),
    ],
)
def test_values(measure: Measure, value: float | None) -> None:
    """Of 0, .2, 1, .6, .9: pairs have means .1, .6, .8, .75; triples .4, .6, .83."""
    assert measure.value(RESULT) == (None if value is None else pytest.approx(value))


def test_measures_from_yaml() -> None:
    assert read_measure("greedy/pass_at_4", "metric") == Measure("held_out", "greedy/pass_at_4", better="higher")
    assert read_measure({"held_out": "greedy/length", "better": "lower"}, "metric") == Measure(
        "held_out", "greedy/length", better="lower"
    )
    assert read_measure({"last": "rollout/entropy", "window": 3}, "metric") == Measure(
        "last", "rollout/entropy", window=3
    )
    steps = read_measure({"steps_to": 0.8, "metric": "rollout/reward"}, "metric")
    assert steps == Measure("steps_to", "rollout/reward", 0.8, better="lower")
    assert steps.name == "steps to rollout/reward 0.8"
    assert direction("rollout/reward") == "higher"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"steps_too": 0.8, "metric": "r"}, "also[0] has no option 'steps_too'; did you mean steps_to?"),
        ({"metric": "r"}, "also[0] needs exactly one of held_out, last, steps_to"),
        ({"last": "r", "steps_to": 1, "metric": "r"}, "also[0] needs exactly one of"),
        ({"steps_to": 0.8}, "also[0] needs a `metric`"),
        ({"last": "r", "metric": "q"}, "also[0] has the metric's name as `last`, and no `metric`"),
        ({"held_out": "r", "window": 3}, "also[0]: a held-out result is one number and has no window"),
        ({"last": "r", "window": 0}, "also[0].window must be a whole number of at least 1, got 0"),
        ({"steps_to": "much", "metric": "r"}, "also[0].steps_to must be a number, got 'much'"),
        ({"last": "r", "better": "more"}, "also[0].better must be higher, lower or null, got 'more'"),
        ({"last": 3}, "also[0] needs the name of a metric, got 3"),
        (3, "also[0] must be the name of a held-out result"),
    ],
)
def test_a_bad_measure_is_one_sentence(given: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match="also") as error:
        read_measure(given, "also[0]")
    assert sentence in str(error.value)


def test_reading_what_a_run_has_left(tmp_path: Path) -> None:
    """Rows of the same step complete each other; without a CSV there is no history."""
    report = {"evaluations": {"before training": {"x": 0.0}, "after RLVR": {"x": 0.5}}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert read_result(tmp_path) == Result({"x": 0.5}, {})
    (tmp_path / "metrics").mkdir()
    file = tmp_path / "metrics/metrics.csv"
    file.write_text("loss,step,val/x\n0.5,1,\n0.25,2,\n,2,0.125\n")
    assert read_history(file) == {"loss": {1: 0.5, 2: 0.25}, "val/x": {2: 0.125}}
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(ValueError, match=r"report\.json cannot be read"):
        read_result(tmp_path)


def comparison(**options: Any) -> Comparison:
    """Three arms."""
    return Comparison("c", dict.fromkeys(("base", "good", "lame"), Layer()), "base", Path("c"), **options)


def results(*values: float) -> dict[int, Result]:
    """A run by seed, that reaches its value in steps of .1."""
    return {
        seed: Result({"sampled/mean_at_1": value}, {"r": {i: min(i / 10, value) for i in range(1, 11)}})
        for seed, value in enumerate(values)
    }


STEPS = Measure("steps_to", "r", 0.5, window=1, better="lower")
THREE = {"base": results(0.5, 0.6, 0.7), "good": results(0.7, 0.9, 0.8), "lame": results(0.1, 0.6, 0.4)}


def test_a_row_for_each_arm() -> None:
    """Differences of good: .2, .3, .1, so .2 ± 4.3027 · .1 / √3 = .2484; of lame: -.4, 0, -.3."""
    table = make_table(comparison(), [], THREE, "command")
    ((measure, (base, good, lame)),) = table.measures
    assert measure.name == "sampled/mean_at_1"
    assert (base.difference, base.verdict) == (None, "")
    assert base.summary.mean == pytest.approx(0.6)
    assert good.difference is not None
    assert (good.difference.mean, good.difference.low) == pytest.approx((0.2, 0.2 - 0.2484138))
    assert (good.verdict, lame.verdict) == ("no difference found", "no difference found")


def test_a_run_that_never_gets_there_is_counted_and_makes_no_interval() -> None:
    """Lame reaches .5 with seed 1 only; the others take five steps each."""
    table = make_table(comparison(also=(STEPS,)), [], THREE, "command")
    base, good, lame = table.measures[1][1]
    assert (base.missed, good.missed, lame.missed) == (0, 0, 2)
    assert (good.summary, good.verdict) == (Summary(3, 5.0, 0.0), "no difference found")
    assert (lame.summary, lame.difference) == (Summary(1, 5.0, None), None)
    assert lame.verdict == "reached by 1 of 3, baseline 3 of 3: no interval"
    text = markdown(table)
    assert "| 3 (2 never) |" in text
    assert "A run that never reached the threshold is counted, and is not in the mean." in text
    written = to_json(table)["measures"]["steps to r 0.5"]["lame"]
    assert (written["values"], written["never"]) == ({"0": None, "1": 5.0, "2": None}, 2)


def test_a_baseline_that_never_gets_there_makes_no_interval_either() -> None:
    rows = compare({"base": {0: math.inf, 1: 4.0}, "a": {0: 3.0, 1: 3.0}}, "base", STEPS, 0.95)
    assert rows[1].verdict == "reached by 2 of 2, baseline 1 of 2: no interval"


def test_the_table_as_csv_and_json() -> None:
    table = make_table(comparison(), [], THREE, "lit-rlvr compare --config c.yaml")
    rows = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert [row["arm"] for row in rows] == ["base", "good", "lame"]
    assert (rows[0]["difference"], rows[0]["verdict"]) == ("", "")
    assert (float(rows[1]["difference"]), rows[1]["pairs"]) == (pytest.approx(0.2), "3")
    written = json.loads(json.dumps(to_json(table), allow_nan=False))
    good = written["measures"]["sampled/mean_at_1"]["good"]
    assert good["values"] == {"0": 0.7, "1": 0.9, "2": 0.8}
    assert good["difference"]["low"] == pytest.approx(float(rows[1]["low"]))
    assert (written["command"], written["baseline"]) == ("lit-rlvr compare --config c.yaml", "base")


def test_markdown_is_aligned_and_says_what_chance_does() -> None:
    text = markdown(make_table(comparison(), [], THREE, "lit-rlvr compare --config c.yaml"))
    grid = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in grid}) == 1
    assert " ".join(grid[0].split()) == "| arm | n | mean | sd | difference to base | 95 % interval | verdict |"
    assert " ".join(grid[3].split()) == (
        "| good | 3 | 0.800 | 0.100 | +0.200 | [-0.048, +0.448] | no difference found |"
    )
    assert "2 arms are compared in each table: if none differed from base, 0.1 intervals" in text
    assert "`lit-rlvr compare --config c.yaml`" in text


def test_a_value_that_some_runs_lack_is_named() -> None:
    lacking = {**THREE, "lame": {0: Result({}, {}), 1: THREE["lame"][1]}}
    table = make_table(comparison(), [], lacking, "command")
    assert table.without_value == ["lame seed 0 has no sampled/mean_at_1"]
    assert "- lame seed 0 has no sampled/mean_at_1." in markdown(table)


def test_a_name_that_no_run_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no run has 'sampled/mean_at_2'; did you mean sampled/mean_at_1\?"):
        make_table(comparison(metric=Measure("held_out", "sampled/mean_at_2")), [], THREE, "command")
    with pytest.raises(ValueError, match="no run has 'zzz'; there are r"):
        make_table(comparison(also=(Measure("last", "zzz"),)), [], THREE, "command")


def test_an_arm_without_a_run_has_an_empty_row() -> None:
    table = make_table(comparison(), [], {"base": results(0.5, 0.6)}, "command")
    _, good, _ = table.measures[0][1]
    assert (good.summary, good.verdict) == (Summary(0, None, None), "no seed in common")


def test_a_curve_is_a_mean_with_its_spread() -> None:
    """At step 2 only one run has a value."""
    found = curve([{"r": {1: 0.0, 2: 3.0, 4: 1.0}}, {"r": {1: 2.0, 4: 2.0}}, {}], "r")
    assert (found.steps, found.mean) == ([1, 2, 4], [1.0, 3.0, 1.5])
    assert found.spread == pytest.approx([math.sqrt(2), 0.0, math.sqrt(0.5)])


def test_plots(tmp_path: Path) -> None:
    """A panel per arm; nothing for a metric that was never logged."""
    histories = {arm: [result.history for result in runs.values()] for arm, runs in THREE.items()}
    assert plot(tmp_path / "r.png", "r", histories, "base")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert plot(tmp_path / "alone.png", "r", {"base": histories["base"]}, "base")
    assert not plot(tmp_path / "q.png", "q", histories, "base")
    assert not (tmp_path / "q.png").exists()
