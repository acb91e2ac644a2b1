"""Sweeps: read and plan them (ask), compute them (run), and store the results (keep)."""
