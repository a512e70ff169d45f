"""Satisfies `import triton` and what stands at the top of modules; runs no kernel.

The real package is a gigabyte. A kernel that is launched all the same fails: it is a plain Python
function here, which cannot be subscripted with a grid.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types

__version__ = "3.5.0"


class _AnyClass(type):
    """A class whose attributes are itself, so that annotations and bases can be evaluated."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class _Anything(metaclass=_AnyClass):
    def __init__(self, *args, **kwargs):
        pass

    def __class_getitem__(cls, item):
        return cls


def _decorator(*args, **kwargs):
    """Both `@jit` and `@jit(...)`: leaves the function as it is."""
    if len(args) == 1 and callable(args[0]) and not kwargs:
        return args[0]
    return lambda function: function


class constexpr:  # noqa: N801  (triton's name)
    def __init__(self, value=None):
        self.value = value


class _Submodule(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything if name[:1].isupper() else _decorator


class _Submodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.startswith("triton."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = _Submodule(spec.name)
        module.constexpr = constexpr
        return module

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, _Submodules())

jit = autotune = heuristics = _decorator
Config = _Anything


def cdiv(numerator, denominator):
    return -(numerator // -denominator)


def next_power_of_2(number):
    return 1 << (number - 1).bit_length()


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Anything if name[:1].isupper() else importlib.import_module(f"triton.{name}")
