"""The pictures of the documentation: their numbers are the kernels', and their controls work."""

import csv
import functools
import itertools
import math
import pathlib
import re
import sys
import tomllib

import browser
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejaxpg import cli
from purejaxpg.kernels import distributions, losses

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "docs" / "pictures"
sys.path.append(str(FOLDER))
import _controls  # noqa: E402

# Each picture that a page shows: the name of its script, then the argument of some.
SHOWN = sorted(
    {
        tuple(words.split())
        for page in FOLDER.parent.rglob("*.md")
        for words in re.findall(r"```\{picture\} (.+)", page.read_text(encoding="utf-8"))
    }
)
LARGEST = 400_000  # bytes of JSON


@functools.cache
def drawn(*words):
    """The figure of a picture and its sentences."""
    return _controls.made(*words)


def made(name):
    """The module of a picture without an argument, and its figure."""
    return _controls.load(name), drawn(name)[0]


def shown(*words, **positions):
    """What a picture shows with its controls at some positions, the others where they start."""
    figure, _ = drawn(*words)
    labels = [control["label"] for control in figure.layout.meta["controls"]]
    at = [control["start"] for control in figure.layout.meta["controls"]]
    for label, position in positions.items():
        (number,) = (i for i, text in enumerate(labels) if text.startswith(label))
        at[number] = position
    return _controls.state_at(figure, at)


def test_every_script_of_a_picture_is_shown():
    assert {name for name, *_ in SHOWN} == {*_controls.names()}


@pytest.mark.parametrize("words", SHOWN, ids="-".join)
def test_a_picture_has_a_sentence_controls_and_few_bytes(words):
    figure, alt = drawn(*words)
    assert alt.endswith(".") and 60 < len(alt) < 420
    assert len(figure.to_json()) < LARGEST
    controls, states = figure.layout.meta["controls"], figure.layout.meta["states"]
    assert controls and all(len(control["options"]) > 1 for control in controls)
    assert {number for state in states for number in state["by"]} == set(range(len(controls)))
    start = _controls.state_at(figure, [control["start"] for control in controls])
    sentences = [path for path in start if path.startswith("says.")]
    assert sentences == [f"says.{i}" for i in range(len(sentences))]
    assert " ".join(start[path] for path in sentences).endswith(".")
    for path, value in start.items():
        if path.startswith("data."):
            _, trace, *names = path.split(".")
            found = functools.reduce(lambda part, each: part[each], names, figure.data[int(trace)])
            assert list(found) == list(value)


def test_colours_can_be_seen_on_light_and_on_dark_pages():
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    for colour in _controls.COLOURS:
        own = luminance(colour) + 0.05
        assert 1.05 / own >= 3.0 and own / (luminance("#121212") + 0.05) >= 3.0, colour


def test_wrong_values_and_wrong_names_are_refused():
    controls = {"a": _controls.slider("A", (1.0, 2.0), 1.0)}
    figure = _controls.figure([], 100)
    with pytest.raises(ValueError, match=r"data\.0\.y has values \(3,\), .* \(2,\) options"):
        _controls.attach(figure, controls, {"data.0.y": (("a",), [1, 2, 3])})
    with pytest.raises(ValueError, match="there is no picture 'none'; there are advantage, "):
        _controls.load("none")
    with pytest.raises(ValueError, match="the picture 'gae' takes no argument, not 'ppo'"):
        _controls.made("gae", "ppo")
    with pytest.raises(ValueError, match="the picture 'curves' takes AGENT, not ''"):
        _controls.made("curves")
    with pytest.raises(ValueError, match="no sweep of 'pppo' is kept; there are those of reinf"):
        _controls.made("curves", "pppo")


def test_numbers_are_written_with_a_minus_sign():
    found = _controls.texts("{:.2f} of {:.3f}.", np.array([-0.25, 0.001]), np.array([-1e-9, 2.0]))
    assert found == ["−0.25 of 0.000.", "0.00 of 2.000."]
    assert _controls.slider("β", (-0.05, 1.0), 1.0) == _controls.Control("β", ["−0.05", "1"], 1)


