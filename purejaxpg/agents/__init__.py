"""Agents: one file each, under the contract described in `docs/design.md`."""
