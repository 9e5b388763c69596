r"""
The paper's claims, one by one, over any runs: each holds, does not hold, or cannot be told.

    python -m paper.claims --runs='out/claims/*/*' --learning='loss target' \
        --forgetting='loss source'
    python -m paper.claims --runs='out/smollm2/*' --learning='loss gsm8k_test' \
        --forgetting=hellaswag

    | C1 Full finetuning learns more ... | full - LoRA r=4 | +0.449 ± 0.025 (n=5) | holds |
                                mean over 5 seeds of the difference, 95% interval

A run is a folder of train.py. The runs of one seed are compared with one another, and a number is
the mean over seeds of their difference, with its 95% interval (Student's t). With one seed or two
the interval is that of the evaluation's items: the same ones in both runs, so of their differences
(values.jsonl; without it the errors of the two are taken as independent). It says nothing about
other seeds. A loss from train.py's log has no items, and a claim without an interval cannot be
told. A claim holds where the whole interval does. What a run began with is its base's folder beside
it, or step 0 of its log for what train.py logged. All at the longest duration.

A method that was trained at several learning rates is compared at its best one, and at equal
learning at the one that forgot least. Where the best does not lie inside the sweep, nothing that
rests on it can be told (paper/sweeps.py).
"""
import math
import statistics
from typing import NamedTuple

from configurator import configure
from paper.changes import combine, folders_of, measure_runs, spared
from paper.results import (REGULARISERS, mean_of_seeds, problems, read_json, regularised,
                           setting_of, spectrum_fault, targets_name, trained_numbers)
from paper.sweeps import bests_of_seeds, factor_words, is_best, mean_factor, mean_losses
from runtime import one_line_errors

# -----------------------------------------------------------------------------
runs = ()                # run folders, or globs of them
# metrics; 'loss NAME' is of eval_loss.py or train.py's val_data
learning = 'gsm8k_strict_match'   # of what was learned
forgetting = 'forgetting'         # of what was forgotten
fraction = '0.9'         # of the squares, for the effective rank in spectrum.json

# places in a run's pair of Changes
LEARNED = 0
FORGOT = 1

SAME_SIZE = 0.05         # adapters differ by less than this share


class Method(NamedTuple):
    """What is compared: full finetuning (rank 0) or LoRA, and what makes it other than plain."""
    rank: int
    variant: str  # '' | 'weight decay' | 'attention dropout' | 'attention' | 'mlp'

    def __str__(self):
        name = f"LoRA r={self.rank}" if self.rank else "full"
        return f"{name}, {self.variant}" if self.variant else name


# ----------------------------------------------------------------------------- reading
def method_of(config):
    """The Method of a run's knobs; None for what the claims do not speak of."""
    rank = config.get("lora_rank") or 0
    # what sets it apart from the plain form; two such things are more than a claim speaks of
    variants = [name.replace("_", " ") for name in regularised(config)]
    if rank:
        targets = targets_name(config.get("lora_targets", "all"))
        if targets != "all":
            variants.append(targets)
    if len(variants) > 1:
        return None
    return Method(rank, variants[0] if variants else "")


def read_runs(folders, learning, forgetting, fraction):
    """What each run learned and forgot, and the effective rank of its change.

    Returns {(seed, method, steps): {rate: (learned, forgot)}} at each run's end, both a Change,
    {(seed, method, steps, rate): effective rank} and {method: numbers in its adapter}. Raises
    ValueError where two runs are of one seed, method, length and learning rate, where a method's
    runs differ in another knob, or a metric is missing."""
    changes = {}
    ranks = {}
    sizes = {}
    first = {}  # {method: its first run}
    for measured in measure_runs(folders, learning, forgetting):
        folder, run, steps, learned, forgot = measured
        method = method_of(run.config)
        if method is None:
            continue  # nothing that the claims speak of
        check_same_setting(measured, first.setdefault(method, measured), method)
        # one run a seed, method, length and rate
        by_rate = changes.setdefault((measured.seed, method, steps), {})
        if measured.rate in by_rate:
            raise ValueError(f"{folder}: a second run of {method}, {steps} steps, seed "
                             f"{measured.seed} and learning rate {measured.rate:g}")
        by_rate[measured.rate] = learned, forgot
        rank = rank_of_change(folder, steps, fraction)
        if rank is not None:
            ranks[measured.seed, method, steps, measured.rate] = rank
        if method.rank and method not in sizes:
            size = trained_numbers(folder)
            if size:
                sizes[method] = size
    return changes, ranks, sizes


