"""Results of a sweep: statistics, tables, figures, the page, exports, logs and playback."""

import os
from typing import Any


def load(directory: str | os.PathLike[str]) -> Any:
    """Read the results of a sweep into an ``xarray.Dataset``; see ``dataset.load``."""
    from purejaxpg.report import dataset

    return dataset.load(directory)
