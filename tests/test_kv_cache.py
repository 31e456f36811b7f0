"""The cache: writes change exactly what they say, rows come out as they went in."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchat import kv_cache
from tests.models import MODERN

ROWS, SLOTS = 3, 12


def random_cache(seed=0):
    rng = np.random.default_rng(seed)
    empty = kv_cache.make_cache(MODERN, ROWS, SLOTS, jnp.dtype("float32"))

    def fill(x):
        return jnp.asarray(rng.integers(0, SLOTS, x.shape), x.dtype)

    return jax.tree.map(fill, empty)


@given(
    length=st.integers(1, 6),
    starts=st.lists(st.integers(0, SLOTS), min_size=ROWS, max_size=ROWS),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_append_writes_what_counts_and_nothing_else(length, starts, data):
    """Also where a row is full, or where the padding would reach beyond its end."""
    counts = [data.draw(st.integers(0, min(length, SLOTS - start))) for start in starts]
    rng = np.random.default_rng(0)
    stored = rng.normal(size=(ROWS, 2, SLOTS, 4)).astype(np.float32)
    new = rng.normal(size=(ROWS, length, 2, 4)).astype(np.float32)
    expected = stored.copy()
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        expected[row, :, start : start + count] = new[row, :count].swapaxes(0, 1)
    written = kv_cache.append(*map(jnp.asarray, (stored, new, starts, counts)))
    np.testing.assert_array_equal(written, expected)


def test_a_row_that_is_read_and_written_elsewhere_is_a_copy():
    cache = random_cache()
    part = kv_cache.read_row(cache, jnp.int32(2), 3, 4)
    changed = kv_cache.write_row(cache, jnp.int32(0), 3, part)
    for before, after in zip(cache.keys, changed.keys, strict=True):
        np.testing.assert_array_equal(after[0, :, 3:7], before[2, :, 3:7])
        np.testing.assert_array_equal(after[0, :, :3], before[0, :, :3])
        np.testing.assert_array_equal(after[0, :, 7:], before[0, :, 7:])
        np.testing.assert_array_equal(after[1:], before[1:])
    np.testing.assert_array_equal(changed.ids[0, 0, 3:7, 0], cache.ids[2, 0, 3:7, 0])


def test_cropping_and_pasting_changes_nothing():
    cache = random_cache()
    again = kv_cache.paste(cache, kv_cache.crop(cache, 5))
    assert kv_cache.crop(cache, 5).max_length == 5
    jax.tree.map(np.testing.assert_array_equal, cache, again)


def test_newest_ids_are_the_last_of_each_row_and_zero_in_an_empty_one():
    cache = random_cache()._replace(lengths=jnp.array([0, 1, SLOTS]))
    ids = np.asarray(cache.ids[:, 0, :, 0])
    expected = [0, ids[1, 0], ids[2, SLOTS - 1]]
    assert kv_cache.newest_ids(cache).tolist() == expected
