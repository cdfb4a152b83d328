"""What is drawn for an epoch: order and mixup; the shares of a mixed batch."""

import numpy as np
import pytest
import torch
from conftest import clips_in_memory

from config import load_config
from losses import Mix
from sampling import Sampler, divide_mix, draw_mix


def test_each_epoch_has_every_clip_once_in_another_order():
    clips = clips_in_memory(torch.zeros(38, 1), torch.zeros(38, dtype=torch.int64))

    def shuffle(epoch: int) -> list[np.ndarray]:
        config = load_config(batch_size=8)
        return Sampler(config, clips, torch.device("cpu")).shuffle(epoch)

    first, second = shuffle(0), shuffle(1)
    assert [len(batch) for batch in first] == [8, 8, 8, 8, 6]
    assert sorted(np.concatenate(first)) == list(range(38))
    assert not np.array_equal(np.concatenate(first), np.concatenate(second))
    assert np.array_equal(first[0], shuffle(0)[0])


def test_mixing_is_drawn_from_a_beta_distribution():
    mixes = [draw_mix(0.5, np.random.default_rng(i), 5) for i in range(2000)]
    lams = np.array([mix.lam.item() for mix in mixes])
    assert lams.mean() == pytest.approx(0.5, abs=0.03)
    assert lams.var() == pytest.approx(0.125, abs=0.01)  # of Beta(1/2, 1/2)
    assert all(sorted(mix.partner.tolist()) == [0, 1, 2, 3, 4] for mix in mixes)


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_the_parts_of_a_mixed_batch_mix_as_the_whole(parts):
    for size in (5, 12, 64):
        for seed in range(20):
            partner = torch.from_numpy(np.random.default_rng(seed).permutation(size))
            mix, x = Mix(torch.tensor(0.3), partner), torch.randn(size, 2)
            clips, mixed = [], []
            for part in range(parts):
                rows, share = divide_mix(mix, part, parts)
                count = len(share.partner)
                assert len(rows) == count + (2 if parts > 1 else 0)
                clips += rows[:count].tolist()
                mixed.append(share(x[rows]))
            assert sorted(clips) == list(range(size)), "every clip once"
            assert torch.equal(torch.cat(mixed), mix(x)[clips])
