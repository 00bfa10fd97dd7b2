"""Steps of several sequences: the logits are those of each sequence by itself, whatever it shares steps with."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from export.exporter import GENERATING_GRAPH, SERVING_GRAPH
from trt_build.errors import SequenceError
from trt_build.ort.engine import open_engine
from trt_build.ort.old_formats.manifest import OldFormat
from trt_build.ort.routing import Routing, in_checkpoint_order
from trt_build.ort.session import ScoringSession, Session
from trt_build.ort.step_call import Row

SLOTS = 6
VOCABULARY = 352


@pytest.fixture(scope="module", params=["fp32", "int4", "int8"])
def session(request, tiny_engines) -> Session:
    return Session(open_engine(tiny_engines(request.param)))


def of_generating_graph(engine: Path) -> Session:
    """A session that runs one sequence at a time on the graph for onnxruntime-genai, as engines of format 4 do."""
    opened = open_engine(engine)
    old = OldFormat(values={}, kernel_layout=None, resident_bytes=None)
    return Session(dataclasses.replace(opened, old=old))


def random_steps(seed: int, positions: int, count: int):
    """Rows of random steps, and what each slot holds after each: chunks of prompts, single tokens, empty slots, and
    sequences that end and make room for others."""
    rng = np.random.default_rng(seed)
    held: list[list[int]] = [[] for _ in range(SLOTS)]
    for _ in range(count):
        rows, emptied = [], []
        for slot in rng.permutation(SLOTS):
            if rng.random() < 0.4:
                continue
            room = positions - len(held[slot])
            if not room or rng.random() < 0.03:
                held[slot] = []
                emptied.append(slot)
                room = positions
            size = min(room, int(rng.choice([1, 1, 1, 2, 7, 30])))
            tokens = rng.integers(0, VOCABULARY, size).tolist()
            held[slot] += tokens
            rows.append(Row(slot=int(slot), token_ids=tokens, num_logits=int(rng.integers(0, min(size, 3) + 1))))
        if rows:
            yield emptied, rows, [list(tokens) for tokens in held]


def test_random_steps_give_each_sequence_its_own_logits(session):
    """The reference is the scoring graph: a whole sequence at once, without a cache."""
    scoring, cache = ScoringSession(session.engine), session.new_cache(SLOTS)
    bar = 1e-5 if session.engine.manifest.precision.name == "fp32" else 2e-2
    largest, checked, count = 0.0, 0, 400 if bar == 1e-5 else 150
    for number, (emptied, rows, held) in enumerate(random_steps(7, session.max_sequence, count)):
        for slot in emptied:
            (cache.release if number % 2 else lambda slot: cache.shorten(slot, 0))(slot)
        logits = session.step(cache, rows)
        assert cache.lengths == [len(tokens) for tokens in held]
        if number % 10:
            continue
        place = 0
        for row in rows:
            found = logits[place : place + row.num_logits]
            place += row.num_logits
            if row.num_logits:
                expected = scoring.run(held[row.slot])[0][-row.num_logits :]
                largest = max(largest, np.abs(found - expected).max() / np.abs(expected).max())
                checked += 1
        assert place == len(logits)
    assert checked > count / 10
    assert largest <= bar, largest


def test_a_row_does_not_depend_on_what_else_is_in_the_step(session):
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, VOCABULARY, size).tolist() for size in (9, 1, 40, 17)]
    alone = []
    for prompt in prompts:
        cache = session.new_cache()
        alone.append(session.step(cache, [Row(slot=0, token_ids=prompt)])[0].copy())
    together = session.step(session.new_cache(6), [Row(slot=5 - n, token_ids=p) for n, p in enumerate(prompts)])
    bar = 1e-5 if session.engine.manifest.precision.name == "fp32" else 2e-2
    for found, expected in zip(together, alone, strict=True):
        assert np.abs(found - expected).max() <= bar * np.abs(expected).max()


def test_earlier_formats_give_the_same_logits_row_by_row(tiny_engines):
    engine = tiny_engines("fp32")
    old, new = of_generating_graph(engine), Session(open_engine(engine))
    caches = [old.new_cache(3), new.new_cache(3)]
    for rows in ([Row(slot=2, token_ids=[5, 6, 7]), Row(slot=0, token_ids=[9] * 140, num_logits=0)],
                 [Row(slot=0, token_ids=[1]), Row(slot=1, token_ids=[3, 3]), Row(slot=2, token_ids=[8])]):  # fmt: skip
        found, expected = old.step(caches[0], rows), new.step(caches[1], rows)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(SequenceError, match="2 positions whose logits are wanted, expected at most 1"):
        old.step(caches[0], [Row(slot=0, token_ids=[1, 2], num_logits=2)])


def test_a_provider_that_cannot_mix_lengths_computes_rows_in_groups(tiny_engines, tmp_path):
    """The graph of such a provider: without `query_seqlens`, on the CPU's kernels."""
    engine = tmp_path / "uniform"
    shutil.copytree(tiny_engines("fp32"), engine)
    model = onnx.load(engine / SERVING_GRAPH, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            del node.input[9:]
    del model.graph.input[[value.name for value in model.graph.input].index("new_lengths")]
    onnx.save(model, engine / SERVING_GRAPH)
    opened = open_engine(tiny_engines("fp32"))
    uniform = Session(dataclasses.replace(opened, folder=engine))
    uniform.mixes_lengths = False
    calls = []
    run = uniform._run_together
    uniform._run_together = lambda cache, rows, *out: (calls.append([row.slot for row in rows]), run(cache, rows, *out))
    mixing = Session(opened)
    caches = uniform.new_cache(SLOTS), mixing.new_cache(SLOTS)
    steps = [[Row(slot=slot, token_ids=[slot + 1] * 3) for slot in range(SLOTS)]]
    steps += [[Row(slot=slot, token_ids=[slot]) for slot in slots] for slots in ([0, 1, 2, 4], [5, 3], [1, 2, 3])]
    steps += [[Row(slot=0, token_ids=[1]), Row(slot=1, token_ids=[2, 3]), Row(slot=2, token_ids=[4])]]
    for rows in steps:
        routed = [room_for_routers(session, rows) for session in (uniform, mixing)]
        found = uniform.step(caches[0], rows, routed[0])
        np.testing.assert_allclose(found, mixing.step(caches[1], rows, routed[1]), atol=2e-5)
        np.testing.assert_allclose(*routed, atol=2e-5)
    assert calls[SLOTS:] == [[0, 1, 2], [4], [5], [3], [1, 2, 3], [0], [1], [2]]
    assert caches[0].lengths == caches[1].lengths


def room_for_routers(session, rows):
    num_tokens = sum(len(row.token_ids) for row in rows)
    room = session.routing.room(num_tokens)
    room[:] = np.nan
    return room


def test_a_step_gives_the_router_logits_of_its_tokens_and_changes_nothing_else(tiny_engines):
    """The reference is the scoring graph, which tests of `comparison` hold to transformers."""
    session = Session(open_engine(tiny_engines("fp32")))
    scoring, order = ScoringSession(session.engine), session.engine.manifest.expert_order
    sampled, plain = session.new_cache(SLOTS), session.new_cache(SLOTS)
    for number, (_, rows, held) in enumerate(random_steps(11, session.max_sequence, 40)):
        routed = room_for_routers(session, rows) if number % 3 == 0 else None
        for cache in (sampled, plain):
            for slot in range(SLOTS):
                new = sum(len(row.token_ids) for row in rows if row.slot == slot)
                cache.shorten(slot, len(held[slot]) - new)
        logits = session.step(sampled, rows, routed).copy()
        np.testing.assert_array_equal(logits, session.step(plain, rows))
        if routed is None:
            continue
        found = np.split(in_checkpoint_order(routed, order), np.cumsum([len(row.token_ids) for row in rows])[:-1], 1)
        for row, own in zip(rows, found, strict=True):
            expected = scoring.run(held[row.slot])[1][:, -len(row.token_ids) :]
            np.testing.assert_allclose(own, expected, atol=1e-4)
    assert session.routing.layers == (0, 1, 2)


def test_room_for_router_logits_of_another_shape_is_refused(session, tiny_engines):
    rows = [Row(slot=0, token_ids=[1, 2])]
    for room in (np.empty((3, 3, 5), np.float32), np.empty((3, 2, 4), np.float32), np.empty((2, 2, 5), np.float32)):
        with pytest.raises(SequenceError, match=r"expected \[3, 2, 5\]"):
            session.step(session.new_cache(2), rows, room)
    old = of_generating_graph(tiny_engines("fp32"))
    assert old.routing is None
    with pytest.raises(SequenceError, match="no graph of this engine gives them"):
        old.step(old.new_cache(2), rows, np.empty((3, 2, 5), np.float32))


def test_chosen_experts_are_counted_in_the_checkpoints_order_and_the_lowest_of_equals_is_chosen():
    """Two routers, three tokens, four experts that the engine has in reverse."""
    by_expert = [
        [[0, 1, 2, 3], [5, 5, 5, 5], [1, 9, 1, 8]],  # choose 3 and 2, 0 and 1, 1 and 3
        [[4, 4, 7, 4], [-1, -2, -3, -4], [0, 2, 2, 2]],  # choose 2 and 0, 0 and 1, 1 and 2
    ]
    routing = Routing(layers=(0, 1), expert_order=(3, 2, 1, 0), experts_per_token=2)
    counts = routing.count_chosen(np.array(by_expert, np.float32)[..., ::-1])
    assert counts.tolist() == [[1, 2, 1, 2], [2, 2, 2, 0]]


def test_slots_without_a_row_keep_their_keys_and_values(session):
    cache = session.new_cache(3)
    session.step(cache, [Row(slot=slot, token_ids=[1 + slot, 2, 3]) for slot in range(3)])
    kept = [array[1].copy() for array in cache._arrays]
    session.step(cache, [Row(slot=0, token_ids=[4]), Row(slot=2, token_ids=[5] * 20)])
    for array, before in zip(cache._arrays, kept, strict=True):
        np.testing.assert_array_equal(array[1], before)
    assert cache.lengths == [4, 3, 23]


def test_a_copied_slot_continues_as_its_source(session):
    cache = session.new_cache(4)
    session.step(cache, [Row(slot=1, token_ids=[7, 8, 9, 10, 11])])
    cache.copy(1, 3)
    logits = session.step(cache, [Row(slot=1, token_ids=[12]), Row(slot=3, token_ids=[12])])
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-6)


