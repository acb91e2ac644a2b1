"""Write the golden values of TRL that the tests of preferences and language models compare with.

They are kept as JSON beside this file, so that the tests need neither torch nor trl. Three versions
are needed, each in an environment of its own, with torch 2.13.0 and transformers 5.24.0:

    trl 1.12.0, the last with a PPO trainer                     trl_ppo.json
    trl 1.13.0, the last with a trainer of process rewards      trl_prm.json
    trl 1.16.0                                                  all the others

Run `HF_HUB_OFFLINE=1 python tests/golden/make_trl.py` in each to make them again. The versions are
recorded in each file.

Everything that is compared comes out of the library's own code. Its trainers' methods are called on
a stand-in for the trainer, which has only the settings they read, and with a stand-in for the
language model, which returns log-probabilities drawn here. So losses can be differentiated with
respect to these, and no model is needed. What a method does not return is read from its local
variables, under the names they have there.
"""

import collections
import contextlib
import json
import pathlib
import sys
import types
from unittest import mock

import accelerate
import numpy as np
import torch
import transformers
import trl

HERE = pathlib.Path(__file__).parent
VERSIONS = {
    "trl": trl.__version__,
    "transformers": transformers.__version__,
    "torch": torch.__version__.split("+")[0],
}
torch.set_default_dtype(torch.float64)


def plain(value):
    """Nested lists of booleans, integers, or floats of 9 significant digits."""
    if isinstance(value, torch.Tensor):
        return plain(value.detach().tolist())
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def draw(rng, *shape, scale=1.0):
    return torch.as_tensor(rng.normal(scale=scale, size=shape))


def log_probs(rng, *shape):
    return torch.as_tensor(np.log(rng.uniform(0.05, 0.9, shape)))


def mask_of(lengths, longest):
    return torch.arange(longest)[None] < torch.as_tensor(lengths)[:, None]


