"""Environments of jumanji: "jumanji:Snake-v1" and so on, but for those of several agents.

An observation is the vector of all its fields, with the mask of valid actions among them, which
agents do not apply. Several discrete actions become one, which numbers their combinations.
`env_kwargs` are those of the environment's class. The limit on the steps of an episode, a
parameter, is that of the class, or 10,000 where it has none.
"""

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purejaxpg import config as configs
from purejaxpg import extras
from purejaxpg.envs import gymnax, libraries

LIMIT = 10_000  # for a task that ends by itself
MOST_ACTIONS = 10_000  # combinations


def make(name: str, **kwargs: Any) -> Any:
    """Return the environment that jumanji calls `name`."""
    library = extras.load("jumanji", "jumanji", f"Environment 'jumanji:{name}'")
    known = sorted(library.registered_environments())
    configs.require_known(name, known, "environment of jumanji named")
    return Jumanji(name, library.make(name, **kwargs))


class Jumanji(libraries.Adapter):
    """An environment of jumanji."""

    packages = ("jumanji",)

    def __init__(self, name: str, env: Any) -> None:
        self.env = env
        self.unlimited = copy.copy(env)  # jumanji terminates at the limit, without saying why
        self.unlimited.time_limit = libraries.UNLIMITED
        spec = env.action_spec
        self.sizes = np.ravel(getattr(spec, "num_values", 0))
        count = int(np.prod(self.sizes, dtype=float))
        configs.require(
            0 < count <= MOST_ACTIONS,
            f"env 'jumanji:{name}' has the actions {spec}, but an agent needs 1 to {MOST_ACTIONS} "
            "discrete ones.",
        )
        self.single = np.ndim(spec.num_values) == 0
        params = libraries.Params(max_steps_in_episode=int(getattr(env, "time_limit", LIMIT)))
        super().__init__(params, gymnax.spaces.Discrete(count))

    def start(self, key: jax.Array, params: libraries.Params) -> tuple[Any, Any]:
        """Start an episode -> observation and state."""
        state, timestep = self.env.reset(key)
        return timestep.observation, state

    def advance(self, key: jax.Array, state: Any, action: jax.Array, params: Any) -> Any:
        """Step without a time limit -> observation, state, reward, whether it terminated."""
        several = jnp.stack(jnp.unravel_index(action, tuple(self.sizes))).astype(jnp.int32)
        later, timestep = self.unlimited.step(state, several[0] if self.single else several)
        return timestep.observation, later, timestep.reward, timestep.last()

    def film(self, states: Any, params: Any, steps: list[int]) -> Any:
        """Return an image of each of some steps, drawn with matplotlib."""
        import matplotlib.pyplot as plt

        images = []
        for state in libraries.chosen(states, steps):
            self.env.render(state)
            canvas: Any = plt.gcf().canvas  # Agg's, whose type matplotlib does not say
            images.append(np.array(canvas.buffer_rgba())[:, :, :3])
        self.env.close()
        return images
