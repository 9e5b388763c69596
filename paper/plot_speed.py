"""Figures of bench/train.py's JSON and of training logs: speed, memory, and the training loss.

    LoRA, ours   ########## 2.5k     Bars are one setting each (speed). Lines are by batch size as
    LoRA, peer   #### 1k             in the paper's figure S10 (throughput): ours are solid, the
    full, ours   ######## 2k         peer's dashed.
"""
import statistics
from collections import defaultdict

from paper.looks import (CHANCE, OTHERS, grid_of, method_name, name_end, powers_axis, short,
                         style_of, token_ticks)
from paper.results import number, problems, setting_of

LABELS = {"tok_per_s": "tokens a second", "peak_gb": "peak memory, GB"}


# ----------------------------------------------------------------------------- training logs
def draw_training(all_runs):
    """Loss of the training steps and its running median: a panel for each dataset, in it the
    longest run of each rank.

    A base that was pretrained beside its finetuned runs is left out: it saw other data."""
    finetuned = [run for run in all_runs if run.config and not run.config.get("scratch")]
    # of each dataset and rank the run that trained on most tokens
    longest = defaultdict(dict)  # {dataset: {rank: [(tokens, loss)]}}
    left_out = 0
    for run in finetuned or all_runs:
        line = loss_line(run.log)
        if not line:
            continue
        of_data = longest[setting_of(run).dataset]
        rank = run.config.get("lora_rank") or 0
        tokens, _ = line[-1]
        left_out += rank in of_data
        if rank not in of_data or tokens > of_data[rank][-1][0]:
            of_data[rank] = line
    if not longest:
        return None
    if left_out > 0:
        problems[f"training loss: the longest run of each rank; runs left out: {left_out}"] = 1

    fig, axes = grid_of(len(longest), height=2.4)
    for ax, (dataset, lines) in zip(axes, sorted(longest.items())):
        draw_losses(ax, lines)
        if len(longest) > 1:
            ax.set_title(dataset)
    return fig


