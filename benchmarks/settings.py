"""What one side of a comparison is told."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.models import Size


@dataclass(frozen=True)
class Settings:
    """One side.

    Args:
        folder: The model's folder.
        size: Architecture and work.
        device: ``cpu`` or ``cuda``.
        rho: Share of tokens that learn, those of highest entropy.
        micro_tokens: Our tokens per forward and backward pass.
        engine: More options of our engine.
        module: More options of our module.
        trl: Options of GRPOConfig.
    """

    folder: str
    size: Size
    device: str = "cpu"
    rho: float = 0.2
    micro_tokens: int = 1024
    engine: dict[str, Any] = field(default_factory=dict)
    module: dict[str, Any] = field(default_factory=dict)
    trl: dict[str, Any] = field(default_factory=dict)

    def written(self) -> str:
        """As JSON, for another process."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> Settings:
        """From JSON."""
        values = json.loads(text)
        return cls(**{**values, "size": Size(**values["size"])})
