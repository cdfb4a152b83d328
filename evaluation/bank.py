"""The bank: the embeddings of the training clips, with which clips are compared."""

from collections.abc import Iterable
from dataclasses import replace

import torch

from checkpoint import HeldOut
from config import Config
from dataloader import ClipSet, fingerprint_of, load_clips
from evaluation.scores import KINDS, Embeddings
from inference import run_model
from trained import Model
from utils import UserError, notice


def with_bank(model: Model, config: Config, kinds: Iterable[str], device: torch.device) -> Model:
    """Return a model whose checkpoint has the bank and the embeddings of the held-out clips, if one
    of these kinds of score needs them.

    A training that has ended has left it in the checkpoint. For other weights it is computed from
    the training clips in `data_root`, with the windows and the channel of the training.

    Raises:
        UserError: If there are no training clips, or if they are not those of the run.
    """
    if model.checkpoint.bank is not None or not any(KINDS[kind].uses_bank for kind in kinds):
        return model
    notice(
        f"{model.path} holds no embeddings of its training clips; they are computed from "
        f"{config.data_root}"
    )
    clips = load_clips(config, model.classes, "train", model.config.windows("train"))
    if model.checkpoint.config is None:  # a bare state dict, which does not say what was held out
        checkpoint = replace(model.checkpoint, bank=embed(model, clips, config, device))
        return replace(model, checkpoint=checkpoint)
    train_clips, valid_clips = clips.split(model.config.split_ratio, model.config.seed)
    if fingerprint_of(train_clips, valid_clips) != model.checkpoint.fingerprint:
        raise UserError(
            f"the recordings under {config.data_root} are not those that {model.path} was trained "
            f"on; set --data_root to the folder of that run, or choose another --scoring"
        )
    bank = embed(model, train_clips, config, device)
    assert model.checkpoint.held_out
    embedding = embed(model, valid_clips, config, device).embedding
    held_out = HeldOut(valid_clips.labels, model.checkpoint.held_out.scores, embedding)
    return replace(model, checkpoint=replace(model.checkpoint, bank=bank, held_out=held_out))


def embed(model: Model, clips: ClipSet, config: Config, device: torch.device) -> Embeddings:
    """Compute the embeddings of clips, in float32."""
    outputs = run_model(model, clips, config, device, "embeddings", precision="fp32")
    return Embeddings.from_outputs(outputs.embedding, clips.labels)
