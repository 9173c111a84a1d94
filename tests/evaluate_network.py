"""Mask R-CNN on the benchmark, with whole sources held out: `python tests/evaluate_network.py --out runs/dev`.

Figures whose every source image belongs to a held-out group are scored; figures with any such source are not trained on. Thresholds are
chosen on a validation fold of the training figures, so that nothing is tuned on what is reported. RECODAI_SHARED says where the data lie.

`--correlation 64 --more 6` asks what the SelfCorr neck adds: the plain network goes on for as many epochs twice, from the same weights in
the same order of figures, once as it is and once with the neck, and the two are compared on forged figures.
"""
import argparse
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from recodai_forgery.cases import index_tree, read_masks, split_cases
from recodai_forgery.data import ForgeryDataset
from recodai_forgery.metric import bootstrap_interval, format_summary, score_cases
from recodai_forgery.model import ModelConfig, detect_batch, load_model
from recodai_forgery.predict import Detector
from recodai_forgery.report import compare_submission, save_figure
from recodai_forgery.rle import encode
from recodai_forgery.synth import SynthConfig, make_tree
from recodai_forgery.thresholds import THRESHOLDS, annotation, judge
from recodai_forgery.train import TrainConfig, train
from recodai_forgery.types import Case

SHARED = Path(os.environ.get("RECODAI_SHARED") or Path(__file__).resolve().parents[2] / "shared")


def source_groups() -> dict[str, set[str]]:
    "The source groups of each figure of the benchmark, by id."
    group = pd.read_csv(SHARED / "figures" / "ATTRIBUTION.csv", dtype=str).set_index("file")["group"]
    cases = pd.read_csv(SHARED / "bench" / "dev" / "cases.csv", dtype=str).set_index("id")["source_files"]
    return {case_id: set(group[files.split(";")]) for case_id, files in cases.items()}


def hold_out(groups: dict[str, set[str]], share: float, seed: int) -> set[str]:
    "Source groups, drawn one by one until a share of the figures has no other source."
    order, held = np.random.default_rng(seed).permutation(sorted(set().union(*groups.values()))), set()
    for name in order:
        if sum(group <= held for group in groups.values()) >= share * len(groups): break
        held.add(str(name))
    return held


def synthetic_cases(held: set[str], count: int, out: Path, seed: int) -> list[Case]:
    "Pairs made from the benchmark's source images, without those of held-out groups."
    group = pd.read_csv(SHARED / "figures" / "ATTRIBUTION.csv", dtype=str).set_index("file")["group"]
    sources = [SHARED / "figures" / file for file in group.index[~group.isin(held)] if (SHARED / "figures" / file).exists()]
    if not out.exists(): make_tree(sources, out, count, seed, SynthConfig(longest_max=800, test=0))
    return list(index_tree(out, strict=True).cases)


def forged_scores(checkpoint: Path, cases: list[Case]) -> dict[str, np.ndarray]:
    "Pixel F1 (all duplicated pixels as one) and oF1 of each forged figure, (figures, thresholds)."
    model, config, _ = load_model(checkpoint)
    dataset, scores = ForgeryDataset(cases, config.size), {"pixel F1": [], "oF1": []}
    for place, case in enumerate(cases):
        regions, = detect_batch(model, [dataset[place][0]], [case.shape], THRESHOLDS[0])
        union = encode(read_masks(case.mask, case.shape).any(axis=0, keepdims=True).astype(np.uint8))
        for name, label in (("pixel F1", union), ("oF1", annotation(case))): scores[name].append(judge(regions, label, case.shape).scores)
    return {name: np.array(rows) for name, rows in scores.items()}


