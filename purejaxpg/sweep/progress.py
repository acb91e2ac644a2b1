"""Report the progress of a sweep: a live bar on a terminal, plain lines otherwise.

The same numbers go into ``DIR/progress.jsonl``, at most one line per second, for other programs to
follow. It is only a log: the package never reads it.
"""

import contextlib
import json
import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console, RenderableType
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text

from purejaxpg import contract
from purejaxpg.sweep import plan as plans
from purejaxpg.text import count, duration, engineering, label, rate

if TYPE_CHECKING:
    from purejaxpg.sweep import spec as specs

LINE_EVERY_S = 10.0  # between plain lines
LOG_EVERY_S = 1.0  # between lines of the log


class Bar(Bars):
    """A bar with the lines of its status below it, so that they have the whole width."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return the bar, and its status."""
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield from map(Text, task.fields["status"])


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
        self.unit = self.whole_unit = "steps"
        self.batch: plans.Batch | None = None  # the last one that made progress
        self.all_steps = 0  # of the sweep, stored ones included
        self.at = ""  # the updates of the last batch
        self.log = log
        self.last_log = 0.0
        self.run_steps = 0.0  # of a whole run, on average
        self.done_steps = 0
        self.total_steps = 0
        self.training_s = 0.0
        self.latest: dict[str, float] = {}  # run id -> recent return
        self.labels: dict[str, tuple[str, str]] = {}  # run id -> condition, configuration
        self.diverged: set[str] = set()
        self.counted: set[str] = set()  # units in done_steps, or taken out of total_steps
        self.known: dict[tuple[str, int], float] = {}  # seconds to compile a signature, rows
        self.programs: dict[int, set[tuple[str, int]]] = {}  # needed by each round
        self.beside_s = 0.0  # evaluating and storing
        self.last_line = self.last_event = time.monotonic()
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=quiet or not console.is_terminal,
            transient=True,
        )
        self.task = self.bar.add_task(f"{self.before}training", total=None, status=[], left="")

    def __enter__(self) -> "Progress":
        """Show the bar."""
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the bar."""
        self.bar.stop()

    def begin(
        self,
        spec: "specs.Spec",
        rounds: Sequence[plans.Round],
        groups: Sequence[Sequence[plans.Group]] = (),
    ) -> None:
        """The sweep begins; `rounds` are its rounds with made-up results, cut into `groups`."""
        self.programs = {i: {group.program for group in own} for i, own in enumerate(groups)}
        legs = [leg for round_ in rounds for leg in round_.legs]
        self.total_steps = self.all_steps = sum(leg.steps for leg in legs)
        self.run_steps = self.total_steps / plans.count_runs(rounds)
        self.bar.update(self.task, total=self.total_steps)
        sides = " x ".join(
            [count(spec.num_configs, "configuration")]
            + [count(len(spec.conditions), "condition")] * (len(spec.conditions) > 1)
            + [count(len(spec.seeds), "seed")]
        )
        runs = count(plans.count_runs(rounds), "run")
        several = f" in {len(rounds)} rounds" if len(rounds) > 1 else ""
        self.whole_unit = contract.unit(spec.agent)
        self.unit = self.whole_unit.split()[-1]
        self.say(
            f"{self.title or spec.name}: {spec.agent_name}, {sides} = {runs}{several}, "
            f"{engineering(self.total_steps)} {self.whole_unit}."
        )

    def round_begins(
        self,
        index: int,
        round_: plans.Round,
        groups: Sequence[plans.Group],
        pending: Collection[str],
    ) -> None:
        """A round begins; its units in `pending` are not computed yet."""
        self.labels |= {leg.run.run_id: labels_of(leg.run) for leg in round_.legs}
        units = [(unit, group) for group in groups for unit in group.units]
        self.programs[index] = {group.program for unit, group in units if unit.name in pending}
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
            f"Compiling group {group.index}: {count(group.num_legs, 'run')}, "
            f"{count(group.rows, 'row')} a device ..."
        )

    def compiled(self, group: plans.Group, seconds: float) -> None:
        """The programs of `group` are compiled; training begins."""
        self.bar.update(self.task, description=f"{self.before}training")
        if group.program not in self.known:
            self.known[group.program] = seconds
            self.say(f"Compiled group {group.index} in {seconds:.1f} s.")
        self.last_event = time.monotonic()

    def advance(self, batch: plans.Batch, updates: int) -> None:
        """`updates` more updates of a batch are done."""
        now = time.monotonic()
        self.training_s += now - self.last_event - batch.evaluating_s
        self.beside_s += batch.evaluating_s
        self.last_event = now
        self.batch, group = batch, batch.group
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
        status = [", ".join(self.status()), *self.best_line()]
        left = self.left_s
        shown = f"{duration(left)} left" if math.isfinite(left) else ""
        self.bar.update(self.task, completed=self.done_steps, status=status, left=shown)
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
        now = time.monotonic()
        self.beside_s += now - self.last_event
        self.last_event = now

    @property
    def left_s(self) -> float:
        """Estimated seconds to the end, with the compilations to come; NaN if it is not known."""
        if not self.done_steps:
            return math.nan
        to_do = (self.total_steps - self.done_steps) / self.done_steps
        to_compile = len(set().union(*self.programs.values()) - self.known.keys())
        mean_s = sum(self.known.values()) / max(len(self.known), 1)
        return (self.training_s + self.beside_s) * to_do + to_compile * mean_s

    @property
    def speed(self) -> float:
        """Steps per second of training so far."""
        return self.done_steps / max(self.training_s, 1e-9)

    def status(self) -> list[str]:
        """The update of the last batch, the speed, and how many runs have diverged."""
        words = [f"{self.at}{rate(self.speed, self.unit)}"]
        if self.run_steps:
            words.append(rate(self.speed / self.run_steps, "agents"))
        if self.diverged:
            words.append(f"{len(self.diverged)} diverged")
        return words

    def best_line(self) -> list[str]:
        """The best configuration of each condition so far, if any episode has ended."""
        best = self.best()
        return [
            (f"best in {where}:" if len(best) > 1 else "best")
            + f" {value:.1f}"
            + (f" ({name})" if name else "")
            for where, (name, value) in best.items()
        ]

    def best(self) -> dict[str, tuple[str, float]]:
        """By condition: the configuration with the best mean of recent returns over its seeds."""
        of_config: dict[tuple[str, str], list[float]] = {}
        latest = dict(self.latest)  # a copy: another thread may ask
        healthy = {k: v for k, v in latest.items() if k not in self.diverged}
        for run_id, value in (healthy or latest).items():
            of_config.setdefault(self.labels[run_id], []).append(value)
        best: dict[str, tuple[str, float]] = {}
        for (where, name), values in of_config.items():
            mean = float(np.mean(values))
            if where not in best or mean > best[where][1]:
                best[where] = name, mean
        return best

    def now(self) -> tuple[float, tuple[str, ...]]:
        """Return the share of the whole sweep that is done, and words about its progress."""
        to_do = max(self.total_steps - self.done_steps, 0)
        left = [f"about {duration(self.left_s)} left"] if math.isfinite(self.left_s) else []
        speed = self.status() if self.done_steps else ["compiling"]
        of = [f"of {self.title[:1].lower()}{self.title[1:]}"] if self.title else []
        return 1 - to_do / max(self.all_steps, to_do, 1), (*of, *left, *speed, *self.best_line())

    def line(self) -> None:
        """Print progress as a plain line."""
        self.last_line = time.monotonic()
        share = self.done_steps / max(self.total_steps, 1)
        words = [f"about {duration(self.left_s)} left", *self.status(), *self.best_line()]
        self.say(f"{self.before}{share:4.0%}, {', '.join(words)}")

    def write_log(self) -> None:
        """Append a line to the log; an unwritable log does not stop the sweep."""
        if self.log is None:
            return
        best = self.best()
        line = {
            "training_s": round(self.training_s, 3),
            "steps": self.done_steps,
            "steps_to_do": self.total_steps,
            "left_s": round(self.left_s, 1),
            "steps_per_s": round(self.speed, 1),
            "agents_per_s": round(self.speed / self.run_steps, 4) if self.run_steps else None,
            "best": [name for name, _ in best.values()],
            "best_recent_return": [value for _, value in best.values()],
            "diverged": len(self.diverged),
        }
        with contextlib.suppress(OSError), self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def say(self, text: Any) -> None:
        """Print above the bar."""
        if not self.quiet:
            self.console.print(text, highlight=False, soft_wrap=True, markup=False)


def labels_of(run: plans.Run) -> tuple[str, str]:
    """Return the names of a run's condition and of its configuration."""
    return contract.section(run.config), label(contract.apart(run.swept)[0])


def steps_of(units: Sequence[plans.Unit]) -> int:
    """Steps of all legs of units."""
    return sum(leg.steps for unit in units for leg in unit.legs)
