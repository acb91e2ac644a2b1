"""Pure functions of arrays, each with one right answer.

All of them use one time convention. Index t holds the observation acted on, the action, and
everything that step returned: `reward`, `terminated`, `truncated` and `next_obs`, the observation
before any reset. `done = terminated | truncated`. `terminated` removes the bootstrap,
`done` cuts the trace. Arrays are time-major, `[T, N]`: T time steps of N environments.
"""