def check_same_setting(measured, other, method):
    """Raise ValueError for two runs of a method that differ in more than rate, length and seed.

    Each seed may have a base of its own."""
    mine, theirs = setting_of(measured.run), setting_of(other.run)
    pairs = [("lora_alpha", mine.alpha, theirs.alpha)]
    for (knob, value), (_, their_value) in zip(mine.other, theirs.other):
        # regularisers are in the method, and off where they are too small to count
        if knob != "learning_rate" and knob not in REGULARISERS:
            pairs.append((knob, value, their_value))
    if measured.seed == other.seed:
        pairs.append(("base", measured.run.config.get("base"), other.run.config.get("base")))
    for knob, value, their_value in pairs:
        if value != their_value:
            raise ValueError(f"{measured.folder} and {other.folder} are both {method}, but one has "
                             f"{knob}={value}, the other {their_value}; name the runs of one of "
                             "them in --runs")


def rank_of_change(folder, steps, fraction):
    """The mean effective rank of W - W0 over all matrices, of spectrum.json; None without it."""
    path = folder / "spectrum.json"
    if not path.is_file():
        return None
    content = read_json(path)
    fault = spectrum_fault(content, ("matrix", "effective_rank"))
    if fault:
        problems[f"{path}: no whole spectrum ({fault}), left out"] += 1
        return None
    # the matrices of the checkpoint at this step
    made = []
    for i, checkpoint in enumerate(content["checkpoints"]):
        if checkpoint.get("step") == steps:
            made.append(i)
    found = []
    for matrix in content["matrices"]:
        if matrix["matrix"] == "D" and matrix["checkpoint"] in made:
            found.append(matrix["effective_rank"])
    if not found:
        problems[f"{folder}: spectrum.json is not of step {steps}, left out"] += 1
        return None
    if fraction not in found[0]:
        raise ValueError(f"fraction: {path} has {', '.join(found[0])}, not {fraction!r}")
    return statistics.fmean(of_matrix[fraction] for of_matrix in found)


# ----------------------------------------------------------------------------- numbers and verdicts
def verdict(mean, half, least=0.0):
    """Is the value above `least`? half: half the width of its 95% interval, or None."""
    if half is None or not abs(mean - least) > half:
        return "cannot be told"
    return "holds" if mean > least else "does not hold"


def add_row(rows, what, pairs, least=0.0, unsure=()):
    """Add (what, numbers, verdict) of a difference that the claim says is above `least`.

    pairs [(value, stderr or None)] of the seeds; where no seed has it there is no row. unsure: the
    methods in it whose best learning rate is not known."""
    if not pairs:
        return
    mean, half = mean_of_seeds(pairs)
    interval = "" if half is None else f" ± {half:.3f}"
    said = verdict(mean, half, least)
    if unsure:
        names = " and ".join(map(str, unsure))
        said = f"cannot be told: the best rate of {names} is not inside the sweep"
    rows.append((what, f"{mean:+.3f}{interval} (n={len(pairs)})", said))


# ----------------------------------------------------------------------------- learning rates
def losses_of(changes, method, steps):
    """{seed: {rate: loss less the base's}} of a method and length."""
    found = {}
    for (seed, other, length), by_rate in changes.items():
        if (other, length) == (method, steps):
            found[seed] = {rate: -learned.value for rate, (learned, _) in by_rate.items()}
    return found


def choose_rates(changes, steps):
    """({method: the rate of its lowest mean loss}, the methods whose best is not inside)."""
    chosen = {}
    unsure = set()
    for method in sorted({method for _, method, length in changes if length == steps}):
        of_seeds = list(losses_of(changes, method, steps).values())
        losses = mean_losses(of_seeds)
        if not losses:
            raise ValueError(f"{method}: its seeds share no learning rate at {steps} steps")
        chosen[method] = min(losses, key=losses.get)
        if not is_best(chosen[method], of_seeds):
            unsure.add(method)
    return chosen, unsure


