"""The command line: three ways to say the same, the same in code, and what it prints."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning.pytorch as pl
import pytest
import torch
import yaml
from command_line import (
    CONFIGS,
    QUICKSTART,
    SMALL,
    TINY,
    UNTRACKED,
    FewSums,
    TinyFit,
    cli,
    same_weights,
    saved_weights,
    succeed,
)
from lit_rlvr_callbacks import EntropyTopK, PositionShaping, StageDetector

from lit_rlvr import Batch, RLVRDataModule, RLVRModule, Sampling
from lit_rlvr.cli import every_option
from lit_rlvr.cli_help import TEXTS
from lit_rlvr.losses import ClippedSurrogate
from lit_rlvr.shaping import DynamicSampling
from lit_rlvr.tasks import LastDigitArithmetic

SHAPING = {"class_path": "PositionShaping", "init_args": {"gamma": 0.2, "first_step": 0, "last_step": None}}
FRAGMENT = ("--config", str(CONFIGS / "callbacks/position.yaml"))
CHANGED = ("--trainer.callbacks.first_step=0", "--trainer.callbacks.last_step=null")
WAYS = {
    "layered file": ("--config", "mine.yaml"),
    "options": ("--trainer.callbacks+=PositionShaping", "--trainer.callbacks.gamma=0.2", *CHANGED),
    "fragment": (*FRAGMENT, "--trainer.callbacks.gamma=0.2", *CHANGED),
}


@pytest.fixture(scope="module")
def shaped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run for each way of adding a callback to the quickstart's."""
    folders = {way: tmp_path_factory.mktemp(way.replace(" ", "_")) for way in WAYS}
    (folders["layered file"] / "mine.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [SHAPING]}}))
    for way, folder in folders.items():
        succeed(folder, "fit", *TINY, UNTRACKED, *WAYS[way])
    return {way: folder / "runs/quickstart" for way, folder in folders.items()}


def settings(folder: Path) -> Any:
    """The resolved configuration that a run left, but for the names of files."""
    found = yaml.safe_load((folder / "config.yaml").read_text())
    return {name: value for name, value in found.items() if name != "config"}


def test_three_ways_of_adding_a_callback_are_one(shaped: dict[str, Path]) -> None:
    """The callback is appended with its arguments; configuration and trained weights are the same, bit for bit."""
    first, *others = (shaped[way] for way in WAYS)
    listed = settings(first)["trainer"]["callbacks"]
    assert [entry["class_path"].rpartition(".")[2] for entry in listed] == [
        "StageDetector", "EntropyTopK", "PositionShaping"
    ]  # fmt: skip
    assert listed[2]["init_args"]["gamma"] == 0.2
    assert listed[1]["init_args"]["rho"] == 0.2
    for other in others:
        assert settings(other) == settings(first)
        assert same_weights(saved_weights(other / "policy"), saved_weights(first / "policy"))


def printed(folder: Path, *options: str) -> Any:
    """The configuration that options on top of the quickstart make."""
    return yaml.safe_load(succeed(folder, "fit", *QUICKSTART, *options, "--print_config").out)


BOTTOM = [{"class_path": "StageDetector"}, {"class_path": "EntropyTopK", "init_args": {"select": "bottom"}}]


@pytest.mark.parametrize("way", ["file", "option"])
def test_a_list_replaces_the_one_before_it(way: str, tmp_path: Path) -> None:
    """An entry does not inherit from the one of its class in its place: the quickstart has a window of 10 and a rho."""
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": BOTTOM}}))
    options = {"file": ("--config", "mine.yaml"), "option": (f"--trainer.callbacks={json.dumps(BOTTOM)}",)}[way]
    detector, chosen = printed(tmp_path, *options)["trainer"]["callbacks"]
    assert (detector["init_args"]["window"], chosen["init_args"]["rho"], chosen["init_args"]["select"]) == (
        5, None, "bottom"
    )  # fmt: skip


@pytest.mark.parametrize("way", ["file", "option"])
def test_evaluations_replace_those_before_them(way: str, tmp_path: Path) -> None:
    """All of them, and as wholes; a single option still changes one."""
    given = {"greedy": {"samples": 2}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"model": {"evaluations": given}}))
    options = {"file": ("--config", "mine.yaml"), "option": (f"--model.evaluations={json.dumps(given)}",)}[way]
    (evaluation,) = printed(tmp_path, *options)["model"]["evaluations"].values()
    assert (evaluation["samples"], evaluation["temperature"]) == (2, 1.0)


