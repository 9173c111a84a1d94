"""What regions of a network would be worth to the matcher, if they were right: python tests/evaluate_regions.py --cache FOLDER [--others N] [--authentic N] [--rough].

The cache is that of tests/evaluate_match.py, run before with the same --synth and --drawings. Asked are all forged figures of bench/dev on which the matcher
has no true candidate, N others and N authentic ones. Regions are made up from the truth: `pieces` (each piece of a true mask, score .9), `one` (only one
piece of each event) and none (`random`), always with random regions beside. Rows without a word more tell what the matcher can prove where a network
points: it has no answer of its own. Where `its word counts`, what it says of both ends of a candidate raises the log odds by a number that `fit_seen` learned on
the figures with even numbers; where `its score earns it`, regions of .5 and more are answered without proof as well. Settings were chosen on figures with even
numbers; those with odd ones are reported apart.
"""
import argparse
import os
import pickle
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import cv2
import numpy as np
import pandas as pd
from evaluate_match import bench_cases, drawing_cases, search, synth_cases

from recodai_forgery.align import Budget, MatchConfig
from recodai_forgery.evidence import search_figure
from recodai_forgery.gate import rate
from recodai_forgery.image import load_image
from recodai_forgery.match import annotate, fit_seen, held_out_gates, label, pieces_of, resize_event
from recodai_forgery.metric import image_score
from recodai_forgery.regions import Look, ask_network, join
from recodai_forgery.rle import encode
from recodai_forgery.types import Region

NEVER = 2. # a threshold that no score reaches


def ellipse(rng: np.random.Generator, shape: tuple[int, int], score: float) -> Region:
    "A random region that holds about a thousandth to a twentieth of the figure."
    mask, radius = np.zeros(shape, np.uint8), np.sqrt(np.exp(rng.uniform(np.log(.001), np.log(.05))) * shape[0] * shape[1] / np.pi)
    axes = tuple(max(4, int(radius * rng.uniform(.7, 1.4))) for _ in range(2))
    cv2.ellipse(mask, (int(rng.integers(shape[1])), int(rng.integers(shape[0]))), axes, int(rng.integers(180)), 0, 360, 1, -1)
    return Region.from_mask(mask, score)


def roughly(rng: np.random.Generator, piece: Region, shape: tuple[int, int]) -> Region:
    "An ellipse about where a piece is."
    x0, y0, x1, y1 = piece.box
    sides = np.array([x1 - x0, y1 - y0])
    centre, axes = np.array([x0 + x1, y0 + y1]) / 2 + rng.normal(0, .08, 2) * sides, np.maximum(3, sides / 2 * rng.uniform(.85, 1.25, 2))
    mask = np.zeros(shape, np.uint8)
    cv2.ellipse(mask, tuple(np.clip(centre, 0, np.array(shape[::-1]) - 1).astype(int).tolist()), tuple(axes.astype(int).tolist()), 0, 0, 360, 1, -1)
    return Region.from_mask(mask, piece.score)


