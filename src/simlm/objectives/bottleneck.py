"""The shallow decoder behind the bottleneck: of the encoder it sees the last-layer [CLS] state and nothing else.

Source: SimLM, arXiv 2207.02578, section 3.1 and figure 1. The decoder starts from the encoder's last layers and shares the encoder's
embeddings and language-model head; there is no skip connection.
Shapes: B sequences, T tokens, H hidden.
"""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from simlm.artifacts import write_json
from simlm.errors import ModelError
from simlm.models.backbone import LayerInputs, copy_last_layers, encoder_of, quiet, run_layers

DECODER_FILE = "decoder.safetensors"


class Decoder(nn.Module):
    """Transformer layers with weights of their own; state: `layers.*`, and `norm.*` in architectures with a final norm."""

    def __init__(self, masked_lm: PreTrainedModel, num_layers: int = 2) -> None:
        """Copies of the encoder's last layers; ModelError if it has fewer."""
        super().__init__()
        self.layers, self.norm = copy_last_layers(encoder_of(masked_lm), num_layers)

    def forward(self, cls_BH: Tensor, embedded_BTH: Tensor, inputs: LayerInputs) -> Tensor:
        """Last states [B, T, H] over embedded_BTH, in which position 0 gives way to cls_BH. Every layer sees all tokens."""
        hidden_BTH = torch.cat([cls_BH[:, None], embedded_BTH[:, 1:]], 1)
        hidden_BTH = run_layers(self.layers, hidden_BTH, inputs.without_windows())
        return hidden_BTH if self.norm is None else self.norm(hidden_BTH)


def save_masked_lm(masked_lm: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerFast, *, role: str, **facts: object) -> None:
    """Write a masked language model with its tokenizer and simlm.json {"role": role, **facts}."""
    with quiet():
        masked_lm.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    write_json(folder / "simlm.json", {"role": role, **facts})


def save_state(module: nn.Module, file: Path) -> None:
    """Write a module's state as safetensors."""
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, file)


def load_state(module: nn.Module, file: Path, *, what: str) -> None:
    """Take a module's state from a file; ModelError if it is damaged or does not fit. what: whose it is, for the error."""
    own = module.state_dict()
    try:
        saved = safetensors.torch.load_file(file)
    except SafetensorError as error:
        raise ModelError(f"{file}: damaged ({error}); run the pretrain step that wrote it again") from error
    wrong = sorted(
        name for name in own.keys() | saved.keys() if name not in own or name not in saved or own[name].shape != saved[name].shape
    )
    if wrong:
        raise ModelError(
            f"{file}: it does not fit {what} of this recipe ({wrong[0]!r} differs); "
            "set pretrain.decoder_layers and pretrain.objective to those that it was trained with"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])