def stand_in(**settings):
    """Object with what every loss of a trainer reads, and with these settings."""
    return types.SimpleNamespace(
        accelerator=accelerate.Accelerator(cpu=True),
        model=types.SimpleNamespace(training=True),
        aux_loss_enabled=False,
        _metrics={"train": collections.defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )


def slopes(loss, *leaves):
    return [plain(slope) for slope in torch.autograd.grad(loss, leaves)]


# --- reward model --------------------------------------------------------------------------------


def reward_model_case(seed, center, margin):
    rng = np.random.default_rng(seed)
    reward = draw(rng, 12, 1, scale=2.0).requires_grad_()
    inputs = {"attention_mask": torch.ones(12, 3)}
    if margin:
        inputs["margin"] = draw(rng, 6).abs()
    trainer = stand_in(args=types.SimpleNamespace(center_rewards_coefficient=center))
    loss = trl.RewardTrainer.compute_loss(
        trainer, lambda **_: types.SimpleNamespace(logits=reward), dict(inputs)
    )
    chosen, rejected = reward[:6, 0], reward[6:, 0]
    (slope,) = slopes(loss, reward)
    return {
        "center": center,
        "margin": inputs.get("margin", torch.zeros(6)),
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "loss": loss,
        "accuracy": trainer._metrics["train"]["accuracy"][0],
        "chosen_slope": [row[0] for row in slope[:6]],
        "rejected_slope": [row[0] for row in slope[6:]],
    }


# --- RLOO ----------------------------------------------------------------------------------------


def scored_completions(trainer_class, seed, prompts, group_size, **settings):
    """What a trainer makes of completions that are drawn here: their advantages."""
    rng = np.random.default_rng(seed)
    batch, longest = prompts * group_size, 5
    lengths = rng.integers(1, longest + 1, batch)
    lengths[0] = longest
    log_prob, ref_log_prob = log_probs(rng, 2, batch, longest)
    score = draw(rng, batch, scale=2.0)
    trainer = mock.MagicMock()
    for name, value in vars(stand_in(**settings)).items():
        setattr(trainer, name, value)
    trainer.num_generations = group_size
    trainer.reward_func_names, trainer.reward_weights = ["score"], torch.ones(1)
    trainer._tokenizer.pad_token_id = 0
    trainer._pending_extra_logs, trainer._pending_metrics = {}, {}
    for name in ("pad_to_multiple_of", "tools", "environments", "environment_factories"):
        setattr(trainer, name, None)
    trainer.mask_truncated_completions = trainer.use_vllm = False
    trainer.args.steps_per_generation = trainer.args.gradient_accumulation_steps = 1
    trainer.num_iterations = 1
    ids, texts = [[1] * n for n in lengths], [""] * batch
    trainer._generate.return_value = [[1]] * batch, ids, texts
    if trainer_class is trl.GRPOTrainer:
        trainer._generate.return_value = [[1]] * batch, ids, None, texts, None, {}, None, None
    forward = [(log_prob, None, None), (ref_log_prob, None, None)]
    trainer._get_per_token_logps_and_entropies.side_effect = forward
    trainer._calculate_rewards.return_value = score[:, None]
    module = sys.modules[trainer_class.__module__]
    with mock.patch.object(
        module, "disable_gradient_checkpointing", lambda *_: contextlib.nullcontext()
    ):
        output = trainer_class._generate_and_score_completions(trainer, [{"prompt": ""}] * batch)
    return {
        "group_size": group_size,
        "score": score,
        "log_prob": log_prob,
        "ref_log_prob": ref_log_prob,
        "mask": mask_of(lengths, longest),
        "advantage": output["advantages"],
    }


def rloo_advantage_case(seed, beta, prompts, group_size):
    case = scored_completions(
        trl.RLOOTrainer,
        seed,
        prompts,
        group_size,
        beta=beta,
        reward_clip_range=None,
        normalize_advantages=False,
    )
    return {"beta": beta, **case}


def policy_batch(seed, batch=6, longest=4):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, batch)
    lengths[0] = longest
    old = log_probs(rng, batch, longest)
    return {
        "mask": mask_of(lengths, longest),
        "log_prob": (old + draw(rng, batch, longest, scale=0.2)).requires_grad_(),
        "old_log_prob": old,
        "ref_log_prob": old + draw(rng, batch, longest, scale=0.3),
        "advantage": draw(rng, batch),
    }


def policy_inputs(case):
    batch, longest = case["mask"].shape
    return {
        "prompt_ids": torch.ones(batch, 1, dtype=torch.long),
        "prompt_mask": torch.ones(batch, 1, dtype=torch.long),
        "completion_ids": torch.ones(batch, longest, dtype=torch.long),
        "completion_mask": case["mask"].long(),
        "advantages": case["advantage"],
        "old_logps": (case["old_log_prob"] * case["mask"]).sum(1),
        "old_per_token_logps": case["old_log_prob"],
        "ref_per_token_logps": case["ref_log_prob"],
        "num_items_in_batch": case["mask"].sum(),
    }


def policy_loss(trainer_class, case, **settings):
    trainer = stand_in(
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            case["log_prob"],
            torch.zeros_like(case["log_prob"]),
            None,
        ),
        **settings,
    )
    return trainer_class._compute_loss(trainer, None, policy_inputs(case))


def rloo_loss_case(seed, clip_eps):
    case = policy_batch(seed)
    loss = policy_loss(trl.RLOOTrainer, case, epsilon_low=clip_eps, epsilon_high=clip_eps)
    (slope,) = slopes(loss, case["log_prob"])
    return {"clip_eps": clip_eps, **case, "loss": loss, "slope": slope}


# --- GRPO ----------------------------------------------------------------------------------------


def grpo_advantage_case(seed, scale, prompts=3, group_size=4):
    case = scored_completions(
        trl.GRPOTrainer,
        seed,
        prompts,
        group_size,
        beta=0.0,
        scale_rewards=scale,
        multi_objective_aggregation="sum_then_normalize",
    )
    return {"scale": scale, **case}


