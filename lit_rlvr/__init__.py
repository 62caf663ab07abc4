"""lit-rlvr: reinforcement learning with verifiable rewards, where deciding which tokens learn is a callback.

Names are imported on first use, so that ``lit-rlvr --help`` and verifier processes do not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    __version__ = version("lit-rlvr")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

_HOME = {
    "Batch": "settings",
    "CreditCallback": "credit",
    "CreditContext": "credit",
    "Credit": "types",
    "Evaluation": "settings",
    "Prompt": "tasks",
    "RLVRDataModule": "data",
    "RLVRModule": "module",
    "RolloutBatch": "types",
    "Sampling": "engines",
    "Score": "tasks",
    "Task": "tasks",
    "Template": "data",
    "Warmup": "warmup",
}

if TYPE_CHECKING:
    from lit_rlvr.credit import CreditCallback as CreditCallback
    from lit_rlvr.credit import CreditContext as CreditContext
    from lit_rlvr.data import RLVRDataModule as RLVRDataModule
    from lit_rlvr.data import Template as Template
    from lit_rlvr.engines import Sampling as Sampling
    from lit_rlvr.module import RLVRModule as RLVRModule
    from lit_rlvr.settings import Batch as Batch
    from lit_rlvr.settings import Evaluation as Evaluation
    from lit_rlvr.tasks import Prompt as Prompt
    from lit_rlvr.tasks import Score as Score
    from lit_rlvr.tasks import Task as Task
    from lit_rlvr.types import Credit as Credit
    from lit_rlvr.types import RolloutBatch as RolloutBatch
    from lit_rlvr.warmup import Warmup as Warmup


__all__ = [
    "Batch",
    "Credit",
    "CreditCallback",
    "CreditContext",
    "Evaluation",
    "Prompt",
    "RLVRDataModule",
    "RLVRModule",
    "RolloutBatch",
    "Sampling",
    "Score",
    "Task",
    "Template",
    "Warmup",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"lit_rlvr.{_HOME[name]}"), name)
    raise AttributeError(f"module 'lit_rlvr' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*_HOME, "__version__"]
