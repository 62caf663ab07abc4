"""What the documentation shows is true: its commands run, its code runs, its tables have what a run logs."""

from __future__ import annotations

import ast
import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from command_line import CONFIGS, QUICKSTART, cli, succeed
from rollouts import build_rollout, full_credit, random_credit, random_rollout
from test_credit_laws import TABLE, act

import lit_rlvr.cli  # noqa: F401  # before a snippet runs with another Trainer
from lit_rlvr.models import BUILTIN, TINY, resolve_model

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "callbacks/README.md", *sorted(DOCS.glob("*.md"))]
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
SMALL = ("--warmup=null", "--model.batch.prompts=4", "--model.batch.minibatch_prompts=2", "--data.eval_prompts=4")
NOT_HERE = ("qwen3_8b.yaml", "ddp.yaml", "smollm2.yaml", "wang2025.yaml", "deng2025.yaml")
"""Configurations that are only read: for GPUs, for several processes, for a large download."""
WITH_VLLM = {"time/sync_s", "engine/retries", "time/wait_s", "rollout/lag_updates"}
"""Metrics that only runs with vLLM log; test_docs_tables.py finds them in the source."""
PROGRAMS = {"make", "lit-rlvr", "cp", "mlflow", "pip", "source"}


@dataclass(frozen=True)
class Block:
    """A block of code on a page."""

    language: str
    text: str
    before: str

    @property
    def file(self) -> str | None:
        """The file that it shows: named in its first line, or at the end of the sentence before it."""
        found = re.match(r"# (\S+\.(?:py|yaml))\n", self.text) or re.search(r"`(\S+\.(?:py|yaml))`:\s*$", self.before)
        return found[1] if found else None


def blocks(page: Path) -> list[Block]:
    """All blocks of code, in order."""
    text = page.read_text()
    found = re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(match[1], match[2], text[: match.start()].rstrip()) for match in found]


def is_comparison(block: Block) -> bool:
    """Whether it is for ``lit-rlvr compare``; such are in test_compare.py."""
    return "arms" in yaml.safe_load(block.text)


def commands(block: Block) -> list[list[str]]:
    """The words of each command; what is put into the environment is left out."""
    lines = block.text.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [[w for i, w in enumerate(ws) if i or "=" not in w] for ws in words if ws]


def shell(page: Path) -> list[list[str]]:
    """All commands of a page."""
    return [command for block in blocks(page) if block.language == "bash" for command in commands(block)]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that looks like the repository's, with a run of one's own in it."""
    (tmp_path / "configs").symlink_to(CONFIGS)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    own_run = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    del own_run["trainer"]["callbacks"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(own_run))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


def write(block: Block, folder: Path) -> None:
    """Write the file that a block shows; a block of YAML without a name is ``my_run.yaml``."""
    name = block.file or ("my_run.yaml" if block.language == "yaml" else None)
    if name is not None and block.language in ("python", "yaml"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(block.text)


def tiny(command: list[str]) -> list[str]:
    """The arguments of a ``lit-rlvr`` command, made small."""
    arguments = command[1:]
    if arguments[0] == "compare":
        return [*arguments, "--dry_run"]
    if any(argument.endswith(NOT_HERE) for argument in arguments):
        return [*arguments, "--print_config"]
    untracked = [] if any("logger" in argument for argument in arguments) else ["--trainer.logger=false"]
    steps = 4 if any("ckpt_path" in argument for argument in arguments) else 2
    more = {
        "fit": [*SMALL, f"--trainer.max_steps={steps}", *untracked],
        "validate": ["--data.eval_prompts=4", *untracked],
        "test": ["--data.eval_prompts=4", *untracked],
        "warmup": ["--warmup.steps=2", "--warmup.lr_warmup=1"],
    }
    return [*arguments, *more.get(arguments[0], untracked)]


def run(command: list[str], folder: Path) -> None:
    """Run a ``lit-rlvr`` command, and look whether it did what it is for."""
    arguments = tiny(command)
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name == "--model.model" and value.startswith("runs/") and not (folder / value).exists():
            shutil.copytree(resolve_model(BUILTIN + TINY), folder / value)
    outcome = succeed(folder, *arguments)
    if "--print_config" in arguments:
        assert yaml.safe_load(outcome.out)["model"]["model"]
    elif arguments[0] == "fit":
        assert re.search(rf"seed \d+, {4 if '--ckpt_path' in str(arguments) else 2} optimiser steps", outcome.err)


@pytest.mark.slow
@EVERY_PAGE
def test_commands_run(page: Path, place: Path) -> None:
    """In the order of the page, with the files that it shows, in two optimiser steps each."""
    for block in blocks(page):
        write(block, place)
        for command in commands(block) if block.language == "bash" else []:
            if command[0] == "lit-rlvr":
                run(command, place)
            elif command[0] == "cp":
                assert command[1] == "-r"
                shutil.copytree(place / command[2], place / command[3])


@EVERY_PAGE
def test_only_known_programs_are_called_and_make_has_its_targets(page: Path) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in shell(page):
        assert command[0] in PROGRAMS, command
        assert command[0] != "make" or command[1] in targets, command


def test_the_pages_have_commands() -> None:
    """Else the test above would be about nothing."""
    every = [command for page in PAGES for command in shell(page)]
    assert {command[1] for command in every if command[0] == "lit-rlvr"} == {
        "fit", "validate", "test", "warmup", "explain", "doctor", "compare",
    }  # fmt: skip
    assert {"quickstart", "test"} <= {command[1] for command in every if command[0] == "make"}


@EVERY_PAGE
def test_python_runs(page: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In two optimiser steps, those of the warm start included."""

    class Small(pl.Trainer):
        def __init__(self, *args: Any, max_steps: int, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "max_steps": 2, "enable_progress_bar": False})

    monkeypatch.setattr(pl, "Trainer", Small)
    for block in blocks(page):
        if block.language == "python":
            names: dict[str, Any] = {"__name__": "block"}
            exec(compile(block.text, str(page), "exec", dont_inherit=True), names)
            if "trainer" in names:
                assert names["trainer"].global_step == 2