def grpo_loss_case(loss_type, level="token", beta=0.0, times_ratio=False, high=0.2, seed=21):
    case = policy_batch(seed)
    settings = {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "beta": beta,
        "epsilon_low": 0.2,
        "epsilon_high": high,
        "max_completion_length": 7,
    }
    loss = policy_loss(
        trl.GRPOTrainer,
        case,
        args=types.SimpleNamespace(
            use_bias_correction_kl=times_ratio, delta=None, steps_per_generation=1
        ),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        **settings,
    )
    (slope,) = slopes(loss, case["log_prob"])
    return {**settings, "kl_times_ratio": times_ratio, **case, "loss": loss, "slope": slope}


# --- distillation --------------------------------------------------------------------------------


def distill_case(beta, temperature, seed=41, batch=4, longest=3, words=5):
    rng = np.random.default_rng(seed)
    mask = mask_of([3, 1, 2, 3], longest)
    logits = draw(rng, batch, longest, words).requires_grad_()
    teacher_logits = draw(rng, batch, longest, words)
    # The outputs of a model whose head is the identity are its logits.
    head = torch.eye(words)
    loss_of = sys.modules[trl.DistillationTrainer.__module__]._chunked_divergence_loss
    loss, *_ = loss_of(
        logits, teacher_logits, head, head, mask.long(), beta, temperature=temperature
    )
    (slope,) = slopes(loss, logits)
    return {
        "beta": beta,
        "temperature": temperature,
        "mask": mask,
        "logits": logits,
        "teacher_logits": teacher_logits,
        "loss": loss,
        "slope": slope,
    }


# --- DPO and KTO ---------------------------------------------------------------------------------


def scored_model(log_prob):
    """Model whose log-probabilities of the completions' tokens are given, 0 outside them."""
    rest = torch.zeros_like(log_prob)
    outputs = types.SimpleNamespace(
        log_probs=log_prob, entropy=rest, mean_logits=rest, is_top1=rest.bool()
    )
    return lambda **_: outputs


def completions(rng, batch, longest=4):
    lengths = rng.integers(1, longest + 1, batch)
    mask = mask_of(lengths, longest)
    log_prob = log_probs(rng, batch, longest).requires_grad_()
    ref_log_prob = (log_prob.detach() + draw(rng, batch, longest, scale=0.4)) * mask
    # A column for the prompt, whose token is not trained on.
    inputs = {
        "input_ids": torch.ones(batch, longest + 1, dtype=torch.long),
        "attention_mask": torch.ones(batch, longest + 1, dtype=torch.long),
        "completion_mask": torch.cat([torch.zeros(batch, 1), mask], 1).long(),
    }
    return log_prob, ref_log_prob, mask, inputs