def rate_rows(changes, steps):
    """[(method, best rate, its ratio to full finetuning's)] in words, of what was swept."""
    bests = {}  # {method: {seed: rate}}, None where it is not known
    for method in sorted({method for _, method, length in changes if length == steps}):
        of_seeds = {}
        for seed, losses in losses_of(changes, method, steps).items():
            if len(losses) > 1:
                of_seeds[seed] = losses
        if of_seeds:
            found = bests_of_seeds(list(of_seeds.values()))
            bests[method] = found and {seed: best.rate for seed, best in zip(of_seeds, found)}
    full = bests.get(Method(0, ""))
    rows = []
    for method, found in bests.items():
        if found is None:
            rows.append((str(method), "not inside the sweep", ""))
            continue
        ratio = ""
        if method.rank and full and full.keys() & found.keys():
            # of the seeds that both have
            ratios = [found[seed] / full[seed] for seed in sorted(full.keys() & found.keys())]
            ratio = factor_words(*mean_factor(ratios))
        rows.append((str(method), factor_words(*mean_factor(list(found.values()))), ratio))
    return rows


def lines_of(changes, seed, method):
    """The lines of spared: a method's points by length at each rate, and by rate at each length."""
    points = {}  # {(rate, steps): (learned, forgot)}
    for (other_seed, other, steps), by_rate in changes.items():
        if (other_seed, other) == (seed, method):
            points.update({(rate, steps): pair for rate, pair in by_rate.items()})
    rates = sorted({rate for rate, _ in points})
    lengths = sorted({steps for _, steps in points})
    lines = []
    for rate in rates:
        line = [points[rate, steps] for steps in lengths if (rate, steps) in points]
        if len(line) > 1 or len(rates) == 1:
            lines.append(line)
    for steps in lengths:
        line = [points[rate, steps] for rate in rates if (rate, steps) in points]
        if len(line) > 1:
            lines.append(line)
    return lines


# ----------------------------------------------------------------------------- the claims
def differences(ends, first, second, column):
    """[(value, stderr)] of how much more one method learned or forgot than another, one a seed.

    ends {(seed, method): (learned, forgot)}; column LEARNED or FORGOT."""
    found = []
    for (seed, method), changes in ends.items():
        if method == first and (seed, second) in ends:
            pair = [changes[column], ends[seed, second][column]]
            difference = combine([1, -1], pair)
            found.append((difference.value, difference.stderr))
    return found


def differences_at_equal_learning(changes, ends, method, lora):
    """[(value, stderr)] of how much more a method had forgotten when both had learned as much as
    the one that learned less, one a seed."""
    found = []
    for (seed, other), mine in ends.items():
        theirs = ends.get((seed, method))
        if other != lora or theirs is None:
            continue
        if mine[LEARNED].value <= theirs[LEARNED].value:
            more = spared(lines_of(changes, seed, method), mine)
        else:
            less = spared(lines_of(changes, seed, lora), theirs)
            more = less and (-less[0], less[1])
        if more is not None:
            found.append(more)
    return found


def rows_by_rank(ends, untold, plain, loras, column):
    """Full finetuning above each LoRA, and each LoRA above the one of the next lower rank."""
    pairs = [(plain, lora) for lora in loras]
    pairs += [(higher, lower) for lower, higher in zip(loras, loras[1:])]
    rows = []
    for more, less in pairs:
        unsure = [method for method in (more, less) if method in untold]
        add_row(rows, f"{more} - {less}", differences(ends, more, less, column), unsure=unsure)
    return rows


def rows_at_equal_learning(changes, ends, untold, methods, loras):
    """Each of the methods above each LoRA in what was forgotten at equal learning."""
    rows = []
    for method in methods:
        for lora in loras:
            unsure = [one for one in (method, lora) if one in untold]
            found = differences_at_equal_learning(changes, ends, method, lora)
            add_row(rows, f"{method} - {lora}", found, unsure=unsure)
    return rows


def ratios_of_rank(ends, ranks, plain, loras):
    """[(effective rank of full finetuning's change / rank of the LoRA that learned most nearly as
    much, None)], one a seed. ranks {(seed, method): effective rank}."""
    found = []
    for (seed, method), (learned, _) in ends.items():
        # how far each LoRA of this seed is from it in learning
        distances = {}
        for lora in loras:
            if (seed, lora) in ends:
                distances[lora] = abs(ends[seed, lora][LEARNED].value - learned.value)
        if method == plain and (seed, plain) in ranks and distances:
            nearest = min(distances, key=distances.get)
            found.append((ranks[seed, plain] / nearest.rank, None))
    return found


