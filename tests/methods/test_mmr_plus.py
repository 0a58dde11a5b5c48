"""MMR+: with every switch off it is MMR bit for bit; what each switch does to a step."""

import dataclasses

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmrjax import methods
from mmrjax.data import augment
from mmrjax.data.defects import bank as defect_bank
from mmrjax.data.defects import rows as rows_lib
from mmrjax.data.defects import synthesise as defects
from mmrjax.methods import base as base_lib
from mmrjax.methods import contrast as losses_plus
from mmrjax.methods import hybrid_heads, losses, mmr_plus, optim
from mmrjax.models import attention, backbones
from mmrjax.runtime import mesh as mesh_lib
from mmrjax.train import step as state

NORMALISE = backbones.build("resnet18").normalise
OFF = {
    "hybrid": False,
    "synthetic_every": 0,
    "tiny_weight": 1.0,
    "contrast": "none",
    "domain": "none",
}
STEPS_PER_EPOCH = 2
DOMAIN = np.arange(20, dtype=np.int32) % 3


def dark_square(key, images, foreground, settings, bank=None, chances=None):
    """In place of the synthesiser, which is tested apart: a black square of 8 px."""
    corner = jax.vmap(lambda key: jax.random.randint(key, (2,), 0, images.shape[1] - 8))(key)
    place = jnp.arange(images.shape[1]) - corner[..., None]  # [b, 2, h]
    inside = (place >= 0) & (place < 8)
    mask = inside[:, 0, :, None] & inside[:, 1, None, :]
    painted = jnp.where(mask[..., None], 0.0, images.astype(jnp.float32))
    return defects.Defects(painted, mask, mask, jnp.zeros(len(images), jnp.int32))


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setattr(defects, "synthesise", dark_square)


@pytest.fixture(scope="module")
def base(tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.optim.warmup = 0.0
    config.train.epochs = 20  # soft start until 2, ramps from 2 to 5
    config.mmr_plus.update(OFF)
    return config


@pytest.fixture
def make(base):
    """(name, switches) -> the method."""

    def build(name="mmr_plus", **switches):
        config = base.copy_and_resolve_references()
        config.mmr_plus.update(switches)
        return methods.create(name, config)

    return build


def pictures():
    return np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)


def whole(key, image, size):
    """In place of augmentation."""
    return image / 255.0


def run(method, steps=3, devices=1, first=0):
    """(state, logs of every step, compiled step) after some steps of batches of 8."""
    mesh = mesh_lib.make_mesh(devices)
    frozen = mesh_lib.replicate(method.load_frozen()[0], mesh)
    variables, _ = method.init(jax.random.key(0), frozen)
    options = method.config.train
    stage = base_lib.Stage(
        "train",
        options.epochs,
        dataclasses.replace(method.plan(Table(domain=DOMAIN.astype(str))), domain=DOMAIN),
        optim.optimiser(method.config.optim, options.epochs, STEPS_PER_EPOCH),
    )
    step = state.make_train_step(method, stage, whole, STEPS_PER_EPOCH, mesh)
    resident = {"image": pictures(), "size": np.tile(np.int32([[64, 64]]), (20, 1))}
    resident = mesh_lib.replicate({**resident, "domain": DOMAIN}, mesh)
    current = state.create(variables, stage)
    current = mesh_lib.replicate(current.replace(step=jnp.int32(first)), mesh)
    logs = []
    for i in range(steps):
        index = (np.arange(8)[None] * 3 + i) % 20
        chunk = {"index": index.astype(np.int32), "weight": np.ones((1, 8), np.float32)}
        chunk = mesh_lib.put_batch(chunk, mesh, axis=1)
        current, found = step(current, frozen, resident, chunk, jax.random.key(7))
        logs.append({name: float(value[0]) for name, value in found.items()})
    return jax.device_get(current), logs, step


@pytest.fixture(scope="module")
def plain(base):
    return run(methods.create("mmr", base))


# --- off


