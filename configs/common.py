"""Every field of an mmrjax configuration, with the values of the MMR paper's official code.

Not run by itself: each data set's file calls `get_config` here and changes what differs. Sources:
arXiv 2304.02216 and its official code (MMR), arXiv 2106.08265 and its official code (PatchCore),
IEEE TASE 2024 and luow23/AMI-Net (AMI-Net).
"""

from ml_collections import ConfigDict

SETS = ("aebad", "btad", "folder", "kolektor_sdd2", "magnetic_tile", "mvtec_ad", "rsdds", "visa")


def get_config() -> ConfigDict:
    """Returns the full configuration."""
    config = ConfigDict()
    config.title = ""

    config.method = ConfigDict()
    config.method.names = ("mmr",)  # any of mmr, mmr_plus, patchcore, aminet; all are compared

    config.data = data = ConfigDict()
    data.name = ""  # a builder of data_builders
    data.categories = ()  # () = all of them, in turn
    data.raw_dir = ""  # the data set as its publisher ships it
    data.data_dir = "~/.cache/mmrjax/records"  # where records are built
    # Data sets, or single categories as aebad/s, that train one model together; () = data.name
    # alone. Each lies where the group raw_dirs says; one that is given nowhere is left out.
    data.join = ()
    # one_class | k_shot | one_for_all (one model, all categories) | image_split (leaks groups; for
    # comparison only) | track_a | track_b (see configs/cross_domain.py)
    data.protocol = "one_class"
    data.shots = 4  # training images of k_shot, drawn by the seed
    data.target = ""  # track_a: whose published test is kept, such as aebad/s; "" = the first one
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
    data.reference_domain = ""  # the unshifted domain, to which gaps are reported

    # Where the data sets of data.join lie, each as its publisher ships it. demo_parts is drawn.
    config.raw_dirs = ConfigDict()
    for name in SETS:
        config.raw_dirs[name] = ""

    config.teacher = teacher = ConfigDict()
    teacher.name = "wide_resnet50_2"
    # embedded (fdsl18 alone) | imagenet | random | a .safetensors, .npz or .pth file
    teacher.weights = "imagenet"
    teacher.seed = 0  # of random weights

    config.student = student = ConfigDict()
    student.size = "base"  # tiny | small | base | large, or "" with width, depth and heads given
    student.width = 0  # 0 = from size
    student.depth = 0
    student.heads = 0
    student.init = "mae"  # mae | scratch | a file
    student.layers = (1, 2, 3)  # which teacher layers to reconstruct (paper, table 9)
    student.mask_ratio = 0.4  # paper, figure 13
    student.mask_form = "drop"  # drop (tokens never enter) | pixel (units set to the mean colour)
    student.mask_unit = 16  # side of such a unit in px: 1, 2, 4, … 112 (paper, figure 12)
    # Kernel of plain attention: xla | cudnn (flash, on NVIDIA in bfloat16) | auto (cudnn there)
    student.attention = "auto"
    student.unroll = 0  # transformer blocks per scan iteration; 0 = by platform

    config.patchcore = patchcore = ConfigDict()
    patchcore.layers = (2, 3)
    patchcore.patch = 3  # neighbourhood that one feature sees
    patchcore.width = 1024  # of an embedded patch
    patchcore.coreset = 0.01  # share of all patches (of a scale) kept in its memory bank
    # Sides of what the teacher sees, relative to the image; several: a bank and a map for each
    patchcore.scales = (1.0,)
    patchcore.candidates = 0  # patches that the coreset is chosen from, drawn at random; 0: all
    patchcore.projection = 128  # width of the random projection in which the coreset is chosen
    patchcore.start_points = 10
    # Not in the paper, both learnt from how training images differ from each other:
    patchcore.whiten = 0.0  # shrinkage (as 0.1) of Mahalanobis distances; 0: Euclidean ones
    patchcore.relative = False  # distances over those to expect from the same bank row
    patchcore.score = "smoothed"  # smoothed (maximum of the map) | patch (maximum of raw patches)

    config.aminet = aminet = ConfigDict()  # values of its official code; the paper's where noted
    aminet.layers = (1, 2, 3)
    aminet.pool = 3  # cells averaged in each direction; 1 = none, as in the paper
    aminet.patch = 4  # side of a token in cells of 4 px (K)
    aminet.width = 768
    aminet.heads = 12
    aminet.depth = 8  # blocks of the inpainting network (N_i)
    aminet.cluster_depth = 1  # blocks that make the cluster centres (N_s)
    aminet.clusters = 8  # P
    aminet.boundary = 0.5  # deviations beyond a cluster's mean that hide a token (lambda)
    aminet.squared = False  # True: the length in the distance squared, as Eq. 12 prints
    aminet.jitter = 20.0  # noise on tokens in training, the paper's AMI-Net with ‡; 0 = without
    aminet.train_mask_token = True  # paper: stays 0
    aminet.score = "std"  # of an image: std | max of its map
    # AMI-Net reads these and ignores the fields of the same name in the groups train and optim:
    aminet.epochs = 300  # paper: 200
    aminet.batch_size = 8  # one model on all categories: 16; few shots: 1
    aminet.augment = "none"
    aminet.learning_rate = 1e-4  # paper: 1e-3
    aminet.weight_decay = 0.01  # torch's default, on every parameter
    aminet.warmup = 0.0
    aminet.drops = ()

    # What MMR+ adds to MMR (papers/mmr_plus_proposal, whose numbers are the 3 x 3 window, 10 px,
    # the weight 2, the ratio 1:3 and 70/30; the others are ours). Read with the groups student,
    # train and optim. Off: hybrid=False, synthetic_every=0, tiny_weight=1, contrast=none,
    # domain=none.
    config.mmr_plus = plus = ConfigDict()
    plus.hybrid = True  # attention limited per head; no new parameters
    plus.local_heads = 0.5  # share of the heads that see a window, rounded down; the others sparse
    plus.heads = "auto"  # which are local: fixed (the first) | by_distance (those that look least
    # far before training) | auto (by_distance where the student begins pretrained)
    plus.window = 3  # patches, odd
    plus.sampling = "lattice"  # of global heads: lattice | random (a quarter of the keys) | full
    plus.stride = 2  # of the lattice, whose phase rotates from layer to layer
    plus.layers = "all"  # that are hybrid: all | last_half | alternate
    plus.soft_start = 20 / 200  # share of the epochs until the limits are hard; 0: from the start
    plus.synthetic_every = 4  # every 4th row of a batch gets a defect: 1 to 3 real ones; 0: none
    plus.defect_kinds = ("spot", "groove", "fracture", "chip", "stain", "scratch")
    # Where defects lie: all (textures, surfaces that fill the picture) | otsu (on the part, found
    # by its colour distance to the picture's border)
    plus.foreground = "all"
    plus.surfaces = ()  # joined data sets to which otsu does not apply: they fill the picture
    plus.defect_tiny = 0.6  # share of defects under 10 px
    plus.defect_folder = ""  # of (picture, mask) pairs, as labelled defects
    plus.defect_labelled = 0.5  # share of these and of data.labelled's, where there are some
    # Of labelled defects: blend (cut out, into a good picture, which is the target) | inpaint (the
    # picture as it is; target: the defect filled in) | ignore (the same; its cells do not count)
    plus.labelled_target = "blend"
    plus.noise_intensity = 0.02  # grain of spots, grooves, chips, fractures, as a share of 255
    plus.spatial_distribution = "uniform"  # uniform | edge | texture (where the picture is busy)
    plus.tiny_weight = 2.0  # of cells with a defect under 10 px, in the reconstruction
    plus.tiny_mode = "literal"  # literal (each weighs more) | balanced (their mean is added)
    # Of normal and abnormal: features (InfoNCE in the teacher's space) | tokens (SupCon) | none
    plus.contrast = "features"
    plus.contrast_weight = 0.1
    plus.negatives = 32  # other defect cells that each cell is held against
    plus.alike = 0.9  # cosine of the teacher's features above which it does not see a defect
    plus.temperature = 0.1
    # Of domains: supcon | coral | none. Needs training images of two or more domains.
    plus.domain = "none"
    plus.domain_weight = 0.05
    plus.ramp = (20 / 200, 50 / 200)  # shares of the epochs between which both weights grow from 0

    # Not in any paper: maps in standard deviations of the good training images at the same place,
    # for pictures in which a place means the same; the score of an image is the map's maximum.
    config.score = ConfigDict()
    config.score.by_place = False

    config.calibration = ConfigDict()
    config.calibration.fraction = 0.0  # of the good training images, held out for the threshold
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

    # A table of runs (see sweep.py): (label, ("group.field=value", …), the paper's percent or a
    # text in their place) each. Only a configuration file can declare it.
    config.sweep = sweep = ConfigDict()
    sweep.rows = ()
    sweep.metrics = ("image_auroc", "pro_mmr")  # of results.json; what the percent are of
    sweep.average = "domains"  # domains, then categories | images (a category's images pooled)
    sweep.source = ""  # where the paper's numbers stand

    config.report = ConfigDict()
    config.report.gallery = 24  # pictures per run

    config.log = ConfigDict()
    config.log.trackers = ()  # beside metrics.jsonl: any of tensorboard, wandb, mlflow

    config.ckpt = ConfigDict()
    config.ckpt.every_seconds = 60.0
    config.ckpt.keep = 2
    return config
