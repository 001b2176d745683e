"""Accuracy of ``qtune finetune`` on the castle's test and on its fresh cards, three seeds, beside a bag of words.

Both learn from the same cards. Then the command as it comes, and with two passes: also wall time and peak memory.
"""

import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from datasets import concatenate_datasets
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from qtune_companion.dracula import load_speeches

SEEDS = (0, 1, 2)
CARDS = "train+families"
SPLITS = ("train", "train+extra", CARDS, "train+extra+families")
EPOCHS = "3"


def bag_of_words(names: str) -> tuple[float, float]:
    """Percent right on the castle's test and on its fresh cards, trained on the named splits."""
    train = concatenate_datasets([load_speeches("castle", split) for split in names.split("+")])
    model = make_pipeline(TfidfVectorizer(), LogisticRegression(max_iter=2000))
    model.fit(train["speech"], train["move"])
    judged = [load_speeches("castle", split) for split in ("test", "fresh")]
    test, fresh = [100 * model.score(rows["speech"], rows["move"]) for rows in judged]
    return test, fresh


def qtune(*arguments: str) -> tuple[str, float]:
    """What the command wrote, and seconds of the whole process."""
    start = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-m", "qtune_companion.cli", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return run.stdout, time.perf_counter() - start


def number(pattern: str, text: str) -> float:
    """The first group of a pattern in a text, as a number."""
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"{pattern!r} is not in the output: {text!r}")
    return float(found[1])


def finetune(*options: str) -> tuple[float, float, float, float]:
    """Percent right on test and fresh cards after training, seconds of the training's process, its peak in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        adapter = str(Path(folder) / "adapter")
        said, seconds = qtune("finetune", *options, "--output", adapter)
        judged, _ = qtune("evaluate", "--adapter", adapter, "--scheme", "nf4-dq", "--split", "fresh")
    test, peak = number(r"after ([\d.]+)%", said), number(r"peak of the process +([\d.]+)", said)
    return test, number(r"Accuracy ([\d.]+)%", judged), seconds, peak


def main() -> None:
    for names in SPLITS:
        test, fresh = bag_of_words(names)
        print(f"bag of words on {names}: test {test:.1f} %, fresh {fresh:.1f} %")
    after = []
    for seed in SEEDS:
        *hits, seconds, peak = finetune("--train-on", CARDS, "--epochs", EPOCHS, "--seed", str(seed))
        after.append(hits)
        print(
            f"seed {seed}: test {hits[0]:.1f} %, fresh {hits[1]:.1f} %, {seconds:.0f} s, peak {peak:.0f} MiB",
            flush=True,
        )
    for name, column in zip(("test", "fresh"), zip(*after, strict=True), strict=True):
        print(
            f"{name}: {statistics.mean(column):.1f} % ± {statistics.stdev(column):.1f} (mean ± sd of {len(SEEDS)} seeds)"
        )
    for name, options in {"as it comes": (), "two passes": ("--epochs", "2")}.items():
        test, fresh, seconds, peak = finetune(*options)
        print(
            f"{name}: test {test:.1f} %, fresh {fresh:.1f} %, {seconds:.0f} s, peak {peak:.0f} MiB",
            flush=True,
        )