def test_with_every_switch_off_three_steps_are_those_of_mmr_bit_for_bit(make, plain):
    current, logs, _ = run(make())
    assert logs == plain[1]
    for name in ("params", "collections", "opt_state"):
        got, want = getattr(current, name), getattr(plain[0], name)
        assert jax.tree.structure(got) == jax.tree.structure(want)
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_with_every_switch_off_the_score_is_that_of_mmr(make, plain):
    images = pictures()[:3] / 255.0
    results = []
    for method in (make("mmr"), make()):
        frozen, _ = method.load_frozen()
        results.append(jax.jit(method.predict)(plain[0].variables, frozen, images))
    jax.tree.map(np.testing.assert_array_equal, *results)


# --- each switch

SWITCHES = {
    "all": {
        "hybrid": True,
        "synthetic_every": 4,
        "tiny_weight": 2.0,
        "contrast": "features",
        "domain": "supcon",
    },
    "others": {
        "hybrid": True,
        "sampling": "random",
        "synthetic_every": 4,
        "tiny_weight": 5.0,
        "tiny_mode": "balanced",
        "contrast": "tokens",
        "domain": "coral",
    },
}


@pytest.fixture(scope="module", params=sorted(SWITCHES))
def trained(request, base):
    """A run from epoch 1 to 7, through the soft start and the ramps."""
    config = base.copy_and_resolve_references()
    config.mmr_plus.update(SWITCHES[request.param])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(defects, "synthesise", dark_square)
        return request.param, *run(methods.create("mmr_plus", config), steps=12, first=2)


def test_all_switches_train_and_compile_once_over_all_ramps(trained, plain):
    _, current, logs, step = trained
    assert step._cache_size() == 1
    assert all(np.isfinite(list(line.values())).all() for line in logs)
    assert logs[-1]["loss_layer3"] < logs[0]["loss_layer3"]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(current.params))
    kinds = [f"defects_{kind}" for kind in defects.TRAINING]
    extra = {"loss_contrast", "loss_domain", "defects", *kinds}
    assert logs[0].keys() - plain[1][0].keys() == extra
    assert all(line["defects"] == line["defects_spot"] == 2 for line in logs)  # the stand-in's
    assert not any(line[kind] for line in logs for kind in kinds[1:])


def test_extra_losses_have_no_weight_before_the_ramp_and_their_own_after_it(trained):
    """20 epochs: the ramp is from epoch 2 to 5, two steps each; the run began at step 2."""
    shares = [0, 0, 0, 0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1, 1, 1]
    for line, share in zip(trained[2], shares, strict=True):
        parts = sum(v for k, v in line.items() if k.startswith("loss_layer"))
        extra = 0.1 * line["loss_contrast"] + 0.05 * line["loss_domain"]
        assert line["loss"] == pytest.approx(parts + share * extra, rel=1e-5)


def test_moments_of_domains_travel_with_the_state(trained):
    name, current, logs, _ = trained
    if name == "others":
        moments = current.collections["moments"]
        np.testing.assert_array_equal(moments["count"], [8, 8, 8] + [0] * 13)  # two in each batch
        assert float(losses_plus.coral(moments)) == pytest.approx(logs[-1]["loss_domain"], rel=1e-4)
    assert logs[0]["loss_domain"] > 0


def test_the_number_of_devices_does_not_change_the_loss_curve(make, trained):
    name, _, logs, _ = trained
    if name != "all":
        return
    _, split, _ = run(make(**SWITCHES[name]), steps=4, devices=4, first=2)
    for one, four in zip(logs, split, strict=False):
        assert one == pytest.approx(four, abs=2e-5, rel=1e-5)


def batch_of(b=8):
    images = jnp.asarray(pictures()[:b] / np.float32(255))
    keys = jax.random.split(jax.random.key(3), b)
    return {"image": images, "weight": jnp.ones(b), "keys": keys, "domain": jnp.asarray(DOMAIN[:b])}


