"""Loops that run as one kernel on a GPU, each behind a function that looks like what it replaces."""
