"""Python runs this as it starts: SGLang's processes are to be there sooner, and to leave room.

Each of an engine's three imports some 5000 modules, and a quarter of that time was the garbage
collector's, which looks through all that stays; it goes on, less often. More than one thread gains
nothing on tiny models, and threads that wait for work keep other processes waiting.
"""

import gc
import os

gc.set_threshold(100_000)
os.environ["OMP_NUM_THREADS"] = "1"