def test_defects_are_offered_the_part_alone_cropped_as_the_picture(make, monkeypatch):
    """The fourth channel of the canvas comes through crop and flip as the picture does."""
    method = make(synthetic_every=4, foreground="otsu")
    plan = method.plan(Table())
    assert plan.foreground
    assert not make(foreground="otsu").plan(Table()).foreground
    offered = {}

    def loss(stage, variables, frozen, batch, key, progress):
        agree = (batch["normal"].mean(axis=-1) > 0.5) == batch["foreground"]
        part = batch["foreground"].mean()
        return jnp.sum(variables["params"]["kernel"]), ({}, {"agree": agree.mean(), "part": part})

    def synthesise(keys, images, foreground, settings):
        offered["shape"] = foreground.shape
        return dark_square(keys, images, foreground, settings)

    monkeypatch.setattr(defects, "synthesise", synthesise)
    monkeypatch.setattr(method, "loss", loss)
    stage = base_lib.Stage("train", 1, plan, optax.sgd(0.1))
    crops, one = augment.make_augment(method.config, "rrc_flip"), mesh_lib.make_mesh(1)
    step = state.make_train_step(method, stage, crops, 2, one)
    picture = np.zeros((2, 70, 80, 4), np.uint8)
    picture[:, 20:50, 30:60] = 255  # a white part, and its foreground
    resident = {"image": picture, "size": np.int32([[70, 80]] * 2)}
    chunk = {"index": np.int32([[0, 1] * 4]), "weight": np.ones((1, 8), np.float32)}
    current = state.create({"params": {"kernel": jnp.ones((2, 2))}}, stage)
    _, logs = step(current, {}, resident, chunk, jax.random.key(0))
    assert offered["shape"] == (2, 64, 64)
    assert float(logs["agree"][0]) == 1
    assert 0.05 < float(logs["part"][0]) < 0.5


def shown(method, batch, frozen=None):
    """A batch as the step hands it to the loss."""
    recipe = method.plan(Table(domain=np.array(["a", "b"] * 16))).defects
    return batch if recipe is None else rows_lib.with_defects(recipe, batch, frozen or {})


class Recorded:
    """A method whose networks are replaced by fixed maps, and which pictures went into them."""

    def __init__(self, method, monkeypatch, repaired=False):
        rng = np.random.default_rng(1)
        maps = [{i: rng.standard_normal((8, n, n, 5)) for i, n in ((2, 8), (3, 4))} for _ in "zf"]
        maps = jax.tree.map(jnp.asarray, maps)
        self.method = method
        monkeypatch.setattr(method, "_reconstruct", self._student)
        monkeypatch.setattr(method, "_targets", self._teacher)
        self._maps = maps[1] if repaired else maps[0], maps[1]

    def _student(self, variables, images, keys):
        self.student = images
        return self._maps[0]

    def _teacher(self, frozen, images):
        self.teacher = images
        return self._maps[1]

    def loss(self):
        progress = {"epoch": jnp.int32(9)}
        batch = shown(self.method, batch_of())
        loss, (_, logs) = self.method.loss("train", {}, {}, batch, jax.random.key(0), progress)
        return float(loss), logs


def test_a_quarter_of_the_rows_gets_a_defect_and_the_target_is_the_normal_twin(make, monkeypatch):
    recorded = Recorded(make(synthetic_every=4), monkeypatch, repaired=True)
    loss, logs = recorded.loss()
    assert loss == pytest.approx(0, abs=1e-5)
    images = batch_of()["image"]
    np.testing.assert_array_equal(recorded.teacher, images)
    assert float(logs["defects"]) == 2
    differs = np.asarray(recorded.student != NORMALISE(images)).any(axis=-1)
    np.testing.assert_array_equal(differs.any(axis=(1, 2)), [True, False, False, False] * 2)
    assert differs.sum(axis=(1, 2)).max() <= 64  # the rest of a picture is untouched


def test_a_heavier_weight_counts_only_where_tiny_defects_are(make, monkeypatch):
    values = [
        Recorded(make(synthetic_every=4, tiny_weight=w), monkeypatch).loss()[0] for w in (1, 2, 3)
    ]
    assert values[0] < values[1] < values[2]
    assert values[2] - values[0] == pytest.approx(2 * (values[1] - values[0]), rel=1e-3)


