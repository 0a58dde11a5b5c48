"""The tables and lines of measurements that `mmrjax.bench` prints."""

from collections.abc import Sequence


def parity(found: dict[str, dict[str, float]]) -> None:
    """Prints the largest differences from the twin, {dtype: {output: difference}}."""
    for dtype, differences in found.items():
        told = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
        print(f"{dtype} outputs differ from the twin's in float32 by {told}")


def ours(found: dict) -> None:
    """Prints what was measured of our own programs."""
    if ceiling := found.get("ceiling"):
        print(
            f"matrix product {ceiling['matmul_gflops']:.0f} GFLOP/s, "
            f"copy {ceiling['copy_gb_per_s']:.1f} GB/s"
        )
    for name, counted in found.get("gflop", {}).items():
        lowered = counted["lowered"]
        told = "not counted by this platform" if lowered is None else f"{lowered:.2f}"
        print(f"{name}: {counted['paper']:.2f} GFLOP per image on paper, lowered program: {told}")
    heads = ("images/s", "min", "max", "of ceiling", "temporary MiB", "peak MiB", "compiled")
    rows = [("", *heads)]
    for batch, one in found.get("train", {}).items():
        rows.append(_row(f"train, batch {batch}", one, one))
    for batch, one in found.get("evaluate", {}).items():
        rows.append(_row(f"evaluate, batch {batch}", one["resident"], one))
        rows.append(_row("  from and to the host", one["from_host"], None))
    if len(rows) > 1:
        _rows(rows)
    if latency := found.get("latency_ms"):
        print("one image, ms: " + ", ".join(f"{n} {latency[n]:.2f}" for n in ("p50", "p90", "p99")))
    for name, seconds in found.get("compile_seconds", {}).items():
        print(
            f"compile {name}: {seconds['cold']:.1f} s cold, {seconds['warm']:.1f} s from the cache"
        )
    if whole := found.get("with_metrics"):
        seconds = whole["forward_seconds"], whole["metrics_seconds"]
        print(
            f"evaluation of {whole['images']} images: maps and scores {seconds[0]:.1f} s, "
            f"metrics {seconds[1]:.1f} s, {whole['images'] / sum(seconds):.1f} images/s"
        )
    if "recipe" in found:
        phases = {k: v for k, v in found["recipe"].items() if k != "images"}
        words = ", ".join(f"{k.removesuffix('_seconds')} {v:.1f}" for k, v in phases.items())
        print(f"whole run, seconds: {words}")


def _row(name: str, one: dict, program: dict | None) -> tuple[str, ...]:
    rate = [f"{one['images_per_second'][key]:.1f}" for key in ("median", "min", "max")]
    share = f"{100 * one['of_ceiling']:.0f} %" if "of_ceiling" in one else ""
    if program is None:
        return (name, *rate, share, "", "", "")
    memory = (program["memory"][f"{key}_mib"] for key in ("temporary", "peak"))
    used = ("" if mib is None else f"{mib:.0f}" for mib in memory)
    return (name, *rate, share, *used, f"{program['compilations']} x")


def versus(found: dict) -> None:
    """Prints the rates of both sides and their ratios."""
    rows = [("", "images/s", "min", "max", "ours / it")]
    for name, sides in found.items():
        for side, one in sides.items():
            numbers = [f"{one[key]:.1f}" for key in ("median", "min", "max")]
            ratio = f"{one['ratio']:.2f}" if "ratio" in one else ""
            rows.append((f"{name}, {side}", *numbers, ratio))
    if len(rows) > 1:
        _rows(rows)


def _rows(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        print("  ".join(cells).rstrip())
