"""What every trainer of language models is measured by, so that results can be compared.

A completion is an episode. Its return is the task's own reward, the gold reward, whatever the run
was trained on.
"""

import functools
import hashlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, nn, random

from purejaxpg import config as configs
from purejaxpg.kernels import preference, verification
from purejaxpg.rlhf import comparison, data, finetune, generate, tasks, tilt, tokens, transformer

# Activations of a token in a layer, in units of the width: queries, keys and values 3, their mix 1,
# the MLP 4, and 4 around them.
ACTIVATIONS_PER_WIDTH = 12
# Of a token in the default model, for a Config that cannot know which one its run is given.
TYPICAL_ACTIVATIONS = ACTIVATIONS_PER_WIDTH * 32 * 2
PASS_AT = (1, 4, 16)  # k of pass@k; the largest is the number of samples of each prompt
FRONTIER_PROMPTS = 128  # drawn from the held-out prompts, if there are more
FRONTIER_SAMPLES = 8192  # of the reference, for each prompt
FRONTIER_TOKENS = 2**21  # of all these samples together, so there are fewer of longer ones
DRAWN_AT_ONCE = 1024  # pairs, which bounds the memory of sampling
FRONTIERS: dict[Any, dict[str, Any]] = {}  # of this process, because stages share references
LEAST_SAMPLES = 30.0  # effective ones, for a point of a frontier that is estimated from samples


def sample(
    key: jax.Array,
    policy: transformer.Model,
    prompt_ids: jax.Array,
    task: tasks.Task,
    temperature: jax.Array | float,
) -> generate.Completion:
    """Sample one completion of each prompt [B, P] -> Completion [B, L]."""
    return generate.complete(key, policy, prompt_ids, task, temperature)


def token_log_probs(
    policy: transformer.Model,
    prompt_ids: jax.Array,
    completion_ids: jax.Array,
    task: tasks.Task,
    temperature: jax.Array | float,
) -> jax.Array:
    """Return the log-probability of each token of completions -> [B, L], also after their end."""
    logits = tokens.before(policy, prompt_ids, completion_ids, task.pad_id)
    return tokens.log_probs(logits, completion_ids, temperature)


def rewards(
    given: Any, task: tasks.Task, prompt_ids: jax.Array, completion: generate.Completion
) -> tuple[jax.Array, jax.Array]:
    """Return the rewards to train on, and the gold rewards.

    Args:
        given: perhaps with a model `reward`, which is trained on then.
        task: whose own reward is the gold one. Prompts of a file have none beside such a model.
        prompt_ids: [B, P].
        completion: [B, L].

    Returns:
        [B] each.
    """
    asked = task, prompt_ids, completion.ids, completion.mask
    if getattr(given, "reward", None) is None:
        gold = task.reward(*asked[1:])
        return gold, gold
    score = model_rewards(given.reward, *asked)
    return score, score if is_of_file(given) else task.reward(*asked[1:])


def is_of_file(given: Any) -> bool:
    """Return whether the prompts are those of a file, for a published model."""
    return getattr(given, "text", None) is not None


def model_rewards(
    model: transformer.Model,
    task: tasks.Task,
    prompt_ids: jax.Array,
    completion_ids: jax.Array,
    mask: jax.Array,
) -> jax.Array:
    """Return what a reward model, of outcomes or of steps, gives for completions -> [B]."""
    values = tokens.after(model, prompt_ids, completion_ids, task.pad_id)
    reading = model.architecture.output
    if reading == "scalar":
        return tokens.at_last(values, mask)
    ends = mask
    if task.steps is not None:
        ends, _ = task.steps(prompt_ids, completion_ids, mask)
    return verification.step_reward(values, ends, reading)


