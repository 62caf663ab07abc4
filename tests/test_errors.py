"""What a user gets wrong, and the one sentence that each mistake is answered with."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from command_line import succeed

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
    "not YAML": ("model: [", "mine.yaml is not valid YAML, near line"),
    "not a number": ("model: {batch: {prompts: eight}}", "model.batch.prompts must be a whole number, got 'eight'"),
    "number of a pair": (
        "model: {optimizer: {class_path: AdamW, init_args: {betas: 3}}}",
        "model.optimizer.betas must be a list, got '3'",
    ),
    "half a pair": (
        "model: {optimizer: {class_path: AdamW, init_args: {betas: [0.9]}}}",
        "model.optimizer.betas must be a list with 2 elements, got [0.9]",
    ),
    "no range": (
        "model: {optimizer: {class_path: AdamW, init_args: {betas: [0.9, 1.5]}}}",
        "model.optimizer: Invalid beta parameter at index 1: 1.5",
    ),
    "list of a scheduler": ("model: {scheduler: [a]}", "model.scheduler must be a class's name, or {class_path: NAME"),
    "layers of adapters": (
        "model: {lora: {target_modules: [q_prj]}}",
        "lora.target_modules: Qwen3ForCausalLM has no layer 'q_prj'; did you mean q_proj?",
    ),
    "layer of adapters": (
        "model: {lora: {target_modules: q_proj}}",
        "lora.target_modules must be all-linear or a list of names, as in [q_proj, v_proj], got 'q_proj'",
    ),
    "options without a class": (
        "data: {task: {seed: 3}}",
        "data.task: whose options are {'seed': 3}? Write {class_path: NAME, init_args: {...}}",
    ),
    "reward class": (
        "data: {task: {class_path: ProblemFiles, init_args: {train: x.jsonl, rewards: {a: ExactMach}}}}",
        "data.task.rewards: there is no class 'ExactMach'; did you mean ExactMatch?",
    ),
    "number as a name": ("seed_everything: 1\nmodel: {1: 3}", "mine.yaml, line 2: a name must be a text, got '1'"),
    "tag": ("model: {seed: !!python/object:os.system 3}", "line 1: model.seed has the tag !!python/object:os.system"),
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
    "null": ("model: {loss: null}", "model.loss cannot be null; leave it out for the default"),
    "null number": ("model: {batch: {prompts: null}}", "model.batch.prompts cannot be null"),
    "null of a callback": (
        "trainer: {callbacks: [{class_path: PositionShaping, init_args: {slope: null}}]}",
        "trainer.callbacks.slope cannot be null",
    ),
    "empty file": ("", "mine.yaml is empty: it has no options"),
    "only a comment": ("# nothing yet", "mine.yaml is empty: it has no options"),
    "a word": ("hello", "mine.yaml must hold sections such as `model:`, got 'hello'"),
    "a list": ("- model", "mine.yaml must hold sections such as `model:`, got a list"),
    "no colon": (
        "model:\n  seed 3",
        "mine.yaml, line 2: model is a section (model.batch, model.sampling); its options",
    ),
    "empty section": ("seed_everything: 1\nmodel:", "mine.yaml, line 2: model is a section"),
    "list of a section": ("trainer: [1]", "mine.yaml, line 1: trainer is a section; its options stand below it, got a"),
    "number of a section": ("model: {batch: 5}", "model.batch is a section; its options stand below it, got '5'"),
    "tab": ("model:\n\tseed: 3", "mine.yaml is not valid YAML, line 2: it begins with a tab; indent with spaces"),
    "twice": ("model: {seed: 1}\nmodel: {seed: 2}", "mine.yaml, line 2: model stands there a second time"),
    "twice within": ("model:\n  seed: 1\n  seed: 2", "mine.yaml, line 3: model.seed stands there a second time"),
    "init_arg": (
        "trainer: {callbacks: [{class_path: EntropyTopK, init_arg: {rho: 1}}]}",
        "beside trainer.callbacks.class_path stands 'init_arg'; did you mean init_args?",
    ),
    "options beside the class": (
        "model: {loss: {class_path: ClippedSurrogate, clip_high: 0.3}}",
        "beside model.loss.class_path stands 'clip_high'; the class's own options go below init_args",
    ),
    "no class": (
        "trainer: {callbacks: [{init_args: {rho: 1}}]}",
        "an entry of trainer.callbacks is a class's name, or",
    ),
    "class as key": (
        "trainer: {callbacks: [{EntropyTopK: {rho: 1}}]}",
        "or {class_path: NAME, init_args: {...}}; this",
    ),
    "class as section": (
        "trainer: {callbacks: {EntropyTopK: {rho: 1}}}",
        "'EntropyTopK' is no option; write a class's",
    ),
    "class number": ("trainer: {callbacks: [{class_path: 3}]}", "class_path must be the name of a class, got '3'"),
    "callback number": ("trainer: {callbacks: 3}", "trainer.callbacks must be a list, a class of the kind Callback or"),
    "another kind": ("model: {loss: TokenMean}", "model.loss: TokenMean is a class of another kind than what goes"),
    "no class at all": ("model: {loss: 5}", "model.loss must be a class of the kind PolicyLoss, got '5'"),
    "list of a text": ("data: {task: [a]}", "data.task must be a class of the kind Task or a text, got ['a']"),
    "list of a number": ("model: {batch: {prompts: [1, 2]}}", "model.batch.prompts must be a whole number, got [1, 2]"),
    "text of a list": ("model: {sampling: {stop: a}}", "model.sampling.stop must be a list, got 'a'"),
    "text of stages": (
        "trainer: {callbacks: [{class_path: EntropyTopK, init_args: {stages: plateau}}]}",
        "trainer.callbacks.stages must be a list or null, got 'plateau'",
    ),
    "list of evaluations": ("model: {evaluations: [greedy]}", "model.evaluations must be options by name or null, got"),
    "number of k": (
        "model: {evaluations: {a: {samples: 4, k: 2}}}",
        "model.evaluations.k must be a list or null, got '2'",
    ),
    "list of rewards": (
        "data: {task: {class_path: ProblemFiles, init_args: {train: x.jsonl, rewards: [ExactMatch]}}}",
        "data.task.rewards must be options by name, got ['ExactMatch']",
    ),
    "list of files": (
        "data: {task: {class_path: ProblemFiles, init_args: {train: [x.jsonl], rewards: {a: ExactMatch}}}}",
        "data.task.train must be a text, got ['x.jsonl']",
    ),
    "no rewards": (
        "data: {task: {class_path: ProblemFiles, init_args: {train: x.jsonl}}}",
        "data.task: ProblemFiles needs rewards; set data.task.rewards",
    ),
    "negative length": ("model: {sampling: {max_new_tokens: -1}}", "max_new_tokens must be at least 1, got -1"),
    "environment": ("model: {model: '${oc.env:LIT_RLVR_NOPE}'}", "there is no environment variable LIT_RLVR_NOPE"),
    "open reference": ("model: {dtype: '${model.seed'}", "'${model.seed' is no whole reference"),
    "number of a text": ("model: {model: 5}", "model.model must be a text, got '5'"),
}

RUN = ("fit", "--config", QUICKSTART, "--warmup=null", "--trainer.max_steps=1", "--trainer.logger=false")
ON_THE_COMMAND_LINE: dict[str, tuple[list[str], str]] = {
    "command": (["fitt"], "there is no command 'fitt'; did you mean fit?"),
    "nothing": (["fit"], "model.model and data.task are required and not set"),
    "file": (["fit", "--config", "quikstart.yaml"], "there is no file 'quikstart.yaml'; did you mean quickstart.yaml?"),
    "option": (["fit", "--config", QUICKSTART, "--model.bach.prompts=3"], "did you mean model.batch.prompts?"),
    "callback": (["fit", "--config", QUICKSTART, "--trainer.callbacks+=EntropyTopk"], "did you mean EntropyTopK?"),
    "checkpoint": (["fit", "--config", QUICKSTART, "--ckpt_path=lost.ckpt"], "there is no file 'lost.ckpt'"),
    "no checkpoint": (["fit", "--config", QUICKSTART, f"--ckpt_path={QUICKSTART}"], "is no checkpoint of a run"),
    "no demonstrations": (
        ["warmup", "--config", QUICKSTART, "--data.task=reasoning_gym:chain_sum"],
        "ReasoningGym has no demonstrations, so it cannot be used for a warm start; --warmup=null does without",
    ),
    "file without --config": (["fit", "quickstart.yaml"], "quickstart.yaml is a file; configuration files are named"),
    "number of a callback": (
        [*RUN, "--trainer.callbacks+=PositionShaping", "--trainer.callbacks.gamma=abc"],
        "trainer.callbacks.gamma must be a number or a schedule, got 'abc'",
    ),
    "choice of a callback": (
        [*RUN, "--trainer.callbacks+=EntropyTopK", "--trainer.callbacks.select=botom"],
        "trainer.callbacks.select must be one of top, bottom, band, random, got 'botom'; did you mean bottom?",
    ),
    "schedule of a callback": (
        [*RUN, "--trainer.callbacks=EntropyTopK", "--trainer.callbacks.rho={kind: linar, start: 1, end: 0, phases: 9}"],
        "trainer.callbacks.rho.kind must be one of linear, cosine, got 'linar'; did you mean linear?",
    ),
    "no steps": ([*RUN, "--trainer.max_steps=0"], "trainer.max_steps must be at least 1, or -1 for no end, got 0"),
    "negative learning rate": ([*RUN, "--model.optimizer.lr=-1"], "model.optimizer: Invalid learning rate: -1.0"),
    "no warm start": (["warmup", "--config", QUICKSTART, "--warmup=null"], "the configuration has no `warmup` section"),
    "abbreviation": ([*RUN, "--model.see=1"], "there is no option 'model.see'; did you mean model.seed?"),
    "abbreviated command option": ([*RUN, "--seed=1"], "there is no option 'seed'; here it is seed_everything"),
    "hyphen": ([*RUN, "--max-steps=1"], "there is no option 'max-steps'; did you mean trainer.max_steps?"),
    "one dash": ([*RUN, "-model.seed=1"], "-model.seed is no option; did you mean --model.seed?"),
    "no dash": ([*RUN, "foo"], "foo is no option; options begin with --"),
    "no value": ([*RUN, "--model.seed"], "--model.seed needs a value, as in --model.seed=VALUE"),
    "empty value": ([*RUN, "--model.seed="], "model.seed must be a whole number, got ''"),
    "no config": (["fit", "--config"], "--config needs a value"),
    "folder": (["fit", "--config", "."], "is a folder, expected a configuration file"),
    "learning rate": ([*RUN, "--model.optimizer.lr=abc"], "model.optimizer.lr must be a number, got 'abc'\n"),
    "optimizer option": (
        [*RUN, "--model.optimizer.lrr=1"],
        "model.optimizer: AdamW has no option 'lrr'; did you mean lr?",
    ),
    "no optimizer": ([*RUN, "--model.optimizer=null"], "model.optimizer cannot be null"),
    "another class": ([*RUN, "--model.optimizer=torch.nn.Linear"], "model.optimizer: torch.nn.Linear is no Optimizer"),
    "warm-up true": (
        [*RUN, "--warmup=true"],
        "has options, as in --warmup.steps=VALUE, is {} for their defaults, or is null; got",
    ),
    "KL true": ([*RUN, "--model.kl=true"], "model.kl has options, as in --model.kl.beta=VALUE"),
    "dataset": ([*RUN, "--data.task=ReasoningGym"], "data.task: ReasoningGym needs dataset; set data.task.dataset"),
    "option of a short name": ([*RUN, "--data.task.seed=3"], "the short name 'last_digit_arithmetic' has no options"),
    "precision": ([*RUN, "--trainer.precision=17"], "trainer.precision must be 64, 32, 16, "),
    "seed": ([*RUN, "--seed_everything=x"], "seed_everything must be true or false or a whole number, got 'x'"),
    "negative seed": ([*RUN, "--seed_everything=-5"], "seed_everything must lie between 0 and 4294967295, got -5"),
    "section": ([*RUN, "--model.batch=5"], "model.batch is a section: set its options, as in --model.batch."),
    "limit": (
        [*RUN, "--trainer.limit_val_batches=x"],
        "trainer.limit_val_batches must be a",
    ),
    "strategy": ([*RUN, "--trainer.strategy=ddpp"], "there is no trainer.strategy 'ddpp'; did you mean ddp?"),
    "class of a strategy": (
        [*RUN, "--trainer.strategy=ModelParallelStrategy"],
        "there is no trainer.strategy 'ModelParallelStrategy'; a class is written {class_path: ModelParallelStrategy}",
    ),
    "accelerator": ([*RUN, "--trainer.accelerator=gpuu"], "there is no trainer.accelerator 'gpuu'; did you mean gpu?"),
    "no devices": ([*RUN, "--trainer.devices=0"], "trainer.devices must be auto, a number from 1, or a list"),
    "devices": ([*RUN, "--trainer.devices=abc"], "trainer.devices must be auto, a number from 1, or a list"),
    "negative clipping": (
        [*RUN, "--trainer.gradient_clip_val=-1"],
        "trainer.gradient_clip_val must be above 0, or null",
    ),
    "root": ([*RUN, "--trainer.default_root_dir=quickstart.yaml"], "is quickstart.yaml, which is a file; a run needs"),
    "checkpoint folder": ([*RUN, "--ckpt_path=."], "is no checkpoint of a run"),
    "prompt limit": ([*RUN, "--data.max_prompt_tokens=0"], "max_prompt_tokens must be at least 1, got 0"),
    "rows": ([*RUN, "--trainer.callbacks=RLVRProgress", "--trainer.callbacks.rows=-1"], "RLVRProgress.rows must be at"),
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x00\xff\xfe", "mine.yaml is not UTF-8 text: invalid start byte at byte 1"),
        (b"model: {dtype: caf\xe9}", "mine.yaml is not UTF-8 text: invalid continuation byte at byte 18"),
        (b"model: {dtype: '\x00'}", "mine.yaml is not valid YAML: unacceptable character #x0000"),
    ],
)
def test_files_that_are_no_text(
    content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_bytes(content)
    assert message in answer(["fit", "--config", QUICKSTART, "--config", "mine.yaml"], capsys)


@pytest.mark.parametrize("text", ["# Role", "#", "  # Be brief.\n\nAnswer.", "#: 1", "null # or not"])
def test_a_text_may_begin_like_a_comment(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From YAML and from the command line; what YAML itself reads as null stays null."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(yaml.safe_dump({"data": {"template": {"kind": "chat", "system": text}}}))
    chat = ("--data.template.kind=chat", f"--data.template.system={text}")
    for options in (("--config", "mine.yaml"), chat):
        printed = succeed(tmp_path, "fit", "--config", QUICKSTART, *options, "--print_config").out
        found = yaml.safe_load(printed)["data"]["template"]["system"]
        assert found == (None if text == "null # or not" else text)


def test_null_is_null(tmp_path: Path) -> None:
    printed = succeed(tmp_path, "fit", "--config", QUICKSTART, "--model.dynamic_sampling=null", "--print_config").out
    assert yaml.safe_load(printed)["model"]["dynamic_sampling"] is None


def test_debugging_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_RLVR_DEBUG", "1")
    with pytest.raises(ValueError, match="no built-in model"):
        main(["fit", "--config", QUICKSTART, "--warmup=null", "--model.model=builtin:huge", "--trainer.logger=false"])
