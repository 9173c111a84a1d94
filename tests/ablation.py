"""What each part of the learned detector adds, at equal budget: `python tests/ablation.py --out runs/ablation` (hours on a CPU; `--hours` a stage, goes on where it stopped).

Source groups are divided in three: figures of the first are trained on (with pairs made from their images), thresholds and the epoch are chosen
on the second, and the third alone is reported. A plain Mask R-CNN is trained; then it goes on from the same weights, once as it is and once with
the SelfCorr neck, for each seed. Source and copy are told apart by the authentic twin, which differs from the forged figure only in the copy.
"""
import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import cv2
import numpy as np
import pandas as pd
from evaluate_match import bench_cases, drawing_cases, search, synth_cases
from evaluate_network import SHARED, hold_out, image_groups, source_groups, synthetic_cases
from matplotlib.figure import Figure

from recodai_forgery.align import MatchConfig
from recodai_forgery.cases import components, index_tree, read_masks
from recodai_forgery.data import ForgeryDataset
from recodai_forgery.gate import load_gate, save_gate
from recodai_forgery.image import load_image
from recodai_forgery.match import fit_gate, fit_seen
from recodai_forgery.metric import bootstrap_interval, image_score
from recodai_forgery.model import ModelConfig, detect_batch, load_model
from recodai_forgery.predict import Detector, look_with
from recodai_forgery.regions import examine_together
from recodai_forgery.report import compare_cases, save_figure
from recodai_forgery.rle import encode
from recodai_forgery.thresholds import THRESHOLDS, annotation, judge
from recodai_forgery.train import TrainConfig, train
from recodai_forgery.types import AUTHENTIC, Case, Region

ROWS = "plain", "SelfCorr"


def divide(share: float, seed: int) -> tuple[list[Case], list[Case], list[Case], set[str], set[str]]:
    "Figures to train on, to choose on, to report on; the groups of the last two together, and of the last. Figures with sources on two sides are left out."
    groups, cases = source_groups(), index_tree(SHARED / "bench" / "dev", strict=True).cases
    report, held = hold_out(groups, share, seed), hold_out(groups, share + .15, seed)
    part = lambda fits: [case for case in cases if fits(groups[case.case_id])]
    return part(lambda own: not own & held), part(lambda own: own <= held - report), part(lambda own: own <= report), held, report


def source_and_copy(case: Case) -> tuple[np.ndarray, np.ndarray]: # (H, W) bool each
    "Which duplicated pixels are the source, and which its copies: the twin differs in these alone."
    change = cv2.absdiff(load_image(case.image), load_image(case.image.parent.parent / "authentic" / case.image.name)).mean(axis=2)
    source, copied = np.zeros((2, *case.shape), bool)
    for _, region in components(read_masks(case.mask, case.shape)):
        inside = region.mask > 0
        (copied if change[region.slices][inside].mean() > 1.5 else source)[region.slices] |= inside
    return source, copied


def found_regions(checkpoint: Path, cases: list[Case]) -> list[list[Region]]:
    "The network's regions of each figure."
    model, config, _ = load_model(checkpoint)
    dataset = ForgeryDataset(cases, config.size)
    return [detect_batch(model, [dataset[place][0]], [case.shape], THRESHOLDS[0])[0] for place, case in enumerate(cases)]


def recalls(regions: list[Region], case: Case, threshold: float) -> dict[str, float]:
    "How much of source, of copies, and of both is covered by the regions above a threshold; pixel F1."
    source, copied = source_and_copy(case)
    seen = np.zeros(case.shape, bool)
    for region in regions:
        if region.score >= threshold: seen |= region.full_mask(case.shape)
    both, share = source | copied, lambda mask: float((seen & mask).sum() / max(mask.sum(), 1))
    return {"source recall": share(source), "copy recall": share(copied), "pixel F1": float(2 * (seen & both).sum() / max(seen.sum() + both.sum(), 1))}


