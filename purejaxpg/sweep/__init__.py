"""Sweeps: specification, planning, execution, results and report."""
