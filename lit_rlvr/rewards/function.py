"""A reward that the user writes: a Python function in a module or a file."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lit_rlvr.near import did_you_mean
from lit_rlvr.places import Place, existing_file
from lit_rlvr.rewards.base import Judgement, Reward

if TYPE_CHECKING:
    from lit_rlvr.tasks.base import Prompt

Value = str | bool | int | float | list[Any] | dict[str, Any] | None
"""Not Any: jsonargparse would read the text "#" as null."""

OFFERED = ("response", "answer", "question", "meta")
"""What a function may ask for by the names of its parameters."""


@dataclass(frozen=True)
class PythonFunction(Reward):
    """What a function of yours returns: a number, or True and False for 1 and 0.

    The function gets those of ``response``, ``answer``, ``question`` and ``meta`` that it has parameters for::

        def brevity(response: str, limit: int) -> float:
            return 1.0 if len(response) <= limit else 0.0

    It runs in a separate process. If it raises, or takes longer than the data module's ``verifier_timeout``, the
    response's whole reward is 0 and the failure is counted.

    Args:
        function: ``my_rewards.brevity``, from a module in the current folder or an installed one, or
            ``path/to/file.py:brevity``. In YAML a relative path starts at the folder of the YAML file.
        kwargs: Values for its other parameters.
        weight: Its factor in the sum of all rewards.

    Raises:
        ValueError: When there is no such function, or its parameters and ``kwargs`` do not fit.
    """

    function: Place
    kwargs: dict[str, Value] = field(default_factory=dict)
    weight: float = 1.0
    isolated = True

    def __post_init__(self) -> None:
        check_parameters(self.function, self._callable, self.kwargs)

    def __call__(self, prompt: Prompt, response: str) -> Judgement:
        offered = {"response": response, "answer": prompt.answer, "question": prompt.question, "meta": prompt.meta}
        value = self._callable(**{name: offered[name] for name in self._asked}, **self.kwargs)
        if not isinstance(value, Real):
            raise TypeError(f"{self.function} returned {type(value).__name__}, expected a bool, an int or a float")
        return Judgement(float(value))

    def __getstate__(self) -> dict[str, Any]:
        """Without the function, which another process loads itself, when its first answer comes."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @cached_property
    def _callable(self) -> Callable[..., Any]:
        return load(self.function)

    @cached_property
    def _asked(self) -> tuple[str, ...]:
        parameters = inspect.signature(self._callable).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        return tuple(name for name in OFFERED if takes_all or name in parameters)


def load(function: str) -> Callable[..., Any]:
    """The function that ``module.name`` or ``file.py:name`` stands for.

    Raises:
        ValueError: When there is none.
    """
    by_path = ":" in function
    where, _, name = function.rpartition(":" if by_path else ".")
    if not where or not name:
        raise ValueError(f"PythonFunction.function is {function!r}; write module.name, or path/to/file.py:name")
    module = module_of_file(where) if by_path else module_of_name(where)
    found = getattr(module, name, None)
    if found is None:
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"{where} has no function {name!r}{did_you_mean(name, own)}")
    if not callable(found):
        raise ValueError(f"{function} is of type {type(found).__name__}, not a function")
    return found  # type: ignore[no-any-return]


def module_of_name(name: str) -> ModuleType:
    """Import a module by its name."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ValueError(f"cannot import {name}: {error}") from error
        near = did_you_mean(name, (path.stem for path in Path().glob("*.py")))
        hint = near or f"; the folder {os.getcwd()} has no {error.name.split('.')[0]}.py, and it is not installed"
        raise ValueError(f"there is no module {error.name!r}{hint}") from error
    except Exception as error:  # whatever the user's module raises
        raise ValueError(f"cannot import {name}: {type(error).__name__}: {error}") from error


def module_of_file(path: str) -> ModuleType:
    """Run a Python file as a module, once per process; as for a script, modules beside it can be imported."""
    file = existing_file(path, [".py"]).resolve()
    name = f"{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file")
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        del sys.modules[name]
        raise ValueError(f"cannot run {path}: {type(error).__name__}: {error}") from error
    return module


def check_parameters(name: str, function: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse a function that could not be called.

    Raises:
        ValueError: Naming the parameter.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError) as error:
        raise ValueError(f"the parameters of {name} cannot be found out; wrap it in a function of your own") from error
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for key in kwargs:
        if key in OFFERED:
            raise ValueError(f"kwargs of {name} may not set {key!r}: it is filled in for every answer")
        if key not in named and not any(p.kind is p.VAR_KEYWORD for p in parameters):
            raise ValueError(f"{name} has no parameter {key!r}{did_you_mean(key, named)}")
    for p in parameters:
        if p.kind is p.POSITIONAL_ONLY:
            raise ValueError(f"parameter {p.name!r} of {name} cannot be filled by name; remove the / behind it")
        variadic = p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        if not variadic and p.default is p.empty and p.name not in (*OFFERED, *kwargs):
            raise ValueError(
                f"nothing fills parameter {p.name!r} of {name}{did_you_mean(p.name, OFFERED)}; "
                f"give it a value in kwargs, or use {', '.join(OFFERED[:-1])} and {OFFERED[-1]}, which are filled in"
            )
