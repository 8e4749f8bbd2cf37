"""The selection of key blocks against a plain one that is written to be read, row by row."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from edgekit import custom_ops
from edgekit.errors import InputError
from edgekit.models.sparse_attention import (
    chunk_ids,
    chunk_keys,
    dense_decode_attention,
    select_blocks,
    sparse_decode_attention,
    token_chunk,
)
from edgekit.models.sparse_config import SparseAttention, window_blocks

SIZE = 16
BASE = SparseAttention(kind="dhsa", budget=5 * SIZE, block_size=SIZE, local=SIZE, chunks_per_block=4)
QUERY_HEADS, KEY_HEADS, DIM = 4, 2, 8
PASSES = [(1, 0), (15, 0), (16, 0), (17, 0), (100, 0), (200, 0), (1, 64), (63, 64), (130, 64), (33, 100), (64, 100)]

custom_ops.register()


def keys_of_chunks(keys, starts, valid, config):
    """The chunk of each token of one text, and the keys that stand for the chunks: `keys` `[Hkv, N, D]`."""
    heads = keys.mean(0, keepdim=True) if config.heads == "shared" else keys
    places = -(-keys.shape[1] // config.block_size) * config.capacity
    table, chunks, chunk = torch.zeros(len(heads), places, keys.shape[2]), [], 0
    for token in range(keys.shape[1]):
        group = token // config.block_size
        if token % config.block_size == 0:
            chunk = group * config.capacity
        elif config.kind == "dhsa" and starts[token]:
            chunk += 1
        chunks.append(chunk)
    for chunk in set(chunks):
        members = [token for token in range(keys.shape[1]) if chunks[token] == chunk and valid[token]]
        if members:
            length = math.sqrt(len(members)) if config.kind == "dhsa" else 1.0
            table[:, chunk] = heads[:, members].mean(1) * length
    return torch.tensor(chunks), table


def means_over_heads(tensor, config):
    """`[Hq, ..]` to the means over the heads that select together: `[Hm, ..]`."""
    count = 1 if config.heads == "shared" else KEY_HEADS
    return tensor.view(count, -1, *tensor.shape[1:]).mean(1)


def ranked_blocks(scores, seen, own, local, size):
    """The blocks with a slot that is seen, best first: `scores` by slot; `own` and `local` are sets of slots."""
    ranks = {}
    for block in range(-(-len(seen) // size)):
        slots = [slot for slot in range(block * size, min((block + 1) * size, len(seen))) if seen[slot]]
        if slots:
            covered = set(range(block * size, (block + 1) * size))
            forced = 3 if covered & own else 2 if block == 0 else 1 if covered & local else 0
            ranks[block] = (-forced, -max(float(scores[slot]) for slot in slots) if not forced else 0.0, block)
    return sorted(ranks, key=ranks.__getitem__)


def plain_selection(q, valid, config, window, table, ids):
    """The blocks that each head and query block of one text reads, best first: q `[Hq, N, D]`, valid and ids `[T]`."""
    size, queries, slots = config.block_size, q.shape[1], len(valid)
    count = sum(bool(each) for each in valid[slots - queries :])
    result = []
    for head, mean in enumerate(means_over_heads(q, config)):
        rows = []
        for begin in range(0, queries, size):
            first = slots - queries + begin
            end = min(first + size, slots)
            members = [token for token in range(begin, min(begin + size, queries)) if valid[slots - queries + token]]
            query = mean[members].mean(0) if members else torch.zeros(q.shape[2])
            seen = [bool(valid[t]) and t < end and (not window or t > first - window) for t in range(slots)]
            scores = torch.arange(slots) // size
            if config.has_chunks:
                scores = [query @ table[head, ids[slot]] for slot in range(slots)]
            own, local = set(range(first, end)), set(range(max(0, first - config.local), first))
            best = ranked_blocks(scores, seen, own, local, size)
            last = range(count - config.dense_last, count)
            dense = any(token in last for token in range(begin, begin + size))
            everything = config.kind == "dense" or config.covers(window) or dense
            rows.append(best if everything else best[: config.blocks])
        result.append(rows)
    return result


def text(tokens, past, seed=0, *, integers=False, lengths=None):
    """Random queries `[B, Hq, N, D]`, keys and values `[B, Hkv, T, D]`, valid `[B, T]` and starts `[B, T]`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [tokens, (tokens + 1) // 2, max(1, tokens - 1)] if lengths is None else lengths
    batch, slots = len(lengths), past + tokens
    shapes = (batch, QUERY_HEADS, tokens, DIM), (batch, KEY_HEADS, slots, DIM), (batch, KEY_HEADS, slots, DIM)
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    if integers:
        q, k = q.round(), k.round().clamp(-1, 1)
    valid = torch.arange(slots) < past + torch.tensor(lengths).unsqueeze(1)
    # Every fourth place of a group at most, as with the capacity of BASE.
    starts = (torch.rand(batch, slots, generator=generator) < 0.5) & (torch.arange(slots) % 4 == 1)
    return q, k, v, valid, starts


def table_of(k, starts, valid, config, cuts):
    """The chunk table of passes that end at `cuts`."""
    ids, keys, begin = [], [], 0
    for end in cuts:
        part = slice(begin, end)
        new = chunk_ids(starts[:, part], valid[:, part], config)
        ids.append(new + sum(each.shape[2] for each in keys))
        keys.append(chunk_keys(k[:, :, part], new, valid[:, part], config))
        begin = end
    return torch.cat(keys, dim=2), torch.cat(ids, dim=1)


def selected(q, k, valid, starts, config, window=0):
    """The block index of a pass, and the table it was chosen by."""
    past = k.shape[2] - q.shape[2]
    cuts = [past, k.shape[2]] if past else [k.shape[2]]
    keys, ids = table_of(k, starts, valid, config, cuts) if config.has_chunks else (None, None)
    return select_blocks(q, valid, config, window=window, keys=keys, ids=ids), keys, ids


def lists(index):
    """A block index `[Hm, NQ, K]` as lists without -1."""
    return [[[int(block) for block in row if block >= 0] for row in head] for head in index]


CONFIGS = {
    "dhsa": BASE,
    "dhsa-shared-heads": replace(BASE, heads="shared"),
    "dhsa-least-budget": replace(BASE, budget=3 * SIZE),
    "dhsa-dense-last": replace(BASE, dense_last=20),
    "dhsa-no-local": replace(BASE, local=0, budget=2 * SIZE),
    "block": replace(BASE, kind="block"),
    "window": replace(BASE, kind="window"),
    "dense": replace(BASE, kind="dense"),
}


@pytest.mark.parametrize("window", [0, 10, 50, 90, 1000], ids=lambda window: f"window{window}")
@pytest.mark.parametrize("name", CONFIGS)
def test_selection_is_the_plain_one(name, window):
    config = CONFIGS[name]
    for tokens, past in PASSES:
        q, k, _, valid, starts = text(tokens, past, seed=tokens)
        index, keys, ids = selected(q, k, valid, starts, config, window)
        assert index.dtype == torch.int32
        for row in range(len(q)):
            table, chunk = (None, None) if keys is None else (keys[row], ids[row])
            expected = plain_selection(q[row], valid[row], config, window, table, chunk)
            got = lists(index[row])
            if config.kind == "dense" or config.covers(window):
                got, expected = ([[sorted(blocks) for blocks in head] for head in each] for each in (got, expected))
            assert got == expected[: len(got)], (tokens, past, row)
            assert all(len(set(blocks)) == len(blocks) for head in got for blocks in head)


@pytest.mark.parametrize("kind", ["dhsa", "block"])
@pytest.mark.parametrize("heads", ["kv", "shared"])
def test_chunks_are_the_plain_ones(kind, heads):
    config = replace(BASE, kind=kind, heads=heads)
    for tokens in (1, 15, 16, 17, 100):
        _, k, _, valid, starts = text(tokens, 0, seed=tokens)
        ids = chunk_ids(starts if kind == "dhsa" else None, valid, config)
        keys = chunk_keys(k, ids, valid, config)
        for row in range(len(k)):
            expected_ids, expected_keys = keys_of_chunks(k[row], starts[row], valid[row], config)
            assert torch.equal(ids[row], expected_ids)
            torch.testing.assert_close(keys[row], expected_keys)


@pytest.mark.parametrize("kind", ["dhsa", "block"])
def test_of_equal_blocks_the_earlier_is_read(kind):
    """Whole numbers, chunks of four and blocks of sixteen: every sum is exact, so that ties are ties."""
    config = replace(BASE, kind=kind)
    q, k, _, valid, _ = text(16 * 20, 0, integers=True, lengths=[16 * 20])
    starts = (torch.arange(16 * 20) % 4 == 0).unsqueeze(0)
    k = k[:, :, :64].repeat(1, 1, 5, 1)  # the same four blocks five times
    index, keys, ids = selected(q, k, valid, starts, config)
    assert lists(index[0]) == plain_selection(q[0], valid[0], config, 0, keys[0], ids[0])
    last = lists(index[0])[0][-1]
    assert last[:3] == [19, 0, 18]  # own, first, local
    assert last[3] < 4  # of the best block's copies the first
    assert last[4] == last[3] + 4  # and the second


def test_nothing_behind_a_query_block_decides_what_it_reads():
    q, k, _, valid, starts = text(160, 64, lengths=[160, 160])
    early, *_ = selected(q, k, valid, starts, BASE)
    cut = 64 + 5 * SIZE
    q[:, :, 5 * SIZE :] = 100 * torch.randn_like(q[:, :, 5 * SIZE :])
    k[:, :, cut:] = 100 * torch.randn_like(k[:, :, cut:])
    late, *_ = selected(q, k, valid, starts, BASE)
    assert torch.equal(early[:, :, :5], late[:, :, :5])
    assert not torch.equal(early[:, :, 5:], late[:, :, 5:])


def test_padding_decides_nothing():
    q, k, _, valid, starts = text(150, 64, lengths=[150, 70])
    index, *_ = selected(q, k, valid, starts, BASE)
    rows = -(-70 // SIZE)
    alone, *_ = selected(q[1:, :, :70], k[1:, :, : 64 + 70], valid[1:, : 64 + 70], starts[1:, : 64 + 70], BASE)
    assert lists(index[1, :, :rows]) == lists(alone[0])
    assert int(index[1, :, rows:].max()) < -(-(64 + 70) // SIZE)


@pytest.mark.parametrize("kind", ["dhsa", "block", "window"])
def test_passes_of_whole_blocks_select_what_one_pass_selects(kind):
    config = replace(BASE, kind=kind)
    q, k, _, valid, starts = text(200, 0, lengths=[200, 200])
    whole, *_ = selected(q, k, valid, starts, config)
    later, *_ = selected(q[:, :, 96:], k, valid, starts, config)
    assert lists(whole[0, :, 6:]) == lists(later[0])


def dense_attention(q, k, v, valid, window, *, scale=0.3, softcap=20.0):
    """Attention with its matrix of scores: `[B, Hq, N, D]`."""
    k, v = (tensor.repeat_interleave(QUERY_HEADS // KEY_HEADS, dim=1) for tensor in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    slots, queries = k.shape[2], q.shape[2]
    at, key = torch.arange(slots - queries, slots).unsqueeze(1), torch.arange(slots)
    seen = (key <= at) & valid[:, None, None] & ((key > at - window) if window else True)
    return torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=3) @ v


@pytest.mark.parametrize("window", [0, 40], ids=["global", "sliding"])
@pytest.mark.parametrize("kind", ["dhsa", "block", "window", "dense"])
def test_a_budget_for_all_is_dense_attention(kind, window):
    config = replace(BASE, kind=kind, budget=1024)
    for tokens, past in PASSES:
        q, k, v, valid, starts = text(tokens, past)
        index, *_ = selected(q, k, valid, starts, config, window)
        got = torch.ops.edgekit.block_sparse_attention(q, k, v, index, SIZE, SIZE, True, 0.3, 20.0, window)
        expected = dense_attention(q, k, v, valid, window)
        new = valid[:, None, past:, None]
        torch.testing.assert_close(got * new, torch.where(new, expected, 0), rtol=1e-4, atol=1e-5)


def test_dense_last_queries_attend_densely():
    config = replace(BASE, dense_last=3)
    q, k, v, valid, starts = text(200, 0, lengths=[200, 90])
    index, *_ = selected(q, k, valid, starts, config)
    got = torch.ops.edgekit.block_sparse_attention(q, k, v, index, SIZE, SIZE, True, 0.3, 20.0, 0)
    expected = dense_attention(q, k, v, valid, 0)
    torch.testing.assert_close(got[0, :, 197:], expected[0, :, 197:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1, :, 87:90], expected[1, :, 87:90], rtol=1e-4, atol=1e-5)
    assert float((got[0, :, 160:176] - expected[0, :, 160:176]).abs().max()) > 0.01


def decode_case(past, gaps, seed=0):
    """A cache of `past` slots, of which each row lacks the ranges in `gaps`, and one new token; q `[B, Hq, 1, D]`."""
    q, k, v, _, starts = text(1, past, seed, lengths=[1] * len(gaps))
    valid = torch.ones(len(gaps), past + 1, dtype=torch.bool)
    for row, ranges in enumerate(gaps):
        for begin, end in ranges:
            valid[row, begin:end] = False
    return q, k, v, valid, starts


def plain_decode(q, k, v, valid, config, window, table, ids):
    """One row: q `[Hq, D]`, k and v `[Hkv, T, D]`. Padding is taken out first: blocks are those of the row alone."""
    k, v, ids = k[:, valid], v[:, valid], None if ids is None else ids[valid]
    slots = k.shape[1]
    seen = [not window or t > slots - 1 - window for t in range(slots)]
    local = {t for t in range(slots) if seen[t] and t >= slots - 1 - config.local}
    means, out = means_over_heads(q, config), torch.zeros_like(q)
    for head in range(QUERY_HEADS):
        key_head = head // (QUERY_HEADS // KEY_HEADS)
        chooser = key_head if config.heads == "kv" else 0
        scores = torch.arange(slots) // config.block_size
        if config.has_chunks:
            scores = [means[chooser] @ table[chooser, ids[slot]] for slot in range(slots)]
        blocks = ranked_blocks(scores, seen, {slots - 1}, local, config.block_size)[: config.blocks]
        read = [t for t in range(slots) if seen[t] and t // config.block_size in blocks]
        logits = 20 * torch.tanh(k[key_head, read] @ q[head] * 0.3 / 20)
        out[head] = torch.softmax(logits, 0) @ v[key_head, read]
    return out


DECODE_GAPS = {
    "no-padding": [[], []],
    "padding": [[], [(20, 31)], [(1, 3), (16, 60), (70, 71)]],
}


@pytest.mark.parametrize("window", [0, 10, 50, 1000], ids=lambda window: f"window{window}")
@pytest.mark.parametrize("gaps", DECODE_GAPS)
@pytest.mark.parametrize("name", ["dhsa", "dhsa-shared-heads", "dhsa-least-budget", "block", "window"])
def test_decode_reads_the_plain_selection(name, gaps, window):
    config = CONFIGS[name]
    for past in (0, 1, 15, 16, 31, 100, 203):
        q, k, v, valid, starts = decode_case(past, DECODE_GAPS[gaps], seed=past)
        keys, ids = None, None
        if config.has_chunks:
            cuts = [past - past // 4, past] if past else []
            keys, ids = (
                table_of(k[:, :, :past], starts, valid, config, cuts)
                if past
                else (k[:, : config.mask_heads(KEY_HEADS), :0], torch.zeros(len(q), 0, dtype=torch.int64))
            )
            ids = torch.cat([ids, torch.full((len(q), 1), keys.shape[2])], dim=1)
            keys = torch.cat([keys, token_chunk(k[:, :, past:], config)], dim=2)
        got = sparse_decode_attention(
            q, k, v, valid, config, scale=0.3, softcap=20.0, window=window, keys=keys, ids=ids
        )
        for row in range(len(q)):
            table, chunk = (None, None) if keys is None else (keys[row], ids[row])
            expected = plain_decode(q[row, :, 0], k[row], v[row], valid[row], config, window, table, chunk)
            torch.testing.assert_close(got[row, :, 0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [0, 40], ids=["global", "sliding"])
@pytest.mark.parametrize("kind", ["dhsa", "block", "window", "dense"])
def test_decode_with_a_budget_for_all_is_dense(kind, window):
    config = replace(BASE, kind=kind, budget=1024)
    q, k, v, valid, starts = decode_case(100, [[], [(30, 47)]])
    keys, ids = table_of(k, starts, valid, config, [100, 101]) if config.has_chunks else (None, None)
    for scale, softcap in ((0.3, 0.0), (0.3, 20.0)):
        arguments = {"scale": scale, "softcap": softcap, "window": window}
        dense = dense_decode_attention(q, k, v, valid, **arguments)
        got = sparse_decode_attention(q, k, v, valid, config, **arguments, keys=keys, ids=ids)
        torch.testing.assert_close(got, dense, rtol=1e-5, atol=1e-6)
        expected = dense_attention(q[:1], k[:1], v[:1], valid[:1], window, scale=scale, softcap=softcap)
        torch.testing.assert_close(dense[:1], expected, rtol=1e-5, atol=1e-6)


def test_windows_of_a_decode_step_count_positions():
    """The same text with and without padding in its cache."""
    q, k, v, valid, _ = decode_case(80, [[(30, 47)]])
    kept = valid[0]
    window = 60
    padded = dense_decode_attention(q, k, v, valid, scale=0.3, window=window)
    alone = dense_decode_attention(q, k[:, :, kept], v[:, :, kept], valid[:, kept], scale=0.3, window=window)
    torch.testing.assert_close(padded, alone)


def test_a_row_without_tokens_is_not_nan():
    q, k, v, valid, _ = decode_case(20, [[], [(0, 21)]])
    for kind in ("dense", "window"):
        out = sparse_decode_attention(q, k, v, valid, replace(BASE, kind=kind), scale=0.3)
        assert bool(out.isfinite().all())


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 18, 33, 100])
def test_window_blocks_is_what_a_block_of_queries_may_see(window):
    spans = [
        (first + SIZE - 1) // SIZE - (first - window + 1) // SIZE + 1  # blocks from the lowest key to the last query
        for first in range(100, 100 + SIZE)
    ]
    assert window_blocks(window, SIZE) == max(spans)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "sparse"}, "kind of dense, window, block, dhsa; got 'sparse'"),
        ({"decode": "none"}, "decode of sparse, dense; got 'none'"),
        ({"heads": "query"}, "heads of kv, shared; got 'query'"),
        ({"budget": 3 * SIZE - 1}, "budget below 48: .* got a budget of 47"),
        ({"block_size": 0}, "block_size of at least 1, got 0"),
        ({"local": -1}, "local of at least 0, got -1"),
        ({"chunks_per_block": 17}, "a block of 16 tokens cannot have 17 chunks"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_are_checked(changes, message):
    with pytest.raises(InputError, match=message):
        replace(BASE, **changes)


def test_chunks_are_asked_for():
    q, _, _, valid, _ = text(20, 0)
    with pytest.raises(InputError, match="kind 'dhsa' needs chunk keys and chunk ids"):
        select_blocks(q, valid, BASE)
