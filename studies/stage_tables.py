"""Tables of the studies of one stage each, of the demo and of the scripted experts, from their JSON files."""

from collections.abc import Mapping, Sequence
from itertools import chain
from types import MappingProxyType

import torch
from labels import note, training
from table_text import difference, mean_over_seeds, over_seeds, percent, points, share, signed, table

from vlarft.statistics import Interval, bootstrap_interval, paired_difference

STARTS = {"none": "plain", "object:2.5": "objects displaced by 2.5 cm"}
NOISE = {"zero": "x_0 = 0", "sampled": "sampled x_0"}
PLAIN = {"none": "20 states a task", "all": "all 50 states"}
LIBERO_STARTS = {
    **PLAIN,
    **{f"object:{by}": f"objects displaced by {by} cm" for by in ("2.5", "5")},
    **{f"robot:{by}": f"hand displaced by {by} mm" for by in ("20", "50")},
}
LIBERO_X0 = {**NOISE, "gripper": "gripper's x_0 sampled"}
ENDS = "success", "never closed", "nothing lifted", "lifted, not placed"  # how an episode ends, in failures.py


def gates_table(*reports: dict) -> str:
    """Tabulate how well each reward ranks chunks by their true error, one row per reward, policy and world model
    (gates.py).
    """
    models = {
        "wm": "demonstrations, noisy attempts",
        "attempts": "demonstrations, noisy attempts, the policy's attempts",
    }
    models |= {"demonstrations_only": "demonstrations alone", "short": "1500 steps", "long": "13500 steps"}
    heads = "reward", "world model saw, or trained for", "seed", "the policy's chunks", "around the demonstration"
    rows = []
    runs = {name: found for report in reports for name, found in report["runs"].items()}
    for name, found in sorted(runs.items(), key=lambda item: item[0].split("/")[::-1]):
        _, seed, model, reward = name.split("/")
        shown = [f"{found[f'gate_{f}_true']:.2f} ± {found[f'gate_{f}_true_se']:.2f}" for f in ("policy", "dataset")]
        pull = [f"{m:+.2f} ± {se:.2f}" for m, se in zip(found["pull"][:3], found["pull_se"])]
        odd = f"{100 * found['odd_share']:.0f} %"
        rows.append(
            [reward.replace("r3", "R3"), models.get(model, model), seed.removeprefix("seed"), *shown, odd, *pull]
        )
    return table([*heads, "odd part", "pull to x", "y", "z"], rows)


def failures_table(files: dict[str, dict], labels: Mapping[str, str] = MappingProxyType({})) -> str:
    """Tabulate where the episodes of evaluations ended (failures.py): shares of all episodes, medians over the
    failures.

    Args:
        files: the JSON file's "files".
        labels: what a row is called, by file; the file's name otherwise.
    """
    rows = []
    for name, found in files.items():
        shares = [percent(share(found["counts"][end], found["episodes"])) for end in ENDS]
        medians = ["", ""]
        if found["closes"] is not None:
            medians = [f"{found['closes']:g}", f"{1e3 * found['late_motion']:.0f} mm"]
        rows.append([labels.get(name, name), *shares, *medians])
    return table(["policy", *ENDS, "closes", "late motion"], rows)


def sft_table(report: dict) -> str:
    """Tabulate the success of the arms of sft_study.py, and paired differences to the first."""
    rows = []
    for name, arm in report["arms"].items():
        found = arm["success"]
        apart = difference(found["only_first"], found["only_this"], found["episodes"]) if "only_this" in found else None
        cells = percent(share(found["won"], found["episodes"])), points(apart), f"{arm['val_flow_mse']:.3f}"
        rows.append([training(name), str(arm["steps"]), f"{arm['minutes']:.0f}", *cells])
    first = next(iter(report["arms"]))
    return table(["arm", "steps", "minutes", "success", f"against {first}", "held-out flow-matching loss"], rows)


