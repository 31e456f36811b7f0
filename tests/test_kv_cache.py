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


def test_a_dispatch_sees_the_last_positions_of_every_row_and_none_of_the_rest():
    """A window shorter than the bucket is taken where each row's text ends."""
    cache, lengths = random_cache(), jnp.array([0, 5, SLOTS])
    windows = [3, SLOTS, 4, 9]
    view = kv_cache.begin_dispatch(cache, lengths, windows, bucket=9, steps=2)
    for layer, window in enumerate(windows):
        width, stored = min(window, 9), np.asarray(cache.keys[layer])
        assert view.held[layer][0].shape[3] == view.held[layer][1].shape[2] == width
        for row, length in enumerate(lengths.tolist()):
            first = max(0, length - width) if width < 9 else 0
            assert view.firsts[layer][row] == first
            np.testing.assert_array_equal(
                view.held[layer][0][row].swapaxes(1, 2), stored[row, :, first : first + width]
            )


def test_what_a_dispatch_adds_is_kept_where_each_row_ended():
    """Row 0 runs twice, row 1 once, row 2 is full and never runs: it keeps every bit."""
    cache, lengths = random_cache(), jnp.array([4, 5, SLOTS])
    rng = np.random.default_rng(1)
    view = kv_cache.begin_dispatch(cache, lengths, [SLOTS] * 4, bucket=SLOTS, steps=3)
    expected = jax.tree.map(lambda x: np.asarray(x).copy(), cache)
    for valid in ([1, 1, 0], [1, 0, 0]):
        _, heads, _, channels = cache.keys[0].shape
        q = jnp.zeros((ROWS, 1, MODERN.n_head, channels))
        new = rng.normal(size=(2, 4, ROWS, 1, heads, channels)).astype(np.float32)
        ids = rng.integers(0, 99, (ROWS, 1)).astype(np.int32)
        for row in np.flatnonzero(valid):
            end = int(view.lengths[row])
            expected.ids[row, 0, end, 0] = ids[row, 0]
            for layer in range(4):
                expected.keys[layer][row, :, end] = new[0, layer, row, 0]
                expected.values[layer][row, :, end] = new[1, layer, row, 0]
        counted = jnp.asarray(valid, jnp.int32)
        layers = [
            view.attend(i, q, jnp.asarray(new[0, i]), jnp.asarray(new[1, i]), counted, SLOTS)[1]
            for i in range(4)
        ]
        view = view.advance(layers, jnp.asarray(ids), counted)
        ends = np.asarray(view.lengths) - 1
        assert view.newest_ids().tolist() == expected.ids[np.arange(ROWS), 0, ends, 0].tolist()
    after = kv_cache.keep(cache, kv_cache.gains(view))
    assert after.lengths.tolist() == [6, 6, SLOTS]
    expected = expected._replace(lengths=np.asarray(after.lengths))
    jax.tree.map(np.testing.assert_array_equal, expected, after)


def test_newest_ids_are_the_last_of_each_row_and_zero_in_an_empty_one():
    cache = random_cache()._replace(lengths=jnp.array([0, 1, SLOTS]))
    ids = np.asarray(cache.ids[:, 0, :, 0])
    expected = [0, ids[1, 0], ids[2, SLOTS - 1]]
    assert cache.newest_ids().tolist() == expected
