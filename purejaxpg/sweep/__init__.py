"""Sweeps: what to compute (ask), computing it (run), and results on disk (keep)."""