def forged_rows(checkpoint: Path, chosen_on: list[Case], reported: list[Case]) -> list[dict[str, float]]:
    "Each reported forged figure, were it known to be forged; the threshold is the best of those on other figures."
    scores = lambda cases: np.array([judge(regions, annotation(case), case.shape).scores for case, regions in zip(cases, found_regions(checkpoint, cases), strict=True)])
    best = int(scores(chosen_on).mean(axis=0).argmax())
    rows = []
    for case, regions in zip(reported, found_regions(checkpoint, reported), strict=True):
        score = judge(regions, annotation(case), case.shape).scores[best]
        rows.append({"oF1": score, **recalls(regions, case, THRESHOLDS[best])})
    return rows


def gate_without(held: set[str], cache: Path) -> Path:
    "The matcher's gate, fitted without figures of held-out groups."
    path, config = cache / "gate.json", MatchConfig(budget=60)
    if path.exists(): return path
    cache.mkdir(parents=True, exist_ok=True)
    known = [case for case in bench_cases()[0] if not set(case.group.split(";")) & held]
    extra = [case for case in synth_cases(250, cache) + drawing_cases(4, cache) if not set(case.group.split(";")) & held]
    examined, more = ([search(case, cache, config)[0] for case in some] for some in (known, extra))
    save_gate(fit_gate(examined, more), path)
    return path


def gate_that_hears(gate: Path, checkpoint: Path, cases: list[Case], path: Path) -> Path:
    "A gate that also weighs a network's word, learned from figures that neither was fitted on."
    known = load_gate(gate)
    examined = examine_together(cases, look_with(checkpoint), MatchConfig(budget=60))
    save_gate(replace(known, seen=fit_seen([known] * len(examined), examined)), path)
    return path


def score_answers(answers: list[str], cases: list[Case]) -> np.ndarray:
    "The competition's score of each figure."
    return np.array([image_score(annotation(case), answer, case.shape) for answer, case in zip(answers, cases, strict=True)])


def line(name: str, values: np.ndarray, member: np.ndarray) -> str:
    low, high = bootstrap_interval(values, member)
    return f"| {name} | {values.mean():.3f} ({low:.3f} to {high:.3f})"


def draw(table: pd.DataFrame, path: Path) -> None:
    "Score on forged figures of each row, with intervals by source group."
    figure = Figure(figsize=(6, .5 * len(table) + 1), layout="constrained", dpi=100)
    axis = figure.subplots()
    place = np.arange(len(table))[::-1]
    axis.errorbar(table["mean"], place, xerr=[table["mean"] - table["low"], table["high"] - table["mean"]], fmt="o", capsize=3)
    axis.set(yticks=place, yticklabels=table.index, xlabel="oF1 on forged figures of unseen sources", xlim=(0, 1))
    figure.savefig(path)


