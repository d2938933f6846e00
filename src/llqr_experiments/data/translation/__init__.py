"""German-English sentence pairs for the experiment runner.

`load` returns a checked `Translation`; `train_stream`, `refit_stream` and `evaluation_batches`
turn one of its splits into batches of a few shapes; `detokenise` and `bleu` turn what a model
says into text and a score.
"""

from llqr_experiments.data.translation.batching import Bucketing, Buckets, Shape
from llqr_experiments.data.translation.corpus import Pairs, Sentences
from llqr_experiments.data.translation.dataset import Translation, load, names
from llqr_experiments.data.translation.streams import (
    Batch,
    epoch_length,
    evaluation_batches,
    fill_rate,
    refit_stream,
    train_stream,
)
from llqr_experiments.data.translation.text import (
    UNKNOWN_HYPOTHESIS,
    UNKNOWN_REFERENCE,
    Bleu,
    bleu,
    detokenise,
)
from llqr_experiments.data.translation.vocabulary import BOS, EOS, PAD, UNK, Vocabulary

__all__ = [
    "BOS",
    "EOS",
    "PAD",
    "UNK",
    "UNKNOWN_HYPOTHESIS",
    "UNKNOWN_REFERENCE",
    "Batch",
    "Bleu",
    "Bucketing",
    "Buckets",
    "Pairs",
    "Sentences",
    "Shape",
    "Translation",
    "Vocabulary",
    "bleu",
    "detokenise",
    "epoch_length",
    "evaluation_batches",
    "fill_rate",
    "load",
    "names",
    "refit_stream",
    "train_stream",
]
