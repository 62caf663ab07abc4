"""Sample rollouts as pages to look at: every token coloured by its entropy, the ones that learn underlined."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lit_rlvr.loggers import log_rollouts, others
from lit_rlvr.phase import Phase
from lit_rlvr.tracking import MLflow, mlflow_loggers

STYLE = """body{font:15px/1.6 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem}
.r{border-top:1px solid #ccc;padding:.6rem 0}.q{color:#666;white-space:pre-wrap}.t{white-space:pre-wrap;
font-family:ui-monospace,monospace}.k{border-bottom:2px solid #06c}.ok{color:#070}.no{color:#a00}"""


class RolloutPages(Callback):
    """Writes a few rollouts of every ``every``-th phase as JSON lines and as an HTML page, and stores them in MLflow.

    TensorBoard and Weights & Biases get their texts.
    In the page a token's background is its entropy (white: none, red: the phase's highest), and tokens that learn are
    underlined. Pages of an earlier run in the same folder are deleted, as its policy and report are replaced; a resumed
    run keeps those of the phases before it.

    Args:
        every: Rollout phases between two pages.
        groups: Prompts per page.

    Raises:
        ValueError: When a number is below 1.
    """

    def __init__(self, every: int = 10, groups: int = 4) -> None:
        if every < 1 or groups < 1:
            raise ValueError(f"RolloutPages.every and groups must be at least 1, got {every} and {groups}")
        self.every, self.groups = every, groups

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir) / "rollouts"
        first = trainer.global_step // pl_module.batch.steps_per_phase
        for file in folder.glob("phase_*"):
            number = file.stem.removeprefix("phase_")
            if number.isdigit() and int(number) >= first:
                file.unlink()
        if folder.is_dir():
            write_index(folder)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        phase = pl_module.phase
        if batch.minibatch or batch.phase % self.every or not trainer.is_global_zero or not len(phase.rollout):
            return
        rows = rollout_rows(phase, pl_module.tokenizer, self.groups)
        folder = Path(trainer.default_root_dir) / "rollouts"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"phase_{phase.number:06d}"
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        (folder / f"{name}.html").write_text(page(rows, phase.number), encoding="utf-8")
        write_index(folder)
        for logger in mlflow_loggers(trainer):
            logger.log_text(lines, f"rollouts/{name}.jsonl")
            logger.log_text(page(rows, phase.number), f"rollouts/{name}.html")
        log_rollouts(others(trainer, MLflow), rows, trainer.global_step)


def write_index(folder: Path) -> None:
    """The page that links to all others."""
    pages = sorted(p.name for p in folder.glob("phase_*.html"))
    links = "".join(f'<li><a href="{p}">{p.removesuffix(".html").replace("_", " ")}</a></li>' for p in pages)
    text = f"<meta charset=utf-8><style>{STYLE}</style><h1>Rollouts</h1><ul>{links}</ul>"
    (folder / "index.html").write_text(text, encoding="utf-8")


def rollout_rows(phase: Phase, tokenizer: Any, groups: int) -> list[dict[str, Any]]:
    """The first groups of a phase as plain values, one dict per response."""
    rollout, credit = phase.rollout, phase.credit
    wanted = set(rollout.group.unique().tolist()[:groups])
    rows = []
    for i in range(len(rollout)):
        if int(rollout.group[i]) not in wanted:
            continue
        length = int(rollout.lengths[i])
        prompt = rollout.prompts[i]
        rows.append({
            "uid": rollout.uid[i].tolist(), "question": prompt.question, "answer": prompt.answer,
            "response": rollout.texts[i], "reward": float(rollout.rewards[i]), "correct": bool(rollout.correct[i]),
            "advantage": [round(x, 4) for x in credit.advantage[i, :length].tolist()],
            "weight": [round(x, 4) for x in credit.weight[i, :length].tolist()],
            "entropy": [round(x, 4) for x in rollout.entropies[i, :length].tolist()],
            "tokens": [tokenizer.decode([t]) for t in rollout.response_ids[i, :length].tolist()],
        })  # fmt: skip
    return rows


def page(rows: list[dict[str, Any]], number: int) -> str:
    """The HTML page of a phase."""
    highest = max((e for row in rows for e in row["entropy"]), default=0.0) or 1.0
    body = "".join(_response(row, highest) for row in rows)
    return (
        f"<!doctype html><meta charset=utf-8><title>phase {number}</title><style>{STYLE}</style>"
        f"<h1>Rollouts of phase {number}</h1><p>Background: entropy of the token's distribution, up to {highest:.2f} "
        f'nats. <span class="k">Underlined</span>: the token learns. Hover for numbers.</p>{body}'
    )


def _response(row: dict[str, Any], highest: float) -> str:
    columns = (row["tokens"], row["entropy"], row["advantage"], row["weight"])
    spans = "".join(
        f'<span class="{"k" if weight and advantage else ""}" title="entropy {entropy:.3f}, advantage {advantage:.2f}" '
        f'style="background:rgba(220,60,0,{entropy / highest:.2f})">{html.escape(token)}</span>'
        for token, entropy, advantage, weight in zip(*columns, strict=True)
    )
    mark = '<b class="ok">right</b>' if row["correct"] else '<b class="no">wrong</b>'
    return (
        f'<div class="r"><div class="q">{html.escape(row["question"])}</div><div class="t">{spans}</div>'
        f"<small>{mark}, reward {row['reward']:.2f}, answer {html.escape(str(row['answer']))}</small></div>"
    )
