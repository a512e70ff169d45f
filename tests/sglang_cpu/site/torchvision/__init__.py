"""Satisfies `import torchvision` in SGLang's image processors.

The real package has to match how torch was built, which differs between package indexes.
"""

import importlib

import import_only

__version__ = "0.28.0"

import_only.any_submodule_of("torchvision")


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    if name[:1].isupper():
        return import_only.Anything
    return importlib.import_module(f"torchvision.{name}")