def dpo_case(loss_type, beta=0.3, label_smoothing=0.0, pairs=5, seed=31):
    log_prob, ref_log_prob, mask, inputs = completions(np.random.default_rng(seed), 2 * pairs)
    inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = ref_log_prob.sum(1).chunk(2)
    trainer = stand_in(
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
    )

    def loss_of(rows):
        part = {name: value[rows] for name, value in inputs.items() if name[:3] != "ref"}
        firsts = rows[: len(rows) // 2]
        part |= {name: value[firsts] for name, value in inputs.items() if name[:3] == "ref"}
        model = scored_model((log_prob * mask)[rows])
        return trl.DPOTrainer._compute_loss(trainer, model, part, False)

    # Some of the losses sort the pairs of a batch; of a single pair, each is a loss of that pair.
    loss = torch.stack([loss_of(torch.tensor([i, i + pairs])) for i in range(pairs)])
    (slope,) = slopes(loss.sum(), log_prob)
    return {
        "loss_type": loss_type,
        "beta": beta,
        "label_smoothing": label_smoothing,
        "mask": mask,
        "log_prob": log_prob,
        "ref_log_prob": ref_log_prob,
        "loss": loss,
        "slope": slope,
    }


def kto_case(seed, beta, desirable_weight, undesirable_weight, batch=6):
    rng = np.random.default_rng(seed)
    log_prob, ref_log_prob, mask, inputs = completions(rng, batch)
    kl_log_prob, ref_kl_log_prob = draw(rng, 2, batch) - 3.0
    label = torch.as_tensor([True, False, True, True, False, True])
    trainer = stand_in(
        precompute_ref_logps=True,
        calculate_KL=True,
        _compute_kl_logps=lambda *_: kl_log_prob,
        loss_type="kto",
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )
    inputs |= {"label": label, "ref_logps": ref_log_prob.sum(1), "ref_KL_logps": ref_kl_log_prob}
    loss = trl.KTOTrainer._compute_loss(trainer, scored_model(log_prob * mask), inputs, False)
    (slope,) = slopes(loss, log_prob)
    return {
        "beta": beta,
        "desirable_weight": desirable_weight,
        "undesirable_weight": undesirable_weight,
        "label": label,
        "mask": mask,
        "log_prob": log_prob,
        "ref_log_prob": ref_log_prob,
        "mismatched_log_prob": kl_log_prob,
        "mismatched_ref_log_prob": ref_kl_log_prob,
        "kl": trainer._metrics["train"]["kl"][0],
        "loss": loss,
        "slope": slope,
    }


# --- SimPO and ORPO ------------------------------------------------------------------------------


def reference_free_case(trainer_class, seed, pairs=5, longest=4, **settings):
    """The loss of pairs, from a model of two tokens of which the second one is always chosen."""
    rng = np.random.default_rng(seed)
    mask = mask_of(rng.integers(1, longest + 1, 2 * pairs), longest)
    log_prob = log_probs(rng, 2 * pairs, longest).requires_grad_()
    logits = torch.stack([torch.log1p(-torch.exp(log_prob)), log_prob], -1)
    logits = torch.cat([logits, torch.zeros_like(logits[:, :1])], 1)
    # A column for the prompt, whose token is not predicted.
    attended = torch.cat([torch.ones(2 * pairs, 1), mask], 1).long()
    parts = {
        "input_ids": torch.ones_like(attended),
        "attention_mask": attended,
        "labels": torch.cat([torch.full((2 * pairs, 1), -100), torch.where(mask, 1, -100)], 1),
    }
    batch = {
        f"{name}_{part}": rows
        for part, both in parts.items()
        for name, rows in zip(("chosen", "rejected"), both.chunk(2), strict=True)
    }
    trainer = stand_in(
        is_encoder_decoder=False,
        pad_token_id=0,
        padding_value=0,
        concatenated_inputs=trainer_class.concatenated_inputs,
        get_batch_logps=trainer_class.get_batch_logps,
        **settings,
    )
    for name in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
        if hasattr(trainer_class, name):
            setattr(trainer, name, types.MethodType(getattr(trainer_class, name), trainer))
    model = lambda *_, **__: types.SimpleNamespace(logits=logits)  # noqa: E731
    loss, _ = trainer_class.get_batch_loss_metrics(trainer, model, batch)
    (slope,) = slopes(loss, log_prob)
    return {**settings, "mask": mask, "log_prob": log_prob, "loss": loss, "slope": slope}


def simpo_case(seed, beta, gamma):
    from trl.experimental.cpo import CPOTrainer

    settings = {"beta": beta, "simpo_gamma": gamma, "loss_type": "simpo"}
    settings |= {"cpo_alpha": 0.0, "alpha": 0.0, "label_smoothing": 0.0}
    return reference_free_case(CPOTrainer, seed, **settings)


def orpo_case(seed, beta):
    from trl.experimental.orpo import ORPOTrainer

    return reference_free_case(ORPOTrainer, seed, beta=beta)


# --- PPO -----------------------------------------------------------------------------------------

PAD, EOS, WORDS = 0, 1, 6
PPO_CONSTANTS = {
    "temperature": 1.0 - 1e-7,  # the trainer adds 1e-7
    "num_ppo_epochs": 1,
    "num_mini_batches": 1,
    "gradient_accumulation_steps": 1,
    "num_total_batches": 1,
    "total_episodes": 1,
    "logging_steps": None,
    "eval_steps": None,
    "save_steps": None,
    "missing_eos_penalty": None,
    "ds3_gather_for_generation": False,
    "num_sample_generations": 0,
    "vf_coef": 0.1,
}


def responses_of(rng, lengths, longest):
    """Completions of these lengths, that end with EOS unless they are the longest."""
    response = torch.as_tensor(rng.integers(2, WORDS, (len(lengths), longest)))
    for row, length in zip(response, lengths, strict=True):
        if length < longest:
            row[length - 1], row[length:] = EOS, PAD
    return response


def ppo_draws(seed):
    """What sampling, the models and the reward model return, for completions of 5 lengths."""
    rng = np.random.default_rng(seed)
    lengths, longest = [5, 3, 1, 4, 2], 5
    logits = draw(rng, len(lengths), longest, WORDS)
    value = draw(rng, len(lengths), longest)
    return types.SimpleNamespace(
        query=torch.full((len(lengths), 1), 2),
        response=responses_of(rng, lengths, longest),
        logits=logits,
        new_logits=(logits + draw(rng, *logits.shape, scale=0.3)).requires_grad_(),
        ref_logits=logits + draw(rng, *logits.shape, scale=0.5),
        value=value,
        new_value=(value + draw(rng, *value.shape, scale=0.3)).requires_grad_(),
        score=draw(rng, len(lengths), scale=2.0),
    )


def ppo_stand_in(drawn, **settings):
    trainer = mock.MagicMock()
    batch, longest = drawn.response.shape
    names = ("batch_size", "local_batch_size", "local_mini_batch_size")
    names += ("per_device_train_batch_size", "local_rollout_forward_batch_size")
    trainer.args = types.SimpleNamespace(
        **PPO_CONSTANTS, **dict.fromkeys(names, batch), response_length=longest, **settings
    )
    control = mock.Mock(should_save=False)
    for event in ("on_train_begin", "on_step_end", "on_train_end"):
        getattr(trainer.callback_handler, event).return_value = control
    trainer.state = types.SimpleNamespace()
    trainer.accelerator.device = "cpu"
    trainer.is_deepspeed_enabled = False
    trainer.train_dataset_len = batch
    trainer.dataloader = [{"input_ids": drawn.query}]
    trainer.stop_token_id = EOS
    trainer.processing_class = types.SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS)
    return trainer


