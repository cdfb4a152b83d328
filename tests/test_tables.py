"""The tables of an evaluation: on the terminal, in Markdown, in files."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import count_first_pairs, count_pairs
from evaluated import (
    make_held_out,
    make_recordings,
    make_result,
    make_sections,
    measured,
    read_csv,
)

from audio import Windows
from evaluation.metrics import NO_DOMAINS, RULE_2022, Metric, area, measure
from evaluation.result import Result
from evaluation.tables import (
    PUBLISHED_IDS,
    ShownMetrics,
    escape_markdown,
    format_table,
    markdown_row,
    markdown_table,
    published_rows,
    write_per_machine,
    write_result,
)
from evaluation.thresholds import make_comparable
from recordings import COLUMNS, MACHINE_COLUMNS

HELD_OUT = make_held_out({("fan", 0): 25, ("fan", 2): 5, ("valve", 1): 30})


@pytest.fixture
def result() -> Result:
    """Three machines. The held-out scores of fan 02 are too few for a threshold from them."""
    recordings = make_recordings({("fan", 0): (8, 8), ("fan", 2): (8, 8), ("valve", 1): (8, 8)})
    shift = 5 * (recordings["condition"] == "anomalous")
    scores = np.random.default_rng(0).gamma(20, size=len(recordings)) + shift
    return make_result(recordings, scores, HELD_OUT)


def line_of(text: str, name: str) -> str:
    """Return the line of a table on the terminal that begins with a name."""
    return next(line for line in text.splitlines() if line.startswith(name))


# ---- The terminal and Markdown ----


def test_the_columns_without_domains():
    recordings = make_recordings({("fan", 0): (2, 2), ("fan", 2): (2, 2)})
    metrics = measured(recordings, [0, 2, 1, 3, 0, 1, 2, 3])
    assert format_table(ShownMetrics(metrics)).splitlines()[:3] == [
        "             |  pooled over IDs  |  lowest  |   mean over IDs   |",
        "in percent   |     AUC     pAUC  |    mAUC  |     AUC     pAUC  |",
        "fan          |   87.50    76.32  |   75.00  |   87.50    86.84  |",
    ]
    titles = "AUC, pooled | pAUC, pooled | mAUC | AUC, mean over IDs | pAUC, mean over IDs"
    assert markdown_table(ShownMetrics(metrics)).splitlines()[0] == f"| machine type | {titles} |"


def test_the_columns_with_domains():
    recordings = make_sections("fan", {"00": {"source": (2, 2), "target": (2, 2)}})
    recordings["score"] = [0.0, 1.0, 2.0, 3.0, 0.0, 1.0, 2.0, 3.0]
    metrics = measure(recordings, RULE_2022, draws=10)
    text = format_table(ShownMetrics(metrics))
    assert text.splitlines()[0].split("|")[-1].strip() == "harmonic mean over IDs"
    assert line_of(text, "in percent").endswith("|AUC source AUC target     pAUC official")
    assert line_of(text, "fan").endswith("|    100.00     100.00   100.00   100.00")
    assert line_of(text, "Domains: ") == f"Domains: {RULE_2022.text}"
    titles = markdown_table(ShownMetrics(metrics)).splitlines()[0].strip("| ").split(" | ")
    assert titles[-4:] == [
        "AUC source, harmonic mean",
        "AUC target, harmonic mean",
        "pAUC, harmonic mean",
        "official score",
    ]


@pytest.mark.parametrize("rule", [NO_DOMAINS, RULE_2022])
def test_a_new_metric_is_in_all_tables(rule, result, tmp_path):
    entry = Metric("again", area, summaries=("pooled", "min", "mean", "hmean"))
    rule = replace(rule, metrics=(*rule.metrics, entry))
    metrics = measure(result.recordings, rule, draws=10)
    write_result(replace(result, metrics=metrics), tmp_path)
    header = read_csv(tmp_path / "metrics.csv")[0]
    assert header.index("again") == header.index("n_normal") - (2 if rule.official else 1)
    assert {"again_low", "again_high"} <= set(header)
    content = json.loads((tmp_path / "metrics.json").read_text())
    row = content["metrics"]["average"]["pooled"]
    assert (row["again"], row["again_low"]) == (row["AUC"], row["AUC_low"])
    text = (tmp_path / "results.md").read_text()
    assert "| AUC, pooled | pAUC, pooled | again, pooled | mAUC | magain | AUC, mean" in text
    assert ("again, harmonic mean | official score |" in text) == bool(rule.official)
    first, headings, *_ = format_table(ShownMetrics(metrics)).splitlines()
    assert headings.split("|")[1].split() == ["AUC", "pAUC", "again"]
    assert list(map(len, first.split("|")))[:4] == list(map(len, headings.split("|")))[:4]


# ---- The published figures ----


@pytest.fixture(scope="module")
def published() -> Result:
    """The machines of the paper, all with an AUC of 75 %."""
    counts = {}
    for machine_type, ids in PUBLISHED_IDS.items():
        for machine_id in sorted(ids):
            counts[machine_type, int(machine_id)] = (2, 2)
    scores = np.tile([0.0, 1.0, 0.5, 2.0], len(counts))
    return make_result(make_recordings(counts), scores, draws=10)


def test_the_published_figures_are_beside_the_measured_ones(published):
    text = format_table(ShownMetrics(published.metrics, published_rows(published)))
    assert text.splitlines()[0].endswith("|   published, DCASE 2020")
    assert line_of(text, "fan").split("|")[1].split()[0] == "75.00"
    assert line_of(text, "fan").endswith("98.32    95.34    92.67")
    assert line_of(text, "average").endswith("94.65    89.31    89.78")


def test_what_the_published_figures_are_not_compared_with(published):
    recordings, scores = published.recordings, published.recordings["score"]
    for keys in ({"mode": "arcface"}, {"input": ["sgram"]}, {"kind": "nearest"}):
        other = make_result(recordings[COLUMNS], scores, draws=10, **keys)
        assert published_rows(other) == {}, keys
    for changes in ({"windows": Windows(hop=5.0)}, {"split": "evaluation"}, {"metrics": None}):
        assert published_rows(replace(published, **changes)) == {}, changes
    other_ids = recordings[recordings["machine_id"] != "04"]
    assert published_rows(make_result(other_ids[COLUMNS], other_ids["score"], draws=10)) == {}


def test_the_published_average_is_over_its_six_types(published):
    recordings = published.recordings[published.recordings["machine_type"] != "fan"]
    rows = published_rows(make_result(recordings[COLUMNS], recordings["score"], draws=10))
    assert set(rows) == set(PUBLISHED_IDS) - {"fan"}
    assert [f"{value:.2f}" for value in rows["pump"].values()] == ["95.44", "85.99", "91.17"]


# ---- Files ----


def test_the_score_files_give_the_mean_rows(result, tmp_path):
    """AUC and pAUC are counted by hand from the files alone, as in the challenge."""
    write_result(result, tmp_path)
    rates: dict[str, list[tuple[float, float]]] = {}
    for path in sorted(tmp_path.glob("anomaly_score_*.csv")):
        scores = {"normal": [], "anomaly": []}
        for name, score in read_csv(path):
            scores[name.split("_")[0]].append(float(score))
        auc = count_pairs(scores["normal"], scores["anomaly"])
        partial_auc = count_first_pairs(scores["normal"], scores["anomaly"])
        machine_type = path.name.split("_")[2]
        rates.setdefault(machine_type, []).append((float(auc), float(partial_auc)))
    expected = {machine_type: np.mean(values, axis=0) for machine_type, values in rates.items()}
    expected["average"] = np.mean(list(expected.values()), axis=0)
    means = {row[0]: row for row in read_csv(tmp_path / "metrics.csv") if row[1] == "mean"}
    for machine_type, values in expected.items():
        written = [float(cell) for cell in means[machine_type][2:4]]
        assert written == pytest.approx(values.tolist(), abs=1e-9)
    text = (tmp_path / "results.md").read_text()
    assert markdown_table(ShownMetrics(result.metrics)) in text
    assert "value at which as many recordings give 100 in 2.5 % of cases at most" in text


def test_the_average_without_a_network_is_the_last_row(result, tmp_path, capsys):
    baseline = measured(result.recordings, result.recordings["score"][::-1].to_list())
    write_result(replace(result, baseline=baseline), tmp_path)
    lines = capsys.readouterr().out.splitlines()
    row = lines[2 + len(result.metrics.machine_types)]
    assert row.startswith("without a network |")
    rows = baseline.table.loc["average"]
    columns = [("pooled", "AUC"), ("pooled", "pAUC"), ("min", "AUC"), ("mean", "AUC")]
    expected = [f"{100 * rows.loc[name, metric]:.2f}" for name, metric in columns]
    assert row.replace("|", " ").split()[3:7] == expected
    last = markdown_table(ShownMetrics(result.metrics, {}, baseline)).splitlines()[-1]
    assert last.startswith("| without a network | ")
    assert last in (tmp_path / "results.md").read_text()


def test_one_machine_type_has_no_average(result, tmp_path, capsys):
    recordings = result.recordings[result.recordings["machine_type"] == "fan"]
    one_type = make_result(recordings[COLUMNS], recordings["score"], draws=10)
    baseline = measured(recordings, recordings["score"][::-1].to_list())
    write_result(replace(one_type, baseline=baseline), tmp_path)
    output, text = capsys.readouterr().out, (tmp_path / "results.md").read_text()
    for row in ("fan", "without a network"):
        assert line_of(output, row)
        assert f"\n| {row} | " in text
    assert "average" not in output + text
    assert ["average", "mean"] in [row[:2] for row in read_csv(tmp_path / "metrics.csv")]


def test_the_decisions_are_a_table_of_results(result, tmp_path):
    write_result(result, tmp_path)
    lines = (tmp_path / "results.md").read_text().splitlines()
    titles = "false alarms (asked: 20 %) | detected | threshold | from | precision | F1"
    start = lines.index(f"| machine | {titles} |") + 2
    names = [line.split(" | ")[0] for line in lines[start : start + 4]]
    assert names == ["| fan 00", "| fan 02", "| valve 01", "| all"]
    row = result.decisions.loc["fan", "00"]
    rates = [f"{100 * row[name]:.1f} %" for name in ("false_alarm_rate", "recall")]
    n_false_alarms, n_detected = row["n_false_alarms"], row["n_detected"]
    cells = lines[start].split(" | ")
    assert cells[1].startswith(f"{n_false_alarms} of 8, {rates[0]} (")
    assert cells[2].startswith(f"{n_detected} of 8, {rates[1]} (")
    assert cells[3:5] == [f"{row['threshold']:.6g}", "25 held-out recordings of the ID"]
    assert lines[start + 3].split(" | ")[3:5] == ["-", "-"]


def test_machines_with_one_condition_are_named(tmp_path, capsys):
    recordings = make_recordings({("fan", 0): (2, 2), ("fan", 2): (2, 0), ("pump", 0): (0, 2)})
    write_result(make_result(recordings, np.arange(8.0)), tmp_path)
    reason = "because normal or anomalous clips are missing"
    names = "fan 02, pump 00, pump pooled, pump mean, pump min"
    assert f"no AUC {reason}; left out of the averages: {names}\n" in capsys.readouterr().err
    rows = {(row[0], row[1]): row[2:] for row in read_csv(tmp_path / "metrics.csv")}
    assert rows["fan", "02"] == ["", "", "2", "0", "", "", "", ""]
    assert rows["fan", "mean"][:2] == rows["fan", "00"][:2] == ["1.0", "1.0"]
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert content["metrics"]["fan"]["02"]["AUC"] is None


def test_decision_files(result, tmp_path):
    write_result(result, tmp_path)
    scores = {machine: group["score"] for machine, group in HELD_OUT.groupby(MACHINE_COLUMNS)}
    is_fan = HELD_OUT["machine_type"] == "fan"
    of_type = make_comparable(HELD_OUT[is_fan], HELD_OUT[is_fan & (HELD_OUT["machine_id"] == "02")])
    expected = {
        ("fan", "00"): (
            np.percentile(scores["fan", "00"], 80),
            "25 held-out recordings of the ID",
        ),
        ("fan", "02"): (
            np.percentile(of_type["score"], 80),
            "30 held-out recordings of the type",
        ),
        ("valve", "01"): (
            np.percentile(scores["valve", "01"], 80),
            "30 held-out recordings of the ID",
        ),
    }
    header, *rows = read_csv(tmp_path / "decisions.csv")
    assert header == [
        "machine_type", "machine_id", "threshold", "source", "n_normal", "n_false_alarms",
        "n_anomaly", "n_detected", "false_alarm_rate", "false_alarm_rate_low",
        "false_alarm_rate_high", "recall", "recall_low", "recall_high", "precision", "F1",
    ]  # fmt: skip
    for row in rows:
        threshold, source = expected[row[0], row[1]]
        assert float(row[2]) == pytest.approx(threshold)
        assert row[3] == source
    assert len(rows) == 3
    written = set()
    for (machine_type, machine_id), (threshold, _) in expected.items():
        name = f"{machine_type}_id_{machine_id}.csv"
        decisions = read_csv(tmp_path / f"decision_result_{name}")
        scores_of_file = read_csv(tmp_path / f"anomaly_score_{name}")
        for (file, decision), (scored_file, score) in zip(decisions, scores_of_file, strict=True):
            assert (file, decision) == (scored_file, str(int(float(score) > threshold)))
            written.add(decision)
    assert written == {"0", "1"}


def test_files_of_an_earlier_evaluation_are_removed(result, tmp_path):
    """They are of an ID without recordings, and of decisions. Other files stay."""
    write_result(result, tmp_path)
    (tmp_path / "mine.csv").touch()
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "roc.png").touch()
    rest = result.recordings[result.recordings["machine_id"] != "02"].assign(decision=pd.NA)
    write_result(replace(result, recordings=rest, decisions=result.decisions[:0]), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "anomaly_score_fan_id_00.csv",
        "anomaly_score_valve_id_01.csv",
        "metrics.csv",
        "metrics.json",
        "results.md",
        "mine.csv",
    }


def test_the_part_of_a_recording_is_in_the_name_of_its_file(tmp_path):
    recordings = make_sections("fan", {"00": {"source": (1, 0), "target": (1, 0)}})
    recordings["part"] = ["section_00_source_test", "section_00_target_test"]
    write_per_machine(tmp_path, "anomaly_score", recordings.assign(score=[0.5, 1]), "score")
    path = tmp_path / "anomaly_score_fan_section_00_target_test.csv"
    assert read_csv(path) == [["section_00_target_test_normal_0000.wav", "1.0"]]


def test_file_names_with_commas_are_quoted(tmp_path):
    recordings = make_recordings({("fan", 0): (1, 0)}).assign(score=1.5)
    recordings["path"] = [Path('normal_id_00_a,"b".wav')]
    write_per_machine(tmp_path, "anomaly_score", recordings, "score")
    (path,) = tmp_path.iterdir()
    assert read_csv(path) == [['normal_id_00_a,"b".wav', "1.5"]]


@pytest.mark.parametrize(
    ("name", "escaped"),
    [
        ("noisy_arcmix", "noisy_arcmix"),
        ("check_points/a_1.pth", "check_points/a_1.pth"),
        ("91.20 (88.15 to 93.80)", "91.20 (88.15 to 93.80)"),
        ("a|b", r"a\|b"),
        ("_press_", r"\_press\_"),
        ("**press**", r"\*\*press\*\*"),
        ("<b>press</b>", r"\<b\>press\</b\>"),
        ("[press](x)", r"\[press\](x)"),
        ("`press`", r"\`press\`"),
        ("a\\b", r"a\\b"),
    ],
)
def test_names_are_escaped_in_markdown(name, escaped):
    assert escape_markdown(name) == escaped
    assert markdown_row(name, [name]) == f"| {escaped} | {escaped} |"
