"""Score files in the organisers' form; AUC, pAUC, harmonic means and official score by hand."""

import csv
import json
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import count_first_pairs, count_pairs

import eval as eval_script
from evaluation.metrics import OFFICIAL, RULE_2022, Row, combine_harmonically
from evaluation.score_files import read_score_files
from names import AVERAGE
from utils import write_csv

Scores = dict[str, float]  # by the name of the clip
EPSILON = Fraction(1, 2**52)  # the spacing of floating-point numbers at 1


def harmonic(values: list[Fraction]) -> Fraction:
    return len(values) / sum(1 / max(value, EPSILON) for value in values)


def write_scores(folder: Path, file: str, scores: Scores) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"anomaly_score_{file}.csv").open("w", newline="") as target:
        csv.writer(target).writerows(scores.items())


def chosen(scores: Scores, *words: str) -> list[float]:
    """Return the scores of the clips with all of these words in their names."""
    values = []
    for name, score in scores.items():
        if {*words} <= set(name.split("_")):
            values.append(score)
    return values


Counts = dict[tuple[str, str], int]  # clips by domain and condition


def clip_names(section: str, counts: Counts) -> list[str]:
    names = []
    for (domain, condition), count in counts.items():
        for index in range(count):
            names.append(f"section_{section}_{domain}_test_{condition}_{index:04d}_pat_00.wav")
    return names


def both_domains(normal: int, anomalous: int) -> Counts:
    """Return so many clips of each domain."""
    return {
        ("source", "normal"): normal,
        ("source", "anomaly"): anomalous,
        ("target", "normal"): normal,
        ("target", "anomaly"): anomalous,
    }


