"Submission: what the writer writes is always valid, and no mutation of a valid file passes."
import csv
import io
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recodai_forgery.rle import encode, runs
from recodai_forgery.submission import (
    MISSING,
    predict_folder,
    read_table,
    shared_pixels,
    validate_submission,
    write_submission,
)
from recodai_forgery.types import AUTHENTIC, BadTable, Prediction

SHAPES = {"007": (20, 30), "8": (9, 9), "45": (20, 30), "100": (20, 30)}
IDS = list(SHAPES)
CELLS = [["case_id", "annotation"], ["007", "[3, 5];[41, 2, 61, 4]"], ["8", AUTHENTIC], ["45", AUTHENTIC], ["100", "[1, 600]"]]


def as_csv(cells, **options) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n", **options).writerows(cells)
    return text.getvalue()


@pytest.fixture
def sample():
    return pd.DataFrame({"case_id": IDS, "annotation": AUTHENTIC})


# ---- the writer ----

ids = st.text("0123456789abcXYZ_-", min_size=1, max_size=8)


@st.composite
def answers(draw):
    "Predictions for some figures of a sample, in any order, and the sample's ids."
    wanted = draw(st.lists(ids, min_size=1, max_size=12, unique=True))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    predictions = []
    for name in draw(st.permutations(wanted)):
        shape = tuple(rng.integers(1, 24, 2).tolist())
        masks = rng.random((rng.integers(0, 4), *shape)) < rng.choice([.02, .5, 1.])
        masks = [mask for place, mask in enumerate(masks) if mask.any() and not any((mask == other).all() for other in masks[:place])]
        predictions.append(Prediction(name, shape, annotation=encode(masks)))
    return wanted, predictions[:draw(st.integers(1, len(predictions)))]


@settings(max_examples=200, deadline=None)
@given(answers())
def test_what_is_written_is_valid(tmp_path_factory, drawn):
    wanted, predictions = drawn
    path = tmp_path_factory.getbasetemp() / "property.csv"
    sample = pd.DataFrame({"case_id": wanted, "annotation": AUTHENTIC})
    table = write_submission(path, iter(predictions), sample)
    shapes = {prediction.case_id: prediction.shape for prediction in predictions}
    problems = validate_submission(path, sample, shapes)
    assert problems == [] and not any("not checked" in note for note in problems.notes)
    back = read_table(path)
    assert back.case_id.tolist() == wanted
    known = {prediction.case_id: prediction.annotation for prediction in predictions}
    assert back.annotation.tolist() == [known.get(name, AUTHENTIC) for name in wanted]
    assert set(table.attrs["without_prediction"]) == set(wanted) - set(known)
    # pandas, with which the official scorer reads, sees the same cells
    assert pd.read_csv(path, dtype={"case_id": str}, keep_default_na=False).annotation.tolist() == back.annotation.tolist()


def test_order_and_spelling_come_from_the_sample(tmp_path, sample):
    predictions = [Prediction(name, SHAPES[name], annotation="[1, 2]") for name in ("100", "8", "007")]
    (tmp_path / "sample.csv").write_text(as_csv([["case_id", "annotation"], *([name, AUTHENTIC] for name in IDS)]))
    table = write_submission(tmp_path / "out.csv", predictions, tmp_path / "sample.csv")
    assert (tmp_path / "out.csv").read_text() == 'case_id,annotation\n007,"[1, 2]"\n8,"[1, 2]"\n45,authentic\n100,"[1, 2]"\n'
    assert table.attrs == {"without_prediction": ("45",), "not_in_sample": ()}


def test_without_a_sample_ids_stand_in_natural_order(tmp_path):
    write_submission(tmp_path / "out.csv", [Prediction(name, (3, 3)) for name in ("45", "9", "007")])
    assert read_table(tmp_path / "out.csv").case_id.tolist() == ["007", "9", "45"]


