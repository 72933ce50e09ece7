"""The picture of `moe_ext.monitor`: experts over time for every layer, and curves beside them."""

import math
from pathlib import Path

MOST_HEAT_MAPS = 12
MOST_COLUMNS = 400  # of a heat map: records of a long run, evenly taken


def _layout(record: dict) -> list[tuple[str, int]]:
    """The layers' names and numbers of experts."""
    return [(layer["name"], len(layer["tokens_per_expert"])) for layer in record["layers"]]


def _heat_map(axis, records: list[dict], index: int):
    """Load of every expert over the mean, logarithmic, so that half and twice look alike."""
    from matplotlib.colors import LogNorm

    loads = []
    for record in records:
        counts = record["layers"][index]["tokens_per_expert"]
        mean = max(sum(counts) / len(counts), 1e-9)
        loads.append([max(count / mean, 0.1) for count in counts])
    image = axis.imshow(
        list(zip(*loads, strict=True)),
        aspect="auto",
        cmap="RdBu_r",
        norm=LogNorm(0.25, 4),
        interpolation="nearest",
        extent=(
            records[0]["step"] - records[0]["steps"],
            records[-1]["step"],
            len(loads[0]) - 0.5,
            -0.5,
        ),
    )
    axis.set_ylabel("expert", fontsize=8)
    axis.set_title(records[0]["layers"][index]["name"], fontsize=8, loc="left", pad=2)
    axis.tick_params(labelsize=7)
    return image


def _draw_heat_maps(figure, records: list[dict]) -> None:
    """The experts of every layer over time; of a deep model, of layers spread over its depth."""
    count = len(records[0]["layers"])
    last = MOST_HEAT_MAPS - 1
    shown = sorted({round(i * (count - 1) / last) for i in range(MOST_HEAT_MAPS)})
    if count <= MOST_HEAT_MAPS:
        shown = list(range(count))
    maps = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axis, index in zip(maps, shown, strict=True):
        image = _heat_map(axis, records, index)
    maps[-1].set_xlabel("step")
    bar = figure.colorbar(image, ax=list(maps), extend="both", aspect=40, pad=0.01)
    bar.set_ticks([0.25, 0.5, 1, 2, 4], labels=["1/4", "1/2", "1", "2", "4"])
    bar.minorticks_off()
    bar.set_label("load over the mean")


def _draw_curves(figure, records: list[dict]) -> None:
    """Load, entropy where it is known, drops where there are any, and speed."""
    from matplotlib import colormaps

    steps = [record["step"] for record in records]
    layers = range(len(records[0]["layers"]))

    def series(name: str, index: int) -> list[float]:
        values = [record["layers"][index][name] for record in records]
        return [math.nan if value is None else value for value in values]

    drops = any(any(series("dropped", i)) for i in layers)
    entropies = not all(math.isnan(value) for i in layers for value in series("entropy", i))
    panels = ["load", *["entropy"] * entropies, *["drops"] * drops, "speed"]
    axes = dict(zip(panels, figure.subplots(len(panels), 1, sharex=True), strict=True))
    colors = [colormaps["viridis"](i / max(len(layers) - 1, 1)) for i in layers]
    for i in layers:
        name = records[0]["layers"][i]["name"]
        axes["load"].plot(steps, series("max_over_mean", i), color=colors[i], label=name)
        axes["load"].plot(steps, series("min_over_mean", i), color=colors[i], linestyle=":")
        if entropies:
            axes["entropy"].plot(steps, series("entropy", i), color=colors[i])
        if drops:
            axes["drops"].plot(steps, [100 * x for x in series("drop_rate", i)], color=colors[i])
    axes["load"].axhline(1, color="0.6", linewidth=0.8)
    axes["load"].set(ylabel="load / mean", title="busiest expert (solid), idlest (dotted)")
    if len(layers) <= MOST_HEAT_MAPS:
        axes["load"].legend(fontsize=7, ncols=4)
    if entropies:
        axes["entropy"].set(ylabel="entropy / log E", ylim=(0, 1.02), title="router's entropy")
    if drops:
        axes["drops"].set(ylabel="%", title="slots dropped")
    axes["speed"].plot(steps, [record["tokens_per_second"] for record in records])
    final = records[-1]
    axes["speed"].set(
        ylabel="tokens/s",
        xlabel="step",
        title=f"speed; step P50 {final['step_ms']['p50']:.0f}, P95 {final['step_ms']['p95']:.0f}, "
        f"P99 {final['step_ms']['p99']:.0f} ms; {final['flops_utilization']:.0%} of peak FLOP/s",
    )
    axes["speed"].set_ylim(bottom=0)
    for axis in axes.values():
        axis.grid(alpha=0.3)
        axis.title.set_fontsize(9)


def draw(records: list[dict], path: str | Path) -> None:
    """Writes the picture of the records of one run, those with the layers of the last one. Raises
    ValueError if there are none."""
    if not records:
        raise ValueError("Monitor.draw: there must be at least one record, got none")
    records = [record for record in records if _layout(record) == _layout(records[-1])]
    from matplotlib.figure import Figure  # not pyplot, which would choose a backend for the user

    shown = min(len(records[0]["layers"]), MOST_HEAT_MAPS)
    figure = Figure(figsize=(13, max(6.5, 1.1 * shown + 1)), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.15, 1])
    _draw_heat_maps(left, records)
    _draw_curves(right, records)
    figure.savefig(path, dpi=110)
