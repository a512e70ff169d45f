"""FastRL: reinforcement learning of reasoning LLMs, fast, by lossless speculative rollouts."""

import os
from importlib.metadata import version

# OpenMP threads that wait by spinning use up their share of a core: where anything else runs too,
# a decode step of many small operations becomes up to a hundred times slower (docs/log.md). It is
# read when torch is loaded, so it is set here, unless the user has set it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = version("fastrl")
