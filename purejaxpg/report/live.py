"""The page of a sweep while it runs, written again and again by a thread of its own.

The thread reads the result directory as any reader does, and adds the metrics of the batch that is
in progress. It never delays the sweep: the computation waits for nothing here, and a page that
cannot be written is mentioned once.
"""

import concurrent.futures
import threading
import time
from pathlib import Path

from purejaxpg import contract, disk, signals
from purejaxpg.report import analysis, page, writer
from purejaxpg.sweep import progress as progresses
from purejaxpg.sweep import stages
from purejaxpg.text import first_line

FIRST_S = 10.0  # until the first page; a sweep that is shorter has only the last one
EVERY_S = 20.0  # between two pages, at least
SHARE = 50.0  # writing takes at most 1 / SHARE of the time of a core
INTERRUPTED_S = 0.5  # that an interrupted sweep waits for a page


class Page:
    """The page of one result directory, and that of its pipeline if it is a stage."""

    def __init__(self, directory: Path, progress: progresses.Progress) -> None:
        """Write DIR/report/index.html about what `progress` knows, inside a `with` block."""
        self.directory, self.progress = directory, progress
        self.stop = threading.Event()
        self.cost_s = 0.0  # CPU time of the last page
        self.written = self.failed = False

    def __enter__(self) -> "Page":
        """Start the thread."""
        self.thread = signals.in_background(self.run)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Stop the thread; an interrupted sweep does not wait for it."""
        self.stop.set()
        concurrent.futures.wait([self.thread], INTERRUPTED_S if kind else None)

    @property
    def every_s(self) -> float:
        """Seconds between two pages."""
        return max(EVERY_S, SHARE * self.cost_s)

    def run(self) -> None:
        """Write pages until the sweep ends."""
        wait_s = FIRST_S
        while not self.stop.wait(wait_s):
            began = time.thread_time()
            try:
                self.write()
                self.tell(f"The page shows the sweep while it runs: {self.target}", "written")
            except Exception as error:  # any failure: the results are safe, and the sweep goes on
                note = (
                    f"Note: the page cannot be written while the sweep runs: {first_line(error)}."
                )
                self.tell(note, "failed")
            if wait_s != FIRST_S:  # the first page also imports what draws it
                self.cost_s = time.thread_time() - began
            wait_s = self.every_s

    @property
    def target(self) -> Path:
        """The file of the page."""
        return self.directory / "report" / "index.html"

    def tell(self, text: str, once: str) -> None:
        """Print a line the first time that something is the case."""
        if not getattr(self, once) and not self.stop.is_set():
            setattr(self, once, True)
            self.progress.say(text)

    def write(self) -> None:
        """Write the page, unless the sweep ends before it is ready."""
        now = page.Now(*self.progress.now(), self.every_s, time.time())
        text = writer.page_text(self.directory, now, in_progress(self.progress))
        if self.stop.is_set():
            return
        disk.write_text(self.target, text)
        if (self.directory.parent / stages.STAGES).is_file() and not self.stop.is_set():
            writer.write_stages(self.directory.parent, now)


def in_progress(progress: progresses.Progress) -> analysis.Unfinished:
    """Return the metrics so far [rows, updates] and the facts of each unit in progress."""
    batch = progress.batch
    if batch is None or not batch.pieces:
        return {}
    metrics = batch.metrics
    facts = {
        "steps_per_update": batch.group.config.steps_per_update,
        "steps_before": contract.steps_before(batch.group.config),
        "unit": progress.whole_unit,
    }
    return {
        unit.name: ({name: array[rows] for name, array in metrics.items()}, facts)
        for unit, rows in batch.rows()
    }
