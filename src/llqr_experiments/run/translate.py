"""What a model of translation says: beam search over a split, BLEU, samples to read."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from llqr.typing import Params
from llqr_experiments.config.options import TranslationEval
from llqr_experiments.config.row import become
from llqr_experiments.data import translation
from llqr_experiments.layout import Layout
from llqr_experiments.models.decoding import Decoder, Rules, beam_search
from llqr_experiments.record.translations import Sample

WIDTHS = 2
"""Percentiles of the lengths at which batches get another width: a search compiles for each."""

SAMPLES = 5

Follow = Callable[[Iterable[Any], int], Iterable[Any]]
"""(batches, their number) -> the same batches, progress shown."""


@dataclass(frozen=True)
class Translated:
    """A split, or a part of it, in translation.

    Attributes:
      bleu: of the whole.
      copied: score of the source sentences as they stand, which a translation must beat; None
        for a part of a split.
      examples: sentences.
      samples: a few of them.
    """

    bleu: translation.Bleu
    copied: float | None
    examples: int
    samples: tuple[Sample, ...]


def translate(
    decoder: Decoder,
    params: Params,
    data: translation.Translation,
    split: str,
    options: TranslationEval,
    *,
    batch_size: int,
    most: int | None = None,
    follow: Follow = lambda batches, total: batches,
    layout: Layout | None = None,
) -> Translated:
    """Translate a split and score it.

    Args:
      decoder: of the model.
      params: its parameters.
      data: sentences and vocabularies.
      split: "valid" or "test".
      options: of the search and of the text.
      batch_size: sentences at once.
      most: translate this many, spread evenly over the split; None: all.
      follow: shows progress.
      layout: over devices, along whose rows sentences are spread; None: one device.
    """
    if layout is not None:
        batch_size = -(-batch_size // layout.parts) * layout.parts
    pairs = _spread(getattr(data, split), most)
    rules = Rules(**become(options, "rules"))
    bucketing = replace(data.bucketing, percentiles=WIDTHS)
    total = len(translation.Buckets(pairs, bucketing, rows=batch_size).in_order())
    found: dict[int, np.ndarray] = {}
    batches = translation.evaluation_batches(pairs, bucketing, batch_size=batch_size)
    for batch in follow(batches, total):
        source = layout.put(batch["source"]) if layout else batch["source"]
        tokens = beam_search(decoder, params, source, rules).tokens
        best = jax.device_get(layout.whole(tokens) if layout else tokens)[:, 0]
        found |= {int(i): row for i, row in zip(batch["index"], best, strict=True) if i >= 0}
    written = "space" if options.detok == "none" else options.detok

    def text(numbers: np.ndarray, unknown: str) -> str:
        return translation.detokenise(
            numbers,
            data.target,
            unknown=unknown,
            detokeniser=written,  # pyright: ignore[reportArgumentType]
        )

    order = range(len(pairs))
    hypotheses = [text(found[i], translation.UNKNOWN_HYPOTHESIS) for i in order]
    references = [text(pairs.target[i], translation.UNKNOWN_REFERENCE) for i in order]
    shown = np.linspace(0, len(pairs) - 1, min(SAMPLES, len(pairs))).astype(int)
    samples = tuple(
        Sample(_source(data, pairs.source[i]), hypotheses[i], references[i]) for i in shown
    )
    copied = None
    if most is None:
        sources = [_source(data, numbers) for numbers in pairs.source]
        copied = translation.bleu(sources, references).score
    return Translated(translation.bleu(hypotheses, references), copied, len(pairs), samples)


def _spread(pairs: translation.Pairs, most: int | None) -> translation.Pairs:
    """At most `most` pairs, at even distances."""
    if most is None or most >= len(pairs):
        return pairs
    chosen = np.linspace(0, len(pairs) - 1, most).astype(int)
    sides = [
        translation.Sentences.of([side[i].tolist() for i in chosen])
        for side in (pairs.source, pairs.target)
    ]
    return replace(pairs, source=sides[0], target=sides[1], lines=pairs.lines[chosen])


def _source(data: translation.Translation, numbers: np.ndarray) -> str:
    return translation.detokenise(numbers, data.source, detokeniser="moses", language="de")


def record(split: str, name: str, found: Translated) -> dict[str, float]:
    """Return what is logged, under `<split> <name>`: the papers' names."""
    title = f"{split} {name}"
    values = {title: found.bleu.score, f"{title} examples": float(found.examples)}
    if name == "bleu":
        if found.copied is not None:
            values[f"{split} bleu of the source"] = found.copied
        for i in range(4):
            values[f"{split} _bleu_counts_{i}"] = float(found.bleu.counts[i])
            values[f"{split} _bleu_totals_{i}"] = float(found.bleu.totals[i])
        values[f"{split} _bleu_sys_len"] = float(found.bleu.hypothesis_length)
        values[f"{split} _bleu_ref_len"] = float(found.bleu.reference_length)
    return values
