"""`make bench`: speed and memory as ratios against plain peers, all measured in one run on one machine.

Each row compares ours with a peer that is written out here, takes the best of several repetitions of both in turn, and
names the bar where there is one. Times on a busy machine are worth nothing: run it alone.
"""
import json
import os
import platform
import timeit
from collections.abc import Callable

import cv2
import numba
import numpy as np
from bench_kernel import kernel_overhead
from bench_match import matcher_speed
from bench_model import paste_memory
from bench_train import training_steps
from scipy.optimize import linear_sum_assignment

from recodai_forgery.metric import image_score
from recodai_forgery.rle import encode


def best_of(repetitions: int, *functions: Callable) -> list[float]:
    "Least seconds a call of each function, in turn, so that a slow spell hits all of them; short calls are timed many at a time, as timeit does."
    calls = [max(1, round(.02 / timeit.timeit(function, number=2) * 2)) for function in functions]
    least = [float("inf")] * len(functions)
    for _ in range(repetitions):
        for place, function in enumerate(functions):
            least[place] = min(least[place], timeit.timeit(function, number=calls[place]) / calls[place])
    return least


# Peers of the codec -------------------------------------------------------------------------------------------------

@numba.njit
def run_loop(pixels):
    "The run loop over the set pixels of a column-major mask, as encoders in the competition do it."
    runs, before = [], -2
    for pixel in np.where(pixels == 1)[0]:
        if pixel > before + 1: runs.extend((pixel + 1, 0))
        runs[-1] += 1
        before = pixel
    return runs


def numba_encode(mask): return json.dumps(run_loop(mask.T.flatten()))


def blob(side: int) -> np.ndarray:
    "One round region of 7 % of the figure: a large one, as forged regions go."
    y, x = np.mgrid[:side, :side]
    return (np.hypot(y - .44 * side, x - .54 * side) < .15 * side).astype(np.uint8)


def blotches(side: int, seed: int = 0) -> np.ndarray:
    "Thresholded smooth noise: about 330,000 runs at a side of 3,888."
    noise = np.random.default_rng(seed).standard_normal((side, side)).astype(np.float32)
    return (cv2.GaussianBlur(noise, (0, 0), 5.1) > .012).astype(np.uint8)


def bench_encode():
    for name, mask, bar in (("encode, blob at 2048 x 2048", blob(2048), 15), ("encode, noise at 3888 x 3888", blotches(3888), 2)):
        assert numba_encode(mask) == encode([mask])
        theirs, ours = best_of(7, lambda mask=mask: numba_encode(mask), lambda mask=mask: encode([mask]))
        runs = len(json.loads(encode([mask]))) // 2
        yield f"{name} ({runs:,} runs)", "numba run loop", theirs / ours, bar, f"{ours * 1e3:.1f} ms"


# Peers of the metric ------------------------------------------------------------------------------------------------

def decode_full(annotation: str, height: int, width: int) -> list[np.ndarray]:
    masks = []
    for text in annotation.split(";"):
        values = np.asarray(json.loads(text), dtype=np.int32)
        flat = np.zeros(height * width, dtype=np.uint8)
        for start, length in zip(values[::2] - 1, values[1::2], strict=True): flat[start:start + length] = 1
        masks.append(flat.reshape((height, width), order="F"))
    return masks


def full_f1(one, other):
    "Pixel F1 by true and false positives, as the competition defines it."
    one, other = one.flatten(), other.flatten()
    true_positive = np.sum((one == 1) & (other == 1))
    false_positive = np.sum((one == 1) & (other == 0))
    false_negative = np.sum((one == 0) & (other == 1))
    precision, recall = true_positive / (true_positive + false_positive), true_positive / (true_positive + false_negative)
    return 2 * precision * recall / (precision + recall) if true_positive else 0.0


def decode_and_compare(label: str, prediction: str, shape: str) -> float:
    true, predicted = (decode_full(text, *json.loads(shape)) for text in (label, prediction))
    f1 = np.array([[full_f1(one, other) for other in true] for one in predicted])
    return f1[linear_sum_assignment(-f1)].sum() / max(f1.shape)


def discs(count: int, side: int, shift: int) -> np.ndarray:
    y, x = np.mgrid[:side, :side]
    return np.stack([np.hypot(y - (.15 + .17 * number) * side - shift, x - (.8 - .15 * number) * side) < .07 * side for number in range(count)]).astype(np.uint8)


def bench_score():
    for name, true, predicted, bar in (
            ("image score, 1 x 1 instances at 1024 x 1024", discs(1, 1024, 0), discs(1, 1024, 9), 50),
            ("image score, 5 x 5 instances at 1024 x 1024", discs(5, 1024, 0), discs(5, 1024, 9), 150),
            ("image score, 3 x 3 overlapping noisy instances at 1024 x 1024", *(np.stack([blotches(1024, seed + k) for k in range(3)]) for seed in (0, 2)), None)):
        label, answer, shape = encode(true), encode(predicted), "[1024, 1024]"
        assert abs(decode_and_compare(label, answer, shape) - image_score(label, answer, shape)) < 1e-12
        theirs, ours = best_of(9, lambda: decode_and_compare(label, answer, shape), lambda: image_score(label, answer, shape)) # noqa: B023
        yield name, "decode and compare", theirs / ours, bar, f"{ours * 1e3:.2f} ms"


def main():
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, NumPy {np.__version__}, OpenCV {cv2.__version__}")
    print(f"{'what':<66} {'against':<30} {'ratio':>8}  {'bar':<12} ours")
    for part in (bench_encode, bench_score, paste_memory):
        for what, peer, ratio, bar, ours in part():
            verdict = "" if bar is None else f">= {bar:g} " + ("met" if ratio >= bar else "MISSED")
            print(f"{what:<66} {peer:<30} {ratio:>7.1f}x  {verdict:<12} {ours}", flush=True)
    print(*matcher_speed(), sep="\n", flush=True)
    for part in (training_steps, kernel_overhead): # less is better
        for what, peer, ratio, bar, ours in part():
            print(f"{what:<66} {peer:<30} {ratio:>7.3f}x  {f'<= {bar:g} ' + ('met' if ratio <= bar else 'MISSED'):<12} {ours}", flush=True)


if __name__ == "__main__":
    main()
