"""The tables of the documentation say what the code does: the objective, what goes together, options and metrics."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lit_rlvr_callbacks
import pytest
import torch
import yaml
from rollouts import build_rollout, full_credit

from lit_rlvr import Evaluation, RLVRModule
from lit_rlvr.checks import check_algorithm, check_chain
from lit_rlvr.cli import every_option
from lit_rlvr.cli_classes import NAMEABLE
from lit_rlvr.credit import CreditCallback
from lit_rlvr.critic import Critic
from lit_rlvr.engines import VLLMServerEngine
from lit_rlvr.kl import KLPenalty
from lit_rlvr.lora import LoRA
from lit_rlvr.minibatch import MiniBatch
from lit_rlvr.reduce import LocalReduce
from lit_rlvr.shaping import DynamicSampling, OverlongPenalty

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
ALGORITHMS = {file.stem: yaml.safe_load(file.read_text())["model"] for file in (ROOT / "configs/algorithm").iterdir()}
LIMIT = 10
OTHERS = (KLPenalty, Critic, OverlongPenalty, DynamicSampling, LoRA, Evaluation)
PARTS = {"kl": KLPenalty, "critic": Critic, "overlong": OverlongPenalty, "dynamic_sampling": DynamicSampling}
METRIC = re.compile(r"(?:rollout|train|credit|time|engine)/[a-z]\w*")


def rows(page: str, section: str = "") -> list[list[str]]:
    """The cells of the tables of a page, or of one of its sections; without the lines below the heads."""
    text = (DOCS / page).read_text()
    if section:
        text = re.split(rf"^##+ {section}.*$", text, flags=re.MULTILINE)[1]
        text = re.split(r"^## ", text, flags=re.MULTILINE)[0]
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|--")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def code(cell: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", cell)


def classes() -> dict[str, Any]:
    """Every class that a configuration can have, by its short name."""
    found: dict[str, Any] = {cls.__name__: cls for cls in OTHERS}
    todo: list[Any] = [base for bases in NAMEABLE.values() for base in bases]
    while todo:
        cls = todo.pop()
        todo += cls.__subclasses__()
        if cls.__module__.startswith("lit_rlvr"):
            found[cls.__name__] = cls
    return found


def make(value: Any) -> Any:
    """An object from what a file says of it."""
    if isinstance(value, str):
        return classes()[value]()
    options = {k: LIMIT if str(v).startswith("${") else v for k, v in value["init_args"].items()}
    return classes()[value["class_path"]](**options)


def module_of(algorithm: str, callback: CreditCallback, **options: Any) -> RLVRModule:
    """A module with the parts of an algorithm's file, and a trainer with one callback."""
    given = {
        name: None if value is None else PARTS[name](**value) if name in PARTS else make(value)
        for name, value in ALGORITHMS[algorithm].items()
    }
    module = RLVRModule("unused", **{**given, **options})
    trainer: Any = SimpleNamespace(callbacks=[callback], strategy=None, precision="32-true")
    module._trainer = trainer
    return module


def goes(algorithm: str, callback: CreditCallback, **options: Any) -> bool:
    """Whether the checks let an algorithm and a callback run together."""
    try:
        module = module_of(algorithm, callback, **options)
        check_algorithm(module)
        check_chain(module)
    except ValueError:
        return False
    return True


def test_what_goes_together() -> None:
    """Every cell of the table is what the checks say, and it has every callback and every algorithm."""
    (head, *body) = rows("methods.md", "What goes together")[: 1 + 6]
    assert sorted(name for cell in head for name in code(cell)) == sorted(ALGORITHMS)
    seen = set()
    for first, *cells in body:
        names = [name for name in code(first) if name in lit_rlvr_callbacks.__all__]
        seen |= set(names)
        options: dict[str, Any] = {"advantage": make("Raw")} if "Raw" in first else {}
        if "vLLM" in first:
            options["engine"] = VLLMServerEngine(["http://127.0.0.1:1"])
        arguments = {"level": "sequence"} if "level: sequence" in first else {}
        for columns, cell in zip(head[1:], cells, strict=True):
            for name in names:
                for algorithm in code(columns):
                    callback = getattr(lit_rlvr_callbacks, name)(**arguments)
                    assert goes(algorithm, callback, **options) is cell.startswith("yes"), (name, algorithm)
    assert seen == set(lit_rlvr_callbacks.__all__)


def test_where_each_algorithm_starts() -> None:
    """Every algorithm's file is in the row of its aggregation."""
    (_, *body) = rows("objective.md", "Where an algorithm starts")[:4]
    said = {file: code(row[0])[0] for row in body for file in code(row[1])}
    assert said == {name: type(make(parts["aggregation"])).__name__ for name, parts in ALGORITHMS.items()}


def test_the_example_of_the_objective() -> None:
    """Weights over denominators of a response of 2 and one of 4 tokens: all tokens, and the last of each."""
    rollout = build_rollout([[0.5] * 2, [0.5] * 4])
    last = torch.tensor([[0.0, 1, 0, 0], [0, 0, 0, 1]])
    body = rows("objective.md", "Where an algorithm starts")[5:8]
    assert len(body) == 3
    for name, *cells in body:
        options = {"length": LIMIT} if "length" in name else {}
        rule = classes()[code(name)[0]](**options)
        for kept, cell in zip((rollout.response_mask.float(), last), cells, strict=True):
            weight = rule.share(rollout.response_mask) * kept
            mini = MiniBatch.of(rollout, replace(full_credit(rollout), count=weight), rule, LocalReduce())
            found = [float(weight[0, 1]) / mini.denominator, float(weight[1, 3]) / mini.denominator]
            assert found == pytest.approx([float(Fraction(x)) for x in cell.split(", ")])


def fields_of(package: str, file: str, name: str) -> set[str]:
    """The fields of a dataclass, from its source: importing it takes seconds."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
    (found,) = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name)
    fields = [node.target for node in found.body if isinstance(node, ast.AnnAssign)]
    return {field.id for field in fields if isinstance(field, ast.Name)}


def test_the_options_of_trl_exist() -> None:
    """Every name on the left of its tables."""
    known = fields_of("trl", "trainer/grpo_config.py", "GRPOConfig")
    known |= fields_of("transformers", "training_args.py", "TrainingArguments")
    named = [name.split(":")[0] for cells in rows("coming-from.md", "TRL") for name in code(cells[0])]
    assert len(named) > 40
    assert [name for name in named if name not in known] == []


def test_the_options_that_replace_them_exist() -> None:
    """Every name in the middle: an option of the command line, a class, or a class and its option."""
    options = set(every_option())
    known = classes()
    named = [name for cells in rows("coming-from.md") for name in code(cells[1])]
    assert len(named) > 80
    for name in named:
        cls, _, option = name.partition(".")
        if cls in known:
            assert not option or option in inspect.signature(known[cls].__init__).parameters, name
        else:
            assert name in options, name


def metric_names(file: Path) -> Iterator[str]:
    """The metrics that a source file names as a whole."""
    tree = ast.parse(file.read_text())
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) and id(node) not in parts else None
        if isinstance(text, str) and METRIC.fullmatch(text):
            yield text


def test_every_metric_of_the_source_is_on_its_page() -> None:
    """Also those that only runs with vLLM log; names that are put together are in the tests of runs."""
    listed = {name for cells in rows("metrics.md") for name in code(cells[0])}
    named = {name for file in (ROOT / "lit_rlvr").rglob("*.py") for name in metric_names(file)}
    assert {"time/sync_s", "engine/retries", "time/wait_s", "rollout/lag_updates", "train/lr"} <= named
    assert sorted(named - listed) == []
