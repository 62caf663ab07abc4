"""``lit-rlvr compare``: what runs, what does not run again, what is said when something fails."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import CONFIGS, Outcome, cli, succeed, untouched_process
from mlflow import MlflowClient
from test_configs import holds

from lit_rlvr.compare import check, refused
from lit_rlvr.compare.command import main, workers_of
from lit_rlvr.compare.pool import locked
from lit_rlvr.compare.runs import Run, arm_arguments, runs_of
from lit_rlvr.compare.spec import LAYER, OPTIONS, read

ROOT = Path(__file__).parents[1]
FAKE = (sys.executable, "-S", str(Path(__file__).parent / "fake_fit.py"))
TWO_ARMS: dict[str, Any] = {
    "baseline": "low", "seeds": [0, 1], "track": False, "arms": {"low": {}, "high": {"set": {"fake.level": 0.7}}},
}  # fmt: skip
FILES = [f for f in sorted(CONFIGS.rglob("*.yaml")) if "arms" in yaml.safe_load(f.read_text())]
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a comparison with two arms, and changes, into the current folder."""
    monkeypatch.chdir(tmp_path)

    def written(**changes: Any) -> Path:
        file = Path("c.yaml")
        file.write_text(yaml.safe_dump({**TWO_ARMS, **changes}, sort_keys=False))
        return file

    return written


def compare(*options: str) -> Outcome:
    """Run the command with the fake in place of ``fit``."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code: Any = main(["--config", "c.yaml", *options], FAKE)
        except SystemExit as exit:
            code = exit.code
    return Outcome(code, out.getvalue(), err.getvalue(), ())


def began() -> list[str]:
    """Arm and seed of every run that has begun, in order."""
    file = Path("runs/compare/c/order.txt")
    lines = file.read_text().splitlines() if file.exists() else []
    return [" ".join(line.split()[1:3]) for line in lines if line.startswith("begin")]


def table() -> Any:
    return json.loads(Path("runs/compare/c/table.json").read_text())


# -- the file ----------------------------------------------------------------------------------------------------------


def test_layers_become_arguments(write: Write) -> None:
    """Common files and options, then the arm's, then what the comparison sets; values as on the command line."""
    Path("base.yaml").write_text("a: 1")
    Path("more.yaml").write_text("b: 1")
    file = write(
        config=["base.yaml"], set={"model.loss": "Clip", "model.kl": None}, callbacks=[], threads=2,
        arms={"low": {"config": ["more.yaml"], "set": {"model.batch": {"prompts": 4}}, "callbacks+": ["A", {"b": 1}]}},
    )  # fmt: skip
    (first, second) = runs_of(read(file))
    *options, root = first.arguments
    assert options == [
        "--config", "base.yaml", "--model.loss=Clip", "--model.kl=null", "--trainer.callbacks=[]",
        "--config", "more.yaml", '--model.batch={"prompts": 4}', "--trainer.callbacks+=A",
        '--trainer.callbacks+={"b": 1}', "--threads=2", "--seed_everything=0", "--model.seed=0",
    ]  # fmt: skip
    assert root == f"--trainer.default_root_dir={first.folder}"
    assert (first.folder.name, second.folder.name) == ("seed_0", "seed_1")
    assert first.folder.parent == second.folder.parent


