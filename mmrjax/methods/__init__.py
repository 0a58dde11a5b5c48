"""All methods by name."""

from ml_collections import ConfigDict

from mmrjax.methods import aminet, base, by_place, mala, mmr, mmr_plus, patchcore, subspace_ad

METHODS: dict[str, type[base.Method]] = {
    kind.name: kind
    for kind in (
        aminet.AMINet,
        mala.MALA,
        mmr.MMR,
        mmr_plus.MMRPlus,
        patchcore.PatchCore,
        subspace_ad.SubspaceAD,
    )
}


def create(name: str, config: ConfigDict) -> base.Method:
    """Builds the method called `name`; ValueError lists the known names."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; available: {sorted(METHODS)}")
    kind = METHODS[name]
    return (by_place.of(kind) if config.score.by_place else kind)(config)


def defaults() -> ConfigDict:
    """The configuration groups of all methods, {group: fields with their defaults}."""
    groups = ConfigDict()
    for kind in METHODS.values():
        groups.update(kind.defaults())
    return groups
