"""Authentic drawings that repeat themselves, to fit the gate on: python tests/made_negatives.py --write FOLDER [--each N] [--seed N].

None of their kinds is one of tests/odd_figures.py, which reports on kinds that the gate was not fitted on.
"""
import argparse
import calendar
from pathlib import Path

import cv2
import numpy as np
from odd_figures import picture_of
from PIL import Image, ImageDraw, ImageFont

NAMES = ("alpha beta gamma delta sigma north south river bridge station value index total return input output buffer queue vector matrix table "
         "spring summer autumn winter ratio batch chlorine carbon").split()


def draw_axes(draw, rng: np.random.Generator, panels: tuple[int, int] = (1, 1), polar: str | None = None) -> np.ndarray:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(*panels, figsize=(rng.uniform(4, 7), rng.uniform(3, 5)), dpi=int(rng.integers(80, 160)), squeeze=False,
                                sharey=bool(rng.integers(2)), subplot_kw={"projection": polar})
    for axis in axes.flat: draw(axis, rng)
    return picture_of(figure)


def page_of(rng, colour="white") -> tuple[Image.Image, ImageDraw.ImageDraw]:
    page = Image.new("RGB", (int(rng.integers(400, 750)), int(rng.integers(350, 700))), colour)
    return page, ImageDraw.Draw(page)


def font_of(rng, low: int = 10, high: int = 20): return ImageFont.load_default(size=int(rng.integers(low, high)))


def ink(rng, low: int = 0, high: int = 200) -> tuple[int, int, int]: return tuple(int(v) for v in rng.integers(low, high, 3))


def pies(rng):
    def draw(axis, rng):
        many = int(rng.integers(3, 6))
        axis.pie(rng.uniform(1, 5, many), labels=rng.choice(NAMES, many), autopct="%d%%")
    return draw_axes(draw, rng, (1, int(rng.integers(1, 4))))


def violins(rng):
    def draw(axis, rng):
        axis.violinplot([rng.normal(n % 2, 1, 60) for n in range(4)], showmedians=True)
        axis.set_ylabel("log ratio")
    return draw_axes(draw, rng, (1, int(rng.integers(1, 4))))


def survival(rng):
    def draw(axis, rng):
        for n in range(2): axis.step(np.sort(rng.exponential(20, 30)), np.linspace(1, 0, 30), where="post", label=f"group {n + 1}")
        axis.set_xlim(0, 60); axis.set_ylim(0, 1.05); axis.set_xlabel("months"); axis.set_ylabel("survival"); axis.legend()
    return draw_axes(draw, rng, (2, 2) if rng.integers(2) else (1, 2))


def forest_plot(rng):
    def draw(axis, rng):
        axis.errorbar(rng.normal(1, .4, 9), range(9), xerr=rng.uniform(.1, .6, 9), fmt="s", capsize=2)
        axis.axvline(1, linestyle="--"); axis.set_yticks(range(9), rng.choice(NAMES, 9)); axis.set_xlim(-1, 3)
    return draw_axes(draw, rng, (1, int(rng.integers(1, 3))))


def stacked_areas(rng):
    def draw(axis, rng): axis.stackplot(range(20), rng.uniform(1, 3, (4, 20)), labels=rng.choice(NAMES, 4)); axis.legend(loc="upper left")
    return draw_axes(draw, rng, (2, 2) if rng.integers(2) else (2, 1))


def arrows(rng):
    def draw(axis, rng):
        x, y = np.meshgrid(np.arange(12), np.arange(12))
        axis.quiver(x, y, np.cos(x * rng.uniform(.1, .6)), np.sin(y * rng.uniform(.1, .6)))
    return draw_axes(draw, rng, (1, int(rng.integers(1, 3))))


def radar(rng):
    def draw(axis, rng):
        at = np.linspace(0, 2 * np.pi, 7)
        for _ in range(2):
            value = rng.uniform(.3, 1, 7)
            axis.fill(at, value, alpha=.3); axis.plot(at, value)
        axis.set_ylim(0, 1)
    return draw_axes(draw, rng, (1, 2), "polar")


