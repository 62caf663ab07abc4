"""The saved policy is the trained one, and opens with transformers."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from command_line import FewSums, TinyFit, same_weights, saved_weights
from mlflow import MlflowClient
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_rlvr import Batch, RLVRDataModule, RLVRModule, Sampling
from lit_rlvr.models import resolve_model
from lit_rlvr.saving import SavePolicy

TINY = "builtin:tiny-qwen3-75k"


def train(root: Path, callback: SavePolicy, dtype: str = "float32") -> RLVRModule:
    """One rollout phase, one optimiser step, with a learning rate that shows in every dtype."""
    module = RLVRModule(
        TINY,
        dtype=dtype,
        batch=Batch(prompts=4, responses=4),
        sampling=Sampling(max_new_tokens=8),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    )
    trainer = pl.Trainer(
        max_steps=1, callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=root, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=RLVRDataModule(FewSums()))
    return module


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters by name, shared ones once."""
    return {name: value.detach() for name, value in model.named_parameters()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_the_folder_holds_the_trained_weights(dtype: str, tmp_path: Path) -> None:
    """Bit for bit, in the dtype of training, and not those that it started from."""
    callback = SavePolicy()
    module = train(tmp_path, callback, dtype)
    assert callback.saved == tmp_path / "policy"
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert opened.dtype == getattr(torch, dtype)
    assert same_weights(weights_of(opened), weights_of(module.policy.hf))
    start = AutoModelForCausalLM.from_pretrained(resolve_model(TINY), dtype=opened.dtype)
    assert all(not torch.equal(value, weights_of(start)[name]) for name, value in weights_of(opened).items())


def test_the_folder_is_ready_to_use(tmp_path: Path) -> None:
    """Tokenizer and model go together: it reads, answers until the end token, and is read back."""
    train(tmp_path / "root", SavePolicy(str(tmp_path / "mine")))
    assert not (tmp_path / "root/policy").exists()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "mine")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mine")
    ids = tokenizer("2+1*8?", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == "2+1*8?"
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.vocab_size > int(ids.max())
    again = RLVRModule(str(tmp_path / "mine"))
    again.configure_model()
    assert same_weights(weights_of(again.policy.hf), weights_of(model))


def test_mlflow_keeps_the_same_policy(tiny_fit: TinyFit, tmp_path: Path) -> None:
    """Downloaded, it opens; its weights are those of the run's folder."""
    client = MlflowClient(tiny_fit.database)
    experiment = client.get_experiment_by_name("lit-rlvr")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    kept = Path(client.download_artifacts(run.info.run_id, "policy", str(tmp_path)))
    assert same_weights(saved_weights(kept), saved_weights(tiny_fit.root / "policy"))
    opened = AutoModelForCausalLM.from_pretrained(kept)
    assert same_weights(weights_of(opened), saved_weights(tiny_fit.root / "policy"))
    tokenizer = AutoTokenizer.from_pretrained(kept)
    assert tokenizer.decode(tokenizer("2+1*8?")["input_ids"]) == "2+1*8?"
