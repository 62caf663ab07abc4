"""The worked example of ``callbacks/README.md`` runs as it stands there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import lit_rlvr_callbacks
import pytest
import torch
import yaml
from rollouts import build_rollout, full_credit, random_credit, random_rollout, run_chain, run_ranks

from lit_rlvr.credit import CreditCallback, CreditContext, credit_chain, describe_chain

README = (Path(__file__).parents[1] / "callbacks/README.md").read_text()


def blocks(language: str) -> list[str]:
    """The code blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def entries(block: str) -> list[dict[str, Any]]:
    """The callbacks of a YAML block."""
    (callbacks,) = yaml.safe_load(block)["trainer"].values()
    return list(callbacks)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a callback from its YAML entry, with the example's file in a folder on the path."""
    (code,) = blocks("python")
    (tmp_path / "my_callbacks.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(importlib.sys.modules, "my_callbacks", raising=False)  # type: ignore[attr-defined]

    def from_entry(entry: dict[str, Any]) -> CreditCallback:
        module, _, name = entry["class_path"].rpartition(".")
        cls = getattr(importlib.import_module(module) if module else lit_rlvr_callbacks, name)
        callback: CreditCallback = cls(**entry.get("init_args", {}))
        return callback

    return from_entry


def test_the_example_does_what_it_says(make: Any) -> None:
    """Of responses of 12, 11 and 13 tokens, the second learns nothing."""
    (entry,) = entries(blocks("yaml")[1])
    callback = make(entry)
    assert entry["class_path"] == "my_callbacks.LongAnswers"
    rollout = build_rollout([[0.5] * 12, [0.5] * 11, [0.5] * 13])
    credit, ctx = full_credit(rollout), CreditContext()
    after = run_chain(credit_chain([callback]), rollout, credit, ctx)
    assert after.weight.sum(-1).tolist() == [12, 0, 13]
    assert after.count.sum(-1).tolist() == [12, 0, 13]
    assert torch.equal(after.advantage, credit.advantage)
    assert ctx.metrics == {"credit/LongAnswers/long_share": pytest.approx(2 / 3)}


def test_the_example_keeps_the_laws(make: Any) -> None:
    """Two ranks log what one process logs; the shortest limit is the identity."""
    (entry,) = entries(blocks("yaml")[1])
    rollout = random_rollout([3, 4], 20, seed=0)
    credit = random_credit(rollout, seed=0)
    callback, whole = make(entry), CreditContext()
    after = run_chain([callback], rollout, credit, whole)
    rows = [
        torch.tensor([i for i, d in enumerate(rollout.group.tolist()) if (d == rollout.group[0]) == r]) for r in (0, 1)
    ]

    def rank(reduce: Any) -> dict[str, float]:
        mine, ctx = rows[reduce.rank], CreditContext(reduce=reduce)
        part = run_chain([callback], rollout.rows(mine), credit.rows(mine), ctx)
        assert torch.equal(part.weight, after.weight[mine])
        return ctx.metrics

    assert run_ranks(2, rank) == [whole.metrics] * 2
    assert 0 < whole.metrics["credit/LongAnswers/long_share"] < 1
    entry["init_args"]["tokens"] = 1
    assert torch.equal(run_chain([make(entry)], rollout, credit, CreditContext()).weight, credit.weight)


def test_the_list_of_the_order_section_makes_its_chain(make: Any) -> None:
    """The YAML list is a chain that goes together, and its one line stands in the text."""
    chain = credit_chain([make(entry) for entry in entries(blocks("yaml")[0])])
    assert f"`{describe_chain(chain)}`" in README
    rollout = random_rollout([4], 6, seed=0)
    run_chain(chain, rollout, full_credit(rollout), CreditContext())


def test_links_lead_somewhere() -> None:
    """Relative links name files of the repository."""
    links = [link for link in re.findall(r"\]\((.*?)\)", README) if not link.startswith("https://")]
    assert links
    assert [link for link in links if not (Path(__file__).parents[1] / "callbacks" / link).is_file()] == []
