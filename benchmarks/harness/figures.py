"""Pictures of results."""

from pathlib import Path


def draw_bars(
    path: Path,
    labels: list[str],
    values: dict[str, list[float]],
    *,
    title: str,
    unit: str,
    limit: float | None = None,
    height: float = 0.45,
) -> None:
    """A group of horizontal bars for each label, with a bar of each contender's value."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, height * len(labels) + 1.2), layout="constrained")
    bar = 0.8 / len(values)
    for i, (name, each) in enumerate(values.items()):
        places = [y + (i - len(values) / 2 + 0.5) * bar for y in range(len(labels))]
        axes.barh(places, each, bar, label=name)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(0, limit)
    axes.set_xlabel(unit)
    axes.set_title(title, fontsize=9)
    figure.legend(fontsize=8, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)
    plt.close(figure)
