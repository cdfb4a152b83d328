"""config.yaml, the command line, and the one-line errors they end in."""

import json
import re
from pathlib import Path

import pytest

import eval as eval_script
import train
from audio import Windows
from command_line import OneLineParser
from config import (
    DEFAULT_CONFIG,
    KEYS,
    describe_keys,
    load_config,
    make_config,
    parse_command_line,
    read_yaml,
)
from errors import UserError
from names import format_id


def parse(*words: str):
    return parse_command_line(OneLineParser(), words)[0]


def test_config_yaml_holds_each_key_once_with_its_meaning():
    assert tuple(read_yaml(DEFAULT_CONFIG)) == KEYS
    assert tuple(describe_keys()) == KEYS
    assert all(describe_keys().values())


def test_defaults_are_the_published_recipe():
    config = load_config()
    published = {
        "alpha": 0.5, "m": 0.7, "s": 30.0, "epoch": 300, "batch_size": 64, "lr": 1e-4,
        "weight_decay": 0.01, "split_ratio": 0.95, "seed": 2023, "mode": "noisy_arcmix",
        "input": ["tgram", "sgram", "tagram"],
    }  # fmt: skip
    assert {name: getattr(config, name) for name in published} == published
    assert list(config.machines) == ["fan", "pump", "slider", "ToyCar", "ToyConveyor", "valve"]
    assert sum(map(len, config.machines.values())) == 41
    assert config.weights_path == Path("check_points/noisy_arcmix.pth")