def surfaces(rng):
    def draw(axis, rng):
        x, y = np.meshgrid(np.linspace(-3, 3, 30), np.linspace(-3, 3, 30))
        axis.plot_surface(x, y, np.sin(x * rng.uniform(.5, 1.5)) * np.cos(y), cmap=str(rng.choice(["plasma", "jet", "cividis"])))
    return draw_axes(draw, rng, (1, int(rng.integers(1, 3))), "3d")


def circle_matrix(rng):
    def draw(axis, rng):
        x, y = np.meshgrid(range(9), range(9))
        shown = axis.scatter(x, y, s=rng.uniform(10, 160, x.size), c=rng.uniform(-1, 1, x.size), cmap=str(rng.choice(["RdBu", "PiYG", "magma"])))
        axis.set_xticks(range(9), rng.choice(NAMES, 9), rotation=90); axis.figure.colorbar(shown, ax=axis)
    return draw_axes(draw, rng, (1, int(rng.integers(1, 3))))


def code_listing(rng):
    dark = bool(rng.integers(2))
    page, pen = page_of(rng, (30, 34, 42) if dark else (250, 250, 245))
    font, y = font_of(rng, 10, 17), 15
    while y < page.height - 25:
        x = 15 + 22 * int(rng.integers(0, 4))
        pen.text((4, y), str(y // 5), fill=(130, 130, 130), font=font)
        for word in rng.choice(NAMES, int(rng.integers(1, 5))):
            text = str(word) + str(rng.choice([" = ", "()", "[0]", " +", ":", ", "]))
            pen.text((x + 20, y), text, fill=ink(rng, 120, 255) if dark else ink(rng, 0, 150), font=font)
            x += pen.textlength(text, font=font)
        y += int(font.size * 1.35)
    return np.asarray(page)


def form(rng):
    page, pen = page_of(rng)
    font, step = font_of(rng, 11, 16), int(rng.integers(30, 45))
    for row in range(int((page.height - 40) / step)):
        y = 20 + row * step
        pen.text((20, y + 4), f"{rng.choice(NAMES)}:", fill="black", font=font)
        pen.rectangle((130, y, page.width - 120, y + step - 10), outline="gray")
        for n in range(3): pen.rectangle((page.width - 100 + 28 * n, y + 4, page.width - 86 + 28 * n, y + 18), outline="black", fill="black" if rng.random() < .3 else None)
    return np.asarray(page)


def months(rng):
    page, pen = page_of(rng)
    font, cell = font_of(rng, 10, 14), 24
    for top in range(10, page.height - 180, 185):
        for left in range(10, page.width - 175, 190):
            pen.text((left + 50, top), str(rng.choice(NAMES)), fill=(170, 30, 30), font=font)
            for row, week in enumerate(calendar.monthcalendar(int(rng.integers(1950, 2050)), int(rng.integers(1, 13)))):
                for column, day in enumerate(week):
                    if day: pen.text((left + cell * column, top + 22 + 22 * row), str(day), fill="black", font=font)
    return np.asarray(page)


def sheet_music(rng):
    page, pen = page_of(rng)
    gap = int(rng.integers(6, 11))
    for top in range(30, page.height - 6 * gap, 10 * gap):
        for n in range(5): pen.line((15, top + n * gap, page.width - 15, top + n * gap), fill="black")
        for x in range(40, page.width - 30, int(4.2 * gap)):
            y = top + int(rng.integers(0, 9)) * gap // 2
            pen.ellipse((x, y - gap // 2, x + int(1.3 * gap), y + gap // 2), fill="black" if rng.random() < .7 else None, outline="black")
            pen.line((x + int(1.3 * gap), y, x + int(1.3 * gap), y - 3 * gap), fill="black", width=2)
    return np.asarray(page)


def icons(rng):
    page, pen = page_of(rng)
    size, colours = int(rng.integers(20, 46)), [ink(rng) for _ in range(2)]
    for top in range(10, page.height - 2 * size, int(2.1 * size)):
        for left in range(10, page.width - size, int(1.3 * size)):
            colour = colours[int(rng.random() < .3)]
            pen.ellipse((left + .3 * size, top, left + .7 * size, top + .4 * size), fill=colour)
            pen.rounded_rectangle((left + .15 * size, top + .45 * size, left + .85 * size, top + 1.7 * size), radius=size * .2, fill=colour)
    return np.asarray(page)


def street_map(rng):
    page, pen = page_of(rng, (235, 230, 220))
    font = font_of(rng, 10, 14)
    x = 5
    while x < page.width:
        width, y = int(rng.integers(40, 90)), 5
        while y < page.height:
            height = int(rng.integers(30, 80))
            pen.rectangle((x, y, x + width - 8, y + height - 8), fill=(200, 225, 190) if rng.random() < .2 else (250, 248, 240), outline=(190, 185, 175))
            if rng.random() < .4: pen.text((x + 4, y + 6), str(rng.choice(NAMES)), fill=(90, 90, 90), font=font)
            y += height
        x += width
    return np.asarray(page)


def hexagons(rng):
    page, pen = page_of(rng, ink(rng, 0, 255))
    side, palette = int(rng.integers(10, 32)), [ink(rng, 0, 255) for _ in range(int(rng.integers(2, 7)))]
    for row in range(int(page.height / side) + 1):
        for column in range(int(page.width / side) + 1):
            x, y = (column + .5 * (row % 2)) * side * 1.8, row * side * 1.55
            corners = [(x + side * np.sin(k * np.pi / 3), y + side * np.cos(k * np.pi / 3)) for k in range(6)]
            pen.polygon(corners, fill=palette[int(rng.integers(len(palette)))], outline="black" if rng.random() < .9 else None)
    return np.asarray(page)


def wallpaper(rng):
    "A soft motif repeated at half drop on a plain ground, some with film grain."
    side = int(rng.integers(28, 80))
    motif = cv2.GaussianBlur(rng.integers(0, 256, (side, side, 3)).astype(np.float32), (0, 0), side / rng.uniform(8, 16))
    y, x = np.mgrid[:side, :side] / (side - 1) * 2 - 1
    near = np.clip(4 * (1 - np.hypot(x, y)), 0, 1)[..., None]
    cell = 128 + near * (motif - motif.mean()) * 4
    wall = np.tile(np.vstack([np.hstack([cell, cell]), np.hstack([np.roll(cell, side // 2, axis=0)] * 2)]), (int(rng.integers(3, 6)), int(rng.integers(3, 6)), 1))
    return np.clip(wall + rng.normal(0, rng.choice([0, 2]), wall.shape), 0, 255).astype(np.uint8)


def woven(rng):
    height, width, pitch = int(rng.integers(260, 500)), int(rng.integers(260, 500)), int(rng.integers(6, 16))
    y, x = np.mgrid[:height, :width]
    over = (x // pitch + y // pitch) % 2
    thread = np.where(over, np.abs(np.sin(np.pi * x / pitch)), np.abs(np.sin(np.pi * y / pitch)))
    cloth = thread[..., None] * np.where(over[..., None], ink(rng, 60, 255), ink(rng, 60, 255))
    return np.clip(cloth + rng.normal(0, rng.choice([0, 4]), cloth.shape), 0, 255).astype(np.uint8)


def alignment(rng):
    page, pen = page_of(rng)
    font, colour = font_of(rng, 10, 15), {letter: ink(rng, 120, 250) for letter in "ACGT-"}
    first = rng.choice(list("ACGT"), 80)
    for row in range(int((page.height - 20) / 18)):
        for column in range(int((page.width - 20) / 13)):
            letter = str(first[column % 80]) if rng.random() < .8 else str(rng.choice(list("ACGT-")))
            pen.rectangle((10 + 13 * column, 10 + 18 * row, 22 + 13 * column, 27 + 18 * row), fill=colour[letter])
            pen.text((12 + 13 * column, 10 + 18 * row), letter, fill="black", font=font)
    return np.asarray(page)


def flow_chart(rng):
    page, pen = page_of(rng)
    font, width = font_of(rng, 11, 16), int(rng.integers(90, 130))
    for top in range(15, page.height - 60, 85):
        for left in range(15, page.width - width, width + 35):
            pen.rounded_rectangle((left, top, left + width, top + 45), radius=9, outline="black", fill=(225, 235, 250), width=2)
            pen.text((left + 10, top + 12), f"{rng.choice(NAMES)} {rng.choice(NAMES)[:4]}", fill="black", font=font)
            pen.line((left + width // 2, top + 45, left + width // 2, top + 85), fill="black", width=2)
            pen.polygon([(left + width // 2 - 5, top + 77), (left + width // 2 + 5, top + 77), (left + width // 2, top + 85)], fill="black")
    return np.asarray(page)


def crossword(rng):
    cell, rows, columns = int(rng.integers(22, 40)), int(rng.integers(9, 15)), int(rng.integers(9, 15))
    page = Image.new("RGB", (columns * cell + 21, rows * cell + 21), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=cell // 3)
    for n in range(rows * columns):
        x, y = 10 + n % columns * cell, 10 + n // columns * cell
        pen.rectangle((x, y, x + cell, y + cell), outline="black", fill="black" if rng.random() < .25 else "white")
        if rng.random() < .3: pen.text((x + 2, y + 1), str(n), fill="black", font=font)
    return np.asarray(page)


def molecules(rng):
    page, pen = page_of(rng)
    font, side = font_of(rng, 12, 17), int(rng.integers(20, 34))
    for top in range(60, page.height - 50, 5 * side):
        for left in range(60, page.width - 50, 5 * side):
            corners = [(left + side * np.sin(k * np.pi / 3), top + side * np.cos(k * np.pi / 3)) for k in range(6)]
            pen.polygon(corners, outline="black", width=2)
            for k in range(0, 6, 2): pen.line([tuple(.8 * np.subtract(corners[(k + j) % 6], (left, top)) + (left, top)) for j in (0, 1)], fill="black", width=2)
            x, y = corners[int(rng.integers(6))]
            end = x + 1.3 * (x - left), y + 1.3 * (y - top)
            pen.line((x, y, *end), fill="black", width=2)
            pen.text(end, str(rng.choice(["OH", "NH2", "Cl", "CH3"])), fill=ink(rng), font=font)
    return np.asarray(page)


def rods(rng):
    "Bent bacteria on dark ground, with camera noise."
    field = np.zeros((420, 480))
    for y, x in rng.uniform(15, 405, (int(rng.integers(40, 110)), 2)):
        cv2.ellipse(field, (int(x), int(y)), (int(rng.integers(9, 16)), 4), float(rng.uniform(0, 180)), 0, 360, float(rng.uniform(80, 220)), -1)
    field = cv2.GaussianBlur(field, (0, 0), 2) + 20 + rng.normal(0, rng.uniform(1, 5), field.shape)
    return cv2.cvtColor(np.clip(field, 0, 255).astype(np.uint8), cv2.COLOR_GRAY2RGB)


def bubbles(rng):
    field = np.full((420, 480), 170.)
    for y, x in rng.uniform(15, 405, (int(rng.integers(30, 80)), 2)):
        radius = int(rng.integers(8, 14))
        cv2.circle(field, (int(x), int(y)), radius, 90., 2), cv2.circle(field, (int(x), int(y)), radius - 2, 220., -1)
    field = cv2.GaussianBlur(field, (0, 0), 1.2) + rng.normal(0, rng.uniform(1, 5), field.shape)
    return cv2.cvtColor(np.clip(field, 0, 255).astype(np.uint8), cv2.COLOR_GRAY2RGB)


KINDS = (pies, violins, survival, forest_plot, stacked_areas, arrows, radar, surfaces, circle_matrix, code_listing, form, months, sheet_music, icons, street_map,
         hexagons, wallpaper, woven, alignment, flow_chart, crossword, molecules, rods, bubbles)


def through_jpeg(figure: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    "A figure as it comes back from a JPEG file."
    _, file = cv2.imencode(".jpg", figure[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(60, 96))])
    return cv2.imdecode(file, cv2.IMREAD_COLOR)[..., ::-1]


def made_negatives(each: int = 4, seed: int = 0):
    "Kind, number and figure of each: (H, W, 3) uint8 RGB; every second one went through JPEG."
    for number in range(each):
        for kind in KINDS:
            rng = np.random.default_rng([seed, number, *kind.__name__.encode()])
            figure = kind(rng)
            yield kind.__name__, number, np.ascontiguousarray(through_jpeg(figure, rng) if number % 2 else figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, required=True)
    parser.add_argument("--each", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.write.mkdir(parents=True, exist_ok=True)
    for kind, number, figure in made_negatives(options.each, options.seed): cv2.imwrite(str(options.write / f"{kind}_{number}.png"), figure[..., ::-1])


if __name__ == "__main__":
    main()
