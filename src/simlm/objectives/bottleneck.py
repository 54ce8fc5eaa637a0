"""Encoder and shallow decoder that meet in one vector: the encoder's last-layer [CLS] state is all that the decoder sees of it.

Source: SimLM, arXiv 2207.02578, section 3.1 and figure 1. The decoder starts from the encoder's last layers and shares the encoder's
embeddings and language-model head; there is no skip connection.
Shapes: B passages, T tokens, H hidden.
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
from simlm.models.backbone import copy_last_layers, embed, encoder_of, layer_inputs, quiet, run_encoder, run_layers

DECODER_FILE = "decoder.safetensors"


class Bottleneck(nn.Module):
    """Masked LM (encoder and head) plus decoder layers."""

    def __init__(self, masked_lm: PreTrainedModel, *, num_decoder_layers: int = 2) -> None:
        """ModelError if the encoder has fewer layers than the decoder is to have."""
        super().__init__()
        self.masked_lm = masked_lm
        self.decoder, self.decoder_norm = copy_last_layers(encoder_of(masked_lm), num_decoder_layers)

    def forward(
        self, encoder_ids_BT: Tensor, decoder_ids_BT: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(encoder_BTH, decoder_BTH): last hidden states of both sides.

        attention_mask: as `layer_inputs` takes it, the same for both sides.
        """
        encoder = encoder_of(self.masked_lm)
        hidden_BTH = embed(encoder, encoder_ids_BT, token_type_ids)
        inputs = layer_inputs(encoder, hidden_BTH, attention_mask)
        encoder_BTH = run_encoder(encoder, hidden_BTH, inputs)

        embedded_BTH = embed(encoder, decoder_ids_BT, token_type_ids)
        decoder_BTH = torch.cat([encoder_BTH[:, :1], embedded_BTH[:, 1:]], 1)
        decoder_BTH = run_layers(self.decoder, decoder_BTH, inputs)
        return encoder_BTH, decoder_BTH if self.decoder_norm is None else self.decoder_norm(decoder_BTH)

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerFast, **facts: object) -> None:
        """Write a masked-LM folder (AutoModel and AutoModelForMaskedLM load it) with the decoder beside it; facts: for simlm.json."""
        save_masked_lm(self.masked_lm, folder, tokenizer, role="pretrained", num_decoder_layers=len(self.decoder), **facts)
        safetensors.torch.save_file(self._decoder_state(), folder / DECODER_FILE)

    def load_decoder(self, folder: Path) -> bool:
        """Take the decoder's weights from a saved folder; False if it has none. ModelError if they do not fit."""
        file = folder / DECODER_FILE
        if not file.is_file():
            return False
        own = self._decoder_state()
        try:
            saved = safetensors.torch.load_file(file)
        except SafetensorError as error:
            raise ModelError(f"{file}: damaged ({error}); run the pretrain step that wrote it again") from error
        wrong = sorted(
            name for name in own.keys() | saved.keys() if name not in own or name not in saved or own[name].shape != saved[name].shape
        )
        if wrong:
            raise ModelError(
                f"{file}: its decoder is not one of {len(self.decoder)} layers of this encoder ({wrong[0]!r} differs); "
                "set pretrain.decoder_layers to the number it was trained with"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved[name])
        return True

    def _decoder_state(self) -> dict[str, Tensor]:
        modules = {"layers": self.decoder} if self.decoder_norm is None else {"layers": self.decoder, "norm": self.decoder_norm}
        return {f"{prefix}.{name}": tensor for prefix, module in modules.items() for name, tensor in module.state_dict().items()}


def save_masked_lm(masked_lm: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerFast, *, role: str, **facts: object) -> None:
    """Write a masked language model with its tokenizer and simlm.json {"role": role, **facts}."""
    with quiet():
        masked_lm.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    write_json(folder / "simlm.json", {"role": role, **facts})
