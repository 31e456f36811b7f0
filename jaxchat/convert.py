"""Names, layouts and configurations between the worlds, in numpy only.

The project's own form is a flat dict of float32 arrays by dotted name, matrices (out, in), the
vocabulary padded. Upstream's checkpoints and Hugging Face's have the same matrices under other
names, so a conversion is a renaming, a crop of the vocabulary and a reading of the configuration.
Whatever does not fit is collected, and told in one error. Left out: files of any kind
(checkpoint.py, export.py, scripts.import_model).

    ours                      upstream nanochat                     Hugging Face `nanochat`
    wte.weight                transformer.wte.weight                model.embed_tokens.weight
    h.{i}.attn.c_q.weight     transformer.h.{i}.attn.c_q.weight     model.layers.{i}.self_attn.q_proj.weight
    h.{i}.mlp.c_fc.weight     transformer.h.{i}.mlp.c_fc.weight     model.layers.{i}.mlp.fc1.weight
    lm_head.weight            lm_head.weight                        lm_head.weight
    value_embeds.{i}.weight   value_embeds.{i}.weight               (none: the classic model only)
"""  # noqa: E501 (a table)

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np

from jaxchat.config import GATE_CHANNELS, SMEAR_CHANNELS, GPTConfig

Params = Mapping[str, np.ndarray]

TABLES = ("wte.", "lm_head.", "value_embeds.")
"""Weights with a row per token."""

CLASSIC_TYPE = "nanochat"
"""What stock transformers calls the classic model."""

MODERN_TYPE = "jaxchat"
"""The model type of exports that bring their own code."""

HUGGING_FACE_NAMES = {
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
"""Inside a block, of transformers' `NanoChatForCausalLM`."""

HUGGING_FACE_FIELDS = {
    "sequence_len": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size",
    "logit_softcap": "final_logit_softcapping",
}
"""Of its configuration."""

HUGGING_FACE_ORIGIN = "jaxchat"
"""Entry of an export's config.json: {"stage", "step"} of the model; transformers keeps it."""

HUGGING_FACE_CONSTANTS = {
    "hidden_act": "relu2",
    "attention_bias": False,
    "tie_word_embeddings": False,
}
"""What its configuration must say for our model to be the same."""

HUGGING_FACE_OPTIONS = {"rms_norm_eps": float, "rope_theta": float}
"""Numbers that its configuration may leave out."""

HUGGING_FACE_ROPE = ("rope_parameters", "rope_scaling")
"""Objects that tell of the rotary angles, of transformers 5 and 4; either may be null."""

KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "an object",
}
"""Of configuration values, in words."""

RMS_NORM_EPS = 1e-6
"""That of both gpt.py; upstream's 1.2e-7 (float32's epsilon) gives logits within 1e-6 of it."""


# --- checks ---------------------------------------------------------------------------------------


def check_params(params: Params, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise one ValueError that lists every missing, extra and misshapen weight."""
    raise_differences(_param_differences(params, shapes))


def raise_differences(problems: Iterable[str]) -> None:
    """One ValueError that lists `problems`, when there are any."""
    problems = list(problems)
    if problems:
        shown = "\n  ".join(problems[:20] + [f"... {len(problems)} in all"] * (len(problems) > 20))
        raise ValueError(f"these weights are of another model:\n  {shown}")


def param_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Every weight of a model by name."""
    c, kv_dim = config, config.n_kv_head * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (c.padded_vocab_size, c.n_embd),
        "lm_head.weight": (c.padded_vocab_size, c.n_embd),
    }
    for i in range(c.n_layer):
        shapes |= {
            f"h.{i}.attn.c_q.weight": (c.n_embd, c.n_embd),
            f"h.{i}.attn.c_k.weight": (kv_dim, c.n_embd),
            f"h.{i}.attn.c_v.weight": (kv_dim, c.n_embd),
            f"h.{i}.attn.c_proj.weight": (c.n_embd, c.n_embd),
            f"h.{i}.mlp.c_fc.weight": (4 * c.n_embd, c.n_embd),
            f"h.{i}.mlp.c_proj.weight": (c.n_embd, 4 * c.n_embd),
        }
        if c.has_value_embed(i):
            shapes[f"h.{i}.attn.ve_gate.weight"] = (c.n_kv_head, GATE_CHANNELS)
            shapes[f"value_embeds.{i}.weight"] = (c.padded_vocab_size, kv_dim)
    if c.residual_scalars:
        shapes |= {"resid_lambdas": (c.n_layer,), "x0_lambdas": (c.n_layer,)}
    if c.smear:
        shapes |= {"smear_gate.weight": (1, SMEAR_CHANNELS), "smear_lambda": (1,)}
    if c.backout:
        shapes["backout_lambda"] = (1,)
    return shapes