# ------------------------------------------------------------------- the numbers are the kernels'


def test_ppo_clip():
    module, _ = made("ppo_clip")
    for a, e, r in itertools.product((0, 5), (0, 3), range(len(module.RATIOS))):
        advantage, clip_eps, ratio = module.ADVANTAGES[a], module.EPSILONS[e], module.RATIOS[r]
        found = shown("ppo_clip", Advantage=a, Clip=e, Ratio=r)
        kernel = lambda x: -losses.ppo_clip(x, jnp.zeros(()), jnp.array(advantage), clip_eps)  # noqa: B023, E731
        value, slope = jax.value_and_grad(kernel)(jnp.log(ratio))
        assert [*found["data.2.y"], *found["data.5.y"]] == pytest.approx(
            [float(value), float(slope)], 1e-3
        )
        silent = ratio > 1 + clip_eps if advantage > 0 else ratio < 1 - clip_eps
        assert found["data.5.y"][0] == pytest.approx(0.0 if silent else advantage * ratio, 1e-3)
        assert ("silent" in found["says.1"]) == silent
        assert found["layout.shapes.0.x1"] == pytest.approx(1 + clip_eps)


def test_policy_update():
    module, _ = made("policy_update")
    kernel = lambda logits, reward: distributions.expectation(  # noqa: E731
        distributions.categorical(logits), reward
    )
    logits, reward = jnp.log(module.START), jnp.array([0.0, module.REWARDS[4], 0.0, 0.0])
    for update in range(3):
        found = shown("policy_update", Action=1, Its=4, Gradient=0, Updates=update)
        assert found["data.0.y"] == pytest.approx(jax.nn.softmax(logits).tolist(), abs=1e-4)
        assert found["data.4.y"] == pytest.approx([float(kernel(logits, reward))], abs=1e-4)
        logits = logits + module.LEARNING_RATE * jax.grad(kernel)(logits, reward)
    # Punishment takes probability away, with each kind of gradient.
    for kind in range(3):
        last = shown("policy_update", Action=0, Its=1, Gradient=kind, Updates=module.UPDATES)
        assert last["data.0.y"][0] < 0.5 * module.START[0]


def test_advantage():
    module, _ = made("advantage")
    place, reward, terminated = module.corridor()
    probability = np.asarray(module.measured()[0])
    for k, state in ((0, 0), (3, 2), (8, 4)):
        # A linear equation instead of sweeps: V = Σ π (r + γ V').
        moves = np.zeros((module.STATES, module.STATES))
        for s, a in np.ndindex(*reward.shape):
            moves[s, place[s, a]] += probability[k, s, a] * ~terminated[s, a]
        mean = (probability[k] * reward).sum(1)
        value = np.linalg.solve(np.eye(module.STATES) - module.GAMMA * moves, mean)
        q = reward[state] + module.GAMMA * ~terminated[state] * value[place[state]]
        found = shown("advantage", State=state, Greediness=k)
        assert found["data.2.y"] == pytest.approx([value[state]] * 2, abs=1e-3)
        above, below = ([y or 0.0 for y in found[path]] for path in ("data.0.y", "data.1.y"))
        assert np.add(above, below) == pytest.approx(q - value[state], abs=1e-3)
        weighted = (
            np.array([y or 0.0 for path in ("data.3.y", "data.4.y") for y in found[path]])
            .reshape(2, -1)
            .sum(0)
        )
        assert weighted == pytest.approx(probability[k, state] * (q - value[state]), abs=1e-3)
        assert abs(weighted.sum()) < 1e-4