def test_a_single_option_changes_what_a_file_said(tmp_path: Path) -> None:
    options = ("--model.evaluations.greedy.max_new_tokens=9", "--trainer.callbacks.rho=0.4")
    found = printed(tmp_path, *options)
    assert list(found["model"]["evaluations"]) == ["sampled", "greedy"]
    assert found["model"]["evaluations"]["greedy"]["temperature"] == 0.0
    assert found["model"]["evaluations"]["greedy"]["max_new_tokens"] == 9
    assert found["trainer"]["callbacks"][0]["init_args"]["window"] == 10
    assert found["trainer"]["callbacks"][1]["init_args"]["rho"] == 0.4


def test_a_model_out_of_reach_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a slip of the pen looks like a name of the hub."""

    def unreachable(name: str, **_: Any) -> None:
        raise OSError(f"no network, so no {name}")

    monkeypatch.setattr("huggingface_hub.model_info", unreachable)
    for command in ("fit", "validate", "test"):
        outcome = cli(tmp_path, command, *QUICKSTART, UNTRACKED, "--model.model=runs/policyy")
        assert outcome.code == 2
        assert outcome.err.splitlines()[0] == (
            "lit-rlvr: error: there is no folder runs/policyy, it is not in the hub's cache on this machine, and the "
            "hub does not give it: no network, so no runs/policyy"
        )


def module_in_code() -> RLVRModule:
    """What the tiny run of the command line is made of."""
    return RLVRModule(
        "builtin:tiny-qwen3-75k",
        batch=Batch(prompts=4, responses=4, minibatch_prompts=2),
        sampling=Sampling(max_new_tokens=34),
        loss=ClippedSurrogate(clip_low=0.2, clip_high=0.28),
        dynamic_sampling=DynamicSampling(max_rounds=2),
        optimizer=lambda p: torch.optim.AdamW(p, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.0),
        scheduler=lambda o: torch.optim.lr_scheduler.LinearLR(o, start_factor=0.2, total_iters=5),
    )


def train_in_code(folder: Path, *more: pl.Callback) -> dict[str, torch.Tensor]:
    """Lightning's own Trainer with the same callbacks; the weights that it leaves."""
    module = module_in_code()
    trainer = pl.Trainer(
        max_steps=4, callbacks=[StageDetector(window=10), EntropyTopK(0.2), *more], gradient_clip_val=1.0,
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        default_root_dir=folder, limit_val_batches=0, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=RLVRDataModule(FewSums()))
    module.save_policy(folder / "policy")
    return saved_weights(folder / "policy")


def test_the_same_in_code(tiny_fit: TinyFit, shaped: dict[str, Path], tmp_path: Path) -> None:
    """Evaluations, pages, logging and saving change nothing; one more callback does."""
    plain = train_in_code(tmp_path / "a")
    assert same_weights(plain, saved_weights(tiny_fit.root / "policy"))
    with_shaping = train_in_code(tmp_path / "b", PositionShaping(gamma=0.2))
    assert same_weights(with_shaping, saved_weights(shaped["options"] / "policy"))
    assert not same_weights(plain, with_shaping)


