"""Feeding: resident and streamed batches are the same, from any step on."""

import functools
import itertools
import threading
import time

import jax
import numpy as np
import pytest

from mmrjax.data import epochs, feed
from mmrjax.data import records as records_lib
from mmrjax.runtime import devices as device_lib
from mmrjax.runtime import mesh as mesh_lib

TWO_DEVICES = 2
BATCH = 2  # 7 examples: four steps per epoch, the last one half empty
PATIENCE = 20.0  # seconds until what should have happened is taken to be missing


@pytest.fixture(scope="module")
def make(records, train_rows):
    """Builds a feed of the seven training images on two devices."""

    def build(mode, rows=train_rows, device_mesh=None, **changes) -> feed.Feed:
        options = {"resident_gib": 1.0, "max_side": 0, "plan": epochs.Plan(BATCH), "seed": 54}
        options |= {"steps_per_call": 1, **changes}
        device_mesh = device_mesh or mesh_lib.make_mesh(TWO_DEVICES)
        return feed.Feed(records.take(rows), mode=mode, device_mesh=device_mesh, **options)

    return build


@pytest.fixture(scope="module")
def resident(make):
    return make("resident")


@pytest.fixture(scope="module")
def stream(make):
    return make("stream")


def batches(source: feed.Feed, start: int, stop: int) -> list[dict]:
    """Steps [start, stop), one dict of NumPy arrays each, with the images that the step sees."""
    found = []
    for chunk in source.chunks(start, stop):
        chunk = jax.device_get(chunk)
        if source.resident:
            images = jax.device_get(source.resident)
            chunk |= {name: array[chunk["index"]] for name, array in images.items()}
        for row in range(len(chunk["index"])):
            found.append({name: array[row] for name, array in chunk.items()})
    return found


def test_a_plan_adds_domains_and_the_foreground_to_both_kinds_of_feed(make):
    domain = np.arange(7, dtype=np.int32) % 2
    plan = epochs.Plan(BATCH, domain=domain, foreground=True)
    found = [batches(make(mode, plan=plan), 0, 4) for mode in ("resident", "stream")]
    for one, other in zip(*found, strict=True):
        assert one.keys() == other.keys() == {"index", "weight", "image", "size", "domain"}
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
        assert one["image"].shape[-1] == 4
        assert set(np.unique(one["image"][..., 3])) <= {0, 255}
        assert (one["image"][..., 3] == 255).any()
        np.testing.assert_array_equal(one["domain"], domain[one["index"]])
        assert sorted(one["domain"]) == [0, 1]


