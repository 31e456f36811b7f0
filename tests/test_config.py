"""The arithmetic of the one dial, against numbers worked out by hand or stated by upstream."""

import dataclasses
import math

import pytest

from jaxchat.config import GPTConfig, OptimizerConfig, count_params, flops_per_token, scaling_params
from jaxchat.plan import micro_batches, plan_training
from jaxchat.sampling_params import SamplingParams


def test_depth_12_is_a_768_wide_model_with_six_heads():
    config = GPTConfig.from_depth(12)
    assert (config.n_embd, config.n_head, config.head_dim) == (768, 6, 128)


def test_width_is_rounded_up_to_whole_heads():
    assert GPTConfig.from_depth(5).n_embd == 384  # 5 * 64 = 320 -> 3 heads of 128


@pytest.mark.parametrize(
    ("pattern", "layers", "expected"),
    [
        ("SSSL", 5, (512, 512, 512, 2048, 2048)),
        ("L", 3, (2048, 2048, 2048)),
        ("S", 2, (512, 2048)),
    ],
)
def test_windows_tile_and_the_last_layer_sees_everything(pattern, layers, expected):
    config = GPTConfig(n_layer=layers, window_pattern=pattern)
    assert config.window_sizes == expected


def test_a_short_window_is_a_quarter_rounded_up_to_128():
    assert GPTConfig(sequence_len=1000, window_pattern="SL", n_layer=2).window_sizes[0] == 256


def test_vocabulary_is_padded_to_64():
    assert GPTConfig(vocab_size=8193).padded_vocab_size == 8256


def test_parameter_counts_of_depth_12():
    """6 x 768^2 x 12 per block is 84,934,656; value gates add 6 layers of (6, 12)."""
    config = GPTConfig.from_depth(12)
    counts = count_params(config)
    assert counts["matrices"] == 12 * 12 * 768 * 768 + 6 * 6 * 12
    assert counts["wte"] == counts["lm_head"] == 32768 * 768
    assert counts["value_embeds"] == 6 * 32768 * 768
    assert scaling_params(config) == counts["matrices"] + counts["lm_head"]


def test_flops_count_windows():
    config = GPTConfig.from_depth(4, vocab_size=8192, sequence_len=512)
    matmul = 4 * 12 * 256**2 + 2 * 2 * 12 + 8192 * 256 + 24
    attention = 12 * 256 * (128 + 128 + 128 + 512)
    assert flops_per_token(config) == 6 * matmul + attention
    assert flops_per_token(config, 64) == 6 * matmul + 12 * 256 * 4 * 64


def test_the_reference_depth_scales_nothing():
    plan = plan_training(GPTConfig.from_depth(12), OptimizerConfig())
    assert plan.total_batch_size == 2**19
    assert plan.lr_scale == 1.0
    assert plan.weight_decay == 0.28


def test_deeper_models_take_larger_batches_higher_rates_and_less_decay():
    """D grows 6.6-fold from depth 12 to 24: 2^19 x 6.6^0.383 rounds to 2^20."""
    plan = plan_training(GPTConfig.from_depth(24), OptimizerConfig())
    assert plan.total_batch_size == 2**20
    assert plan.lr_scale == pytest.approx(2**0.5)
    ratio = scaling_params(GPTConfig.from_depth(12)) / scaling_params(GPTConfig.from_depth(24))
    assert plan.weight_decay == pytest.approx(0.28 * 2**0.5 * ratio)


def test_the_optimizer_is_nanochats():
    """lr, betas, weight decay, and which of width and batch scale the rate (at 92d63d4)."""
    config = OptimizerConfig()
    assert {name: dataclasses.astuple(group) for name, group in config.adam_groups.items()} == {
        "lm_head": (0.008, 0.8, 0.96, 0.01, True, True),
        "wte": (0.3, 0.8, 0.995, 0.001, True, True),
        "value_embeds": (0.15, 0.8, 0.995, 0.01, True, True),
        "resid_lambdas": (0.005, 0.8, 0.95, 0.05, False, True),
        "x0_lambdas": (0.5, 0.96, 0.95, 0.0, False, True),
        "gates": (0.2, 0.8, 0.95, 0.0, False, False),
    }
    assert (config.matrix_lr, config.matrix_beta2, config.weight_decay) == (0.02, 0.9, 0.28)
    assert config.eps == 1e-10