# --- upstream nanochat ----------------------------------------------------------------------------


def from_nanochat(
    tensors: Params, model_config: Mapping[str, Any]
) -> tuple[GPTConfig, dict[str, np.ndarray]]:
    """Configuration and weights of an upstream checkpoint, of either generation.

    `tensors` is the content of `model_*.pt` in float32, `model_config` the entry of that name of
    `meta_*.json`. The generation follows from the tensors. ValueError lists everything that is
    neither the model of autumn 2025 nor that of commit 92d63d4.
    """
    renamed = {_from_nanochat_name(name): x for name, x in tensors.items()}
    known = {"sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"}
    problems = [f"model_config lacks {name}" for name in sorted(known - model_config.keys())]
    optional = {"window_pattern"}
    surplus = model_config.keys() - known - optional
    problems += [f"model_config has the unknown {name}" for name in sorted(surplus)]
    given = known | (optional & model_config.keys())
    raise_differences(problems or _mistyped(model_config, _field_types(given)))
    config = GPTConfig(**{name: model_config[name] for name in known})
    window = model_config.get("window_pattern")
    if not _is_modern(renamed):
        config = config.classic()
        if set(window or "L") != {"L"}:
            problems.append(f"the classic model has no windows, this one has {window!r}")
    elif window is None:
        problems.append("model_config lacks window_pattern, which the modern model has")
    else:
        config = replace(config, window_pattern=window)
    return config, fit(renamed, config, problems)


def to_nanochat(params: Params) -> dict[str, np.ndarray]:
    """The weights under upstream's names."""
    inside = ("wte.", "h.")
    return {f"transformer.{n}" if n.startswith(inside) else n: x for n, x in params.items()}


def _from_nanochat_name(name: str) -> str:
    return name.removeprefix("_orig_mod.").removeprefix("transformer.")  # torch.compile's prefix


def _is_modern(params: Params) -> bool:
    marks = ("value_embeds.", "resid_", "x0_", "smear_", "backout_")
    return any(name.startswith(marks) for name in params)


# --- Hugging Face ---------------------------------------------------------------------------------


def is_stock(config: GPTConfig) -> bool:
    """Whether stock transformers computes this very model: no windows, none of the switches."""
    windowless = min(config.window_sizes) >= config.sequence_len
    like_classic = replace(
        config.classic(),
        window_pattern=config.window_pattern,
        rope_base=config.rope_base,
    )
    return windowless and config == like_classic


