"""The command of the laboratory: compute, print, write."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from purejaxpg.lab import laboratory, show, study
from purejaxpg.report import tables as text_tables
from purejaxpg.text import short


def run(setting: laboratory.Setting, out: Path, console: Any, say: Callable[[str], None]) -> None:
    """Run all studies, print their tables and write them.

    Args:
        setting: what is studied.
        out: a directory; files of an earlier run are replaced.
        console: for the tables.
        say: takes a line of progress.

    Raises:
        InputError: the setting makes no sense.
        FaultError: the files cannot be written.
    """
    rows, best = study.run(setting, say)
    tables = show.tables(rows, best)
    sentence = show.agreement(*study.agreement(rows))
    for table in tables:
        text_tables.show(table, console)
    for line in (*show.LEGEND, sentence):
        console.print(line.replace("*", ""), markup=False, highlight=False)
    for path in show.write(out, rows, show.markdown(command(setting), tables, sentence)):
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)


def command(setting: laboratory.Setting) -> str:
    """Return the command that repeats a study."""
    distances = " ".join(map(short, setting.distances))
    return (
        f"purejaxpg estimators --task {setting.task} --seed {setting.seed} --keys {setting.keys} "
        f"--distance {distances} --beta {short(setting.beta)}"
    )
