"""Loops that run as one kernel on a GPU, behind functions that look like what they replace."""
