"""The report's pictures."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def scatter(path: Path, points: Mapping[str, tuple[float, float]], title: str, x_label: str, y_label: str) -> None:
    """Named points, the error on a logarithmic axis."""
    figure, axes = _axes(title, x_label, y_label)
    for name, (x, y) in points.items():
        ours = name.startswith("ours")
        axes.plot(x, y, "o", color="#c2410c" if ours else "#1d4ed8")
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(6, -12 if ours else 4), fontsize=8)
    axes.set_yscale("log")
    axes.margins(x=0.3, y=0.15)
    figure.savefig(path, dpi=120)


def lines(path: Path, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str, x_label: str,
          y_label: str, log_x: bool = False) -> None:  # fmt: skip
    """One line for each name."""
    figure, axes = _axes(title, x_label, y_label)
    for name, (x, y) in series.items():
        axes.plot(x, y, "o-", label=name)
    if log_x:
        axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


def curves(path: Path, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str, x_label: str,
           y_label: str) -> None:  # fmt: skip
    """Thin lines, dashed for every second name, over values that are far from zero."""
    figure, axes = _axes(title, x_label, y_label)
    for number, (name, (x, y)) in enumerate(series.items()):
        axes.plot(x, y, "--" if number % 2 else "-", label=name, linewidth=1.2)
    lowest = min(min(y) for _, y in series.values())
    highest = max(y[min(5, len(y) - 1)] for _, y in series.values())
    axes.set_ylim(lowest - 0.05 * (highest - lowest), highest)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


def bars(path: Path, groups: Mapping[str, Mapping[str, float]], title: str, x_label: str) -> None:
    """Horizontal bars: a group for each name, a bar for each of its entries."""
    pyplot_figure = importlib.import_module("matplotlib.figure").Figure
    names = list(groups)
    series = list(dict.fromkeys(entry for group in groups.values() for entry in group))
    figure = pyplot_figure(figsize=(9, 0.42 * len(names) + 1.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(series)
    for number, entry in enumerate(series):
        places = [index + number * width for index in range(len(names))]
        axes.barh(places, [groups[name].get(entry, 0.0) for name in names], width, label=entry)
    axes.set_yticks([index + 0.4 - width / 2 for index in range(len(names))], names, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel=x_label, title=title)
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


def _axes(title: str, x_label: str, y_label: str) -> tuple[Any, Any]:
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    return figure, axes
