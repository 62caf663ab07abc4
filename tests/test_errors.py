"""What a user gets wrong, and the one sentence that each mistake is answered with."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lit_rlvr.__main__ import main

CONFIGS = Path(__file__).parent.parent / "configs"
QUICKSTART = str(CONFIGS / "quickstart.yaml")

# YAML on top of the quickstart, and what the error says.
IN_YAML: dict[str, tuple[str, str]] = {
    "unknown key": ("model: {batch: {promts: 3}}", "no option 'model.batch.promts'; did you mean model.batch.prompts?"),
    "unknown section": ("modle: {seed: 1}", "there is no option 'modle.seed'; did you mean model.seed?"),
    "trainer key": ("trainer: {max_stpes: 3}", "'trainer.max_stpes'; did you mean trainer.max_steps?"),
    "sampling key": ("model: {sampling: {temprature: 1}}", "did you mean model.sampling.temperature?"),
    "data key": ("data: {tempalte: {kind: chat}}", "no option 'data.tempalte.kind'; did you mean data.template.kind?"),
    "callback class": ("trainer: {callbacks: [EntropyTopk]}", "no class 'EntropyTopk'; did you mean EntropyTopK?"),
    "callback option": (
        "trainer: {callbacks: [{class_path: EntropyTopK, init_args: {roh: 1}}]}",
        "trainer.callbacks: EntropyTopK has no option 'roh'; did you mean rho?",
    ),
    "loss class": ("model: {loss: ClippedSurogate}", "model.loss: there is no class 'ClippedSurogate'; did you mean"),
    "loss option": (
        "model: {loss: {class_path: ClippedSurrogate, init_args: {clip_hihg: 1}}}",
        "model.loss: ClippedSurrogate has no option 'clip_hihg'; did you mean clip_high?",
    ),
    "evaluation option": (
        "model: {evaluations: {a: {temprature: 3}}}",
        "Evaluation has no option 'temprature'; did you mean temperature?",
    ),
    "task option": (
        "data: {task: {class_path: ReasoningGym, init_args: {datset: chain_sum}}}",
        "data.task: ReasoningGym has no option 'datset'; did you mean dataset?",
    ),
    "optimizer": ("model: {optimizer: torch.optim.AdamV}", "torch.optim has no 'AdamV'; did you mean Adam?"),
    "module": (
        "trainer: {callbacks: [{class_path: my_callbacks.Nope}]}",
        "cannot import my_callbacks.Nope: there is no module 'my_callbacks' in this folder",
    ),
    "interpolation": ("model: {seed: '${model.sede}'}", "model.seed: ${model.sede} stands for nothing; did you mean"),
    "not YAML": ("model: [", "a configuration file is not valid YAML near line"),
    "not a number": ("model: {batch: {prompts: eight}}", "model.batch.prompts must be a whole number, got 'eight'"),
    "choice": ("model: {kl: {estimator: k4}}", "model.kl.estimator must be one of k1, k2, k3, got 'k4'"),
    "rho": (
        "trainer: {callbacks: [{class_path: EntropyTopK, init_args: {rho: 1.5}}]}",
        "EntropyTopK.rho must lie in (0, 1], got 1.5",
    ),
    "stage": (
        "trainer: {callbacks: [{class_path: EntropyTopK, init_args: {stages: [platau]}}]}",
        "there is no stage 'platau'; did you mean plateau?",
    ),
    "no detector": (
        "trainer: {callbacks: [{class_path: EntropyTopK, init_args: {stages: [plateau]}}]}",
        "EntropyTopK acts only in some stages, but no stage detector is in the list; add StageDetector",
    ),
    "two detectors": (
        "trainer: {callbacks: [StageDetector, {class_path: StageDetector, init_args: {name: b}}]}",
        "StageDetector and b both name the stage; keep one stage detector",
    ),
    "same name": ("trainer: {callbacks: [EntropyTopK, EntropyTopK]}", "two credit callbacks are named EntropyTopK"),
    "window": (
        "trainer: {callbacks: [{class_path: PositionShaping, init_args: {first_step: 9, last_step: 3}}]}",
        "that window is empty",
    ),
    "group of one": ("model: {batch: {responses: 1}, dynamic_sampling: null}", "compares at least 2 responses"),
    "zero prompts": ("model: {batch: {prompts: 0}}", "batch.prompts must be at least 1, got 0"),
    "no divisor": (
        "model: {batch: {prompts: 10, minibatch_prompts: 4}}",
        "batch.prompts=10 must be a multiple of batch.minibatch_prompts=4",
    ),
    "greedy rollouts": (
        "model: {sampling: {temperature: 0}}",
        "training rollouts are drawn from the full distribution",
    ),
    "top-p rollouts": ("model: {sampling: {top_p: 0.9}}", "training rollouts are drawn from the full distribution"),
    "greedy twice": (
        "model: {evaluations: {g: {temperature: 0, samples: 4}}}",
        "greedy evaluation (temperature 0) gives the same response every time",
    ),
    "pass at 9": ("model: {evaluations: {g: {samples: 4, k: [9]}}}", "pass@9 needs 1 <= k <= samples"),
    "k1 in the loss": ("model: {kl: {estimator: k1}}", "k1 in the loss has a gradient with zero mean"),
    "no beta": ("model: {kl: {beta: 0}}", "kl.beta must be > 0, got 0"),
    "idle reference": ("model: {reference: somewhere}", "a reference model is given, but nothing uses it"),
    "clip": (
        "model: {loss: {class_path: ClippedSurrogate, init_args: {clip_low: 2}}}",
        "clip_low must lie in [0, 1]",
    ),
    "dual clip": (
        "model: {loss: {class_path: ClippedSurrogate, init_args: {dual_clip: 0.5}}}",
        "dual_clip must be > 1, got 0.5",
    ),
    "overlong": ("model: {overlong: {buffer: 99}}", "overlong.buffer=99 is wider than sampling.max_new_tokens=34"),
    "rounds": ("model: {dynamic_sampling: {max_rounds: 0}}", "dynamic_sampling.max_rounds must be at least 1, got 0"),
    "accumulation": ("trainer: {accumulate_grad_batches: 2}", "trainer.accumulate_grad_batches must be 1"),
    "fp16": ("trainer: {precision: 16-true}", "trainer.precision 16 needs loss scaling"),
    "never validated": ("trainer: {val_check_interval: 0}", "trainer.val_check_interval must be above 0"),
    "dtype": ("model: {dtype: float8}", "dtype must be one of float32, bfloat16, float64, got 'float8'"),
    "no such task": ("data: {task: last_digit_aritmetic}", "did you mean last_digit_arithmetic?"),
    "no such dataset": ("data: {task: 'reasoning_gym:chain_sums'}", "no dataset 'chain_sums'; did you mean chain_sum"),
    "no model folder": ("model: {model: ./no/such/model}", "there is no model folder ./no/such/model"),
    "no builtin model": ("model: {model: 'builtin:huge'}", "there is no built-in model 'huge'"),
    "template": ("data: {template: {text: hello}}", "template.text must contain {question}, got 'hello'"),
    "no chat template": (
        "data: {template: {kind: chat}}",
        "the tokenizer has no chat template; use template.kind: plain",
    ),
    "idle system": ("data: {template: {system: hi}}", "template.system needs template.kind: chat"),
    "prompt limit": ("data: {max_prompt_tokens: 2}", "there are no train prompts: all 20000 are longer than"),
    "context": ("model: {sampling: {max_new_tokens: 500}}", "exceed the model's context of 128 tokens"),
}

ON_THE_COMMAND_LINE: dict[str, tuple[list[str], str]] = {
    "command": (["fitt"], "there is no command 'fitt'; did you mean fit?"),
    "nothing": (["fit"], "model.model and data.task are required and not set"),
    "file": (["fit", "--config", "quikstart.yaml"], "there is no file 'quikstart.yaml'; did you mean quickstart.yaml?"),
    "option": (["fit", "--config", QUICKSTART, "--model.bach.prompts=3"], "did you mean model.batch.prompts?"),
    "callback": (["fit", "--config", QUICKSTART, "--trainer.callbacks+=EntropyTopk"], "did you mean EntropyTopK?"),
    "checkpoint": (["fit", "--config", QUICKSTART, "--ckpt_path=lost.ckpt"], "there is no file 'lost.ckpt'"),
    "no checkpoint": (["fit", "--config", QUICKSTART, f"--ckpt_path={QUICKSTART}"], "is no checkpoint of a run"),
    "no warm start": (["warmup", "--config", QUICKSTART, "--warmup=null"], "the configuration has no `warmup` section"),
}


def answer(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The error of a command that must fail, checked to be short and without a traceback."""
    try:
        code: object = main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    error = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in error
    assert error.count("lit-rlvr: error:") == 1
    assert len(error.splitlines()) <= 12
    return error


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", IN_YAML)
def test_mistakes_in_yaml(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text, message = IN_YAML[case]
    Path("mine.yaml").write_text(text + "\n")
    small = ["--warmup=null", "--trainer.max_steps=1", "--trainer.logger=false"]
    assert message in answer(["fit", "--config", QUICKSTART, "--config", "mine.yaml", *small], capsys)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", ON_THE_COMMAND_LINE)
def test_mistakes_on_the_command_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.symlink(QUICKSTART, "quickstart.yaml")
    arguments, message = ON_THE_COMMAND_LINE[case]
    assert message in answer(arguments, capsys)


def test_debugging_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_RLVR_DEBUG", "1")
    with pytest.raises(ValueError, match="no built-in model"):
        main(["fit", "--config", QUICKSTART, "--warmup=null", "--model.model=builtin:huge", "--trainer.logger=false"])