def test_heads_of_contrasts_are_trained_and_ignored_by_the_score(make, trained):
    name, current, _, _ = trained
    method = make(**SWITCHES[name])
    initial, _ = method.init(jax.random.key(0), {})
    (head,) = method.heads
    for before, after in zip(
        *(jax.tree.leaves(x["params"][head]) for x in (initial, current.variables)), strict=True
    ):
        assert np.abs(before - after).max() > 1e-3  # weight decay alone: 1e-4 of it a step
    images = NORMALISE(batch_of()["image"])
    without = {n: v for n, v in current.params.items() if n != head}
    variables = {**current.variables, "params": without}
    shape = jax.eval_shape(lambda v, x: method.unmasked(v, x)[3], variables, images).shape
    assert shape == (8, 4, 4, 256)


# --- attention


def limits_of(method, epoch):
    soft = method._epochs(method.options.soft_start)
    return hybrid_heads.limits(method.options, method.student, batch_of(), jnp.int32(epoch), soft)


def test_limits_grow_to_30_and_are_hard_afterwards(make):
    method = make(hybrid=True)  # a tenth of 20 epochs
    got = [float(limits_of(method, e)["penalty"]) for e in range(4)]
    assert got == [0, 15, attention.HARD, attention.HARD]
    assert limits_of(method, 0).keys() == {"penalty"}
    assert limits_of(make(hybrid=True, soft_start=0.0), 0) == {}
    assert limits_of(make(), 0) == {}


def test_half_of_the_heads_are_local_rounded_down(make):
    kinds = make(hybrid=True).student.hybrid.kinds  # three heads
    assert kinds == ((attention.LOCAL, attention.GLOBAL, attention.GLOBAL),) * 2
    kinds = make(hybrid=True, local_heads=1.0, sampling="full").student.hybrid.kinds
    assert kinds == ((attention.LOCAL,) * 3,) * 2
    kinds = make(hybrid=True, local_heads=0.0, sampling="full").student.hybrid.kinds
    assert kinds == ((attention.FULL,) * 3,) * 2


def test_random_keys_differ_by_image_in_training_and_are_the_same_in_every_score(make):
    method = make(hybrid=True, sampling="random")
    sample = limits_of(method, 0)["sample"]
    np.testing.assert_array_equal(sample.sum(axis=1), [4] * 8)  # a quarter of 16
    assert len({tuple(row) for row in np.asarray(sample).tolist()}) > 1
    variables, _ = method.init(jax.random.key(0), {})
    images = jnp.broadcast_to(batch_of()["image"][:1], (3, 64, 64, 3))
    features = jax.jit(lambda v, x: method.unmasked(v, x)[3])(variables, images)
    assert np.abs(features - features[:1]).max() < 1e-5


def test_large_grids_collect_keys_and_small_ones_mask(make):
    def gathers(side, **switches):
        method = make(**switches)
        return hybrid_heads.gathers(method.options, method.student, (2, side, side, 3))

    assert not gathers(224, hybrid=True)
    assert gathers(448, hybrid=True)
    assert not gathers(448)
    for other in ({"sampling": "random"}, {"sampling": "full"}, {"layers": "alternate"}):
        assert not gathers(448, hybrid=True, **other)


