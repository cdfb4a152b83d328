"""The documentation: its links resolve, its commands are valid, its pictures are small."""

import os
import re
import subprocess
from pathlib import Path

import matplotlib.image
import pytest
import yaml

import eval as evaluation_script
import export
import score as score_script
import train
from config import KEYS
from datasets import download
from docs import figures

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
PICTURES = sorted(ROOT.glob("docs/*.png"))
VARIABLES = {  # shell variables that loops on the pages set
    "PATH": os.environ["PATH"],
    "data": "--data_root datasets/synthetic",
    "all": "--machines auto --split_ratio 0.8",
    "usual": "--epoch 8 --batch_size 16 --lr 1e-3",
    "two": "--split_ratio 0.8 --batch_size 4 --lr 1e-3",
    "seed": "1",
    "classes": "section",
    "start": "nothing",
    "from": "",
    "slider": "{slider: [0]}",
    "valve": "{valve: [0]}",
    "real": "--config docs/real_recordings.yaml --data_root FOLDER",
}
LINK = r"""(?:\]\(|src="|srcset=")([^)"]+)"""


def links(page: Path) -> list[str]:
    """Return the links of a page that lead within the project."""
    return [link for link in re.findall(LINK, page.read_text()) if not link.startswith("https://")]


def anchors(page: Path) -> set[str]:
    """Return the anchors that a code host gives to the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_readme_leads_to_every_page_and_picture():
    reached, pages = set(), [ROOT / "README.md"]
    while pages:
        page = pages.pop()
        targets = [page.parent / link.partition("#")[0] for link in links(page)]
        linked = {target.resolve() for target in targets} - reached
        reached |= linked
        pages += [path for path in linked if path.suffix == ".md"]
    assert reached >= {*PAGES, *PICTURES} - {ROOT / "README.md"}
    assert sum(picture.stat().st_size for picture in PICTURES) < 1e6


IN_BLOCK = r"(?:^|&& ) *((?:python|torchrun|make) .*?)(?=$| &&)"
IN_PROSE = r"(?<!`)`((?:python|torchrun|make) [^`]+)`"


def commands() -> list[list[str]]:
    """Return the words of each command on the pages that calls a script or make.

    A shell splits the commands into words.
    """
    lines = []
    for page in PAGES:
        parts = re.split(r"```sh\n(.*?)```", page.read_text(), flags=re.S)
        for prose in parts[::2]:
            lines += re.findall(IN_PROSE, prose.replace("\n", " "))
        for block in parts[1::2]:
            lines += re.findall(IN_BLOCK, block.replace("\\\n", ""), flags=re.M)
    for line in lines:
        assert not re.search(r"[;|<>]|\.\.\.|\$\(", line.split("#")[0]), f"unsafe to expand: {line}"
    script = "\n".join(f"printf '%s\\n' {line}\nprintf '\\036'" for line in dict.fromkeys(lines))
    split = subprocess.run(
        ["bash", "-c", script], env=VARIABLES, capture_output=True, text=True, check=True
    )
    return [words.splitlines() for words in split.stdout.split("\036") if words]


ALL = commands()


def test_commands_are_found():
    assert len(ALL) > 60


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_commands_are_understood(words, call, tmp_path, monkeypatch):
    """The options exist, and those of the main scripts have values that are possible."""
    if words[0] == "make":
        text = (ROOT / "Makefile").read_text()
        for word in words[1:]:
            variable = word.split("=")[0]
            assert re.search(rf"^{word}:|\({variable}\)", text, flags=re.M), word
        return
    number = next(number for number, word in enumerate(words) if word.endswith(".py"))
    script, options = words[number], words[number + 1 :]
    if script == "examples/score_new.py":  # it calls score.py with recordings of a folder
        script, options = "score.py", [*options[2:], "new.wav"]
    own_machines = (ROOT / "docs/own_machines.md").read_text()
    (press,) = re.findall(r"```yaml\n(.*?)```", own_machines, flags=re.S)
    (tmp_path / "press.yaml").write_text(press)
    (tmp_path / "my.yaml").write_text("epoch: 7")
    for folder in ("docs", "recipes"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    for name in ("evaluate_all", "evaluate_score_files"):
        monkeypatch.setattr(evaluation_script, name, lambda *_: None)
    for name in ("score", "run_calibration"):
        monkeypatch.setattr(score_script, name, lambda *_: None)
    monkeypatch.setattr(train, "train", lambda *_: None)
    monkeypatch.setattr(export, "export", lambda *_: None)
    table = yaml.safe_load(download.TABLE.read_text())
    mains = {
        "train.py": train.main,
        "train_ddp.py": train.main,
        "eval.py": evaluation_script.main,
        "score.py": score_script.main,
        "export.py": export.main,
        "datasets/download.py": lambda: download.parse_options(table, options),
    }
    if script in mains:
        status, _, errors = call(mains[script], *options)
        assert status == 0, errors
    else:
        # benchmarks share options with reproduce.py
        text = (ROOT / script).read_text() + (ROOT / "reproduce.py").read_text()
        names = [option.removeprefix("--") for option in options if option.startswith("--")]
        assert all(name in KEYS or f'"--{name}"' in text for name in names if name != "config")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["method", "angles"])
def test_figures_are_drawn_for_light_and_dark_pages(
    name, call, lively, data_root, tmp_path, monkeypatch
):
    monkeypatch.setattr(figures, "DOCS", tmp_path)
    monkeypatch.setattr(figures, "MACHINE", ("fan", "02"))
    words = (name, lively / "run.pth", "--data_root", data_root, "--device", "cpu")
    status, _, errors = call(figures.main, *words)
    assert status == 0, errors
    light = matplotlib.image.imread(tmp_path / f"{name}.png")
    dark = matplotlib.image.imread(tmp_path / f"{name}_dark.png")
    assert light.shape == dark.shape
    assert light[0, 0, :3].tolist() == [1, 1, 1]
    assert dark[0, 0, :3].max() < 0.1
    assert light[..., :3].max(axis=2).min() < 0.1, "black letters"
    assert dark[..., :3].min(axis=2).max() > 0.8, "light letters"
