"""Results of a sweep: statistics, tables, figures, the page, exports, logs and playback."""

import os
from pathlib import Path
from typing import Any


def load(directory: str | os.PathLike[str]) -> Any:
    """Read the results of a sweep into an ``xarray.Dataset``; see ``dataset.load``."""
    from purejaxpg.report import dataset

    return dataset.load(directory)


def trained(
    directory: str | os.PathLike[str],
    run: str = "best",
    agent: str | os.PathLike[str] | None = None,
) -> Any:
    """Load a trained policy; see ``playback.trained``.

    Args:
        directory: a result directory; of stages, it is the last that counts.
        run: the id of a run, or ``"best"``.
        agent: the agent's file, if it is not one of the package.
    """
    from purejaxpg.report import playback
    from purejaxpg.sweep import stages

    return playback.trained(stages.last(Path(directory)), run, agent)