def best_and_worst(answers: list[str], scores: np.ndarray, cases: list[Case], path: Path, count: int = 4) -> None:
    "A page of the forged figures that were answered best and worst, and of authentic ones that were flagged."
    names = ["_".join(case.key) for case in cases]
    order = [place for place in np.argsort(-scores, kind="stable") if cases[place].forged]
    flagged = [place for place in np.flatnonzero(scores < 1) if not cases[place].forged][:count // 2]
    titles = {names[place]: f"{names[place]}: score {scores[place]:.2f}" for place in [*order[:count], *order[-count:], *flagged]}
    table = lambda values: pd.DataFrame({"case_id": names, "annotation": values})
    save_figure(compare_cases({name: case.image for name, case in zip(names, cases, strict=True)}, table([annotation(case) for case in cases]), table(answers), titles), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--epochs", type=int, default=6, help="of the plain network")
    parser.add_argument("--more", type=int, default=2, help="epochs that each row goes on for")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--hours", type=float, help="of each training at most")
    parser.add_argument("--train-only", action="store_true")
    chosen = parser.parse_args()
    began = time.perf_counter()
    cv2.setNumThreads(1)
    seen, fold, report, held, reported = divide(.35, 0)
    away = set(image_groups()) - (held - reported)
    folds = seen + synthetic_cases(held, 240, chosen.out / "synthetic", 0), fold + synthetic_cases(away, 30, chosen.out / "choosing", 1)
    print(f"{len(folds[0])} figures to train on, {len(folds[1])} to choose on, {len(report)} of {len(reported)} held-out groups to report on", flush=True)
    model = ModelConfig("mobilenet_v2", size=chosen.size, channels=64, weights=str(SHARED / "weights" / "mobilenet_v2_features.safetensors"))
    first = train(folds, chosen.out / "first", model, TrainConfig(epochs=chosen.epochs, workers=1, max_hours=chosen.hours), resume=True)
    runs = {}
    for seed in range(chosen.seeds):
        for name in ROWS:
            options = replace(model, weights=str(first), correlation=64 * (name == "SelfCorr"))
            runs[name, seed] = train(folds, chosen.out / f"{name}-{seed}", options, TrainConfig(epochs=chosen.more, seed=seed, workers=1, max_hours=chosen.hours), resume=True)
    if chosen.train_only: return

    groups, forged = source_groups(), [case for case in report if case.forged]
    member, choose = np.array([min(groups[case.case_id]) for case in forged]), [case for case in folds[1] if case.forged]
    told = {key: pd.DataFrame(forged_rows(best, choose, forged)) for key, best in runs.items()}
    mean = {name: sum(told[name, seed] for seed in range(chosen.seeds)) / chosen.seeds for name in ROWS}
    whole = score_answers([encode([np.ones(case.shape, bool)]) for case in forged], forged)
    print(f"{line('the whole figure, oF1', whole, member)} |")
    for what in mean["plain"]:
        print("\n".join(f"{line(f'{name}, {what}', mean[name][what].to_numpy(), member)}, seeds {', '.join(f'{told[name, seed][what].mean():.3f}' for seed in range(chosen.seeds))} |" for name in ROWS))
        more = (mean["SelfCorr"][what] - mean["plain"][what]).to_numpy()
        print(f"{line(f'SelfCorr adds to {what}', more, member)} |", flush=True)

    gate = gate_without(held, chosen.out / "candidates")
    every = np.array([min(groups[case.case_id]) for case in report])
    kinds = pd.read_csv(SHARED / "bench" / "dev" / "cases.csv", dtype=str).set_index("id")["kind"]
    detectors = {"matcher": Detector(gate=gate, method="match")}
    for name in ROWS:
        best = max((runs[name, seed] for seed in range(chosen.seeds)), key=lambda path: load_model(path)[2]["oF1"])
        hears = gate_that_hears(gate, best, fold, chosen.out / f"gate-{name}.json")
        print(f"{name}: {best.parent.name} scores best on the figures to choose on; the gate adds {load_gate(hears).seen:.2f} for its word", flush=True)
        detectors |= {f"Mask R-CNN, {name}": Detector(best, method="maskrcnn"), f"hybrid, {name}": Detector(best, gate=hears)}
        detectors[f"hybrid, {name}"].finder.matcher.net = None # the one that comes with the package has seen these sources
    answers = {"all authentic": [AUTHENTIC] * len(report)} | {name: [detector(case.image).annotation for case in report] for name, detector in detectors.items()}
    scores = {name: score_answers(said, report) for name, said in answers.items()}
    best_and_worst(answers["hybrid, SelfCorr"], scores["hybrid, SelfCorr"], report, chosen.out / "best-and-worst.png")
    label = np.array([kinds[case.case_id] if case.forged else "authentic" for case in report])
    rows = pd.DataFrame({name: {"score": values.mean(), "forged": values[label != "authentic"].mean(),
                                **{kind: values[label == kind].mean() for kind in sorted(set(label))}} for name, values in scores.items()}).T
    print(rows.round(3).to_string())
    for name, values in scores.items(): print(line(name, values, every) + " |")
    for name in ROWS: print(line(f"hybrid, {name}, adds to the matcher", scores[f"hybrid, {name}"] - scores["matcher"], every) + " |")
    bars = {name: values["oF1"].to_numpy() for name, values in mean.items()} | {name: values[label != "authentic"] for name, values in scores.items()}
    table = pd.DataFrame({name: (values.mean(), *bootstrap_interval(values, member)) for name, values in bars.items()}, index=["mean", "low", "high"]).T
    draw(table, chosen.out / "ablation.png")
    (chosen.out / "ablation.json").write_text(json.dumps({name: values.tolist() for name, values in scores.items()}))
    print(f"{(time.perf_counter() - began) / 60:.0f} min")


if __name__ == "__main__":
    main()
