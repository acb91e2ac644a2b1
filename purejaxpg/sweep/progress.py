"""What a person sees while a sweep runs: a live bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bar,
)
from rich.table import Column

from purejaxpg.sweep import plan as plans
from purejaxpg.sweep import report as reports
from purejaxpg.sweep import spec as specs

LINE_EVERY_S = 10.0  # between plain lines


class Progress:
    """Reports a sweep to `console`; says nothing where `quiet`."""

    def __init__(self, console: Console, quiet: bool = False) -> None:
        """Report to `console`; `quiet` keeps even the bar away."""
        self.console = console
        self.quiet = quiet
        self.done_steps = 0
        self.total_steps = 0
        self.training_s = 0.0
        self.latest: dict[str, float] = {}  # run id -> recent return
        self.labels: dict[str, str] = {}  # run id -> configuration
        self.diverged: set[str] = set()
        self.last_line = self.last_event = time.monotonic()
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            # What is left of the line; the other columns keep their width.
            TextColumn(
                "{task.fields[status]}",
                markup=False,
                table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
            ),
            expand=True,
            console=console,
            disable=quiet or not console.is_terminal,
            transient=True,
        )
        self.task = self.bar.add_task("training", total=None, status="")

    def __enter__(self) -> "Progress":
        """Show the bar."""
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the bar."""
        self.bar.stop()

    def begin(self, spec: specs.Spec, groups: Sequence[plans.Group], work: int) -> None:
        """The sweep begins; `work` environment steps are to be done."""
        self.total_steps = work
        self.bar.update(self.task, total=work)
        self.labels = {run.run_id: label(run.swept) for run in spec.runs}
        num_seeds = len(spec.runs) // spec.num_configs
        sides = f"{count(spec.num_configs, 'configuration')} x {count(num_seeds, 'seed')}"
        product = f"{sides} = {count(len(spec.runs), 'run')}"
        self.say(
            f"{spec.name}: {spec.agent_name}, {product} in {count(len(groups), 'compilation')}, "
            f"{work / 1e6:.1f} M environment steps to go."
        )

    def compiling(self, group: plans.Group) -> None:
        """The programs of `group` are being compiled."""
        self.bar.update(self.task, description="compiling")
        self.say(
            f"Compiling group {group.index}: {group.num_runs} runs, {group.rows} rows a device ..."
        )

    def compiled(self, group: plans.Group, seconds: float) -> None:
        """They are compiled; training begins."""
        self.bar.update(self.task, description="training")
        self.say(f"Compiled group {group.index} in {seconds:.1f} s.")
        self.last_event = time.monotonic()

    def advance(
        self,
        group: plans.Group,
        batch: Sequence[plans.Unit],
        updates: int,
        metrics: Mapping[str, np.ndarray],
        diverged_at: np.ndarray,
    ) -> None:
        """`updates` more updates of `batch` are done; metrics [devices * rows, updates]."""
        now = time.monotonic()
        self.training_s += now - self.last_event
        self.last_event = now
        for i, unit in enumerate(dict.fromkeys(batch)):
            rows = slice(i * group.rows, i * group.rows + len(unit.runs))
            self.note_returns(unit, {name: value[rows] for name, value in metrics.items()})
            self.diverged |= {
                run.run_id for run, at in zip(unit.runs, diverged_at[rows], strict=True) if at
            }
            self.done_steps += len(unit.runs) * updates * group.config.steps_per_update
        self.bar.update(self.task, completed=self.done_steps, status=self.status())
        if now - self.last_line > LINE_EVERY_S and not self.console.is_terminal:
            self.line()

    def note_returns(self, unit: plans.Unit, metrics: Mapping[str, np.ndarray]) -> None:
        """Remember the mean return of each run's recently ended episodes."""
        total, ended = metrics["episode/return_sum"].sum(1), metrics["episode/count"].sum(1)
        for run, return_sum, episodes in zip(unit.runs, total, ended, strict=True):
            if episodes > 0:
                self.latest[run.run_id] = float(return_sum / episodes)

    def scoring(self) -> None:
        """The trained policies are being evaluated."""
        self.bar.update(self.task, description="evaluating")

    def committed(self, units: int) -> None:
        """Results of `units` units are safe on disk."""
        self.bar.update(self.task, description="training")
        self.last_event = time.monotonic()

    def status(self) -> str:
        """One line on speed and the best configuration so far."""
        speed = self.done_steps / max(self.training_s, 1e-9)
        words = [f"{speed / 1e3:.0f}k steps/s"]
        if self.latest:
            best, value = self.best()
            words.append(f"best {value:.1f}" + (f" ({best})" if best else ""))
        if self.diverged:
            words.append(f"{len(self.diverged)} diverged")
        return ", ".join(words)

    def best(self) -> tuple[str, float]:
        """The configuration with the best mean of recent returns over its seeds."""
        of_config: dict[str, list[float]] = {}
        for run_id, value in self.latest.items():
            of_config.setdefault(self.labels[run_id], []).append(value)
        means = {label: float(np.mean(values)) for label, values in of_config.items()}
        label = max(means, key=lambda name: means[name])
        return label, means[label]

    def line(self) -> None:
        """Print progress as a plain line."""
        self.last_line = time.monotonic()
        share = self.done_steps / max(self.total_steps, 1)
        left = self.training_s * (1 - share) / max(share, 1e-9)
        self.say(f"{share:4.0%}, about {left:.0f} s left, {self.status()}")

    def say(self, text: Any) -> None:
        """Print above the bar."""
        if not self.quiet:
            self.console.print(text, highlight=False, soft_wrap=True, markup=False)


def count(number: int, noun: str) -> str:
    """1 -> "1 noun", 2 -> "2 nouns"."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def label(swept: Mapping[str, Any]) -> str:
    """{"learning_rate": 3e-4, "clip_eps": 0.2} -> "learning_rate=3e-4 clip_eps=0.2"."""
    return " ".join(f"{name}={reports.short(value)}" for name, value in swept.items())