@pytest.mark.parametrize("predictions, message", [
    ([Prediction("8", (9, 9)), Prediction("8", (9, 9))], "two predictions for case 8"),
    ([Prediction("9", (9, 9)), Prediction("10", (9, 9))], "none of the 2 predicted ids (9, 10)"),
    ([Prediction("8", (9, 9), annotation="[81, 2]")], "case 8: instance 1: its last run [81, 2] ends at pixel 82 of 81"),
    ([Prediction("8", (9, 9), annotation="")], "reads as a missing value"),
])
def test_the_writer_refuses_and_leaves_the_old_file(tmp_path, sample, predictions, message):
    path = tmp_path / "out.csv"
    path.write_text("old")
    with pytest.raises(BadTable) as problem: write_submission(path, predictions, sample)
    assert message in str(problem.value)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_failing_generator_leaves_no_file(tmp_path, sample):
    def killed():
        yield Prediction("8", (9, 9))
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): write_submission(tmp_path / "out.csv", killed(), sample)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_is_cut_leaves_the_old_file(tmp_path, sample, monkeypatch):
    def cut(table, path, **options):
        with open(path, "w") as file: file.write("case_id,ann")
        raise OSError(28, "No space left on device")
    (tmp_path / "out.csv").write_text("old")
    monkeypatch.setattr(pd.DataFrame, "to_csv", cut)
    with pytest.raises(OSError, match="No space left"): write_submission(tmp_path / "out.csv", [Prediction("8", (9, 9))], sample)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


# ---- the validator ----

def cell(row, column, text, **options):
    "The clean file with one cell replaced."
    cells = [list(line) for line in CELLS]
    cells[row][column] = text
    return as_csv(cells, **options)


def lines(change):
    "The clean file with its lines changed."
    text = as_csv(CELLS).splitlines(keepends=True)
    return "".join(change(text))


ANNOTATIONS = {
    "empty": "", "blank": " ", "dash": "-", "zero": "0", "one list of nothing": "[]", "empty instance behind": "[3, 5];[]",
    "trailing ;": "[3, 5];", "deep": "[" * 100_000,
    "leading ;": ";[3, 5]", "doubled ;": "[3, 5];;[10, 2]", "comma between instances": "[3, 5],[10, 2]", "spaces": "[3 5]",
    "overview page": "[123 4]",
    "no brackets": "3 5", "bare commas": "3, 5", "open": "[3, 5", "closed": "3, 5]", "trailing comma": "[3, 5,]",
    "round brackets": "(3, 5)",
    "0-indexed": "[0, 3]", "negative start": "[-3, 2]", "zero length": "[3, 0]", "negative length": "[5, -2]",
    "zero length behind": "[3, 5, 20, 0]",
    "floats": "[3.0, 5.0]", "fraction": "[1.9, 2]", "exponent": "[1e1, 2]", "strings": '["3", "5"]', "true": "[true, 2]",
    "null": "[null, 2]", "NaN": "[NaN, 1]",
    "infinite": "[Infinity, 1]", "leading zero": "[03, 5]", "plus": "[+3, 5]", "odd": "[3, 5, 10]", "nested": "[[3, 5], [10, 2]]",
    "object": '{"a": 1}',
    "the seed's": '{"counts": [3, 5], "size": [20, 30]}', "descending": "[10, 2, 3, 5]", "overlapping runs": "[3, 5, 7, 2]",
    "same run twice": "[3, 5, 3, 5]",
    "beyond the end": "[599, 3]", "start beyond the end": "[601, 1]", "32 bits": "[3000000000, 2]",
    "4300 digits": "[" + "9" * 5000 + ", 1]",
    "same instance twice": "[3, 5];[3, 5]", "same pixels twice": "[3, 5];[10, 1];[3, 2, 5, 3]", "authentic and more": "authentic;[3, 5]",
    "space before": " authentic", "space behind": "authentic ", "capital": "Authentic", "quoted": '"authentic"',
    "in a list": '["authentic"]', "misspelt": "autentic",
    "line end": "authentic\n", "words": "forged", "minus sign": "[\u22123, 5]", "full-width digits": "[\uff13, 5]",
    "zero-width space": "\u200bauthentic",
}
ANNOTATIONS |= {f"missing value {word!r}": word for word in MISSING}

