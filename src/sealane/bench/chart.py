"""The bench's figures as one picture."""

from pathlib import Path
from typing import Any, Final

_COLOURS: Final = {"plain": "#8a8f98", "tls": "#c9704f", "sealane": "#2f6f9f"}
_NAMES: Final = {"plain": "QEMU plain", "tls": "QEMU TLS", "sealane": "Sealane"}


def draw(report: dict[str, Any], path: Path) -> None:
    """Total time, downtime and CPU by way and mode, medians with the spread of the totals."""
    import matplotlib  # noqa: PLC0415 - a heavy import, for this function alone

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    modes = list(report["summary"])
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 4))
    titles = ("total time, s", "downtime, ms", "CPU of all processes, core-s")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(modes)), modes)
        axis.spines[["top", "right"]].set_visible(False)
    for offset, (way, colour) in enumerate(_COLOURS.items()):
        for place, mode in enumerate(modes):
            median = report["summary"][mode]["medians"].get(way)
            if median is None:
                continue
            where = place + (offset - 1) * 0.27
            low, high = (value / 1e3 for value in median["total_ms_spread"])
            total = median["total_ms"] / 1e3
            label = _NAMES[way] if not place else None
            error = [[total - low], [high - total]]
            axes[0].bar(where, total, 0.25, color=colour, label=label, yerr=error, capsize=3)
            axes[1].bar(where, median["downtime_ms"], 0.25, color=colour)
            axes[2].bar(where, sum(median["cpu_s"].values()), 0.25, color=colour)
    axes[0].legend(frameon=False, fontsize=9)
    guest, machine = report["guest"], report["machine"]
    figure.suptitle(
        f"{guest['memory_mib']} MiB guest, {guest['fill_mib']} MiB of random data, loopback; "
        f"QEMU {machine['qemu']} ({machine['accel']}), {machine['cpus']}, pinned: {machine['pinned']}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
