"""Objectives with a decoder or a head, held against plain loops over one passage at a time."""

from __future__ import annotations

import dataclasses
import math
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from simlm.data.batches import collate
from simlm.errors import ModelError
from simlm.models.backbone import embed, encoder_of, layer_inputs, layers_of, lm_features, load_masked_lm, run_layers, with_mask
from simlm.objectives import EncoderPass, Parts, Summed, Tokens
from simlm.objectives.autoencoder import SPAN
from simlm.objectives.bottleneck import save_masked_lm
from simlm.objectives.dupmae import max_pooled_bag_loss
from simlm.objectives.enc_dec_rtd import Discriminator
from simlm.objectives.masking import Draws
from simlm.objectives.pretraining import Pretraining
from simlm.objectives.retromae import EnhancedDecoder, VisibleViews
from simlm.objectives.start import corpus_ids
from simlm.objectives.steps import Feeding
from simlm.recipe import ModelSettings, PretrainSettings
from tests.unit.test_backbone import CONFIGS

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from simlm.data.store import Store

torch.set_num_threads(1)

NAMES = ("enc_dec_rtd", "condenser", "autoencoder", "retromae", "dupmae")
FAMILIES = ("bert", "roberta", "modernbert")
ROWS = np.array([3, 5, 17, 29, 40], dtype=np.int64)


def masked_lm(store: Store, family: str = "bert", attention: Any = None) -> PreTrainedModel:
    config = CONFIGS[family] | {"max_position_embeddings": 80, "initializer_range": 0.3}
    settings = ModelSettings(start="scratch", config=config, attention=attention)
    return load_masked_lm(settings, tokenizer=store.tokenizer(), seed=1, dropout=0.0)