FILES = {
    "nothing": "", "only line ends": "\n\n", "header alone": "case_id,annotation\n", "no header": lines(lambda text: text[1:]),
    "semicolons between columns": as_csv(CELLS, delimiter=";"), "tabs": as_csv(CELLS, delimiter="\t"), "bars": as_csv(CELLS, delimiter="|"),
    "index column": as_csv([["", *CELLS[0]], *([str(place), *line] for place, line in enumerate(CELLS[1:]))]),
    "shape column": as_csv([[*line, "shape"] for line in CELLS]), "annotation alone": as_csv([line[1:] for line in CELLS]),
    "ids alone": as_csv([line[:1] for line in CELLS]),
    "columns swapped": as_csv([line[::-1] for line in CELLS]), "column twice": as_csv([[*line, line[1]] for line in CELLS]),
    "wrong id column": cell(0, 0, "id"), "capital column": cell(0, 1, "Annotation"), "space in a column": cell(0, 1, " annotation"),
    "rle column": cell(0, 1, "rle"),
    "byte-order mark": "\ufeff" + as_csv(CELLS),
    "row missing": lines(lambda text: text[:2] + text[3:]), "last row missing": lines(lambda text: text[:-1]),
    "row twice": lines(lambda text: text + text[2:3]),
    "row added": lines(lambda text: [*text, "46,authentic\n"]), "rows swapped": lines(lambda text: [text[0], text[2], text[1], *text[3:]]),
    "rows sorted as text": lines(lambda text: [text[0], *sorted(text[1:])]),
    "header twice": lines(lambda text: text[:1] + text), "id as a number": cell(1, 0, "7"), "id as a fraction": cell(2, 0, "8.0"),
    "id with a space": cell(3, 0, " 45"),
    "id with an ending": cell(3, 0, "45.png"), "id empty": cell(3, 0, ""), "another's id": cell(3, 0, "8"),
    "no quotes": lines(lambda text: [line.replace('"', "") for line in text]),
    "single quotes": lines(lambda text: [line.replace('"', "'") for line in text]),
    "open quote": lines(lambda text: [*text[:-1], text[-1].replace(']"', "]")]),
    "cell missing": lines(lambda text: [*text[:2], "8\n", *text[3:]]),
    "cell too many": lines(lambda text: [*text[:2], "8,authentic,1\n", *text[3:]]), "cut in a number": as_csv(CELLS)[:-6],
    "cut in a row": as_csv(CELLS)[:-24],
    "spaces after commas": as_csv(CELLS).replace(",", ", "),
}


def test_the_unchanged_file_is_valid(tmp_path, sample):
    path = tmp_path / "submission.csv"
    path.write_text(as_csv(CELLS))
    assert validate_submission(path, sample, SHAPES) == []
    assert validate_submission(read_table(path), sample, SHAPES) == []
    for same in (as_csv(CELLS).replace("\n", "\r\n"), as_csv(CELLS)[:-1], as_csv(CELLS, quoting=csv.QUOTE_ALL), as_csv(CELLS) + "\n"):
        path.write_bytes(same.encode())
        assert validate_submission(path, sample, SHAPES) == []


@pytest.mark.parametrize("name", ANNOTATIONS)
def test_every_odd_annotation_is_caught(tmp_path, sample, name):
    path = tmp_path / "submission.csv"
    path.write_text(cell(3, 1, ANNOTATIONS[name]), encoding="utf-8", newline="")
    problems = validate_submission(path, sample, SHAPES)
    assert len(problems) >= 1 and {(problem.row, problem.case_id) for problem in problems} == {(4, "45")}
    assert all(problem.cause and problem.remedy for problem in problems)
    table = pd.DataFrame(CELLS[1:], columns=CELLS[0])
    table.loc[2, "annotation"] = ANNOTATIONS[name]
    assert list(map(str, validate_submission(table, sample, SHAPES))) == list(map(str, problems))


