"""Generation on the devices of a mesh, each with rows of its own, against generation on one."""

import re
from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest

from jaxchat import decoding
from jaxchat.dispatch import make_batch
from jaxchat.engine import Engine
from jaxchat.jax_backend import JaxBackend
from jaxchat.request import Request
from jaxchat.sampling_params import SamplingParams
from tests.servers import CONTEXT, backend, tokenizer


@cache
def on(mesh):
    """The model of the server's tests on eight devices."""
    made = JaxBackend(backend().config, mesh=mesh)
    made.set_params(backend().get_params())
    return made


@pytest.fixture(autouse=True)
def few_chunk_lengths(monkeypatch):
    monkeypatch.setattr(decoding, "CHUNK_LENGTHS", (16, 64))


def requests():
    """More than there are rows: groups of samples, long prompts, all that a row may ask for."""
    bos, encode = tokenizer().bos_id, tokenizer().encode
    free = SamplingParams(max_tokens=24, temperature=0.9, top_k=40, ignore_eos=True)
    fox = [bos, *encode("The quick brown fox")]
    return [
        Request(fox, replace(free, seed=1), n=5),
        Request([*fox, *encode(" jumps over")], replace(free, seed=2)),
        Request([bos], replace(free, temperature=0.0, max_tokens=30)),
        Request([bos, *encode("señor")], replace(free, seed=3, top_logprobs=3), n=3),
        Request([bos, *encode("7+8 = ")], replace(free, seed=4, frequency_penalty=0.7), n=2),
        Request([bos, *encode("the " * 30)], replace(free, seed=5, max_tokens=5), n=4),
        Request([bos], SamplingParams(max_tokens=50, seed=6, logit_bias=((70, 4.0),))),
    ]


@cache
def alone():
    """The replies of one device."""
    return Engine(backend(), tokenizer(), slots=4).complete(requests())


@pytest.mark.parametrize(("mesh", "slots"), [("auto", 3), ("data=2,fsdp=2,tensor=2", 16)])
def test_replies_are_those_of_one_device(mesh, slots):
    """Fewer rows than devices, and several for each; one reads for samples that others write."""
    spread = Engine(on(mesh), tokenizer(), slots=slots).complete(requests())
    for one, other in zip(alone(), spread, strict=True):
        assert other.ids == one.ids
        np.testing.assert_allclose(other.logprobs, one.logprobs, atol=2e-5)
        for mine, theirs in zip(other.tops, one.tops, strict=True):
            assert [id for id, _ in mine] == [id for id, _ in theirs]


def test_a_prompt_goes_on_in_its_row_on_its_device():
    """Beside others there: rows are numbered through, and a device counts its own from 0."""
    texts = [list(tokenizer().encode(text)) for text in ("one fox", "a dog", "some cat", "7+8 = ")]
    logits = []
    for model in (backend(), on("data=2,fsdp=2,tensor=2")):
        made, found = model.new_cache(16, CONTEXT), []
        for row, ids in enumerate(texts, start=4):  # those of the second share
            made, _ = model.prefill(made, row, np.array(ids, np.int32), 0)
        for row, ids in enumerate(texts, start=4):
            made, seen = model.prefill(made, row, np.array(texts[0], np.int32), len(ids))
            found.append(seen)
        logits.append(found)
    np.testing.assert_allclose(logits[0], logits[1], atol=2e-5)


def test_every_device_holds_its_own_rows():
    """As many as there are devices at least; those behind the last slot stay empty."""
    for rows, own in [(1, 1), (8, 1), (9, 2), (32, 4)]:
        made = on("auto").new_cache(rows, CONTEXT)
        for array in jax.tree.leaves(made):
            assert [shard.data.shape[0] for shard in array.addressable_shards] == [own] * 8


def test_within_a_dispatch_nobody_waits_for_anybody():
    """What devices tell each other is what they sampled, behind the loop; no cache is copied."""
    model = on("auto")
    decoder, made = model._decoder, model.new_cache(16, CONTEXT)
    weights = decoder.weights(model.params)
    batch = make_batch(16, [], steps=4, stop_ids=frozenset())
    lowered = decoder._decode.lower(weights, made, decoder.inputs(batch), bucket=CONTEXT)
    lines = lowered.compile().as_text().splitlines()
    meeting = r" (all-reduce|all-gather|all-to-all|collective-permute)(-start)?\("
    entry = next(i for i, line in enumerate(lines) if line.startswith("ENTRY"))
    assert not [line for line in lines[:entry] if re.search(meeting, line)]
    told = [line for line in lines[entry:] if re.search(meeting, line)]
    assert len(told) == 5
    assert all("all-gather" in line for line in told)

    place = decoding._Place(*map(np.int32, (3, 0, 9)))
    own = sum(x.nbytes for x in jax.tree.leaves(made)) // 8
    read = decoder._read(weights, made, np.zeros(16, np.int32), place, bucket=CONTEXT)
    written = decoder._write.lower(made, read[0], place, bucket=CONTEXT).compile()
    assert written.memory_analysis().alias_size_in_bytes >= own
    assert written.memory_analysis().temp_size_in_bytes < own / 100
