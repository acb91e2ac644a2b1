"""Environments of MuJoCo Playground: "playground:CartpoleBalance" and so on.

`env_kwargs` override entries of the environment's configuration by their dotted names. MuJoCo's
equations run in jax (`impl = "jax"`) unless `env_kwargs` say otherwise. Of an observation with
several parts, agents see "state". Parameters: the limit on the steps of an episode, which is the
configuration's, and gravity. Robots need models that the library downloads on first use.
"""

import copy
from typing import Any

import jax
from flax import struct

from purejaxpg import config as configs
from purejaxpg import extras
from purejaxpg.envs import gymnax, libraries


@struct.dataclass
class Params(libraries.Params):
    """The parameters of an environment of MuJoCo Playground."""

    gravity: float  # m/s², along the z axis


def make(name: str, **kwargs: Any) -> Any:
    """Return the environment that MuJoCo Playground calls `name`."""
    library = extras.load("mujoco_playground", "playground", f"Environment 'playground:{name}'")
    configs.require_known(name, library.registry.ALL_ENVS, "environment of playground named")
    config = library.registry.get_default_config(name)
    overrides = {**({"impl": "jax"} if "impl" in config else {}), **kwargs}
    config.update_from_flattened_dict(overrides)
    return Playground(library.registry.load(name, config=config), int(config.episode_length))


class Playground(libraries.Adapter):
    """An environment of MuJoCo Playground, which neither truncates nor resets by itself."""

    packages = ("playground", "mujoco-mjx")

    def __init__(self, env: Any, limit: int) -> None:
        self.env = env
        gravity = float(env.mjx_model.opt.gravity[2])
        params = Params(max_steps_in_episode=limit, gravity=gravity)
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
        env, model = copy.copy(self.env), self.env.mjx_model
        gravity = model.opt.gravity.at[2].set(params.gravity)
        env._mjx_model = model.tree_replace({"opt.gravity": gravity})
        return env

    def film(self, states: Any, params: Params, steps: list[int]) -> Any:
        """Return an image of each of some steps, drawn by MuJoCo."""
        return self.env.render(libraries.chosen(states, steps))
