"""All methods by name."""

from ml_collections import ConfigDict

from mmrjax.methods import aminet, base, by_place, mmr, mmr_plus, patchcore

METHODS: dict[str, type[base.Method]] = {
    "aminet": aminet.AMINet,
    "mmr": mmr.MMR,
    "mmr_plus": mmr_plus.MMRPlus,
    "patchcore": patchcore.PatchCore,
}


def create(name: str, config: ConfigDict) -> base.Method:
    """Builds the method called `name`; ValueError lists the known names."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; available: {sorted(METHODS)}")
    kind = METHODS[name]
    return (by_place.of(kind) if config.score.by_place else kind)(config)