def lengths(
    task: tasks.Task, completion: generate.Completion, gold: jax.Array
) -> dict[str, jax.Array]:
    """Return metrics of the lengths of completions, and of those of right ones.

    Args:
        task: which has right answers or not.
        completion: [B, L].
        gold: [B], the task's rewards.

    Returns:
        Scalars: the mean `completion/length` in tokens, and the share `completion/finished` that
        has an end. With right answers, also the share `completion/right` of these, and their part
        `completion/right_length` of the mean length. As such sums, they stay defined where no
        completion is right: the mean length of wrong ones is (length - right_length) / (1 - right).
    """
    length = completion.mask.sum(1)
    metrics = {
        "completion/length": length.mean(),
        "completion/finished": tokens.finished(completion.ids, task.eos_id).mean(),
    }
    if math.isinf(task.passing):
        return metrics
    right = gold >= task.passing
    return metrics | {
        "completion/right": right.mean(),
        "completion/right_length": (right * length).mean(),
    }


def pass_rates(
    key: jax.Array,
    policy: transformer.Model,
    prompt_ids: jax.Array,
    task: tasks.Task,
    temperature: jax.Array | float,
) -> tuple[generate.Completion, dict[str, jax.Array]]:
    """Complete each prompt, and estimate pass@k from more samples of it.

    Args:
        key: for all samples.
        policy: samples.
        prompt_ids: [E, P].
        task: if it has no right answers, there is nothing to estimate.
        temperature: of sampling.

    Returns:
        Completion [E, L], one of each prompt; and `pass@k` [E] for each k in PASS_AT, or nothing.
    """
    if math.isinf(task.passing):
        return sample(key, policy, prompt_ids, task, temperature), {}

    def one(key: jax.Array) -> tuple[generate.Completion, jax.Array]:
        completion = sample(key, policy, prompt_ids, task, temperature)
        reward = task.reward(prompt_ids, completion.ids, completion.mask)
        return completion, reward >= task.passing

    completions, right = lax.map(one, random.split(key, max(PASS_AT)))
    rates = {f"pass@{k}": verification.pass_at_k(right.sum(0), max(PASS_AT), k) for k in PASS_AT}
    return jax.tree.map(lambda x: x[0], completions), rates


def sample_pairs(
    key: jax.Array,
    policy: transformer.Model,
    config: Any,
    count: int,
    given: Any,
    held_out: bool = False,
    greedy: bool = False,
    label_noise: jax.Array | float = 0.0,
) -> tuple[data.Pairs, jax.Array]:
    """Sample two completions of each prompt, and prefer one by the model of Bradley and Terry.

    Args:
        key: for prompts, completions and labels.
        policy: the model that writes the completions.
        config: its `task` and `temperature` are read.
        count: B, pairs.
        given: its model `judge` says with which probability each is preferred, asked in both
            orders; without one, the rewards of its model `reward`, or else those of the task.
        held_out: draw the prompts that are for evaluation only.
        greedy: prefer the more probable one, and draw only ties.
        label_noise: share of these labels that are then turned the wrong way round.

    Returns:
        Pairs [B], and the probability [B] that the chosen completion was preferred with: ½ for a
        tie, and less where the worse one was chosen.
    """
    drawn = draw_pairs(key, policy, config, count, given, held_out, greedy, label_noise)
    return drawn[:2]


def draw_pairs(
    key: jax.Array,
    policy: transformer.Model,
    config: Any,
    count: int,
    given: Any,
    held_out: bool = False,
    greedy: bool = False,
    label_noise: jax.Array | float = 0.0,
) -> tuple[data.Pairs, jax.Array, jax.Array]:
    """Do what `sample_pairs` does; also return the gold rewards [2B], in no order."""
    key_prompt, key_sample, key_label = random.split(key, 3)
    task = finetune.task_of(config, given)
    prompt_ids = task.prompts(key_prompt, count, held_out)
    twice = jnp.concatenate([prompt_ids, prompt_ids])
    completion = sample(key_sample, policy, twice, task, config.temperature)
    first_ids, second_ids = jnp.split(completion.ids, 2)
    judge = getattr(given, "judge", None)
    reward, gold = rewards(given, task, twice, completion)
    if judge is None:
        probability = preference.preference_probability(*jnp.split(reward, 2))
    else:
        log_odds = comparison.log_odds(judge, prompt_ids, first_ids, second_ids, task)
        probability = nn.sigmoid(log_odds)
    if greedy:
        probability = 0.5 * (1.0 + jnp.sign(probability - 0.5))
    probability = data.noisy(probability, label_noise)
    return *data.label(key_label, prompt_ids, first_ids, second_ids, probability), gold


