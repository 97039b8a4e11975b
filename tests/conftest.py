"""Settings of all tests: one thread per process, as models are tiny and some tests start two."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