def test_gae():
    module, _ = made("gae")
    found = shown("gae", Critic=0, Trajectories=0)  # an exact critic
    assert max(found["data.0.y"]) < 1e-6 and found["data.3.x"] == [0.0]
    found = shown("gae", Critic=5)  # any critic, at λ = 1
    assert found["data.0.y"][-1] < 1e-6 < found["data.0.y"][0]

    # One walk after the other, by the recursion over time.
    value, q = jax.jit(module.true_values)()
    critic = np.asarray(jax.jit(module.critics)(value))[0, 2]
    right = 1 / (1 + math.exp(-module.LOGIT))
    weights, gradients = [], []
    for action, place in zip(*(x.T for x in module.walks()), strict=True):
        advantage, following = 0.0, 0.0
        for t in reversed(range(module.STEPS)):
            reward = math.sin(0.9 * (place[t + 1] - 8)) + 0.25 * (place[t + 1] - 8)
            error = reward + module.GAMMA * following - critic[t, place[t]]
            advantage = error + module.GAMMA * 0.5 * advantage
            following = critic[t, place[t]]
        weights.append(np.prod(np.where(action == 1, right, 1 - right)))
        gradients.append(advantage * (action[0] - right))
    mean = np.dot(weights, gradients)
    truth = right * (1 - right) * float(q[1] - q[0])
    variance = np.dot(weights, np.square(np.array(gradients) - mean))
    found = shown("gae", Critic=2, The=0, Trajectories=1)
    half = module.LAMBDAS.tolist().index(0.5)
    assert found["data.0.y"][half] == pytest.approx((mean - truth) ** 2, 1e-2)
    assert found["data.1.y"][half] == pytest.approx(variance / module.BATCHES[1], 1e-2)
    # More data do not mend a bias.
    best = [shown("gae", Critic=4, Trajectories=batch)["data.3.x"][0] for batch in range(5)]
    assert best == sorted(best) and best[0] < best[-1]


def test_trust_region():
    module, _ = made("trust_region")

    def divergence(old, new):
        """Of normal distributions at mean and log σ [2]."""
        (m, s), (n, u) = old, new
        return u - s + (math.exp(2 * s) + (m - n) ** 2) / (2 * math.exp(2 * u)) - 0.5

    for size, max_kl in enumerate(module.SIZES):
        found = shown("trust_region", Parameters=0, Divergence=size, Steps=0)
        path = np.stack([found["data.1.x"], found["data.1.y"]], -1)
        assert path[0].tolist() == [module.START[0], 0.0]
        # F is diag(1 / σ², 2) in mean and log σ, and the gradient −2 (μ − best, σ²).
        natural = np.array([-2 * (path[0][0] - module.BEST), -1.0])
        step = natural * math.sqrt(2 * max_kl / (natural[0] ** 2 + 2 * natural[1] ** 2))
        assert path[1] - path[0] == pytest.approx(step, rel=1e-2)
        assert found["data.4.y"][0] == pytest.approx(divergence(path[0], path[1]), rel=2e-2)
        around = zip(found["data.3.x"], found["data.3.y"], strict=True)
        assert [divergence(path[0], each) for each in around] == pytest.approx([max_kl] * 28, 2e-2)
    # The natural path hardly depends on the parameters if steps are small; the plain one does.
    ends = [
        [(found["data.1.x"][-1], found["data.5.x"][-1]) for found in [shown("trust_region", **at)]]
        for at in ({"Parameters": p, "Divergence": 0} for p in range(3))
    ]
    (natural, plain), *others = (end for (end,) in ends)
    assert all(abs(other[0] - natural) < 0.02 for other in others)
    assert abs(others[1][1] - plain) > 0.1