def test_a_callback_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file beside the YAML, named by module and class, with an argument; its metric shows that it acted."""
    (tmp_path / "my_first_tokens.py").write_text(
        "from dataclasses import replace\n"
        "from lit_rlvr import CreditCallback\n"
        "class FirstTokens(CreditCallback):\n"
        "    def __init__(self, tokens: int, name: str | None = None) -> None:\n"
        "        super().__init__(None, name)\n"
        "        self.tokens = tokens\n"
        "    def assign(self, credit, rollout, ctx):\n"
        "        weight, count = credit.weight.clone(), credit.count.clone()\n"
        "        weight[:, self.tokens:] = 0\n"
        "        count[:, self.tokens:] = 0\n"
        "        return replace(credit, weight=weight, count=count)\n"
    )
    mine = {"trainer": {"callbacks": [{"class_path": "my_first_tokens.FirstTokens", "init_args": {"tokens": 3}}]}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(mine))
    monkeypatch.syspath_prepend(tmp_path)
    outcome = succeed(tmp_path, "fit", *TINY, UNTRACKED, "--config", "mine.yaml")
    assert "credit: FirstTokens\n" in outcome.err
    lines = (tmp_path / "runs/quickstart/rollouts/phase_000000.jsonl").read_text().splitlines()
    assert max(len(json.loads(line)["tokens"]) for line in lines) > 3
    for line in lines:
        weight = json.loads(line)["weight"]
        assert weight == [1.0] * min(3, len(weight)) + [0.0] * (len(weight) - 3)


def test_interpolation_crosses_files_and_options(tmp_path: Path) -> None:
    """Absolute names, filled in from whatever was set last."""
    other = {"data": {"eval_prompts": "${model.batch.prompts}"}, "trainer": {"max_steps": "${seed_everything}"}}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    options = ("--seed_everything=7", "--model.sampling.max_new_tokens=12", "--model.batch.prompts=6")
    more = ("--config", str(CONFIGS / "algorithm/rloo.yaml"), "--config", "other.yaml")
    printed = yaml.safe_load(succeed(tmp_path, "fit", *QUICKSTART, *more, *options, "--print_config").out)
    assert printed["model"]["seed"] == 7
    assert printed["trainer"]["max_steps"] == 7
    assert printed["data"]["eval_prompts"] == 6
    assert printed["model"]["aggregation"]["init_args"]["length"] == 12


def test_a_printed_configuration_runs_again(tiny_fit: TinyFit, tmp_path: Path) -> None:
    """It prints itself, and so does the one that a run leaves; run, it gives the same weights."""
    printed = succeed(tmp_path, "fit", *TINY, UNTRACKED, "--print_config").out
    (tmp_path / "printed.yaml").write_text(printed)
    assert succeed(tmp_path, "fit", "--config", "printed.yaml", "--print_config").out == printed
    succeed(tmp_path, "fit", "--config", "printed.yaml")
    assert same_weights(saved_weights(tmp_path / "runs/quickstart/policy"), saved_weights(tiny_fit.root / "policy"))
    left = tmp_path / "runs/quickstart/config.yaml"
    assert yaml.safe_load(succeed(tmp_path, "fit", "--config", str(left), "--print_config").out) == yaml.safe_load(
        printed
    )


def numbers(table: str) -> dict[str, float]:
    """Lightning's table of metrics."""
    return {name: float(value) for name, value in re.findall(r"│\s+(\S+)\s+│\s+(\S+)\s+│", table)}


@pytest.mark.parametrize(("command", "prefix"), [("validate", "val"), ("test", "test")])
def test_evaluating_a_trained_policy(command: str, prefix: str, tiny_fit: TinyFit, tmp_path: Path) -> None:
    """On the validation problems it finds what the report of training says; the test problems are others."""
    outcome = succeed(tmp_path, command, *SMALL, UNTRACKED, f"--model.model={tiny_fit.root}/policy")
    rows = json.loads((tiny_fit.root / "report.json").read_text())["evaluations"]
    expected = {f"{prefix}/{name}": value for name, value in rows["after RLVR"].items()}
    found = numbers(outcome.out)
    assert found.keys() == expected.keys()
    assert (found == pytest.approx(expected, rel=1e-6)) == (command == "validate")
    assert all(0 <= found[f"{prefix}/{way}/mean_at_1"] <= 1 for way in ("sampled", "greedy"))
    assert not (tmp_path / "runs/quickstart/policy").exists()
    assert outcome.warned == ()


def test_the_warm_start_alone(tmp_path: Path) -> None:
    """Prints its folder, and nothing else, on standard output; twice the same one."""
    options = (*SMALL, UNTRACKED, "--warmup={steps: 3, batch_size: 4, lr_warmup: 1}")
    first = succeed(tmp_path, "warmup", *options)
    folder = Path(first.out.strip())
    assert first.out == f"{folder}\n"
    assert folder.parent == Path(os.environ["LIT_RLVR_CACHE"])
    assert saved_weights(folder)
    assert "warm start: 3 steps of 4 demonstrations" in first.err
    again = succeed(tmp_path, "warmup", *options)
    assert again.out == first.out
    assert "taken from the cache" in again.err
    nothing = cli(tmp_path, "warmup", *SMALL, UNTRACKED)
    assert (nothing.code, nothing.out) == (2, "")
    assert nothing.err.endswith("the configuration has no `warmup` section; add --warmup.steps=700\n")


def test_a_quiet_run_prints_its_results_only(tmp_path: Path) -> None:
    """No progress and no information; the closing table and the places."""
    outcome = succeed(tmp_path, "fit", *TINY, UNTRACKED, "--quiet=true")
    assert outcome.out == ""
    assert outcome.err.startswith("held-out problems\n")
    assert "tokens/s" not in outcome.err
    assert "credit:" not in outcome.err
    assert "trained model" in outcome.err


def test_a_run_prints_no_warning(tiny_fit: TinyFit) -> None:
    """Nothing of the libraries underneath, and nothing on standard output."""
    assert tiny_fit.outcome.out == ""
    assert tiny_fit.outcome.warned == ()
    assert "arning" not in tiny_fit.outcome.err.replace("learning", "")
    assert "INFO" not in tiny_fit.outcome.err
    assert tiny_fit.outcome.err.splitlines()[0] == "credit: StageDetector → EntropyTopK"