def test_the_nearest_heads_are_chosen_on_training_images(make):
    method = make(hybrid=True, heads="by_distance")
    assert method.prepare is not None
    frozen, _ = method.load_frozen()
    variables, _ = method.init(jax.random.key(0), frozen)
    blocks = variables["params"]["encoder"]["blocks"]["attn"]["qkv"]
    kernel = np.array(blocks["kernel"])  # [depth, d, 3 d]
    kernel[:, :, 8:16] *= 30  # queries of head 1: sharp attention, whatever it looks at
    blocks["kernel"] = jnp.asarray(kernel)
    images = jnp.asarray(pictures()) / 255.0
    found, facts = method.prepare(variables, frozen, [(images[:8], 8), (images[8:16], 3)])
    distances = np.array(facts["attention"]["mean_distances"])
    assert distances.shape == (2, 3)
    shortest = distances.argmin(axis=1)
    np.testing.assert_array_equal(facts["attention"]["local_heads"], shortest[:, None])
    for layer in range(2):
        (local,) = np.flatnonzero(found["attention"]["kinds"][layer] == attention.LOCAL)
        assert local == shortest[layer]
    other = [(images[:8], 8), (np.concatenate([images[8:11], 0 * images[:5]]), 3)]
    assert method.prepare(variables, frozen, other)[1] == facts  # padding does not count


def test_heads_are_chosen_by_distance_where_the_student_begins_pretrained(make, base):
    assert make(hybrid=True).prepare is None
    config = base.copy_and_resolve_references()
    config.mmr_plus.hybrid = True
    config.student.init = "some_file.safetensors"
    assert methods.create("mmr_plus", config).prepare is not None
    config.mmr_plus.heads = "fixed"
    assert methods.create("mmr_plus", config).prepare is None


# --- batches and what does not fit


class Table:
    dataset, category = "x", "1"

    def __init__(self, **columns):
        self.table = columns

    def __len__(self):
        return max(map(len, self.table.values()), default=32)

    def take(self, rows):
        return Table(**{name: column[rows] for name, column in self.table.items()})


NONE = Table(id=np.array([], str))  # no labelled records


def test_domains_of_a_data_set_and_of_joined_ones(make):
    names = np.array(["b", "a", "b", "c"] * 8)
    some = Table(domain=names).take(np.delete(np.arange(32), np.s_[3::4]))
    plan = make(domain="coral").plan(some)
    np.testing.assert_array_equal(plan.domain, [1, 0, 1] * 8)
    assert plan.synthetic == 0
    part = np.repeat(["x/1", "y/2"], 16)
    plan = make(synthetic_every=4, domain="supcon").plan(Table(domain=names, part=part))
    np.testing.assert_array_equal(plan.domain, np.repeat([0, 1], 16))
    assert (plan.synthetic, plan.batch_size) == (2, 8)
    assert make().plan(Table(domain=names)).domain is None
    with pytest.raises(ValueError, match="8 different training images, there are 4; lower"):
        make(synthetic_every=4).stages(Table(domain=names[:4]))


def test_one_domain_cannot_be_aligned(make):
    with pytest.raises(ValueError, match=r"two to 16 domains, not 1 \(such as 'a'\); set mmr"):
        make(domain="coral").plan(Table(domain=np.array(["a"] * 3)))
    many = Table(domain=np.arange(17).astype(str))
    with pytest.raises(ValueError, match=r"two to 16 domains, not 17 \(such as '0'\); set"):
        make(domain="coral").plan(many)


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"contrast": "features"}, r"contrast=features needs synthetic defects; set .*=4, or"),
        ({"contrast": "tokens"}, "contrast=tokens needs synthetic"),
        ({"domain": "supcon"}, r"domain=supcon needs synthetic .*domain=coral"),
        ({"synthetic_every": 1}, r"synthetic_every=1 leaves no real row; give 0, 2 or more"),
        ({"synthetic_every": 3}, r"every 3th row of train.batch_size=8 cannot"),
    ],
)
def test_switches_that_do_not_fit_together_say_what_to_set(make, switches, message):
    with pytest.raises(ValueError, match=message):
        make(**switches).stages(Table())


def test_joined_data_sets_take_turns_where_there_are_synthetic_rows(make):
    """Spec, section 6: of D data sets every batch holds 12/D real and 4/D synthetic ones."""
    part = np.repeat(["aebad/s", "rsdds/i"], [20, 40])
    records = Table(part=part, domain=part)
    plan = make(synthetic_every=4).plan(records)
    np.testing.assert_array_equal(plan.domain, [0] * 20 + [1] * 40)
    table, _ = plan.table(60, 0, 0)
    for row in table:  # two synthetic rows of eight, one of each data set
        assert sorted(plan.domain[row[::4]]) == [0, 1]
        assert np.bincount(plan.domain[np.delete(row, np.s_[::4])]).tolist() == [3, 3]
    assert make().plan(records).domain is None  # all off: as MMR


