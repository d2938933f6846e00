"""Windows of a stream of tokens, with the next token as label of each.

  n      number of tokens of a split
  L      tokens of a window
  t_j    token j, 0 <= j < n

  window i          inputs t_(iL) .. t_(iL + L - 1), labels t_(iL + 1) .. t_(iL + L)
  to train          floor((n - 1) / L) windows; the tokens after the last are not used
  to evaluate       ceil((n - 1) / L) windows; labels of the last that do not exist are `IGNORE`

So every token but the first is a label exactly once. Windows do not overlap: one that is evaluated
starts fresh, without the tokens before it, as the windows of training do.
"""

import dataclasses

import numpy as np

IGNORE = -1
"""The label of what is no target; whatever uses labels leaves out those below 0."""


@dataclasses.dataclass(frozen=True)
class Windows:
    """The windows of one split: `Examples` for the pipeline.

    Attributes:
      tokens: (n,) unsigned or int32; it may be a memory map.
      length: L.
      whole: whether only full windows count, as in training.

    Example:
      >>> windows = Windows(np.arange(10, 16), length=3, whole=False)
      >>> len(windows)
      2
      >>> windows.gather(np.array([1]))["label"]
      array([[14, 15, -1]], dtype=int32)
    """

    tokens: np.ndarray
    length: int
    whole: bool

    def __len__(self) -> int:
        targets = max(0, len(self.tokens) - 1)
        return targets // self.length if self.whole else -(-targets // self.length)

    @property
    def targets(self) -> int:
        """Return the number of labels that are not `IGNORE`, in all windows together."""
        return min(len(self) * self.length, max(0, len(self.tokens) - 1))

    def gather(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """Return the windows `index`, (B,) integers from 0.

        Returns:
          "tokens": (B, L) int32, 0 behind the end; "label": (B, L) int32, `IGNORE` behind it.

        Raises:
          IndexError: there is no such window.
        """
        index = np.asarray(index)
        if index.size and not (index.min() >= 0 and index.max() < len(self)):
            raise IndexError(f"windows {index} of {len(self)}.")
        positions = index[:, None].astype(np.int64) * self.length + np.arange(self.length + 1)
        exists = positions < len(self.tokens)
        found = self.tokens[np.where(exists, positions, 0)].astype(np.int32)
        return {
            "tokens": np.where(exists, found, 0)[:, :-1],
            "label": np.where(exists, found, IGNORE)[:, 1:],
        }

    def draw(
        self, index: np.ndarray, rng: np.random.Generator, rows: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Return what `gather` does: nothing about these examples is random."""
        del rng
        return self.gather(index if rows is None else index[rows])
