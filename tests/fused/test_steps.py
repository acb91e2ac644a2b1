"""Layout of parameters in the kernel of gradient steps, and how it is launched."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejaxpg.fused import heads, steps

ROWS = 128


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize(
    ("inputs", "outputs", "folded"), [(4, 20, True), (15, 16, True), (16, 3, False), (5, 16, False)]
)
def test_a_padded_matrix_has_each_parameter_once(
    inputs: int, outputs: int, folded: bool, flipped: bool
) -> None:
    place = steps.Place(64, 1024, inputs, outputs, folded, False)
    index, mask = place.matrix(0, flipped)
    assert index.shape == (place.shape[::-1] if flipped else place.shape)
    exists = np.ones(index.shape, bool) if mask is None else np.asarray(mask)
    matrix = np.arange(64, 64 + inputs * outputs).reshape(inputs, outputs)
    bias = np.arange(1024, 1024 + outputs)[None]
    expected = np.concatenate([matrix, bias]) if folded else matrix
    found = np.asarray(index.T if flipped else index)[: len(expected), :outputs]
    np.testing.assert_array_equal(found, expected)
    assert exists.sum() == expected.size
    assert (exists.T if flipped else exists)[: len(expected), :outputs].all()


def test_each_number_of_a_moment_has_its_place_in_the_vector_with_gaps() -> None:
    head: Any = None
    plan = steps.Plan(head, (3, 40, 16), 1, ROWS, True)
    assert plan.offsets == [0, 16, 64]
    assert plan.size == steps.BLOCK
    origins = plan.origins()
    assert origins[origins >= 0].tolist() == list(range(3 + 40 + 16))
    assert [int(origins[offset]) for offset in plan.offsets] == [0, 3, 43]


@pytest.mark.parametrize(
    ("sizes", "agents", "fast", "expected"),
    [
        ((64, 64, 2), 2048, True, steps.Launch(4, 64)),
        ((64, 64, 2), 64, True, steps.Launch(8, 128)),
        ((128, 2), 2048, True, steps.Launch(8, 32)),
        ((64, 64, 64, 2), 2048, True, steps.Launch(4, 32)),
        ((64, 64, 2), 64, False, steps.Launch(8, 16)),
    ],
    ids=["many", "few", "wide", "deep", "exact"],
)
def test_a_launch_suits_networks_and_agents(
    sizes: tuple[int, ...], agents: int, fast: bool, expected: steps.Launch
) -> None:
    def loss(params: Any, x: jax.Array) -> Any:
        for weight, bias in params[:-1]:
            x = jnp.tanh(x @ weight + bias)
        return jnp.square(x @ params[-1][0] + params[-1][1]).mean(), {}

    widths = zip((4, *sizes), sizes, strict=False)
    params = [(jnp.zeros((a, b)), jnp.zeros(b)) for a, b in widths]
    head = heads.make(loss, None, params, jax.ShapeDtypeStruct((ROWS, 4), jnp.float32))
    plan = steps.Plan(head, (), 1, ROWS, fast)
    assert steps.launch(plan, agents) == expected
    assert steps.launch(steps.Plan(head, (), 1, 16, fast), agents).chunk == 16