@pytest.mark.parametrize("name", FILES)
def test_every_mutation_of_the_file_is_caught(tmp_path, sample, name):
    path = tmp_path / "submission.csv"
    path.write_text(FILES[name], encoding="utf-8", newline="")
    problems = validate_submission(path, sample, SHAPES)
    assert len(problems) >= 1
    assert all(problem.cause and problem.remedy for problem in problems)


@pytest.mark.parametrize("data", [
    as_csv(CELLS).encode("utf-16"), b"\xff\xfe\x00", b"case_id,annotation\n8,\xe9\n", b"\x89PNG\r\n\x1a\n\x00\x00"])
def test_what_is_not_text_is_caught(tmp_path, data):
    (tmp_path / "submission.csv").write_bytes(data)
    problem, = validate_submission(tmp_path / "submission.csv")
    assert "not UTF-8" in problem.cause
    with pytest.raises(BadTable, match="not UTF-8"): read_table(tmp_path / "submission.csv")


@settings(max_examples=300, deadline=None)
@given(row=st.integers(1, 4), place=st.integers(0, 400), char=st.sampled_from("[];,.-+ \t'\"eaN\u00a0"),
       how=st.sampled_from(["put", "drop", "replace"]))
def test_what_passes_after_a_stray_character_is_correct(row, place, char, how):
    "What passes is a correct annotation, though maybe of other pixels, which no validator can know."
    table = pd.DataFrame(CELLS[1:], columns=CELLS[0])
    before = table.annotation[row - 1]
    place %= len(before)
    after = before[:place] + {"put": char + before[place], "drop": "", "replace": char}[how] + before[place + 1:]
    table.loc[row - 1, "annotation"] = after
    problems = validate_submission(table, None, SHAPES)
    if problems: return
    if after == AUTHENTIC: assert before == AUTHENTIC; return
    values = [json.loads(part) for part in after.split(";")]
    assert all(type(value) is int and value > 0 for part in values for value in part)
    assert all(part[-2] + part[-1] - 1 <= np.prod(SHAPES[IDS[row - 1]]) for part in values)


def test_all_problems_are_named_not_the_first(tmp_path, sample):
    path = tmp_path / "submission.csv"
    path.write_text('case_id,annotation\n7,"[0, 3];[5, 2];[9, -1]"\n8,\n8,NaN\n45,"[3, 5],[10, 2]"\n')
    problems = validate_submission(path, sample, SHAPES)
    assert [(problem.row, problem.case_id) for problem in problems] == [
        (2, "7"), (2, "7"), (2, "7"), (3, "8"), (4, "8"), (4, "8"), (5, "45"), (None, "007"), (None, "100")]
    assert "write it '007'" in str(problems)


def test_blank_lines_do_not_shift_the_rows(tmp_path):
    path = tmp_path / "submission.csv"
    path.write_text("case_id,annotation\n\n8,authentic\n\n45,-\n")
    problem, = validate_submission(path)
    assert (problem.row, problem.case_id) == (5, "45")


def test_a_dataframe_is_read_as_its_file_would_be(sample):
    table = pd.DataFrame({"case_id": [8, 45], "annotation": [np.nan, None]})
    problems = validate_submission(table, sample.iloc[1:3], SHAPES)
    assert [(problem.row, problem.case_id) for problem in problems] == [(2, "8"), (3, "45")]
    assert validate_submission(pd.DataFrame({"case_id": [45], "annotation": [[3, 5]]}))[0].cause.endswith("not text")


