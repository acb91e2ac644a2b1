"""Loops that run as one kernel on a GPU, behind functions that look like what they replace."""

from purejaxpg.fused.apply import apply
from purejaxpg.fused.fit import fit
from purejaxpg.fused.loop import scan
from purejaxpg.fused.paths import check

__all__ = ["apply", "check", "fit", "scan"]