def test_tanh_gaussian():
    module, _ = made("tanh_gaussian")
    at = module.actions()
    for m, s in ((4, 5), (6, 3), (4, 9)):
        found = shown("tanh_gaussian", Mean=m, Deviation=s)
        mean, std = module.MEANS[m], module.DEVIATIONS[s]
        x = np.arctanh(at)
        normal = np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))
        assert found["data.0.y"] == pytest.approx(normal / (1 - at**2), rel=1e-2, abs=1e-4)
        inside = np.linspace(-12.0, 12.0, 4001)
        weight = np.exp(-0.5 * inside**2) / math.sqrt(2 * math.pi) * (inside[1] - inside[0])
        action = mean + std * inside
        jacobian = 2.0 * (math.log(2.0) - action - np.logaddexp(0.0, -2.0 * action))
        entropy = weight @ jacobian + 0.5 * math.log(2 * math.pi * math.e * std**2)
        assert found["data.4.y"] == pytest.approx([entropy], abs=0.06)
        assert found["data.1.x"] == pytest.approx([math.tanh(mean)] * 2, abs=1e-3)


def test_frontier():
    module, _ = made("frontier")
    for beta, value in enumerate(module.BETAS):
        found = shown("frontier", β=beta)
        for m, stage in enumerate(module.METHODS):
            (row,) = (
                row for row in module.rows("frontier")
                if row["stage"] == stage and float(row["value"]) == value
            )  # fmt: skip
            point = [*found[f"data.{2 * m + 2}.x"], *found[f"data.{2 * m + 2}.y"]]
            assert point == pytest.approx([float(row["kl"]), float(row["return"])], rel=1e-3)
        alone = shown("frontier", β=beta, Method=5)
        assert alone["data.2.x"] == [] and alone["data.10.x"] == found["data.10.x"]
        assert "DPO" in alone["says.1"] and "PPO," not in alone["says.1"]
    # The line is the one that the table compares runs with, which takes the mean over seeds.
    kl, reward = module.closed_form()
    for row in module.rows("frontier"):
        own = np.interp([float(row[f"kl{end}"]) for end in (" low", " high")], kl, reward)
        assert own[0] - 0.15 < float(row["best possible"]) < own[1] + 0.15
    # The star is what no other point of the line is better than, at the price β.
    for beta, value in enumerate(module.BETAS):
        found = shown("frontier", β=beta)
        (star_kl,), (star_reward,) = found["data.11.x"], found["data.11.y"]
        assert 0.0 < star_kl <= kl[-1]
        assert (reward - value * kl).max() <= star_reward - value * star_kl + 1e-3


def test_learning_sweep():
    module, _ = made("learning_sweep")
    data = module.read()
    assert module.DATA.stat().st_size < 200_000
    returns, torque = data["returns"], data["torque"]
    assert torque.shape == (*data["score"].shape, len(module.VELOCITIES), len(module.ANGLES))
    assert np.abs(torque).max() <= module.TORQUE
    found = shown("learning_sweep", Learning=2, Seed=1)
    assert found["data.4.y"] == pytest.approx(returns[2, 1].tolist(), rel=1e-3)
    assert np.array(found["data.5.z"]) == pytest.approx(torque[2, 1], rel=1e-3)
    middle = np.sort(returns[2], 0)[1:3].mean(0)  # of four
    assert found["data.3.y"] == pytest.approx(middle.tolist(), rel=1e-3)

    class Trained:
        def policy(self, key, obs, greedy):
            assert np.allclose(obs[:, 0] ** 2 + obs[:, 1] ** 2, 1.0) and greedy
            return jnp.asarray(obs[:, 2:] / 4.0)

    torque = module.policy_of(Trained())
    assert torque[:, 0] == pytest.approx(module.VELOCITIES / 4.0)
    assert (torque == torque[:, :1]).all()


@pytest.mark.slow
def test_the_data_of_the_learning_sweep_can_be_made_again(tmp_path):
    module, _ = made("learning_sweep")
    text = (FOLDER.parents[1] / "experiments" / "learning_rates.toml").read_text(encoding="utf-8")
    text = text.replace("300_000", "8_192").replace("seeds = 4", "seeds = 2")
    (tmp_path / "small.toml").write_text(text, encoding="utf-8")
    assert cli.main(["sweep", str(tmp_path / "small.toml"), "--out", str(tmp_path / "out")]) == 0
    found, kept = module.stored(tmp_path / "out"), module.read()
    assert found.keys() == kept.keys() and found["learning_rate"] == kept["learning_rate"].tolist()
    assert np.shape(found["torque"]) == (7, 2, *kept["torque"].shape[2:])


