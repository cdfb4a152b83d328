"""Score files in the organisers' form: AUC, pAUC, harmonic means and official score, counted by
hand.
"""

import csv
import json
import re
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import count_first_pairs, count_pairs

import eval as eval_script
from evaluation.metrics import AVERAGE, OFFICIAL, SHARED_ANOMALIES, combine_harmonically

Scores = dict[str, float]  # by the name of the clip
EPSILON = Fraction(1, 2**52)  # the spacing of floating-point numbers at 1


def harmonic(values: list[Fraction]) -> Fraction:
    return len(values) / sum(1 / max(value, EPSILON) for value in values)


def write_scores(folder: Path, file: str, scores: Scores) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"anomaly_score_{file}.csv").open("w", newline="") as target:
        csv.writer(target).writerows(scores.items())


def chosen(scores: Scores, *words: str) -> list[float]:
    return [score for name, score in scores.items() if all(f"_{word}_" in name for word in words)]


def clip_names(section: str, counts: dict[tuple[str, str], int]) -> list[str]:
    """Of so many clips of each domain and condition."""
    return [
        f"section_{section}_{domain}_test_{condition}_{index:04d}_pat_00.wav"
        for (domain, condition), count in counts.items()
        for index in range(count)
    ]


def full(normal: int, anomalous: int) -> dict[tuple[str, str], int]:
    kinds = {"normal": normal, "anomaly": anomalous}
    return {
        (domain, kind): count for domain in ("source", "target") for kind, count in kinds.items()
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
    """Write score files, call eval.py, and read what it wrote; scores are rounded, for there to be
    ties.
    """

    def measure(files: dict[str, dict[tuple[str, str], int]], **scores_of: Scores):
        rng, written = np.random.default_rng(3), {}
        for file, counts in files.items():
            names = clip_names(section_of(file), counts)
            written[file] = {
                name: float(np.round(rng.normal() + ("anomaly" in name), 1)) for name in names
            }
        written |= scores_of
        for file, scores in written.items():
            write_scores(tmp_path / "scores", file, scores)
        status, output, errors = call(eval_script.main, "--score_files", tmp_path / "scores")
        assert status == 0
        return written, read_metrics(tmp_path / "scores"), output, errors

    return measure


def test_each_domain_against_all_anomalies(measured, tmp_path):
    """The rule of 2022 and later, with many ties, for two sections of one type and one of another."""
    files = {
        "fan_section_00_test": full(30, 20),
        "fan_section_01_test": full(9, 31),
        "Toy_r2_section_00_test": full(25, 25),
    }
    written, rows, output, errors = measured(files)
    expected = {}
    for file, scores in written.items():
        machine = (file.split("_section_")[0], section_of(file))
        normal, anomalous = chosen(scores, "normal"), chosen(scores, "anomaly")
        assert len({*normal, *anomalous}) < len(scores) / 1.5, "ties"
        terms = {
            "AUC_source": count_pairs(chosen(scores, "source", "normal"), anomalous),
            "AUC_target": count_pairs(chosen(scores, "target", "normal"), anomalous),
            "pAUC": count_first_pairs(normal, anomalous),
        }
        expected[machine] = terms
        check(
            rows[machine],
            {
                **terms,
                "AUC": count_pairs(normal, anomalous),
                "official": harmonic(list(terms.values())),
            },
        )
    machines = list(expected)
    for machine_type, of in (("fan", machines[:2]), ("Toy_r2", machines[2:]), (AVERAGE, machines)):
        means = {name: harmonic([expected[machine][name] for machine in of]) for name in terms}
        official = harmonic([value for machine in of for value in expected[machine].values()])
        check(rows[machine_type, "hmean"], {**means, "official": official})
        line = next(line for line in output.splitlines() if line.startswith(machine_type))
        shown = [f"{100 * float(value):.2f}" for value in (*means.values(), official)]
        assert line.split("|")[-1].split() == shown
    assert "rule of DCASE 2022 and later" in output
    assert "published" not in output
    assert errors == ""
    text = (tmp_path / "scores" / "metrics" / "results.md").read_text()
    assert (
        "AUC source, harmonic mean | AUC target, harmonic mean | pAUC, harmonic mean | official score |"
        in text
    )
    assert "rule of DCASE 2022 and later" in text
    content = json.loads((tmp_path / "scores" / "metrics" / "metrics.json").read_text())
    assert "rule of DCASE 2022 and later" in content["about"]["domains"]
    row = content["metrics"][AVERAGE]["hmean"]
    assert row["official_low"] < row[OFFICIAL] < row["official_high"]


def test_the_rule_of_2021_takes_the_anomalies_of_the_domain(measured):
    written, rows, output, _ = measured({
        f"fan_section_0{section}_{domain}_test": {(domain, "normal"): 20 + section, (domain, "anomaly"): 15}
        for section in (0, 1)
        for domain in ("source", "target")
    })  # fmt: skip
    terms: dict[str, list[Fraction]] = {"00": [], "01": []}
    for file, scores in written.items():
        normal, anomalous, domain = (
            chosen(scores, "normal"),
            chosen(scores, "anomaly"),
            file.split("_")[3],
        )
        values = {
            f"AUC_{domain}": count_pairs(normal, anomalous),
            f"pAUC_{domain}": count_first_pairs(normal, anomalous),
        }
        check(rows["fan", section_of(file)], values)
        terms[section_of(file)] += values.values()
    for section, of_section in terms.items():
        check(rows["fan", section], {"official": harmonic(of_section)})
    check(rows[AVERAGE, "hmean"], {"official": harmonic([*terms["00"], *terms["01"]])})
    assert "rule of DCASE 2021" in output


def test_an_empty_domain_and_one_condition_only_are_left_out_and_named(measured):
    """The harmonic means are over what there is."""
    written, rows, output, errors = measured(
        {
            "fan_section_00_test": {("source", "normal"): 8, ("source", "anomaly"): 5},
            "fan_section_01_test": full(6, 7),
            "pump_section_00_test": full(4, 0),
        }
    )
    one, whole = written["fan_section_00_test"], written["fan_section_01_test"]
    auc = count_pairs(chosen(one, "normal"), chosen(one, "anomaly"))
    terms = [auc, count_first_pairs(chosen(one, "normal"), chosen(one, "anomaly"))]
    check(rows["fan", "00"], {"AUC_source": auc, "AUC_target": None, "official": harmonic(terms)})
    of_whole = [
        count_pairs(chosen(whole, domain, "normal"), chosen(whole, "anomaly"))
        for domain in ("source", "target")
    ]
    check(
        rows["fan", "hmean"],
        {"AUC_source": harmonic([auc, of_whole[0]]), "AUC_target": of_whole[1]},
    )
    terms += [*of_whole, count_first_pairs(chosen(whole, "normal"), chosen(whole, "anomaly"))]
    check(
        rows["pump", "00"], dict.fromkeys(("AUC", "AUC_source", "AUC_target", "pAUC", "official"))
    )
    for machine_type in ("fan", AVERAGE):
        check(rows[machine_type, "hmean"], {"official": harmonic(terms)})
    pump = next(line for line in output.splitlines() if line.startswith("pump"))
    assert pump.replace("|", " ").split()[1:] == ["-"] * 9
    assert (
        "no AUC, and left out of the averages, because normal or anomalous clips are missing: pump 00, pump "
        in errors
    )
    assert (
        "no AUC of the target domain, and so harmonic means and official score without it, because"
        in errors
    )
    assert "clips are missing: fan 00\n" in errors


def test_a_score_that_is_always_wrong_makes_the_official_score_almost_zero(measured):
    """As the organisers do, harmonic means raise an AUC of 0 to the spacing of floating-point
    numbers.
    """
    names = clip_names("00", full(3, 3))
    _, rows, _, _ = measured(
        {}, fan_section_00_test={name: float("normal" in name) for name in names}
    )
    terms = [Fraction(0), Fraction(0), (1 - Fraction(1, 19)) / 2]
    check(rows["fan", "00"], dict(zip(("AUC_source", "AUC_target", "pAUC"), terms, strict=True)))
    assert float(rows["fan", "00"]["official"]) == pytest.approx(float(harmonic(terms)), rel=1e-9)


def test_figures_that_the_organisers_give():
    """The baseline of 2024 on the evaluation set, as the README of the evaluator of that year shows
    it.
    """
    source = [0.7912, 0.65, 0.6916, 0.7658, 0.8602, 0.6224, 0.7504, 0.6596, 0.7070]
    target = [0.4796, 0.4824, 0.5374, 0.5266, 0.4388, 0.4598, 0.6948, 0.4152, 0.6352]
    pauc = [0.4942105263157895, 0.5547368421052632, 0.5010526315789474, 0.5, 0.5021052631578947, 0.5163157894736842,
            0.5273684210526316, 0.511578947368421, 0.5557894736842105]  # fmt: skip
    values = {"AUC": source, "AUC_source": source, "AUC_target": target, "pAUC": pauc}
    rows = [
        np.array([[values.get(column, [0.0] * 9)[index] for column in SHARED_ANOMALIES.columns]])
        for index in range(9)
    ]
    combined = dict(
        zip(SHARED_ANOMALIES.columns, combine_harmonically(rows, SHARED_ANOMALIES)[0], strict=True)
    )
    expected = {"AUC_source": 0.7150555228086642, "AUC_target": 0.5057977147441246, "pAUC": 0.5172271108149132,
                OFFICIAL: 0.5650830191796572}  # fmt: skip
    for column, value in expected.items():
        assert combined[column] == pytest.approx(value, abs=1e-12)


def test_evaluation_clips_have_their_labels_in_the_lists_of_the_organisers(tmp_path, call, fails):
    truth = {f"section_00_{index:04d}.wav": (index % 2, index // 2 % 2) for index in range(12)}
    scores = {name: float(index * 7 % 12) for index, name in enumerate(truth)}
    write_scores(tmp_path / "scores", "ToyTank_section_00_test", scores)
    words = ("--score_files", tmp_path / "scores", "--data_root", tmp_path / "data")
    fails(eval_script.main, *words, match="12 of 12 clips are not in ground_truth_data and ground_truth_domain under .*"
          "copy these folders of the organisers' evaluator")  # fmt: skip
    for place, kind in enumerate(("data", "domain")):
        file = tmp_path / f"data/ground_truth_{kind}/ground_truth_ToyTank_section_00_test.csv"
        file.parent.mkdir(parents=True)
        file.write_text("".join(f"{name},{values[place]}\n" for name, values in truth.items()))
    status, _, _ = call(eval_script.main, *words)
    assert status == 0
    parts = {
        kinds: [scores[name] for name, own in truth.items() if own == kinds]
        for kinds in ((0, 0), (0, 1), (1, 0), (1, 1))
    }
    anomalous = parts[1, 0] + parts[1, 1]
    check(read_metrics(tmp_path / "scores")["ToyTank", "00"], {
        "AUC_source": count_pairs(parts[0, 0], anomalous),
        "AUC_target": count_pairs(parts[0, 1], anomalous),
        "pAUC": count_first_pairs(parts[0, 0] + parts[0, 1], anomalous),
    })  # fmt: skip


def test_score_files_of_2020(tmp_path, call):
    scores = {
        f"{kind}_id_line-3_{i}.wav": float(i * 5 % 7)
        for i, kind in enumerate(("normal", "anomaly") * 4)
    }
    write_scores(tmp_path, "press_id_line-3", scores)
    status, output, errors = call(eval_script.main, "--score_files", tmp_path)
    assert (status, errors) == (0, "")
    normal, anomalous = (
        [x for name, x in scores.items() if name.startswith(kind)] for kind in ("normal", "anomaly")
    )
    rows = read_metrics(tmp_path)
    check(
        rows["press", "line-3"],
        {"AUC": count_pairs(normal, anomalous), "pAUC": count_first_pairs(normal, anomalous)},
    )
    assert "official" not in rows["press", "line-3"]
    assert ("press", "hmean") not in rows
    assert "rule of" not in output


@pytest.mark.parametrize(
    ("file", "lines", "message"),
    [
        (
            "fan_00.csv",
            "",
            r"anomaly_score_fan_00.csv: not named anomaly_score_<type>_id_<XX>.csv or",
        ),
        (
            "average_id_00.csv",
            "normal_id_00_0.wav,1",
            "not named .* or named like a row of the table",
        ),
        (
            "fan_id_mean.csv",
            "normal_id_mean_0.wav,1",
            "not named .* or named like a row of the table",
        ),
        ("fan_section_00_test.csv", "", "no scores in it; bring them"),
        ("fan_section_00_test.csv", "section_00_0000.wav", "line 1: not `<file name>,<score>`"),
        (
            "fan_section_00_test.csv",
            "section_00_0000.wav,high",
            "line 1: not `<file name>,<score>`",
        ),
        ("fan_section_00_test.csv", "section_00_0000.wav,nan", "line 1: not `<file name>,<score>`"),
        (
            "fan_section_00_test.csv",
            "section_01_0000.wav,1",
            "line 1: section_01_0000.wav is no clip of 00",
        ),
        ("fan_section_00_test.csv", "clip.wav,1", "line 1: clip.wav is no clip of 00"),
        (
            "fan_section_00_test.csv",
            "a/section_00_0000.wav,1",
            "line 1: a/section_00_0000.wav is no clip of 00",
        ),
        (
            "fan_section_00_test.csv",
            "section_00_x.wav,1",
            "fan_section_00_test.csv, line 1: .*begins as that of a section",
        ),
        (
            "fan_section_00_test.csv",
            "section_00_0000.wav,1\nsection_00_0000.wav,2",
            "line 2: .* given twice",
        ),
        (
            "fan_section_00_test.csv",
            "section_00_source_train_normal_0000.wav,1",
            "line 1: .*clip of train",
        ),
        (
            "fan_section_00_source_test.csv",
            "section_00_target_test_normal_0000.wav,1",
            "two domains",
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
        match="fan_id_00.csv, line 1: normal_id_00_0.wav is given twice",
    )


def write_truth(root: Path, kind: str, file: str, values: dict[str, int]) -> None:
    (root / f"ground_truth_{kind}").mkdir(parents=True, exist_ok=True)
    (root / f"ground_truth_{kind}" / f"ground_truth_{file}.csv").write_text(
        "".join(f"{name},{value}\n" for name, value in values.items())
    )


def test_the_domain_of_a_clip_is_its_own(tmp_path, call, fails):
    """Of evaluation clips that name it, in one list; a list that contradicts them, or does not
    tell, is an error.
    """
    names = [
        f"section_03_{domain}_test_000{i}.wav" for domain in ("source", "target") for i in range(2)
    ]
    write_scores(
        tmp_path, "fan_section_03_test", dict(zip(names, (0.0, 1.0, 2.0, 3.0), strict=True))
    )
    write_truth(tmp_path, "data", "fan_section_03_test", {name: int(name[-5]) for name in names})
    words = ("--score_files", tmp_path, "--data_root", tmp_path)
    assert call(eval_script.main, *words)[0] == 0
    check(
        read_metrics(tmp_path)["fan", "03"],
        {"AUC_source": Fraction(1), "AUC_target": Fraction(1, 2)},
    )
    write_truth(tmp_path, "domain", "fan_section_03_test", dict.fromkeys(names, 1))
    fails(
        eval_script.main,
        *words,
        match="section_03_source_test_0000 is of the target domain, and its name or folder says",
    )
    shutil.rmtree(tmp_path / "ground_truth_domain")
    (tmp_path / "anomaly_score_fan_section_03_test.csv").unlink()
    write_scores(tmp_path, "fan_section_03_test", {"section_03_0000.wav": 1.0})
    write_truth(tmp_path, "data", "fan_section_03_test", {"section_03_0000.wav": 1})
    fails(
        eval_script.main,
        *words,
        match="ground_truth_domain/ground_truth_fan_section_03_test.csv does not tell the dom",
    )


def test_clips_without_a_score_are_said(tmp_path, call):
    write_scores(
        tmp_path, "fan_section_03_test", {"section_03_0000.wav": 1.0, "section_03_0001.wav": 2.0}
    )
    for kind in ("data", "domain"):
        write_truth(
            tmp_path,
            kind,
            "fan_section_03_test",
            {f"section_03_000{i}.wav": i % 2 for i in range(4)},
        )
    status, _, errors = call(eval_script.main, "--score_files", tmp_path, "--data_root", tmp_path)
    assert status == 0
    assert (
        "2 clips of the lists have no score and count in no metric, such as fan section_03_0002"
        in errors
    )


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
