"""Settings of all tests."""

import os

# `make test` runs as many workers at once as pytest-xdist is told; each takes its share of the processor's cores.
# To be set before torch is imported; the notebooks' own processes inherit it.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))