def wm_table(report: dict) -> str:
    """Tabulate losses and rank correlations of the arms of wm_study.py, and the ceilings."""
    kinds = "noise 0.15", "noise 0.4", "gripper flip"

    def cells(order: dict, score: str) -> list[str]:
        frames = order["true frames"].get(score)
        state = [order["true state"][score].get(kind) for kind in ("all", *kinds)]
        return ["1" if frames is None else _correlation(frames["all"]), *map(_correlation, state)]

    rows = []
    for name, arm in report["arms"].items():
        losses = f"{arm['val_loss']:.2f} / {arm['val_shuffled_loss']:.2f}"
        own = f"{arm['near_policy']['greedy']['gate_policy_true']:.2f}"
        row = [training(name), str(arm["steps"]), f"{arm['minutes']:.0f}", losses, f"{arm['psnr_moving']:.1f} dB"]
        rows.append([*row, *cells(arm["order"], "R3 greedy"), own])
    order = next(iter(report["arms"].values()))["order"]
    for score in ("decoded frames", "true frames"):
        rows.append([f"ceiling: {score}", "", "", "", "", *cells(order, score), ""])
    heads = ["arm", "steps", "minutes", "loss, own / others' actions", "moving PSNR", "R3, true frames"]
    heads += ["R3, true state", "noise 0.15", "noise 0.4", "gripper", "the policy's chunks"]
    return table(heads, rows) + note(report["arms"])


def _correlation(found: dict[str, float] | None) -> str:
    return "" if found is None else f"{found['spearman']:.2f} ± {found['standard_error']:.2f}"


def imagination_table(report: dict) -> str:
    """Tabulate R3's rank correlations by how frames are imagined, for arms of wm_study.py."""
    heads = "arm", "chunks", "greedy", "common random numbers", "independent samples"
    rows = []
    for name in ("default", "three times as long"):
        order, near = report["arms"][name]["order"]["true state"], report["arms"][name]["near_policy"]
        perturbed = [f"{order[f'R3 {how}']['all']['spearman']:.2f}" for how in ("greedy", "common", "independent")]
        own = [f"{near[how]['gate_policy_true']:.2f}" for how in ("greedy", "common", "sample")]
        rows += [[name, "perturbed", *perturbed], [name, "the policy's", *own]]
    return table(heads, rows)


def imagination_arms_table(report: dict, arms: Sequence[str], where: str = "", seeds: str = "") -> str:
    """Tabulate single chunks and whole episodes of arms of imagination_study.py: means over seeds, for each suite.

    Args:
        report: its JSON file.
        arms: rows.
        where: only runs of this suite.
        seeds: only runs of these seeds, one digit each.
    """
    report = {
        "runs": {
            name: run
            for name, run in report["runs"].items()
            if where in name.split("/")[0] and (not seeds or name[-1] in seeds) and name.split("/")[1] in arms
        }
    }
    heads = ["suite", "arm", "seeds", "PSNR, moving pixels", "SSIM", "R3, perturbed chunks", "R3, the policy's chunks"]
    heads += ["last chunk: SSIM", "PSNR, moving pixels", "error of still pixels"]
    heads += ["tokenizer: PSNR", "error of carried pixels", "codes"]
    rows = []
    suites = dict.fromkeys(name.split("/")[0] for name in report["runs"])
    for suite in suites:
        for arm in arms:
            runs = [run for name, run in report["runs"].items() if name.rpartition("/")[0] == f"{suite}/{arm}"]
            if not runs:
                continue
            last = [run["last_chunk"] for run in runs]
            found = {
                "psnr": ([run["psnr_moving"][0] for run in runs], 1),
                "ssim": ([run["ssim"][0] for run in runs], 3),
                "r3": ([run["r3"]["spearman"] for run in runs], 2),
                "policy": ([run["r3_policy"]["gate_policy_true"] for run in runs], 2),
                "last ssim": ([chunk["imagined"]["ssim"] for chunk in last], 3),
                "last psnr": ([chunk["imagined"]["psnr_moving"] for chunk in last], 1),
                "still": ([chunk["imagined"]["still_error"] for chunk in last], 4),
                "tokenizer": ([run["tokenizer_psnr_moving"] for run in runs], 1),
                "carried": ([run["carried_error"][0] for run in runs], 2),
                "codes": ([run["codes"] for run in runs], 0),
            }
            rows.append([suite, arm, str(len(runs)), *(over_seeds(*values) for values in found.values())])
        copies = [run for name, run in report["runs"].items() if name.startswith(f"{suite}/")]
        last = [run["last_chunk"]["copy"] for run in copies]
        columns = {
            "psnr": ([run["psnr_moving"][1] for run in copies], 1),
            "ssim": ([run["ssim"][1] for run in copies], 3),
            "last ssim": ([chunk["ssim"] for chunk in last], 3),
            "last psnr": ([chunk["psnr_moving"] for chunk in last], 1),
        }
        shown = [f"{sum(values) / len(values):.{digits}f}" for values, digits in columns.values()]
        carried = sum(run["carried_error"][1] for run in copies) / len(copies)
        rows.append([suite, "first frame copied", "", *shown[:2], "", "", *shown[2:], "0", "", f"{carried:.2f}", ""])
    return table(heads, rows)


