"""Question files: SlideInstruct JSON and SlideBench CSV, what they give, and what they are refused for."""

import json
from pathlib import Path

import numpy as np
import pytest

from vllm_wsi.errors import SlideError
from vllm_wsi.questions.finder import FeaturePath
from vllm_wsi.questions.items import MAX_PROBLEMS, SLIDE_MARK, QuestionError, SlideItem
from vllm_wsi.questions.reader import read_questions
from vllm_wsi.slides import write_features

TCGA = "TCGA-A1-A0SB-01Z-00-DX1.B34C267B-CAAA-4AB6-AD5C-276C26F997A1"
HEADER = "ID,Slide,Task,Question,A,B,C,D,Answer"


@pytest.fixture
def features(tmp_path) -> Path:
    root = tmp_path / "features"
    (root / "BRCA").mkdir(parents=True)
    for name in ("1.safetensors", "22.safetensors", f"BRCA/{TCGA}.safetensors"):
        write_features(root / name, np.ones((3, 4), np.float32))
    np.save(root / "BRCA/only.npy", np.ones((5, 4), np.float32))
    return root


def write_csv(folder: Path, *lines: str, header: str = HEADER, encoding: str = "utf-8") -> Path:
    path = folder / "bench.csv"
    path.write_text("\n".join([header, *lines]) + "\n", encoding=encoding)
    return path


def write_json(folder: Path, *rows: object, encoding: str = "utf-8") -> Path:
    path = folder / "instruct.json"
    path.write_text(json.dumps(rows), encoding=encoding)
    return path


def conversation(image: object, *said: str) -> dict:
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]
    return {"id": "x", "image": image, "conversations": turns}


def problems(path: Path, features: Path) -> list[str]:
    with pytest.raises(QuestionError) as caught:
        read_questions(path, features)
    return caught.value.problems


def slide_paths(item: SlideItem, root: Path) -> list[str]:
    paths = [slide.path for slide in item.slides if isinstance(slide, FeaturePath)]
    return [str(path.relative_to(root)) for path in paths]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_row_of_slidebench_is_asked_as_slidechat_asks_it(tmp_path, features, encoding):
    path = write_csv(tmp_path, "7,1,Grading,Which grade? ,low, high ,middle,none,B", encoding=encoding)
    (item,) = read_questions(path, features)
    assert item.question == "<image>\nWhich grade?\nA. low\nB. high\nC. middle\nD. none"
    assert item.answer == "B"
    assert item.turns == ((item.question, "B"),)
    assert item.options == {"A": "low", "B": "high", "C": "middle", "D": "none"}
    assert item.where == "bench.csv, line 2"
    assert slide_paths(item, features) == ["1.safetensors"]
    assert item.slides[0].name == "1.safetensors"
    with item.slides[0].open() as slide:
        assert (slide.num_patches, slide.feature_dim) == (3, 4)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_byte_order_mark_does_not_hide_the_first_column(tmp_path, features, encoding):
    path = write_csv(tmp_path, "22,Grösse?,a,b,A", header="Slide,Question,A,B,Answer", encoding=encoding)
    (item,) = read_questions(path, features)
    assert item.question == "<image>\nGrösse?\nA. a\nB. b"


def test_empty_options_are_left_out(tmp_path, features):
    path = write_csv(
        tmp_path, "1,1,t,Is it?,yes,no,,,A", "2,1,t,Is it?,yes,no, ,,B", '3,1,t,Is it?,"yes, it is",no,,,A'
    )
    first, second, third = read_questions(path, features)
    assert first.options == second.options == {"A": "yes", "B": "no"}
    assert first.question == "<image>\nIs it?\nA. yes\nB. no"
    assert third.options["A"] == "yes, it is"


