"""Environments of brax: "brax:ant", "brax:halfcheetah" and so on.

`env_kwargs` are those of the environment's class (`backend = "positional"`, `ctrl_cost_weight`).
Parameters: the limit on the steps of an episode, 1000 as brax trains, and gravity.
"""

import copy
from typing import Any

import jax
from flax import struct

from purejaxpg import config as configs
from purejaxpg import extras
from purejaxpg.envs import gymnax, libraries

LIMIT = 1000  # the default of brax's own training


@struct.dataclass
class Params(libraries.Params):
    """The parameters of an environment of brax."""

    gravity: float  # m/s², along the z axis


def make(name: str, **kwargs: Any) -> Any:
    """Return the environment that brax calls `name`."""
    library = extras.load("brax.envs", "brax", f"Environment 'brax:{name}'")
    configs.require_known(name, library._envs, "environment of brax named")
    return Brax(library.get_environment(name, **kwargs))


class Brax(libraries.Adapter):
    """An environment of brax without brax's wrappers, which truncate and reset."""

    packages = ("brax", "mujoco-mjx")

    def __init__(self, env: Any) -> None:
        self.env = env
        params = Params(max_steps_in_episode=LIMIT, gravity=float(env.sys.opt.gravity[2]))
        super().__init__(params, gymnax.spaces.Box(-1.0, 1.0, (env.action_size,)))

    def start(self, key: jax.Array, params: Params) -> tuple[Any, Any]:
        """Start an episode -> observation and state."""
        state = self._under(params).reset(key)
        return libraries.policy_input(state.obs), state

    def advance(self, key: jax.Array, state: Any, action: jax.Array, params: Params) -> Any:
        """Step without a time limit -> observation, state, reward, whether it terminated."""
        later = self._under(params).step(state, action)
        return libraries.policy_input(later.obs), later, later.reward, later.done

    def _under(self, params: Params) -> Any:
        """Return the environment with the gravity of `params`."""
        env, gravity = copy.copy(self.env), self.env.sys.opt.gravity
        env.sys = env.sys.tree_replace({"opt.gravity": gravity.at[2].set(params.gravity)})
        return env

    def film(self, states: Any, params: Params, steps: list[int]) -> Any:
        """Return an image of each of some steps, drawn by MuJoCo."""
        image = extras.load("brax.io.image", "brax", "A picture")
        drawn = [state.pipeline_state for state in libraries.chosen(states, steps)]
        return image.render_array(self.env.sys, drawn)