def test_a_slot_goes_on_from_a_part_of_another_one_that_is_copied_piece_by_piece(session):
    """The source goes on meanwhile, and what follows the part in it is of no matter."""
    cache, begin = session.new_cache(4), list(range(40, 80))
    expected = session.step(cache, [Row(slot=0, token_ids=[*begin, 9, 8])])[0].copy()
    session.step(cache, [Row(slot=1, token_ids=[*begin, 3, 3, 3])])
    for length in (7, 7, 25, 40):
        cache.copy(1, 3, length)
        session.step(cache, [Row(slot=1, token_ids=[5])])
    found = session.step(cache, [Row(slot=3, token_ids=[9, 8])])[0]
    assert cache.lengths == [42, 47, 0, 42]
    bar = 1e-5 if session.engine.manifest.precision.name == "fp32" else 2e-2
    assert np.abs(found - expected).max() <= bar * np.abs(expected).max()
    for length in (41, 48):  # fewer than the slot holds, and more than the source
        with pytest.raises(SequenceError, match=f"copying {length} positions of slot 1 of the cache"):
            cache.copy(1, 3, length)


def test_a_shortened_slot_forgets_what_followed(session):
    cache = session.new_cache(1)
    expected = session.step(cache, [Row(slot=0, token_ids=[7, 8, 9])])[0].copy()
    session.step(cache, [Row(slot=0, token_ids=[50, 51, 52])])
    cache.shorten(0, 2)
    found = session.step(cache, [Row(slot=0, token_ids=[9])])[0]
    np.testing.assert_allclose(found, expected, atol=2e-2 * np.abs(expected).max())
    with pytest.raises(SequenceError, match="found 3 positions, expected at least 4"):
        cache.shorten(0, 4)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "0 rows, expected at least one"),
        ([Row(slot=1, token_ids=[1]), Row(slot=1, token_ids=[2])], "each of another slot"),
        ([Row(slot=0, token_ids=[1]), Row(slot=1, token_ids=[])], "no tokens"),
        ([Row(slot=0, token_ids=[1]), Row(slot=1, token_ids=[VOCABULARY])], "token id 352 is outside"),
        ([Row(slot=0, token_ids=[1]), Row(slot=1, token_ids=[-1])], "token id -1 is outside"),
        ([Row(slot=0, token_ids=[1]), Row(slot=1, token_ids=[1] * 1000)], "exceed its context"),
        ([Row(slot=0, token_ids=[1], num_logits=2)], "expected 0 to 1"),
        ([Row(slot=2, token_ids=[1])], "slot 2"),
        ([Row(slot=-1, token_ids=[1])], "slot -1"),
    ],
)
def test_a_step_that_cannot_be_changes_nothing(session, rows, message):
    cache = session.new_cache(2)
    session.step(cache, [Row(slot=0, token_ids=[5, 6])])
    with pytest.raises(SequenceError, match=message):
        session.step(cache, rows)
    assert cache.lengths == [2, 0]


