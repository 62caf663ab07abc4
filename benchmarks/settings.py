"""What one side of a comparison is told."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from benchmarks.models import Size, dtype_on

MICRO_TOKENS = {"cpu": 1024, "cuda": 8192}
"""Our tokens per forward and backward pass; on a GPU so many that it is busy and the largest model fits into 80 GB."""


@dataclass(frozen=True)
class Settings:
    """One side.

    Args:
        folder: The model's folder.
        size: Architecture and work.
        device: ``cpu`` or ``cuda``.
        work: A whole ``step``; a ``rollout`` alone; or to ``train`` on responses that are there already.
        ends: Tokens that end a response.
        rho: Share of tokens that learn.
        select: Which of them do on our side, a word of ``EntropyTopK.select``.
        engine: More options of our engine.
        batch: More options of our batch.
        module: More options of our module.
        trl: Options of GRPOConfig.
    """

    folder: str
    size: Size
    device: str = "cpu"
    work: Literal["step", "rollout", "train"] = "step"
    ends: int = 0
    rho: float = 0.2
    select: Literal["random", "top"] = "random"
    engine: dict[str, Any] = field(default_factory=dict)
    batch: dict[str, Any] = field(default_factory=dict)
    module: dict[str, Any] = field(default_factory=dict)
    trl: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        """Of weights."""
        return dtype_on(self.device)

    @property
    def micro_tokens(self) -> int:
        """Our tokens per forward and backward pass."""
        return int(self.batch.get("micro_tokens", MICRO_TOKENS[self.device]))

    def written(self) -> str:
        """As JSON, for another process."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> Settings:
        """From JSON."""
        values = json.loads(text)
        return cls(**{**values, "size": Size(**values["size"])})


@dataclass(frozen=True)
class HeadSettings:
    """One way through the language-model head.

    Args:
        road: ``full`` logits, ``chunked`` log-probabilities, the ``selected`` loss, or the selected loss of ``every``
            token.
        vocabulary: Tokens.
        hidden: Width.
        tokens: Rows of hidden states.
        rho: Share of them that learns.
        device: ``cpu`` or ``cuda``.
    """

    road: Literal["full", "chunked", "selected", "every"]
    vocabulary: int
    hidden: int
    tokens: int
    rho: float = 0.2
    device: str = "cpu"

    def written(self) -> str:
        """As JSON, for another process."""
        return json.dumps(asdict(self))
