"""The runs of the two papers: every file can be explained, its steps are the papers', and a tiny twin of it runs."""

from __future__ import annotations

import csv
import difflib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import CONFIGS, UNTRACKED, succeed
from rollouts import build_rollout, full_credit
from test_configs import holds, on_meta_device

from lit_rlvr import RLVRModule
from lit_rlvr.advantages import GroupNormalized
from lit_rlvr.cli import CLI
from lit_rlvr.credit import CreditContext, all_callbacks, credit_chain
from lit_rlvr.engines import InProcessEngine, VLLMColocatedEngine, VLLMInProcessEngine, VLLMServerEngine
from lit_rlvr.rewards import MathVerify
from lit_rlvr.shaping import OverlongPenalty
from lit_rlvr.tasks import ProblemFiles, Prompt

PAPERS = CONFIGS / "papers"
MAIN = ("wang2025", "deng2025")
FRAGMENTS = sorted(file for name in MAIN for file in (PAPERS / name).glob("*.yaml"))
EVERY_RUN = [*(PAPERS / f"{name}.yaml" for name in MAIN), *FRAGMENTS]
TWINS = {
    "wang2025": ("credit/EntropyTopK/kept_fraction", 0.2, 0.25),
    "wang2025/rho100": ("credit/kept_fraction", 1.0, 1.0),
    "deng2025": ("credit/kept_fraction", 1.0, 1.0),
    "deng2025/perplexity": ("credit/PerplexityShaping/factor_deviation", 1e-4, 0.1),
    "deng2025/negative": ("credit/kept_fraction", 0.1, 0.9),
}
"""Runs of which a tiny twin is trained, with a metric that shows the method at work, and its range."""


def name_of(file: Path) -> str:
    return str(file.relative_to(PAPERS).with_suffix(""))


def layers(file: Path, *more: str) -> tuple[str, ...]:
    """A run: its main file, what it goes over, and more files of the folder."""
    main = [PAPERS / f"{file.parent.name}.yaml"] if file.parent.name in MAIN else []
    size = [PAPERS / "wang2025/32b.yaml"] if file.stem == "long" else []
    files = [*main, *size, file, *(PAPERS / f"{name}.yaml" for name in more)]
    return tuple(argument for each in files for argument in ("--config", str(each)))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No hub, and nothing of it in a cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[CLI]:
    """The command lines that have made everything and would now begin."""
    seen: list[CLI] = []
    monkeypatch.setattr(CLI, "_run_subcommand", lambda self, _: seen.append(self))
    return seen


def run_of(file: Path, folder: Path, started: list[CLI]) -> Any:
    """Module, data and trainer of a run, as on this machine."""
    succeed(folder, "explain", *layers(file), UNTRACKED)
    return started[-1]


def explained(file: Path, folder: Path, *more: str) -> str:
    return succeed(folder, "explain", *layers(file, *more), UNTRACKED).out


