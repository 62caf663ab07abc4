"""What ``lit-rlvr doctor`` finds in a configuration: model, template, task, verifier, credit. No weights are loaded."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from lit_rlvr import doctor
from lit_rlvr.architectures import reach
from lit_rlvr.checks import check_chain, check_trainer
from lit_rlvr.credit import all_callbacks, credit_chain, describe_chain
from lit_rlvr.data import RLVRDataModule
from lit_rlvr.doctor import Notes, Report
from lit_rlvr.engines import VLLMInProcessEngine
from lit_rlvr.hub import cache_alone, hub_answers
from lit_rlvr.models import GGUF, resolve_model
from lit_rlvr.module import RLVRModule
from lit_rlvr.rewards import ExactMatch, MathVerify
from lit_rlvr.tasks import LastDigitArithmetic, ProblemFiles, Prompt, ReasoningGym, Split, Task
from lit_rlvr.tasks.readers import HUB, UnreachableError
from lit_rlvr.tracking import MLflow
from lit_rlvr.warmup import Warmup

MEASURED = 2000
"""The longest prompt is looked for among this many with the most characters."""
TRIED = 16
"""Problems whose reference answers are shown to the verifier."""
FORMS = {"12": "{}", "#12": "#{}", "\\boxed{12}": "\\boxed{{{}}}", "<answer>12</answer>": "<answer>{}</answer>"}
"""How an answer may be written, for the answer 12."""


def examine(module: RLVRModule, data: RLVRDataModule, trainer: Any, asked: dict[str, Any], warmup: Any) -> int:
    """Print findings about machine and configuration and return the exit code.

    Args:
        module: The module, without weights.
        data: The data module.
        trainer: A Trainer on the CPU with the run's callbacks, connected to both.
        asked: The ``trainer`` section of the configuration.
        warmup: The ``warmup`` section, or ``None``.
    """
    report = Report()
    logging.getLogger("lit_rlvr").handlers = [Notes(report)]
    doctor.machine(report)
    with report.part("configuration"):
        check_trainer(module, trainer, asked.get("strategy"))
        report.fine("can be read, and its options go together")
        accelerator(report, asked)
    with report.part("credit"):
        chain = credit_chain(all_callbacks(trainer))
        check_chain(module)
        report.fine(describe_chain(chain).removeprefix("credit: "))
    if isinstance(module.engine, VLLMInProcessEngine):
        with report.part("engine"):
            doctor.vllm(report)
    config = tokenizer = None
    with report.part("model"):
        source = readable_model(module.model)
        config = AutoConfig.from_pretrained(**source)
        model(report, config)
    with report.part("tokenizer"):
        if config is not None:
            tokenizer = AutoTokenizer.from_pretrained(**source)
            vocabulary(report, tokenizer, config)
            if not template(report, tokenizer, data):
                tokenizer = None
    unreached = HUB in repr(data.task) and not hub_answers()
    with cache_alone() if unreached else nullcontext():
        problems(report, module, data, tokenizer, config, unreached)
    if warmup is not None:
        with report.part("warm start"):
            warm_start(report, warmup, data.task)
    root, loggers = Path(asked.get("default_root_dir") or "."), asked.get("logger")
    mlflow = [x for x in (loggers if isinstance(loggers, list) else [loggers]) if isinstance(x, MLflow)]
    doctor.places(report, root, mlflow[0].tracking_uri if mlflow else None)
    return report.close()


def problems(
    report: Report, module: RLVRModule, data: RLVRDataModule, tokenizer: Any, config: Any, unreached: bool
) -> None:
    """The task, and what needs its problems: prompts and verifier. Where there are none, that is the finding.

    ``unreached``: the hub does not answer, so a dataset may not be there.
    """
    there = False
    with report.part("task"):
        try:
            rows(report, module, data)
            there = True
        except UnreachableError as error:
            if not unreached:
                raise
            what = str(error).partition(" (split")[0]
            report.broken(
                f"{what}: it is not in the cache, and the hub does not answer here", "run doctor where the run will be"
            )
    if there and tokenizer is not None:
        with report.part("prompts"):
            lengths(report, module, data, tokenizer, config)
            round_trip(report, data, tokenizer)
    try:
        with report.part("verifier"):
            if there:
                verifier(report, data)
    finally:
        data.verifier.close()


def accelerator(report: Report, asked: dict[str, Any]) -> None:
    """Whether the devices that the configuration asks for are there."""
    wanted, number = str(asked.get("accelerator", "auto")), asked.get("devices", "auto")
    if wanted in ("cuda", "gpu") and not torch.cuda.is_available():
        report.broken(
            f"trainer.accelerator is {wanted}, but torch sees no CUDA device",
            "run doctor where the run will be; a small model can do without: --trainer.accelerator=cpu",
        )
    elif wanted in ("cuda", "gpu") and str(number).isdigit() and int(number) > torch.cuda.device_count():
        report.broken(f"trainer.devices is {number}, but there are {torch.cuda.device_count()}", "lower it")


def readable_model(name: str) -> dict[str, str]:
    """What transformers reads configuration and tokenizer from; a GGUF file is not converted.

    Raises:
        ValueError: When a model of the hub is neither in the cache nor within reach.
    """
    if name.startswith(GGUF):
        from lit_rlvr.gguf import check_reader, gguf_file

        file = gguf_file(name.removeprefix(GGUF))
        check_reader(file)
        return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    path = resolve_model(name)
    reach(path)
    return {"pretrained_model_name_or_path": path}


def model(report: Report, config: Any) -> None:
    """Architecture and size."""
    text = config.get_text_config()
    kind = (config.architectures or [config.model_type])[0]
    context = getattr(text, "max_position_embeddings", None)
    facts = f"{text.num_hidden_layers} layers of width {text.hidden_size}, {text.vocab_size} tokens, context {context}"
    report.fine(f"{kind}: {facts}")


def vocabulary(report: Report, tokenizer: Any, config: Any) -> None:
    """Whether the model has a place for every token, and responses can end."""
    if len(tokenizer) > config.get_text_config().vocab_size:
        report.warning(
            f"it has {len(tokenizer)} tokens, the model {config.get_text_config().vocab_size}: the others would fail",
            "put the tokenizer that the model was trained with into its folder",
        )
    elif tokenizer.eos_token_id is None:
        report.warning("it has no end token, so every response goes on to the limit", "set eos_token in its folder")
    else:
        report.fine(f"{len(tokenizer)} tokens; responses end with {tokenizer.eos_token!r}")


def template(report: Report, tokenizer: Any, data: RLVRDataModule) -> bool:
    """Whether the tokenizer has the chat template that the configuration wants; prompts can be encoded if so."""
    report.about = "template"
    wanted, has = data.template.kind, bool(tokenizer.chat_template)
    if wanted == "chat" and not has:
        report.broken("kind is chat, but the tokenizer has no chat template", "--data.template.kind=plain")
    elif wanted == "plain" and has:
        report.warning(
            "kind is plain, but the tokenizer has a chat template",
            "an instruction-tuned model wants --data.template.kind=chat; a base model does not",
        )
    else:
        report.fine(f"{wanted}: {data.template.text!r}")
    return has or wanted == "plain"


def rows(report: Report, module: RLVRModule, data: RLVRDataModule) -> None:
    """Problems per split, and questions that are in two."""
    found: dict[Split, Sequence[Prompt]] = {split: data.task.prompts(split) for split in ("train", "val")}
    for split, prompts in found.items():
        if not prompts:
            report.broken(f"there are no {split} problems")
    report.fine(f"{type(data.task).__name__}: " + ", ".join(f"{len(p)} {s}" for s, p in found.items()) + " problems")
    if 0 < len(found["train"]) < module.batch.prompts:
        report.warning(
            f"a phase of {module.batch.prompts} prompts takes some of the {len(found['train'])} problems twice",
            "--model.batch.prompts, or more problems",
        )
    if both := {p.question for p in found["train"]} & {p.question for p in found["val"]}:
        report.warning(
            f"{len(both)} validation question(s) are training questions, for example {min(both)[:60]!r}",
            "evaluations will look better than they are",
        )
    try:
        data.task.prompts("test")
    except ValueError as error:
        report.warning(f"lit-rlvr test has nothing to evaluate: {error}")


def lengths(report: Report, module: RLVRModule, data: RLVRDataModule, tokenizer: Any, config: Any) -> None:
    """Whether the longest prompt and the longest response fit into the model's context."""
    prompts = [*data.task.prompts("train"), *data.task.prompts("val")[: data.eval_prompts]]
    prompts = sorted(prompts, key=lambda prompt: -len(prompt.question))[:MEASURED]
    measured = [len(data.template.encode(prompt, tokenizer).tokens) for prompt in prompts]
    limit = data.max_prompt_tokens or max(measured)
    fitting = [length for length in measured if length <= limit]
    if not fitting:
        report.broken(f"all are longer than data.max_prompt_tokens={limit}", "raise it")
        return
    if len(fitting) < len(measured):
        report.warning(f"{len(measured) - len(fitting)} are longer than data.max_prompt_tokens={limit}: left out")
    most = module.sampling.max_new_tokens
    response = max(most, *(e.sampling(most).max_new_tokens for e in module.evaluator.evaluations.values()), 0)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    finding = f"at most {max(fitting)} tokens, and {response} of a response: {max(fitting) + response} in all"
    if context is not None and max(fitting) + response > context:
        report.broken(
            f"{finding}, but the model's context is {context}",
            "lower model.sampling.max_new_tokens (and the evaluations') or data.max_prompt_tokens",
        )
    else:
        report.fine(finding)


