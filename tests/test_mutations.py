"""Every spoilt recording is refused with its reason or read correctly: none passes as garbage, crashes or hangs.

The sources are synthetic unless the environment variable RECORDINGS names a folder of real ones (16 kHz, 16 bits,
mono), in any depth: RECORDINGS=/data/dcase2020 python -m pytest -m slow tests/test_mutations.py
"""

import faulthandler
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import arguments, tone, write_clip, write_set
from mutations import DAMAGES, NOT_A_CLIP, Spoilt, mutate

import train
import utils
from dataloader import N_SAMPLES, NAMES_SHOWN, read_clip
from utils import UserError

NOBODY = 65534


@pytest.fixture
def open_folder():
    """A folder that every user may write to."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def spoilt(open_folder, request) -> list[Spoilt]:
    """Spoilt recordings among intact ones, made before `ordinary_user` takes over."""
    write_set(open_folder / "data")
    if given := os.environ.get("RECORDINGS"):
        sources = sorted(Path(given).rglob("*.wav"))
    else:
        sources = [write_clip(open_folder / f"{index}.wav", tone(index)) for index in range(5)]
    return mutate(open_folder / "data" / "fan" / "train", sources, request.param, seed=20)


@pytest.fixture
def ordinary_user(spoilt):
    """Not root, whom no file's rights stop."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    yield
    os.seteuid(0)


@pytest.fixture(autouse=True)
def time_limit():
    faulthandler.dump_traceback_later(300, exit=True)  # a reader that hangs in C code hears no signal
    yield
    faulthandler.cancel_dump_traceback_later()


each_damage_and_200 = pytest.mark.parametrize(
    "spoilt",
    [pytest.param(len(DAMAGES), id="each"), pytest.param(200, id="200", marks=pytest.mark.slow)],
    indirect=True,
)


@each_damage_and_200
def test_each_is_refused_or_read_correctly(spoilt, ordinary_user):
    for one in spoilt:
        if one.expected is None:
            with pytest.raises(UserError):
                print(one.path.name, one.damage, read_clip(one.path))  # shown only where it is not refused
        elif one.expected is not NOT_A_CLIP:
            samples, changes = read_clip(one.path)
            assert np.array_equal(samples, np.resize(one.expected, N_SAMPLES)), one
            assert any("shorter" in change for change in changes) == (len(one.expected) < N_SAMPLES), one


@each_damage_and_200
def test_training_names_each_that_cannot_be_used(spoilt, ordinary_user, open_folder, fails):
    refused = [one for one in spoilt if one.expected is None]
    said = fails(
        train.main, *arguments(open_folder, open_folder / "data"), match=f"{len(refused)} of .* cannot be used"
    )
    for one in refused:
        assert f"{one.path.name} (" in said, one
    names = sorted(utils.one_line(one.path.name) for one in spoilt if one.expected is NOT_A_CLIP)
    assert all(name in said for name in names[:NAMES_SHOWN])
    assert f"skipped {len(names)} files not named" in said