def ppo_models(trainer, drawn):
    """Replacements for the functions of the module that call a model."""

    def with_last(x):
        """Add the last position, whose prediction nothing was sampled from."""
        return torch.cat([x, torch.zeros_like(x[:, :1])], 1)

    def forward(model, *_):
        if model is trainer.ref_model:
            return types.SimpleNamespace(logits=with_last(drawn.ref_logits))
        output = types.SimpleNamespace(logits=with_last(drawn.new_logits))
        return output, with_last(drawn.new_value)[..., None]

    def get_reward(model, *_):
        if model is trainer.reward_model:
            return None, drawn.score.clone(), None
        return with_last(drawn.value)[..., None], None, None

    return {
        "forward": forward,
        "get_reward": get_reward,
        "batch_generation": lambda *_: (
            torch.cat([drawn.query, drawn.response], 1),
            drawn.logits,
        ),
        "unwrap_model_for_generation": lambda *_, **__: contextlib.nullcontext(mock.Mock()),
    }


def ppo_case(seed, **settings):
    """Run the whole of `PPOTrainer.train` for one update, and look at it twice on its way.

    Its log-probabilities are 1.0 outside the mask. It adds the score to the token *after* the last
    action if there is room, and trains the value there too: `value_mask` is longer by that token.
    """
    from trl.experimental.ppo import ppo_trainer

    drawn = ppo_draws(seed)
    trainer = ppo_stand_in(drawn, **settings)
    own_whiten = ppo_trainer.masked_whiten
    case = {**settings, "score": drawn.score}

    def whiten(values, mask, shift_mean=True):
        local = sys._getframe(1).f_locals
        whitened = own_whiten(values, mask, shift_mean)
        if shift_mean:  # the advantages
            case["mask"], case["value_mask"] = mask, ~local["padding_mask_p1"]
            case["old_log_prob"], case["ref_log_prob"] = local["logprobs"], local["ref_logprobs"]
            case["kl"], case["old_value"] = local["kl"], local["values"]
            case.setdefault("reward", local["rewards"])
            case["advantage"], case["target"] = values, local["returns"]
            case["whitened_advantage"] = whitened.masked_fill(~mask, 0.0)
        else:
            case["reward"] = values
            case["whitened_reward"] = whitened.masked_fill(~mask, 0.0)
        return whitened

    def backward(_):
        local = sys._getframe(1).f_locals
        row = torch.as_tensor(local["micro_batch_inds"]).argsort()  # the rows were shuffled
        policy, value = local["pg_loss"], local["vf_loss"]
        case["log_prob"], case["value"] = local["new_logprobs"][row], local["vpred"][row]
        case["policy_loss"], case["value_loss"] = policy, value
        for name, loss, leaf in (
            ("policy_slope", policy, local["new_logprobs"]),
            ("value_slope", value, local["vpred"]),
        ):
            case[name] = torch.autograd.grad(loss, leaf, retain_graph=True)[0][row]

    trainer.accelerator.backward = backward
    replaced = ppo_models(trainer, drawn) | {"masked_whiten": whiten}
    with mock.patch.multiple(ppo_trainer, **replaced):
        ppo_trainer.PPOTrainer.train(trainer)
    return case


