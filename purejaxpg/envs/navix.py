"""Environments of navix: "navix:Navix-Empty-5x5-v0" and so on.

`env_kwargs` are those of the environment's `create`; `observation_fn` and `reward_fn` may be named
(`observation_fn = "symbolic_first_person"`). The limit on the steps of an episode is a parameter.
"""

from typing import Any

import jax

from purejaxpg import config as configs
from purejaxpg import extras
from purejaxpg.envs import gymnax, libraries

TERMINATION = 2  # a step type of navix


def make(name: str, **kwargs: Any) -> Any:
    """Return the environment that navix calls `name`."""
    library = extras.load("navix", "navix", f"Environment 'navix:{name}'")
    configs.require_known(name, library.registry(), "environment of navix named")
    modules = {"observation_fn": library.observations, "reward_fn": library.rewards}
    for argument in modules.keys() & kwargs.keys():
        kwargs[argument] = getattr(modules[argument], kwargs[argument])
    return Navix(library, library.make(name, **kwargs))


class Navix(libraries.Adapter):
    """An environment of navix, without its automatic resets."""

    packages = ("navix",)

    def __init__(self, library: Any, env: Any) -> None:
        self.library, self.env = library, env
        params = libraries.Params(max_steps_in_episode=int(env.max_steps))
        super().__init__(params, gymnax.spaces.Discrete(len(env.action_set)))

    def start(self, key: jax.Array, params: libraries.Params) -> tuple[Any, Any]:
        """Start an episode -> observation and state."""
        timestep = self.env.reset(key)
        return timestep.observation, timestep

    def advance(self, key: jax.Array, state: Any, action: jax.Array, params: Any) -> Any:
        """Step without a time limit -> observation, state, reward, whether it terminated."""
        later = self.env._step(state, action)
        return later.observation, later, later.reward, later.step_type == TERMINATION

    def film(self, states: Any, params: Any, steps: list[int]) -> Any:
        """Return an image of each of some steps."""
        draw = jax.jit(self.library.observations.rgb)
        return [draw(timestep.state) for timestep in libraries.chosen(states, steps)]