def test_objective_kl():
    module, _ = made("objective_kl")
    for distance in range(len(module.DISTANCES)):
        found = shown("objective_kl", Distance=distance)
        bias = dict(zip(module.NAMES, found["data.0.x"], strict=True))
        assert bias["k1 in reward"] < 1e-6 and bias["k1 in loss"] == pytest.approx(1.0, abs=1e-6)
        assert bias["k2 in loss"] == pytest.approx(bias["k3 × ratio in loss"], rel=1e-3)
        assert found["says.0"] == "No bias: k1 in reward."
    near, far = (shown("objective_kl", Distance=i)["data.0.x"] for i in (0, -1))
    k2, k3 = (module.NAMES.index(f"{k} in loss") for k in ("k2", "k3"))
    assert abs(near[k3] - near[k2]) < 0.02 < abs(far[k3] - far[k2])


@pytest.mark.parametrize("agent", _controls.load("curves").NAMES)
def test_curves(agent):
    """The picture on an agent's page has the numbers of its kept sweeps, as its table has."""
    module = _controls.load("curves")
    folder = module.EXPERIMENTS / "curves"
    scores = table(folder / f"{agent}_scores.csv")
    assert [row["Environment"] for row in scores] == list(module.curves(agent))
    for place, row in enumerate(scores):
        spec = tomllib.loads((module.EXPERIMENTS / f"{row['Sweep']}.toml").read_text())
        assert (spec["agent"], spec["config"]["env"]) == (agent, row["Environment"])
        seeds = spec["seeds"]  # a list, or how many
        assert int(row["Seeds"]) == (seeds if isinstance(seeds, int) else len(seeds)) >= 8
        first, *_, last = table(folder / f"{row['Sweep']}.csv")
        steps = float(row["Steps of a run"].replace(",", ""))
        assert 0.98 * steps < float(last["env_steps"]) < 1.0001 * steps  # the middle of a few
        for position, point in ((0, first), (module.POINTS - 1, last)):
            at = {"Environment": place} if len(scores) > 1 else {}
            found = shown("curves", agent, **at, Read=position)
            line = [number for path, number in found.items() if path.endswith(".y")]
            drawn = [*line[-1], line[0][position], line[1][position], line[0][-1 - position]]
            iqm, low, high = (float(point[name]) for name in ("iqm", "ci95_low", "ci95_high"))
            if math.isnan(iqm):  # of DDPG's first updates
                assert drawn == [None] * 4 and "no episode has ended yet" in found["says.0"]
                continue
            assert drawn == pytest.approx([iqm, low, iqm, high], rel=1e-3)
            assert f"return {_controls.written(f'{iqm:.4g}')}, " in found["says.0"]


def table(path):
    """The rows of a CSV file."""
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_timeline():
    module, _ = made("timeline")
    methods = module.METHODS
    assert [m.year for m in methods] == sorted(m.year for m in methods)
    for place, method in enumerate(methods):
        assert all(module.PLACES[parent] < place for parent in method.parents)
    found = shown("timeline", Method=module.PLACES["natural policy gradient"])
    names = [methods[int(place)].name for place in found["data.3.y"]]
    assert names == [
        *("natural policy gradient", "policy gradient theorem", "natural gradient"),
        *("REINFORCE", "actor-critic"),
    ]