def ppo_settings(kl_estimator, gamma, lam, whiten_rewards):
    return {
        "kl_estimator": kl_estimator,
        "kl_coef": 0.2,
        "gamma": gamma,
        "lam": lam,
        "whiten_rewards": whiten_rewards,
        "cliprange": 0.2,
        "cliprange_value": 0.2,
    }


# --- process reward model ------------------------------------------------------------------------


class Words:
    """A tokenizer of words between spaces."""

    bos_token_id = 1

    def __init__(self, words):
        self.words = words

    def __call__(self, text, **_):
        return {"input_ids": self.encode(text)}

    def encode(self, text, **_):
        return [self.words.index(word) for word in text.split()]


def prm_case(seed):
    from transformers.loss import loss_utils
    from trl.experimental import prm

    words = ["<pad>", "<bos>", "<end>", *"0123456789", ";", ":"]
    rows = [
        {"prompt": "3 5 2 9 :", "completions": ["8", "0", "9"], "labels": [True, True, True]},
        {"prompt": "3 5 2 9 :", "completions": ["8", "1"], "labels": [True, False]},
        {"prompt": "0 0 7 7 :", "completions": ["1"], "labels": [False]},
        {"prompt": "9 9 9 9 :", "completions": ["8", "7 7"], "labels": [True, False]},
    ]
    settings = {"max_length": None, "max_completion_length": None, "is_eval": False}
    settings |= {"train_on_last_step_only": False, "step_separator": ";"}
    tokenized = [prm.PRMTrainer.tokenize_row(row, Words(words), **settings) for row in rows]
    longest = max(len(row["labels"]) for row in tokenized)
    labels = [row["labels"] + [-100] * (longest - len(row["labels"])) for row in tokenized]
    logits = draw(np.random.default_rng(seed), len(rows), longest, 2).requires_grad_()
    # The loss of the trainer is that of its model, a token classifier with two classes.
    config = types.SimpleNamespace(num_labels=2)
    loss = loss_utils.ForTokenClassification(logits, torch.as_tensor(labels), config)
    return {
        "words": words,
        "ids": [row["input_ids"] for row in tokenized],
        "labels": labels,
        "logits": logits,
        "loss": loss,
        "slope": slopes(loss, logits)[0],
    }