def imagination_gains_table(report: dict, better: str, base: str) -> str:
    """Tabulate the differences of two arms of imagination_study.py of one suite and seed each: means with intervals."""
    pairs = [
        (run, report["runs"][name.replace(f"/{better}/", f"/{base}/")])
        for name, run in report["runs"].items()
        if f"/{better}/" in name and name.replace(f"/{better}/", f"/{base}/") in report["runs"]
    ]
    columns = {
        "PSNR, moving pixels": (lambda run: run["psnr_moving"][0], 1),
        "SSIM": (lambda run: run["ssim"][0], 3),
        "R3, perturbed chunks": (lambda run: run["r3"]["spearman"], 2),
        "R3, the policy's chunks": (lambda run: run["r3_policy"]["gate_policy_true"], 2),
        "last chunk: SSIM": (lambda run: run["last_chunk"]["imagined"]["ssim"], 3),
        "PSNR, moving pixels of it": (lambda run: run["last_chunk"]["imagined"]["psnr_moving"], 1),
        "CPU minutes": (lambda run: sum(run["minutes"]), 1),
    }
    cells = [over_seeds([of(one) - of(two) for one, two in pairs], digits) for of, digits in columns.values()]
    return table(["runs", *columns], [[str(len(pairs)), *cells]])


def gains(pairs: Sequence[Sequence[Sequence[bool]]]) -> str:
    """Format a gain over all runs, bold where its interval excludes 0, and those of the runs.

    Args:
        pairs: for each run, outcomes of the base and of a policy on the same starts.
    """
    found = paired_difference(*(list(chain(*outcomes)) for outcomes in zip(*pairs)))
    text = points(found._asdict())
    text = f"**{text}**" if found.low > 0 or found.high < 0 else text
    return text if len(pairs) == 1 else f"{text}: {signed(paired_difference(*pair).difference for pair in pairs)}"


def exploration_table(report: dict) -> str:
    """Tabulate what reinforcement learning by outcome gains with each amount of noise, from x_0 = 0
    (exploration.py): over all starts, and of each seed; and success in the last ten steps of training. Of arms that all
    seeds have.
    """
    runs = list(report["runs"].values())
    base = [[c == "1" for c in run["SFT"]] for run in runs]
    heads = ["RL, simulator", "minutes", "success while training", "gain over SFT, x_0 = 0"]
    rows = [["SFT", "", "", percent(share(sum(map(sum, base)), sum(map(len, base))))]]
    for arm in (arm for arm in runs[0]["arms"] if all(arm in run["arms"] for run in runs)):
        found = [run["arms"][arm] for run in runs]
        after = [[c == "1" for c in of["outcomes"]] for of in found]
        minutes, trained = (sum(of[name] for of in found) / len(found) for name in ("minutes", "while_training"))
        rows.append([arm, f"{minutes:.0f}", f"{100 * trained:.0f} %", gains(list(zip(base, after)))])
    return table(heads, rows)