def test_configuration_files_are_looked_for_beside_the_comparison_first(write: Write) -> None:
    """Then in the current folder."""
    Path("there").mkdir()
    for place in ("both.yaml", "there/both.yaml", "here.yaml"):
        Path(place).write_text(f"a: {place}")
    write(config=["both.yaml", "here.yaml"]).rename("there/c.yaml")
    assert read(Path("there/c.yaml")).common.config == (Path("there/both.yaml"), Path("here.yaml"))


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown option": ({"baselines": "low"}, "has no option 'baselines'; did you mean baseline?"),
    "unknown option of an arm": (
        {"arms": {"low": {"callback": []}}},
        "arm low has no option 'callback'; did you mean callbacks?",
    ),
    "unknown baseline": ({"baseline": "lwo"}, "baseline: there is no arm 'lwo'; did you mean low?"),
    "no baseline": ({"baseline": None}, "needs `baseline`, the name of the arm"),
    "arms as a list": ({"arms": ["low"]}, "is no comparison: it needs `arms`"),
    "an arm that is no mapping": ({"arms": {"low": ["x"]}}, "arm low must be a mapping with some of config, set"),
    "a name that YAML reads as false": (
        {"arms": {"low": {}, False: {}}},
        "line 8: a name must be a text, got 'false'; put it in quotes",
    ),
    "a name that is no folder": ({"arms": {"low": {}, "a/b": {}}}, "letters, digits and ._- only, got 'a/b'"),
    "a file that is not there": ({"config": ["c.yml"]}, "there is no file 'c.yml'; did you mean c.yaml?"),
    "files that are no list": ({"config": "c.yaml"}, "config must be a list, got 'c.yaml'"),
    "options that are no mapping": ({"set": ["a=1"]}, "set must map options of `lit-rlvr fit` to values"),
    "a seed in an arm": ({"set": {"seed_everything": 1}}, "seed_everything is set by the comparison itself"),
    "a logger": ({"set": {"trainer.logger.x": 1}}, "trainer.logger.x is set by the comparison itself"),
    "callbacks as an option": ({"set": {"trainer.callbacks+": []}}, "list callbacks under `callbacks` or `callbacks+`"),
    "a seed twice": ({"seeds": [1, 1]}, "seeds must be different whole numbers of at least 0, got [1, 1]"),
    "no seeds": ({"seeds": []}, "seeds must be different whole numbers"),
    "seeds that are no numbers": ({"seeds": ["a"]}, "seeds must be a whole number, got 'a'"),
    "true as a number": ({"threads": True}, "threads must be a whole number, got True"),
    "no workers": ({"workers": 0}, "threads and workers must be at least 1, got 1 and 0"),
    "confidence in percent": ({"confidence": 95}, "confidence must lie in (0, 1), got 95"),
    "a measure twice": ({"metric": "x", "also": ["x"]}, "x is listed twice among metric and also"),
    "a bad measure": ({"also": [{"last": 3}]}, "also[0] needs the name of a metric, got 3"),
    "measures that are no list": ({"also": "x"}, "also must be a list of measures"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_sentence(case: str, write: Write) -> None:
    """And nothing is run or written."""
    changes, sentence = MISTAKES[case]
    write(**changes)
    outcome = compare()
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("lit-rlvr: error: ")
    assert sentence in outcome.err
    assert outcome.err.count("\n") == 1
    assert [path.name for path in Path().iterdir()] == ["c.yaml"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--worker=2",), "there is no option '--worker=2'; did you mean --workers?"),
        (("--workers=many",), "argument --workers: expected a whole number, got 'many'"),
        (("--arms=low,hihg",), "arms: there is no arm 'hihg'; did you mean high?"),
        (("--arms=high",), "the baseline 'low' must be among the arms"),
        (("--seeds=0,0",), "seeds must be different whole numbers"),
        (("--seeds=0,one",), "argument --seeds: expected whole numbers separated by commas, got '0,one'"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(options: tuple[str, ...], sentence: str, write: Write) -> None:
    write()
    outcome = compare(*options)
    assert outcome.code == 2
    assert sentence in outcome.err


def test_a_missing_or_broken_file(write: Write) -> None:
    write().rename("d.yaml")
    assert "there is no file 'c.yaml'; did you mean d.yaml?" in compare().err
    Path("c.yaml").write_text("a: [1")
    assert "c.yaml is not valid YAML" in compare().err


def test_a_name_that_stands_twice_is_refused(write: Write) -> None:
    """The second arm would take the place of the first."""
    write()
    Path("c.yaml").write_text("baseline: low\narms:\n  low: {}\n  low: {set: {model.seed: 1}}\n")
    assert "c.yaml, line 4: arms.low stands there a second time; join the two" in compare().err
    assert began() == []


def test_arms_are_checked_by_what_fit_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, values and what goes together; an arm that could begin is not mentioned, and nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    quickstart = ["--config", str(CONFIGS / "quickstart.yaml"), "--warmup=null"]
    arms = {
        "good": [], "name": ["--model.bach.prompts=3"], "value": ["--model.batch.prompts=3"],
        "together": ["--model.batch.micro_rows=4"],
    }  # fmt: skip
    monkeypatch.setattr("sys.stdin", StringIO(json.dumps({arm: quickstart + more for arm, more in arms.items()})))
    printed = StringIO()
    with untouched_process(), redirect_stdout(printed):
        refused.main()
    assert json.loads(printed.getvalue()) == {
        "name": "there is no option 'model.bach.prompts'; did you mean model.batch.prompts?",
        "value": "batch.prompts=3 must be a multiple of batch.minibatch_prompts=16",
        "together": "batch.micro_rows is for callbacks that decide per micro-batch, and there is none; leave it null, "
        "as in --model.batch.micro_rows=null",
    }
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [(), ("--dry_run",)])
def test_a_broken_arm_is_named_before_any_run_begins(
    options: tuple[str, ...], write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answered(command: list[str], *, input: str, **_: Any) -> Any:
        assert command[1:] == ["-m", "lit_rlvr.compare.refused"]
        assert {name: words[0] for name, words in json.loads(input).items()} == {
            "low": "--threads=1",
            "high": "--fake.level=0.7",
        }
        return subprocess.CompletedProcess(command, 0, json.dumps({"high": "there is no option 'fake.level'"}), "")

    write()
    monkeypatch.setattr(check.subprocess, "run", answered)
    assert main(["--config", "c.yaml", *options]) == 2
    assert capsys.readouterr().err == ("checking 2 arms\nlit-rlvr: error: arm high: there is no option 'fake.level'\n")
    assert [path.name for path in Path().iterdir()] == ["c.yaml"]


# -- running -----------------------------------------------------------------------------------------------------------


def test_every_arm_is_run_with_every_seed_and_compared(write: Write) -> None:
    """Seed by seed. The fake's results are level · (1 + seed / 50): the pairs differ by .2 and .204."""
    write(workers=1)
    outcome = compare()
    assert outcome.code == 0
    assert began() == ["low 0", "high 0", "low 1", "high 1"]
    rows = table()["measures"]["sampled/mean_at_1"]
    assert rows["low"]["values"] == {"0": 0.5, "1": 0.51}
    assert rows["high"]["difference"]["mean"] == pytest.approx(0.202)
    assert rows["high"]["verdict"] == "better"
    folder = Path("runs/compare/c")
    assert outcome.out == f"{(folder / 'table.md').read_text()}\n"
    assert {"table.csv", "curve_rollout_reward.png"} <= {path.name for path in folder.iterdir()}
    assert "high seed 1: sampled/mean_at_1 0.714; 0 to go" in outcome.err


def test_what_is_done_is_not_run_again(write: Write) -> None:
    """A new seed is; an arm whose options or files have changed is, and changed back it is done already."""
    (base := Path("base.yaml")).write_text("model: {a: 1}")
    write(config=["base.yaml"])
    compare()
    first = table()["measures"]
    assert len(began()) == 4
    again = compare()
    assert "4 runs, 4 done, 0 to run" in again.err
    assert table()["measures"] == first
    compare("--seeds=0,1,2")
    assert sorted(began()[4:]) == ["high 2", "low 2"]
    write(config=["base.yaml"], arms={"low": {}, "high": {"set": {"fake.level": 0.8}}})
    compare()
    assert sorted(began()[6:]) == ["high 0", "high 1"]
    assert table()["measures"]["sampled/mean_at_1"]["high"]["mean"] == pytest.approx(0.808)
    write(config=["base.yaml"])
    base.write_text("# said otherwise\nmodel:\n  a: 1\n")
    compare()
    assert len(began()) == 8
    assert table()["measures"] == first
    base.write_text("model: {a: 2}")
    assert "4 runs, 0 done, 4 to run" in compare().err
    assert len(began()) == 12


def test_a_run_without_its_report_is_run_again(write: Write) -> None:
    """What is left of the attempt before is gone."""
    write()
    compare()
    (lost,) = Path("runs/compare/c").glob("high-*/seed_1")
    (lost / "report.json").unlink()
    (lost / "left over").touch()
    compare()
    assert began()[4:] == ["high 1"]
    assert not (lost / "left over").exists()


BROKEN = {"arms": {**TWO_ARMS["arms"], "broken": {"set": {"fake.code": 3, "fake.fail_seed": 1}}}}


def test_a_failing_run_stops_no_other_and_is_named(write: Write) -> None:
    """With the end of its log, in table and progress; it is tried again, the others are not."""
    write(**BROKEN)
    outcome = compare()
    assert outcome.code == 1
    assert len(began()) == 6
    assert "broken seed 1: failed, see runs/compare/c/broken-" in outcome.err
    assert "1 of 6 runs failed and are in no number" in outcome.out
    assert "broken seed 1, exit code 3" in outcome.out
    assert "line 29\n    lit-rlvr: error: the fake run was told to fail\n" in outcome.out
    assert "line 0\n" not in outcome.out
    found = table()
    assert (found["failed"][0]["arm"], found["failed"][0]["seed"], found["failed"][0]["code"]) == ("broken", 1, 3)
    assert found["measures"]["sampled/mean_at_1"]["broken"]["n"] == 1
    assert found["measures"]["sampled/mean_at_1"]["broken"]["verdict"] == "one seed: no interval"
    compare()
    assert began()[6:] == ["broken 1"]


def test_a_run_that_ends_well_without_a_report_has_failed(write: Write) -> None:
    write(arms={"low": {}, "mute": {"set": {"fake.code": 0}}})
    outcome = compare()
    assert outcome.code == 1
    assert "mute seed 0, no report" in outcome.out


def test_runs_are_side_by_side(write: Write) -> None:
    """All four have begun before the first may end: the last one opens the gate."""
    write(workers=4, set={"fake.wait": "gate", "fake.gate_at": 4})
    assert compare().code == 0
    order = [line.split()[0] for line in Path("runs/compare/c/order.txt").read_text().splitlines()]
    assert order == ["begin"] * 4 + ["end"] * 4


def test_no_more_runs_than_workers(write: Write) -> None:
    write(workers=1)
    compare()
    order = [line.split()[0] for line in Path("runs/compare/c/order.txt").read_text().splitlines()]
    assert order == ["begin", "end"] * 4


def test_by_default_as_many_workers_as_cores_have_room_for(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert workers_of(read(write())) == 8
    assert workers_of(read(write(threads=3))) == 2
    assert workers_of(read(write(threads=16))) == 1
    assert workers_of(read(write(workers=5))) == 5


def test_a_run_has_its_number_of_threads(write: Write) -> None:
    write(threads=3, seeds=[0])
    compare()
    (run, _) = runs_of(read(Path("c.yaml")))
    assert "OMP_NUM_THREADS=3" in run.log.read_text()


def test_a_dry_run_prints_and_runs_nothing(write: Write) -> None:
    write()
    outcome = compare("--dry_run")
    assert (outcome.code, outcome.err) == (0, "")
    assert [path.name for path in Path().iterdir()] == ["c.yaml"]
    lines = outcome.out.splitlines()
    assert lines[0] == "# low seed 0: new"
    assert "--seed_everything=0 --model.seed=0" in lines[1]
    assert lines[-1].startswith("# 4 runs, 0 done, 4 to run, ")


def test_a_table_of_what_is_done(write: Write) -> None:
    """Without a run; the rest is named."""
    write()
    compare("--seeds=0")
    outcome = compare("--table_only")
    assert (outcome.code, len(began())) == (0, 2)
    assert "2 of 4 runs are not done yet: low seed 1, high seed 1." in outcome.out


def test_some_arms_and_another_folder(write: Write) -> None:
    write(**BROKEN)
    assert compare("--arms=low,high", "--folder=elsewhere").code == 0
    assert list(json.loads(Path("elsewhere/table.json").read_text())["measures"]["sampled/mean_at_1"]) == [
        "low",
        "high",
    ]


def test_a_measure_that_no_run_has_is_refused_and_the_runs_are_kept(write: Write) -> None:
    write(metric="sampled/mean_at_2")
    outcome = compare()
    assert outcome.code == 2
    assert "no run has 'sampled/mean_at_2'; did you mean sampled/mean_at_1?" in outcome.err
    write()
    assert "4 done, 0 to run" in compare().err


def test_a_curve_that_no_run_has_is_named(write: Write) -> None:
    write(curves=["rollout/rewrad"])
    outcome = compare()
    assert outcome.code == 0
    assert "no run has logged 'rollout/rewrad', so there is no curve of it; did you mean rollout/reward?" in outcome.err


def test_two_comparisons_do_not_share_a_folder(write: Write) -> None:
    write()
    with locked(Path("runs/compare/c")):
        outcome = compare()
    assert outcome.code == 2
    assert "another `lit-rlvr compare`, or a run that one has left behind, is at work in runs/compare/c" in outcome.err
    assert compare().code == 0


# -- interruption ------------------------------------------------------------------------------------------------------

DRIVER = "import sys; from lit_rlvr.compare.command import main; sys.exit(main(sys.argv[4:], sys.argv[1:4]))"


def heed_signals() -> None:
    """A test run in the background, or under nohup, would hand on that they are ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def driven(write: Write) -> Iterator[subprocess.Popen[str]]:
    """A comparison in a process of its own, with one run done and two that wait."""
    write(workers=2, arms={"low": {}, "high": {"set": {"fake.wait": "gate"}}})
    command = [sys.executable, "-c", DRIVER, *FAKE, "--config", "c.yaml"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, preexec_fn=heed_signals
    )
    deadline = time.monotonic() + 120
    while sum(name.startswith("high") for name in began()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def alive() -> list[int]:
    """Process numbers of runs that are still there."""
    numbers = [int(line.split()[3]) for line in Path("runs/compare/c/order.txt").read_text().splitlines()]
    return [number for number in numbers if Path(f"/proc/{number}").exists()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_comparison_leaves_no_process_and_goes_on(
    number: signal.Signals, driven: subprocess.Popen[str]
) -> None:
    driven.send_signal(number)
    _, err = driven.communicate(timeout=60)
    assert driven.returncode == 130
    assert "stopped; 2 of 4 runs are done, and the same command goes on from there" in err
    assert "Traceback" not in err
    assert alive() == []
    before = len(began())
    Path("gate").touch()
    outcome = compare()
    assert outcome.code == 0
    assert sorted(began()[before:]) == ["high 0", "high 1"]


def test_runs_that_a_killed_comparison_leaves_behind_keep_the_folder_locked(driven: subprocess.Popen[str]) -> None:
    """Two processes would write into one folder otherwise."""
    driven.kill()
    driven.wait(60)
    assert "a run that one has left behind, is at work" in compare().err
    Path("gate").touch()
    deadline = time.monotonic() + 60
    while (outcome := compare()).code == 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert outcome.code == 0


# -- around it ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_mlflow_has_a_parent_run_and_nested_ones(write: Write, tmp_path: Path) -> None:
    """A second call continues the parent run; how each run ended is in its status."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    write(**BROKEN, track=True, tracking_uri=uri, experiment="tests")
    compare()
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    compare()
    runs = {run.info.run_name: run for run in reversed(client.search_runs([experiment.experiment_id]))}
    parent = runs.pop("c")
    assert sorted(runs) == sorted(f"{arm} seed {seed}" for arm in ("low", "high", "broken") for seed in (0, 1))
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    status = {name: run.info.status for name, run in runs.items()}
    assert status.pop("broken seed 1") == "FAILED"
    assert set(status.values()) == {"FINISHED"}
    assert (runs["high seed 1"].data.tags["arm"], runs["high seed 1"].data.tags["seed"]) == ("high", "1")
    assert parent.info.status == "FAILED"
    assert parent.data.metrics["sampled/mean_at_1/high"] == pytest.approx(0.707)
    kept = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert kept == {"table.md", "table.csv", "table.json", "curve_rollout_reward.png"}
    (low, *_) = runs_of(read(Path("c.yaml")))
    loggers = low.log.read_text()
    assert '"class_path": "MLflow"' in loggers
    assert runs["low seed 0"].info.run_id in loggers


def test_an_mlflow_that_does_not_work_is_said_before_anything_runs(write: Write) -> None:
    write(track=True, tracking_uri="nowhere://at/all")
    outcome = compare()
    assert outcome.code == 2
    assert outcome.err.startswith("lit-rlvr: error: MLflow does not work; `track: false` does without it: ")
    assert began() == []


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from lit_rlvr.__main__ import main\n"
        "try: main(['compare', '--help'])\n"
        "except SystemExit as end: print('code', end.code)\n"
        "print({'torch', 'lightning', 'transformers', 'mlflow', 'matplotlib', 'scipy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.endswith("code 0\nset()\n")
    assert "usage: lit-rlvr compare" in done.stdout
    assert all(option in done.stdout for option in ("--dry_run", "--table_only", "--workers", "--arms", "--seeds"))


def test_a_mistyped_command_is_recognised(tmp_path: Path) -> None:
    assert "there is no command 'comapre'; did you mean compare?" in cli(tmp_path, "comapre").err


def arms_of(file: Path) -> list[tuple[Path, str]]:
    return [(file, name) for name in read(file).arms]


@pytest.mark.parametrize(
    ("file", "arm"), [pair for file in FILES for pair in arms_of(file)], ids=lambda x: getattr(x, "stem", x)
)
def test_every_arm_of_every_comparison_is_understood_by_fit(file: Path, arm: str, tmp_path: Path) -> None:
    """Its callbacks stand in the resolved configuration, and its options."""
    comparison = read(file)
    run = next(run for run in runs_of(comparison) if run.arm == arm)
    assert isinstance(run, Run)
    printed = yaml.safe_load(succeed(tmp_path, *run.command(["fit"]), "--print_config").out)
    layer = comparison.arms[arm]
    callbacks = comparison.common.callbacks if layer.callbacks is None else layer.callbacks
    assert holds(printed["trainer"]["callbacks"], list(callbacks or ()))
    for name, value in {**comparison.common.set, **layer.set}.items():
        section, option = name.split(".", 1)
        assert holds(printed[section][option], value), name


def test_the_comparison_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read, and its last arm makes a configuration."""
    text = (ROOT / "docs/compare.md").read_text()
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    (tmp_path / "mine.yaml").write_text(block)
    monkeypatch.chdir(CONFIGS)
    comparison = read(tmp_path / "mine.yaml")
    arguments = arm_arguments(comparison, comparison.arms["grpo"])
    printed = yaml.safe_load(succeed(CONFIGS, "fit", *arguments, "--print_config").out)
    assert printed["model"]["sampling"]["temperature"] == 0.9
    assert printed["model"]["loss"]["init_args"]["clip_high"] == 0.2
    assert (printed["trainer"]["max_steps"], printed["trainer"]["callbacks"]) == (60, [])


def test_the_documentation_lists_every_option() -> None:
    text = (ROOT / "docs/compare.md").read_text()
    assert [name for name in [*OPTIONS, *LAYER, "arms", "metric", "also"] if f"| `{name}` |" not in text] == []


def test_there_are_comparisons() -> None:
    (ablation,) = (read(file) for file in FILES if file.stem == "tiny_ablation")
    assert list(ablation.arms) == [
        "all", "top50", "top20", "top10", "top5", "random20", "bottom80", "ppl", "position", "nsr",
        "entropy_advantage", "clip_cov", "kl_cov",
    ]  # fmt: skip
    assert (ablation.baseline, ablation.seeds) == ("all", (0, 1, 2))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_comparison_of_real_runs(tmp_path: Path) -> None:
    """Two arms with two seeds, side by side; the first one that gets there makes the warm start for all."""
    file = tmp_path / "c.yaml"
    small = {
        "trainer.max_steps": 4, "trainer.enable_checkpointing": False, "data.eval_prompts": 8,
        "model.batch": {"prompts": 4, "responses": 4, "minibatch_prompts": 2},
        "warmup": {"steps": 2, "batch_size": 4, "lr_warmup": 1},
    }  # fmt: skip
    top = [{"class_path": "EntropyTopK", "init_args": {"rho": 0.2}}]
    arms = {"all": {}, "top": {"callbacks": top}}
    file.write_text(
        yaml.safe_dump(
            {
                "config": [str(CONFIGS / "quickstart.yaml")], "callbacks": [], "set": small, "seeds": [0, 1],
                "baseline": "all", "arms": arms, "also": [{"last": "rollout/entropy", "window": 2}], "workers": 2,
            }
        )
    )  # fmt: skip
    environment = {
        **os.environ, "LIT_RLVR_CACHE": str(tmp_path / "cache"), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT}/callbacks",
    }  # fmt: skip
    command = [sys.executable, "-m", "lit_rlvr", "compare", "--config", "c.yaml"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    folder = tmp_path / "runs/compare/c"
    measures = json.loads((folder / "table.json").read_text())["measures"]
    assert {arm: row["n"] for arm, row in measures["sampled/mean_at_1"].items()} == {"all": 2, "top": 2}
    assert all(row["mean"] > 0 for row in measures["last rollout/entropy"].values())
    logs = [log.read_text() for log in sorted(folder.glob("*/*/log.txt"))]
    assert sorted("warm start: taken from the cache" in log for log in logs) == [False, True, True, True]
    assert sorted("warm start: step 2 of 2" in log for log in logs) == [False, False, False, True]
    seeds = [yaml.safe_load(file.read_text())["model"]["seed"] for file in sorted(folder.glob("*/*/config.yaml"))]
    assert seeds == [0, 1, 0, 1]
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = (e for e in client.search_experiments() if e.name == "lit-rlvr")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert sorted(runs) == ["all seed 0", "all seed 1", "c", "top seed 0", "top seed 1"]
    nested = runs["top seed 1"]
    assert nested.data.tags["mlflow.parentRunId"] == runs["c"].info.run_id
    assert nested.data.tags["credit"] == "EntropyTopK"
    assert nested.data.params["trainer.callbacks.0.init_args.rho"] == "0.2"
    assert nested.data.metrics["rollout/entropy"] > 0
    again = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=True
    )
    assert "4 runs, 4 done, 0 to run" in again.stderr