def test_a_sequence_at_the_end_of_its_context_shares_a_step_with_the_longest_part_of_a_prompt(session):
    """Of two slots as of more: attention wants room behind the sequence for the padding of its row."""
    long, prompt = [3] * session.max_sequence, list(range(5, 133))
    alone = [session.step(session.new_cache(), [Row(slot=0, token_ids=ids)])[0].copy() for ids in (long, prompt)]
    cache = session.new_cache(2)
    session.step(cache, [Row(slot=0, token_ids=long[:-1])])
    found = session.step(cache, [Row(slot=0, token_ids=long[-1:]), Row(slot=1, token_ids=prompt)])
    assert cache.lengths == [len(long), len(prompt)]
    bar = 1e-5 if session.engine.manifest.precision.name == "fp32" else 2e-2
    for logits, expected in zip(found, alone, strict=True):
        assert np.abs(logits - expected).max() <= bar * np.abs(expected).max()


def test_a_slot_takes_memory_as_it_grows_and_gives_it_back(tiny_engines):
    """Resident memory of the cache's mapping, as the system counts it."""
    session = Session(open_engine(tiny_engines("fp32")))
    cache = session.new_cache(64)
    before = resident(cache)
    session.step(cache, [Row(slot=20, token_ids=[1] * session.max_sequence)])
    full = resident(cache)
    session.step(cache, [Row(slot=30, token_ids=[1] * 4)])
    short = resident(cache) - full
    cache.release(20)
    assert before == 0
    assert full >= 0.8 * cache._slot_bytes * len(cache._arrays)
    assert short < full / 2
    assert resident(cache) <= short + 2 * len(cache._arrays) * 4096