@pytest.fixture(scope="module")
def generator(tiny_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoders") / "generator"
    folder.mkdir()
    save_masked_lm(masked_lm(tiny_store), folder, tiny_store.tokenizer(), role="generator")
    return folder


def build(
    name: str,
    store: Store,
    generator: Path | None = None,
    family: str = "bert",
    continued: Path | None = None,
    attention: Any = None,
    **changes: Any,
) -> Pretraining:
    settings = PretrainSettings.model_validate({"objective": name, "softmax": "vocabulary", **changes})
    model = masked_lm(store, family, attention)
    ids = corpus_ids(store, model.config.vocab_size)
    return Pretraining.build(settings, Parts(model, store.tokenizer(), generator, continued, corpus_ids=ids)).eval()


def micro_batches(task: Pretraining, store: Store, family: str = "bert", micro_batch_tokens: int = 10_000) -> list[dict[str, Any]]:
    feeding = Feeding(store.passages, task.views(), micro_batch_tokens, family == "bert", seed=7)
    return feeding.micro_batches(ROWS, np.zeros(len(ROWS), dtype=np.int64))


def seen_by(task: Pretraining, store: Store, family: str = "bert") -> EncoderPass:
    (batch,) = micro_batches(task, store, family)
    assert "attention_mask" in batch
    return task._encode(batch)


def decoder_term(task: Pretraining, seen: EncoderPass) -> Tokens | Summed:
    (objective,) = task.objectives.values()
    return objective.terms(seen)[0]  # type: ignore[operator]


# --- the same losses, one passage and one position at a time


@dataclasses.dataclass
class Passage:
    """One row of a micro-batch without its padding; sets of positions within it."""

    ids: Tensor
    read: Tensor
    types: Tensor | None
    scored: list[int]
    encoder_masked: list[int]
    row: int


def passages_of(seen: EncoderPass) -> list[Passage]:
    mask = seen.attention_mask
    width = seen.original_BT.shape[1]
    found = []
    for row, ids in enumerate(seen.original_BT):
        length = width if mask is None else int(mask[row].sum())
        scored, masked = (
            [place - row * width for place in places.tolist() if place // width == row]
            for places in (seen.scored_N, seen.encoder_positions_M)
        )
        types = None if seen.token_type_ids is None else seen.token_type_ids[row : row + 1, :length]
        found.append(Passage(ids[None, :length], seen.encoder_BT[row : row + 1, :length], types, scored, masked, row))
    return found


def states(task: Pretraining, passage: Passage) -> list[Tensor]:
    """Of every depth, the last one normed: transformers' own forward."""
    encoder = encoder_of(task.masked_lm)
    extra = {} if passage.types is None else {"token_type_ids": passage.types}
    output = encoder(passage.read, output_hidden_states=True, **extra)
    return [*output.hidden_states[:-1], output.last_hidden_state]


def token_loss(task: Pretraining, hidden: Tensor, label: Tensor) -> Tensor:
    features, weight, bias = lm_features(task.masked_lm, hidden[None])
    return F.cross_entropy(features @ weight.T + (0 if bias is None else bias), label[None])


def through(decoder: Any, task: Pretraining, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """The decoder's layers on one passage; mask: additive, by default every position sees every other."""
    inputs = layer_inputs(encoder_of(task.masked_lm), hidden, None)
    mask = torch.zeros(1, 1, hidden.shape[1], hidden.shape[1]) if mask is None else mask
    inputs = dataclasses.replace(inputs, masks=dict.fromkeys(inputs.masks, mask))
    hidden = run_layers(decoder.layers, hidden, inputs)
    return hidden if decoder.norm is None else decoder.norm(hidden)


def plain_condenser(task: Pretraining, seen: EncoderPass, passage: Passage) -> Tensor:
    objective: Any = task.objectives["condenser"]
    depths = states(task, passage)
    assert len(depths) == 4
    hidden = through(objective.decoder, task, torch.cat([depths[-1][:, :1], depths[1][:, 1:]], 1))
    return sum_of(token_loss(task, hidden[0, place], passage.ids[0, place]) for place in passage.encoder_masked)


def plain_autoencoder(task: Pretraining, seen: EncoderPass, passage: Passage) -> Tensor:
    objective: Any = task.objectives["autoencoder"]
    embedded = embed(encoder_of(task.masked_lm), passage.ids, passage.types)
    hidden = torch.cat([states(task, passage)[-1][:, :1], embedded[:, 1:]], 1)
    mask = torch.full((1, 1, hidden.shape[1], hidden.shape[1]), float("-inf"))
    for place in range(hidden.shape[1]):
        for other in {0, max(place - 1, 0), place}:
            mask[0, 0, place, other] = 0.0
    hidden = through(objective.decoder, task, hidden, mask)
    return sum_of(token_loss(task, hidden[0, place - 1], passage.ids[0, place]) for place in passage.scored)


def plain_retromae(task: Pretraining, seen: EncoderPass, passage: Passage) -> Tensor:
    (objective,) = task.objectives.values()
    decoder: Any = objective.decoder
    encoder = encoder_of(task.masked_lm)
    cls = states(task, passage)[-1][0, 0]
    contents = embed(encoder, passage.ids, passage.types)[0]
    losses = []
    for place in passage.scored:
        visible = [other for other in range(passage.ids.shape[1]) if seen.batch["visible"][passage.row, place, other]]
        query = cls.clone()
        if encoder.config.model_type == "bert":
            query = query + encoder.embeddings.position_embeddings.weight[place]
        if encoder.config.model_type == "roberta":
            query = query + encoder.embeddings.position_embeddings.weight[place + encoder.config.pad_token_id + 1]
        mixed = []
        size = len(query) // decoder.num_heads
        for head in range(decoder.num_heads):
            own = slice(head * size, (head + 1) * size)
            asked = turned(encoder, decoder.query(query)[own], place)
            streams = [cls if other == 0 else contents[other] for other in visible]
            keys = torch.stack([turned(encoder, decoder.key(stream)[own], other) for stream, other in zip(streams, visible, strict=True)])
            values = torch.stack([decoder.value(stream)[own] for stream in streams])
            mixed.append(torch.softmax(keys @ asked / math.sqrt(size), 0) @ values)
        hidden = decoder.attention_norm(query + decoder.attended(torch.cat(mixed)))
        hidden = decoder.norm(hidden + decoder.narrow(F.gelu(decoder.widen(hidden))))
        losses.append(token_loss(task, hidden, passage.ids[0, place]))
    return sum_of(losses)


def turned(encoder: PreTrainedModel, vector: Tensor, place: int) -> Tensor:
    """Rotary position of one head's vector: pairs (i, i + size / 2) turned by place x base^(-2i / size)."""
    if encoder.config.model_type != "modernbert":
        return vector
    size = len(vector)
    base = encoder.config.rope_parameters["full_attention"]["rope_theta"]
    result = vector.clone()
    for index in range(size // 2):
        angle = place * base ** (-2 * index / size)
        first, second = vector[index], vector[index + size // 2]
        result[index] = first * math.cos(angle) - second * math.sin(angle)
        result[index + size // 2] = second * math.cos(angle) + first * math.sin(angle)
    return result


def plain_ordinary(task: Pretraining, seen: EncoderPass, passage: Passage) -> Tensor:
    hidden = states(task, passage)[-1][0]
    features, weight, bias = lm_features(task.masked_lm, hidden[passage.scored])
    pooled = (features @ weight.T + (0 if bias is None else bias)).max(0).values
    bag = {int(passage.ids[0, place]) for place in passage.scored}
    return -sum_of(torch.log_softmax(pooled, 0)[token] for token in bag) / len(bag)


def plain_detection(task: Pretraining, hidden: Tensor, read: Tensor, passage: Passage) -> Tensor:
    head: Any = task.objectives["enc_dec_rtd"].discriminator
    losses = []
    for place in passage.scored:
        logit = head.output(F.gelu(head.dense(hidden[0, place])))[0]
        replaced = int(read[0, place]) != int(passage.ids[0, place])
        losses.append(F.softplus(-logit if replaced else logit))
    return sum_of(losses)


def sum_of(values: Any) -> Tensor:
    return torch.stack(list(values)).sum()


def plain_losses(name: str, task: Pretraining, seen: EncoderPass) -> dict[str, float]:
    """Sums over the passages, divided by counts of the step."""
    sums: dict[str, float] = {}
    counts = {"tokens": 0, "masked": 0, "sequences": 0}

    def add(key: str, value: Tensor) -> None:
        sums[key] = sums.get(key, 0.0) + value.item()

    for passage in passages_of(seen):
        counts["tokens"] += len(passage.scored)
        counts["masked"] += max(1, round(0.3 * len(passage.scored)))
        counts["sequences"] += 1
        if name == "enc_dec_rtd":
            last = states(task, passage)[-1]
            add("encoder", plain_detection(task, last, passage.read, passage))
            read = seen.replaced_BT[passage.row : passage.row + 1, : passage.ids.shape[1]]
            entering = torch.cat([last[:, :1], embed(encoder_of(task.masked_lm), read, passage.types)[:, 1:]], 1)
            hidden = through(task.objectives["enc_dec_rtd"].decoder, task, entering)
            add("decoder", plain_detection(task, hidden, read, passage))
            continue
        last = states(task, passage)[-1][0]
        add("encoder", sum_of(token_loss(task, last[place], passage.ids[0, place]) for place in passage.encoder_masked))
        decoders = {"condenser": plain_condenser, "autoencoder": plain_autoencoder, "retromae": plain_retromae, "dupmae": plain_retromae}
        add("decoder", decoders[name](task, seen, passage))
        if name == "dupmae":
            add("ordinary", plain_ordinary(task, seen, passage))
    masked = {"encoder", "decoder"} if name == "condenser" else set() if name == "enc_dec_rtd" else {"encoder"}
    divisors = {key: counts["masked"] if key in masked else counts["sequences" if key == "ordinary" else "tokens"] for key in sums}
    return {f"{key}_loss": value / divisors[key] for key, value in sums.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_losses_equal_plain_loops_however_the_step_is_cut(name: str, family: str, tiny_store: Store, generator: Path) -> None:
    task = build(name, tiny_store, generator, family)
    expected = plain_losses(name, task, seen_by(task, tiny_store, family))
    for micro_batch_tokens in (10_000, 60):
        sums: dict[str, float] = {}
        for batch in micro_batches(task, tiny_store, family, micro_batch_tokens):
            for key, value in task(**batch).items():
                sums[key] = sums.get(key, 0.0) + value.item()
        for key, value in expected.items():
            assert sums[key] == pytest.approx(value, rel=2e-5), key
        weights = {"ordinary_loss": 0.1}
        assert sums["loss"] == pytest.approx(sum(weights.get(key, 1.0) * value for key, value in expected.items()), rel=2e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_bf16_comes_close(name: str, attention: str, tiny_store: Store, generator: Path) -> None:
    task = build(name, tiny_store, generator, attention=attention)
    (batch,) = micro_batches(task, tiny_store)
    exact = {key: value.item() for key, value in task(**batch).items()}
    with torch.autocast("cpu", torch.bfloat16):
        found = task(**batch)
    found["loss"].backward()
    # The samples of a generator in bf16 are others.
    close = 0.3 if name == "enc_dec_rtd" else 0.03
    assert {key: found[key].item() for key in exact if key.endswith("loss")} == pytest.approx(
        {key: value for key, value in exact.items() if key.endswith("loss")}, rel=close
    )
    assert all(entry.grad is None or entry.grad.isfinite().all() for entry in task.parameters())


# --- what the decoder learns of the encoder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_only_cls_of_the_last_layer_reaches_the_decoder(
    name: str, family: str, tiny_store: Store, generator: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two layers with windows of 3 tokens would not carry [CLS] to every masked position.
    monkeypatch.setitem(CONFIGS["modernbert"], "local_attention", 200)
    task = build(name, tiny_store, generator, family)
    seen = seen_by(task, tiny_store, family)
    term = decoder_term(task, seen)
    total = (term.hidden_NH * torch.linspace(-1, 1, 16)).sum() if isinstance(term, Tokens) else term.total
    last = list(layers_of(encoder_of(task.masked_lm))[-1].parameters())
    gradient, *inside = torch.autograd.grad(total, [seen.hidden_BTH, *last])
    assert (gradient[:, 0].abs().sum(-1) > 0).all() and (gradient[:, 1:] == 0).all()
    assert all((entry != 0).any() for entry in inside)
    if name == "condenser":
        assert seen.early_BTH is not None and seen.early_BTH.shape == seen.hidden_BTH.shape


def test_condenser_takes_the_layer_that_is_asked_for(tiny_store: Store) -> None:
    for layer in (1, 2):
        task = build("condenser", tiny_store, skip_layer=layer)
        seen = seen_by(task, tiny_store)
        (passage, *_) = passages_of(seen)
        assert seen.early_BTH is not None
        torch.testing.assert_close(seen.early_BTH[0, : passage.ids.shape[1]], states(task, passage)[layer][0], rtol=1e-4, atol=1e-5)
    assert build("condenser", tiny_store).objectives["condenser"].early_layer == 1  # 3 // 2
    with pytest.raises(ModelError, match=r"skip_layer: .* behind layer 3 of an encoder with 3; a number from 1 to 2"):
        build("condenser", tiny_store, skip_layer=3)
    config = CONFIGS["bert"] | {"num_hidden_layers": 1}
    shallow = load_masked_lm(ModelSettings(start="scratch", config=config), tokenizer=tiny_store.tokenizer())
    with pytest.raises(ModelError, match="only one"):
        Pretraining.build(PretrainSettings(objective="condenser", decoder_layers=1), Parts(shallow, tiny_store.tokenizer(), None, None))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_autoencoder_predicts_from_a_few_tokens_before(family: str, attention: str, tiny_store: Store) -> None:
    """With [CLS] held still, a token bears on the predictions of the next SPAN + 1 tokens (two layers) and on no others."""
    task = build("autoencoder", tiny_store, family=family, attention=attention)
    seen = seen_by(task, tiny_store, family)
    width = seen.original_BT.shape[1]
    changed_BT = seen.original_BT.clone()
    changed_BT[0, 9] = changed_BT[0, 9] % 100 + 7
    other = dataclasses.replace(seen, batch=seen.batch | {"input_ids": changed_BT})
    before, after = decoder_term(task, seen), decoder_term(task, other)
    assert isinstance(before, Tokens) and isinstance(after, Tokens)
    places = seen.scored_N[(before.hidden_NH != after.hidden_NH).any(-1)].tolist()
    assert width > 14 and places == [10, 11, 12] and SPAN == 2


def test_an_attention_without_masks_is_refused(tiny_store: Store) -> None:
    encoder = encoder_of(masked_lm(tiny_store))
    encoder.config._attn_implementation = "flash_attention_2"
    inputs = layer_inputs(encoder_of(masked_lm(tiny_store)), torch.zeros(1, 4, 16), None)
    with pytest.raises(ModelError, match="'flash_attention_2' takes no mask"):
        with_mask(encoder, inputs, torch.ones(1, 4, 4, dtype=torch.bool), torch.float32)


# --- enhanced decoding


def test_visible_positions(tiny_store: Store) -> None:
    views = VisibleViews(0.75)
    batch = collate(tiny_store.passages, ROWS)
    visible = views(batch, Draws(7, 2, ROWS))["visible"]
    width = batch.input_ids.shape[1]
    assert visible.dtype == torch.bool and visible.shape == (5, width, width)
    assert visible[:, :, 0].all()
    assert not visible.diagonal(dim1=1, dim2=2)[:, 1:].any()
    assert not visible[:, :, 1:].transpose(1, 2)[torch.from_numpy(batch.attention_mask[:, 1:] == 0)].any()
    lengths = batch.attention_mask.sum(1)
    pairs = sum((int(length) - 1) * (int(length) - 2) for length in lengths)
    counted = sum(int(visible[row, 1:length, 1:length].sum()) for row, length in enumerate(lengths))
    assert counted / pairs == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / pairs))
    # Rows of one passage differ: each position has a sample of its own.
    assert len({tuple(row) for row in visible[0, 1 : lengths[0]].tolist()}) == lengths[0] - 1

    # The passage alone, without padding, sees the same.
    for row, length in enumerate(lengths):
        alone = views(collate(tiny_store.passages, ROWS[row : row + 1]), Draws(7, 2, ROWS[row : row + 1]))["visible"]
        assert torch.equal(alone[0], visible[row, :length, :length])
    assert not torch.equal(views(batch, Draws(7, 3, ROWS))["visible"], visible)
    assert torch.equal(pickle.loads(pickle.dumps(views))(batch, Draws(7, 2, ROWS))["visible"], visible)
    assert not VisibleViews(1.0)(batch, Draws(7, 2, ROWS))["visible"][:, :, 1:].any()
    every = VisibleViews(1e-9)(batch, Draws(7, 2, ROWS))["visible"]
    assert every[0, 1 : lengths[0], 1 : lengths[0]].sum() >= (lengths[0] - 1) * (lengths[0] - 2) - 2


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_a_token_bears_on_those_that_see_it_and_never_on_itself(family: str, tiny_store: Store) -> None:
    task = build("retromae", tiny_store, family=family)
    seen = seen_by(task, tiny_store, family)
    changed_BT = seen.original_BT.clone()
    changed_BT[1, 6] = changed_BT[1, 6] % 100 + 7
    other = dataclasses.replace(seen, batch=seen.batch | {"input_ids": changed_BT})
    before, after = decoder_term(task, seen), decoder_term(task, other)
    assert isinstance(before, Tokens) and isinstance(after, Tokens)
    width = seen.original_BT.shape[1]
    places = set(seen.scored_N[(before.hidden_NH != after.hidden_NH).any(-1)].tolist())
    scored = set(seen.scored_N.tolist())
    expected = {width + row for row in seen.batch["visible"][1, :, 6].nonzero()[:, 0].tolist()} & scored
    assert places == expected and 3 < len(places) < width - 4 and width + 6 not in places


@pytest.mark.parametrize("family", sorted(set(CONFIGS) - {"modernbert"}))
@torch.no_grad()
def test_enhanced_decoder_is_the_last_layer_with_two_streams(family: str, tiny_store: Store) -> None:
    model = masked_lm(tiny_store, family).eval()
    decoder, last = EnhancedDecoder(model).eval(), layers_of(encoder_of(model))[-1]
    hidden = torch.randn(2, 7, 16)
    everything = torch.ones(2, 7, 7, dtype=torch.bool)
    torch.testing.assert_close(decoder(hidden, hidden, everything), last(hidden), rtol=1e-5, atol=1e-5)
    assert not {id(entry) for entry in decoder.parameters()} & {id(entry) for entry in model.parameters()}


def test_fresh_parts_depend_on_no_global_state(tiny_store: Store) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    modern, bert = masked_lm(tiny_store, "modernbert"), masked_lm(tiny_store)
    made: list[nn.Module] = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        made += [EnhancedDecoder(modern), Discriminator(bert.config)]
        if seed == 3:
            assert torch.rand(1) == expected
    for first, second in ((made[0], made[2]), (made[1], made[3])):
        for one, other in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.equal(one, other)
    spread = torch.cat([layer.weight.flatten() for layer in (made[0].query, made[0].widen)]).std().item()  # type: ignore[union-attr]
    assert spread == pytest.approx(0.3, rel=0.1) and made[1].output.bias.item() == 0  # type: ignore[union-attr, operator]


def test_dropout_is_the_recipe_s(tiny_store: Store) -> None:
    config = CONFIGS["bert"] | {"hidden_dropout_prob": 0.4, "attention_probs_dropout_prob": 0.2}
    model = load_masked_lm(ModelSettings(start="scratch", config=config), tokenizer=tiny_store.tokenizer())
    decoder = EnhancedDecoder(model)
    assert (decoder.attention_dropout.p, decoder.dropout.p) == (0.2, 0.4)
    hidden, everything = torch.randn(1, 5, 16), torch.ones(1, 5, 5, dtype=torch.bool)
    assert not torch.equal(decoder.train()(hidden, hidden, everything), decoder(hidden, hidden, everything))
    assert torch.equal(decoder.eval()(hidden, hidden, everything), decoder(hidden, hidden, everything))


def test_enhanced_decoding_has_one_layer(tiny_store: Store) -> None:
    for name in ("retromae", "dupmae"):
        with pytest.raises(ModelError, match=r"decoder_layers: 3, .* one layer"):
            build(name, tiny_store, decoder_layers=3)
        build(name, tiny_store, decoder_layers=1)
    both = PretrainSettings.model_validate({"objective": {"retromae": 1.0, "enc_dec_mlm": 1.0}, "decoder_layers": 3})
    task = Pretraining.build(both, Parts(masked_lm(tiny_store), tiny_store.tokenizer(), None, None))
    assert len(task.objectives["enc_dec_mlm"].decoder.layers) == 3  # type: ignore[union-attr, arg-type]


# --- the bag of words of ordinary tokens


@pytest.mark.parametrize("rows", [3, 10, 1000])
@pytest.mark.parametrize("with_bias", [True, False])
def test_max_pooled_bag_loss_in_chunks(rows: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradients of the plain computation, whatever the chunk; a sequence without tokens counts nothing."""
    monkeypatch.setattr("simlm.objectives.dupmae.default_chunk_rows", lambda weight: rows)
    features, weight, bias = torch.randn(4 * 5, 3), torch.randn(11, 3), torch.randn(11)
    scored = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 1]], dtype=torch.bool)
    bags = [{1, 2, 3}, {4}, set(), {1, 10}]
    pairs = [(token, row) for row, bag in enumerate(bags) for token in sorted(bag)]
    tokens, owners = torch.tensor(pairs).T

    results = []
    for plain in (True, False):
        leaves = [entry.clone().requires_grad_(True) for entry in (features, weight, bias)]
        used_bias = leaves[2] if with_bias else None
        if plain:
            logits = (leaves[0] @ leaves[1].T + (used_bias if used_bias is not None else 0)).view(4, 5, 11)
            losses = [
                -sum(torch.log_softmax(logits[row][scored[row]].max(0).values, 0)[token] for token in bag) / len(bag)
                for row, bag in enumerate(bags)
                if bag
            ]
            loss = torch.stack(losses).sum()
        else:
            loss = max_pooled_bag_loss(leaves[0], leaves[1], used_bias, scored, tokens, owners)
        (2.5 * loss).backward()
        results.append((loss.detach(), [leaf.grad for leaf in leaves]))
    torch.testing.assert_close(results[1][0], results[0][0])
    for found, expected in zip(results[1][1], results[0][1], strict=True):
        if expected is None:
            assert found is None
        else:
            torch.testing.assert_close(found, expected)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()
    with torch.no_grad():
        again = max_pooled_bag_loss(features, weight, bias if with_bias else None, scored, tokens, owners)
    torch.testing.assert_close(again, results[0][0])


def test_a_head_that_is_frozen_gets_no_gradient() -> None:
    features, weight = torch.randn(4, 3, requires_grad=True), torch.randn(6, 3)
    scored = torch.tensor([[False, True, True, False]])
    max_pooled_bag_loss(features, weight, None, scored, torch.tensor([2]), torch.tensor([0])).backward()
    assert features.grad is not None and (features.grad[1:3] != 0).any() and (features.grad[[0, 3]] == 0).all()
    assert weight.grad is None


def test_dupmae_is_retromae_and_a_weighted_bag(tiny_store: Store) -> None:
    task, alone = build("dupmae", tiny_store), build("retromae", tiny_store)
    (batch,), (other,) = micro_batches(task, tiny_store), micro_batches(alone, tiny_store)
    found, expected = task(**batch), alone(**other)
    assert found["loss"].item() == pytest.approx((expected["loss"] + 0.1 * found["ordinary_loss"]).item(), rel=1e-6)
    heavier = build("dupmae", tiny_store, ordinary_weight=0.5)(**batch)
    assert heavier["loss"].item() == pytest.approx((expected["loss"] + 0.5 * found["ordinary_loss"]).item(), rel=1e-6)
    # Over the corpus's own vocabulary the softmax has fewer rivals.
    restricted = build("dupmae", tiny_store, softmax="corpus")
    smaller = restricted(**micro_batches(restricted, tiny_store)[0])["ordinary_loss"].item()
    assert 0 < smaller < found["ordinary_loss"].item()


# --- replaced-token detection


def test_detection_counts_what_is_found_and_leaves_the_head_alone(tiny_store: Store, generator: Path) -> None:
    task = build("enc_dec_rtd", tiny_store, generator)
    head: Any = task.objectives["enc_dec_rtd"].discriminator
    (batch,) = micro_batches(task, tiny_store)
    replaced = (task._encode(batch).encoder_BT != task._encode(batch).original_BT).sum().item()
    assert replaced > 5
    for bias, found in ((100.0, replaced), (-100.0, 0)):
        with torch.no_grad():
            head.output.bias.fill_(bias)
        measures = task.measure(**batch)
        assert [value.item() for value in measures["encoder_accuracy_at_replaced"]] == [found, replaced]
        assert measures["decoder_accuracy_at_replaced"][1].item() == measures["decoder_replaced"][0].item()
    encoder = {id(entry) for entry in encoder_of(task.masked_lm).parameters()}
    assert not any(entry.requires_grad for entry in task.masked_lm.parameters() if id(entry) not in encoder)


# --- saving


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_state_is_saved_and_taken_up_again(name: str, tiny_store: Store, generator: Path, tmp_path: Path) -> None:
    task = build(name, tiny_store, generator)
    for parameter in task.objectives.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    task.save(tmp_path, tiny_store.tokenizer())
    again = build(name, tiny_store, generator, continued=tmp_path)
    assert again.objectives.state_dict().keys() == task.objectives.state_dict().keys()
    (batch,) = micro_batches(task, tiny_store)
    assert again(**batch)["loss"].item() == task(**batch)["loss"].item()
    fresh = build(name, tiny_store, generator)
    assert fresh(**batch)["loss"].item() != task(**batch)["loss"].item()
