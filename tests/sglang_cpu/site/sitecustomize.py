"""Python runs this as it starts: SGLang's processes are to be there sooner.

Each of an engine's three imports some 5000 modules, and a quarter of that was the garbage
collector's, which looks through what stays. It still collects, but less often.
"""

import gc

gc.set_threshold(100_000)
