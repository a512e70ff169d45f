"""Hooks of FastRL's plugin in SGLang's functions, and whether they are in force.

SGLang applies hooks when it has loaded its plugins, and only logs what fails then: a function that
another version calls otherwise would go on without its hook. So those that were asked for are noted
here, and looked for in the functions as they are (`not_in_force`); the trainer asks for that after
the start (sglang_host.py). Imports SGLang where it is called.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator
from typing import Any, Literal

Hook = Callable[..., Any]

_asked_for: list[tuple[str, Hook]] = []


def hook_in(target: str, hook: Hook, kind: Literal["before", "after", "around"]) -> None:
    """Have SGLang call the hook before, after or in place of a function of its own, of which
    `target` is the whole name, in every process that loads the plugin."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(target, hook, HookType(kind))
    _asked_for.append((target, hook))


def not_in_force() -> list[str]:
    """The targets whose functions do not call the hook that was asked for."""
    return [target for target, hook in _asked_for if not _calls(_found(target), hook)]


def _found(target: str) -> Any:
    try:
        return pkgutil.resolve_name(target)
    except (ImportError, AttributeError):
        return None  # this version has no such function


def _calls(function: Any, hook: Hook) -> bool:
    return any(
        cell.cell_contents == hook
        for layer in _layers(function)
        for cell in layer.__closure__ or ()
    )


def _layers(function: Any) -> Iterator[Any]:
    """The function as it is called, and what it wraps: SGLang's wrappers, the original inmost."""
    function = getattr(function, "__func__", function)
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)
