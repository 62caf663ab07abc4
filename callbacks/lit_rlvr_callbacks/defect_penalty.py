"""Punish defective responses: repetition, many boxes, runs of one character, mixed scripts."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from lit_rlvr.credit import CreditCallback, CreditContext
from lit_rlvr.reduce import mean
from lit_rlvr.schedule import Schedule, at, ends
from lit_rlvr.types import Credit, RolloutBatch

KINDS = ("repetition", "boxes", "run", "scripts")
CJK = re.compile("[\u4e00-\u9fff]")


class DefectPenalty(CreditCallback):
    """Subtract ``cost`` from the reward of a response that has a defect of any kind, and count each kind.

    The kinds are: ``repetition``, the share of three-word sequences that stood in the response before; ``boxes``,
    occurrences of ``boxed{``; ``run``, one character repeated; ``scripts``, Chinese characters in the response to a
    prompt without any. Their shares are logged for all responses, and for those with positive and with negative
    advantage; with ``cost: 0`` that is all it does.

    Source: the rules and thresholds are those of the released code of Deng et al. 2025 (arXiv 2508.02260), which uses
    them to analyse; words are what white space separates. The penalty is this project's own.

    Args:
        cost: What a defect costs, constant or scheduled; a response with several is punished once.
        repetition: Share of repeated three-word sequences above which a response is defective; null: not looked at.
        boxes: Occurrences of ``boxed{`` that make a defect; null: not looked at.
        run: Repetitions of one character that make a defect; null: not looked at.
        scripts: Whether mixed scripts are a defect.
        stages: Punish only in these stages.
        name: Name in logs and checkpoints.

    Raises:
        ValueError: For a negative ``cost`` or a threshold that every response would reach.
    """

    token_level = False

    def __init__(
        self,
        cost: Schedule | float = 1.0,
        repetition: float | None = 0.35,
        boxes: int | None = 5,
        run: int | None = 500,
        scripts: bool = True,
        stages: list[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(stages, name)
        if min(ends(cost)) < 0:
            raise ValueError(f"DefectPenalty.cost is subtracted and must be >= 0, got {cost}")
        low = (repetition is not None and repetition < 0) or (boxes is not None and boxes < 1)
        if low or (run is not None and run < 2):
            raise ValueError(
                f"DefectPenalty needs repetition >= 0, boxes >= 1 and run >= 2, got {repetition}, {boxes} and {run}"
            )
        self.cost, self.repetition, self.boxes, self.run, self.scripts = cost, repetition, boxes, run, scripts
        self._found = torch.zeros(0, len(KINDS), dtype=torch.bool)

    def observe(self, rollout: RolloutBatch, ctx: CreditContext) -> None:
        questions = [p.question for p in rollout.prompts] or [""] * len(rollout)
        found = [self.defects(text, question) for text, question in zip(rollout.texts, questions, strict=True)]
        self._found = torch.tensor(found, dtype=torch.bool).view(len(rollout), len(KINDS))
        self._log(ctx, "", torch.ones(len(rollout), dtype=torch.bool))

    def shape_rewards(self, rollout: RolloutBatch, rewards: Tensor, ctx: CreditContext) -> Tensor:
        if isinstance(self.cost, Schedule):
            ctx.log("cost", at(self.cost, ctx))
        return rewards - at(self.cost, ctx) * self._found.any(-1).to(rewards)

    def assign(self, credit: Credit, rollout: RolloutBatch, ctx: CreditContext) -> Credit:
        advantage = (credit.advantage * rollout.response_mask).sum(-1)
        self._log(ctx, "_positive", advantage > 0)
        self._log(ctx, "_negative", advantage < 0)
        return credit

    def defects(self, text: str, question: str = "") -> list[bool]:
        """Which of :data:`KINDS` a response has."""
        return [
            self.repetition is not None and repeated_share(text) > self.repetition,
            self.boxes is not None and text.count("boxed{") >= self.boxes,
            self.run is not None and re.search(rf"(.)\1{{{self.run - 1},}}", text, re.DOTALL) is not None,
            self.scripts and CJK.search(text) is not None and CJK.search(question) is None,
        ]

    def _log(self, ctx: CreditContext, which: str, rows: Tensor) -> None:
        for kind, found in zip(KINDS, self._found.T, strict=True):
            ctx.log(kind + which, mean(ctx.reduce, found[rows]))


def repeated_share(text: str) -> float:
    """Share of three-word sequences that stood in the text before.

    >>> repeated_share("a b c a b c a b c"), repeated_share("a b")
    (0.5714285714285714, 0.0)
    """
    words = text.split()
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0
