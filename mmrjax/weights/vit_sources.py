"""The published weights of frozen ViTs: addresses, the publishers' hashes, licences.

The 8 hex digits in names of DeiT's and DINOv3's files are the start of their sha256. The publishers
of the other files give no hash that is known here.
"""

from mmrjax.weights import source
from mmrjax.weights.source import Published

META = "https://dl.fbaipublicfiles.com"
APACHE = "Apache-2.0"
DINO3_LICENCE = (
    "DINOv3 License of Meta: it forbids some uses (military, nuclear, weapons, espionage), and its "
    "terms go with whatever is made from the weights"
)
DINO3_ADVICE = (
    "; Meta sends a link to those who accept the DINOv3 License at "
    "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/"
)


def _timm(name: str) -> Published:
    repository = f"{name}.augreg_in21k_ft_in1k"
    address = f"https://huggingface.co/timm/{repository}/resolve/main/model.safetensors"
    return Published(address, "", APACHE, stored=f"{repository}.safetensors")


def _meta(path: str, licence: str = APACHE) -> Published:
    digits = path.rpartition("-")[2] if "-" in path else ""
    return Published(f"{META}/{path}.pth", digits, licence)


def _dino2(size: str) -> dict[str, Published]:
    name = f"dinov2_vit{size}14"
    return {
        name: _meta(f"dinov2/{name}/{name}_pretrain"),
        f"{name}_reg4": _meta(f"dinov2/{name}/{name}_reg4_pretrain"),
    }


def _dino3(size: str, digits: str) -> Published:
    name = f"dinov3_vit{size}"
    return _meta(f"dinov3/{name}/{name}_pretrain_lvd1689m-{digits}", DINO3_LICENCE)


PUBLISHED: dict[str, Published] = {
    "vit_tiny_patch16_224": _timm("vit_tiny_patch16_224"),
    "vit_small_patch16_224": _timm("vit_small_patch16_224"),
    "vit_base_patch16_224": _timm("vit_base_patch16_224"),
    "vit_large_patch16_224": _timm("vit_large_patch16_224"),
    "deit_tiny_patch16_224": _meta("deit/deit_tiny_patch16_224-a1311bcf"),
    "deit_small_patch16_224": _meta("deit/deit_small_patch16_224-cd65a155"),
    "deit_base_patch16_224": _meta("deit/deit_base_patch16_224-b5f2ef4d"),
    "dino_vits16": _meta("dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain"),
    "dino_vits8": _meta("dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain"),
    "dino_vitb16": _meta("dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain"),
    "dino_vitb8": _meta("dino/dino_vitbase8_pretrain/dino_vitbase8_pretrain"),
    **_dino2("s"),
    **_dino2("b"),
    **_dino2("l"),
    **_dino2("g"),
    "dinov3_vits16": _dino3("s16", "08c60483"),
    "dinov3_vits16plus": _dino3("s16plus", "4057cbaa"),
    "dinov3_vitb16": _dino3("b16", "73cec8be"),
    "dinov3_vitl16": _dino3("l16", "8aa4cbdd"),
    "dinov3_vith16plus": _dino3("h16plus", "7c1da9a5"),
}


def advice(name: str) -> str:
    """Advice for those without the file, beyond fetching it; "" if there is none."""
    return DINO3_ADVICE if PUBLISHED[name].licence == DINO3_LICENCE else ""


def licence(name: str, weights: str, digest: str) -> str:
    """The licence of a ViT's file, `source.LOCAL` if it is not known to be the published one.

    Args:
      name: the architecture's name.
      weights: config.teacher.weights.
      digest: sha256 of the file.
    """
    published = PUBLISHED.get(name)
    if published is None:
        return source.licence(digest)
    prefix = published.sha256_prefix
    is_known = weights == "published" or (prefix and digest.startswith(prefix))
    return published.licence if is_known else source.LOCAL