@pytest.mark.parametrize(
    "file", [*EVERY_RUN[:2], *(pytest.param(file, marks=pytest.mark.slow) for file in FRAGMENTS)], ids=name_of
)
def test_every_run_is_explained_without_hub_and_data(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's numbers are the paper's, and each value of the file stands in the resolved configuration."""
    resolved: list[str] = []
    models: list[RLVRModule] = []
    explain = CLI.explain

    def keep(cli: CLI, **options: Any) -> None:
        models.append(cli.model)
        resolved.append(cli._parser("explain").dump(cli.config["explain"], skip_none=False))
        explain(cli, **options)

    monkeypatch.setattr(CLI, "explain", keep)
    out = explained(file, tmp_path)
    if file.stem in ("wang2025", "deng2025", "14b", "32b", "math_7b"):  # the others have the model of one of these
        assert {p.device.type for p in on_meta_device(models[0]).parameters()} == {"meta"}
    wang = name_of(file).startswith("wang2025")
    responses, limit = (16, 29696 if file.stem == "long" else 20480) if wang else (8, 8192)
    assert f"512 prompts x {responses} responses = {512 * responses} rollouts of at most {limit} tokens" in out
    assert "= 16 optimiser step(s) per phase, each on 32 prompts" in out
    assert "it ends after 160 steps = 10 phases" in out
    assert "is not within reach; its configuration is the one known here" in out
    assert f"prompts count as {2048 if wang else 1024} tokens" in out
    assert ("the model's context is 4096" in out) == (file.stem == "math_7b")
    assert holds(yaml.safe_load(resolved[0]), yaml.safe_load(file.read_text()))


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("wang2025", VLLMInProcessEngine), ("wang2025/14b", VLLMInProcessEngine),
        ("wang2025/32b", VLLMColocatedEngine), ("deng2025", VLLMInProcessEngine),
    ],
)  # fmt: skip
def test_a_run_samples_from_vllm(
    name: str, engine: type[VLLMInProcessEngine | VLLMColocatedEngine], tmp_path: Path, started: list[CLI]
) -> None:
    """In turn with training on the same GPUs; no vLLM is needed to look at it, nor to go without it."""
    file = PAPERS / f"{name}.yaml"
    made = run_of(file, tmp_path, started).model.engine
    assert type(made) is engine
    assert made.sleep_level == 2
    if isinstance(made, VLLMColocatedEngine):
        assert 8 % made.devices_per_server == 0
    without = ("--config", str(CONFIGS / "engine/in_process.yaml"), "--model.engine.max_rows=4")
    succeed(tmp_path, "explain", *layers(file), *without, UNTRACKED)
    other = started[-1].model.engine
    assert (type(other), other.max_rows) == (InProcessEngine, 4)


def test_a_run_can_have_servers_instead(tmp_path: Path, started: list[CLI]) -> None:
    """With devices of their own, so that nothing of the turns that the run's own engine takes is left."""
    overlap = ("--config", str(CONFIGS / "engine/vllm_overlap.yaml"))
    succeed(tmp_path, "explain", *layers(PAPERS / "wang2025.yaml"), *overlap, UNTRACKED)
    engine = started[-1].model.engine
    assert isinstance(engine, VLLMServerEngine)
    assert engine.sleep_level == 0


def test_no_file_repeats_another() -> None:
    """Four fifths of the lines of a file are its own."""
    lines = {f: [x for x in f.read_text().splitlines() if x and not x.startswith("#")] for f in EVERY_RUN}
    for one in EVERY_RUN:
        for other in EVERY_RUN:
            if one != other and len(lines[one]) > 8:
                matcher = difflib.SequenceMatcher(None, lines[one], lines[other], autojunk=False)
                shared = sum(block.size for block in matcher.get_matching_blocks())
                assert shared < 0.8 * len(lines[one]), (one, other)


@pytest.mark.parametrize("name", MAIN)
def test_ten_phases_of_warm_up_are_160_steps(name: str, tmp_path: Path, started: list[CLI]) -> None:
    """As in the papers' scripts, the rate is full from the eleventh phase on; before, it rises by 1/160 a step."""
    module = run_of(PAPERS / f"{name}.yaml", tmp_path, started).model
    optimizer = module.optimizer([torch.nn.Parameter(torch.zeros(1))])
    scheduler = module.scheduler(optimizer)
    rates = []
    for _ in range(200):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    torch.testing.assert_close(rates[:160:16], [1e-6 * (1 + s * 159 / 160) / 160 for s in range(0, 160, 16)])
    assert rates[159] < 1e-6
    torch.testing.assert_close(rates[160:], [1e-6] * 40)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


def test_the_window_of_position_shaping_is_the_papers(tmp_path: Path, started: list[CLI]) -> None:
    """It acts for 200 < step < 300, where the first phase is step 1; here the first is 0."""
    (shaping,) = credit_chain(all_callbacks(run_of(PAPERS / "deng2025/position.yaml", tmp_path, started).trainer))
    rollout = build_rollout([[0.5] * 4, [0.5] * 4])
    credit = full_credit(rollout)
    acts = [
        step for step in range(400)
        if not torch.equal(shaping.assign(credit, rollout, CreditContext(step=step)).advantage, credit.advantage)
    ]  # fmt: skip
    assert [phase + 1 for phase in acts] == [step for step in range(400) if 200 < step < 300]


@pytest.mark.parametrize("name", MAIN)
def test_the_overlong_penalty_has_the_papers_weight(name: str, tmp_path: Path, started: list[CLI]) -> None:
    """Their rewards are 1 and -1 with a penalty of up to 1; ours, 1 and 0, give the same advantages with half of it."""
    module = run_of(PAPERS / f"{name}.yaml", tmp_path, started).model
    limit = module.sampling.max_new_tokens
    theirs = OverlongPenalty(buffer=module.overlong.buffer, factor=1.0)
    lengths = torch.tensor([limit, limit - 100, limit - module.overlong.buffer // 2, 10])
    right = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    group = torch.zeros(4, dtype=torch.int64)
    exact = GroupNormalized(eps=0.0)
    ours = exact(right + module.overlong(lengths, limit), group)
    torch.testing.assert_close(ours, exact(2 * right - 1 + theirs(lengths, limit), group))


def test_prompts_are_the_papers(tmp_path: Path, started: list[CLI]) -> None:
    """The template of Wang et al. as it is printed in the paper, and the question inside of a STILL-3 prompt."""
    template = run_of(PAPERS / "wang2025.yaml", tmp_path, started).datamodule.template
    seen: list[str] = []

    def tokenizer(text: str) -> dict[str, list[int]]:
        seen.append(text)
        return {"input_ids": [1]}

    template.encode(Prompt(0, "What is {2}?"), tokenizer)
    assert seen == [
        "User:\nWhat is {2}?\nPlease reason step by step, and put your final answer within \\boxed{}.\n\nAssistant:\n"
    ]


def test_the_questions_of_still_3_are_found(tmp_path: Path) -> None:
    """In rows of the dataset's shape: a conversation around the question, and the answer below ``reward_model``."""
    asked = "A conversation between User and Assistant. The User asks.\n\nUser: 1+1?\nSay it.\nAssistant:\n<think>\n"
    row = {"prompt": [{"role": "user", "content": asked}], "reward_model": {"ground_truth": "2"}}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    given = yaml.safe_load((PAPERS / "deng2025.yaml").read_text())["data"]["task"]["init_args"]
    names = ("question", "question_pattern", "answer")
    task = ProblemFiles(str(file), {"right": MathVerify()}, val_share=0, **{name: given[name] for name in names})
    (prompt,) = task.prompts("train")
    assert (prompt.question, prompt.answer) == ("1+1?\nSay it.", "2")
    assert task.score(prompt, "So \\boxed{2}").correct


@pytest.mark.parametrize("name", MAIN)
def test_a_tiny_twin_has_the_runs_structure(name: str, tmp_path: Path) -> None:
    out = explained(PAPERS / f"{name}.yaml", tmp_path, "tiny")
    assert "= 16 optimiser step(s) per phase" in out
    assert "max_steps 32 = 2 phases" in out
    full = explained(PAPERS / f"{name}.yaml", tmp_path)
    selected = [re.search(r"EntropyTopK\(rho=0\.2, .*\): micro_batch of", text) is not None for text in (out, full)]
    assert selected == [name == "wang2025"] * 2


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", TWINS)
def test_a_tiny_twin_runs(name: str, tmp_path: Path) -> None:
    """Two phases of sixteen steps, in which the policy learns something from each, in the way of the run."""
    table = ("--config", str(CONFIGS / "logger/csv.yaml"))
    succeed(tmp_path, "fit", *layers(PAPERS / f"{name}.yaml", "tiny"), *table, "--warmup.steps=150")
    with (tmp_path / "runs/tiny_papers/metrics/version_0/metrics.csv").open() as rows:
        steps = [row for row in csv.DictReader(rows) if row["train/loss"]]
    assert len(steps) == 32
    assert float(steps[-1]["train/skipped_steps"]) == 0
    assert all(float(row["train/grad_norm"]) > 0 for row in steps)
    metric, low, high = TWINS[name]
    shown = [float(row[metric]) for row in steps if row[metric]]
    assert len(shown) >= 2
    assert all(low <= value <= high for value in shown), shown
