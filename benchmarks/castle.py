"""Castle test accuracy of ``qtune finetune``, three seeds of two epochs, beside a bag of words on the same cards.

Then the command as it comes: wall time and peak memory.
"""

import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from datasets import Dataset, concatenate_datasets
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from qtune_companion.dracula import load_speeches

SEEDS = (0, 1, 2)


def bag_of_words(train: Dataset) -> float:
    """Percent right on the castle test, trained on the given speeches."""
    test = load_speeches("castle", "test")
    model = make_pipeline(TfidfVectorizer(), LogisticRegression(max_iter=2000))
    return 100 * model.fit(train["speech"], train["move"]).score(test["speech"], test["move"])


def finetune(*options: str) -> tuple[float, float, float]:
    """Percent right after training, seconds of the whole process, its peak in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "qtune_companion.cli", "finetune", *options]
        start = time.perf_counter()
        run = subprocess.run(
            [*command, "--output", str(Path(folder) / "adapter")],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        seconds = time.perf_counter() - start
    accuracy = float(re.search(r"after ([\d.]+)%", run.stdout)[1])
    return accuracy, seconds, float(re.search(r"peak of the process +([\d.]+)", run.stdout)[1])


def main() -> None:
    train, extra = load_speeches("castle", "train"), load_speeches("castle", "extra")
    both = concatenate_datasets([train, extra])
    print(f"bag of words: {bag_of_words(train):.1f} % from {len(train)} speeches,", end=" ")
    print(f"{bag_of_words(both):.1f} % from {len(both)}")
    after = []
    for seed in SEEDS:
        accuracy, seconds, peak = finetune("--epochs", "2", "--seed", str(seed))
        after.append(accuracy)
        print(f"seed {seed}: {accuracy:.1f} %, {seconds:.0f} s, peak {peak:.0f} MiB", flush=True)
    print(f"{statistics.mean(after):.1f} % ± {statistics.stdev(after):.1f} (mean ± sd of {len(SEEDS)} seeds)")
    accuracy, seconds, peak = finetune()
    print(f"as it comes: {accuracy:.1f} %, {seconds:.0f} s, peak {peak:.0f} MiB")
