"""Short names for tasks, so that YAML can say ``task: last_digit_arithmetic`` or ``task: reasoning_gym:chain_sum``."""

from __future__ import annotations

from lit_rlvr.near import did_you_mean
from lit_rlvr.tasks.base import Task
from lit_rlvr.tasks.last_digit import LastDigitArithmetic
from lit_rlvr.tasks.reasoning_gym import ReasoningGym


def resolve_task(task: Task | str) -> Task:
    """Return ``task``, or the task that its short name stands for.

    Raises:
        ValueError: For an unknown name.

    >>> resolve_task("last_digit_arithmetic")
    LastDigitArithmetic(seed=0)
    """
    if isinstance(task, Task):
        return task
    name, _, rest = task.partition(":")
    if name == "last_digit_arithmetic" and not rest:
        return LastDigitArithmetic()
    if name == "reasoning_gym" and rest:
        return ReasoningGym(rest)
    known = ["last_digit_arithmetic", "reasoning_gym:NAME", "LastDigitArithmetic", "ReasoningGym"]
    alike = [word for word in known if ("_" in word) == ("_" in task)]
    hint = (
        did_you_mean(task, alike)
        or f"; known are {', '.join(known[:2])}, or a class_path; ProblemFiles reads files and the hub"
    )
    raise ValueError(f"there is no task {task!r}{hint}")
