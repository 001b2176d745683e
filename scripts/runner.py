"""Executes a notebook in this very interpreter, and measures time and memory."""

import os
import threading
import time
from pathlib import Path
from typing import Any, cast

import psutil
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode
from tqdm import tqdm

from stored_output import readable_time


class PeakMemory(threading.Thread):
    """Samples the resident memory of a process and its children, and keeps the highest sum."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.process = psutil.Process(pid)
        self.peak_bytes = 0
        self.stopped = threading.Event()

    def run(self) -> None:
        """Sample twenty times a second until stopped or until the process is gone."""
        while not self.stopped.wait(0.05):
            try:
                tree = [self.process, *self.process.children(recursive=True)]
                self.peak_bytes = max(self.peak_bytes, sum(p.memory_info().rss for p in tree))
            except psutil.Error:
                continue

    def stop(self) -> float:
        """Stop sampling and return the peak in MB (10⁶ bytes)."""
        self.stopped.set()
        self.join()
        return self.peak_bytes / 1e6


class OwnKernel(AsyncKernelManager):
    """Starts this very interpreter as the kernel, whatever kernels the machine has installed."""

    def __init__(self, **options: Any) -> None:
        super().__init__(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]), **options)


class Runner(NotebookClient):
    """Executes a notebook, and measures time and memory."""

    def __init__(self, nb: NotebookNode, folder: Path, timeout: int, bar: tqdm) -> None:
        resources = {"metadata": {"path": str(folder)}}
        super().__init__(
            nb, kernel_manager_class=OwnKernel, timeout=timeout, resources=resources, record_timing=False
        )
        # A local kernel need not be told of TCP's risks.
        self.extra_arguments = ["--IPKernelApp.log_level=ERROR"]
        self.coalesce_streams = True
        self.bar = bar
        self.cell_number = 0
        self.took: dict[int, float] = {}  # seconds, by the number of the code cell
        self.on_cell_executed = self.note_seconds
        self.on_cell_start = self.note_cell
        self.memory: PeakMemory | None = None

    def note_cell(self, cell: NotebookNode, cell_index: int) -> None:
        """Remember which code cell runs, and start measuring with the first."""
        self.bar.n = cell_index
        self.bar.refresh()
        self.cell_number = sum(c.cell_type == "code" for c in self.nb.cells[: cell_index + 1])
        self.cell_start = time.perf_counter()
        if self.memory is None:
            self.memory = PeakMemory(cast(Any, self.km).provisioner.pid)
            self.memory.start()

    def note_seconds(self, cell: NotebookNode, cell_index: int, execute_reply: Any) -> None:
        """Remember how long the code cell took."""
        self.took[self.cell_number] = time.perf_counter() - self.cell_start

    def measure(self, scoreboard: Path) -> tuple[float, float]:
        """Execute every cell, rows of the scoreboard going to that file; return seconds and peak memory in MB."""
        start = time.perf_counter()
        try:
            self.execute(env={**os.environ, "QTUNE_SCOREBOARD": str(scoreboard)})
        finally:
            peak_mb = self.memory.stop() if self.memory else 0.0
        return time.perf_counter() - start, peak_mb

    def slowest(self, share: float = 0.1) -> str:
        """Return the code cells that took more than this share of the time, a line each: where to save."""
        code = [c.source.strip() for c in self.nb.cells if c.cell_type == "code"]
        total = sum(self.took.values())
        found = sorted(self.took.items(), key=lambda item: item[1], reverse=True)
        return "".join(
            f"\n  {readable_time(seconds)} in code cell {number}: {code[number - 1].splitlines()[0]}"
            for number, seconds in found
            if seconds > max(1, share * total)
        )