def ranking_table(reports: dict[str, dict]) -> str:
    """Tabulate how often, of a success and a failure of one start, the success is judged higher (group_ranking.py); by
    name of a report.
    """
    kinds = list(dict.fromkeys(kind for report in reports.values() for kind in report["judged"]))
    rows = []
    for name, report in reports.items():
        judged = report["judged"]
        found = [ranked_right(judged[kind], report["outcomes"]) if kind in judged else None for kind in kinds]
        cells = ["" if value is None else "{:.2f} [{:.2f}, {:.2f}]".format(*value) for value in found]
        episodes = sum(map(len, report["outcomes"]))
        rows.append([name, str(len(report["outcomes"])), str(episodes), *cells])
    return table(["world model", "starts", "attempts", *kinds], rows)


def ranked_right(judged: list[list[float]], outcomes: list[str]) -> Interval:
    """Return the share of pairs, a success and a failure of one start, in which the success is judged higher; equal
    ones count half. Interval by bootstrap over starts.
    """
    rows = []
    for values, text in zip(judged, outcomes, strict=True):
        won, lost = (torch.tensor([v for v, c in zip(values, text, strict=True) if c == which]) for which in "10")
        apart = won[:, None] - lost  # (successes, failures)
        rows.append([float((apart > 0).sum() + 0.5 * (apart == 0).sum()), apart.numel()])
    return bootstrap_interval(torch.tensor(rows), lambda m: m[..., 0] / m[..., 1])


def closed_loop_table(report: dict) -> str:
    """Tabulate the success of SFT, and gains of the other arms over it on the same starts (closed_loop_study.py)."""
    suites, rows, kinds = dict.fromkeys(name.split("/")[0] for name in report["runs"]), [], []
    for suite in suites:
        seeds = [run for name, run in report["runs"].items() if name.startswith(f"{suite}/")]
        for arm in dict.fromkeys(arm for run in seeds for arm in run):
            having = [run for run in seeds if arm in run]
            kinds = list(having[0][arm]["outcomes"])
            minutes = sum(run[arm]["minutes"] for run in having) / len(having)
            cells = []
            for kind in kinds:
                pairs = [[[c == "1" for c in run[of]["outcomes"][kind]] for of in ("SFT", arm)] for run in having]
                own = list(chain(*(outcomes for _, outcomes in pairs)))
                cells.append(percent(share(sum(own), len(own))) if arm == "SFT" else gains(pairs))
            rows.append([suite, arm, str(len(having)), f"{minutes:.0f}", *cells])
    heads = [f"{STARTS[starts]}, {NOISE[noise]}" for starts, noise in (kind.split(", ") for kind in kinds)]
    return table(["suite", "arm", "seeds", "minutes", *heads], rows)


def closed_loop_gate_table(report: dict) -> str:
    """Tabulate what the gate of "RL, imagination" found before its first step (closed_loop_study.py)."""
    rows = []
    for name, run in report["runs"].items():
        if gate := run.get("RL, imagination", {}).get("gate"):
            successes, failures = (int(gate[f"gate_true_{outcome}"]) for outcome in ("successes", "failures"))
            wrong = (
                f"{percent(share(int(gate[f'gate_false_{outcome}']), of))} of {of}"
                for outcome, of in (("failures", successes), ("successes", failures))
            )
            rows.append([*name.split("/"), *wrong, f"{gate['gate']:.2f}", f"{gate['gate_rank']:.2f}"])
    heads = ["successes imagined as failures", "failures imagined as successes"]
    return table(["suite", "seed", *heads, "mean share that is right", "rank correlation of 8 policies"], rows)


def formats_table(report: dict) -> str:
    """Tabulate Stage I in float32 and in bfloat16, and the difference of runs of one seed (precision_study.py)."""
    runs, rows = list(report["runs"].values()), []
    for x0, how in NOISE.items():
        won = [[[c == "1" for c in run[name]["outcomes"][x0]] for name in ("float32", "bfloat16")] for run in runs]
        own = [list(chain(*outcomes)) for outcomes in zip(*won)]
        rows.append([f"SFT, success, {how}", *(percent(share(sum(of), len(of))) for of in own), gains(won)])
    figures = {
        "world model, PSNR of moving pixels [dB]": ("psnr_moving", 1),
        "SSIM": ("ssim", 3),
        "R3, rank correlation with the true state": ("r3", 2),
    }
    for label, (key, digits) in figures.items():
        values = [[run[name][key] for run in runs] for name in ("float32", "bfloat16")]
        values.append([half - full for full, half in zip(*values)])
        rows.append([label, *(over_seeds(of, digits) for of in values)])
    return table(["", "float32", "bfloat16", "difference"], rows)


