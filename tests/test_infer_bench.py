"""The benchmark: what it counts, and that one run ends in one JSON document."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from jaxchat import cli
from jaxchat.config import GPTConfig
from scripts import infer_bench
from tests.servers import backend

TINY = {
    "depth": 2,
    "aspect_ratio": 32,
    "vocab_size": 300,
    "sequence_len": 64,
    "prompt_tokens": 8,
    "new_tokens": 6,
    "rounds": 1,
    "batch_sizes": (1, 2),
    "tokens_per_dispatch": 4,
}


def test_a_bare_tokenizer_has_the_size_of_the_model():
    assert infer_bench.bare_tokenizer(8192).vocab_size == 8192


def test_a_step_reads_every_matrix_and_what_the_windows_see():
    config = infer_bench.Config(prompt_tokens=40, new_tokens=20)
    one = backend()
    c = GPTConfig(**vars(one.config))
    matrices = sum(x.size for name, x in one.get_params().items() if name.startswith("h."))
    head = c.padded_vocab_size * c.n_embd
    cache = 2 * 3 * c.n_layer * 50 * c.n_kv_head * c.head_dim  # keys and values of three rows
    assert infer_bench.step_bytes(config, one, 3) == 4 * (matrices + head + cache)


def test_memory_is_what_the_arrays_take():
    one = backend()
    told = infer_bench.memory_bytes(one, 3, 40)
    assert told["weight_bytes"] == sum(x.nbytes for x in one.get_params().values())
    cache = one.new_cache(3, 40)
    assert told["cache_bytes"] == sum(x.nbytes for x in (*cache.keys, *cache.values))


def test_values_out_of_range_are_named():
    """Every number was named, whichever was wrong."""
    for name in ("rounds", "prompt_tokens", "new_tokens", "tokens_per_dispatch"):
        change: dict[str, Any] = {name: 0}
        with pytest.raises(ValueError, match=f"^--{name.replace('_', '-')} 0: must be above 0$"):
            infer_bench.Config(**change)
    with pytest.raises(ValueError, match="--batch-sizes 0: must be above 0"):
        infer_bench.Config(batch_sizes=(8, 0))
    with pytest.raises(ValueError, match="--sequential -1: must be at least 0"):
        infer_bench.Config(sequential=-1)


def test_a_model_is_named_as_for_the_other_scripts(monkeypatch):
    asked = {}

    def load_model(source, **options):
        asked.update(options, source=source)
        return SimpleNamespace(backend=backend(), tokenizer=None)

    monkeypatch.setattr(infer_bench, "load_model", load_model)
    words = ["-i", "mid", "-g", "d4", "-s", "7", "--prompt-tokens", "2", "--new-tokens", "2"]
    infer_bench.load(cli.parse(infer_bench.Config, words), "jax")
    assert (asked["source"], asked["model_tag"], asked["step"]) == ("mid", "d4", 7)


def test_what_is_measured_of_requests_together_is_shown():
    caption = infer_bench.on_screen([], 8, {"jax": 3.208, "torch": 2.0}).caption
    assert caption == (
        "jax: 8 requests together end 3.21 times as fast as one by one\n"
        "torch: 8 requests together end 2.00 times as fast as one by one"
    )
    assert infer_bench.on_screen([]).caption is None


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"new_tokens": 1}, "new_tokens=1 .*take 2 or more"),
        ({"prompt_tokens": 60, "new_tokens": 5}, "prompt_tokens=60 and new_tokens=5 .*of 64"),
        ({"vocab_size": 264}, "vocab_size=264 .*take 265 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_numbers(wrong, complaint):
    with pytest.raises(ValueError, match=complaint):
        infer_bench.Config(**{**TINY, **wrong})


def test_a_checkpoint_has_the_context_that_it_was_trained_with(monkeypatch):
    tiny = SimpleNamespace(backend=backend(), tokenizer=None)
    monkeypatch.setattr(infer_bench, "load_model", lambda *_, **__: tiny)
    context = tiny.backend.config.sequence_len
    infer_bench.load(infer_bench.Config(prompt_tokens=2, new_tokens=context - 2), "jax")
    with pytest.raises(ValueError, match=f"in a context of {context}"):
        infer_bench.load(infer_bench.Config(prompt_tokens=2, new_tokens=context - 1), "jax")


def test_the_smallest_numbers_are_measured():
    config = infer_bench.Config(
        **{**TINY, "vocab_size": 265, "prompt_tokens": 62, "new_tokens": 2, "batch_sizes": (1,)},
        backends=("torch",),
    )
    models = {"torch": infer_bench.load(config, "torch")}
    [row] = infer_bench.sweep(config, models, 1, 1e9)
    assert row["tokens_per_s"] > 0


@pytest.mark.parametrize(
    ("free_bytes", "size"),
    [(None, 2**28), (140 * 2**30, 2**33), (16 * 2**30, 2**32), (2**20 + 7, 2**18)],
)
def test_bandwidth_is_measured_on_8_gib_or_a_quarter_of_what_a_gpu_has_free(free_bytes, size):
    assert infer_bench.probe_bytes(free_bytes) == size


@pytest.mark.slow
def test_the_last_line_is_one_document_about_both_backends(capsys):
    infer_bench.main(infer_bench.Config(**TINY, sequential=2))
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = [(row["backend"], row["batch_size"]) for row in document["results"]]
    assert found == [("jax", 1), ("torch", 1), ("jax", 2), ("torch", 2)]
    for row in document["results"]:
        assert row["tokens_per_s"] > 0
        assert row["inter_token_s"] * row["tokens_per_s"] == pytest.approx(row["batch_size"])
        assert 0 < row["roofline_share"] < 1.5
        assert 0 < row["cache_bytes"] < row["weight_bytes"]
    assert document["continuous"].keys() == {"jax", "torch"}
    assert document["peak_host_bytes"] > 10**8
