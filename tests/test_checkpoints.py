"""Checkpoints of sharded runs: on as many processes they resume bit for bit, and any of them becomes a model folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from command_line import cli, saved_weights
from resume_run import HALF, KINDS, WHOLE, fit
from runs import tiny_trainer
from test_ddp import torchrun
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_rlvr.checkpoint import check_resumable
from lit_rlvr.export import export
from lit_rlvr.fsdp1 import FSDP1Strategy
from lit_rlvr.lora import LoRA
from lit_rlvr.policy import load_policy
from lit_rlvr.sharding import FSDP2Strategy


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on two processes, whose resumed weights have been found equal to those of runs that went through."""
    folder = tmp_path_factory.mktemp("trained")
    torchrun("resume_run.py", str(folder))
    return folder


@pytest.fixture
def no_group() -> Iterator[None]:
    """The process group that a strategy of this process makes ends with the test."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """float64, but two processes sum in another order, and facts are kept in float32."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        ("shards", FSDP2Strategy()), ("file", FSDP2Strategy()), ("file", "auto"), ("critic", FSDP2Strategy()),
        ("fsdp1", FSDP2Strategy()), ("offload", FSDP2Strategy()), ("shards", FSDP2Strategy(cpu_offload=True)),
    ],
)  # fmt: skip
def test_one_process_goes_on_from_two(kind: str, strategy: Any, trained: Path, tmp_path: Path, no_group: None) -> None:
    """To the weights of the run that stayed on two; a single file does not even need FSDP2.

    What the first FSDP wrote is the same folder, so FSDP2 reads it; with weights in CPU memory as without.
    """
    middle = trained / kind / "half" / "last.ckpt"
    resumed = fit(tmp_path, WHOLE, strategy, 1, middle, **KINDS[kind])
    assert len(resumed.metrics) == WHOLE - HALF
    close(resumed.weights, torch.load(trained / kind / "weights_0.pt"))


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", ["shards", "file", "fsdp1", "offload"])
def test_export_is_the_policy_at_the_end(kind: str, trained: Path, tmp_path: Path) -> None:
    """Bit for bit what rank 0 saved at the end of training, and what one process saves up to its rounding."""
    outcome = cli(tmp_path, "export", str(trained / kind / "whole" / "last.ckpt"), str(tmp_path / "out"))
    assert (outcome.code, outcome.out) == (0, f"{tmp_path / 'out'}\n")
    saved = trained / kind / "whole" / "policy"
    assert {p.name for p in saved.iterdir()} == {p.name for p in (tmp_path / "out").iterdir()}
    for name in ("model.safetensors", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (saved / name).read_bytes(), name
    fit(tmp_path / "one", WHOLE, "auto", 1, **KINDS[kind])
    close(saved_weights(tmp_path / "out"), saved_weights(tmp_path / "one" / "policy"))
    export(tmp_path / "one" / "last.ckpt", tmp_path / "again")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "one" / "policy" / name).read_bytes(), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float64
    assert AutoTokenizer.from_pretrained(tmp_path / "out").decode([5, 6])


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif("lora" not in KINDS, reason="the extra lit-rlvr[lora] is not installed")
def test_adapters_are_saved_alone_and_exported_merged(trained: Path, tmp_path: Path, no_group: None) -> None:
    """From shards: the exported folder and the opened adapters are one model; one process goes on from two."""
    export(trained / "lora/whole/last.ckpt", tmp_path / "merged")
    saved = trained / "lora/whole/policy"
    assert not (saved / "model.safetensors").exists()
    close(
        load_policy(str(saved), "float64").state_dict(), load_policy(str(tmp_path / "merged"), "float64").state_dict()
    )
    resumed = fit(tmp_path, WHOLE, FSDP2Strategy(), 1, trained / "lora/half/last.ckpt", lora=LoRA())
    close(resumed.weights, torch.load(trained / "lora/weights_0.pt"))


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    """In a sentence, and nothing is written."""
    torch.save({"state_dict": {}}, tmp_path / "empty.ckpt")
    torch.save({"state_dict": {"policy.hf.a": torch.zeros(1)}}, tmp_path / "old.ckpt")
    (tmp_path / "folder").mkdir()
    (tmp_path / "config.yaml").write_text("model: {seed: 1}")
    sentences = {
        "missing.ckpt": "there is no checkpoint missing.ckpt",
        "empty.ckpt": "empty.ckpt holds no policy",
        "old.ckpt": "old.ckpt does not say what model it was trained from; give --model",
        "folder": "folder is a folder, but holds no shards of a checkpoint",
        "config.yaml": "config.yaml is no checkpoint of a run, or is cut short",
    }
    for name, sentence in sentences.items():
        outcome = cli(tmp_path, "export", name, "out")
        assert (outcome.code, outcome.err) == (2, f"lit-rlvr: error: {sentence}\n")
    outcome = cli(tmp_path, "export", "old.ckpt", "out", "--model=builtin:tiny-qwen3-75k")
    assert "is of another model than" in outcome.err
    assert not (tmp_path / "out").exists()


def test_checkpoint_and_strategy_go_together(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "file.ckpt")
    with pytest.raises(ValueError, match=r"single file.*first FSDP resumes from folders of shards"):
        check_resumable(tmp_path / "file.ckpt", FSDP1Strategy())
    (tmp_path / "shards.ckpt").mkdir()
    (tmp_path / "shards.ckpt" / "meta.pt").touch()
    for strategy in (FSDP2Strategy(), FSDP1Strategy()):
        check_resumable(tmp_path / "shards.ckpt", strategy)
    with pytest.raises(ValueError, match=r"folder of shards.*fsdp.yaml.*lit-rlvr export"):
        check_resumable(tmp_path / "shards.ckpt", tiny_trainer(1, []).strategy)
    shutil.rmtree(tmp_path / "shards.ckpt")