@pytest.mark.parametrize(
    ("depth", "aspect", "head_dim", "batch"),
    [
        (12, 64, 128, 2**19),
        (16, 64, 128, 2**19),
        (18, 64, 128, 2**20),
        (4, 64, 128, 2**18),
        (4, 48, 64, 2**18),
    ],
)
def test_the_batch_grows_with_the_horizon_to_the_0_383(depth, aspect, head_dim, batch):
    """The horizon is 12 tokens per scaling parameter; the reference is its kind at depth 12."""
    config = GPTConfig.from_depth(depth, aspect_ratio=aspect, head_dim=head_dim)
    reference = GPTConfig.from_depth(12, aspect_ratio=aspect, head_dim=head_dim)
    plan = plan_training(config, OptimizerConfig(), aspect_ratio=aspect)
    growth = scaling_params(config) / scaling_params(reference)
    assert plan.total_batch_size == 2 ** round(math.log2(2**19 * growth**0.383)) == batch
    assert plan.num_iterations == round(12 * scaling_params(config) / batch)
    assert plan.weight_decay == pytest.approx(0.28 * math.sqrt(batch / 2**19) / growth)


def test_the_horizon_is_steps_before_flops_before_ratio():
    config, optimizer = GPTConfig.from_depth(12), OptimizerConfig()
    flops = 100 * 2**19 * flops_per_token(config)
    assert plan_training(config, optimizer, target_flops=flops).num_iterations == 100
    both = plan_training(config, optimizer, target_flops=flops, num_iterations=7)
    assert both.num_iterations == 7
    ratio = plan_training(config, optimizer, target_param_data_ratio=8)
    assert ratio.num_iterations == round(8 * scaling_params(config) / 2**19)


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize(
    "name", ["num_iterations", "target_flops", "target_param_data_ratio", "total_batch_size"]
)
def test_a_horizon_that_cannot_be_is_refused_by_its_flag(name, value):
    with pytest.raises(ValueError, match=rf"--{name.replace('_', '-')} {value}: must be above 0"):
        plan_training(GPTConfig.from_depth(12), OptimizerConfig(), **{name: value})


def test_a_horizon_without_end_is_refused_by_its_flag():
    with pytest.raises(ValueError, match="--target-flops inf: must be at least 0, and finite"):
        plan_training(GPTConfig.from_depth(12), OptimizerConfig(), target_flops=math.inf)


def test_micro_batches_divide_the_batch_or_say_what_would():
    plan = plan_training(GPTConfig.from_depth(12), OptimizerConfig())
    assert micro_batches(plan, sequence_len=2048, device_batch_size=32, devices=2) == 4
    with pytest.raises(ValueError, match="use --total-batch-size 491520"):
        micro_batches(plan, sequence_len=2048, device_batch_size=48, devices=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 100}, "n_embd=100 is not a multiple of n_head=6; use n_embd=102"),
        ({"n_kv_head": 4}, "n_kv_head=4 does not divide n_head=6"),
        ({"window_pattern": "SX"}, "'SX' may only hold S and L"),
        ({"n_layer": 0}, "n_layer=0 must be at least 1"),
        ({"n_embd": 18}, "head_dim=3 must be even"),
        ({"logit_softcap": 90.0}, "logit_softcap=90.0 must be above 0 and at most 60.0"),
    ],
)
def test_impossible_shapes_name_values_and_remedy(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(GPTConfig(), **changes)


def test_classic_keeps_the_shape_and_turns_everything_off():
    config = GPTConfig.from_depth(6, preset="classic")
    assert config.n_embd == 384
    assert config.window_pattern == "L"
    assert not (config.value_embeds or config.smear or config.backout or config.residual_scalars)
    assert (config.rope_base, config.qk_gain) == (10_000, 1)


def test_sampling_parameters_list_everything_that_is_wrong():
    with pytest.raises(ValueError, match=r"temperature=-1.*top_p=0"):
        SamplingParams(temperature=-1, top_p=0)
