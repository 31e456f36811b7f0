"""The model, alone: causality, initialisation, precision and the switches."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.config import count_params
from jaxchat.gpt import GPT, apply_rotary, norm, rotary_angles
from jaxchat.params import bind, split
from tests.models import CLASSIC, MODERN, PRESETS, make_model, make_perturbed


@pytest.fixture(params=PRESETS)
def config(request):
    return PRESETS[request.param]


def run(model, length):
    """Logits of the ids 0, 1, 2, ..."""
    graphdef, params = split(model)
    return jax.jit(lambda p, ids: bind(graphdef, p)(ids))(params, jnp.arange(length)[None, :])


@pytest.mark.parametrize("position", [0, 1, 130])
def test_no_gradient_flows_from_the_future(config, position):
    """The gradient of one position's logits with respect to later embeddings is exactly zero.

    Criteria (after nanodo): zero for every later position, non-zero for the position itself and
    for the first one. It is taken with respect to the embedded input, by perturbing each position's
    own row of a table that no two positions share.
    """
    config = replace(config, vocab_size=256, value_embeds=False)
    graphdef, params = split(make_perturbed(config))
    ids = jnp.arange(140)[None, :]

    def logit_sum(table):
        model = bind(graphdef, params | {"wte.weight": table})
        return jnp.sum(model(ids)[0, position] ** 2)

    gradient = jax.jit(jax.grad(logit_sum))(params["wte.weight"])
    reach = np.abs(np.asarray(gradient)).sum(axis=1)[:140]
    assert np.all(reach[position + 1 :] == 0)
    assert reach[position] > 0
    assert reach[0] > 0


def test_value_embeddings_are_causal_too():
    graphdef, params = split(make_perturbed(MODERN))
    name = next(n for n in params if n.startswith("value_embeds"))
    ids = jnp.arange(140)[None, :]

    def logit_sum(table):
        return jnp.sum(bind(graphdef, params | {name: table})(ids)[0, 70] ** 2)

    reach = np.abs(np.asarray(jax.jit(jax.grad(logit_sum))(params[name]))).sum(axis=1)
    assert np.all(reach[71:] == 0)
    assert reach[70] > 0


def test_parameters_number_what_the_formula_says(config):
    _, params = split(make_model(config))
    assert sum(x.size for x in params.values()) == sum(count_params(config).values())


def test_every_weight_is_float32(config):
    _, params = split(make_model(config))
    assert {(x.dtype, x.weak_type) for x in params.values()} == {(jnp.dtype(jnp.float32), False)}


def test_modern_initialisation_has_the_stated_statistics():
    config = replace(MODERN, n_embd=256, vocab_size=2048)
    _, params = split(make_model(config))
    bound = math.sqrt(3 / 256)
    assert np.std(params["wte.weight"]) == pytest.approx(0.8, rel=0.02)
    assert np.std(params["lm_head.weight"]) == pytest.approx(0.001, rel=0.02)
    for name in ("h.0.attn.c_q.weight", "value_embeds.1.weight"):
        assert np.abs(params[name]).max() <= bound
        assert np.std(params[name]) == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert np.std(params["h.0.mlp.c_fc.weight"]) == pytest.approx(
        0.4 * bound / math.sqrt(3), rel=0.03
    )
    for name in ("h.0.attn.c_proj.weight", "h.3.mlp.c_proj.weight", "smear_lambda"):
        assert not np.any(params[name])
    for name in ("smear_gate.weight", "h.1.attn.ve_gate.weight"):
        assert np.min(params[name]) >= 0
        assert np.max(params[name]) <= 0.02
    np.testing.assert_allclose(params["resid_lambdas"], np.linspace(1.15, 1.05, 4), rtol=1e-6)
    np.testing.assert_allclose(params["x0_lambdas"], np.linspace(0.20, 0.05, 4), rtol=1e-6)
    assert float(params["backout_lambda"][0]) == pytest.approx(0.2)


def test_classic_initialisation_has_the_stated_statistics():
    config = replace(CLASSIC, n_embd=256, vocab_size=2048)
    _, params = split(make_model(config))
    assert np.std(params["wte.weight"]) == pytest.approx(1.0, rel=0.02)
    assert not np.any(params["lm_head.weight"])
    for name in ("h.0.attn.c_q.weight", "h.0.mlp.c_fc.weight"):
        assert np.std(params[name]) == pytest.approx(1 / 16, rel=0.03)
    assert not np.any(params["h.0.mlp.c_proj.weight"])


def test_a_fresh_model_knows_nothing(config):
    logits = run(make_model(config), 50)
    nats = -jax.nn.log_softmax(logits, axis=-1).mean()
    assert float(nats) == pytest.approx(math.log(config.vocab_size), rel=1e-3)


def test_logits_are_float32_capped_and_cropped(config):
    config = replace(config, vocab_size=257)
    logits = run(make_perturbed(config, scale=2.0), 20)
    assert logits.shape == (1, 20, 257)
    assert logits.dtype == jnp.float32
    assert float(jnp.abs(logits).max()) <= config.logit_softcap


def test_bfloat16_stays_bfloat16_all_the_way(config):
    """A float32 scalar of shape [1] would widen the stream silently: read every matmul's dtype."""
    graphdef, params = split(GPT(config, jnp.bfloat16))
    jaxpr = jax.make_jaxpr(lambda p, ids: bind(graphdef, p)(ids))(params, jnp.arange(8)[None, :])
    matmuls = [eqn for eqn in _equations(jaxpr.jaxpr) if eqn.primitive.name == "dot_general"]
    assert len(matmuls) >= 7 * config.n_layer
    assert {v.aval.dtype for eqn in matmuls for v in eqn.invars} == {jnp.dtype(jnp.bfloat16)}


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            if hasattr(value, "jaxpr"):
                yield from _equations(value.jaxpr)


def test_norm_gives_unit_mean_square():
    x = jax.random.normal(jax.random.key(0), (3, 64)) * 7
    np.testing.assert_allclose(jnp.mean(norm(x) ** 2, axis=-1), 1.0, rtol=1e-5)


def test_rotary_scores_depend_on_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 32))

    def score(i, j):
        at = lambda p: rotary_angles(jnp.array([[p]]), 32, 1e4)  # noqa: E731
        return float(jnp.sum(apply_rotary(q, *at(i)) * apply_rotary(k, *at(j))))

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-2)


def test_rotary_turns_the_first_half_towards_the_second():
    """y = (x1 cos + x2 sin, -x1 sin + x2 cos), for one pair at angle 1."""
    cos, sin = rotary_angles(jnp.array([[1]]), 2, 1e4)
    turned = apply_rotary(jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2), cos, sin)
    np.testing.assert_allclose(turned.ravel(), [math.cos(1), -math.sin(1)], rtol=1e-6)


def test_each_switch_changes_the_output():
    full = make_perturbed(MODERN)
    _, params = split(full)
    for switch in ("value_embeds", "smear", "backout", "residual_scalars"):
        graphdef, fewer = split(GPT(replace(MODERN, **{switch: False})))
        without = bind(graphdef, {name: params[name] for name in fewer})
        assert float(jnp.abs(run(full, 40) - run(without, 40)).max()) > 1e-3, switch
