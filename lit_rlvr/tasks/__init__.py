"""Tasks: a task knows its problems and how to score an answer. Importing this package does not import torch."""

from lit_rlvr.tasks.base import Prompt, Score, Split, Task
from lit_rlvr.tasks.columns import ProblemSet
from lit_rlvr.tasks.files import ProblemFiles
from lit_rlvr.tasks.last_digit import LastDigitArithmetic
from lit_rlvr.tasks.reasoning_gym import ReasoningGym
from lit_rlvr.tasks.resolve import resolve_task

__all__ = [
    "LastDigitArithmetic",
    "ProblemFiles",
    "ProblemSet",
    "Prompt",
    "ReasoningGym",
    "Score",
    "Split",
    "Task",
    "resolve_task",
]
