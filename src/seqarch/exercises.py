"""What exercise cells need: checks that tell a reader what is wrong and never stop the notebook."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch


class Exercise:
    """A check with a name. Call it on an answer to print a verdict; `verify` raises instead."""

    def __init__(self, name: str, check: Callable[[Callable], None]):
        self.name, self.check = name, check
        self.__doc__ = check.__doc__

    def __call__(self, answer: Callable) -> None:
        """Print whether `answer` is not attempted, correct, or what is wrong with it."""
        print(f"{self.name}: {self.verdict(answer)}")

    def verdict(self, answer: Callable) -> str:
        """Return the verdict as text. Each check starts from the same random numbers."""
        if is_untouched(answer):
            return "not attempted yet"
        try:
            self._run(answer)
        except NotImplementedError:
            return "not attempted yet"
        except AssertionError as problem:
            return f"not yet: {str(problem).strip().splitlines()[0] if str(problem).strip() else 'a check failed'}"
        except Exception as problem:  # a reader's bug is a result, not a crash
            return f"not yet: it raised {type(problem).__name__}: {problem}"
        return "correct"

    def verify(self, answer: Callable) -> None:
        """Run the check on a solution: raises AssertionError when it is wrong."""
        if is_untouched(answer):
            raise AssertionError(f"{self.name}: expected an answer, got an empty function")
        self._run(answer)
        print(f"{self.name}: the solution passes every check")

    def _run(self, answer: Callable) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.check(answer)


def exercise(name: str) -> Callable[[Callable], Exercise]:
    """Turn a function of assertions on an answer into an `Exercise`::

    @exercise("Exercise 1, Elman step")
    def check_elman_step(answer):
        assert answer(...) == ..., "what a reader should hear"
    """
    return lambda check: Exercise(name, check)


def is_untouched(answer: Callable) -> bool:
    """Whether a function still has the body it was handed out with: a docstring, ``...``, ``pass`` or nothing else."""
    if inspect.isclass(answer):
        return all(is_untouched(f) for f in vars(answer).values() if inspect.isfunction(f))
    code = getattr(answer, "__code__", None)
    if code is None or code.co_consts not in ((None,), (answer.__doc__, None)):
        return False
    return code.co_code in {f.__code__.co_code for f in (_empty, _empty_with_docstring)}


def _empty(): ...


def _empty_with_docstring():
    """An answer that nobody has begun."""