@EVERY_PAGE
def test_yaml_is_accepted(page: Path, place: Path) -> None:
    """Layered on the quickstart, every block makes a configuration."""
    for block in blocks(page):
        write(block, place)
    for number, block in enumerate(b for b in blocks(page) if b.language == "yaml" and not is_comparison(b)):
        folder = place / (Path(block.file).parent if block.file else ".")
        (folder / f"block_{number}.yaml").write_text(block.text)
        printed = succeed(place, "fit", *QUICKSTART, "--config", f"{folder}/block_{number}.yaml", "--print_config").out
        assert yaml.safe_load(printed)["trainer"]["callbacks"]


def test_the_callback_of_the_page_does_what_it_says(place: Path) -> None:
    """The last two tokens of three, the last two of two, the only one of one."""
    (code,) = [block.text for block in blocks(DOCS / "callbacks.md") if block.language == "python"]
    names: dict[str, Any] = {"__name__": "my_callbacks"}
    exec(code, names)
    rollout = build_rollout([[0.5] * 3, [0.5] * 2, [0.5]])
    credit = full_credit(rollout)
    after = names["LastTokens"](2).assign(credit, rollout, None)
    assert after.weight.tolist() == after.count.tolist() == [[0, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert torch.equal(after.advantage, credit.advantage)


def listed_metrics() -> list[str]:
    """The first column of the page's tables."""
    return re.findall(r"^\| `([^`]+)` \|", (DOCS / "metrics.md").read_text(), re.MULTILINE)


def logged_metrics(file: Path) -> set[str]:
    """Every name of which a CSV log holds a value."""
    with file.open() as rows:
        return {name for row in csv.DictReader(rows) for name, value in row.items() if value}


def test_the_page_of_metrics_lists_what_a_run_logs(tmp_path: Path) -> None:
    """Neither more nor less: a KL penalty and several rewards; a critic, bfloat16 and a penalty; one update; a test."""
    own, table = ROOT / "examples/own_problems/train.yaml", CONFIGS / "logger/csv.yaml"
    small = (*SMALL, "--trainer.max_steps=4", "--config", str(table), "--model.dynamic_sampling=null")
    succeed(
        tmp_path, "fit", *QUICKSTART, "--config", str(own), *small, "--model.kl.beta=0.1",
        "--trainer.val_check_interval=4", "--trainer.callbacks=StageDetector", "--trainer.default_root_dir=a",
        "--model.evaluations={several: {samples: 4, k: [2], max_new_tokens: 16}}",
    )  # fmt: skip
    succeed(
        tmp_path, "fit", *QUICKSTART, "--config", str(CONFIGS / "algorithm/ppo.yaml"), *small, "--warmup=null",
        "--model.dtype=bfloat16", "--trainer.callbacks=EntropyBonus", "--trainer.default_root_dir=b",
    )  # fmt: skip
    succeed(
        tmp_path, "fit", *QUICKSTART, *small, "--warmup=null", "--model.dtype=bfloat16", "--trainer.callbacks=[]",
        "--model.batch.minibatch_prompts=null", "--model.kl.beta=0.1", "--trainer.max_steps=1",
        "--trainer.default_root_dir=c",
    )  # fmt: skip
    succeed(
        tmp_path, "test", *QUICKSTART, "--config", str(table), "--data.eval_prompts=4", "--trainer.default_root_dir=t"
    )
    logged = {name for run in "abct" for name in logged_metrics(tmp_path / run / "metrics/version_0/metrics.csv")}
    general = {re.sub(r"^(val|test)/\w+/", r"\1/<way>/", name) for name in logged - {"step", "epoch"}}
    general = {re.sub(r"(mean|maj)_at_\d+", r"\1_at_<n>", name).replace("pass_at_2", "pass_at_<k>") for name in general}
    general = {re.sub(r"reward_(right|digits)$", "reward_<reward>", name) for name in general}
    listed = listed_metrics()
    assert len(listed) == len(set(listed))
    tested = {name.replace("test/", "val/") for name in general if name.startswith("test/")}
    assert tested == {f"val/<way>/{name}" for name in ("mean_at_<n>", "length", "truncated", "entropy")}
    of_callback = re.compile(r"credit/[A-Z]")
    of_run = {name for name in general if not name.startswith("test/") and not of_callback.match(name)}
    of_page = {name for name in listed if not of_callback.match(name)} - WITH_VLLM
    assert of_run | {"val/<way>/mean_at_<n>"} == of_page


def test_the_page_of_metrics_lists_what_callbacks_log() -> None:
    """Every class of the package, with every option of the law table, over some phases."""
    logged: set[str] = set()
    for entry in TABLE.values():
        for make in entry.active.values():
            callback = make()
            for step in range(4):
                rollout = random_rollout([4, 4], 8, seed=step)
                logged |= act(callback, rollout, random_credit(rollout, step), step=step).metrics.keys()
    assert {name for name in listed_metrics() if re.match(r"credit/[A-Z]", name)} == logged


def messages() -> list[str]:
    """Every text in the package's source, with … for what is filled in."""
    found: list[str] = []
    for file in [*(ROOT / "lit_rlvr").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[ds]", "…", node.value))
    return found


def test_the_messages_of_the_troubleshooting_page_exist() -> None:
    """Word for word."""
    headings = re.findall(r"^### (`+) ?(.+?) ?\1$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    texts = messages()
    assert len(headings) > 15
    assert [heading for _, heading in headings if not any(heading in text for text in texts)] == []


def test_a_command_of_the_troubleshooting_page_says_what_it_says(tmp_path: Path) -> None:
    """One of its messages, from end to end."""
    outcome = cli(tmp_path, "fit", *QUICKSTART, "--model.batch.minibatch_prompts=5")
    assert outcome.err == "lit-rlvr: error: batch.prompts=32 must be a multiple of batch.minibatch_prompts=5\n"
    assert "### `batch.prompts=… must be a multiple of batch.minibatch_prompts=…`" in (
        (DOCS / "troubleshooting.md").read_text()
    )


def test_links_lead_somewhere() -> None:
    """Those of the README; the site's are checked when it is built."""
    links = [x for x in re.findall(r"\]\((.*?)\)", (ROOT / "README.md").read_text()) if not x.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link.partition("#")[0]).exists()] == []


def test_every_page_is_in_the_navigation() -> None:
    """The builder leaves out a page without a word."""
    text = (ROOT / "mkdocs.yml").read_text()
    listed = re.findall(r": (\S+\.md)$", text, re.MULTILINE)
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """Broken links, unknown objects and bad docstrings are warnings, which are refused."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site/api/algorithm/index.html").read_text()
    assert "ClippedSurrogate" in page
    assert "Lower clip distance from 1." in page
    assert ":class:" not in (tmp_path / "site/api/models/index.html").read_text()
    assert list((tmp_path / "site").rglob("*.py")) == []