def in_parts(
    draw: Callable[[jax.Array, int], data.Pairs], key: jax.Array, count: int
) -> data.Pairs:
    """Draw at most DRAWN_AT_ONCE pairs at a time with `draw(key, rows)` -> Pairs [count]."""
    rows = min(DRAWN_AT_ONCE, count)
    pairs = lax.map(lambda key: draw(key, rows), random.split(key, -(-count // rows)))
    return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1])[:count], pairs)


def score(
    key: jax.Array, policy: transformer.Model, config: Any, num_episodes: int, given: Any
) -> dict[str, jax.Array]:
    """Evaluate a policy on held-out prompts, beside its reference.

    Args:
        key: for prompts and completions.
        policy: the trained model.
        config: its `task` and `temperature` are read.
        num_episodes: E, completions.
        given: with the model `reference`, and perhaps a model `reward` or `judge`.

    Returns:
        Arrays [E]: `evaluation/return`, the gold reward; `length` in tokens; `finished`, whether
        there is an end token; `kl`, the sum over the completion's tokens of the exact divergence
        from the reference, in nats; `win`, 1 where the gold reward is above that of a completion
        by the reference, ½ where equal; `proxy_return`, of the given reward model; `judged_win`,
        the probability of such a win to the given judge, asked in both orders. If the task has
        right answers, also estimates of `pass@k` for the episode's prompt, from max(PASS_AT)
        samples of it. A published model scores `batch_size` prompts of its file at a time.
    """
    if not is_of_file(given):
        return _score(key, policy, config, num_episodes, given)
    size = min(config.batch_size, num_episodes)

    def part(key: jax.Array) -> dict[str, jax.Array]:
        return _score(key, policy, config, size, given)

    parts = lax.map(part, random.split(key, -(-num_episodes // size)))
    return {name: values.ravel()[:num_episodes] for name, values in parts.items()}


def _score(
    key: jax.Array, policy: transformer.Model, config: Any, num_episodes: int, given: Any
) -> dict[str, jax.Array]:
    """Compute what `score` returns."""
    task, temperature = finetune.task_of(config, given), config.temperature
    key_prompt, key_policy, key_reference = random.split(key, 3)
    prompt_ids = task.prompts(key_prompt, num_episodes, held_out=True)
    completion, rates = pass_rates(key_policy, policy, prompt_ids, task, temperature)
    other = sample(key_reference, given.reference, prompt_ids, task, temperature)
    proxy, gold = rewards(given, task, prompt_ids, completion)
    baseline = rewards(given, task, prompt_ids, other)[1]
    log_p, log_q = (
        nn.log_softmax(tokens.before(m, prompt_ids, completion.ids, task.pad_id) / temperature)
        for m in (policy, given.reference)
    )
    kl = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    values = {
        "return": gold,
        "length": completion.mask.sum(1).astype(jnp.float32),
        "finished": tokens.finished(completion.ids, task.eos_id).astype(jnp.float32),
        "kl": preference.masked_sum(kl, completion.mask, 1),
        "win": (gold > baseline) + 0.5 * (gold == baseline),
        **rates,
    }
    if getattr(given, "reward", None) is not None:
        values["proxy_return"] = proxy
    if getattr(given, "judge", None) is not None:
        asked = (given.judge, prompt_ids, completion.ids, other.ids, task)
        values["judged_win"] = nn.sigmoid(comparison.log_odds(*asked))
    return {f"evaluation/{name}": value for name, value in values.items()}


def samples(
    key: jax.Array, policy: transformer.Model, config: Any, num_samples: int, given: Any
) -> dict[str, list[Any]]:
    """Return held-out prompts with completions by the reference and by the policy, as text.

    Args:
        key: for prompts and completions.
        policy: the trained model.
        config: its `task` and `temperature` are read.
        num_samples: how many.
        given: with the model `reference`.

    Returns:
        Columns of equal length: `prompt`, `reference`, `reference reward`, `policy`, `policy
        reward`.
    """
    task = finetune.task_of(config, given)
    key_prompt, *keys = random.split(key, 3)
    prompt_ids = task.prompts(key_prompt, num_samples, held_out=True)
    columns: dict[str, list[Any]] = {"prompt": [task.text(ids) for ids in np.asarray(prompt_ids)]}
    for key, name in zip(keys, ("reference", "policy"), strict=True):
        model = given.reference if name == "reference" else policy
        draw = jax.jit(sample, static_argnums=3)
        completion = draw(key, model, prompt_ids, task, config.temperature)
        gold = rewards(given, task, prompt_ids, completion)[1]
        columns[name] = [task.text(ids) for ids in np.asarray(completion.ids)]
        columns[f"{name} reward"] = np.asarray(gold, float).round(3).tolist()
    return columns


def frontier(key: jax.Array, config: Any, given: Any) -> dict[str, Any]:
    """Return the largest mean gold reward that any policy reaches at each divergence.

    The policy π*_β, proportional to π_ref exp(r / β), is the best at its own divergence from the
    reference, so β from large to small traces the frontier. Where a task has few completions, the
    expectations are exact. Where the reward is a sum over neighbouring tokens, they are estimated
    from samples that are nearly those of π*_β (`tilt.py`). Otherwise, from samples of the
    reference, as in Ziegler et al. 2019, arXiv:1909.08593, figure 3. A point is left out if too few
    samples count. Where there are many prompts, some are drawn.

    Args:
        key: for the samples.
        config: its `task` and `temperature` are read.
        given: with the model `reference`.

    Returns:
        Arrays [K]: `kl`, ascending, and `return`, over the held-out prompts; and `exact`, whether
        the expectations are.
    """
    task, reference = tasks.make(config.task), given.reference
    arrays = random.key_data(key), config.temperature, *jax.tree.leaves(reference)
    digest = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in arrays)).digest()
    asked = task, reference.architecture, digest
    if asked not in FRONTIERS:
        FRONTIERS[asked] = _frontier(key, reference, task, config.temperature)
    return FRONTIERS[asked]


def _frontier(
    key: jax.Array,
    reference: transformer.Model,
    task: tasks.Task,
    temperature: jax.Array | float,
) -> dict[str, Any]:
    """Compute what `frontier` returns."""
    held_out = task.held_out if task.held_out.any() else ~task.held_out
    prompt_ids, weight = task.prompt_ids[held_out], task.prompt_probability[held_out]
    exact = task.completion_ids is not None and len(prompt_ids) <= FRONTIER_PROMPTS
    if len(prompt_ids) > FRONTIER_PROMPTS:
        key, key_prompt = random.split(key)
        drawn = task.prompts(key_prompt, FRONTIER_PROMPTS, held_out=True)
        prompt_ids, weight = np.asarray(drawn), np.ones(FRONTIER_PROMPTS)
    mean = functools.partial(np.average, axis=0, weights=weight)
    if task.additive is not None:
        betas = jnp.geomspace(30.0, 0.05, 30)
        points = tilt.frontier(key, reference, jnp.asarray(prompt_ids), task, temperature, betas)
        expected, kl, effective = map(np.asarray, points)
        enough = effective.min(0) >= LEAST_SAMPLES
        return {"kl": mean(kl)[enough], "return": mean(expected)[enough], "exact": False}
    length = len(prompt_ids) * task.completion_length  # tokens of one sample of each prompt
    count = min(FRONTIER_SAMPLES, -(-FRONTIER_TOKENS // length))
    table = jax.jit(_table, static_argnums=(3, 5))
    log_weight, reward = table(key, reference, prompt_ids, task, temperature, count)
    betas = jnp.geomspace(30.0, 0.03, 60)
    of_prompt = jax.vmap(lambda w, r: preference.frontier(w[None], r[None], betas))
    expected, kl = map(np.asarray, jax.jit(of_prompt)(log_weight, reward))  # [X, K]
    enough = np.full(len(betas), True)
    if task.completion_ids is None:  # the entropy of the weights says how many samples count
        enough = kl.max(0) <= np.log(count / LEAST_SAMPLES)
    exact = task.completion_ids is not None
    return {"kl": mean(kl)[enough], "return": mean(expected)[enough], "exact": exact}


def _table(
    key: jax.Array,
    reference: transformer.Model,
    prompt_ids: jax.Array,
    task: tasks.Task,
    temperature: jax.Array | float,
    num_samples: int,
) -> tuple[jax.Array, jax.Array]:
    """Return log-weights and gold rewards [X, N] of all completions, or of samples, per prompt."""
    every = task.completion_ids
    count = num_samples if every is None else len(every)

    def one(now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        key, prompt = now
        ids = jnp.broadcast_to(prompt, (count, len(prompt)))
        if every is None:
            completion = sample(key, reference, ids, task, temperature)
            reward = task.reward(ids, completion.ids, completion.mask)
            return jnp.full(count, -np.log(count)), reward
        mask = tokens.completion_mask(jnp.asarray(every), task.eos_id)
        log_prob = token_log_probs(reference, ids, jnp.asarray(every), task, temperature)
        return preference.masked_sum(log_prob, mask, 1), task.reward(ids, jnp.asarray(every), mask)

    return lax.map(one, (random.split(key, len(prompt_ids)), jnp.asarray(prompt_ids)))


def check_given(config: Any, given: Any) -> None:
    """Raise an InputError unless the given models fit the task, or each other."""
    for name in ("reference", "teacher", "writer", "reward"):
        model = getattr(given, name, None)
        if model is not None:
            check_model(config, name, model)


def check_model(
    config: Any, name: str, model: transformer.Model, longest: int | None = None
) -> None:
    """Raise an InputError unless a given model fits the task.

    Args:
        config: its `task` is read.
        name: the field of the trainer's `Given`; "reward" is a reward model, others are language
            models.
        model: whose parameters may be jax.ShapeDtypeStruct.
        longest: tokens of the longest sequence that it sees; None: a prompt and a completion.
    """
    task, a = tasks.make(config.task), model.architecture
    makes = {False: "a language model", True: "a reward model"}
    wanted, actual = name == "reward", a.output != "tokens"
    configs.require(
        wanted == actual, f"given {name} must be {makes[wanted]}, but is {makes[actual]}."
    )
    configs.require(
        a.output not in ("product", "minimum") or task.steps is not None,
        f"given {name} must be a reward model of whole completions, because task "
        f"{config.task!r} has no steps, but takes the {a.output} over steps.",
    )
    configs.require(
        a.vocab_size == len(task.words),
        f"given {name} must have the {len(task.words)} tokens of task {config.task!r}, "
        f"but has {a.vocab_size}.",
    )
    longest = longest or task.prompt_length + task.completion_length
    configs.require(
        a.positions != "learned" or a.context >= longest,
        f"given {name} must have a context of at least {longest} tokens for task "
        f"{config.task!r}, but has {a.context}.",
    )
    expected, found = shapes_of(a), _shapes(model.params)
    wrong = min((x for x in {*expected, *found} if expected.get(x) != found.get(x)), default="")
    configs.require(
        not wrong,
        f"given {name} must have parameters of the shapes of its architecture, but {wrong} has the "
        f"shape {found.get(wrong)} instead of {expected.get(wrong)}.",
    )


@functools.cache
def shapes_of(architecture: transformer.Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter of a model, by its path."""
    model = jax.eval_shape(lambda key: transformer.init(key, architecture), random.key(0))
    return _shapes(model.params)


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in leaves}