def made_up(case, kind: str, rough: bool, most: float) -> list[Region]:
    "Regions as a network might give them; those that point at nothing score .05 to `most`."
    rng, shape = np.random.default_rng(int(case.case_id)), case.shape
    regions = [ellipse(rng, shape, rng.uniform(.05, most)) for _ in range(6)]
    for mask in np.load(case.mask) if case.mask and kind != "random" else ():
        pieces = [Region(piece.box, piece.mask, .9) for piece in pieces_of(mask)]
        if kind == "one": pieces = [pieces[rng.integers(len(pieces))]] if pieces else []
        regions += [roughly(rng, piece, shape) if rough else piece for piece in pieces]
    return sorted(regions, key=lambda region: -region.score)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--others", type=int, default=30)
    parser.add_argument("--authentic", type=int, default=20)
    parser.add_argument("--synth", type=int, default=0)
    parser.add_argument("--drawings", type=int, default=0)
    parser.add_argument("--rough", action="store_true", help="ellipses about where the pieces are, instead of the pieces")
    parser.add_argument("--most", type=float, default=.4, help="highest score of a region that points at nothing")
    parser.add_argument("--numbers", choices=("even", "odd"), help="only figures with such numbers")
    parser.add_argument("--keep", type=Path, help="write the rows here")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    config = MatchConfig(budget=60)
    cases, _ = bench_cases()
    examined = [search(case, options.cache, config)[0] for case in cases]
    kept = options.cache / f"gates_{options.synth}_{options.drawings}.pickle"
    if not kept.exists():
        learned = (synth_cases(options.synth, options.cache) if options.synth else []) + (drawing_cases(options.drawings, options.cache) if options.drawings else [])
        kept.write_bytes(pickle.dumps(held_out_gates(examined, [search(case, options.cache, config)[0] for case in learned])))
    gates, rng = pickle.loads(kept.read_bytes()), np.random.default_rng(0)
    wanted = [n for n, case in enumerate(cases) if options.numbers != ("odd", "even")[int(case.case_id) % 2]]
    forged = [n for n in wanted if cases[n].forged]
    hard = [n for n in forged if not examined[n].true.any()]
    others = rng.permutation([n for n in forged if examined[n].true.any()])[:options.others].tolist()
    honest = rng.permutation([n for n in wanted if not cases[n].forged])[:options.authentic].tolist()
    rows, known, say = [], {}, {}
    for n in sorted([*hard, *others, *honest], key=lambda n: int(cases[n].case_id) % 2): # even numbers first
        case, image, even = cases[n], load_image(cases[n].image), int(cases[n].case_id) % 2 == 0
        if not even and known and not say: say = {kind: fit_seen(*zip(*seen, strict=True)) for kind, seen in known.items()}
        found = search_figure(image, config)
        own, spent = list(found.found), found.planes.budget.pixels
        truth = encode(list(np.load(case.mask))) if case.mask else "authentic"
        for kind in ("alone", "random", "one", "pieces") if case.forged else ("alone", "random"):
            found.found, found.planes.budget = list(own), Budget(spent, 60)
            start, regions = time.process_time(), made_up(case, kind, options.rough, options.most) if kind != "alone" else []
            look = Look(regions, [None] * len(regions), .5, .5)
            silent = look._replace(score_threshold=NEVER, figure_threshold=NEVER)
            seen = ask_network(found, look, config)
            seconds = time.process_time() - start
            judged = label(case, found.found, found.planes, gates[n].border)._replace(seen=seen)
            for other in ("one", "pieces") if even and kind != "alone" else ():
                if kind == (other if case.forged else "random"): known.setdefault(other, []).append((gates[n], judged))
            ways = {kind: (0., silent)} if kind == "alone" else {kind: (0., silent), f"{kind}, its score earns it": (0., look)}
            if kind != "alone" and say: ways |= {f"{kind}, its word counts ({other})": (say[other], silent) for other in say if kind in (other, "random")}
            for name, (word, network) in ways.items():
                gate = replace(gates[n], seen=word)
                rated = rate(gate, found.found, found.planes, seen)
                rated = rated._replace(events=tuple(resize_event(event, found.planes.scale, case.shape) for event in rated.events))
                decision = join(gate, rated, network)
                rows.append({"id": int(case.case_id), "figures": "hard" if n in hard else "other" if case.forged else "authentic", "regions": name,
                             "score": image_score(truth, annotate(decision, case.shape), case.shape), "true": bool(judged.true.any()),
                             "best": max([f1 for f1, yes in zip(judged.f1, judged.true, strict=True) if yes], default=0.), "p": decision.p_forged,
                             "answered": decision.answered, "fresh": len(found.found) - len(own), "seconds": seconds, "left": found.planes.budget.pixels})
    print("what a score of 1 adds to the log odds, learned on even numbers:", {kind: round(word, 2) for kind, word in say.items()})
    table = pd.DataFrame(rows)
    if options.keep: table.to_csv(options.keep, index=False)
    for even, part in table.groupby(table.id % 2 == 0):
        print(f"\n{'even' if even else 'odd'} numbers\n" + part.groupby(["figures", "regions"], sort=False).agg(
            n=("id", "size"), score=("score", "mean"), with_true=("true", "mean"), best_f1=("best", "mean"), flagged=("answered", lambda some: (some > 0).mean()),
            fresh=("fresh", "mean"), seconds=("seconds", "mean"), most=("seconds", "max")).round(3).to_string())


if __name__ == "__main__":
    main()
