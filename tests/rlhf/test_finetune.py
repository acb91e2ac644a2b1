"""Published models trained on files: what is learned, what is refused, and what comes out."""

import dataclasses
import json
import pathlib
import re
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from purejaxpg import InputError, cli, contract, extras
from purejaxpg.report import playback
from purejaxpg.rlhf import (
    data,
    dpo,
    families,
    finetune,
    grpo,
    hf,
    kto,
    online_dpo,
    ppo,
    reward_model,
    rewards,
    rloo,
    sft,
    transformer,
)
from purejaxpg.rlhf import tokenizer as tokenizers
from purejaxpg.sweep import progress as progresses
from purejaxpg.sweep import session
from purejaxpg.sweep import store as stores

EXAMPLE = pathlib.Path(__file__).parents[2] / "experiments" / "published"
WORDS = ("<s>", "</s>", "<pad>")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}{{ eos_token }}|{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
CONFIG = {
    "model_type": "llama", "vocab_size": 262, "max_position_embeddings": 128, "hidden_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 12, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 2,
}  # fmt: skip
PAIR = {"prompt": "Hi", "chosen": " there", "rejected": " you"}
ANSWER = {"prompt": "Hi", "completion": " there"}
JUDGED = ({**ANSWER, "label": True}, {**ANSWER, "completion": " you", "label": False})
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]
SMALL = ("--max-length", "12", "--num-updates", "150", "--batch-size", "2", "--quiet")


@pytest.fixture(scope="module")
def checkpoint():
    package = extras.load("tokenizers", "lm", "This test")
    pieces = [*WORDS, *sorted(package.pre_tokenizers.ByteLevel.alphabet())]
    model = package.models.BPE({piece: i for i, piece in enumerate(pieces)}, [])
    backend = tokenizers.byte_level("gpt-2", model)
    backend.add_special_tokens(list(WORDS))
    own = tokenizers.make(backend, {}, CONFIG, TEMPLATE, pathlib.Path("here"))
    architecture = families.architecture_of(CONFIG, "here")
    return hf.Checkpoint(transformer.init(random.key(0), architecture), own, CONFIG)


