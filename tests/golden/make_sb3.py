"""Write the golden values of Stable-Baselines3 that the kernel tests compare with.

They are kept as JSON beside this file, so that the tests need neither torch nor stable-baselines3.
Both were installed when the values were made; the versions are recorded in each file. Run
`python tests/golden/make_sb3.py` to make them again.

Everything that is compared comes out of the library's own code: advantages and returns from
`RolloutBuffer.compute_returns_and_advantage`, losses and diagnostics from what `PPO.train` logs for
one epoch of one batch, before it changes a parameter. Only the reward of a truncated step is
prepared here, in the way `OnPolicyAlgorithm.collect_rollouts` does it; and the gradients, which the
library does not log, are those of its expressions, retyped.
"""

import json
import pathlib

import gymnasium
import numpy as np
import stable_baselines3
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.logger import configure

HERE = pathlib.Path(__file__).parent
VERSIONS = {
    "stable-baselines3": stable_baselines3.__version__,
    "torch": torch.__version__.split("+")[0],
    "gymnasium": gymnasium.__version__,
    "numpy": np.__version__,
}


def numbers(array):
    return np.asarray(array, np.float32).astype(float).tolist()


def flags(array):
    return np.asarray(array, bool).tolist()


def rollout(seed, num_steps, num_envs, truncations):
    rng = np.random.default_rng(seed)
    shape = (num_steps, num_envs)
    reward, value, final_value = rng.normal(size=(3, *shape)).astype(np.float32)
    ended = rng.random(shape) < 0.25
    truncated = ended & (rng.random(shape) < 0.5) if truncations else np.zeros(shape, bool)
    terminated = ended & ~truncated
    after_last = rng.normal(size=num_envs).astype(np.float32)
    following = np.concatenate([value[1:], after_last[None]])
    # At an end the value of the final observation differs from that of the reset one.
    next_value = np.where(ended, final_value, following)
    return reward, value, next_value, following[-1], terminated, truncated


def advantage_case(name, seed, gamma, gae_lambda, truncations, num_steps=12, num_envs=3):
    reward, value, next_value, last_value, terminated, truncated = rollout(
        seed, num_steps, num_envs, truncations
    )
    done = terminated | truncated
    buffer = RolloutBuffer(
        num_steps,
        gymnasium.spaces.Box(-1.0, 1.0, (1,)),
        gymnasium.spaces.Discrete(2),
        gamma=gamma,
        gae_lambda=gae_lambda,
        n_envs=num_envs,
    )
    buffer.rewards = reward + gamma * next_value * truncated
    buffer.values = value.copy()
    # Row t tells whether step t was the first of its episode, so it is the end of row t - 1.
    buffer.episode_starts[1:] = done[:-1]
    buffer.compute_returns_and_advantage(torch.as_tensor(last_value), done[-1])
    return {
        "name": name,
        "gamma": gamma,
        "gae_lambda": gae_lambda,
        "reward": numbers(reward),
        "value": numbers(value),
        "next_value": numbers(next_value),
        "terminated": flags(terminated),
        "truncated": flags(truncated),
        "advantage": numbers(buffer.advantages),
        "target": numbers(buffer.returns),
    }


def ppo_case(clip_range_vf, seed=7, batch=64, clip_range=0.2):
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = PPO(
        "MlpPolicy",
        gymnasium.make("CartPole-v1"),
        n_steps=batch,
        batch_size=batch,
        n_epochs=1,
        clip_range=clip_range,
        clip_range_vf=clip_range_vf,
        normalize_advantage=False,
        seed=seed,
        device="cpu",
    )
    model.set_logger(configure(None, []))
    # The head starts out close to uniform, where every policy looks alike.
    model.policy.action_net.weight.data *= 100.0
    buffer = model.rollout_buffer
    buffer.observations = rng.normal(size=buffer.observations.shape).astype(np.float32)
    buffer.actions = rng.integers(0, 2, size=buffer.actions.shape).astype(np.float32)
    buffer.advantages = rng.normal(size=buffer.advantages.shape).astype(np.float32)
    buffer.returns = rng.normal(size=buffer.returns.shape).astype(np.float32)
    with torch.no_grad():
        value, log_prob, entropy = model.policy.evaluate_actions(
            torch.as_tensor(buffer.observations[:, 0]),
            torch.as_tensor(buffer.actions[:, 0, 0]).long(),
        )
        logits = model.policy.get_distribution(
            torch.as_tensor(buffer.observations[:, 0])
        ).distribution.logits
    value = value.numpy().flatten()
    old_log_prob = log_prob.numpy() + rng.normal(scale=0.3, size=batch).astype(np.float32)
    old_value = value + rng.normal(scale=0.3, size=batch).astype(np.float32)
    buffer.log_probs = old_log_prob[:, None].copy()
    buffer.values = old_value[:, None].copy()
    buffer.full = True
    advantage, target = buffer.advantages[:, 0].copy(), buffer.returns[:, 0].copy()
    action = buffer.actions[:, 0, 0].copy()
    model.train()
    logged = {key: float(model.logger.name_to_value[f"train/{key}"]) for key in (
        "policy_gradient_loss", "value_loss", "entropy_loss", "clip_fraction", "approx_kl",
    )}  # fmt: skip
    return {
        "clip_eps": clip_range,
        "clip_eps_value": clip_range_vf,
        "logits": numbers(logits),
        "action": action.astype(int).tolist(),
        "log_prob": numbers(log_prob),
        "old_log_prob": numbers(old_log_prob),
        "advantage": numbers(advantage),
        "value": numbers(value),
        "old_value": numbers(old_value),
        "target": numbers(target),
        "entropy": numbers(entropy),
        "logged": logged,
        "policy_gradient": numbers(policy_gradient(log_prob, old_log_prob, advantage, clip_range)),
    }


def policy_gradient(log_prob, old_log_prob, advantage, clip_range):
    log_prob = log_prob.clone().requires_grad_()
    ratio = torch.exp(log_prob - torch.as_tensor(old_log_prob))
    advantage = torch.as_tensor(advantage)
    clamped = torch.clamp(ratio, 1 - clip_range, 1 + clip_range)
    (-torch.min(advantage * ratio, advantage * clamped)).sum().backward()
    return log_prob.grad


def write(name, cases):
    text = json.dumps({"versions": VERSIONS, "cases": cases}, indent=1)
    (HERE / name).write_text(text + "\n")


if __name__ == "__main__":
    write(
        "sb3_gae.json",
        [
            advantage_case("terminations only", 0, 0.99, 0.95, truncations=False),
            advantage_case("truncations", 1, 0.9, 0.8, truncations=True),
            advantage_case("lambda one", 2, 0.97, 1.0, truncations=True),
            advantage_case("lambda zero", 3, 0.97, 0.0, truncations=True),
        ],
    )
    write("sb3_ppo.json", [ppo_case(None), ppo_case(0.2)])