def test_the_timeline_tells_what_the_chapter_says(tmp_path):
    module, _ = made("timeline")
    chapter = module.CHAPTER.read_text(encoding="utf-8")
    found = shown("timeline", Method=module.PLACES["TRPO"])["says.0"]
    (row,) = re.findall(r"\n\| 2015 \| TRPO \| (.*) \| Schulman et al., \[(.*)\] \|\n", chapter)
    assert found == (
        f"2015, TRPO: {row[0]}. It builds on natural policy gradient. Schulman et al., {row[1]}."
    )
    dpg = module.METHODS[module.PLACES["DPG"]]
    assert dpg.paper == "Silver et al., ICML" and "[*ICML*][dpg]" in chapter
    for wrong in (chapter.replace("| PPO |", "| PPO2 |"), chapter + "\n| 2017 | PPO | a | b |\n"):
        (tmp_path / "chapter.md").write_text(wrong, encoding="utf-8")
        with pytest.raises(ValueError, match=r"needs one row in the chapter; look at .*'PPO'"):
            module.methods(tmp_path / "chapter.md")
    # Years rise in each table, and a link to arXiv leads to the paper that it names.
    for section in chapter.split("\n## "):
        years = re.findall(r"^\| (\d{4}) \|", section, re.MULTILINE)
        assert years == sorted(years)
    links = re.findall(r"^\[arXiv:(.*)\]: https://arxiv.org/abs/(.*)$", chapter, re.MULTILINE)
    assert len(links) > 30 and all(named == opened for named, opened in links)
    assert {named for named, _ in links} == set(re.findall(r"\[arXiv:(.*)\] \|", chapter))


# ---------------------------------------------------------------------------------------- browser

DATA = """JSON.stringify(document.querySelector('#{} .picture-plot').data.map((trace) =>
  [trace.x, trace.y, trace.z, trace.text, trace.base]))"""


@browser.needed
def test_each_control_changes_the_data_from_the_keyboard(tmp_path):
    """One page holds all pictures; the keys Tab and arrows reach everything."""
    path = tmp_path / "all.html"
    names = ["-".join(words) for words in SHOWN]
    figures = [drawn(*words) for words in SHOWN]
    pictures = map(_controls.fragment_of, names, *zip(*figures, strict=True))
    path.write_text(_controls.page_of("all", "".join(pictures)), encoding="utf-8")
    with browser.session(tmp_path) as page:
        page.screen(375, 800)
        page.open(path)
        assert page.value("document.documentElement.scrollWidth") <= 375
        reached = []
        while True:
            page.press("Tab")
            focus = page.value("[document.activeElement.id, document.activeElement.tagName]")
            if focus[1] == "BUTTON":
                continue
            if focus[1] not in ("INPUT", "SELECT"):
                break
            reached.append(focus[0])
            check_control(page, *focus)
        wanted = [
            f"picture-{name}-{i}"
            for name, (figure, _) in zip(names, figures, strict=True)
            for i in range(len(figure.layout.meta["controls"]))
        ]
        assert reached == wanted
        check_button(page)
        assert page.log == []


def check_control(page, name, tag):
    """A key moves the focused control and changes its picture; another key undoes that."""
    data = DATA.format(name.rpartition("-")[0])
    value = f"Number(document.getElementById('{name}').value)"
    before, at = page.value(data), page.value(value)
    last = page.value(f"document.getElementById('{name}').{LAST[tag]}")
    step, keys = (1, MOVES[tag]) if at < int(last) else (-1, MOVES[tag][::-1])
    page.press(keys[0])
    assert page.value(value) == at + step and page.value(data) != before, name
    page.press(keys[1])
    assert page.value(data) == before, name


MOVES = {"INPUT": ("ArrowRight", "ArrowLeft"), "SELECT": ("ArrowDown", "ArrowUp")}
LAST = {"INPUT": "max", "SELECT": "options.length - 1"}


def check_button(page):
    """The button plays a control through all positions, and stops at its end."""
    page.value("document.querySelector('.picture-plays button').click()")
    ended = """new Promise((done) => {
      const range = document.querySelector('.picture-plays input');
      const look = () => (range.value === range.max ? done(range.nextSibling.textContent)
        : setTimeout(look, 100));
      look();
    })"""
    assert page.value(ended) == "Play"