def rows_of_modules(ends, untold, methods, sizes):
    """MLP adapters above those on attention, of equal rank and of equal size, and all above MLP.

    sizes {method: trained numbers}. Returns both lists of rows."""
    over_attention = []
    over_mlp = []
    attentions = [method for method in methods if method.variant == "attention"]
    for mlp in [method for method in methods if method.variant == "mlp"]:
        for attention in attentions:
            same_size = abs(math.log(sizes.get(mlp, 1) / sizes.get(attention, 1))) < SAME_SIZE
            if mlp.rank == attention.rank:
                what = f"mlp - attention, r={mlp.rank}"
            elif mlp in sizes and attention in sizes and same_size:
                what = f"mlp r={mlp.rank} - attention r={attention.rank}, of equal size"
            else:
                continue
            unsure = [method for method in (mlp, attention) if method in untold]
            add_row(over_attention, what, differences(ends, mlp, attention, LEARNED), unsure=unsure)
        everything = Method(mlp.rank, "")
        unsure = [method for method in (everything, mlp) if method in untold]
        add_row(over_mlp, f"all - mlp, r={mlp.rank}", differences(ends, everything, mlp, LEARNED),
                unsure=unsure)
    return over_attention, over_mlp


def claims(changes, ranks, sizes):
    """[(claim, [(what, numbers, verdict)])] from what read_runs returns."""
    # the longest runs, each method at its best rate, and the methods that there are
    longest = max(steps for _, _, steps in changes)
    chosen, untold = choose_rates(changes, longest)
    ends = {}
    ranks_of_ends = {}
    for (seed, method, steps), by_rate in changes.items():
        rate = chosen.get(method)
        if steps == longest and rate in by_rate:
            ends[seed, method] = by_rate[rate]
            if (seed, method, steps, rate) in ranks:
                ranks_of_ends[seed, method] = ranks[seed, method, steps, rate]
    methods = sorted({method for _, method, _ in changes})
    plain = Method(0, "")
    loras = [method for method in methods if method.rank and not method.variant]
    regularised = [method for method in methods if not method.rank and method.variant]

    at_equal_learning = rows_at_equal_learning(changes, ends, untold, [plain], loras)
    with_regulariser = rows_at_equal_learning(changes, ends, untold, regularised, loras)
    of_ranks = []
    add_row(of_ranks, "effective rank / r", ratios_of_rank(ends, ranks_of_ends, plain, loras),
            least=10.0, unsure=sorted(untold & {plain, *loras}))
    over_attention, over_mlp = rows_of_modules(ends, untold, methods, sizes)

    return [
        ("C1 Full finetuning learns more than LoRA, and LoRA the more the higher its rank",
         rows_by_rank(ends, untold, plain, loras, LEARNED)),
        ("C2 Full finetuning forgets more than LoRA, and LoRA the more the higher its rank",
         rows_by_rank(ends, untold, plain, loras, FORGOT)),
        ("C2 At equal learning full finetuning has forgotten more than LoRA", at_equal_learning),
        ("C3 At equal learning full finetuning with a regulariser has forgotten more than LoRA",
         with_regulariser),
        ("C4 The change of full finetuning has at least 10 times the rank of a LoRA that learns as "
         "much", of_ranks),
        ("C5 MLP modules alone learn more than attention alone", over_attention),
        ("C5 All modules learn more than MLP alone (the paper: about the same)", over_mlp)]


def print_claims(found):
    """Print the table of [(claim, [(what, numbers, verdict) or None])], and what was not read."""
    print("| claim | | difference | |\n|---|---|---|---|")
    for claim, rows in found:
        rows = [row for row in rows if row]
        if not rows:
            print(f"| {claim} |  |  | no such runs |")
        for row in rows:
            print(f"| {claim} | {' | '.join(row)} |")
            claim = ""  # named once
    for problem, count in problems.items():
        print(f"note: {count} {problem}")


if __name__ == "__main__":
    with one_line_errors():
        configure(globals())

        folders = folders_of(runs)
        changes, ranks, sizes = read_runs(folders, learning, forgetting, fraction)
        if not changes:
            raise ValueError(f"runs: no finished run of train.py is named {', '.join(runs)}; "
                             "for those in a folder say FOLDER/*")

        # what they say
        longest = max(steps for _, _, steps in changes)
        seeds = {seed for seed, _, steps in changes if steps == longest}
        number = sum(map(len, changes.values()))
        print(f"Learned: {learning}, forgotten: {forgetting}; {number} runs, "
              f"{len(seeds)} seeds of {longest} steps\n")
        best_rates = rate_rows(changes, longest)
        if best_rates:
            print("| | best learning rate | of full finetuning's |\n|---|---|---|")
            for row in best_rates:
                print(f"| {' | '.join(row)} |")
            print()
        print_claims(claims(changes, ranks, sizes))