def read_metrics(folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    with (folder / "metrics" / "metrics.csv").open(newline="") as file:
        return {(row["machine_type"], row["machine_id"]): row for row in csv.DictReader(file)}


def check(row: dict[str, str], expected: dict[str, Fraction | None]) -> None:
    for column, value in expected.items():
        if value is None:
            assert row[column] == "", column
        else:
            assert float(row[column]) == pytest.approx(float(value), abs=1e-9, rel=0), column


def section_of(file: str) -> str:
    return re.search(r"section_(\d\d)", file)[1]


@pytest.fixture
def measured(tmp_path, call):
    """Write score files with random scores, call eval.py, and read the metrics it wrote. The scores
    are rounded, so that there are ties.
    """

    def measure(files: dict[str, Counts], **other_scores: Scores):
        rng, scores = np.random.default_rng(3), {}
        for file, counts in files.items():
            scores[file] = {}
            for name in clip_names(section_of(file), counts):
                scores[file][name] = float(np.round(rng.normal() + ("anomaly" in name), 1))
        scores |= other_scores
        for file, of_file in scores.items():
            write_scores(tmp_path / "scores", file, of_file)
        status, output, errors = call(eval_script.main, "--score_files", tmp_path / "scores")
        assert status == 0
        return scores, read_metrics(tmp_path / "scores"), output, errors

    return measure


def test_each_domain_against_all_anomalies(measured, tmp_path):
    """The rule of 2022 and later, with many ties, for three sections of two types."""
    files = {
        "fan_section_00_test": both_domains(30, 20),
        "fan_section_01_test": both_domains(9, 31),
        "Toy_r2_section_00_test": both_domains(25, 25),
    }
    written, rows, output, errors = measured(files)
    terms: dict[tuple[str, str], dict[str, Fraction]] = {}
    for file, scores in written.items():
        machine = (file.split("_section_")[0], section_of(file))
        normal, anomalous = chosen(scores, "normal"), chosen(scores, "anomaly")
        assert len({*normal, *anomalous}) < len(scores) / 1.5, "ties"
        terms[machine] = {
            "AUC_source": count_pairs(chosen(scores, "source", "normal"), anomalous),
            "AUC_target": count_pairs(chosen(scores, "target", "normal"), anomalous),
            "pAUC": count_first_pairs(normal, anomalous),
        }
        check(rows[machine], terms[machine])
        official = harmonic(list(terms[machine].values()))
        check(rows[machine], {"AUC": count_pairs(normal, anomalous), "official": official})
    machines = list(terms)
    for machine_type, of_type in (
        ("fan", machines[:2]),
        ("Toy_r2", machines[2:]),
        (AVERAGE, machines),
    ):
        check_harmonic_means(rows[machine_type, "hmean"], [terms[machine] for machine in of_type])
        line = next(line for line in output.splitlines() if line.startswith(machine_type))
        for column, cell in zip(
            ("AUC_source", "AUC_target", "pAUC", "official"),
            line.split("|")[-1].split(),
            strict=True,
        ):
            assert cell == f"{100 * float(rows[machine_type, 'hmean'][column]):.2f}"
    assert "rule of DCASE 2022 and later" in output
    assert "published" not in output
    assert errors == ""
    check_files(tmp_path / "scores" / "metrics")


def check_harmonic_means(row: dict[str, str], terms: list[dict[str, Fraction]]) -> None:
    """Check the row `hmean` of machines with these terms of the official score."""
    all_values = []
    for name in ("AUC_source", "AUC_target", "pAUC"):
        values = [of_machine[name] for of_machine in terms]
        check(row, {name: harmonic(values)})
        all_values += values
    check(row, {"official": harmonic(all_values)})


def check_files(folder: Path) -> None:
    text = (folder / "results.md").read_text()
    titles = "AUC source, harmonic mean | AUC target, harmonic mean | pAUC, harmonic mean"
    assert f"{titles} | official score |" in text
    assert "rule of DCASE 2022 and later" in text
    content = json.loads((folder / "metrics.json").read_text())
    assert "rule of DCASE 2022 and later" in content["about"]["domains"]
    row = content["metrics"][AVERAGE]["hmean"]
    assert row["official_low"] < row[OFFICIAL] < row["official_high"]


def test_the_rule_of_2021_takes_the_anomalies_of_the_domain(measured):
    files = {}
    for section, normal in (("00", 20), ("01", 21)):
        for domain in ("source", "target"):
            counts = {(domain, "normal"): normal, (domain, "anomaly"): 15}
            files[f"fan_section_{section}_{domain}_test"] = counts
    written, rows, output, _ = measured(files)
    terms: dict[str, list[Fraction]] = {"00": [], "01": []}
    for file, scores in written.items():
        normal, anomalous = chosen(scores, "normal"), chosen(scores, "anomaly")
        section, domain = section_of(file), file.split("_")[3]
        auc, partial_auc = count_pairs(normal, anomalous), count_first_pairs(normal, anomalous)
        check(rows["fan", section], {f"AUC_{domain}": auc, f"pAUC_{domain}": partial_auc})
        terms[section] += [auc, partial_auc]
    for section, of_section in terms.items():
        check(rows["fan", section], {"official": harmonic(of_section)})
    check(rows[AVERAGE, "hmean"], {"official": harmonic([*terms["00"], *terms["01"]])})
    assert "rule of DCASE 2021" in output


def test_an_empty_domain_and_one_condition_only_are_left_out_and_named(measured):
    """The harmonic means are over what there is."""
    written, rows, output, errors = measured(
        {
            "fan_section_00_test": {("source", "normal"): 8, ("source", "anomaly"): 5},
            "fan_section_01_test": both_domains(6, 7),
            "pump_section_00_test": both_domains(4, 0),
        }
    )
    one, whole = written["fan_section_00_test"], written["fan_section_01_test"]
    auc = count_pairs(chosen(one, "normal"), chosen(one, "anomaly"))
    terms = [auc, count_first_pairs(chosen(one, "normal"), chosen(one, "anomaly"))]
    check(rows["fan", "00"], {"AUC_source": auc, "AUC_target": None, "official": harmonic(terms)})
    anomalous = chosen(whole, "anomaly")
    source = count_pairs(chosen(whole, "source", "normal"), anomalous)
    target = count_pairs(chosen(whole, "target", "normal"), anomalous)
    check(rows["fan", "hmean"], {"AUC_source": harmonic([auc, source]), "AUC_target": target})
    terms += [source, target, count_first_pairs(chosen(whole, "normal"), anomalous)]
    columns = ("AUC", "AUC_source", "AUC_target", "pAUC", "official")
    check(rows["pump", "00"], dict.fromkeys(columns))
    for machine_type in ("fan", AVERAGE):
        check(rows[machine_type, "hmean"], {"official": harmonic(terms)})
    pump = next(line for line in output.splitlines() if line.startswith("pump"))
    assert pump.replace("|", " ").split()[1:] == ["-"] * 9
    reason = "because normal or anomalous clips are missing"
    assert f"no AUC {reason}; left out of the averages: pump 00, pump " in errors
    effect = "harmonic means and official score are computed without it"
    assert f"no AUC of the target domain {reason}; {effect}: fan 00\n" in errors


def test_a_score_that_is_always_wrong_makes_the_official_score_almost_zero(measured):
    """As the organisers do, harmonic means raise an AUC of 0 to the spacing of floating-point
    numbers.
    """
    names = clip_names("00", both_domains(3, 3))
    wrong_scores = {name: float("normal" in name) for name in names}
    _, rows, _, _ = measured({}, fan_section_00_test=wrong_scores)
    partial_auc = (1 - Fraction(1, 19)) / 2
    check(rows["fan", "00"], {"AUC_source": 0, "AUC_target": 0, "pAUC": partial_auc})
    expected = harmonic([Fraction(0), Fraction(0), partial_auc])
    assert float(rows["fan", "00"]["official"]) == pytest.approx(float(expected), rel=1e-9)


def test_figures_that_the_organisers_give():
    """The baseline of 2024 on the evaluation set, from the README of that year's evaluator."""
    values = {
        "AUC_source": [
            0.7912, 0.65, 0.6916, 0.7658, 0.8602, 0.6224, 0.7504, 0.6596, 0.7070,
        ],
        "AUC_target": [
            0.4796, 0.4824, 0.5374, 0.5266, 0.4388, 0.4598, 0.6948, 0.4152, 0.6352,
        ],
        "pAUC": [
            0.4942105263157895, 0.5547368421052632, 0.5010526315789474, 0.5, 0.5021052631578947,
            0.5163157894736842, 0.5273684210526316, 0.511578947368421, 0.5557894736842105,
        ],
    }  # fmt: skip
    rows = []
    for section in range(9):
        of_section = {name: np.array([column[section]]) for name, column in values.items()}
        counts = {"n_normal": 100, "n_anomaly": 100}
        rows.append(Row(of_section, counts, pairs=dict.fromkeys(of_section, 50)))
    combined = combine_harmonically(rows, RULE_2022).values
    expected = {
        "AUC_source": 0.7150555228086642,
        "AUC_target": 0.5057977147441246,
        "pAUC": 0.5172271108149132,
        OFFICIAL: 0.5650830191796572,
    }
    for name, value in expected.items():
        assert combined[name] == pytest.approx(value, abs=1e-12)


def test_evaluation_clips_have_their_labels_in_the_lists_of_the_organisers(tmp_path, call, fails):
    scores, is_anomalous, is_target = {}, {}, {}
    for index in range(12):
        name = f"section_00_{index:04d}.wav"
        scores[name] = float(index * 7 % 12)
        is_anomalous[name], is_target[name] = index % 2, index // 2 % 2
    write_scores(tmp_path / "scores", "ToyTank_section_00_test", scores)
    words = ("--score_files", tmp_path / "scores", "--data_root", tmp_path / "data")
    fails(
        eval_script.main,
        *words,
        match="12 of 12 recordings are not in ground_truth_data and ground_truth_domain under .*"
        "copy these folders of the organisers' evaluator",
    )
    write_truth(tmp_path / "data", "data", "ToyTank_section_00_test", is_anomalous)
    write_truth(tmp_path / "data", "domain", "ToyTank_section_00_test", is_target)
    status, _, _ = call(eval_script.main, *words)
    assert status == 0
    parts: dict[tuple[int, int], list[float]] = {}
    for name, score in scores.items():
        parts.setdefault((is_anomalous[name], is_target[name]), []).append(score)
    source, target, anomalous = parts[0, 0], parts[0, 1], parts[1, 0] + parts[1, 1]
    expected = {
        "AUC_source": count_pairs(source, anomalous),
        "AUC_target": count_pairs(target, anomalous),
        "pAUC": count_first_pairs(source + target, anomalous),
    }
    check(read_metrics(tmp_path / "scores")["ToyTank", "00"], expected)


def test_score_files_of_2020(tmp_path, call):
    normal, anomalous = [0.0, 3.0, 6.0, 2.0], [5.0, 1.0, 4.0, 0.0]
    scores = {}
    for index, (low, high) in enumerate(zip(normal, anomalous, strict=True)):
        scores[f"normal_id_line-3_{index}.wav"] = low
        scores[f"anomaly_id_line-3_{index}.wav"] = high
    write_scores(tmp_path, "press_id_line-3", scores)
    status, output, errors = call(eval_script.main, "--score_files", tmp_path)
    assert (status, errors) == (0, "")
    rows = read_metrics(tmp_path)
    auc, partial_auc = count_pairs(normal, anomalous), count_first_pairs(normal, anomalous)
    check(rows["press", "line-3"], {"AUC": auc, "pAUC": partial_auc})
    assert "official" not in rows["press", "line-3"]
    assert ("press", "hmean") not in rows
    assert "rule of" not in output


@pytest.mark.parametrize(
    ("file", "lines", "message"),
    [
        (
            "fan_00.csv",
            "",
            r"anomaly_score_fan_00.csv: not a score file; rename it to anomaly_score_<type>_id_",
        ),
        (
            "average_id_00.csv",
            "normal_id_00_0.wav,1",
            "not a score file; rename it to anomaly_score_<type>",
        ),
        (
            "fan_id_mean.csv",
            "normal_id_mean_0.wav,1",
            "not a score file; rename it to anomaly_score_<type>",
        ),
        ("fan_section_00_test.csv", "", "no scores in it; add them"),
        (
            "fan_section_00_test.csv",
            "section_00_0000.wav",
            "expected `<file name>,<score>`",
        ),
        (
            "fan_section_00_test.csv",
            "section_00_0000.wav,high",
            "expected `<file name>,<score>`",
        ),
        (
            "fan_section_00_test.csv",
            "section_00_0000.wav,nan",
            "expected `<file name>,<score>`",
        ),
        (
            "fan_section_00_test.csv",
            "section_01_0000.wav,1",
            "line 1: section_01_0000.wav is not a recording of fan 00; correct",
        ),
        (
            "fan_section_00_test.csv",
            "clip.wav,1",
            "line 1: clip.wav is not the name of a recording; correct",
        ),
        (
            "fan_section_00_test.csv",
            "a/section_00_0000.wav,1",
            "line 1: a/section_00_0000.wav is not the name of a recording; correct",
        ),
        (
            "fan_section_00_test.csv",
            "section_00_x.wav,1",
            "fan_section_00_test.csv, line 1: .*starts with section_ but",
        ),
        (
            "fan_section_00_test.csv",
            "section_00_0000.wav,1\nsection_00_0000.wav,2",
            "line 2: .* appears twice",
        ),
        (
            "fan_section_00_test.csv",
            "section_00_source_train_normal_0000.wav,1",
            "line 1: .*its name says train",
        ),
        (
            "fan_section_00_source_test.csv",
            "section_00_target_test_normal_0000.wav,1",
            "contain both source and target",
        ),
        (
            "fan_section_00_test.csv",
            "normal_id_00_0.wav,1\nsection_00_0000.wav,1",
            "different years",
        ),
        ("fan_section_00_test.csv", '"' + "x" * 140_000, "not a list of labels or scores"),
    ],
)
def test_score_files_with_something_else_in_them(tmp_path, fails, file, lines, message):
    (tmp_path / f"anomaly_score_{file}").write_text(lines)
    fails(eval_script.main, "--score_files", tmp_path, match=message)
    assert [path.name for path in tmp_path.iterdir()] == [f"anomaly_score_{file}"]


def test_the_same_clips_in_two_files(tmp_path, fails):
    for name in ("0", "00"):
        write_scores(
            tmp_path, f"fan_id_{name}", {"normal_id_00_0.wav": 0.0, "anomaly_id_00_0.wav": 1.0}
        )
    fails(
        eval_script.main,
        "--score_files",
        tmp_path,
        match="fan_id_00.csv, line 1: normal_id_00_0.wav is in anomaly_score_fan_id_0.csv too",
    )


def write_truth(root: Path, kind: str, file: str, values: dict[str, int]) -> None:
    """Write a list of the organisers, of conditions ("data") or of domains ("domain")."""
    path = root / f"ground_truth_{kind}" / f"ground_truth_{file}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as target:
        csv.writer(target).writerows(values.items())


def test_the_domain_in_the_name_of_an_evaluation_clip_counts(tmp_path, call, fails):
    names = [
        "section_03_source_test_0000.wav",
        "section_03_source_test_0001.wav",
        "section_03_target_test_0000.wav",
        "section_03_target_test_0001.wav",
    ]
    scores = dict(zip(names, (0.0, 1.0, 2.0, 3.0), strict=True))
    write_scores(tmp_path, "fan_section_03_test", scores)
    is_anomalous = dict(zip(names, (0, 1, 0, 1), strict=True))
    write_truth(tmp_path, "data", "fan_section_03_test", is_anomalous)
    words = ("--score_files", tmp_path, "--data_root", tmp_path)
    assert call(eval_script.main, *words)[0] == 0
    expected = {"AUC_source": Fraction(1), "AUC_target": Fraction(1, 2)}
    check(read_metrics(tmp_path)["fan", "03"], expected)
    write_truth(tmp_path, "domain", "fan_section_03_test", dict.fromkeys(names, 1))
    message = "section_03_source_test_0000 is listed as target domain, but its name or folder says"
    fails(eval_script.main, *words, match=message)


def test_a_clip_of_an_unknown_domain(tmp_path, fails):
    write_scores(tmp_path, "fan_section_03_test", {"section_03_0000.wav": 1.0})
    write_truth(tmp_path, "data", "fan_section_03_test", {"section_03_0000.wav": 1})
    message = "ground_truth_domain/ground_truth_fan_section_03_test.csv does not give the domain"
    words = ("--score_files", tmp_path, "--data_root", tmp_path)
    fails(eval_script.main, *words, match=message)


def test_clips_without_a_score_are_named(tmp_path, call):
    scores = {"section_03_0000.wav": 1.0, "section_03_0001.wav": 2.0}
    write_scores(tmp_path, "fan_section_03_test", scores)
    values = {f"section_03_000{index}.wav": index % 2 for index in range(4)}
    write_truth(tmp_path, "data", "fan_section_03_test", values)
    write_truth(tmp_path, "domain", "fan_section_03_test", values)
    status, _, errors = call(eval_script.main, "--score_files", tmp_path, "--data_root", tmp_path)
    assert status == 0
    message = "2 recordings in the lists have no score and are left out of the metrics, such as"
    assert f"{message} fan section_03_0002" in errors


def test_score_files_stand_alone(tmp_path, fails):
    fails(eval_script.main, "--score_files", tmp_path, match="no score files")
    fails(eval_script.main, "--score_files", tmp_path / "nowhere", match="no score files")
    fails(
        eval_script.main,
        "run.pth",
        "--score_files",
        tmp_path,
        match="checkpoint has no effect with --score_files",
    )


@pytest.mark.parametrize(
    "name",
    [
        "DCASE2023T2ToyDrone_section_00_test_seed13711_id(0_)_Eval",
        "DCASE2024T2ToyDrone_section_00_test_seed13711_id(0_)",
        "ToyDrone_section_00_test_seed1tag_Eval",
        "ToyDrone_section_00_test_seed1",
    ],
)
def test_the_names_of_the_organisers_baseline(tmp_path, name, call):
    scores = {}
    for number, condition in enumerate(("normal", "anomaly", "normal", "anomaly")):
        scores[f"section_00_source_test_{condition}_{number:04d}_a_1.wav"] = float(number)
    write_scores(tmp_path, name, scores)
    status, _, errors = call(eval_script.main, "--score_files", tmp_path)
    assert status == 0, errors
    table = pd.read_csv(tmp_path / "metrics" / "metrics.csv")
    assert set(table["machine_type"]) == {"ToyDrone", "average"}
    assert table["AUC"][0] == 0.75


def test_a_machine_type_may_begin_with_the_name_of_the_challenge(tmp_path):
    write_scores(tmp_path, "DCASE2023T2fan_section_00_test", {"section_00_0000.wav": 1.0})
    (recording,) = read_score_files(tmp_path)
    assert recording.machine_type == "DCASE2023T2fan"


def test_the_files_of_two_seeds_are_an_error(tmp_path, fails):
    for seed in (1, 2):
        name = f"DCASE2023T2fan_section_00_test_seed{seed}_Eval"
        write_scores(tmp_path, name, {"section_00_0000.wav": 1.0})
    match = "seed2_Eval.csv, line 1: section_00_0000.wav is in .*seed1_Eval.csv too; keep the fil"
    fails(eval_script.main, "--score_files", tmp_path, match=match)


@pytest.mark.parametrize("letter", ["\x0b", "\x1c", "\x85", "\u2028", '"', "'", ",", "="])
def test_names_may_hold_any_letter(tmp_path, letter):
    name = f"normal_id_00_{letter}1.wav"
    table = pd.DataFrame({"file": [name, "normal_id_00_2.wav"], "score": [1.0, 2.0]})
    write_csv(tmp_path / "anomaly_score_fan_id_00.csv", table, header=False)
    assert [x.path.name for x in read_score_files(tmp_path)] == [name, "normal_id_00_2.wav"]