def to_hugging_face(
    params: Params, config: GPTConfig
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and config.json (without token ids): stock where possible, else our own type.

    Our own type keeps our names; in both the padding of the vocabulary is gone.
    """
    cropped = {
        name: x[: config.vocab_size] if name.startswith(TABLES) else x for name, x in params.items()
    }
    if not is_stock(config):
        return cropped, {"model_type": MODERN_TYPE, **asdict(config)}
    described = {
        "model_type": CLASSIC_TYPE,
        "architectures": ["NanoChatForCausalLM"],
        **{theirs: getattr(config, ours) for ours, theirs in HUGGING_FACE_FIELDS.items()},
        **HUGGING_FACE_CONSTANTS,
        "intermediate_size": 4 * config.n_embd,
        "rms_norm_eps": RMS_NORM_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "attention_dropout": 0.0,
    }
    return {_to_hugging_face_name(name): x for name, x in cropped.items()}, described


def from_hugging_face(
    tensors: Params, described: Mapping[str, Any]
) -> tuple[GPTConfig, dict[str, np.ndarray]]:
    """Configuration and weights of `NanoChatForCausalLM`, or of a model of our own type.

    ValueError lists everything in `described` (config.json) and `tensors` that our model is not.
    """
    kind = described.get("model_type")
    if kind == MODERN_TYPE:
        names = {field.name for field in fields(GPTConfig)}
        missing = [f"config.json lacks {name}" for name in sorted(names - described.keys())]
        raise_differences(missing or _mistyped(described, _field_types(names)))
        config = GPTConfig(**{name: described[name] for name in names})
        return config, fit(tensors, config)
    if kind != CLASSIC_TYPE:
        raise_differences([f"model_type is {kind!r}, not {CLASSIC_TYPE!r} or {MODERN_TYPE!r}"])
    missing = set(HUGGING_FACE_FIELDS.values()) - described.keys()
    raise_differences(
        [f"config.json lacks {name}" for name in sorted(missing)] or _mistyped_settings(described)
    )
    shape = {ours: described[theirs] for ours, theirs in HUGGING_FACE_FIELDS.items()}
    config = replace(GPTConfig().classic(), **shape, rope_base=_rope_theta(described))
    renamed = {_from_hugging_face_name(name): x for name, x in tensors.items()}
    return config, fit(renamed, config, _foreign_settings(described, config))


def _foreign_settings(described: Mapping[str, Any], config: GPTConfig) -> list[str]:
    wanted = {**HUGGING_FACE_CONSTANTS, "intermediate_size": 4 * config.n_embd}
    problems = [
        f"config.json says {name}={described[name]!r}, our model has {value!r}"
        for name, value in wanted.items()
        if described.get(name, value) != value
    ]
    eps = described.get("rms_norm_eps", RMS_NORM_EPS)
    if not 0 <= eps <= RMS_NORM_EPS:
        problems.append(f"rms_norm_eps={eps}, our model has {RMS_NORM_EPS}")
    problems += [
        f"rotary angles of type {rope[name]!r}, our model has the default"
        for rope in _rope_settings(described)
        for name in ("rope_type", "type")  # the second is the older one
        if rope.get(name, "default") != "default"
    ]
    return problems


def _mistyped_settings(described: Mapping[str, Any]) -> list[str]:
    """All that is read of Hugging Face's configuration, wherever it is given."""
    types = _field_types(HUGGING_FACE_FIELDS)
    wanted = {theirs: types[ours] for ours, theirs in HUGGING_FACE_FIELDS.items()}
    wanted |= {name: kind for name, kind in HUGGING_FACE_OPTIONS.items() if name in described}
    wanted |= {name: dict for name in HUGGING_FACE_ROPE if described.get(name) is not None}
    problems = _mistyped(described, wanted)
    for rope in _rope_settings(described):
        problems += _mistyped(rope, {"rope_theta": float} if "rope_theta" in rope else {})
    return problems


def _rope_settings(described: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [described[n] for n in HUGGING_FACE_ROPE if isinstance(described.get(n), dict)]


def _rope_theta(described: Mapping[str, Any]) -> float:
    """Where transformers 5 keeps it, or 4 did."""
    places = (*_rope_settings(described), described)
    default = GPTConfig().classic().rope_base
    return float(next((x["rope_theta"] for x in places if "rope_theta" in x), default))


def _to_hugging_face_name(name: str) -> str:
    if match := re.fullmatch(r"h\.(\d+)\.(\w+\.\w+)\.weight", name):
        return f"model.layers.{match[1]}.{HUGGING_FACE_NAMES[match[2]]}.weight"
    return "model.embed_tokens.weight" if name == "wte.weight" else name


def _from_hugging_face_name(name: str) -> str:
    ours = {theirs: ours for ours, theirs in HUGGING_FACE_NAMES.items()}
    match = re.fullmatch(r"model\.layers\.(\d+)\.(\w+\.\w+)\.weight", name)
    if match and match[2] in ours:
        return f"h.{match[1]}.{ours[match[2]]}.weight"
    return "wte.weight" if name == "model.embed_tokens.weight" else name


# --- both -----------------------------------------------------------------------------------------


def fit(params: Params, config: GPTConfig, problems: Iterable[str] = ()) -> dict[str, np.ndarray]:
    """These weights in our form: float32, in our order, the vocabulary padded with zero rows.

    Tables may come padded or cropped. ValueError lists `problems` and whatever does not fit.
    """
    shapes = param_shapes(config)
    padded = {
        name: _pad_rows(x, config) if name.startswith(TABLES) and x.ndim == 2 else x
        for name, x in params.items()
    }
    raise_differences([*problems, *_param_differences(padded, shapes)])
    return {name: np.ascontiguousarray(padded[name], np.float32) for name in shapes}


def _field_types(names: Iterable[str]) -> dict[str, type]:
    """Of `GPTConfig`'s fields."""
    return {name: type(getattr(GPTConfig, name)) for name in sorted(names)}


def _mistyped(described: Mapping[str, Any], wanted: Mapping[str, type]) -> list[str]:
    """Values that are of another type; a whole number is a number too."""
    return [
        f"{name}={described[name]!r} is not {KINDS[kind]}"
        for name, kind in wanted.items()
        if type(described[name]) not in ({kind, int} if kind is float else {kind})
    ]


def _pad_rows(x: np.ndarray, config: GPTConfig) -> np.ndarray:
    if len(x) != config.vocab_size:
        return x
    return np.pad(x, [(0, config.padded_vocab_size - config.vocab_size), (0, 0)])


def _param_differences(params: Params, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    problems = [f"missing {name} {shapes[name]}" for name in sorted(shapes.keys() - params.keys())]
    problems += [f"unexpected {name}" for name in sorted(params.keys() - shapes.keys())]
    problems += [
        f"{name} has shape {tuple(params[name].shape)}, the model wants {shapes[name]}"
        for name in sorted(shapes.keys() & params.keys())
        if tuple(params[name].shape) != tuple(shapes[name])
    ]
    return problems