def assert_same(first: list[dict], second: list[dict]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys() == {"index", "weight", "image", "size"}
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_an_epoch_shows_every_training_image_once_at_its_native_size(built, resident):
    records, pixels, _ = built
    train = {name: array for name, array in pixels.items() if name.startswith("train")}
    seen = []
    for batch in batches(resident, 0, resident.steps_per_epoch):
        for image, (h, w), weight in zip(
            batch["image"], batch["size"], batch["weight"], strict=True
        ):
            if weight:
                seen += [n for n, a in train.items() if np.array_equal(image[:h, :w], a)]
            assert not image[h:].any()  # the canvas around it is black
            assert not image[:, w:].any()
    assert sorted(seen) == sorted(train)
    assert records.table["split"].tolist().count("train") == len(train)


def test_canvas_holds_the_tallest_and_the_widest_image(resident, stream):
    assert resident.canvas == stream.canvas == (64, 64)  # of 64 and 55 px, from different images
    assert resident.resident["image"].shape == (7, 64, 64, 3)
    assert resident.resident["image"].dtype == np.uint8
    assert stream.resident == {}


@pytest.mark.parametrize(("start", "stop"), [(0, 8), (1, 4), (3, 5), (4, 6), (7, 8), (5, 5)])
def test_resident_and_stream_are_the_same_from_any_step(resident, stream, start, stop):
    expected = batches(resident, start, stop)
    assert len(expected) == stop - start
    assert_same(batches(stream, start, stop), expected)


@pytest.mark.parametrize("mode", ["resident", "stream"])
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(make, request, mode):
    source = request.getfixturevalue(mode)
    whole = batches(source, 0, 12)
    for start in (1, 4, 6):
        assert_same(batches(source, start, 12), whole[start:])


@pytest.mark.parametrize("mode", ["resident", "stream"])
def test_several_steps_per_call_give_the_same_rows(make, request, mode):
    single = batches(request.getfixturevalue(mode), 0, 8)
    for steps_per_call in (2, 4):
        source = make(mode, steps_per_call=steps_per_call)
        chunks = list(source.chunks(0, 8))
        assert [c["index"].shape for c in chunks] == [(steps_per_call, BATCH)] * (
            8 // steps_per_call
        )
        assert_same(batches(source, 0, 8), single)
        assert_same(batches(source, 4, 8), single[4:])


def lengths(source: feed.Feed, start: int, stop: int) -> list[int]:
    return [len(chunk["index"]) for chunk in source.chunks(start, stop)]


@pytest.mark.parametrize("mode", ["resident", "stream"])
@pytest.mark.parametrize(("start", "first"), [(3, 1), (6, 2), (8, 4), (1, 3)])
def test_only_the_first_chunk_shrinks_where_a_run_resumes_inside_one(
    make, resident, mode, start, first
):
    """A run may be saved at any step, by a machine with other chunks."""
    source = make(mode, steps_per_call=4)
    found = lengths(source, start, 12)
    assert found == [first] + [4] * (len(found) - 1)
    assert_same(batches(source, start, 12), batches(resident, start, 12))


@pytest.mark.parametrize("mode", ["resident", "stream"])
def test_an_epoch_of_a_prime_number_of_steps_has_chunks_of_two_lengths(make, train_rows, mode):
    made = functools.partial(
        make, mode, rows=train_rows[:5], plan=epochs.Plan(1), device_mesh=mesh_lib.make_mesh(1)
    )
    whole, source = batches(made(), 0, 10), made(steps_per_call=3)
    assert lengths(source, 0, 10) == [3, 2, 3, 2]
    assert lengths(source, 3, 9) == [2, 3, 1]
    assert_same(batches(source, 0, 10), whole)


def test_streamed_chunks_stay_within_their_byte_budget(make, monkeypatch):
    bytes_per_step = BATCH * 64 * 55 * 3
    for budget, expected in ((3 * bytes_per_step, [2, 2]), (bytes_per_step // 2, [1] * 4)):
        monkeypatch.setattr(feed, "STREAM_CHUNK_BYTES", budget)
        assert lengths(make("stream", steps_per_call=4), 0, 4) == expected
        assert lengths(make("resident", steps_per_call=4), 0, 4) == [4]


def test_rows_follow_the_epoch_table(resident):
    got = batches(resident, 0, 3 * resident.steps_per_epoch)
    for step, batch in enumerate(got):
        epoch, row = divmod(step, resident.steps_per_epoch)
        index, weight = epochs.Plan(BATCH).table(7, 54, epoch)
        np.testing.assert_array_equal(batch["index"], index[row])
        np.testing.assert_array_equal(batch["weight"], weight[row])


def test_another_seed_gives_another_order(make, resident):
    other = make("resident", seed=55)
    rows = [[b["index"].tolist() for b in batches(f, 0, 4)] for f in (resident, other)]
    assert rows[0] != rows[1]


def test_chunks_are_long_and_have_one_length_or_two_that_differ_by_one():
    for steps, most in itertools.product(range(1, 300), (1, 3, 5, 64, 100)):
        found = np.diff([0, *feed._cuts(steps, most)])
        assert found.sum() == steps
        assert found.max() <= most
        assert found.max() - found.min() <= 1
        assert len(found) < 2 * -(-steps // most)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(33, [33]), (66, [33, 33]), (67, [34, 33]), (130, [26] * 5), (134, [45, 45, 44])],
)
def test_chunks_of_some_epochs(steps, expected):
    assert sorted(np.diff([0, *feed._cuts(steps, 64)]), reverse=True) == expected


def test_batches_are_split_over_the_devices_and_images_are_on_each(resident, stream):
    chunk = next(iter(stream.chunks(0, 1)))
    for name, array in chunk.items():
        shapes = [shard.data.shape for shard in array.addressable_shards]
        assert shapes == [(1, BATCH // TWO_DEVICES, *array.shape[2:])] * TWO_DEVICES, name
    assert resident.resident["image"].sharding.is_fully_replicated
    assert len(resident.resident["image"].sharding.device_set) == TWO_DEVICES


def test_rows_of_other_processes_are_not_decoded(make, stream, monkeypatch):
    expected = batches(stream, 0, 4)
    monkeypatch.setattr(mesh_lib, "own_rows", lambda n, mesh: np.arange(n) % 2 == 0)
    found = batches(stream, 0, 4)
    for batch, whole in zip(found, expected, strict=True):
        for name in ("index", "weight"):
            np.testing.assert_array_equal(batch[name], whole[name])
        for name in ("image", "size"):
            np.testing.assert_array_equal(batch[name][::2], whole[name][::2])
            assert not batch[name][1::2].any()


def test_auto_is_resident_up_to_the_byte_budget(make):
    """Of a CPU's devices, which share its memory, all copies count."""
    gib = 7 * 64 * 64 * 3 / 2**30
    for devices in (1, 2):
        made = functools.partial(make, "auto", device_mesh=mesh_lib.make_mesh(devices))
        assert made(resident_gib=devices * gib * 1.01).resident
        assert not made(resident_gib=devices * gib * 0.99).resident


@pytest.mark.parametrize("mode", ["resident", "stream"])
def test_fewer_images_than_a_batch_are_padded_with_weight_zero(make, train_rows, mode):
    source = make(mode, rows=train_rows[2:3], plan=epochs.Plan(4))
    assert source.steps_per_epoch == 1
    assert source.canvas == (64, 64)
    (batch,) = batches(source, 0, 1)
    assert batch["weight"].tolist() == [1, 0, 0, 0]
    assert batch["size"].tolist() == [[33, 47]] * 4
    assert (batch["image"] == batch["image"][:1]).all()


@pytest.mark.parametrize("mode", ["resident", "stream"])
def test_max_side_shrinks_images_and_canvas(make, records, train_rows, mode):
    source = make(mode, max_side=32)
    assert max(source.canvas) == 32
    for batch in batches(source, 0, 4):
        for image, (h, w), position in zip(
            batch["image"], batch["size"], batch["index"], strict=True
        ):
            expected = records.image(train_rows[position], 32)
            assert (h, w) == expected.shape[:2]
            np.testing.assert_array_equal(image[:h, :w], expected)


def test_rows_do_not_depend_on_the_number_of_devices(make, resident):
    one = make("resident", device_mesh=mesh_lib.make_mesh(1))
    for a, b in itertools.zip_longest(one.chunks(0, 4), resident.chunks(0, 4)):
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_the_next_chunk_is_decoded_while_the_consumer_has_one(stream, monkeypatch):
    """The first chunk is handed over while the next two are held up, and they need no `next`."""
    first, *later = (set(row) for row in stream._table(0)["index"][:3])
    computing, everything = threading.Event(), threading.Event()
    waited, decoded, image = [], set(), records_lib.Records.image

    def decode(self, i, max_side):
        if i not in first:
            waited.append(computing.wait(PATIENCE))
        array = image(self, i, max_side)
        decoded.add(i)
        if decoded >= set.union(*later):
            everything.set()
        return array

    monkeypatch.setattr(records_lib.Records, "image", decode)
    chunks = stream.chunks(0, 4)
    next(chunks)
    computing.set()
    assert everything.wait(PATIENCE)
    assert all(waited)


@pytest.mark.parametrize("mode", ["resident", "stream"])
def test_the_images_of_a_chunk_are_decoded_at_once(make, train_rows, monkeypatch, mode):
    """Each of two waits for the other; there is one chunk, so no other chunk's image helps."""
    monkeypatch.setattr(device_lib, "cores", lambda: BATCH)
    barrier, image = threading.Barrier(BATCH, timeout=PATIENCE), records_lib.Records.image

    def decode(self, i, max_side):
        barrier.wait()
        return image(self, i, max_side)

    rows = train_rows[:4]
    expected = batches(make("resident", rows=rows), 0, 1)
    monkeypatch.setattr(records_lib.Records, "image", decode)
    assert_same(batches(make(mode, rows=rows), 0, 1), expected)


@pytest.mark.parametrize("mode", ["resident", "stream"])
def test_a_damaged_image_is_named(make, monkeypatch, mode):
    """In the words of the records, though a thread decoded it."""
    monkeypatch.setattr(records_lib.Records, "encoded", lambda self, i, field: b"no picture")
    monkeypatch.setattr(records_lib.Records, "size", lambda self, i, max_side: (64, 55))
    with pytest.raises(ValueError, match=r"^the image of record 'train/good/.*' cannot be decoded"):
        batches(make(mode), 0, 1)


def test_no_thread_is_left_when_a_run_stops_between_chunks(stream):
    before = set(threading.enumerate())
    chunks = stream.chunks(0, 8)
    next(chunks)
    started = set(threading.enumerate()) - before
    assert started
    chunks.close()
    latest = time.monotonic() + PATIENCE
    while (left := started & set(threading.enumerate())) and time.monotonic() < latest:
        time.sleep(0.01)  # not `join`: a thread may be listed before it has started
    assert not left
