"""Checkers inside the compiled program against plain Python, on right, wrong and broken answers."""

import fractions
import operator

import jax
import numpy as np
import pytest
from jax import random

from purejaxpg.rlhf import tasks, tokens
from purejaxpg.rlhf.tasks import careless, chain, countdown

COUNT = 3000  # completions of each kind
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": fractions.Fraction}


def said(task, ids):
    """Words of a completion before its first end, and whether it has an end."""
    words = [task.words[i] for i in ids]
    return words[: words.index("<end>")] if "<end>" in words else words, "<end>" in words


def asked(task, ids):
    return [task.words[i] for i in ids if i != tasks.BOS]


def all_digits(words):
    return all(len(word) == 1 and word.isdigit() for word in words)


def addition(prompt, words, ended):
    plus = prompt.index("+")
    total = int("".join(prompt[:plus])) + int("".join(prompt[plus + 1 : -1]))
    return float(ended and words != [] and all_digits(words) and int("".join(words)) == total)


def dotted(prompt, words, ended):
    digits = words.index(".") if "." in words else len(words)
    form = digits <= prompt.index("+") + 1 and set(words[digits:]) <= {"."}
    return form * addition(prompt, words[:digits], ended)


def sorting(prompt, words, ended):
    return float(ended and words == sorted(prompt[:-1]))


def evaluated(words):
    """The value of an expression in postfix notation; None if it has none."""
    stack = []
    for word in words:
        if word in OPERATORS:
            if len(stack) < 2 or (word == "/" and stack[-1] == 0):
                return None
            second, first = stack.pop(), stack.pop()
            stack.append(OPERATORS[word](first, second))
        elif word.isdigit() and word != "0":
            stack.append(int(word))
        else:
            return None
        if stack[-1] != int(stack[-1]):
            return None
        stack[-1] = int(stack[-1])
    return stack[0] if len(stack) == 1 else None


def postfix(prompt, words, ended):
    equals = prompt.index("=")
    value = evaluated(words)
    if not ended or value is None:
        return 0.0
    numbers = sorted(word for word in words if word.isdigit())
    right = numbers == sorted(prompt[:equals]) and value == int("".join(prompt[equals + 1 :]))
    return 1.0 if right else 0.1


def sums(prompt, words, ended):
    *numbers, _ = prompt
    modulus = MODULUS[len(numbers)]
    lines = " ".join(words).split(";")
    form = lines[-1] == "" and len(lines) == len(numbers)
    form = form and all(len(line.split()) == 1 and line.strip().isdigit() for line in lines[:-1])
    return float(ended and form and int(lines[-2]) == sum(map(int, numbers)) % modulus)


MODULUS = {3: 3, 5: 10}  # of the chains here, by how many numbers are in the prompt
CHECKERS = {
    "addition-1": addition, "addition-2": addition, "addition-6": addition, "careless-2-4": dotted,
    "sorting-2": sorting, "sorting-4": sorting, "countdown-2": postfix, "countdown-3": postfix,
    "chain-2-3": sums, "chain-4-10": sums,
}  # fmt: skip


def broken(task, ids, seed):
    """Change answers: tokens replaced, swapped or repeated, the end too early or missing."""
    draw = np.random.default_rng(seed)
    ids, length = ids.copy(), task.completion_length
    last = (ids == task.eos_id).argmax(1)
    for row, end in zip(ids, last, strict=True):
        i, j = draw.integers(0, length, 2)
        kind = draw.integers(0, 7)
        if kind == 0:
            row[i] = draw.integers(0, len(task.words))
        elif kind == 1:
            row[i], row[j] = row[j], row[i]
        elif kind == 2:
            row[i] = row[j]
        elif kind == 3:  # the end too early, and something after it
            row[i] = task.eos_id
        elif kind == 4:  # no end
            row[end:] = draw.integers(3, len(task.words), length - end)
        elif kind == 5:  # what follows the end does not count
            row[end + 1 :] = draw.integers(0, len(task.words), length - end - 1)
        else:
            row[min(i, end) :] = task.pad_id
    return ids


def rows(task):
    """Prompts, and completions: right or as demonstrated, those changed, changed twice, random."""
    prompt_ids = task.prompts(random.key(0), COUNT)
    right = np.asarray(jax.jit(task.demonstrate)(random.key(1), prompt_ids))
    once = broken(task, right, 0)
    # Few symbols, so that some are well formed.
    symbols = [i for i, word in enumerate(task.words) if word not in ("<pad>", "<bos>", "=", ":")]
    noise = np.random.default_rng(2).choice(symbols, right.shape)
    completions = [right, once, broken(task, once, 1), noise]
    return np.tile(prompt_ids, (len(completions), 1)), np.concatenate(completions)