def test_short_names_of_tasks(tmp_path: Path) -> None:
    """A class and its options, in place of a short name."""
    more = ("--data.task=LastDigitArithmetic", "--data.task.seed=3")
    printed = yaml.safe_load(succeed(tmp_path, "fit", *QUICKSTART, *more, "--print_config").out)
    assert printed["data"]["task"]["init_args"] == {"seed": 3}
    assert printed["data"]["task"]["class_path"].endswith(".LastDigitArithmetic")
    assert LastDigitArithmetic(3).prompts("val") != LastDigitArithmetic().prompts("val")


MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "rho above 1": (("--trainer.callbacks.rho=2",), "EntropyTopK.rho must lie in (0, 1], got 2"),
    "stages without a detector": (
        ("--trainer.callbacks=PositionShaping", "--trainer.callbacks.stages=[plateau]"),
        "PositionShaping acts only in some stages, but no stage detector",
    ),
    "accumulated gradients": (("--trainer.accumulate_grad_batches=2",), "accumulate_grad_batches must be 1: one"),
    "greedy rollouts": (("--model.sampling.temperature=0",), "sampling needs temperature > 0"),
    "unknown task": (("--data.task=last_digit_arithmetik",), "did you mean last_digit_arithmetic?"),
    "several greedy samples": (("--model.evaluations.greedy.samples=2",), "gives the same response every time"),
    "no warm-up steps": (("--warmup.steps=0",), "warmup.steps must be at least 1, got 0"),
    "unknown name in an interpolation": (
        ("--data.eval_prompts=${fit.model.nope}",),
        "${model.nope} stands for nothing",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_sentence(case: str, tmp_path: Path) -> None:
    """On standard error, with exit code 2 and no traceback; the folder stays as it was. More in test_errors.py."""
    options, sentence = MISTAKES[case]
    outcome = cli(tmp_path, "fit", *TINY, UNTRACKED, *options)
    assert (outcome.code, outcome.out) == (2, "")
    (error,) = (line for line in outcome.err.splitlines() if not line.startswith("credit: "))
    assert error.startswith("lit-rlvr: error: ")
    assert sentence in error
    assert list(tmp_path.iterdir()) == []


def test_a_bug_is_no_users_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything else than an error meant for users keeps its traceback."""
    monkeypatch.setattr("lit_rlvr.cli.CLI.before_fit", Mock(side_effect=KeyError("lost")))
    with pytest.raises(KeyError, match="lost"):
        cli(tmp_path, "fit", *TINY, UNTRACKED)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"], ["--version"], ["-V"]])
def test_help_and_version_do_not_wait_for_torch(arguments: list[str]) -> None:
    """In a process of its own, which then knows no heavy module."""
    code = (
        "import sys; from lit_rlvr.__main__ import main; code = main(sys.argv[1:])\n"
        "heavy = {'torch', 'lightning', 'transformers', 'mlflow', 'jsonargparse', 'numpy', 'rich'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy), 'code:', code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    text, _, last = done.stdout.rstrip().rpartition("\n")
    assert last == "heavy: [] code: 0"
    assert done.stderr == ""
    if arguments in (["--version"], ["-V"]):
        assert re.fullmatch(r"lit-rlvr \d+\.\d+\.\d+\S*", text)
    else:
        assert text.startswith("usage: lit-rlvr <command> [options]\n")
        assert all(f"\n  {command} " in text for command in ("fit", "validate", "test", "warmup"))


def test_the_help_of_a_command_explains_its_options(tmp_path: Path) -> None:
    """Docstrings are the help."""
    text = " ".join(succeed(tmp_path, "fit", "--help").out.split())
    for option in ("--model.model", "--model.batch.prompts", "--data.task", "--trainer.max_steps", "--warmup"):
        assert option in text
    assert "Prompts per rollout phase, over all ranks." in text
    assert "A task, or its short name" in text
    assert "Train a policy. options:" in text
    assert "Surrogate objective of a token: ClippedSurrogate" in text
    assert "lit_rlvr_callbacks.MaskTruncated" in text
    for base in ("lit_rlvr.CreditCallback", "CovarianceCallback", "lightning.Callback,", "torch.optim.Optimizer,"):
        assert base not in text


def test_the_texts_of_the_help_are_about_options_that_exist() -> None:
    assert set(TEXTS) <= {"config", *every_option()}
