"""A sweep over more than this process: Ray, or jax.distributed (experimental)."""