def longer_table(cells: dict, gates: dict) -> str:
    """Tabulate world models of 1500 and of 13500 steps: the last row of their logs, and their gates."""
    rows = []
    for name, steps in (("short", 1500), ("long", 13500)):
        log = cells["world_models"][name]
        row = [f"{steps}", f"{log['minutes']:.0f}", f"{log['val_loss']:.3f}", f"{log['val_shuffled_loss']:.3f}"]
        row.append(f"{log['rollout_psnr_moving']:.1f} dB")
        for reward in ("r3", "divergence"):
            found = gates["runs"][f"tabletop_spatial/seed0/{name}/{reward}"]
            row.append(f"{found['gate_policy_true']:.2f} ± {found['gate_policy_true_se']:.2f}")
        rows.append(row)
    heads = "steps", "minutes", "loss", "with others' actions", "moving PSNR", "gate of R3", "gate of divergence"
    return table(heads, rows)


def libero_arms_table(report: dict, perturbed: bool | None = None) -> str:
    """Tabulate the success of SFT on LIBERO by starts and x_0, and gains of the other arms over it on the same starts
    (libero_study.py).

    Args:
        report: its JSON file.
        perturbed: only plain or only displaced starts; None: both, a table for each suite.
    """
    texts = []
    for suite, run in report["runs"].items():
        outcomes = {
            arm: {kind: [c == "1" for c in text] for kind, text in of["outcomes"].items()}
            for arm, of in run["arms"].items()
        }
        base, rows = outcomes.get("SFT", {}), []
        kinds = [kind for kind in base if perturbed is None or perturbed == (kind.split(", ")[0] not in PLAIN)]
        if not kinds:
            continue
        for arm, own in outcomes.items():
            cells = [
                "" if kind not in own
                else percent(share(sum(own[kind]), len(own[kind]))) if arm == "SFT"
                else gains([[base[kind], own[kind]]])
                for kind in kinds
            ]  # fmt: skip
            minutes = run["arms"][arm]["minutes"]
            rows.append([arm, "" if minutes is None else f"{minutes:.0f}", *cells])
        heads = [f"{LIBERO_STARTS[starts]}, {LIBERO_X0[x0]}" for starts, x0 in (kind.split(", ") for kind in kinds)]
        texts.append(table([suite, "minutes", *heads], rows))
    return "\n\n".join(texts)


def libero_curve_table(report: dict) -> str:
    """Tabulate the success of SFT on LIBERO along its training, from x_0 = 0 (libero_study.py)."""
    rows = []
    for suite, run in report["runs"].items():
        for row in run["curve"]["found"]:
            outcomes = row["outcomes"]
            minutes = "" if row["minutes"] is None else f"{row['minutes']:.0f}"
            rows.append([suite, str(row["step"]), minutes, percent(share(outcomes.count("1"), len(outcomes)))])
    return table(["suite", "steps", "minutes", "success"], rows)


def libero_frames_table(report: dict) -> str:
    """Tabulate LIBERO's world models on held-out episodes, beside copying the first frame: means over frames."""
    rows = []
    for suite, run in report["runs"].items():
        if "frames" not in run:
            continue
        for which, label in (("imagined", "imagined"), ("copy", "first frame copied")):
            of = run["frames"]["found"][which]
            cells = f"{of['mse']:.4f}", f"{of['psnr']:.1f} dB", f"{of['ssim']:.3f}", f"{of['psnr_moving']:.1f} dB"
            rows.append([suite, label, *cells])
    return table(["suite", "frames", "MSE", "PSNR", "SSIM", "PSNR on moving pixels"], rows)


