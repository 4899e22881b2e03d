"""Train a model with the masked-language-model loss, from nothing or from a folder."""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh

from distilbert_jax.config import PretrainConfig
from distilbert_jax.data import sources
from distilbert_jax.data.prepare import is_prepared
from distilbert_jax.data.tokenize import load_tokenizer, train_wordpiece
from distilbert_jax.errors import UserError
from distilbert_jax.evaluation import report
from distilbert_jax.evaluation.held_out import top1_intervals
from distilbert_jax.export.card import card, held_out_results
from distilbert_jax.export.huggingface import export
from distilbert_jax.jobs.setup import check_folder, check_job, read_data
from distilbert_jax.jobs.ship import check_ship, ship_held_out
from distilbert_jax.jobs.task_model import read_json
from distilbert_jax.machine import seal, store
from distilbert_jax.machine.lock import hold
from distilbert_jax.machine.seal import fingerprint
from distilbert_jax.machine.sharding import first_process_first, to_host
from distilbert_jax.models import bert, hub
from distilbert_jax.models.encoder import EncoderConfig
from distilbert_jax.models.family import Family
from distilbert_jax.models.start import init_params, init_to_pretrain
from distilbert_jax.training.assemble import assemble

if TYPE_CHECKING:
    import transformers


def pretrain(config: PretrainConfig) -> Path:
    """Train a BERT with the masked-language-model loss, from nothing or from `config.model`.

    Returns:
        The folder of the exported model, `OUTPUT/model`.

    Raises:
        UserError, Interrupted: as for distil.
    """
    check_ship(config)
    source = hub.load(config.model) if config.model else None
    shape, family = (source.config, source.family) if source else (
        scratch_shape(config), bert.FAMILY)
    settings = config.meaning()
    if source:
        settings["--model"] = fingerprint(source.params)
    mesh = check_job(config, family, [shape], settings)
    check_folder(config.output, "model", "checkpoints", {"--model": config.model})
    with hold(config.output):
        return _pretrain(config, source, family, shape, mesh, settings)


def _pretrain(config: PretrainConfig, source: hub.Pretrained | None, family: Family,
              shape: EncoderConfig, mesh: Mesh, settings: dict[str, Any]) -> Path:
    """Train in a folder that is held."""
    own = store.join(config.output, "tokenizer")
    request = {"vocab_size": config.vocab_size, "lowercase": config.lowercase}
    asked = store.join(own, "request.json")
    learnt = store.exists(asked) and read_json(store.path(asked)) == request
    if source or learnt:
        tokenizer = load_tokenizer(config.model or own, shape.vocab_size if source else None)
    else:
        tokenizer = _learnt_tokenizer(config)
    words = shape.vocab_size if source else len(tokenizer)
    shape = dataclasses.replace(
        shape, vocab_size=words, mlm_head=True, pooler=False, hidden_dropout=config.dropout,
        attention_dropout=config.dropout)
    setup = read_data(config, mesh, tokenizer, settings)
    if not source and not learnt and jax.process_index() == 0:
        with store.whole_folder(store.local(own)) as new:
            tokenizer.save_pretrained(new)
            seal.write_json(new / "request.json", request)
        store.upload(own)

    assembly = assemble(config, family, shape, [], mesh, setup.steps)
    init = init_params if source else init_to_pretrain
    start = init(shape, config.seed, assembly.param_dtype)
    if source:  # else its head, if it has none
        start |= {name: part for name, part in source.params.items() if name in start}
    trained, updates = setup.train(assembly, assembly.cast(start), {}, "train teacher")

    output = store.local(config.output)
    figures, rows = setup.judged(assembly.eval_step, {}, trained)
    figures |= top1_intervals(rows["masked"], {"model": rows["correct"]})["model"]
    trained, standing = to_host(trained), setup.standing(updates)
    about = "\n\n".join(filter(None, (
        f"Trained by distilbert_jax with the masked-language-model loss; "
        f"{report.held_out_line(figures)}.", standing, report.versions())))
    about = card(
        "fill-mask", f"{shape.num_hidden_layers}-layer {family.architecture}", about,
        folder="model", origin=config.model, mask=setup.tokenizer.mask_token,
        corpus=setup.data.words, results=held_out_results(figures))
    with first_process_first():
        if jax.process_index() == 0:
            export(output / "model", trained, shape, family, setup.tokenizer, about)
            setup.plot(figures, updates, "masked-language-model training")
            store.upload(config.output, "model", "losses.png")
            if config.ship:
                ship_held_out(output / "model", setup)
                store.upload(config.output, "model")
    print(f"model: {store.join(config.output, 'model')} (held-out top-1 {figures['top1']:.2%}, "
          f"perplexity {figures['perplexity']:.2f}) {standing}".rstrip())
    return output / "model"


def scratch_shape(config: PretrainConfig) -> EncoderConfig:
    """The BERT that is trained from scratch; its vocabulary may come out smaller."""
    return EncoderConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, type_vocab_size=2,
        num_hidden_layers=config.num_hidden_layers, intermediate_size=4 * config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=max(512, config.sequence_length),
        initializer_range=0.02 * math.sqrt(768 / config.hidden_size))  # BERT-base's, scaled


def _learnt_tokenizer(config: PretrainConfig) -> "transformers.BertTokenizer":
    """The tokenizer trained on the corpus, without its held-out part."""
    if is_prepared(config.corpus):
        raise UserError(f"--corpus {config.corpus[0]} is prepared for another tokenizer, and none "
                        "can be learnt from it: give texts, or --model")
    documents = (d for d in sources.Documents(config.corpus, config.mix, config.text_field)
                 if config.valid or not sources.is_held_out(d, config.valid_share))
    return train_wordpiece(documents, config.vocab_size, config.lowercase)