def compare(plain: Path, folds, unseen: list[Case], groups: dict[str, set[str]], chosen) -> None:
    "The plain network going on as it is, and with the neck; thresholds chosen on the validation fold, figures of unseen sources reported."
    config = ModelConfig("mobilenet_v2", size=chosen.size, channels=chosen.channels, weights=str(plain))
    forged, fold = [case for case in unseen if case.forged], [case for case in folds[1] if case.forged]
    member, answers = np.array([min(groups[case.case_id]) for case in forged]), {}
    for name, cells in (("plain", 0), ("SelfCorr", chosen.correlation)):
        began = time.perf_counter()
        best = train(folds, chosen.out / name, replace(config, correlation=cells),
                     TrainConfig(epochs=chosen.more, seed=chosen.seed), resume=chosen.resume)
        minutes, tuning = (time.perf_counter() - began) / 60, forged_scores(best, fold)
        answers[name] = {what: rows[:, tuning[what].mean(axis=0).argmax()] for what, rows in forged_scores(best, forged).items()}
        print(f"{name:9} {minutes:5.1f} min" + "".join(f"   {what} {rows.mean():.3f}" for what, rows in answers[name].items()), flush=True)
    for what, rows in answers["SelfCorr"].items():
        more = rows - answers["plain"][what]
        low, high = bootstrap_interval(more, member)
        print(f"SelfCorr adds {more.mean():+.3f} {what} on {len(more)} forged figures of {len(set(member))} groups (95 %: {low:+.3f} to {high:+.3f})")


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--epochs", type=int, default=12)
    options.add_argument("--size", type=int, default=512)
    options.add_argument("--channels", type=int, default=64)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--correlation", type=int, default=0, help="cells of the SelfCorr neck; compares it with the plain network")
    options.add_argument("--synthetic", type=int, default=0, help="pairs made from seen source images, for training as well")
    options.add_argument("--more", type=int, default=6, help="epochs of the comparison")
    options.add_argument("--resume", action="store_true")
    chosen = options.parse_args()

    groups = source_groups()
    held = hold_out(groups, .25, chosen.seed)
    cases = index_tree(SHARED / "bench" / "dev", strict=True).cases
    seen = [case for case in cases if not groups[case.case_id] & held]
    unseen = [case for case in cases if groups[case.case_id] <= held]
    folds = split_cases(seen, .15, chosen.seed)
    if chosen.synthetic: folds[0].extend(synthetic_cases(held, chosen.synthetic, chosen.out / "synthetic", chosen.seed))
    print(f"{len(folds[0])} figures to train on, {len(folds[1])} to choose thresholds on, {len(unseen)} of {len(held)} unseen source groups to report on", flush=True)

    model = ModelConfig("mobilenet_v2", size=chosen.size, channels=chosen.channels, weights=str(SHARED / "weights" / "mobilenet_v2_features.safetensors"))
    began = time.perf_counter()
    best = train(folds, chosen.out / "first", model, TrainConfig(epochs=chosen.epochs, seed=chosen.seed), resume=chosen.resume)
    trained = time.perf_counter()
    if chosen.correlation: compare(best, folds, unseen, groups, chosen)
    detector = Detector(best, method="maskrcnn")
    images = {"-".join(case.key): case for case in unseen}
    answers = {name: detector(case.image) for name, case in images.items()}
    seconds = (time.perf_counter() - trained) / len(images)

    solution = pd.DataFrame([{"case_id": name, "annotation": annotation(case), "shape": str(list(case.shape))} for name, case in images.items()])
    submission = pd.DataFrame([{"case_id": name, "annotation": answer.annotation} for name, answer in answers.items()])
    table = score_cases(solution, submission)
    kinds = pd.read_csv(SHARED / "bench" / "dev" / "cases.csv", dtype=str).set_index("id")["kind"]
    table["kind"] = [kinds[images[name].case_id] if images[name].forged else "authentic" for name in table.index]
    print(format_summary(table, groups=np.array([min(groups[images[name].case_id]) for name in table.index])))
    print("\n" + table.groupby("kind")["score"].agg(["size", "mean"]).round(3).to_string())
    print(f"\ntrained in {(trained - began) / 60:.0f} min, predicted in {seconds:.2f} s a figure")
    page = compare_submission({name: case.image for name, case in images.items()}, solution, submission, count=6)
    print(save_figure(page, chosen.out / "unseen.png"))


if __name__ == "__main__":
    main()