def test_a_surface_that_fills_the_picture_is_not_sought(make):
    part = np.repeat(["aebad/s", "rsdds/i"], 16)
    method = make(synthetic_every=4, foreground="otsu", surfaces=("rsdds",))
    plan = method.plan(Table(part=part, domain=part))
    np.testing.assert_array_equal(plan.fills, [False] * 16 + [True] * 16)
    assert make(synthetic_every=4, surfaces=("rsdds",)).plan(Table()).fills is None


def test_labelled_defects_reach_only_pictures_of_their_data_set(make, monkeypatch):
    offered = []

    def synthesise(keys, images, foreground, settings, bank=None, chances=None):
        offered.append((settings, bank, chances))
        return dark_square(keys, images, foreground, settings)

    monkeypatch.setattr(defects, "synthesise", synthesise)
    method = make(synthetic_every=4, defect_labelled=0.25)
    table = np.float32([[1, 0], [0, 1], [0, 0]])
    labelled = {"images": jnp.zeros((2, 8, 8, 3)), "masks": jnp.ones((2, 8, 8), bool)}
    batch = batch_of()
    found = shown(method, batch, {"labelled": labelled | {"chances": jnp.asarray(table)}})
    ((settings, bank, chances),) = offered
    assert int((found["kind"] >= 0).sum()) == 2  # of eight rows
    assert settings.kinds[-1] == "real"
    assert settings.real_share == 0.25
    assert bank.images.shape == (2, 8, 8, 3)
    np.testing.assert_array_equal(chances, table[np.asarray(DOMAIN[:8:4])])
    del batch["domain"]  # a single data set
    shown(method, batch, {"labelled": labelled | {"chances": jnp.ones((1, 2))}})
    np.testing.assert_array_equal(offered[1][2], np.ones((2, 2)))
    assert method.extras(Table(), NONE) == ({}, {})


def test_defects_of_a_folder_reach_pictures_of_every_data_set(make, tmp_path):
    image, mask = np.full((64, 64, 3), 90, np.uint8), np.zeros((64, 64), np.uint8)
    mask[20:30, 20:34] = 255
    for name, array in (("a.png", image), ("a_mask.png", mask)):
        cv2.imwrite(str(tmp_path / name), array)
    part = np.repeat(["aebad/s", "rsdds/i"], [20, 40])
    records = Table(part=part, domain=part)
    method = make(synthetic_every=4, defect_folder=str(tmp_path))
    kept, facts = method.extras(records, NONE)
    assert kept["labelled"]["masks"].sum() == 140
    np.testing.assert_array_equal(kept["labelled"]["chances"], [[1], [1]])
    assert facts["labelled_defects"] == {"any": {tmp_path.name: 1}}
    with pytest.raises(ValueError, match=r"defect_folder: no pairs of picture and mask in nowhere"):
        make(synthetic_every=4, defect_folder="nowhere").extras(records, NONE)


WHOLE = {"synthetic_every": 4, "defect_labelled": 1.0, "defect_folder": "pairs"}


def labelled_of(method, frozen):
    """Frozen variables with one labelled picture, black in a square, whose twin is white there."""
    images = np.random.default_rng(5).integers(60, 200, (1, 64, 64, 3), dtype=np.uint8)
    masks = np.zeros((1, 64, 64), bool)
    masks[:, 16:48, 32:64] = True
    twins = np.where(masks[..., None], 255, images).astype(np.uint8)
    images = np.where(masks[..., None], 0, images).astype(np.uint8)
    kept = {"images": images, "masks": masks, "chances": np.ones((3, 1), np.float32)}
    kept["tiny"] = 0 * masks > 0
    kept["ignored"] = masks & (method.options.labelled_target == "ignore")
    if method.options.labelled_target == "inpaint":
        kept["twins"] = twins
    return {**frozen, "labelled": jax.tree.map(jnp.asarray, kept)}, images[0], twins[0], masks[0]