def test_without_shapes_the_ends_are_not_checked_and_the_notes_say_so(sample):
    table = pd.DataFrame({"case_id": IDS, "annotation": ["[3, 5]", AUTHENTIC, "[601, 1]", AUTHENTIC]})
    problems = validate_submission(table, sample)
    assert problems == [] and "not checked in 2 rows of unknown shape (case 007, 45)" in problems.notes[0]
    problem, = validate_submission(table, sample.assign(shape=["[20, 30]", AUTHENTIC, "[20, 30]", "[20, 30]"]))
    assert problem.row == 4 and "ends at pixel 601 of 600" in problem.cause
    assert "ids were not compared" in validate_submission(table).notes[0]


def test_overlapping_instances_are_noted_not_refused(sample):
    table = pd.DataFrame({"case_id": IDS, "annotation": ["[3, 5];[5, 5]", AUTHENTIC, AUTHENTIC, AUTHENTIC]})
    problems = validate_submission(table, sample, SHAPES)
    assert problems == [] and problems.notes == ["row 2, case 007: instances share 3 pixels, which the official scorer accepts"]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_shared_pixels_counts_them(seed):
    rng = np.random.default_rng(seed)
    masks = rng.random((rng.integers(1, 5), *rng.integers(1, 12, 2))) < rng.random()
    instances = [runs(mask) for mask in masks if mask.any()]
    assert shared_pixels(instances) == int((masks.sum(axis=0) > 1).sum())


@pytest.mark.parametrize("columns", [{"id": ["1"]}, {"case_id": []}, {"case_id": ["1", "1"]}, {"case_id": ["1", None]}])
def test_a_useless_sample_is_an_error(tmp_path, columns):
    with pytest.raises(BadTable): write_submission(tmp_path / "out.csv", [Prediction("1", (3, 3))], pd.DataFrame(columns))
    with pytest.raises(BadTable): validate_submission(pd.DataFrame({"case_id": ["1"], "annotation": [AUTHENTIC]}), pd.DataFrame(columns))


def test_a_missing_file_is_a_typed_error(tmp_path):
    for read in (read_table, validate_submission):
        with pytest.raises(BadTable, match="check the path"): read(tmp_path / "none.csv")


# ---- recorded answers and the development benchmark ----

def test_the_official_edge_cases(shared):
    "Everything odd that was recorded from the official decoder is refused, but for the four that are correct."
    fine = {"[1,20]", "[20,1]", "[1,3]", "[1, 2]", "[1,2] ", "[1,2,3,2]", AUTHENTIC}
    for line in (shared / "golden" / "decode_edge.jsonl").read_text().splitlines():
        edge = json.loads(line)
        table = pd.DataFrame({"case_id": ["45"], "annotation": [edge["rle"]]})
        problems = validate_submission(table, None, {"45": edge["shape"]})
        assert (not problems) == (edge["rle"] in fine), edge["rle"]
        assert all((problem.row, problem.case_id) == (2, "45") for problem in problems)


def test_the_benchmark_s_own_solution_is_a_valid_submission(shared, tmp_path):
    bench = shared / "bench" / "dev"
    solution = read_table(bench / "solution.csv")
    solution[["case_id", "annotation"]].to_csv(tmp_path / "truth.csv", index=False)
    assert validate_submission(tmp_path / "truth.csv", bench / "sample_submission.csv", bench / "solution.csv") == []
    assert validate_submission(bench / "sample_submission.csv", bench / "sample_submission.csv") == []
    assert validate_submission(bench / "solution.csv", bench / "sample_submission.csv")[0].cause == "there is a column 'shape' too many"


def test_two_figures_with_one_id_are_refused_before_any_is_predicted(tmp_path):
    import cv2
    for name in ("45.png", "45.jpg"): cv2.imwrite(str(tmp_path / name), np.zeros((8, 8), np.uint8))
    with pytest.raises(BadTable, match="two figures have the id 45"):
        predict_folder(tmp_path, tmp_path / "out.csv", detector=None, progress=False)
    with pytest.raises(BadTable, match="has none of its"):
        (tmp_path / "45.jpg").unlink()
        predict_folder(tmp_path, tmp_path / "out.csv", None, pd.DataFrame({"case_id": ["46"]}), progress=False)
    assert not (tmp_path / "out.csv").exists()
