"""What is looked for in a model and asked for in every step.

A 7B with adapters has 2,700 modules. To walk through them takes milliseconds, several times a step,
while a GPU has nothing to do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

T = TypeVar("T")


class Remembered(Generic[T]):
    """A function of a model whose answers are remembered, for as long as the model lives."""

    def __init__(self, find: Callable[[nn.Module], T]):
        """Remember what ``find`` returns, which must not refer to the model itself."""
        self._find = find
        self._found: WeakKeyDictionary[nn.Module, T] = WeakKeyDictionary()

    def __call__(self, model: nn.Module) -> T:
        """Return what is found in ``model``."""
        if model not in self._found:
            self._found[model] = self._find(model)
        return self._found[model]

    def forget(self) -> None:
        """Look again: to be called by whatever changes the parts that are looked for."""
        self._found.clear()