def two_losses(method, frozen):
    """(variables, loss of a batch, its logs, the batch), without augmentation."""
    method.config.train.augment = "none"
    variables, _ = method.init(jax.random.key(0), frozen)
    batch = batch_of()
    progress = {"step": jnp.int32(10), "epoch": jnp.int32(5)}
    recipe = method.plan(Table()).defects
    show = jax.jit(lambda batch, frozen: rows_lib.with_defects(recipe, batch, frozen))
    loss, (_, logs) = jax.jit(method.loss, static_argnums=0)(
        "train", variables, frozen, show(batch, frozen), jax.random.key(3), progress
    )
    return variables, float(loss), logs, batch


def distance_without(features, targets, first_column):
    """The loss without rows 16 to 48 of every fourth picture, from a column on (pixels of 64)."""
    total = 0.0
    for layer, target in targets.items():
        distance = np.array(losses.cosine_distance(features[layer], target))
        step = 64 // distance.shape[1]
        distance[::4, 16 // step : 48 // step, first_column // step :] = 0
        total += distance.mean()
    return total


def test_a_labelled_picture_is_to_be_repaired_where_it_is_filled_in(make):
    """What lies too deep in it is left out of reconstruction and contrast."""
    method = make(labelled_target="inpaint", contrast="features", **WHOLE)
    frozen, image, twin, mask = labelled_of(method, method.load_frozen()[0])
    deep = mask & (np.arange(64) >= 48)
    frozen["labelled"]["ignored"] = jnp.asarray(deep[None])
    variables, got, logs, batch = two_losses(method, frozen)
    seen, targets = (np.array(batch["image"]) for _ in range(2))
    seen[::4], targets[::4] = image / 255, twin / 255
    assert float(logs["defects_real"]) == float(logs["defects"]) == 2
    features = method._reconstruct(variables, NORMALISE(jnp.asarray(seen)), batch["keys"])
    normal, defective = (method._targets(frozen, jnp.asarray(x)) for x in (targets, seen))
    want = distance_without(features, normal, first_column=48)
    key = jax.random.fold_in(jax.random.key(3), mmr_plus.NEGATIVES)
    maps = [{layer: x[layer][::4] for layer in normal} for x in (features, normal, defective)]
    rows = jnp.asarray(np.stack([mask & ~deep] * 2))  # their cells are whole
    contrast = float(losses_plus.feature_contrast(key, *maps, rows)[0])
    assert contrast > 0
    assert float(logs["loss_contrast"]) == pytest.approx(contrast, rel=1e-4)
    assert got == pytest.approx(want + 0.1 * contrast, rel=1e-5)


def test_cells_of_a_labelled_picture_are_left_out_where_they_are_ignored(make):
    """And contrasted with nothing: what the teacher sees of them is what it is to see."""
    method = make(labelled_target="ignore", contrast="features", **WHOLE)
    frozen, image, _, mask = labelled_of(method, method.load_frozen()[0])
    variables, got, logs, batch = two_losses(method, frozen)
    assert float(logs["loss_contrast"]) == 0
    seen = np.array(batch["image"])
    seen[::4] = image / 255
    images = NORMALISE(jnp.asarray(seen))
    features = method._reconstruct(variables, images, batch["keys"])
    wanted = method._targets(frozen, jnp.asarray(seen))  # of itself
    want = distance_without(features, wanted, first_column=32)
    assert got == pytest.approx(want, rel=1e-5)
    assert mask.any()


def test_whole_pictures_are_kept_also_with_defects_too_large_to_cut_out(make, tmp_path):
    image, mask = np.full((64, 64, 3), 90, np.uint8), np.zeros((64, 64), np.uint8)
    mask[4:60, 20:34] = 255
    for i, truth in enumerate((mask, 0 * mask)):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.where(truth[..., None], 200, image))
        cv2.imwrite(str(tmp_path / f"{i}_mask.png"), truth)
    records = Table()
    own = {"synthetic_every": 4, "defect_folder": str(tmp_path)}
    kept, facts = make(**own, labelled_target="inpaint").extras(records, NONE)
    kept = kept["labelled"]
    assert kept["images"].shape == (1, 64, 64, 3)  # the other has no defect
    assert kept["images"].max() == 200
    assert kept["twins"].max() < 100
    np.testing.assert_array_equal(kept["masks"][0], mask > 0)
    assert facts == {"labelled_pictures": {"any": {tmp_path.name: 1}}, "labelled_left_out": 1}
    kept, _ = make(**own, labelled_target="ignore").extras(records, NONE)
    assert set(kept["labelled"]) == {"images", "masks", "tiny", "ignored", "chances"}
    (tmp_path / "0_mask.png").write_bytes((tmp_path / "1_mask.png").read_bytes())
    with pytest.raises(ValueError, match="has 2 pairs, and no mask with a defect in view"):
        make(**own, labelled_target="ignore").extras(records, NONE)
    cv2.imwrite(str(tmp_path / "0_mask.png"), np.full_like(mask, 255))
    with pytest.raises(ValueError, match="the defects of all 1 labelled pictures fill them"):
        make(**own, labelled_target="ignore").extras(records, NONE)