def draw_losses(ax, lines):
    """Each loss and its running median; lines {rank: [(tokens, loss)]}."""
    for rank, line in sorted(lines.items()):
        colour = style_of(rank, lines)["color"]
        tokens, losses = zip(*line)
        # the median of a window of a tenth of the run
        width = max(1, len(losses) // 20)
        smooth = []
        for i in range(len(losses)):
            window = losses[max(0, i - width):i + width + 1]
            smooth.append(statistics.median(window))
        ax.plot(tokens, losses, color=colour, lw=0.5, alpha=0.3)
        ax.plot(tokens, smooth, color=colour)
        name_end(ax, tokens[-1], smooth[-1], method_name(rank), colour)
    token_ticks(ax)
    ax.set(xlabel="tokens", ylabel="training loss")


def loss_line(log):
    """[(tokens, loss)] of the steps that were logged with both."""
    line = []
    for entry in log:
        if number(entry.get("tokens")):
            loss = number(entry.get("loss"))
            if loss is not None:
                line.append((entry["tokens"], loss))
    return line


# ----------------------------------------------------------------------------- bars
def draw_speed(all_runs, tables):
    """Tokens a second and peak memory, of the benches (ours and the peer's) and of the runs."""
    bars = [*bench_bars(tables), *run_bars(all_runs)]
    bars = [bar for bar in bars if bar["tok_per_s"] is not None]
    if not bars:
        return None

    # bars of one group touch; a gap sets the groups apart
    places = []
    bottom = 0.0
    for i, bar in enumerate(bars):
        if i and bar["group"] != bars[i - 1]["group"]:
            bottom += 0.6
        places.append(bottom)
        bottom += 1
    fig, axes = grid_of(2, height=0.55 + 0.21 * bottom, sharey=True)
    for ax, (column, label) in zip(axes, LABELS.items()):
        for y, bar in zip(places, bars):
            value = bar[column]
            if value is not None:
                ax.barh(y, value, color=bar["color"], height=0.8)
                ax.annotate(f" {short(value)}", (value, y), va="center", fontsize=7)
        ax.set(xlabel=label)
        ax.margins(x=0.15)
        ax.grid(axis="y", visible=False)
    axes[0].set_yticks(places, [f"{bar['group']}, {bar['name']}" for bar in bars])
    axes[0].invert_yaxis()
    return fig


def bench_bars(tables):
    """A bar for each part of bench/train.py and each side of it, ours and the peer's."""
    bars = []
    for table in tables:
        for part, sides in (table.get("results") or {}).items():
            if not isinstance(sides, dict):
                continue
            for side, found in sides.items():
                if not isinstance(found, dict):
                    problems["parts of benches without speed and memory"] += 1
                    continue
                ours = side == "ours"
                name = "ours" if ours else "transformers + peft"
                if side == "compiled":
                    name += ", compiled"
                bars.append({"group": part,
                             "name": name,
                             "color": OTHERS[3] if ours else CHANCE,
                             "tok_per_s": number(found.get("tok_per_s")),
                             "peak_gb": number(found.get("peak_gb"))})
    return bars


def run_bars(all_runs):
    """A bar for each rank: medians of speed over steps and runs, the highest memory of all."""
    speeds = defaultdict(list)
    memory = defaultdict(list)
    for run in all_runs:
        # the steps that were logged with their speed
        steps = [line for line in run.log if number(line.get("tok_per_s")) is not None]
        if steps:
            rank = run.config.get("lora_rank") or 0
            # a run's usual speed, and all of its memory readings
            speeds[rank].append(statistics.median(line["tok_per_s"] for line in steps))
            memory[rank] += [number(line.get("peak_gb")) or 0 for line in steps]
    bars = []
    for rank in sorted(speeds):
        bars.append({"group": "train.py",
                     "name": method_name(rank),
                     "color": style_of(rank, speeds)["color"],
                     "tok_per_s": statistics.median(speeds[rank]),
                     "peak_gb": max(memory[rank])})
    return bars


# ----------------------------------------------------------------------------- lines by batch size
def draw_throughput(tables):
    """Figure S10: tokens a second and peak memory by batch size, of the part `training` of benches.

    A row of panels for each sequence length and form of checkpointing, a line for each method."""
    records = training_records(tables)
    settings = {(record["seq_len"], record["checkpointing"]) for record in records}
    if not settings:
        return None
    # longest rows first, and without checkpointing before with it
    settings = sorted(settings, key=lambda setting: (-setting[0], setting[1] != "none"))
    ranks = {record["rank"] for record in records}

    fig, axes = grid_of(2 * len(settings), height=2.4)
    for i, (seq_len, checkpointing) in enumerate(settings):
        # a row of two panels: speed and memory
        mine = []
        for record in records:
            if (record["seq_len"], record["checkpointing"]) == (seq_len, checkpointing):
                mine.append(record)
        for ax, (column, label) in zip(axes[2 * i:], LABELS.items()):
            draw_batch_lines(ax, mine, column, ranks)
            ax.set(xlabel="batch size, of which this GPU takes an eighth", ylabel=label,
                   ylim=(0, 1.3 * ax.get_ylim()[1]),
                   title=f"{seq_len:,} tokens a row, checkpointing {checkpointing}")

    # what was measured, above all panels
    devices = {str(table.get("device")) for table in tables}
    shapes = set()
    for record in records:
        shapes.add(f"{record['layers']} of {record['of_layers']} blocks of {record['shape']}")
    fig.suptitle(f"{', '.join(sorted(devices))}; {', '.join(sorted(shapes))}", fontsize=8)
    return fig


def training_records(tables):
    """The records of the benches' part `training`; those that failed are left out with a note."""
    records = []
    for table in tables:
        results = table.get("results")
        of_table = results.get("training") if isinstance(results, dict) else None
        for record in of_table or ():
            if "failed" in record:
                what = (f"{record['side']} {method_name(record['rank'])}, batch {record['batch']}, "
                        f"{record['seq_len']} tokens, checkpointing {record['checkpointing']}")
                problems[f"{what}: {record['failed']}, left out"] += 1
            if number(record.get("tok_per_s")) is not None:
                records.append(record)
    return records


def draw_batch_lines(ax, records, column, ranks):
    """One quantity by batch size: a line for each side and rank."""
    lines = defaultdict(list)
    for record in records:
        if number(record[column]) is not None:
            line = lines[record["side"], record["rank"]]
            line.append((record["batch"], record[column]))
    # the peer's lines are dashed and pale
    for (side, rank), line in sorted(lines.items()):
        line.sort()
        style = style_of(rank, ranks)
        name = method_name(rank)
        if side != "ours":
            style.update(ls="--", alpha=0.6)
            name = f"peer {name}"
        ax.plot(*zip(*line), **style)
        name_end(ax, *line[-1], name, style["color"])
    powers_axis(ax, [record["batch"] for record in records])
