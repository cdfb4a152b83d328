"""The bank: the embeddings of the training clips, with which clips are compared."""

from collections.abc import Iterable
from dataclasses import replace

import torch

from checkpoint import HeldOut, Model
from config import Config
from dataloader import ClipSet, load_clips
from evaluation.scores import KINDS, Embeddings
from inference import run_in_precision
from utils import UserError, notice


def with_bank(model: Model, config: Config, kinds: Iterable[str], device: torch.device) -> Model:
    """Return a model with the bank, if one of these kinds of score needs it.

    A training that has ended has left it in the checkpoint. For other weights it is computed from
    the training clips in `data_root`, with the windows and the channel of the training.

    Raises:
        UserError: If there are no training clips, or others than those of the run.
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
    fingerprint = f"{train_clips.fingerprint()}/{valid_clips.fingerprint()}"
    if fingerprint != model.checkpoint.fingerprint:
        raise UserError(
            f"the clips under {config.data_root} are not those that {model.path} was trained on; "
            f"give the folder of that run (--data_root), or take another score (--scoring)"
        )
    bank = embed(model, train_clips, config, device)
    assert model.checkpoint.held_out
    embedding = embed(model, valid_clips, config, device).embedding
    held_out = HeldOut(valid_clips.labels, model.checkpoint.held_out.scores, embedding)
    return replace(model, checkpoint=replace(model.checkpoint, bank=bank, held_out=held_out))


def embed(model: Model, clips: ClipSet, config: Config, device: torch.device) -> Embeddings:
    """Compute the embeddings of clips, in float32."""
    precision = torch.float32
    outputs = run_in_precision(model, clips, config.batch_size, device, precision, "embeddings")
    return Embeddings.from_outputs(outputs.embedding, clips.labels)