def test_a_slot_keeps_a_beginning_and_gives_the_memory_behind_it_back(tiny_engines):
    session = Session(open_engine(tiny_engines("fp32")))
    cache = session.new_cache(8)
    tokens = [1 + number % 300 for number in range(session.max_sequence)]
    session.step(cache, [Row(slot=5, token_ids=tokens)])
    length = len(tokens) // 4
    kept = [array[5, :, :length].copy() for array in cache._arrays]
    full = resident(cache)
    cache.release(5, length)
    assert cache.lengths[5] == length
    assert resident(cache) <= cache.bytes_of(length) < full / 2
    for array, before in zip(cache._arrays, kept, strict=True):
        np.testing.assert_array_equal(array[5, :, :length], before)
    with pytest.raises(SequenceError, match="expected at least"):
        cache.release(5, length + 1)


def resident(cache) -> int:
    """Bytes of the cache's mapping that are in memory (proc_pid_smaps(5))."""
    start = f"{cache._arrays[0].ctypes.data:x}-"
    lines = Path("/proc/self/smaps").read_text().splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith(start))
    return 1024 * int(next(line for line in lines[place:] if line.startswith("Rss:")).split()[1])


def test_genai_keeps_its_graph(tiny_engine):
    names = [value.name for value in onnx.load(tiny_engine / GENERATING_GRAPH, load_external_data=False).graph.input]
    assert names[:2] == ["input_ids", "attention_mask"]
