"""``qtune finetune`` on the castle speeches with three seeds: accuracy, wall time, peak memory."""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SEEDS = (0, 1, 2)


def main():
    after = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "qtune_companion.cli", "finetune", "--seed", str(seed)]
            start = time.perf_counter()
            run = subprocess.run(
                [*command, "--output", str(Path(folder) / "adapter")],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            seconds = time.perf_counter() - start
        line = next(line for line in run.stdout.splitlines() if line.startswith("Accuracy"))
        after.append(float(line.split("after ")[1].split("%")[0]))
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )
        print(
            f"seed {seed}: {line}; whole process {seconds:.0f} s, peak so far {peak / 2**30:.2f} GiB",
            flush=True,
        )
    print(
        f"accuracy {statistics.mean(after):.1f} % ± {statistics.stdev(after):.1f} (mean ± sd of {len(SEEDS)} seeds)"
    )
