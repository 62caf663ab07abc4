"""The saved policy is the trained one, and opens with transformers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import lightning.pytorch as pl
import pytest
import torch
from command_line import FewSums, TinyFit, same_weights, saved_weights
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from mlflow import MlflowClient
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_rlvr import Batch, RLVRDataModule, RLVRModule, Sampling
from lit_rlvr.models import resolve_model
from lit_rlvr.saving import SavePolicy
from lit_rlvr.tracking import MLflow, RunRecord

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


class Scripted:
    """A module that notes what it is told to save."""

    def __init__(self) -> None:
        self.text = ""

    def save_policy(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(self.text)
        return folder


def evaluations(callback: SavePolicy, root: Path, values: list[float], first: int = 1) -> list[str]:
    """What the best folder holds after each evaluation in turn."""
    module, seen = Scripted(), []
    for step, value in enumerate(values, first):
        module.text = f"step {step}"
        trainer: Any = SimpleNamespace(
            state=SimpleNamespace(fn=TrainerFn.FITTING), sanity_checking=False, is_global_zero=True, global_step=step,
            callback_metrics={"val/sampled/mean_at_1": torch.tensor(value)}, default_root_dir=str(root),
        )  # fmt: skip
        callback.on_validation_end(trainer, module)
        seen.append((root / "policy_best/config.json").read_text())
    assert [path.name for path in root.iterdir()] == ["policy_best"]
    return seen


@pytest.mark.parametrize(
    ("mode", "values", "steps"),
    [("max", [0.2, 0.5, 0.5, 0.3, 0.9], [1, 2, 2, 2, 5]), ("min", [0.2, 0.5, 0.1, float("nan"), 0.1], [1, 1, 3, 3, 3])],
)
def test_the_best_policy_is_kept(mode: Any, values: list[float], steps: list[int], tmp_path: Path) -> None:
    """The first of equals; a metric that is not a number is never best."""
    callback = SavePolicy(monitor="val/sampled/mean_at_1", mode=mode)
    assert evaluations(callback, tmp_path, values) == [f"step {step}" for step in steps]
    assert callback.best_step == steps[-1]


def test_a_resumed_run_remembers_the_best(tmp_path: Path) -> None:
    """Unless it looks at another metric."""
    first = SavePolicy(monitor="val/sampled/mean_at_1")
    evaluations(first, tmp_path, [0.2, 0.8])
    resumed = SavePolicy(monitor="val/sampled/mean_at_1")
    resumed.load_state_dict(first.state_dict())
    assert evaluations(resumed, tmp_path, [0.7, 0.9], first=3) == ["step 2", "step 4"]
    other = SavePolicy(monitor="val/greedy/mean_at_1")
    other.load_state_dict(first.state_dict())
    assert other.best is None
    assert SavePolicy().state_dict() == {}


def test_the_best_policy_of_a_run(tmp_path: Path) -> None:
    """Its weights are those of the evaluation with the highest entropy, which need not be the last."""
    seen: list[tuple[float, dict[str, Tensor]]] = []

    class Look(Callback):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            weights = {name: value.clone() for name, value in weights_of(pl_module.policy.hf).items()}
            seen.append((float(trainer.callback_metrics["val/sampled/entropy"]), weights))

    callback = SavePolicy(monitor="val/sampled/entropy")
    module = RLVRModule(
        TINY, batch=Batch(prompts=4, responses=4), sampling=Sampling(max_new_tokens=8),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.05),
    )  # fmt: skip
    trainer = pl.Trainer(
        max_steps=3, callbacks=[Look(), callback], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, val_check_interval=1,
        check_val_every_n_epoch=None, num_sanity_val_steps=1,
    )  # fmt: skip
    trainer.fit(module, datamodule=RLVRDataModule(FewSums(), eval_prompts=4))
    *_, (value, weights) = sorted(seen[1:], key=lambda pair: pair[0])  # the first is the sanity check
    assert callback.best == value
    assert same_weights(weights_of(AutoModelForCausalLM.from_pretrained(tmp_path / "policy_best")), weights)
    trainer.validate(module, datamodule=RLVRDataModule(FewSums(), eval_prompts=4), verbose=False)
    assert callback.best == value, "an evaluation after training keeps nothing"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"mode": "best"}, "mode must be max or min, got 'best'"),
        ({"mode": "min"}, "mode is about SavePolicy.monitor, which is null"),
        ({"monitor": "sampled/mean_at_1"}, "a metric like val/sampled/mean_at_1, got 'sampled/mean_at_1'"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        SavePolicy(**options)


def test_a_metric_that_no_evaluation_has(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no evaluation has the metric .*; did you mean val/sampled/mean_at_1"):
        evaluations(SavePolicy(monitor="val/sampled/mean_at1"), tmp_path, [0.1])


@pytest.mark.parametrize(
    ("asked", "size", "uploaded"), [(None, 4, True), (None, 3, False), (True, 3, True), (False, 4, False)]
)
def test_a_large_policy_is_named_rather_than_copied(
    asked: bool | None, size: int, uploaded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``policy.json`` says where it is and what it holds."""
    monkeypatch.setattr("lit_rlvr.tracking.LARGEST", size)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/weights").write_bytes(b"abcd")
    saving, logger = SavePolicy(), Mock(spec=MLflow, log_policy=asked)
    saving.saved = tmp_path
    trainer: Any = SimpleNamespace(callbacks=[saving], loggers=[logger], is_global_zero=True)
    RunRecord().on_fit_end(trainer, None)
    if uploaded:
        logger.log_folder.assert_called_once_with(tmp_path, "policy")
        logger.log_text.assert_not_called()
        return
    logger.log_folder.assert_not_called()
    (text, name), _ = logger.log_text.call_args
    digest = "88d4266fd4e6338d13b845fcf289579d209c897823b9217da3e161936f031589"  # printf abcd | sha256sum
    files = {"sub/weights": {"bytes": 4, "sha256": digest}}
    assert (name, json.loads(text)) == ("policy.json", {"folder": str(tmp_path), "files": files})
