"""translations.jsonl: a line for each split, or part of one, that was translated."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

FILE = "translations.jsonl"


class Sample(NamedTuple):
    """A sentence, what the model made of it, and what a person did."""

    source: str
    hypothesis: str
    reference: str


def append(
    path: Path, step: int, split: str, bleu: float, signature: str, samples: Iterable[Sample]
) -> None:
    """Append one line: step, split, score with its signature, samples."""
    row = {
        "step": step,
        "split": split,
        "bleu": bleu,
        "signature": signature,
        "samples": [sample._asdict() for sample in samples],
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