def libero_minutes_table(report: dict) -> str:
    """Tabulate the wall time of the stages of each suite (libero_study.py)."""
    stages = dict.fromkeys(
        name for run in report["runs"].values() for name in run["stages"] if not name.startswith("eval/")
    )
    rows = [
        [name, *("" if name not in run["stages"] else f"{run['stages'][name]['minutes']:.0f}" for run in runs)]
        for runs in (report["runs"].values(),)
        for name in stages
    ]
    return table(["minutes", *report["runs"]], rows)


def demo_table(report: dict) -> str:
    """Tabulate the success of the demo's SFT policy, and gains of the others over it, played the same way on the same
    starts; and RFT against what costs no training (demos.py). Of several seeds: means with 95 % intervals over the
    seeds, bold where a gain's excludes 0, and behind the colon the seeds; of one: its intervals over the starts.
    """
    runs, first = [run["outcomes"] for run in report["runs"].values()], "SFT"
    ways = "", f", {NOISE['zero']}"

    def rate(name: str) -> str:
        rates = [share(run[name].count("1"), len(run[name])) for run in runs]
        if len(rates) == 1:
            return percent(rates[0])
        rates = [100 * of["rate"] for of in rates]
        mean, half = mean_over_seeds(rates)
        return (
            f"{mean:.1f} % [{mean - half:.1f}, {min(100.0, mean + half):.1f}]: {', '.join(f'{r:.1f}' for r in rates)}"
        )

    def gain(name: str, base: str) -> str:
        pairs = [[[c == "1" for c in run[of]] for of in (base, name)] for run in runs]
        if len(pairs) == 1:
            return gains(pairs)
        found = [paired_difference(*pair).difference for pair in pairs]
        mean, half = mean_over_seeds(found)
        text = points({"difference": mean, "low": mean - half, "high": mean + half})
        return f"{f'**{text}**' if abs(mean) > half else text}: {signed(found)}"

    rows = [[first, *(rate(first + way) for way in ways)]]
    for name in (name for name in runs[0] if name != first and not name.endswith(ways[1])):
        rows.append([name, *(gain(name + way, first + way) for way in ways)])
        if name == "+ RFT":
            free = f"+ RFT from a {NOISE['sampled']}, against {first} from {NOISE['zero']}"
            rows.append([free, gain(name, first + ways[1]), ""])
    return table(["policy", NOISE["sampled"], NOISE["zero"]], rows)


def demo_world_model_table(report: dict) -> str:
    """Tabulate the demo's world model and copying the first frame, on held-out episodes: means over frames and runs."""
    names = {"psnr_moving": ("PSNR on moving pixels", "{:.1f} dB"), "psnr": ("PSNR on all pixels", "{:.1f} dB")}
    names["ssim"] = ("SSIM", "{:.2f}")
    rows = []
    for name, (label, shown) in names.items():
        means = ([run["frames"][which][name] for run in report["runs"].values()] for which in ("imagined", "copy"))
        rows.append([label, *(shown.format(sum(values) / len(values)) for values in means)])
    return table(["world model, held-out episodes", "imagined", "first frame copied"], rows)


def experts_table(report: dict) -> str:
    """Tabulate the episodes that scripted experts win, by suite and action noise, and their mean length without it
    (experts.py).
    """
    rows, noises = [], sorted({noise for suite in report["suites"].values() for noise in suite}, key=float)
    for suite, by_noise in report["suites"].items():
        cells = [suite, str(max(map(len, by_noise.values())))]
        for noise in noises:
            if (played := by_noise.get(noise)) is None:
                cells += ["", ""]
                continue
            won = [task["outcomes"].count("1") for task in played.values()]
            episodes = [len(task["outcomes"]) for task in played.values()]
            lowest = min(range(len(won)), key=lambda task: won[task] / episodes[task])
            cells += [f"{sum(won)}/{sum(episodes)}", f"{won[lowest]}/{episodes[lowest]}"]
        plain = next((played for noise, played in by_noise.items() if not float(noise)), {})
        cells.append(f"{sum(task['steps'] for task in plain.values()) / len(plain):.0f}" if plain else "")
        rows.append(cells)
    heads = [head for n in noises for head in (f"noise {n}" if float(n) else "without noise", "lowest task")]
    return table(["suite", "tasks", *heads, "steps"], rows)