@pytest.mark.parametrize("name", CHECKERS)
def test_reward_is_that_of_plain_python(name):
    task = tasks.make(name)
    prompt_ids, ids = rows(task)
    mask = np.asarray(tokens.completion_mask(ids, task.eos_id))
    reward = np.asarray(jax.jit(task.reward)(prompt_ids, ids, mask))
    expected = [
        CHECKERS[name](asked(task, prompt), *said(task, row))
        for prompt, row in zip(prompt_ids.tolist(), ids.tolist(), strict=True)
    ]
    np.testing.assert_allclose(reward, expected, rtol=1e-6)
    demonstrated, changed = reward[:COUNT], reward[COUNT : 2 * COUNT]
    assert 0.05 < changed.mean() < 0.9
    if name.startswith("careless"):
        assert demonstrated.mean() == pytest.approx((1 - 0.9 * careless.SLIP) ** 3, abs=0.03)
    elif name.startswith("chain"):
        assert 0.5 < demonstrated.mean() < 1.0  # there are mistakes
    else:
        assert (demonstrated == task.passing).all()
    if name.startswith("countdown"):
        assert (reward == np.float32(countdown.FORMAT_REWARD)).sum() > 100


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("3 5 2 * +", 13), ("3 5 - 2 *", -4), ("8 4 /", 2), ("2 8 - 3 /", -2), ("7", 7),
        ("8 3 /", None), ("8 3 3 - /", None), ("1 2", None), ("", None), ("+", None),
        ("1 +", None), ("1 2 + +", None), ("+ 1 2", None), ("0 1 +", None), ("1 2 =", None),
        ("1 2 3 4 + + +", None),
    ],
)  # fmt: skip
def test_expressions_by_hand(expression, value):
    ids = [countdown.WORDS.index(word) for word in expression.split()]
    body = np.arange(8) < len(ids)
    ids = np.pad(ids, (0, 8 - len(ids)), constant_values=countdown.ZERO + 1).astype(np.int32)
    actual, valid = EVALUATE(ids, body)
    assert bool(valid) == (value is not None)
    assert value is None or int(actual) == value == evaluated(expression.split())


EVALUATE = jax.jit(lambda ids, body: countdown.evaluate(ids, body, 3))


def labels(task, prompt, ids):
    """Index of the last token of each step, and whether the step is right."""
    words, ended = said(task, ids)
    *numbers, _ = map(str, prompt)
    found, line, before = [], [], numbers[:1]
    for t, word in enumerate(words):
        if word != ";":
            line.append(word)
            continue
        right = len(found) < len(numbers) - 1 and len(line) == len(before) == 1
        right = right and all_digits(line + before)
        if right:
            term = int(numbers[len(found) + 1])
            right = int(line[0]) == (int(before[0]) + term) % MODULUS[len(numbers)]
        found.append((t, right))
        line, before = [], line
    if ended:
        found.append((len(words), len(found) == len(numbers) - 1 and not line))
    elif line:
        found.append((len(words) - 1, False))
    return found


@pytest.mark.parametrize("name", ["chain-2-3", "chain-4-10"])
def test_steps_are_those_of_plain_python(name):
    task = tasks.make(name)
    prompt_ids, ids = rows(task)
    mask = np.asarray(tokens.completion_mask(ids, task.eos_id))
    ends, right = map(np.asarray, jax.jit(task.steps)(prompt_ids, ids, mask))
    expected_ends, expected_right = np.zeros((2, *ids.shape), bool)
    for row, (prompt, completion) in enumerate(zip(prompt_ids, ids.tolist(), strict=True)):
        for t, is_right in labels(task, asked(task, prompt), completion):
            expected_ends[row, t], expected_right[row, t] = True, is_right
    np.testing.assert_array_equal(ends, expected_ends)
    np.testing.assert_array_equal(right, expected_right)
    reward = np.asarray(task.reward(prompt_ids, ids, mask)) == task.passing
    all_right = (right | ~ends).all(1)
    assert (reward | ~all_right).all()  # whoever makes no mistake has the right answer
    assert (reward & ~all_right).sum() > 20  # but not the other way round
    lines = right[:COUNT, 1:-1:2]  # of the demonstrations
    assert lines.mean() == pytest.approx(1 - chain.STEP_ERROR, abs=0.02)
    assert right[:COUNT, -1].all()
