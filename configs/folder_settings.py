"""Which setting of PatchCore suits your own parts, judged without a look at their test.

python -m mmrjax.main --config=configs/folder_settings.py --workdir=runs/settings \
    --config.data.raw_dir=<folder>

Every row is trained on three quarters of the good training pictures. It is judged on the other
quarter, and on copies of those pictures with drawn defects. The table ranks the rows by the mean of
three metrics; the best row is then run by its fields with configs/folder.py, on the test. 16 good
training pictures are the least. The expected scores depend on the parts.

Any table of rows, of any data set and method, is judged so by
--config.sweep.judge=held_out_defects.
"""

from configs import folder


def get_config():
    """Returns the configuration."""
    config = folder.get_config()
    config.title = "Own parts, settings of PatchCore"
    config.method.names = ("patchcore",)
    config.sweep.judge = "held_out_defects"
    config.sweep.metrics = ("image_auroc", "pixel_auroc", "aupro_0.3")
    config.sweep.rows = (
        ("as it is", (), ""),
        ("by place", ("score.by_place=true",), ""),
        ("384 px", ("data.image_size=384,384", "data.resize=384,384"), ""),
        ("single patches", ("patchcore.patch=1",), ""),
        ("layers 1, 2, 3", ("patchcore.layers=1,2,3",), ""),
    )
    return config
