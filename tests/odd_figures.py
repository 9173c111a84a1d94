"""A hundred authentic figures of kinds that repeat themselves, and how many the matcher flags: python tests/odd_figures.py [--seed N] [--write FOLDER].

Twenty kinds, five of each, drawn with NumPy, Pillow, Matplotlib and scikit-image's photographs. Nothing is fitted on them.
"""
import argparse
import io
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from skimage import data

WORDS = ("cell nucleus marker control treated wild type protein kinase assay figure panel lane dose hours mean error signal ratio staining section tissue "
         "mouse human sample growth repeat blot loading band gene expression level after before culture medium membrane").split()


def gray_to_rgb(gray: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(np.clip(gray, 0, 255).astype(np.uint8), cv2.COLOR_GRAY2RGB)


def picture_of(figure) -> np.ndarray: # (H, W, 3) uint8
    "A figure of Matplotlib as pixels; the figure is closed."
    import matplotlib.pyplot as plt
    figure.tight_layout()
    store = io.BytesIO()
    figure.savefig(store, format="png")
    plt.close(figure)
    return np.asarray(Image.open(store).convert("RGB"))


def matplotlib_figure(draw, rng: np.random.Generator, panels: tuple[int, int] = (1, 1)) -> np.ndarray:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(*panels, figsize=(rng.uniform(4, 7), rng.uniform(3, 5)), dpi=int(rng.integers(80, 160)), squeeze=False)
    for axis in axes.flat: draw(axis, rng)
    return picture_of(figure)


def draw_lines(axis, rng):
    for number in range(rng.integers(1, 5)): axis.plot(np.cumsum(rng.normal(size=30)), marker="os^D"[number], label=str(rng.choice(WORDS)))
    axis.legend(); axis.set_xlabel("time (h)"); axis.grid(bool(rng.integers(2)))


def draw_bars(axis, rng):
    axis.bar(range(6), rng.uniform(1, 5, 6), yerr=rng.uniform(.1, .5, 6), capsize=3, color=[f"C{n % 3}" for n in range(6)])
    axis.set_xticks(range(6), rng.choice(WORDS, 6), rotation=45)


def draw_scatter(axis, rng): axis.scatter(*rng.normal(size=(2, 200)), s=12, alpha=.6); axis.set_xlabel("signal"); axis.set_ylabel("ratio")


def draw_heat(axis, rng):
    shown = axis.imshow(rng.normal(size=(12, 12)), cmap=str(rng.choice(["viridis", "coolwarm", "gray"])))
    axis.figure.colorbar(shown, ax=axis)


def draw_box(axis, rng): axis.boxplot([rng.normal(n, 1, 40) for n in range(5)]); axis.set_title(str(rng.choice(WORDS)))


def draw_contour(axis, rng):
    x, y = np.meshgrid(np.linspace(-3, 3, 60), np.linspace(-3, 3, 60))
    axis.contour(x, y, np.sin(x * rng.uniform(.5, 2)) * np.cos(y * rng.uniform(.5, 2)), levels=9)


def line_plot(rng): return matplotlib_figure(draw_lines, rng)
def bar_chart(rng): return matplotlib_figure(draw_bars, rng, (1, 2))
def scatter_panels(rng): return matplotlib_figure(draw_scatter, rng, (2, 2))
def heat_maps(rng): return matplotlib_figure(draw_heat, rng, (1, 2))
def box_plots(rng): return matplotlib_figure(draw_box, rng, (2, 3))
def contours(rng): return matplotlib_figure(draw_contour, rng)


def text_page(rng):
    page = Image.new("RGB", (int(rng.integers(400, 800)), int(rng.integers(400, 900))), "white")
    pen, font, y = ImageDraw.Draw(page), ImageFont.load_default(size=int(rng.integers(11, 20))), 20
    while y < page.height - 30:
        pen.text((20, y), " ".join(rng.choice(WORDS, int(page.width / 70))), fill="black", font=font)
        y += int(font.size * 1.5)
    return np.asarray(page)


def table(rng):
    page = Image.new("RGB", (600, 400), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=14)
    for row in range(12):
        pen.line((10, 20 + 30 * row, 590, 20 + 30 * row), fill="black")
        for column in range(5): pen.text((15 + 115 * column, 25 + 30 * row), f"{rng.uniform(0, 100):.2f}" if column else str(rng.choice(WORDS)), fill="black", font=font)
    return np.asarray(page)


def checkerboard(rng):
    side, (low, high) = int(rng.integers(12, 60)), sorted(rng.integers(0, 256, 2))
    board = np.kron(np.indices((int(rng.integers(5, 14)), int(rng.integers(5, 14)))).sum(axis=0) % 2, np.ones((side, side)))
    return gray_to_rgb(low + board * (high - low) + rng.normal(0, rng.choice([0, 3]), board.shape))


def ruler(rng):
    step = int(rng.integers(6, 14))
    page = Image.new("RGB", (int(rng.integers(500, 1200)), 120), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=14)
    for number, x in enumerate(range(10, page.width - 10, step)):
        pen.line((x, 20, x, 20 + (50 if number % 10 == 0 else 35 if number % 5 == 0 else 22)), fill="black")
        if number % 10 == 0: pen.text((x - 5, 75), str(number // 10), fill="black", font=font)
    return np.asarray(page)


def well_plate(rng):
    rows, columns, step = int(rng.integers(4, 9)), int(rng.integers(6, 13)), int(rng.integers(30, 60))
    plate = np.full((rows * step + 40, columns * step + 40, 3), 225, np.uint8)
    for y in range(rows):
        for x in range(columns):
            cv2.circle(plate, (20 + step // 2 + x * step, 20 + step // 2 + y * step), int(step * .4), [int(v) for v in rng.integers(60, 220, 3)], -1, cv2.LINE_AA)
            cv2.circle(plate, (20 + step // 2 + x * step, 20 + step // 2 + y * step), int(step * .4), (90, 90, 90), 2, cv2.LINE_AA)
    return np.clip(plate + rng.normal(0, 2, plate.shape), 0, 255).astype(np.uint8)


def tiling(rng):
    unit = cv2.resize(rng.integers(0, 256, (6, 6, 3), np.uint8), (int(rng.integers(30, 70)),) * 2, interpolation=cv2.INTER_CUBIC)
    return np.tile(unit, (int(rng.integers(5, 10)), int(rng.integers(5, 10)), 1))


def brick_wall(rng):
    wall = np.full((400, 520), 200.) + rng.normal(0, 6, (400, 520))
    for row in range(0, 400, 40):
        for column in range(-30 * (row // 40 % 2), 520, 60): wall[row + 3:row + 38, max(0, column + 3):max(0, column + 57)] = rng.uniform(90, 130)
    return gray_to_rgb(wall + rng.normal(0, 3, wall.shape))


def waves(rng):
    y, x = np.mgrid[:400, :500]
    angle, length = rng.uniform(0, np.pi), rng.uniform(8, 40)
    return gray_to_rgb(128 + 90 * np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / length) + rng.normal(0, rng.choice([0, 4]), x.shape))


def crystal_lattice(rng):
    y, x = np.mgrid[:420, :420] / rng.uniform(8, 20)
    turn = rng.uniform(0, np.pi)
    waves = sum(np.cos(2 * np.pi * (x * np.cos(turn + k * np.pi / 3) + y * np.sin(turn + k * np.pi / 3))) for k in range(3))
    return gray_to_rgb(128 + 35 * waves + rng.normal(0, 12, x.shape))


def blot(rng):
    gel = np.full((260, 520), 215.) + cv2.GaussianBlur(rng.normal(0, 40, (260, 520)), (0, 0), 12)
    y, x = np.mgrid[:260, :520]
    for row in (70, 180):
        for lane in range(8):
            dy, dx = (y - row - rng.normal(0, 2)) / rng.uniform(5, 9), (x - 40 - 62 * lane - rng.normal(0, 2)) / rng.uniform(16, 22)
            gel -= rng.uniform(60, 160) * np.exp(-(dy ** 2 + dx ** 4) / 2)
    return gray_to_rgb(gel + rng.normal(0, 2.5, gel.shape))


def dots(rng):
    field = np.zeros((420, 420))
    for y, x in rng.uniform(10, 410, (int(rng.integers(60, 160)), 2)): cv2.circle(field, (int(x), int(y)), 7, float(rng.uniform(90, 230)), -1)
    return gray_to_rgb(cv2.GaussianBlur(field, (0, 0), 2.5) + 14 + rng.normal(0, 3, field.shape))


def bar_code(rng):
    bars = np.repeat(rng.integers(0, 2, 120), 4)
    code = np.kron(rng.integers(0, 2, (29, 29)), np.ones((8, 8)))
    page = np.full((400, 560), 255.)
    page[30:130, 30:510] = bars * 255
    page[150:382, 150:382] = code * 255
    return gray_to_rgb(page)


def graph_paper(rng):
    page = np.full((420, 560, 3), 255, np.uint8)
    page[::12], page[:, ::12], page[::60], page[:, ::60] = (200, 220, 240), (200, 220, 240), (120, 160, 210), (120, 160, 210)
    points = np.stack([np.arange(0, 560, 8), 210 + 40 * np.cumsum(rng.normal(0, .25, 70))], axis=1).astype(np.int32)
    cv2.polylines(page, [points], False, (200, 30, 30), 2, cv2.LINE_AA)
    return page


def micrographs(rng):
    names = rng.permutation(["astronaut", "coffee", "chelsea", "hubble_deep_field", "immunohistochemistry", "rocket", "retina"])[:4]
    page = Image.new("RGB", (640, 640), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=18)
    for number, name in enumerate(names):
        photo = getattr(data, name)()
        y, x = (int(rng.integers(0, side - 290)) for side in photo.shape[:2])
        left, top = 15 + 315 * (number % 2), 15 + 315 * (number // 2)
        page.paste(Image.fromarray(photo[y:y + 290, x:x + 290, :3]), (left, top))
        pen.text((left + 6, top + 4), "abcd"[number], fill="white", font=font)
        pen.rectangle((left + 215, top + 270, left + 275, top + 275), fill="white")
        pen.text((left + 215, top + 246), "50 um", fill="white", font=font)
    return np.asarray(page)


KINDS = (line_plot, bar_chart, scatter_panels, heat_maps, box_plots, contours, text_page, table, checkerboard, ruler, well_plate, tiling, brick_wall, waves,
         crystal_lattice, blot, dots, bar_code, graph_paper, micrographs)


def odd_figures(seed: int = 0, each: int = 5):
    "Kind and figure of each: (H, W, 3) uint8 RGB."
    for kind in KINDS:
        for number in range(each):
            yield kind.__name__, kind(np.random.default_rng([seed, number, *kind.__name__.encode()]))


def main() -> None:
    from recodai_forgery.match import find_decision, packaged_crosscheck
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--match", action="store_true", help="by the training-free matcher, without the network that draws its borders")
    parser.add_argument("--write", type=Path, help="also write the figures to this folder")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    flagged, total, net = {}, 0, None if options.match else packaged_crosscheck()
    for number, (kind, figure) in enumerate(odd_figures(options.seed)):
        if options.write: cv2.imwrite(str(options.write / f"{number:03d}_{kind}.png"), figure[..., ::-1])
        total += 1
        if find_decision(figure, net=net).answered: flagged[kind] = flagged.get(kind, 0) + 1
    print(f"{sum(flagged.values())} of {total} authentic figures of {len(KINDS)} odd kinds are flagged: {flagged or 'none'}")


if __name__ == "__main__":
    main()