@pytest.fixture
def folder(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hf.save("model", checkpoint)
    return tmp_path


def write(name, *records):
    pathlib.Path(name).write_text("\n".join(map(json.dumps, records)))


def targets(checkpoint, record):
    """Return the text that is to be learned, and the whole text, of a line."""
    write("one.jsonl", record)
    rows = finetune.read_rows(pathlib.Path("one.jsonl"), checkpoint, 60)
    ids, kept = np.asarray(rows.ids[0]), np.asarray(rows.segments[0]) > 0
    decode = checkpoint.tokenizer.backend.decode
    learned = decode(ids[np.asarray(rows.is_target[0])].tolist(), skip_special_tokens=False)
    return learned, decode(ids[kept].tolist(), skip_special_tokens=False)


def test_only_the_completion_is_learned_with_its_end(checkpoint, folder):
    assert targets(checkpoint, ANSWER) == (" there</s>", "Hi there</s>")


def test_only_what_the_assistant_says_is_learned(checkpoint, folder):
    learned, whole = targets(checkpoint, {"messages": [*CHAT, *CHAT]})
    assert learned == "bc</s>bc</s>"
    assert whole == checkpoint.tokenizer.chat([*CHAT, *CHAT], reply=False)


def test_pairs_answer_prompts_or_conversations(checkpoint, folder):
    write("pairs.jsonl", {"messages": CHAT[:1], "chosen": "b", "rejected": "c"})
    pairs = finetune.read_pairs(pathlib.Path("pairs.jsonl"), checkpoint, 30)
    decoded = checkpoint.tokenizer.decode(np.asarray(pairs.prompt_ids[0]), special=True)
    assert decoded == "user:a</s>|assistant:"


def test_pairs_are_padded_to_max_length(checkpoint, folder):
    write("pairs.jsonl", PAIR, {**PAIR, "prompt": "Hello"})
    pairs = finetune.read_pairs(pathlib.Path("pairs.jsonl"), checkpoint, 20)
    assert pairs.prompt_ids.shape == (2, 5)
    assert pairs.chosen_ids.shape == pairs.rejected_ids.shape == (2, 15)
    tokens = checkpoint.tokenizer
    assert [tokens.decode(ids) for ids in np.asarray(pairs.prompt_ids)] == ["Hi", "Hello"]
    assert tokens.decode(np.asarray(pairs.rejected_ids[1])) == " you"


@pytest.mark.parametrize("rank", [0, 2])
def test_a_model_is_trained_saved_and_completes(rank, checkpoint, folder, capsys):
    write("data.jsonl", ANSWER)
    words = ("train", "rlhf.sft", "--model", "model", "--data", "data.jsonl", *SMALL)
    rate = ("--learning-rate", "0.02", "--lora-rank", str(rank), "--out", "out")
    assert cli.main([*words, *rate]) == 0
    assert cli.main(["eval", "out", "--save", "trained"]) == 0
    trained = hf.load("trained")
    assert hf.complete(random.key(0), trained, ["Hi"], 8, greedy=True) == [" there"]
    assert hf.complete(random.key(0), checkpoint, ["Hi"], 8, greedy=True) != [" there"]
    assert cli.main(["train", "rlhf.sft", "--model", "./out", "--data", "data.jsonl", *SMALL]) == 2
    assert "out --save FOLDER" in capsys.readouterr().err


def runs_of(out):
    """Return the runs of a sweep, by seed."""
    with stores.Store.read(out) as store:
        return [playback.load(store, run, None, print) for run in store.ledger.runs()]


def test_dpo_prefers_what_was_chosen_and_starts_at_the_reference(checkpoint, folder):
    write("data.jsonl", PAIR)
    words = ("train", "rlhf.dpo", "--model", "model", "--data", "data.jsonl", *SMALL)
    assert cli.main([*words, "--lora-rank", "2", "--learning-rate", "0.05", "--out", "out"]) == 0
    (trained,) = runs_of("out")
    scores = dpo.score(random.key(0), trained.state, trained.config, 3, *trained.given)
    np.testing.assert_array_equal(scores["evaluation/return"], 1.0)
    start = dpo.init(random.key(0), trained.config, *trained.given)
    scores = dpo.score(random.key(0), start, trained.config, 3, *trained.given)
    np.testing.assert_array_equal(scores["evaluation/return"], 0.5)
    shapes = jax.tree.leaves(jax.tree.map(np.shape, trained.state.params))
    assert max(shapes) <= 96  # an adapter, and no second copy of the model


def test_kto_agrees_with_the_labels_and_starts_at_the_reference(folder, capsys):
    chat = {"messages": CHAT[:1], "completion": " there", "label": True}
    write("data.jsonl", *JUDGED, {**JUDGED[0], "prompt": "Hello"}, chat)
    write("others.jsonl", *({**line, "label": not line["label"]} for line in JUDGED))
    words = ("train", "rlhf.kto", "--model", "model", "--data", "data.jsonl", *SMALL)
    more = ("--max-length", "32", "--dtype", "bfloat16", "--learning-rate", "0.05")
    given = ("--given", "held_out=others.jsonl", "--lora-rank", "2", "--out", "out")
    assert cli.main([*words, *more, *given]) == 0
    (trained,) = runs_of("out")
    for given, expected in (trained.given[0], 0.0), (trained.given[0].replace(held_out=None), 1.0):
        scores = kto.score(random.key(0), trained.state, trained.config, 4, given)
        np.testing.assert_array_equal(scores["evaluation/return"], expected)
    start = kto.init(random.key(0), trained.config, *trained.given)
    scores = kto.score(random.key(0), start, trained.config, 4, *trained.given)
    np.testing.assert_array_equal(scores["evaluation/return"], 0.5)
    adapter, base = (jax.tree.leaves(x) for x in (start.params, given.reference))
    assert {str(x.dtype) for x in adapter} == {"float32"} and max(x.size for x in adapter) <= 192
    assert {str(x.dtype) for x in base} == {"bfloat16"}
    capsys.readouterr()
    assert cli.main(["eval", "out", "--samples", "4"]) == 0
    told = capsys.readouterr().out
    assert "user:a" not in told and told.index("desirable  False") < told.index("desirable  True")
    assert cli.main(["eval", "out", "--save", "trained"]) == 0
    assert hf.load("trained", "bfloat16").model.architecture == given.reference.architecture


@pytest.mark.parametrize(
    ("mismatched", "expected"), [(2.5, [1.0, 1.0, 0.5]), (1.0, [0.0, 1.0, 1.0]), (-9.0, [0, 1, 1])]
)
def test_kto_counts_what_is_above_the_reference_point(mismatched, expected, monkeypatch):
    """A log-ratio of 2 is bad news for a policy that gives completions of other prompts 2.5."""
    ids = jnp.arange(3)[:, None]
    rows = data.Labelled(ids, ids, jnp.array([False, True, True]))

    def log_ratios(params, prompt_ids, completion_ids, config, given):
        own = jnp.array([2.0, 3.0, 2.5])[prompt_ids[:, 0]]
        return jnp.where((prompt_ids == completion_ids).all(1), own, mismatched)

    monkeypatch.setattr(kto, "log_ratios", log_ratios)
    given = types.SimpleNamespace(text="here", labelled=rows, held_out=None)
    scores = kto.score(random.key(0), types.SimpleNamespace(params=0), kto.Config(), 3, given)
    order = random.permutation(random.key(0), 3)
    np.testing.assert_array_equal(scores["evaluation/return"], np.array(expected)[order])


PIPELINE = """
[[stage]]
name = "likes"
agent = "rlhf.reward_model"
seeds = 2
[stage.config]
lora_rank = 2
remat = true
max_length = 12
batch_size = 2
num_updates = 40
learning_rate = 0.05
[stage.given]
model = "model"
data = "pairs.jsonl"
held_out = "others.jsonl"

[[stage]]
name = "policy"
agent = "rlhf.rloo"
seeds = 2
[stage.config]
completion_length = 4
batch_size = 8
num_updates = 40
learning_rate = 0.02
beta = 0.01
[stage.given]
model = "model"
data = "prompts.jsonl"
reward = "likes"
"""


def test_a_policy_learns_what_a_reward_model_of_an_earlier_stage_likes(folder):
    write("pairs.jsonl", PAIR, {**PAIR, "prompt": "Hello"})
    write("others.jsonl", {**PAIR, "chosen": PAIR["rejected"], "rejected": PAIR["chosen"]})
    write("prompts.jsonl", {"prompt": "Hi"})
    pathlib.Path("both.toml").write_text(PIPELINE.replace("12", "13", 1))
    assert cli.main(["sweep", "both.toml", "--out", "out", "--devices", "1", "--quiet"]) == 0
    for likes, policy in zip(runs_of("out/likes"), runs_of("out/policy"), strict=True):
        for given, expected in (likes.given[0], 0.0), (likes.given[0].replace(held_out=None), 1.0):
            scores = reward_model.score(random.key(0), likes.state, likes.config, 2, given)
            np.testing.assert_array_equal(scores["evaluation/return"], expected)
        made = reward_model.model(likes.state, likes.config, *likes.given)
        assert made.adapter is None and made.architecture.output == "scalar"
        assert not made.architecture.remat
        given = policy.given[0].reward
        jax.tree.map(np.testing.assert_array_equal, given.params, made.params)
    with stores.Store.read("out/policy") as store:
        (unit,) = store.ledger.units()
        score = store.arrays(unit["name"])["reward/score"]
    assert (score[:, -5:].mean(1) > score[:, :5].mean(1) + 0.5).all()


@pytest.mark.parametrize("rank", [0, 2])
def test_a_scalar_head_is_trained_with_the_body_or_its_adapter(rank, checkpoint):
    model, config = checkpoint.model, dpo.Config(lora_rank=rank)
    ids = np.arange(3, 11)[None]
    start = finetune.start_scalar(random.key(1), model, config, 1.0)

    def square(params):
        values = finetune.scalar(params, model, config)(ids, np.ones_like(ids))
        return (values**2).sum(), values

    (_, values), gradient = jax.jit(jax.value_and_grad(square, has_aux=True))(start)
    assert values.shape == ids.shape
    body = model.params if rank else start
    architecture = dataclasses.replace(model.architecture, output="scalar")
    alone = transformer.Model({**body, "head": start["head"]}, architecture)
    np.testing.assert_allclose(values, alone(ids, np.ones_like(ids)), atol=1e-6)
    adapter = gradient.get("adapter", gradient)["layer_0"]
    trained = [gradient["head"], *(adapter[name] for name in ("qkv", "out", "down"))]
    assert all(np.any(layer["b" if rank and "b" in layer else "kernel"]) for layer in trained)
    assert start.keys() == ({"adapter", "head"} if rank else {*model.params, "head"})
    moved = jax.tree.map(lambda x: x + 0.1, start)
    adapted = finetune.scalar(moved, model, config)
    expected = adapted(ids, np.ones_like(ids))
    assert np.abs(expected - values).min() > 0.01
    kept = finetune.merged(adapted)
    assert kept.adapter is None
    np.testing.assert_allclose(kept(ids, np.ones_like(ids)), expected, rtol=0, atol=1e-5)
    zero = finetune.scalar(finetune.start_scalar(random.key(1), model, config, 0.0), model, config)
    assert not np.any(zero(ids, np.ones_like(ids)))


# ------------------------------------------------------------------------------------------ memory


def deep(remat, checkpoint):
    """Return a loss of SFT's parameters with a model of several layers, and these parameters."""
    config = sft.Config(max_length=16, remat=remat)
    architecture = dataclasses.replace(checkpoint.model.architecture, num_layers=4)
    model = transformer.init(random.key(3), architecture)
    given = sft.Given(model=model, text=finetune.Text(None, 1, 2))
    ids = random.randint(random.key(4), (5, 16), 3, 262)
    rows = data.Rows(ids, jnp.ones_like(ids), ids > 9)
    return (lambda params: sft.loss(params, rows, config, given)[0]), model.params


def test_computing_activations_again_keeps_fewer_of_them_for_the_same_gradient(checkpoint):
    found, kept = [], []
    for remat in (False, True):
        loss, params = deep(remat, checkpoint)
        found.append(jax.jit(jax.value_and_grad(loss))(params))
        pull = jax.eval_shape(lambda params, loss=loss: jax.vjp(loss, params)[1], params)
        kept.append(sum(x.size for x in jax.tree.leaves(pull) if x.shape[:1] == (5,)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *found)
    assert 2 * kept[1] < kept[0]


@pytest.mark.parametrize("trainer", [sft, dpo, kto, reward_model, grpo, rloo, online_dpo, ppo])
def test_every_trainer_computes_activations_again_if_asked(trainer, checkpoint):
    names = {f.name for f in dataclasses.fields(trainer.Given)}
    given = trainer.Given(**{({"model", "reference"} & names).pop(): checkpoint.model})
    config = trainer.Config(lora_rank=2, remat=True)
    params = trainer.init(random.key(0), config, given).params
    own = trainer.reward_of if trainer is reward_model else trainer.policy_of
    assert own(params, config, given).architecture.remat
    assert not trainer.model(
        trainer.init(random.key(0), config, given), config, given
    ).architecture.remat


def test_small_steps_in_half_precision_add_up(folder):
    write("data.jsonl", ANSWER)
    words = ("train", "rlhf.sft", "--model", "model", "--data", "data.jsonl", *SMALL)
    rates = ("--learning-rate", "1e-4", "--learning-rate-schedule", "constant")
    assert cli.main([*words, *rates, "--dtype", "bfloat16", "--out", "out"]) == 0
    (trained,) = runs_of("out")
    params = trained.state.params
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"bfloat16"}
    scale = np.asarray(params["final_norm"]["scale"], np.float32)  # from 1, in steps of 1/256
    assert np.mean(scale != 1.0) > 0.5
    assert cli.main(["eval", "out", "--save", "trained"]) == 0
    saved = hf.load("trained", "bfloat16").model.params
    jax.tree.map(np.testing.assert_array_equal, saved, params)


def example(folder):
    """Copy the example of the documentation, with the model that is here and fewer updates."""
    shutil.copytree(EXAMPLE, folder, dirs_exist_ok=True)
    path = folder / "adapters.toml"
    shown = path.read_text(encoding="utf-8")
    changed = re.sub('"smollm2"', '"model"', shown).replace("num_updates = 20", "num_updates = 4")
    assert shown.count('"smollm2"') == 1
    path.write_text(changed.replace("max_length = 64", "max_length = 110"), encoding="utf-8")
    return path


def test_a_sweep_shares_the_model_and_its_rows_differ(folder):
    path = example(folder)
    assert cli.main(["sweep", str(path), "--out", "out", "--devices", "1", "--quiet"]) == 0
    with stores.Store.read("out") as store:
        runs = store.ledger.runs()
        loaded = [playback.load(store, run, None, print) for run in runs]
    assert len(runs) == 4
    assert loaded[0].given[0].reference.params["embed"]["embedding"].shape == (262, 32)
    trained = {jax.tree.leaves(one.state.params)[0].tobytes() for one in loaded}
    assert len(trained) == 4


def test_a_large_model_has_fewer_rows_on_a_core(checkpoint):
    config = rloo.Config(completion_length=4, batch_size=8, group_size=2)
    wide = dataclasses.replace(checkpoint.model.architecture, width=320, num_layers=4)
    sizes = [
        contract.activations(config, rloo, contract.Given(rloo.Given(transformer.Model({}, each))))
        for each in (checkpoint.model.architecture, wide)
    ]
    assert sizes[1] == 40 * sizes[0]


def arrays(out):
    with stores.Store.read(out) as store:
        (unit,) = store.ledger.units()
        return dict(store.arrays(unit["name"]))


def test_a_sweep_of_adapters_resumes_to_the_same_bits(folder, monkeypatch):
    path = example(folder)
    whole = session.Options(out=folder / "whole", devices=1, quiet=True)
    assert session.sweep(path, whole) == 0
    halves = dataclasses.replace(whole, out=folder / "halves", snapshot_every_s=0.0)
    advance, seen = progresses.Progress.advance, []

    def interrupted(self, *arguments):
        advance(self, *arguments)
        seen.append(self.done_steps)
        if len(seen) == 2:  # of four updates
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(progresses.Progress, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.sweep(path, halves)
    assert list((folder / "halves" / "progress").iterdir())
    assert session.sweep(path, halves) == 0
    expected, actual = arrays(whole.out), arrays(halves.out)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(value, actual[name], err_msg=name)


# ------------------------------------------------------------------------- policies and rewards


def test_files_of_the_example_can_be_read(checkpoint):
    rows = {
        "answers": lambda path: finetune.read_rows(path, checkpoint, 128).ids,
        "pairs": lambda path: finetune.read_pairs(path, checkpoint, 128).chosen_ids,
        "prompts": lambda path: finetune.read_prompts(path.name, EXAMPLE, checkpoint),
    }
    paths = sorted(EXAMPLE.glob("*.jsonl"))
    assert len(paths) == 6
    for path in paths:
        kind, _, held_out = path.stem.partition("_")
        assert len(rows[kind](path)) == (6 if held_out else 12)


def test_the_reward_of_the_example_likes_short_right_answers():
    score = rewards.function_of(rewards.read(EXAMPLE / "reward.py"))
    answers = ("Oslo.", "The capital is Oslo.", "Bergen.")
    np.testing.assert_allclose(
        score([""] * 3, answers, [{"answer": "Oslo"}] * 3), [0.95, 0.8, -0.07]
    )


REWARD = """
from pathlib import Path

def reward(prompts, completions, rows):
    with Path("calls.txt").open("a") as log:
        log.write(f"{len(prompts)} {sorted(set(prompts))} {sorted({r['best'] for r in rows})}\\n")
    pairs = zip(completions, rows, strict=True)
    return [sum(getattr(c, row["best"])() for c in text) / 4 for text, row in pairs]
"""
PROMPTS = ({"prompt": "Hi", "best": "isascii"}, {"messages": CHAT[:1], "best": "isalpha"})
SEEN = "['Hi', 'user:a</s>|assistant:'] ['isalpha', 'isascii']"  # prompts, and fields of rows
ON_POLICY = {
    "ppo": ("--num-epochs", "1", "--remat", "true"),
    "rloo": ("--group-size", "4"),
    "grpo": ("--group-size", "4", "--num-epochs", "1", "--dtype", "bfloat16"),
    "online_dpo": (),
}
SAMPLED = (
    *("--model", "model", "--data", "prompts.jsonl", "--completion-length", "4"),
    *("--batch-size", "8", "--beta", "0.01", "--learning-rate-schedule", "constant"),
    *("--out", "out", "--quiet"),
)


@pytest.fixture
def prompts(folder):
    write("prompts.jsonl", *PROMPTS)
    pathlib.Path("reward.py").write_text(REWARD)
    return folder


def summary(out):
    with stores.Store.read(out) as store:
        (unit,) = store.ledger.units()
        return dict(store.arrays(unit["name"]))


@pytest.mark.parametrize("trainer", ON_POLICY)
def test_a_policy_learns_what_a_reward_file_likes(trainer, prompts, capsys):
    words = ("train", f"rlhf.{trainer}", *SAMPLED, "--given", "reward=reward.py")
    more = ("--num-updates", "60", "--learning-rate", "0.02")
    assert cli.main([*words, *more, *ON_POLICY[trainer]]) == 0
    curve = summary("out")["reward/gold"].ravel()
    assert curve[-10:].mean() > curve[:10].mean() + 0.3  # of four letters
    calls = pathlib.Path("calls.txt").read_text().splitlines()
    drawn = 16 if trainer == "online_dpo" else 8
    assert sum(line.startswith(f"{drawn} ") for line in calls) >= 60
    assert any(line.endswith(SEEN) for line in calls)
    assert cli.main(["eval", "out", "--agent", "stored", "--samples", "2"]) == 0
    assert "user:a</s>|assistant:" in capsys.readouterr().out


class Gym(types.ModuleType):
    """Stands in for reasoning_gym: what is asked of it, with sums."""

    factory = types.SimpleNamespace(DATASETS={"sums": None, "words": None})

    @staticmethod
    def create_dataset(name, seed, size):
        sums = [(seed * 1000 + i, i) for i in range(size)]
        return [{"question": f"{a}+{b}=", "answer": str(a + b), "metadata": {}} for a, b in sums]

    @staticmethod
    def get_score_answer_fn(name):
        return lambda answer, entry: 1.0 if answer == entry["answer"] else 0.1 * bool(answer)


def test_reasoning_gym_asks_and_scores(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "reasoning_gym", Gym("reasoning_gym"))
    words = ("train", "rlhf.rloo", *SAMPLED, "--num-updates", "1", "--data", "reasoning_gym:sums")
    assert cli.main([*words]) == 0
    with stores.Store.read("out") as store:
        given = playback.load(store, store.ledger.runs()[0], None, print).given[0]
    assert (len(given.text.prompt_ids), len(given.text.held_out_ids)) == (1000, 200)
    tokens = finetune.tokenizer_of(given.text)
    prompts = [
        tokens.decode(ids[0], special=True)
        for ids in (given.text.prompt_ids, given.text.held_out_ids)
    ]
    assert prompts == [f"user:{asked}=</s>|assistant:" for asked in ("0+0", "1000+0")]
    answers = [tokens.backend.encode(text).ids[:3] for text in ("0 \n", "1", "")]
    filled = [ids + [given.text.pad_id] * (3 - len(ids)) for ids in answers]
    scores = rewards.score(
        given.text.content,
        given.text.pad_id,
        jnp.repeat(given.text.prompt_ids[:1], 3, 0),
        jnp.array(filled),
    )
    np.testing.assert_allclose(scores, [1.0, 0.1, 0.0])
    capsys.readouterr()
    assert cli.main([*words[:-1], "reasoning_gym:sum"]) == 2
    assert "did you mean 'sums'" in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "reasoning_gym")
    assert cli.main([*words]) == 1
    assert "Data of reasoning_gym needs more packages" in capsys.readouterr().err


def test_a_result_directory_runs_no_reward_file_by_itself(prompts, capsys):
    words = ("train", "rlhf.rloo", *SAMPLED, "--given", "reward=reward.py", "--num-updates", "1")
    assert cli.main([*words]) == 0
    assert cli.main(["eval", "out"]) == 2
    assert "--agent stored allows it" in capsys.readouterr().err
    assert cli.main(["eval", "out", "--agent", "stored"]) == 0
    assert "return" in capsys.readouterr().out


def test_runs_of_a_sweep_share_one_call_of_the_reward(prompts):
    pathlib.Path("study.toml").write_text(
        'agent = "rlhf.rloo"\nseeds = 2\neval_episodes = 8\nrows_per_device = 4\n'
        "[config]\ncompletion_length = 4\nnum_updates = 3\nbatch_size = 8\ngroup_size = 4\n"
        "lora_rank = 2\n[sweep]\nbeta = [0.1, 1.0]\n"
        '[given]\nmodel = "model"\ndata = "prompts.jsonl"\nreward = "reward.py"\n'
    )
    assert cli.main(["sweep", "study.toml", "--out", "out", "--devices", "1", "--quiet"]) == 0
    calls = pathlib.Path("calls.txt").read_text().splitlines()
    assert sum(line.startswith("32 ") for line in calls) >= 3  # 4 runs with 8 completions each


REFUSED = {
    "no file": ((), "--data nothing.jsonl", "does not exist"),
    "no model": ((ANSWER,), "--model nowhere", "There is no folder nowhere"),
    "no JSON": (("{",), "", "line 1 must be an object in JSON"),
    "no object": ((3,), "", "line 1 must be an object in JSON"),
    "no field": ((ANSWER, {"prompt": "Hi"}), "", "line 2 must have the field 'completion'"),
    "no line": ((), "", "must have at least one line"),
    "no token": (({**ANSWER, "completion": ""},), "", "completion must have at least one token"),
    "an end inside": (({**ANSWER, "completion": "a</s>b"},), "", "only at its end"),
    "no assistant": (({"messages": CHAT[:1]},), "", "messages must be a list"),
    "too short rows": ((ANSWER,), "--max-length 3", "max_length must be at least 9"),
    "a long line": (({**ANSWER, "completion": "a" * 130},), "", "at most 128 tokens, the context"),
    "long rows": ((ANSWER,), "--max-length 129", "max_length must be at most 128"),
    "a rank": ((ANSWER,), "--lora-rank -1", "lora_rank must be 0 or more"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_input_is_one_plain_sentence(case, folder, capsys):
    records, words, message = REFUSED[case]
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    pathlib.Path("data.jsonl").write_text("\n".join(lines))
    options = dict(zip(words.split()[::2], words.split()[1::2], strict=True))
    options = {"--model": "model", "--data": "data.jsonl", "--max-length": "12"} | options
    flat = [word for pair in options.items() for word in pair]
    assert cli.main(["train", "rlhf.sft", *flat, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


REFUSED_REWARDS = {
    "no file": (None, (), "given reward is the file"),
    "no function": ("x = 1", (), "must have a function reward(prompts, completions, rows)"),
    "no Python": ("def", (), "cannot be imported: SyntaxError"),
    "no UTF-8": ("# \xe9", (), "must be text in UTF-8"),
    "raises": ("def reward(*_):\n    raise KeyError('answer')", (), "failed: KeyError: 'answer'"),
    "too few": ("def reward(*_):\n    return [1.0]", (), "must return a list of 8 numbers"),
    "a word": ("def reward(p, *_):\n    return ['x'] * len(p)", (), "but one is 'x'"),
    "nothing": ("def reward(*_):\n    return None", (), "but returned None"),
    "not finite": ("def reward(p, *_):\n    return [float('nan')] * len(p)", (), "one is nan"),
    "no length": (REWARD, ("--completion-length", "0"), "completion_length must be 1 or more"),
    "a length": (REWARD, ("--completion-length", "120"), "at most 128 tokens"),
}


@pytest.mark.parametrize("case", REFUSED_REWARDS)
def test_a_wrong_reward_is_refused(case, prompts, capsys):
    source, words, message = REFUSED_REWARDS[case]
    pathlib.Path("reward.py").unlink()
    if source is not None:
        pathlib.Path("reward.py").write_text(source, encoding="latin-1")
    given = ("--given", "reward=reward.py", "--num-updates", "1")
    assert cli.main(["train", "rlhf.rloo", *SAMPLED, *given, *words]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert error.count("\n") == 1 or "reward.py, line" in error


def test_a_prompt_may_begin_with_the_padding(prompts):
    write("prompts.jsonl", {**PROMPTS[0], "prompt": "<pad>Hi"})
    words = ("train", "rlhf.rloo", *SAMPLED, "--given", "reward=reward.py", "--num-updates", "1")
    assert cli.main([*words]) == 0


def test_a_policy_needs_a_reward_and_clear_prompts(prompts, capsys):
    words = ("train", "rlhf.rloo", *SAMPLED, "--num-updates", "1")
    assert cli.main([*words]) == 2
    assert "must also be given reward" in capsys.readouterr().err
    for records, message in (
        (
            (PROMPTS[0], {**PROMPTS[0], "best": "isdigit"}),
            "those of an earlier line with its prompt",
        ),
        (({"messages": CHAT},), "the last one not by the assistant"),
        (({"prompt": ""},), "prompt must have at least one token"),
        (({"text": "Hi"},), "must have the field 'prompt' with a text"),
    ):
        write("prompts.jsonl", *records)
        assert cli.main([*words, "--given", "reward=reward.py"]) == 2
        assert message in capsys.readouterr().err


LABELLED = "rlhf.kto --data data.jsonl"
RATED = "rlhf.reward_model --data data.jsonl"
REFUSED_OFFLINE = {
    "no label": ((ANSWER, *JUDGED), LABELLED, "line 1 must have the field 'label'"),
    "a number": (({**ANSWER, "label": 1},), LABELLED, "'label' with true or false, but has 1"),
    "one label": (JUDGED[:1], LABELLED, "must have completions of both labels"),
    "a long one": (JUDGED, f"{LABELLED} --max-length 8", "max_length must be at least 9"),
    "one row": (JUDGED, f"{LABELLED} --batch-size 1", "batch_size must be 2 or more"),
    "no pair": ((ANSWER,), RATED, "must have the field 'chosen'"),
    "a writer": ((PAIR,), f"{RATED} --given writer=out/", "given writer must be absent"),
    "a reference": (
        (PAIR,),
        f"{RATED} --given reference=out/",
        "reference must be absent, because",
    ),
    "a reward": ((PAIR,), f"{RATED} --given reward=a.py", "no source beside a published model"),
    "no sweep": (
        ({"prompt": "Hi"},),
        "rlhf.rloo --data data.jsonl --completion-length 4 --given reward=nowhere",
        "nowhere",
    ),
    "a type": ((PAIR,), f"{RATED} --dtype float16", "dtype must be one of 'float32', 'bfloat16'"),
}


@pytest.mark.parametrize("case", REFUSED_OFFLINE)
def test_wrong_judgements_and_rewards_are_refused(case, folder, capsys):
    records, words, message = REFUSED_OFFLINE[case]
    write("data.jsonl", *records)
    trainer, *more = words.split()
    if "writer" in case or "reference" in case:
        train = ("train", "rlhf.sft", "--task", "enumerable-3-4", "--num-updates", "1")
        assert cli.main([*train, "--out", "out", "--quiet"]) == 0
        capsys.readouterr()
    length = () if trainer == "rlhf.rloo" else ("--max-length", "12")
    assert cli.main(["train", trainer, "--model", "model", *length, *more, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_model_has_one_type_for_all_runs(checkpoint):
    pairs = data.Pairs(*(jnp.zeros((1, 2), jnp.int32) for _ in range(3)))
    text = finetune.Text(None, 1, 2)
    given = reward_model.Given(checkpoint.model, pairs, text=text)
    config = reward_model.Config(max_length=4)
    reward_model.check_given(config, given)
    with pytest.raises(InputError, match="dtype must be 'float32', as of the model that all runs"):
        reward_model.check_given(dataclasses.replace(config, dtype="bfloat16"), given)
    with pytest.raises(InputError, match="dtype must be 'float32' without a published model"):
        sft.check_given(sft.Config(dtype="bfloat16"), sft.Given())


def test_a_trainer_that_takes_no_data_says_who_does(folder, capsys):
    words = ("--model", "model", "--data", "data.jsonl")
    assert cli.main(["train", "rlhf.judge", *words]) == 2
    assert "rlhf.sft, rlhf.dpo and rlhf.grpo, for example, take one" in capsys.readouterr().err


def test_fields_of_published_models_need_one():
    config = sft.Config(task="enumerable-3-4", lora_rank=2)
    with pytest.raises(InputError, match="lora_rank must be 0 without a published model"):
        sft.check_given(config, sft.Given())
    config = sft.Config(task="enumerable-3-4", max_length=9)
    with pytest.raises(InputError, match="max_length must be 0 without a published model"):
        sft.check_given(config, sft.Given())
