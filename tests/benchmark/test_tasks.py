"""Every benchmark's schema: what is read, what is asked, what is right, what is refused."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest

from vllm_wsi.benchmark.slide_files import SlideFiles
from vllm_wsi.benchmark.tasks import read_task, score, to_messages
from vllm_wsi.errors import SlideError
from vllm_wsi.files import IMAGE_SUFFIXES
from vllm_wsi.questions.finder import NoFeaturesError
from vllm_wsi.questions.items import QuestionError
from vllm_wsi.slides import write_features

TCGA = "TCGA-A1-A0SB-01Z-00-DX1.B34C267B-CAAA-4AB6-AD5C-276C26F997A1"


def write_csv(path, *rows, bom=False):
    with open(path, "w", newline="", encoding="utf-8-sig" if bom else "utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_json(path, *rows):
    path.write_text(json.dumps(rows))
    return path


def test_slidebench_tcga(tmp_path):
    row = {"ID": "7", "Slide": TCGA, "Tumor": "BRCA", "Broad Category": "Diagnosis", "Narrow Category": "Grading"}
    row |= {"Question": "Which grade?", "A": "low", "B": "high", "C": "", "D": "", "Answer": "B"}
    (question,) = read_task("slidebench-tcga", write_csv(tmp_path / "q.csv", row, bom=True))
    assert question.key == "7"
    assert question.slide == TCGA
    assert question.categories == {"Broad Category": "Diagnosis", "Narrow Category": "Grading", "Tumor": "BRCA"}
    slide, text = to_messages(question, "file:///f/a.csv")[0]["content"]
    assert slide == {"type": "image_url", "image_url": {"url": "file:///f/a.csv"}}
    assert text == {"type": "text", "text": "Which grade?\nA. low\nB. high"}
    assert len(to_messages(question, None)[0]["content"]) == 1
    assert score(question, "B. high").correct
    assert not score(question, "C").correct
    assert score(question, "C").label is None


def test_slidebench_bcnb_numbers_rows_without_an_id(tmp_path):
    row = {
        "Slide": "1",
        "Task": "ER",
        "Question": "ER?",
        "A": "Positive",
        "B": "Negative",
        "C": "",
        "D": "",
        "Answer": "A",
    }
    first, second = read_task("slidebench-bcnb", write_csv(tmp_path / "q.csv", row, row))
    assert (first.key, second.key) == ("0", "1")
    assert first.slide == "1"
    assert first.categories == {"Task": "ER"}
    assert dict(first.options) == {"A": "Positive", "B": "Negative"}


def test_repeated_ids_stay_apart(tmp_path):
    row = {"ID": "1", "Slide": "1", "Question": "?", "A": "x", "B": "y", "Answer": "A"}
    assert [one.key for one in read_task("slidebench-tcga", write_csv(tmp_path / "q.csv", row, row))] == ["1", "1#2"]


def test_wsi_vqa_closed_and_open(tmp_path):
    closed = {"Id": "TCGA-LD-A74U", "Question": "size?", "Choice": ["50mm", "70mm."], "Answer": "70mm"}
    free = {"Id": "TCGA-LD-A74U", "Question": "what is her2 according to the slide?", "Answer": "2+"}
    first, second = read_task("wsi-vqa", write_json(tmp_path / "q.json", closed, free))
    assert first.gold == "B"
    assert first.text == "size?\nA. 50mm\nB. 70mm."
    assert first.categories == {"Part": "closed"}
    assert second.categories == {"Part": "open"}
    assert not second.options
    assert score(first, "70 mm").other["nearest_choice"] == 1.0  # the benchmark's own rule
    assert not score(first, "70 mm").correct  # ours does not guess
    assert score(first, "70mm").correct
    assert score(second, " 2+. ").correct
    assert score(second, "her2 is 2+").other["token_f1"] == pytest.approx(0.5)
    assert score(second, "her2 is 2+").correct is False
    assert score(second, "").other["token_f1"] == 0


def test_wsi_bench_inline_options_and_a_gold_with_a_quote(tmp_path):
    human = "<image>\nWhich pattern? A) acinar B) solid C) lepidic D) papillary"
    rows = [
        {"id": f"q{i}", "image": "TCGA-LUSC/slide-1.pt", "conversations": [{"from": "human", "value": text}, gold]}
        for i, (text, gold) in enumerate(
            [
                (human, {"from": "gpt", "value": 'B "'}),
                ("<image>\nDescribe the slide.", {"from": "gpt", "value": "A solid tumour of nests."}),
            ]
        )
    ]
    closed, free = read_task("wsi-bench", write_json(tmp_path / "q.json", *rows))
    assert closed.gold == "B"
    assert closed.slide == "TCGA-LUSC/slide-1"
    assert dict(closed.options) == {"A": "acinar", "B": "solid", "C": "lepidic", "D": "papillary"}
    assert closed.text == human.removeprefix("<image>\n")
    assert not free.options
    assert free.gold == "A solid tumour of nests."


def wsi_bench(folder, human, gold):
    turns = [{"from": "human", "value": f"<image>\n{human}"}, {"from": "gpt", "value": gold}]
    return read_task("wsi-bench", write_json(folder / "q.json", {"id": "q", "image": "a.pt", "conversations": turns}))


@pytest.mark.parametrize(
    ("human", "options"),
    [
        ("Is H. pylori there? A) Yes B) No C) Not told", ["Yes", "No", "Not told"]),
        ("Is H. pylori there?\nA. Yes\nB. No", ["Yes", "No"]),
        ("A patient with hepatitis B. Which finding? A) Fat B) Glass C) None", ["Fat", "Glass", "None"]),
        ("Blood group A. Which organ? A. Lung B. Liver", ["Lung", "Liver"]),
        ("Two arms, A) old B) new. Which won? A) Neither B) New C) Old", ["Neither", "New", "Old"]),
        ("Which? A) E. coli B) H. pylori C) C. difficile", ["E. coli", "H. pylori", "C. difficile"]),
        ("Which? A. yeast B. virus C. worm D. E. coli", ["yeast", "virus", "worm", "E. coli"]),
        ("Which? A. Hepatitis A. B. Hepatitis B. C. Neither", ["Hepatitis A.", "Hepatitis B.", "Neither"]),
        ("Which? (A) acinar, (B) solid; (C) lepidic", ["acinar", "solid", "lepidic"]),
    ],
)
def test_wsi_bench_options_are_the_last_letters_in_order(tmp_path, human, options):
    (question,) = wsi_bench(tmp_path, human, "A")
    assert list(question.options.items()) == list(zip("ABCDE", options, strict=False))
    assert (question.text, question.gold, question.categories["Part"]) == (human, "A", "closed")
    assert score(question, f"A) {options[0]}").correct
    assert not score(question, f"B) {options[1]}").correct


def test_wsi_bench_a_letter_that_is_no_option_is_refused_and_no_open_answer(tmp_path):
    with pytest.raises(QuestionError, match=r"answer: found 'C', wanted one of the question's options \(A, B\)"):
        wsi_bench(tmp_path, "Is H. pylori there? A) Yes B) No", "C")
    with pytest.raises(QuestionError, match=r"answer: found 'A', wanted one of the question's options \(none\)"):
        wsi_bench(tmp_path, "Is H. pylori there?", "A")
    (free,) = wsi_bench(tmp_path, "Is H. pylori there, and E. coli? A. B. answered.", "A few rods of H. pylori.")
    assert (free.options, free.categories["Part"]) == ({}, "open")


@pytest.mark.parametrize("suffix", ["", ".h5", ".B34C267B", *sorted(IMAGE_SUFFIXES)])
def test_a_slide_is_named_without_the_suffix_of_its_image(tmp_path, suffix):
    names = [f"S.1{suffix}", f"S.1{suffix.upper()}"]
    rows = [{"Slide": name, "Task": "ER", "Question": "ER?", "A": "+", "B": "-", "Answer": "A"} for name in names]
    found = [question.slide for question in read_task("slidebench-bcnb", write_csv(tmp_path / "q.csv", *rows))]
    assert found == (["S.1", "S.1"] if suffix in IMAGE_SUFFIXES else names)


def test_questions_are_read_where_no_image_can_be():
    code = "import sys; sys.modules['openslide'] = None; import vllm_wsi.benchmark.tasks"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("options", ['["Lung", "Liver"]', "['Lung', 'Liver']"])
@pytest.mark.parametrize("answer", ["2", "2.0", "Liver"])
def test_multipathqa_numbers_its_options(tmp_path, options, answer):
    row = {"benchmark_name": "gtex", "benchmark_id": "gtex_1", "image_path": "GTEX-1.tiff", "answer": answer}
    row |= {"options": options, "metric_type": "accuracy", "file_id": "x", "prompt": "Which organ?\n{options}\nNumber:"}
    (question,) = read_task("multipathqa", write_csv(tmp_path / "q.csv", row))
    assert question.slide == "GTEX-1"
    assert question.gold == "2"
    assert question.text == "Which organ?\n1. Lung\n2. Liver\nNumber:"
    assert score(question, '{"answer": 2}').correct
    assert question.categories == {"Benchmark": "gtex"}


def test_multipathqa_grades_have_no_options(tmp_path):
    row = {
        "benchmark_name": "panda",
        "image_path": "a.tiff",
        "answer": "4",
        "options": "",
        "prompt": 'Grade? As {{"isup_grade": N}}',
    }
    (question,) = read_task("multipathqa", write_csv(tmp_path / "q.csv", row))
    assert question.text == 'Grade? As {"isup_grade": N}'
    report = 'Gleason 4+4=8.\n```json\n{\n  "primary_pattern": 4,\n  "total_score": 8,\n  "isup_grade": 4\n}\n```'
    assert score(question, report).correct
    assert score(question, '{"isup_grade": 4}').correct
    assert not score(question, "3").correct


def test_csv_with_named_columns(tmp_path):
    row = {"case": "s1", "stem": "Which?", "one": "x", "two": "y", "right": "B", "organ": "lung"}
    columns = {"slide": "case", "question": "stem", "A": "one", "B": "two", "answer": "right", "category": "organ"}
    (question,) = read_task("csv", write_csv(tmp_path / "q.csv", row), columns)
    assert (question.slide, question.gold, question.text) == ("s1", "B", "Which?\nA. x\nB. y")
    assert question.categories == {"Category": "lung"}
    del columns["A"], columns["B"]
    (free,) = read_task("csv", write_csv(tmp_path / "q.csv", row), columns)
    assert (dict(free.options), free.gold) == ({}, "B")


def test_bad_rows_are_named_all_at_once(tmp_path):
    row = {"Slide": "1", "Question": "?", "A": "x", "B": "y", "Answer": "A"}
    path = write_csv(tmp_path / "q.csv", row, {**row, "Answer": "C"}, {**row, "Question": ""})
    with pytest.raises(QuestionError) as caught:
        read_task("slidebench-bcnb", path)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["q.csv, line 3", "q.csv, line 4"]
    with pytest.raises(QuestionError, match="wanted one of slidebench-tcga"):
        read_task("nosuch", path)
    with pytest.raises(QuestionError, match="found no 'nosuch'"):
        read_task("csv", path, {"slide": "nosuch"})
    with pytest.raises(QuestionError, match="found no 'Id'"):
        read_task("wsi-vqa", write_json(tmp_path / "q.json", {"Question": "?"}))


def test_slides_are_found_by_barcode(tmp_path):
    names = (TCGA, "TCGA-A1-A0SD-01Z-00-DX1.X", "TCGA-A1-A0SD-01Z-00-DX2.Y", "TCGA-A1-A0SE-01Z-00-DX2.X",
             "TCGA-A1-A0SE-01Z-00-DX3.Y", "1-2")  # fmt: skip
    for name in names:
        write_features(tmp_path / f"{name}.safetensors", np.ones((3, 4), np.float32))
    files = SlideFiles(tmp_path)
    for asked in (TCGA, "TCGA-A1-A0SB-01Z-00-DX1", "TCGA-A1-A0SB"):
        assert files.find(asked).path.name == f"{TCGA}.safetensors"
    assert files.find("TCGA-A1-A0SD").path.name.startswith("TCGA-A1-A0SD-01Z-00-DX1")
    with pytest.raises(SlideError, match="several slides of case"):
        files.find("TCGA-A1-A0SE")
    for asked in ("1", "TCGA-A1-A0SX"):
        with pytest.raises(NoFeaturesError):
            files.find(asked)


@pytest.mark.parametrize("work", ["work", "deep/er", "."])
def test_patches_thinned_by_an_earlier_run_are_no_slides_of_their_case(tmp_path, work):
    features = np.arange(400, dtype=np.float32).reshape(100, 4)
    write_features(tmp_path / f"{TCGA}.safetensors", features)
    for folder in (work, work, "other"):
        files = SlideFiles(tmp_path, "https://host/f", tmp_path / folder)
        slide = files.find("TCGA-A1-A0SB")
        assert (slide.path.name, slide.num_patches) == (f"{TCGA}.safetensors", 100)
        for policy in ("random-32", "uniform-32"):
            assert files.url(slide, policy).startswith("https://host/f/")
    assert len(list(tmp_path.rglob("*.safetensors"))) == 5


def test_a_slide_that_is_only_named_as_a_thinned_one_is_found(tmp_path):
    write_features(tmp_path / f"{TCGA}.uniform-32.safetensors", np.ones((3, 4), np.float32))
    assert SlideFiles(tmp_path).find("TCGA-A1-A0SB").num_patches == 3
