"""Reports are made from records alone, and always the same."""

import pytest

from compendium.experiment.record import (
    ArmRun,
    ClaimRecord,
    Environment,
    Published,
    Record,
    RecordError,
)
from compendium.reports.pages import (
    BEGIN,
    END,
    catalogue_table,
    chapter_page,
    index_page,
    markdown_table,
    mean_and_deviation,
    update_readme,
)


@pytest.fixture
def record() -> Record:
    runs = [
        ArmRun(
            seed=s,
            metrics={"f1": 70.0 + s},
            timings={"rate": 9.0},
            seconds=2.0,
            peak_memory_bytes=5 * 10**6,
        )
        for s in (0, 1)
    ]
    return Record(
        chapter="flat",
        part="chinese",
        title="FLAT",
        preset="mini",
        seed=0,
        config={"epochs": 3},
        seeds=[0, 1],
        arms={"flat": runs, "characters": runs[:1]},
        claims=[
            ClaimRecord(
                id="C1",
                statement="a|b",
                rule="r",
                differences=[1.0, 2.5],
                interval=(1.0, 2.5),
                verdict="holds",
            ),
            ClaimRecord(id="C2", statement="s", rule="", reason="too small"),
        ],
        published=[
            Published(
                system="FLAT",
                dataset="Resume",
                metric="F1",
                value=95.45,
                source="Table 2",
                arm="flat",
                key="f1",
            ),
            Published(
                system="Lattice", dataset="Resume", metric="F1", value=94.46, source="Table 2"
            ),
        ],
        environment=Environment(
            python="3.11", torch="2.13", device="cpu", threads=1, platform="Linux"
        ),
        code_hash="0" * 16,
    )


def test_the_same_record_gives_the_same_page(record):
    again = Record.model_validate_json(record.model_dump_json())
    assert chapter_page(record) == chapter_page(again)


def test_the_page_says_everything(record):
    page = chapter_page(record)
    for expected in (
        "| C1 | a\\|b | r | +1, +2.5 | [+1, +2.5] | ✅ holds |",
        "➖ not testable here: too small",
        "| Resume | FLAT | F1 | 70.5 ± 0.71 | 95.45 | Table 2 |",
        "| Resume | Lattice | F1 |  | 94.46 | Table 2 |",
        "| flat | f1 | 70.5 ± 0.71 | 70, 71 |",
        "| flat | 2.0 | 5 | 9 ± 0 |",
        "`epochs`",
    ):
        assert expected in page, expected


def test_the_index_counts_and_links(record):
    page = index_page([record])
    assert "[FLAT](mini/flat/README.md)" in page
    assert "C1 ✅ C2 ➖" in page
    assert "Preset `smoke`" not in page


def test_the_readme_table_has_forty_rows_and_only_it_changes(record):
    text = update_readme(f"before\n{BEGIN}\nold\n{END}\nafter", [record])
    assert text.startswith("before\n") and text.endswith("\nafter")
    assert "old" not in text
    assert len(catalogue_table([record]).splitlines()) == 42
    assert update_readme(text, [record]) == text
    assert "[C1 ✅ C2 ➖](reports/mini/flat/README.md)" in text
    with pytest.raises(RecordError, match="lost the markers"):
        update_readme("no markers", [])


def test_small_pieces():
    assert mean_and_deviation([1.0]) == "1"
    assert mean_and_deviation([1.0, 3.0]) == "2 ± 1.4"
    assert markdown_table(["a", "b"], [["1\n2", "x|y"]]).splitlines()[2] == "| 1 2 | x\\|y |"