def write(name, groups):
    text = json.dumps({"versions": VERSIONS, **plain(groups)}, indent=1)
    (HERE / name).write_text(text + "\n")


def write_ppo():
    write(
        "trl_ppo.json",
        {
            "cases": [
                ppo_case(41, **ppo_settings("k1", 1.0, 0.95, whiten_rewards=False)),
                ppo_case(42, **ppo_settings("k1", 1.0, 1.0, whiten_rewards=False)),
                ppo_case(43, **ppo_settings("k3", 0.9, 0.8, whiten_rewards=True)),
            ]
        },
    )


def write_prm():
    write("trl_prm.json", {"cases": [prm_case(61)]})


def write_rest():
    write(
        "trl_reward_model.json",
        {
            "cases": [
                reward_model_case(1, None, margin=False),
                reward_model_case(2, 0.1, margin=False),
                reward_model_case(3, 0.1, margin=True),
            ]
        },
    )
    write(
        "trl_rloo.json",
        {
            "advantages": [
                rloo_advantage_case(11, 0.05, prompts=3, group_size=4),
                rloo_advantage_case(12, 0.5, prompts=4, group_size=2),
            ],
            "losses": [rloo_loss_case(13, 0.2), rloo_loss_case(14, 0.1)],
        },
    )
    write(
        "trl_grpo.json",
        {
            "advantages": [grpo_advantage_case(22, scale) for scale in ("group", "batch", "none")],
            "losses": [
                *(grpo_loss_case(name) for name in ("grpo", "bnpo", "dr_grpo")),
                grpo_loss_case("dapo", high=0.28),
                grpo_loss_case("cispo", high=1.1),
                grpo_loss_case("grpo", level="sequence"),
                grpo_loss_case("grpo", beta=0.3),
                grpo_loss_case("grpo", beta=0.3, times_ratio=True),
            ],
        },
    )
    write(
        "trl_dpo.json",
        {
            "cases": [
                dpo_case("sigmoid"),
                dpo_case("ipo"),
                dpo_case("hinge"),
                dpo_case("sigmoid_norm"),
                dpo_case("robust", label_smoothing=0.1),
                # Its optimal transport sorts a batch of one pair, which leaves the loss of
                # conservative DPO: cross-entropy with smoothed labels.
                dpo_case("aot", label_smoothing=0.1),
            ]
        },
    )
    write(
        "trl_distill.json",
        {
            "cases": [
                *(distill_case(beta, 1.0) for beta in (0.0, 0.3, 1.0)),
                distill_case(0.5, 0.7),
            ]
        },
    )
    write("trl_kto.json", {"cases": [kto_case(51, 0.3, 1.0, 1.0), kto_case(52, 0.1, 1.0, 1.5)]})
    write("trl_simpo.json", {"cases": [simpo_case(61, 2.0, 0.5), simpo_case(62, 2.5, 1.375)]})
    write("trl_orpo.json", {"cases": [orpo_case(63, 0.1), orpo_case(64, 1.0)]})


if __name__ == "__main__":
    if trl.__version__ == "1.12.0":
        write_ppo()
    elif trl.__version__ == "1.13.0":
        write_prm()
    elif trl.__version__ == "1.16.0":
        write_rest()
    else:
        sys.exit(f"trl is {trl.__version__}; 1.12.0, 1.13.0 and 1.16.0 are needed")