def test_a_file_of_up_to_eight_options_and_without_the_columns_c_and_d_is_read(tmp_path, features):
    five = write_csv(tmp_path, "1,Which?,a,b,c,d,e,E", header="Slide,Question,A,B,C,D,E,Answer")
    assert list(read_questions(five, features)[0].options) == list("ABCDE")
    two = write_csv(tmp_path, "1,Which?,a,b,B", header="Slide,Question,A,B,Answer")
    assert list(read_questions(two, features)[0].options) == ["A", "B"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1,1,t,Which?,a,b,c,d,E", "Answer: found 'E', wanted one of A, B, C, D"),
        ("1,1,t,Which?,a,b,,,C", "Answer: found 'C', wanted one of A, B"),
        ("1,1,t,Which?,a,b,,,b", "Answer: found 'b', wanted one of A, B"),
        ("1,1,t,Which?,a,b,c,d,", "Answer: found nothing"),
        ("1,1,t,Which?,a,b,c", "Answer: found nothing"),
        ("1,1,t,Which?,a,,,,A", "found 1 options, wanted at least two"),
        ("1,1,t, ,a,b,,,A", "Question: found nothing"),
        ("1,,t,Which?,a,b,,,A", "Slide: found nothing"),
        ("1,404,t,Which?,a,b,,,A", "found no features of slide '404' in features"),
    ],
)
def test_a_bad_row_is_refused_by_file_and_line(tmp_path, features, line, message):
    (problem,) = problems(write_csv(tmp_path, "0,1,t,Which?,a,b,,,A", line), features)
    assert problem.startswith("bench.csv, line 3: ")
    assert message in problem


def test_a_missing_column_is_named(tmp_path, features):
    found = problems(write_csv(tmp_path, "1,1,a,b,A", header="ID,Slide,A,B,Answer"), features)
    assert found == ["bench.csv, line 2: found no 'Question'"]


@pytest.mark.parametrize("image", ["1.safetensors", ["1.safetensors"]])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_conversation_of_slideinstruct_keeps_its_turns(tmp_path, features, image, encoding):
    row = conversation(image, "<image>\nWhat is it?", " A tumour.\n", "Which?", "Breast.")
    (item,) = read_questions(write_json(tmp_path, row, encoding=encoding), features)
    assert item.turns == (("<image>\nWhat is it?", "A tumour."), ("Which?", "Breast."))
    assert (item.question, item.answer) == item.turns[0]
    assert item.options == {}
    assert item.where == "instruct.json, item 0"


def test_several_slides_stand_in_the_order_of_their_marks(tmp_path, features):
    row = conversation(["22.safetensors", f"BRCA/{TCGA}.pt", "1"], "Compare <image> to <image> and <image>.", "Same.")
    (item,) = read_questions(write_json(tmp_path, row), features)
    assert slide_paths(item, features) == ["22.safetensors", f"BRCA/{TCGA}.safetensors", "1.safetensors"]
    assert item.question == "Compare <image> to <image> and <image>."


@pytest.mark.parametrize(("images", "marks"), [("1", 1), (["1", "22"], 2)])
def test_a_conversation_without_marks_gets_one_for_each_slide(tmp_path, features, images, marks):
    (item,) = read_questions(write_json(tmp_path, conversation(images, "What is it?", "A tumour.")), features)
    assert item.question == SLIDE_MARK * marks + "\nWhat is it?"
    assert len(item.slides) == marks


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (conversation("1", "<image>\n<image>\nWhat?", "x"), "<image>: found [2, 0] in the turns, wanted 1"),
        (conversation(["1", "22"], "<image>\nWhat?", "x"), "<image>: found [1, 0] in the turns, wanted 2"),
        (conversation("1", "<image>What?", "x", "And <image>?", "y"), "found [1, 0, 1, 0] in the turns"),
        (conversation("1", "What?", "x", "And <image>?", "y"), "found [1, 0, 1, 0] in the turns"),
        (conversation("1", "<image>What?", "<image>"), "found [1, 1] in the turns"),
        (conversation("1", "<image>What?"), "found other speakers, wanted human and gpt"),
        (conversation("1", "<image>What?", "x", "y"), "found other speakers, wanted human and gpt"),
        (conversation("1"), "found other speakers, wanted human and gpt"),
        (conversation("1", "<image>What?", "  "), "found an empty turn"),
        (conversation("1", "", "x"), "found an empty turn"),
        ({"image": "1", "conversations": [{"from": "gpt", "value": "x"}, {"from": "human", "value": "y"}]}, "speakers"),
        ({"image": "1", "conversations": [{"from": "human", "value": "x"}, {"from": "gpt"}]}, "found no 'value'"),
        ({"image": "1", "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": 3}]}, "empty turn"),
        ({"conversations": []}, "found no 'image'"),
        ({"image": "1"}, "found no 'conversations'"),
        (conversation("404.h5", "<image>What?", "x"), "found no features of slide '404.h5' in features"),
    ],
)
def test_a_bad_conversation_is_refused_by_file_and_number(tmp_path, features, row, message):
    good = conversation("1", "<image>What?", "x")
    (problem,) = problems(write_json(tmp_path, good, row, good), features)
    assert problem.startswith("instruct.json, item 1: ")
    assert message in problem


