"""Tables of runs as people export them: the same numbers, or one line of refusal."""

import codecs
from pathlib import Path

import pytest

from moe_lab.errors import AnalysisError
from moe_lab.scaling import read_runs

RUNS = [[1, 2.51, 200_000], [2, 2.375, 200_000], [4, 2.2, 1_500_000]]


def table(separator: str, *lines: str, header: str = "ratio loss tokens") -> str:
    return "\n".join(line.replace(" ", separator) for line in (header, *lines)) + "\n"


GERMAN = table(";", "1 2,51 200.000", "2 2,375 200.000", "4 2,2 1.500.000")
SAME = {
    "comma": table(",", "1 2.51 200000", "2 2.375 200000", "4 2.2 1500000"),
    "quoted thousands": table(",", '1 2.51 "200,000"', '2 2.375 "200,000"', '4 2.2 "1,500,000"'),
    "quoted decimal comma": table(",", '1 "2,51" 200000', '2 "2,375" 200000', '4 "2,2" 1500000'),
    "German": GERMAN,
    "English with semicolons": table(";", "1 2.51 200,000", "2 2.375 200,000", "4 2.2 1,500,000"),
    "Swiss": table(";", "1 2.51 200'000", "2 2.375 200'000", "4 2.2 1'500'000"),
    "narrow spaces": GERMAN.replace(".", "\u202f"),
    "exponents": table(";", "1 2,51 2,0e5", "2 2,375 2e5", "4 2,2 1,500E6"),
    "three decimals": table(";", "1 2,510 200000", "2 2,375 200000", "4 2,200 1500000"),
    "UTF-16, little end": codecs.BOM_UTF16_LE + GERMAN.encode("utf-16-le"),
    "UTF-16, big end": codecs.BOM_UTF16_BE + GERMAN.replace("\n", "\r\n").encode("utf-16-be"),
    "old line ends": GERMAN.replace("\n", "\r"),
    "a quoted header": GERMAN.replace("ratio;loss", '"ratio";"loss"').replace(
        "tokens", 'tokens;"a, note, of, several, words"'
    ),
}


def read(path: Path, content: str | bytes) -> list[list[float]]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_runs(path).select("ratio", "loss", "tokens").to_numpy().tolist()


@pytest.mark.parametrize("form", SAME)
def test_a_table_is_read_to_the_same_numbers(tmp_path: Path, form: str) -> None:
    assert read(tmp_path / "runs.csv", SAME[form]) == RUNS


@pytest.mark.parametrize(
    ("separator", "mark", "grouping"), [(";", ",", "."), ("\t", ",", "."), ("\t", ".", ",")]
)
def test_one_group_of_thousands_is_told_by_the_decimals_of_other_columns(
    tmp_path: Path, separator: str, mark: str, grouping: str
) -> None:
    rows = (f"{ratio} 2{mark}5{ratio} 200{grouping}000" for ratio in (1, 2))
    runs = read(tmp_path / "runs.csv", table(separator, *rows))
    assert runs == [[1, 2.51, 200_000], [2, 2.52, 200_000]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GERMAN.encode("utf-16-le"), "text of UTF-8, or of UTF-16 with its mark"),
        (table(",", "1 2.5 300 2.6", header="ratio loss tokens loss"), r"\['loss'\] twice"),
        ("", "empty"),
        ("größe;loss\n1;2\n".encode("latin-1"), "utf-8"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    tmp_path: Path, content: str | bytes, message: str
) -> None:
    with pytest.raises(AnalysisError, match=message):
        read(tmp_path / "runs.csv", content)


def test_commas_that_part_no_thousands_are_no_number(tmp_path: Path) -> None:
    runs = read(tmp_path / "runs.csv", table(",", '1 2.5 "20,00,000"', '2 2.4 "3,0000"'))
    assert [row[2] for row in runs] == ["20,00,000", "3,0000"]