def test_a_whole_picture_takes_rows_of_its_own_domain_alone(make, monkeypatch, base):
    """Its exposure is that of the row, or it would be aligned as another."""
    bank = defects.Bank(np.zeros((3, 64, 64, 3), np.uint8), np.zeros((3, 64, 64), bool))
    bank.masks[:, 20:30, 20:30] = True
    domain = np.array(["exp1", "exp2", "exp2"])
    found = defect_bank.Labelled(bank, np.array(["tile/t"] * 3), np.array(["crack"] * 3), domain, 0)
    monkeypatch.setattr(defect_bank, "from_records", lambda *_: found)
    monkeypatch.setitem(base.data, "labelled", True)
    records = Table(part=np.array(["tile/t"] * 4), domain=np.array(["exp1", "exp2"] * 2))
    labelled = Table(id=np.arange(3))
    for switch, wanted in (("supcon", [[1, 0, 0], [0, 1, 1]]), ("none", [[1, 1, 1]])):
        method = make(synthetic_every=4, labelled_target="ignore", domain=switch)
        kept, _ = method.extras(records, labelled)
        np.testing.assert_array_equal(kept["labelled"]["chances"] > 0, wanted)
    method = make(synthetic_every=4, domain="supcon")  # cut out, they are part of the good picture
    kept, _ = method.extras(records, labelled)
    assert (kept["labelled"]["chances"] > 0).all()


def test_a_target_for_labelled_defects_needs_some(make):
    config = make(synthetic_every=4, labelled_target="ignore").config
    with pytest.raises(ValueError, match="labelled_target=ignore: there are no labelled defects"):
        mmr_plus.MMRPlus.check(config)
    with pytest.raises(ValueError, match="pictures of defect_folder are of no known domain; set"):
        make(labelled_target="ignore", domain="supcon", **WHOLE)


def test_what_is_drawn_is_what_the_configuration_says(make):
    own = {"noise_intensity": 0.1, "spatial_distribution": "edge"}
    method = make(synthetic_every=4, defect_kinds=("spot", "chip"), defect_tiny=0.3, **own)
    recipe = method.plan(Table()).defects
    assert recipe.settings == defects.DefectSettings(("spot", "chip"), 0.3, **own)


def test_labelled_defects_are_for_synthetic_rows_alone(make, tmp_path):
    labelled = Table(id=np.arange(2))
    assert make(defect_folder=str(tmp_path)).extras(Table(), labelled) == ({}, {})
    assert make().extras(Table(), labelled) == ({}, {})
