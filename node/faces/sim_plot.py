"""A figure of a simulation: timeouts and value kept, by policy and load. Needs the extra ``plot``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coordinator.virtual.study import Cell
from mesh.errors import ConfigError
from node.faces.sim_table import load_words

__all__ = ["plot", "require_matplotlib"]

_PANELS = (("timeouts", "tasks that missed their deadline, %"), ("value_kept", "value kept, %"))


def require_matplotlib() -> None:
    """Before anything long is begun.

    Raises:
        ConfigError: It is not installed; says how to.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--plot draws with matplotlib, which cannot be loaded here ({error}): "
            "install it with `pip install 'edgemesh[plot]'`, or leave --plot out"
        ) from error


def plot(cells: Sequence[Cell], title: str, path: Path) -> None:
    """Write the figure; the same cells give the same bytes.

    Raises:
        ConfigError: The file cannot be written, or its ending is no image format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys((cell.mesh, cell.load) for cell in cells))
    policies = list(dict.fromkeys(cell.policy for cell in cells))
    by_place = {(cell.mesh, cell.load, cell.policy): cell for cell in cells}
    width_in = max(8.0, 1.5 + 0.22 * len(groups) * (len(policies) + 1.5))
    figure = Figure(figsize=(width_in, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    colours = _colours(policies)
    axes: Any = figure.subplots(2, 1, sharex=True)
    bar = 0.85 / len(policies)
    for axis, (metric, label) in zip(axes, _PANELS, strict=True):
        for k, policy in enumerate(policies):
            found = [by_place[mesh, load, policy].over_seeds(metric) for mesh, load in groups]
            at = [group + (k - (len(policies) - 1) / 2) * bar for group in range(len(groups))]
            axis.bar(
                at,
                [100 * one.mean for one in found],
                bar * 0.92,
                yerr=[100 * one.half for one in found] if any(one.half for one in found) else None,
                error_kw={"elinewidth": 1, "ecolor": "0.25"},
                label=policy,
                color=colours[policy],
                hatch="//" if "+" in policy else None,
                edgecolor="white",
                linewidth=0.5,
            )
        axis.set_ylabel(label)
        axis.set_ylim(0, 100 if metric == "value_kept" else min(100, axis.get_ylim()[1]))
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    has_meshes = len({mesh for mesh, _ in groups}) > 1
    names = [f"load {load_words(load)}" + (f"\n{mesh}" if has_meshes else "") for mesh, load in groups]
    axes[1].set_xticks(range(len(groups)), names)
    figure.suptitle(title, fontsize="medium")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(int(width_in // 2.2), len(policies)),
        frameon=False,
    )
    try:
        # Without the version of matplotlib and the date: the same cells, the same bytes.
        figure.savefig(path, dpi=120, metadata={"Software": None} if path.suffix == ".png" else None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write the figure {path}: {error}") from error


def _colours(policies: Sequence[str]) -> dict[str, str]:
    """One colour for a policy and all its variants; variants are hatched."""
    bases = list(dict.fromkeys(_base(policy) for policy in policies))
    wheel = [f"C{k}" for k in range(10)]
    return {policy: wheel[bases.index(_base(policy)) % len(wheel)] for policy in policies}


def _base(policy: str) -> str:
    return policy.partition("+")[0]
