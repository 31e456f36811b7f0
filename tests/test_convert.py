"""Weights keep their bits on the way to other names and back, and what does not fit is listed."""

from dataclasses import asdict, replace

import numpy as np
import pytest

from jaxchat import convert
from jaxchat.config import GPTConfig, count_params
from tests.models import CLASSIC, MODERN

UNPADDED = replace(MODERN, vocab_size=320)
"""A vocabulary that needs no padding."""

CONFIGS = {"modern": MODERN, "classic": CLASSIC, "unpadded": UNPADDED}


def weights(config, *, seed=0):
    rng = np.random.default_rng(seed)
    shapes = convert.param_shapes(config)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def model_config(config):
    """The entry of upstream's meta file: the classic generation knows no windows."""
    names = ["sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"]
    names += ["window_pattern"] * config.value_embeds
    return {name: getattr(config, name) for name in names}


def assert_same_bits(mine, theirs):
    assert list(mine) == list(theirs)
    for name, value in theirs.items():
        assert mine[name].dtype == np.float32
        assert mine[name].tobytes() == value.tobytes(), name


def without_padding(params, config):
    """What a crop of the vocabulary keeps: the rows behind it are zero."""
    kept = {name: x.copy() for name, x in params.items()}
    for name in kept:
        if name.startswith(convert.TABLES):
            kept[name][config.vocab_size :] = 0
    return kept


@pytest.mark.parametrize("preset", CONFIGS)
def test_the_shapes_are_those_of_the_model(preset):
    config = CONFIGS[preset]
    from torch_ref.gpt import GPT

    model = {name: tuple(x.shape) for name, x in GPT(config).named_parameters()}
    assert convert.param_shapes(config) == model
    sizes = sum(int(np.prod(shape)) for shape in model.values())
    assert sizes == sum(count_params(config).values())


def test_the_names_are_upstreams():
    """Written down from upstream's state dicts: autumn 2025, and commit 92d63d4."""
    inside = {f"attn.{n}" for n in ("c_q", "c_k", "c_v", "c_proj")} | {"mlp.c_fc", "mlp.c_proj"}
    classic = {f"transformer.h.{i}.{name}.weight" for i in range(4) for name in inside}
    classic |= {"transformer.wte.weight", "lm_head.weight"}
    modern = {f"transformer.h.{i}.attn.ve_gate.weight" for i in (1, 3)}
    modern |= {"value_embeds.1.weight", "value_embeds.3.weight"}
    modern |= {"resid_lambdas", "x0_lambdas", "smear_gate.weight", "smear_lambda", "backout_lambda"}
    assert convert.to_nanochat(weights(CLASSIC)).keys() == classic
    assert convert.to_nanochat(weights(MODERN)).keys() == classic | modern


@pytest.mark.parametrize("preset", CONFIGS)
def test_there_and_back_to_nanochat(preset):
    config, params = CONFIGS[preset], weights(CONFIGS[preset])
    tensors = convert.to_nanochat(params)
    assert "transformer.h.3.mlp.c_fc.weight" in tensors and "lm_head.weight" in tensors
    assert ("value_embeds.3.weight" in tensors) == config.value_embeds
    compiled = {f"_orig_mod.{name}": x for name, x in tensors.items()}
    for names in (tensors, compiled):
        found, back = convert.from_nanochat(names, model_config(config))
        assert found == config
        assert_same_bits(back, params)


@pytest.mark.parametrize("preset", CONFIGS)
def test_there_and_back_to_hugging_face(preset):
    """The padding of the vocabulary does not travel."""
    config, params = CONFIGS[preset], weights(CONFIGS[preset])
    tensors, described = convert.to_hugging_face(params, config)
    assert (described["model_type"] == "nanochat") == (preset == "classic")
    assert len(tensors["lm_head.weight"]) == config.vocab_size
    found, back = convert.from_hugging_face(tensors, described)
    assert found == config
    assert_same_bits(back, without_padding(params, config))


def test_only_what_transformers_computes_is_called_nanochat():
    assert convert.is_stock(CLASSIC)
    assert convert.is_stock(replace(CLASSIC, rope_base=5e5, logit_softcap=15.0))
    for change in (
        {"window_pattern": "SL"},
        {"qk_gain": 1.2},
        {"smear": True},
        {"backout": True},
        {"residual_scalars": True},
        {"value_embeds": True},
    ):
        assert not convert.is_stock(replace(CLASSIC, **change)), change