@pytest.mark.parametrize("written", ["1e-4", "1E-4", "0.0001", "1.0e-4", ".0001", "'1e-4'"])
def test_a_number_is_a_number_wherever_it_is_written(written, tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text(f"lr: {written}\n")
    assert load_config(file).lr == 1e-4
    assert parse("--lr", written).lr == 1e-4


@pytest.mark.parametrize("ids", ["[2, 8]", '["02", "08"]', "[02, 08]", "['2', 08]", "[002, 008]"])
def test_an_id_may_be_written_with_zeros(ids, tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text(f"machines: {{fan: {ids}}}\n")
    assert load_config(file).machines == {"fan": ["02", "08"]}
    assert parse("--machines", f"{{fan: {ids}}}").machines == {"fan": ["02", "08"]}


def test_an_id_may_be_a_word():
    machines = parse("--machines", "{press: [line-3, 7, 2b]}").machines
    assert machines == {"press": ["line-3", "07", "2b"]}
    ids = ("07", 7, "007", "line-3", "")
    assert [format_id(machine_id) for machine_id in ids] == ["07", "07", "07", "line-3", ""]
    machines = parse("--machines", "{press: [20240131123, 3]}").machines
    assert machines == {"press": ["20240131123", "03"]}


def test_the_machines_may_be_those_of_the_folders():
    assert parse("--machines", "auto").machines == "auto"


def test_the_windows_of_a_split():
    assert parse().windows("train") == parse().windows("test") == Windows(None, 0)
    config = parse("--window", "all", "--channel", "1")
    windows = [config.windows(split) for split in ("train", "test", "evaluation")]
    assert windows == [Windows(10, 1), Windows(5, 1), Windows(5, 1)]
    config = parse("--window", "all", "--hop", "2")
    assert config.windows("train") == config.windows("test") == Windows(2, 0)


def test_the_keys_of_the_command_line_are_remembered(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("epoch: 5\n")
    config = parse("--config", str(file), "--lr", "3e-4", "--seed", "1")
    assert config.given == {"lr", "seed"}
    assert load_config(lr=1e-4).given == set()


def test_machine_types_may_look_like_numbers():
    assert parse("--machines", "{3018: [0]}").machines == {"3018": ["00"]}


def test_every_key_is_typed_on_the_command_line():
    values = {
        "data_root": "/data", "machines": {"slider": ["00", "02"]}, "split_ratio": 0.9,
        "classes": "attributes", "window": "all", "hop": 2.5, "channel": 1,
        "init_from": "a/b.pth", "over_windows": "max", "data_device": "cpu", "mode": "arcmix",
        "input": ["sgram"], "alpha": 1.0, "m": 0.5, "s": 32.0, "sub_centers": 3,
        "epoch": 10, "batch_size": 8, "lr": 5e-4, "weight_decay": 0.0, "weight_average": 0.99,
        "compile": True,
        "seed": 7, "save_path": "a/b.pth", "device": "cuda:1", "precision": "bf16",
        "eval_precision": "bf16", "num_workers": 2, "tensorboard": False,
        "score_dtype": "float64", "scoring": "nearest", "neighbours": 4,
        "threshold": "quantile", "false_alarms": 0.05, "alarm_windows": 4, "alarm_span": 6,
    }  # fmt: skip
    assert set(values) == set(KEYS)
    words = []
    for name, value in values.items():
        written = value if isinstance(value, str) else json.dumps(value)
        words += [f"--{name}", written]
    assert parse(*words).model_dump() == values


def test_a_threshold_may_be_a_number():
    assert parse("--threshold", "0.004").threshold == 0.004
    assert parse("--threshold", "3").threshold == 3.0
    assert parse("--threshold", "gamma").threshold == "gamma"


def test_the_input_order_is_fixed_and_one_channel_needs_no_brackets():
    assert parse("--input", "[tagram, tgram]").input == ["tgram", "tagram"]
    assert parse("--input", "sgram").input == ["sgram"]


def test_a_file_replaces_config_yaml_and_the_command_line_both(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("epoch: 5\nlr: 2e-4\n")
    config = parse("--config", str(file), "--lr", "3e-4")
    assert (config.epoch, config.lr, config.batch_size) == (5, 3e-4, 64)


def test_of_several_files_the_last_one_counts(tmp_path):
    for name, text in {"one": "epoch: 5\nlr: 2e-4\n", "two": "epoch: 6\nseed: 3\n"}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    config = parse("--config", str(one), "--config", str(two), "--seed", "4")
    assert (config.epoch, config.lr, config.seed) == (6, 2e-4, 4)
    assert parse("--config", str(two), f"--config={one}").epoch == 5
    one.write_text("epoch: 0\n")
    with pytest.raises(UserError, match=r"one.yaml: epoch: 0 is not a whole number of at least 1"):
        parse("--config", str(two), "--config", str(one))
    two.write_text("epoch: 7\n")
    assert parse("--config", str(one), "--config", str(two)).epoch == 7


RECIPES = sorted((DEFAULT_CONFIG.parent / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_says_where_it_comes_from(file):
    config = load_config(file)
    allowed = {"mode", "input", "m", "batch_size", "weight_decay", "weight_average"}
    assert read_yaml(file).keys() <= allowed
    if file.parent.name == "inputs":
        assert (config.mode, "+".join(config.input)) == ("noisy_arcmix", file.stem)
    else:
        text = file.read_text()
        assert all(f"\n# {subject}: " in text for subject in ("Source", "Claim", "Epoch"))


def test_the_recipe_of_noisy_arcmix_is_config_yaml():
    assert load_config(DEFAULT_CONFIG.parent / "recipes" / "noisy_arcmix.yaml") == load_config()
    names = [file.stem for file in RECIPES]
    assert len(set(names)) == len(names), "make paper can take all of them"


def test_save_path_holds_mode_and_seed():
    config = parse("--save_path", "x/{mode}_{seed}.pth", "--mode", "arcface")
    assert config.weights_path == Path("x/arcface_2023.pth")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--mode", "arcmx"],
            r"command line: mode: 'arcmx' is not one of noisy_arcmix, .*did you mean arcmix\?",
        ),
        (["--batchsize", "3"], r"unknown option --batchsize; did you mean --batch_size\?"),
        (["--epo", "3"], r"unknown option --epo; did you mean --epoch\?"),  # never abbreviated
        (["--lr", "1", "--seed=2", "--lr=3"], r"command line: --lr is given twice; leave one out"),
        (["--lr", "fast"], r"lr: 'fast' is not a number above 0"),
        (["--lr", "-1"], r"lr: -1 is not a number above 0"),
        (["--lr", "nan"], r"lr: 'nan' is not a number above 0"),
        (["--lr"], r"argument --lr: expected one argument"),
        (["--epoch", "1.5"], r"epoch: 1.5 is not a whole number of at least 1"),
        (["--epoch", "'1_0'"], r"epoch: '1_0' is not a whole number"),
        (["--epoch", "!!int x"], r"epoch: not valid YAML"),
        (["--tensorboard", "!!bool x"], r"tensorboard: not valid YAML"),
        (["--epoch", "1:30"], r"epoch: not valid YAML"),
        (["--epoch", "true"], r"epoch: True is not a whole number"),
        (["--epoch", "0"], r"epoch: 0 is not a whole number of at least 1"),
        (
            ["--batch_size", "1"],
            r"batch_size: 1 is not a whole number of at least 2 \(batch norm\)",
        ),
        (["--split_ratio", "1"], r"split_ratio: 1 is not a number above 0 and below 1"),
        (["--m", "4"], r"m: 4 is not an angle from 0 to 3.14 radians"),
        (["--seed", "-3"], r"seed: -3 is not a whole number from 0"),
        (
            ["--input", "[sgram, melgram]"],
            r"input: \['sgram', 'melgram'\] is not a list of .*tgram, sgram, tagram",
        ),
        (["--input", "[]"], r"input: \[\] is not a list"),
        (["--input", "[sgram, sgram]"], r"input: .* is not a list of different channels"),
        (["--machines", "fan"], r"machines: 'fan' is not auto or a table"),
        (["--machines", "{fan: 0}"], r"machines: .* is not auto or a table of machine types"),
        (
            ["--machines", "{fan: [0, '00']}"],
            r"machines: .* is not auto or a table .* different IDs",
        ),
        (
            ["--machines", "{fan: [x_y, 1]}"],
            r"machines: .* is not auto or a table .*words without _",
        ),
        (
            ["--machines", "{fan: [x/y, 1]}"],
            r"machines: .* is not auto or a table .*words without _, /",
        ),
        (
            ["--machines", "{fan: [mean, 1]}"],
            r"machines: .* is not auto or a table .*not pooled, mean, min or hmean",
        ),
        (["--machines", "{fan: [-1, 1]}"], r"machines: .* is not auto or a table"),
        (["--machines", "{}"], r"machines: {} is not auto or a table"),
        (["--machines", "{fan: [1.5, 1]}"], r"machines: .* is not auto or a table"),
        (["--window", "30"], r"window: 30 is not one of first, all"),
        (["--hop", "0"], r"hop: 0 is not auto or a number of seconds from 0.1 to 10"),
        (["--hop", "10.5"], r"hop: 10.5 is not auto or a number of seconds"),
        (["--channel", "-1"], r"channel: -1 is not a whole number of at least 0"),
        (["--classes", "domain"], r"classes: 'domain' is not one of section, attributes"),
        (["--classes", "{fan: {'00': [a]}}"], r"classes: .* is not one of section, attributes"),
        (["--machines", "{average: [0, 1]}"], r"machines: .* is not auto or a table"),
        (["--machines", "{7: [0], '7': [1]}"], r"machines: .* is not auto or a table"),
        (["--machines", "{../fan: [0, 1]}"], r"machines: .* is not auto or a table"),
        (["--machines", "{fan: [0, 1], fan: [2]}"], r"machines.*fan is given twice"),
        (["--machines", "{fan: [0"], r"command line: machines, line 1: not valid YAML"),
        (["--device", "gpu"], r"device: 'gpu' is not auto, cpu, cuda or cuda:N"),
        (["--precision", "fp8"], r"precision: 'fp8' is not one of auto, fp32, bf16, fp16"),
        (["--save_path", "weights"], r"save_path: 'weights' is not a file name that ends in .pth"),
        (
            ["--save_path", "{mdoe}.pth"],
            r"save_path: .* without braces but those of {mode} and {seed}",
        ),
        (["--save_path", "x/.pth"], r"save_path: 'x/.pth' is not a file name"),
        (["--tensorboard", "maybe"], r"tensorboard: 'maybe' is not true or false"),
        (["--tensorboard", "1"], r"tensorboard: 1 is not true or false"),
        (["--compile", "maybe"], r"compile: 'maybe' is not auto, true or false"),
        (["--lr", "true"], r"lr: True is not a number above 0"),
        (["--config", "none.yaml"], r"none.yaml: no such configuration file"),
        (["--hop", "5"], r"command line: hop has no effect with window: first; leave it out"),
        (["--resume", "--overwrite"], r"--resume continues a run and --overwrite replaces it; use"),
    ],
)
def test_errors_on_the_command_line(fails, words, message):
    fails(train.main, *words, match=message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--false_alarms", "10"], "false_alarms: 10 is not a number above 0 and below 1"),
        (["--threshold", "gama"], "threshold: 'gama' is not conformal, gamma, quantile or a num"),
        (["--threshold", "true"], "threshold: True is not conformal, gamma, quantile or a number"),
        (["--threshold", ".nan"], "threshold: nan is not conformal, gamma, quantile or a number"),
        (["--alarm_windows", "6"], "alarm_span: 5 is not a whole number of at least alarm_windo"),
        (["--alarm_span", "0"], "alarm_span: 0 is not a whole number of at least alarm_windows"),
    ],
)
def test_errors_in_keys_of_decisions(fails, words, message):
    fails(eval_script.main, *words, match=message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1\n", r"my.yaml: unknown key 'learning_rate'"),
        ("batch_sise: 1\n", r"my.yaml: unknown key 'batch_sise'; did you mean batch_size\?"),
        (
            "data_root: 2020\n",
            r"my.yaml: data_root: 2020 is not the name of a folder \(a number needs quotes\)",
        ),
        ("lr: [1]\n", r"my.yaml: lr: \[1\] is not a number above 0"),
        ("lr:\n", r"my.yaml: lr: None is not a number above 0"),
        ("mode: noisy_arcmx\n", r"my.yaml: mode: .* did you mean noisy_arcmix\?"),
        ("lr: 1\nlr: 2\n", r"my.yaml, line 1: not valid YAML: lr is given twice"),
        ("lr: 1\n  m: 2\n", r"my.yaml, line 2: not valid YAML"),
        ("- lr\n", r"my.yaml: not a configuration; write it as lines of `key: value`"),
        ("a\x00b", r"my.yaml: not valid YAML"),
    ],
)
def test_errors_in_a_file(fails, tmp_path, text, message):
    file = tmp_path / "my.yaml"
    file.write_text(text)
    fails(train.main, "--config", str(file), match=message)


def test_a_file_that_is_not_text(fails, tmp_path):
    file = tmp_path / "my.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    fails(train.main, "--config", str(file), match="not a text file in UTF-8")


def test_a_config_yaml_without_a_key_is_an_error(tmp_path, monkeypatch):
    file = tmp_path / "config.yaml"
    file.write_text(re.sub(r"(?m)^seed:.*$", "", DEFAULT_CONFIG.read_text()))
    monkeypatch.setattr("config.DEFAULT_CONFIG", file)
    with pytest.raises(UserError, match="seed is missing"):
        load_config(file)


def test_help_lists_every_key_with_meaning_and_default(call):
    """A key is listed by each script that uses it."""
    outputs = {}
    for main in (train.main, eval_script.main):
        _, output, _ = call(main, "--help")
        outputs[main] = " ".join(output.split()).replace("- ", "-")  # lines may end in a hyphen
    for name, meaning in describe_keys().items():
        listing = [words for words in outputs.values() if f"--{name} VALUE" in words]
        assert listing, name
        assert all(meaning.replace("- ", "-") in words for words in listing)
    assert "--lr" not in outputs[eval_script.main]
    assert "--scoring" not in outputs[train.main]
    assert "(default: 0.0001)" in outputs[train.main]


def test_what_a_checkpoint_holds_is_read_back_as_the_same_configuration():
    config = parse("--compile", "false", "--input", "tgram", "--data_root", "~/data")
    assert make_config(("checkpoint", config.model_dump())).model_dump() == config.model_dump()


def test_the_source_of_a_wrong_value_is_the_last_that_gave_it():
    with pytest.raises(UserError, match=r"^later: lr: -1 is not a number above 0$"):
        make_config(("first", load_config().model_dump()), ("later", {"lr": -1}))