def round_trip(report: Report, data: RLVRDataModule, tokenizer: Any) -> None:
    """Whether the tokenizer gives back what it reads; one of characters has no place for others."""
    for prompt in data.task.prompts("train")[:TRIED]:
        for text in (prompt.question, prompt.answer or ""):
            back = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"], skip_special_tokens=True)
            if "".join(back.split()) != "".join(text.split()):
                report.warning(
                    f"the tokenizer reads {text[:60]!r} as {back[:60]!r}", "choose a model whose tokenizer knows it"
                )
                return


def verifier(report: Report, data: RLVRDataModule) -> None:
    """Whether reference answers are judged right, in some usual form, and an empty response wrong."""
    every = data.task.prompts("train")
    prompts = [p for p in every[:: max(1, len(every) // TRIED)][:TRIED] if p.answer is not None]
    if not prompts:
        report.warning("the problems have no reference answers to try", "try a few responses by hand")
        return
    written = {name: [form.format(p.answer) for p in prompts] for name, form in FORMS.items()}
    if isinstance(data.task, ProblemFiles) and data.task.solution is not None:
        written["the solution"] = [data.task.demonstrate(p, random.Random(0)) for p in prompts]
    texts = [text for texts in (*written.values(), [""] * len(prompts)) for text in texts]
    scores = data.verifier(prompts * (len(written) + 1), texts).scores
    n = len(prompts)
    right = {name: [s.correct for s in scores[i * n : (i + 1) * n]] for i, name in enumerate(written)}
    best = max(right, key=lambda name: sum(right[name]))
    agreed = sum(right[best])
    forms = " or ".join(name for name in right if sum(right[name]) == agreed)
    if agreed == n:
        report.fine(f"judges {n} of {n} reference answers right, written like {forms}")
    elif agreed:
        wrong = prompts[right[best].index(False)]
        where = wrong.meta.get("source", f"problem {wrong.index}")
        report.warning(f"judges {agreed} of {n} reference answers right, written like {forms}", f"look at {where}")
    elif knows_form(data.task):
        report.broken(f"judges none of {n} reference answers right", "look at the column of the answers")
    else:
        report.warning(
            f"judges none of {n} reference answers right, written like {forms}",
            "try a right response by hand, if yours are written otherwise",
        )
    if empty := sum(s.correct for s in scores[-n:]):
        report.warning(f"judges an empty response right for {empty} of {n} problems", "look at the reward")


def knows_form(task: Task) -> bool:
    """Whether one of ``FORMS`` must be right."""
    if isinstance(task, ProblemFiles):
        reward = task.rewards[task.outcome or task.reward_names[0]]
        return isinstance(reward, MathVerify) or (isinstance(reward, ExactMatch) and not reward.pattern)
    return isinstance(task, LastDigitArithmetic | ReasoningGym)


def warm_start(report: Report, warmup: Warmup, task: Task) -> None:
    """Whether there is something to imitate."""
    shown = task.demonstrate(task.prompts("train")[0], random.Random(warmup.seed))
    report.fine(f"{warmup.steps} steps on demonstrations like {shown[:60]!r}")