def test_everything_that_differs_is_in_one_error():
    tensors = convert.to_nanochat(weights(MODERN))
    del tensors["transformer.h.2.attn.c_q.weight"]
    tensors["transformer.h.0.attn.c_bias"] = np.zeros(3, np.float32)
    gate = "transformer.h.3.attn.ve_gate.weight"
    tensors[gate] = np.zeros((MODERN.n_kv_head, 32), np.float32)  # the winter's generation
    with pytest.raises(ValueError, match="of another model") as error:
        convert.from_nanochat(tensors, model_config(MODERN))
    for told in (
        "missing h.2.attn.c_q.weight (64, 64)",
        "unexpected h.0.attn.c_bias",
        "h.3.attn.ve_gate.weight has shape (2, 32), the model wants (2, 12)",
    ):
        assert told in str(error.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"vocab_size": 200}, r"wte\.weight has shape"),
        ({"n_layer": 5}, r"missing h\.4\."),
        ({"n_head": 3}, "n_embd=64 is not a multiple of n_head=3"),
        ({"n_embd": "wide"}, "n_embd='wide' is not a whole number"),
        ({"mtp_heads": 2}, "unknown mtp_heads"),
        ({"window_pattern": 4}, "window_pattern=4 is not text"),
    ],
)
def test_another_configuration_is_told(change, told):
    with pytest.raises(ValueError, match=told):
        convert.from_nanochat(
            convert.to_nanochat(weights(MODERN)), {**model_config(MODERN), **change}
        )


def test_a_modern_model_needs_its_window_pattern():
    described = model_config(MODERN)
    del described["window_pattern"]
    with pytest.raises(ValueError, match="lacks window_pattern"):
        convert.from_nanochat(convert.to_nanochat(weights(MODERN)), described)


def test_a_classic_model_with_windows_is_neither_generation():
    tensors = convert.to_nanochat(weights(CLASSIC))
    with pytest.raises(ValueError, match="no windows, this one has 'SSSL'"):
        convert.from_nanochat(tensors, {**model_config(CLASSIC), "window_pattern": "SSSL"})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"hidden_act": "silu"}, "hidden_act='silu', our model has 'relu2'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"intermediate_size": 100}, "intermediate_size=100, our model has 256"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps=0.001"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rotary angles of type 'yarn'"),
        ({"num_hidden_layers": 4.0}, "num_hidden_layers=4.0 is not a whole number"),
        ({"final_logit_softcapping": None}, "final_logit_softcapping=None is not a number"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6' is not a number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ({"rope_theta": None}, "rope_theta=None is not a number"),
        ({"rope_parameters": {"rope_theta": None}}, "rope_theta=None is not a number"),
        ({"rope_parameters": [1.0]}, r"rope_parameters=\[1.0\] is not an object"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear' is not an object"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rotary angles of type 'linear'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rotary angles of type 'yarn'"),
        ({"rope_parameters": {"type": "dynamic"}}, "rotary angles of type 'dynamic'"),
    ],
)
def test_another_hugging_face_model_is_told(change, told):
    tensors, described = convert.to_hugging_face(weights(CLASSIC), CLASSIC)
    with pytest.raises(ValueError, match=told):
        convert.from_hugging_face(tensors, {**described, **change})


def test_where_rope_theta_stands_depends_on_the_version_of_transformers():
    tensors, described = convert.to_hugging_face(weights(CLASSIC), CLASSIC)
    del described["rope_parameters"]
    found, _ = convert.from_hugging_face(tensors, {**described, "rope_theta": 5000.0})
    assert found.rope_base == 5000.0
    default = {"rope_theta": 7000, "type": "default", "rope_type": "default"}
    for both in ({"rope_scaling": default}, {"rope_parameters": default, "rope_scaling": None}):
        found, _ = convert.from_hugging_face(tensors, {**described, **both})
        assert found.rope_base == 7000.0


def test_our_own_type_needs_every_field():
    tensors, described = convert.to_hugging_face(weights(MODERN), MODERN)
    assert {key: described[key] for key in asdict(MODERN)} == asdict(MODERN)
    with pytest.raises(ValueError, match="smear='yes' is not true or false"):
        convert.from_hugging_face(tensors, {**described, "smear": "yes"})
    del described["qk_gain"]
    with pytest.raises(ValueError, match="lacks qk_gain"):
        convert.from_hugging_face(tensors, described)


def test_the_default_configuration_pads_to_whole_rows():
    config = GPTConfig(vocab_size=32769, n_layer=1, n_head=1, n_kv_head=1, n_embd=32)
    assert convert.param_shapes(config)["wte.weight"] == (32832, 32)
