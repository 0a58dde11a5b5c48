"""The device mesh and the only two placements there are: replicated, and split over the batch."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(devices: int | None = None) -> Mesh:
    """A one-axis "data" mesh over all devices, or over the first `devices` of them."""
    available = jax.devices()
    devices = devices or len(available)
    # Auto axes: Explicit ones, jax.make_mesh's default, would put the mesh into model code.
    return jax.make_mesh(
        (devices,), ("data",), axis_types=(AxisType.Auto,), devices=available[:devices]
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Axis `axis` is split over the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def replicate(tree, mesh: Mesh):
    """Puts every leaf on every device."""
    return jax.device_put(tree, replicated(mesh))


def put_batch(tree, mesh: Mesh, axis: int = 0):
    """Puts host arrays on the devices, split along `axis`."""
    return jax.device_put(tree, batched(mesh, axis))


def check_divisible(name: str, batch_size: int, mesh: Mesh) -> None:
    """Raises ValueError when a batch cannot be split evenly, naming the nearest valid sizes."""
    n = mesh.devices.size
    if batch_size % n:
        low, high = batch_size // n * n, (batch_size // n + 1) * n
        near = f"{low} or {high}" if low else f"{high}"
        raise ValueError(f"{name}={batch_size} must be divisible by {n} devices; try {near}")
