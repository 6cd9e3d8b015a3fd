"""Tables fit the terminal, say the same in Markdown, and hold the right numbers."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fkd_med.evaluation import Column, ImageRow, Sheet, Traffic, end_table, human_bytes, traffic_table


def printed(sheet: Sheet, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(sheet)
    return console.file.getvalue()  # type: ignore[attr-defined]


def arm(model: str, name: str, shift: float, empty: str = "") -> list[ImageRow]:
    return [
        ImageRow(model, name, "test", 3, f"hospital-{c}", str(i), d + shift, d / 2, 10.0 + i, empty if i == 0 else "")
        for c, d in (("a", 0.5), ("b", 0.4))
        for i in range(3)
    ]


ARMS = {
    "teacher": arm("teacher", "local", 0.3),
    "local-only student": arm("student", "local-only", 0.1),
    "federated student": arm("student", "federated", 0.2, "prediction"),
}


def test_end_table_holds_means_and_worst() -> None:
    sheet = end_table(ARMS)
    assert [row[0] for row in sheet.rows] == ["hospital-a", "hospital-b", "mean of hospitals", "worst hospital"]
    dice = [i for i, c in enumerate(sheet.columns) if c.name == "Dice"]
    assert [sheet.columns[i].group for i in dice] == list(ARMS)
    assert [[row[i] for i in dice] for row in sheet.rows] == [
        ["0.800", "0.600", "0.700"],
        ["0.700", "0.500", "0.600"],
        ["0.750", "0.550", "0.650"],
        ["0.700", "0.500", "0.600"],
    ]
    assert sheet.rows[2][1] == "6" and sheet.rows[0][4] == "11.0"
    notes = " ".join(sheet.notes)
    assert "federated student: hospital-b" in notes and "federated student: 2 of 6" in notes


def test_end_table_fits_100_columns() -> None:
    text = printed(end_table(ARMS), 100)
    assert "…" not in text and max(map(len, text.splitlines())) <= 100
    header = next(line for line in text.splitlines() if "Dice" in line)
    assert header.split() == ["hospital", "images", *["Dice", "IoU", "HD95"] * 3]
    line = next(line for line in text.splitlines() if line.startswith("hospital-a"))
    assert line.split() == [
        "hospital-a",
        "3",
        "0.800",
        "0.250",
        "11.0",
        "0.600",
        "0.250",
        "11.0",
        "0.700",
        "0.250",
        "11.0",
    ]


def test_a_hospital_without_a_teacher_is_a_dash() -> None:
    arms = {"teacher": [r for r in ARMS["teacher"] if r.client == "hospital-a"], "student": ARMS["federated student"]}
    assert end_table(arms).rows[1] == ["hospital-b", "3", "–", "–", "–", "0.600", "0.200", "11.0"]


def test_markdown_says_the_same() -> None:
    sheet = end_table(ARMS, title="Test of a|b")
    lines = sheet.to_markdown().splitlines()
    table = [[c.strip() for c in line.strip("|").split(" | ")] for line in lines if line.startswith("|")]
    assert lines[0] == "**Test of a\\|b**"
    assert table[0][2] == "teacher Dice" and table[2:] == [list(row) for row in sheet.rows]
    assert all(f"- {note}" in lines for note in sheet.notes)


def test_names_are_never_markup() -> None:
    sheet = Sheet("[bold]x", [Column("a", left=True), Column("[red]", group="[/]")], [["[link=x]", "1"]], ["[dim]"])
    assert all(part in printed(sheet, 80) for part in ("[bold]x", "[red]", "[/]", "[link=x]", "[dim]"))


def test_traffic_table() -> None:
    student = Traffic("student", 1_000, 4_100, 4_100, 0.00656)
    larger = [Traffic("TransUNet", 105_000_000, 420e6, 420e6, 672.0)]
    sheet = traffic_table(student, larger, clients=3, rounds=10, total=246_000, link="10 Mbit/s")
    assert sheet.rows[0] == ["student", "1,000", "4.10 kB", "4.10 kB", "0.01", "1.0", "1.0"]
    assert sheet.rows[1] == ["TransUNet", "105,000,000", "420 MB", "420 MB", "672", "105,000", "102,439"]
    assert "246 kB in all over 10 rounds" in sheet.notes[0] and "…" not in printed(sheet, 100)
    assert "10 Mbit/s" in sheet.notes[1]


def test_shared_teachers_have_a_line_of_their_own() -> None:
    student = Traffic("student", 1_000, 4_100, 4_100, 0.00656)
    plain = traffic_table(student, [], 3, 10, 246_000, "10 Mbit/s")
    shared = traffic_table(student, [], 3, 10, 246_000, "10 Mbit/s", teachers=(3e6, 6e6))
    assert shared.rows == plain.rows and list(shared.notes[:-1]) == list(plain.notes)
    assert "once before the first round: 3.00 MB up and 6.00 MB down in all" in shared.notes[-1]


def test_traffic_of_nothing() -> None:
    sheet = traffic_table(Traffic("student", 1, 0, 0, 0), [Traffic("ResUNet", 13, 5e4, 5e4, 1)], 3, 1, 0, "")
    assert sheet.rows[1][-1] == "–" and "1 round." in sheet.notes[0]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (9994, "9.99 kB"), (9996, "10.0 kB"), (99_960, "100 kB"),
     (999_400, "999 kB"), (999_600, "1.00 MB"), (12_345_678, "12.3 MB"), (4.2e9, "4.20 GB"), (2e18, "2000 PB")],
)  # fmt: skip
def test_human_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text
