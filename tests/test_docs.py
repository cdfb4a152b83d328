"""The pages: links that lead somewhere, commands that the scripts understand, pictures that load quickly."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import matplotlib.image
import pytest
import yaml

import eval as evaluation_script
import export
import train
from datasets import download
from docs import figures

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
PICTURES = sorted(ROOT.glob("docs/*.png"))
LINK = r"""(?:\]\(|src="|srcset=")([^)"]+)"""


def links(page: Path) -> list[str]:
    """Those within the project."""
    return [link for link in re.findall(LINK, page.read_text()) if not link.startswith("https://")]


def anchors(page: Path) -> set[str]:
    """The names that a code host gives to the headings."""
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


def test_every_page_and_picture_is_linked():
    linked = {(page.parent / link.partition("#")[0]).resolve() for page in PAGES for link in links(page)}
    assert linked >= {*PAGES, *PICTURES} - {ROOT / "README.md"}
    assert sum(picture.stat().st_size for picture in PICTURES) < 1e6


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command of a page that calls a script or make, as the shell splits them; without variables."""
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(), flags=re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.split(" && "):
                if re.match(r"(python|torchrun|make) ", command.strip()) and "$" not in command:
                    split = subprocess.run(["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True)
                    yield split.stdout.splitlines()


ALL = [words for page in PAGES for words in commands(page)]


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_commands_are_understood(words, call, tmp_path, monkeypatch):
    """Each option exists and has a value that is possible. The configurations are those that the pages show."""
    scripts = [number for number, word in enumerate(words) if word.endswith(".py")]
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.M)
        return
    script, options = words[scripts[0]], words[scripts[0] + 1 :]
    assert (ROOT / script).exists()
    (press,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/own_machines.md").read_text(), flags=re.S)
    (tmp_path / "press.yaml").write_text(press)
    (tmp_path / "my.yaml").write_text("epoch: 7")
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    for name in ("evaluate_all", "score", "evaluate_score_files"):
        monkeypatch.setattr(evaluation_script, name, lambda *_: None)
    monkeypatch.setattr(train, "train", lambda *_: None)
    monkeypatch.setattr(export, "export", lambda *_: None)
    table = yaml.safe_load(download.TABLE.read_text())
    mains = {
        "train.py": train.main,
        "train_ddp.py": train.main,
        "eval.py": evaluation_script.main,
        "export.py": export.main,
        "datasets/download.py": lambda: download.parse_options(table, options),
    }
    if script in mains:
        status, _, errors = call(mains[script], *options)
        assert status == 0, errors


@pytest.mark.parametrize("name", ["method", "angles"])
def test_figures_are_drawn_for_light_and_dark_pages(name, call, lively, data_root, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "DOCS", tmp_path)
    monkeypatch.setattr(figures, "MACHINE", ("fan", "02"))
    status, _, errors = call(figures.main, name, lively / "run.pth", "--data_root", data_root, "--device", "cpu")
    assert status == 0, errors
    light, dark = (matplotlib.image.imread(tmp_path / f"{name}{suffix}.png") for suffix in ("", "_dark"))
    assert light.shape == dark.shape
    assert light[0, 0, :3].tolist() == [1, 1, 1]
    assert dark[0, 0, :3].max() < 0.1