@pytest.mark.parametrize("row", ["text", 3, None, [], conversation(None, "x", "y"), conversation([5], "x", "y")])
def test_what_is_no_conversation_at_all_is_named_too(tmp_path, features, row):
    (problem,) = problems(write_json(tmp_path, row), features)
    assert problem.startswith("instruct.json, item 0: ")


@pytest.mark.parametrize(("bad", "told"), [(1, 1), (MAX_PROBLEMS, MAX_PROBLEMS), (MAX_PROBLEMS + 1, 11), (37, 11)])
def test_all_bad_rows_are_counted_and_the_first_ten_told(tmp_path, features, bad, told):
    lines = ["0,1,t,Which?,a,b,,,A"] + [f"{i},missing-{i},t,Which?,a,b,,,A" for i in range(bad)]
    with pytest.raises(QuestionError) as caught:
        read_questions(write_csv(tmp_path, *lines), features)
    said = str(caught.value).splitlines()
    assert len(said) == told
    assert [line.split(":")[0] for line in said[:10]] == [f"bench.csv, line {i + 3}" for i in range(min(bad, 10))]
    assert len(caught.value.problems) == bad
    if bad > MAX_PROBLEMS:
        assert said[-1] == f"... and {bad - MAX_PROBLEMS} more"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "", "found no JSON"),
        ("a.json", "[{", "found no JSON"),
        ("a.json", "{}", "found a dict, wanted a list of conversations"),
        ("a.json", "[]", "found no question, wanted at least one"),
        ("a.csv", "", "found no question, wanted at least one"),
        ("a.csv", HEADER + "\n", "found no question, wanted at least one"),
        ("a.csv", "\ufeff" + HEADER, "found no question, wanted at least one"),
        ("a.xlsx", "", "found the suffix '.xlsx', wanted one of .json, .csv"),
        ("a", "", "found the suffix '', wanted one of .json, .csv"),
    ],
)
def test_a_file_that_holds_no_questions_is_refused_by_name(tmp_path, features, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    (problem,) = problems(path, features)
    assert problem.startswith(f"{path}: ")
    assert message in problem


def test_features_that_are_no_directory_are_refused(tmp_path, features):
    path = write_csv(tmp_path, "0,1,t,Which?,a,b,,,A")
    assert "found no directory" in problems(path, tmp_path / "nothing")[0]
    assert "found no directory" in problems(path, features / "1.safetensors")[0]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("1.safetensors", "1.safetensors"),
        ("1", "1.safetensors"),
        ("1.csv", "1.safetensors"),
        ("./1.safetensors", "1.safetensors"),
        ("elsewhere/22.h5", "22.safetensors"),
        ("BRCA/only.npy", "BRCA/only.npy"),
        ("only", "BRCA/only.npy"),
        (TCGA, f"BRCA/{TCGA}.safetensors"),
        (f"{TCGA}.pt", f"BRCA/{TCGA}.safetensors"),
        (f"TCGA-BRCA/{TCGA}.csv", f"BRCA/{TCGA}.safetensors"),
    ],
)
def test_a_slide_is_found_by_its_path_or_by_its_name_with_any_suffix(tmp_path, features, name, wanted):
    (item,) = read_questions(write_json(tmp_path, conversation(name, "<image>What?", "x")), features)
    assert slide_paths(item, features) == [wanted]


@pytest.mark.parametrize("name", ["2", "BRCA", TCGA.split(".")[0], f"{TCGA}.txt", "", "1.txt", ".."])
def test_a_slide_of_another_name_is_not_found(tmp_path, features, name):
    assert "found no features" in problems(write_json(tmp_path, conversation(name, "<image>?", "x")), features)[0]


def test_a_path_below_the_directory_goes_before_a_name(tmp_path, features):
    write_features(features / "BRCA/1.safetensors", np.ones((9, 4), np.float32))
    rows = [conversation(name, "<image>What?", "x") for name in ("BRCA/1.safetensors", "1.safetensors")]
    inner, outer = read_questions(write_json(tmp_path, *rows), features)
    assert slide_paths(inner, features) == ["BRCA/1.safetensors"]
    assert slide_paths(outer, features) == ["1.safetensors"]


def test_a_feature_file_that_vanished_says_so_when_it_is_opened(tmp_path, features):
    (item,) = read_questions(write_csv(tmp_path, "0,1,t,Which?,a,b,,,A"), features)
    (features / "1.safetensors").unlink()
    with pytest.raises(SlideError, match=r"1\.safetensors"):
        item.slides[0].open()
