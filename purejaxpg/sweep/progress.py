"""Report the progress of a sweep: a live bar on a terminal, plain lines otherwise.

The same numbers go into ``DIR/progress.jsonl``, at most one line per second, for other programs to
follow. It is only a log: the package never reads it.
"""

import contextlib
import json
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column

from purejaxpg import contract
from purejaxpg.sweep import plan as plans
from purejaxpg.text import count, engineering, label, short

if TYPE_CHECKING:
    from purejaxpg.sweep import spec as specs

LINE_EVERY_S = 10.0  # between plain lines
LOG_EVERY_S = 1.0  # between lines of the log


class Progress:
    """Reports the progress of a sweep; one object per sweep."""

    def __init__(
        self, console: Console, quiet: bool = False, log: Path | None = None, title: str = ""
    ) -> None:
        """Report to `console` and the file `log`; `quiet` prints nothing, not even the bar.

        A `title`, such as "Stage 2 of 3: reward", stands before what is reported.
        """
        self.console, self.quiet = console, quiet
        self.title, self.before = title, f"{title}, " if title else ""
        self.unit = "steps"
        self.at = ""  # the updates of the last batch
        self.log = log
        self.last_log = 0.0
        self.run_steps = 0.0  # of a whole run, on average
        self.done_steps = 0
        self.total_steps = 0
        self.training_s = 0.0
        self.latest: dict[str, float] = {}  # run id -> recent return
        self.labels: dict[str, str] = {}  # run id -> configuration
        self.diverged: set[str] = set()
        self.counted: set[str] = set()  # units in done_steps, or taken out of total_steps
        self.known: set[tuple[str, int]] = set()  # compiled programs: signature, rows
        self.last_line = self.last_event = time.monotonic()
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            # This column gets the rest of the line; the others keep their width.
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
        self.task = self.bar.add_task(f"{self.before}training", total=None, status="")

    def __enter__(self) -> "Progress":
        """Show the bar."""
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the bar."""
        self.bar.stop()

    def begin(self, spec: "specs.Spec", rounds: Sequence[plans.Round]) -> None:
        """The sweep begins; `rounds` are its rounds with made-up results."""
        legs = [leg for round_ in rounds for leg in round_.legs]
        self.total_steps = sum(leg.steps for leg in legs)
        self.run_steps = self.total_steps / plans.count_runs(rounds)
        self.bar.update(self.task, total=self.total_steps)
        sides = f"{count(spec.num_configs, 'configuration')} x {count(len(spec.seeds), 'seed')}"
        runs = count(plans.count_runs(rounds), "run")
        several = f" in {len(rounds)} rounds" if len(rounds) > 1 else ""
        self.unit = contract.unit(spec.agent).split()[-1]
        self.say(
            f"{self.title or spec.name}: {spec.agent_name}, {sides} = {runs}{several}, "
            f"{engineering(self.total_steps)} {contract.unit(spec.agent)}."
        )

    def round_begins(
        self,
        index: int,
        round_: plans.Round,
        groups: Sequence[plans.Group],
        pending: Collection[str],
    ) -> None:
        """A round begins; its units in `pending` are not computed yet."""
        self.labels |= {leg.run.run_id: label(leg.run.swept) for leg in round_.legs}
        units = [(unit, group) for group in groups for unit in group.units]
        done = [unit for unit, _ in units if unit.name not in pending]
        # After running out of memory a round is planned again: count each unit only once.
        stored = [unit for unit in done if unit.name not in self.counted]
        again = [unit for unit, _ in units if unit.name in pending and unit.name in self.counted]
        self.counted |= {unit.name for unit in done}
        self.counted -= {unit.name for unit in again}
        self.total_steps += steps_of(again) - steps_of(stored)
        self.bar.update(self.task, total=self.total_steps)
        if pending:
            stage = "confirming" if round_.stage == "confirm" else f"round {index + 1}"
            progress = f", {len(done)} of {len(units)} units are done" if done else ""
            self.say(
                f"{stage.capitalize()}: {count(len(round_.legs), 'run')} in "
                f"{count(len(groups), 'compilation')}{progress}."
            )
            for note in round_.notes:
                self.say(note)

    def resumed(self, batch: plans.Batch) -> None:
        """A batch resumes from a snapshot."""
        group = batch.group
        share = (batch.updates - group.start) / (group.stop - group.start)
        for unit in batch.units:
            self.total_steps -= round(steps_of([unit]) * share)
        self.bar.update(self.task, total=self.total_steps)
        self.say(f"Resuming from a snapshot after update {batch.updates} of {group.stop}.")

    def compiling(self, group: plans.Group) -> None:
        """The programs of `group` are being compiled, unless an earlier round compiled them."""
        if group.program in self.known:
            return
        self.bar.update(self.task, description=f"{self.before}compiling")
        self.say(
            f"Compiling group {group.index}: {group.num_legs} runs, {group.rows} rows a device ..."
        )

    def compiled(self, group: plans.Group, seconds: float) -> None:
        """The programs of `group` are compiled; training begins."""
        self.bar.update(self.task, description=f"{self.before}training")
        if group.program not in self.known:
            self.known.add(group.program)
            self.say(f"Compiled group {group.index} in {seconds:.1f} s.")
        self.last_event = time.monotonic()

    def advance(self, batch: plans.Batch, updates: int) -> None:
        """`updates` more updates of a batch are done."""
        now = time.monotonic()
        self.training_s += now - self.last_event
        self.last_event = now
        group = batch.group
        for unit, rows in batch.rows():
            self.note_returns(unit, {name: x[rows] for name, x in batch.pieces[-1].items()})
            self.diverged |= {
                leg.run.run_id
                for leg, at in zip(unit.legs, batch.diverged_at[rows], strict=True)
                if at
            }
            self.counted.add(unit.name)
            self.done_steps += len(unit.legs) * updates * group.config.steps_per_update
        self.at = f"update {batch.updates} of {group.stop}, "
        self.bar.update(self.task, completed=self.done_steps, status=self.status())
        if now - self.last_log > LOG_EVERY_S:
            self.last_log = now
            self.write_log()
        if now - self.last_line > LINE_EVERY_S and not self.console.is_terminal:
            self.line()

    def note_returns(self, unit: plans.Unit, metrics: Mapping[str, np.ndarray]) -> None:
        """Remember the mean return of each run's recently ended episodes."""
        if not all(name in metrics for name in contract.CURVE):
            return
        total, ended = (metrics[name].sum(1) for name in contract.CURVE)
        for leg, return_sum, episodes in zip(unit.legs, total, ended, strict=True):
            if episodes > 0:
                self.latest[leg.run.run_id] = float(return_sum / episodes)

    def scoring(self) -> None:
        """The trained policies are being evaluated."""
        self.bar.update(self.task, description=f"{self.before}evaluating")

    def committed(self) -> None:
        """The results of a batch are safe on disk."""
        self.bar.update(self.task, description=f"{self.before}training")
        self.last_event = time.monotonic()

    @property
    def speed(self) -> float:
        """Steps per second of training so far."""
        return self.done_steps / max(self.training_s, 1e-9)

    def status(self) -> str:
        """One line with the speed and the best configuration so far."""
        words = [f"{self.at}{engineering(self.speed)} {self.unit}/s"]
        if self.run_steps:
            words.append(f"{short(float(f'{self.speed / self.run_steps:.2g}'))} agents/s")
        if self.latest:
            best, value = self.best()
            words.append(f"best {value:.1f}" + (f" ({best})" if best else ""))
        if self.diverged:
            words.append(f"{len(self.diverged)} diverged")
        return ", ".join(words)

    def best(self) -> tuple[str, float]:
        """The configuration with the best mean of recent returns over its seeds."""
        of_config: dict[str, list[float]] = {}
        healthy = {k: v for k, v in self.latest.items() if k not in self.diverged}
        for run_id, value in (healthy or self.latest).items():
            of_config.setdefault(self.labels[run_id], []).append(value)
        means = {label: float(np.mean(values)) for label, values in of_config.items()}
        label = max(means, key=lambda name: means[name])
        return label, means[label]

    def line(self) -> None:
        """Print progress as a plain line."""
        self.last_line = time.monotonic()
        share = self.done_steps / max(self.total_steps, 1)
        left = self.training_s * (1 - share) / max(share, 1e-9)
        self.say(f"{self.before}{share:4.0%}, about {left:.0f} s left, {self.status()}")

    def write_log(self) -> None:
        """Append a line to the log; an unwritable log does not stop the sweep."""
        if self.log is None:
            return
        best, value = self.best() if self.latest else ("", None)
        line = {
            "training_s": round(self.training_s, 3),
            "steps": self.done_steps,
            "steps_to_do": self.total_steps,
            "steps_per_s": round(self.speed, 1),
            "agents_per_s": round(self.speed / self.run_steps, 4) if self.run_steps else None,
            "best": best,
            "best_recent_return": value,
            "diverged": len(self.diverged),
        }
        with contextlib.suppress(OSError), self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def say(self, text: Any) -> None:
        """Print above the bar."""
        if not self.quiet:
            self.console.print(text, highlight=False, soft_wrap=True, markup=False)


def steps_of(units: Sequence[plans.Unit]) -> int:
    """Steps of all legs of units."""
    return sum(leg.steps for unit in units for leg in unit.legs)
