"""First guesses of somebody who knows another framework, and where the answer sends them."""

from __future__ import annotations

import inspect
from pathlib import Path

import lit_rlvr_callbacks
import pytest

from lit_rlvr.checks import check_trainer_options
from lit_rlvr.cli import OWN_COMMANDS, every_option
from lit_rlvr.cli_classes import HIDDEN, names_by_option
from lit_rlvr.cli_errors import clear, missing_file
from lit_rlvr.cli_names import near_class, near_option
from lit_rlvr.foreign_names import ALGORITHMS, COMMANDS, FILES, OPTIONS
from lit_rlvr.kl import KLPenalty
from lit_rlvr.lora import LoRA
from lit_rlvr.losses import ClippedSurrogate

CONFIGS = Path(__file__).parents[1] / "configs"
CLASSES = names_by_option()


@pytest.fixture(scope="module")
def keys() -> list[str]:
    return every_option()


def test_every_foreign_name_has_a_place_here(keys: list[str]) -> None:
    """An option of the parser, or one of a class that is the option's value; files are there."""
    within = {"model.kl": KLPenalty, "model.lora": LoRA, "model.loss": ClippedSurrogate}
    for name, option in OPTIONS.items():
        group, _, last = option.rpartition(".")
        known = inspect.signature(within[group]).parameters if group in within else ()
        assert option in (*keys, "ckpt_path") or last in known or group == "model.optimizer", name
    assert {file for file in FILES.values() if not (CONFIGS / file).is_file()} == set()
    assert list(ALGORITHMS) == sorted(file.stem for file in (CONFIGS / "algorithm").glob("*.yaml"))
    assert set(COMMANDS.values()) <= {"fit", "validate", "serve", "export", *OWN_COMMANDS}


def test_an_option_that_exists_here_is_not_foreign(keys: list[str]) -> None:
    """Otherwise a slip in another part of its name would be sent somewhere else."""
    top = {key for key in keys if "." not in key}
    assert not top & {*OPTIONS, *FILES}


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("num_generations", "; here it is model.batch.responses"),
        ("model.max-completion-length", "; here it is model.sampling.max_new_tokens"),
        ("trainer.n_gpus_per_node", "; here it is trainer.devices"),
        ("mask_truncated_completions", "; here it is --config configs/callbacks/mask_truncated.yaml"),
        ("modle.seed", "; did you mean model.seed?"),
        ("model.batch.promts", "; did you mean model.batch.prompts?"),
    ],
)
def test_options(option: str, told: str, keys: list[str]) -> None:
    assert near_option(option, keys) == told


@pytest.mark.parametrize(
    ("option", "name", "told"),
    [
        ("model.loss", "PPO", "; ppo is several options: --config configs/algorithm/ppo.yaml"),
        (
            "model.advantage",
            "REINFORCE++",
            "; reinforce_pp is several options: --config configs/algorithm/reinforce_pp",
        ),
        ("model.loss", "gspo", "; did you mean GSPO?"),
        ("model.loss", "nope", "; there are CISPO, ClippedSurrogate, GSPO"),
        ("model.engine", "vllm", "; did you mean VLLMColocatedEngine, VLLMInProcessEngine or VLLMServerEngine?"),
        ("trainer.logger", "wandb", "; did you mean WandbLogger?"),
        ("model.optimizer", "adamw", "; did you mean AdamW?"),
        ("trainer.callbacks", "entropy_topk", "; did you mean EntropyTopK?"),
        ("trainer.callbacks", "zzz", "; name a built-in class, as lit-rlvr fit --help lists them, or a class_path"),
    ],
)
def test_classes(option: str, name: str, told: str) -> None:
    assert near_class(name, option, CLASSES).startswith(told)


def test_bases_are_no_choice() -> None:
    names = CLASSES["trainer.callbacks"]
    assert set(lit_rlvr_callbacks.__all__) <= set(names)
    assert not HIDDEN & {name for known in CLASSES.values() for name in known}


def test_a_number_where_options_belong(keys: list[str]) -> None:
    """What jsonargparse says of ``--model.kl=0.1``."""
    message = (
        'Parser key "model.kl":\n  Does not validate against any of the Union subtypes\n'
        "  Subtypes: [<class 'lit_rlvr.kl.KLPenalty'>, <class 'NoneType'>]\n  Errors:\n"
        "    - Unexpected import path format: 0.1\n    - Expected a <class 'NoneType'>\n"
        "  Given value type: <class 'str'>\n  Given value: 0.1"
    )
    assert clear(message, keys, CLASSES) == (
        "model.kl has options, as in --model.kl.beta=0.1, is {} for their defaults, or is null; got '0.1'"
    )


def test_an_option_of_no_class(keys: list[str]) -> None:
    """What jsonargparse says of ``--model.engine.gpus=2``, where the engine is null."""
    message = (
        'Parser key "model.engine":\n  Does not validate against any of the Union subtypes\n'
        "  Subtypes: [<class 'lit_rlvr.engines.base.Engine'>, <class 'NoneType'>]\n  Errors:\n"
        "    - Expected a dot import path string: x\n    - Expected a <class 'NoneType'>\n"
        "  Given value type: <class 'jsonargparse._util.NestedArg'>\n  Given value: NestedArg(key='gpus', val='2')"
    )
    assert clear(message, keys, CLASSES).startswith(
        "model.engine is null, which has no option 'gpus'; name a class before it with --model.engine"
    )


@pytest.mark.parametrize("devices", ["0,1", [0], "-1", -1])
def test_a_cpu_has_no_numbered_devices(devices: object) -> None:
    with pytest.raises(
        ValueError, match=r"^trainer\.devices must be a number of processes with trainer\.accelerator cpu"
    ):
        check_trainer_options({"accelerator": "cpu", "devices": devices})
    check_trainer_options({"accelerator": "cpu", "devices": "2"})


def test_an_algorithm_where_a_file_belongs(tmp_path: Path) -> None:
    told = missing_file(tmp_path / "grpo")
    assert told.endswith("; grpo is several options: --config configs/algorithm/grpo.yaml")
