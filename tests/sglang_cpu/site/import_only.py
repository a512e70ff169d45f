"""Packages that can be imported, and decorated with, and nothing else: triton, torchvision."""

import importlib.abc
import importlib.machinery
import sys
import types


class _AnyClass(type):
    """A class whose attributes are itself, so that annotations and bases can be evaluated."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class Anything(metaclass=_AnyClass):
    """Stands for every class."""

    def __init__(self, *args, **kwargs):
        pass

    def __class_getitem__(cls, item):
        return cls


def decorator(*args, **kwargs):
    """Both `@jit` and `@jit(...)`: leaves the function as it is."""
    if len(args) == 1 and callable(args[0]) and not kwargs:
        return args[0]
    return lambda function: function


def attribute(name):
    """What a module gives for a name that it does not have."""
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything if name[:1].isupper() else decorator


class _Submodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, package):
        self._prefix = f"{package}."

    def find_spec(self, name, path=None, target=None):
        if name.startswith(self._prefix):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = attribute
        return module

    def exec_module(self, module):
        pass


def any_submodule_of(package):
    """Let `import package.anything.at.all` succeed."""
    sys.meta_path.insert(0, _Submodules(package))
