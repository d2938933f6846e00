"""What names and shapes say of a leaf: the one place that guesses, and how that is said.

Frameworks give the same thing different names and axes. What cannot be read from a rule or from a
framework's own metadata is found out here, by name and by the shapes of the leaves beside it:
embeddings, sides over a vocabulary, biases and scales, and stacks of layers. `layouts.doubts` puts
what was found out so into words.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

Shape = tuple[int, ...]


_EMBED = r"(emb|embed|embeds|embedder|embedding|embeddings|wte|wpe)"
# A table's own name; or a table that has the name of all weights, in a module with such a name.
_TABLE = re.compile(
    rf"(^|/)(\w+_)?{_EMBED}(_table|_matrix|_layer|_tokens|_positions)?(_\d+)?$", re.IGNORECASE
)
_WEIGHT_OF = re.compile(
    rf"(^|/)((\w+_)?{_EMBED}(_tokens|_positions|_layer)?(_\d+)?|lookup|vocab\w*)/(weight|w|table)$",
    re.IGNORECASE,
)
# Projections that are called embeddings, of pictures, times and the like.
_PROJECTION = re.compile(r"patch|pixel|time_?step|time_emb|conv|proj", re.IGNORECASE)
# Per-channel parameters, whatever their rank: attention biases are matrices.
_VECTORS = re.compile(r"(^|[/_])(bias|scale|gamma|beta)$", re.IGNORECASE)
# Projections d -> (heads, dim): the input is the first axis alone.
_FAN_OUT = re.compile(r"(^|/)(query|key|value)(/|$)", re.IGNORECASE)
_HEAD = re.compile(r"(^|/)(lm_head|unembed|unembedding|output_embedding)/(kernel|weight|w)$")
_STACK = re.compile(
    r"^(layers|blocks|h|experts|moe|stages|cells|stack|stacked|repeats|ensemble|members)$"
    r"|^scan|_scan$|_scan_|scan(ned)?[A-Z_]|Scan[A-Z_]|^stacked_|_(layers|blocks|experts)$"
)
_MATRIX = re.compile(r"^(kernel|weight\w*|w\d*|embedding)$", re.IGNORECASE)
_AXES = re.compile(r"^(layers?|blocks?|experts?|exp|stages?|stack|repeats?|scan\w*|stage_\w+)$")
_CONVOLUTION = 11  # its windows are not longer


def embedding_like(path: str, shape: Shape | None = None) -> bool:
    """Whether a leaf holds embeddings, of whose rows a batch may see few.

    By the names of Flax, Haiku, Equinox and PyTorch, and those that language models have.

    Args:
      path: of the leaf.
      shape: of the leaf, where it is known: embeddings have two axes.

    Example:
      >>> [embedding_like(x) for x in ("tokens/embedding", "wte", "tok_emb/weight", "embed/kernel")]
      [True, True, True, False]
    """
    if shape is not None and len(shape) != 2:
        return False
    if _WEIGHT_OF.search(path) is not None:
        return _PROJECTION.search("/".join(path.split("/")[-2:])) is None
    return _TABLE.search(path) is not None and _PROJECTION.search(path.split("/")[-1]) is None


def vocabulary_side(path: str, seldom: bool) -> str | None:
    """Which side of a leaf's matrix is over a vocabulary: "left", "right" or None.

    Args:
      path: of the leaf.
      seldom: whether it holds embeddings.

    Example:
      >>> vocabulary_side("tokens/embedding", True), vocabulary_side("lm_head/kernel", False)
      ('left', 'right')
    """
    if seldom:
        return "left"
    head = _HEAD.search(path)
    if head is None:
        return None
    return "left" if head.group(3) == "weight" else "right"  # (out, in), as PyTorch has it


def vector_like(path: str) -> bool:
    """Whether the name of a leaf is one of a bias or scale.

    Args:
      path: of the leaf.
    """
    return _VECTORS.search(path) is not None


def fans_out(path: str, shape: Shape) -> bool:
    """Whether a leaf projects the first axis to heads: attention's query, key and value.

    Args:
      path: of the leaf.
      shape: of the leaf, or of a member of the stack that it holds.
    """
    return len(shape) == 3 and _FAN_OUT.search(path) is not None


def stack_axes(names: Sequence[str | None]) -> Shape:
    """Return which axes of a leaf are a stack, of the names that a framework gives its axes.

    Args:
      names: one for each axis, or None: as in Flax's partitioning metadata.

    Example:
      >>> stack_axes(("layers", "embed", "mlp")), stack_axes(("embed", "layers", "mlp"))
      ((0,), (1,))
    """
    return tuple(axis for axis, name in enumerate(names) if name and _AXES.search(name))


class Stack(NamedTuple):
    """A stack that was found."""

    axes: Shape  # of the leaf
    under: str  # path of the module whose leaves have it


def stacks(names: Sequence[str], shapes: Sequence[Shape]) -> dict[int, Stack]:
    """Return which leaves look like stacks: of layers that are scanned over, of experts.

    Those of a module all of whose leaves have one axis of the same length, where its name says that
    it holds several, or where biases and scales have that axis too; and one with such a name.

    Args:
      names: paths of all leaves.
      shapes: of all leaves.

    Example:
      >>> stacks(["layers/bias", "layers/kernel", "out"], [(6, 4), (6, 8, 4), (4, 2)])
      {0: Stack(axes=(0,), under='layers'), 1: Stack(axes=(0,), under='layers')}
    """
    found: dict[int, Stack] = {}
    parts = [name.split("/")[:-1] for name in names]
    modules = sorted({tuple(p[:n]) for p in parts for n in range(len(p) + 1)}, key=len)
    for module in modules:
        leaves = [i for i, p in enumerate(parts) if tuple(p[: len(module)]) == module]
        rest = [_without(shapes[i], found[i].axes if i in found else ()) for i in leaves]
        own = [names[i].split("/")[len(module) :] for i in leaves]
        axis = _shared(module[-1] if module else "", own, rest)
        if axis is None:
            continue
        for i, left in zip(leaves, rest, strict=True):
            before = found[i].axes if i in found else ()
            kept = [a for a in range(len(shapes[i])) if a not in before]
            if len(left) > axis:
                found[i] = Stack((*before, kept[axis]), "/".join(module))
    for i, (name, shape) in enumerate(zip(names, shapes, strict=True)):
        own = name.split("/")[-1]
        if i not in found and len(shape) > 2 and _STACK.search(own) and not _natural(name, shape):
            found[i] = Stack((0,), name)
    return found


def _without(shape: Shape, axes: Shape) -> Shape:
    return tuple(size for axis, size in enumerate(shape) if axis not in axes)


def _shared(module: str, own: list[list[str]], shapes: list[Shape]) -> int | None:
    """The axis that all leaves of a module have in common, where they are a stack of it."""
    named = _STACK.search(module) is not None
    numbered = all(path[0].isdigit() for path in own if len(path) > 1)
    if named and numbered and any(len(path) > 1 for path in own):
        return None  # a list of layers, each with leaves of its own
    for axis in (0, 1):
        sizes = {shape[axis] if len(shape) > axis else None for shape in shapes}
        if len(sizes) != 1 or None in sizes or sizes == {1}:
            continue
        matrices = [
            (path, shape)
            for path, shape in zip(own, shapes, strict=True)
            if len(shape) > 2 and not _natural("/".join(path), shape)
        ]
        short = [
            path[-1] for path, shape in zip(own, shapes, strict=True) if len(shape) == 2
        ]  # members would be vectors
        if any(_MATRIX.search(name) for name in short) or not _fits(own, shapes, axis):
            continue
        if matrices and (named or (axis == 0 and any(map(vector_like, short)))):
            return axis
    return None


def _fits(own: list[list[str]], shapes: list[Shape], axis: int) -> bool:
    """Whether members have biases as long as the outputs of the kernels beside them."""
    at = {"/".join(path): _without(shape, (axis,)) for path, shape in zip(own, shapes, strict=True)}
    for path, member in at.items():
        kernel = at.get(f"{path.removesuffix('bias')}kernel")
        if path.endswith("bias") and kernel and member and kernel[-1] != member[-1]:
            return False
    return True


def _natural(path: str, shape: Shape) -> bool:
    """Whether these are axes of one layer: attention's heads, a convolution's windows."""
    window = len(shape) == 4 and shape[0] == shape[1] <= _CONVOLUTION
    return fans_out(path, shape) or window


def doubts(stacked: Iterable[tuple[str, Shape, Stack, str]]) -> str | None:
    """Return in words what looks like a stack, and what it was taken for; None for nothing.

    Args:
      stacked: of each such leaf its path, shape, what was found, and what it was taken for: "" for
        the stack, else the matrix in words.
    """
    listed = list(stacked)
    if not listed:
        return None
    taken = [x for x in listed if not x[3]] or listed
    path, shape, stack, other = max(taken, key=lambda x: len(x[1]))
    word = _pattern(stack.under)
    axes = stack.axes
    said = f"stack={axes}" if axes != (0,) else ""
    rules = f"[*llqr.stacked(NAME, match={word!r}{', ' * bool(said)}{said}), *REST]"
    members = "x".join(str(shape[a]) for a in axes)
    what, each = f"leaf {path!r} {shape}", "it is"
    if len(taken) > 1:
        what += f", like {len(taken) - 1} more"
        each = "each is"
    if other:
        return (
            f"{what}, looks like a stack of {members}, and {each} taken for one matrix {other}, "
            "which learns slowly if it is a stack. If so: structure='auto', or "
            f"structure={rules}, NAME being a structure and REST the other rules, "
            f"llqr.structures.rule_table(NAME). If {each} one matrix, say it with axes: "
            f"llqr.Rule(match={word!r}, structure=NAME, rows=(...), columns=(...))."
        )
    return (
        f"{what}, is taken for a stack of {members}, by the names and shapes of the leaves beside "
        f"it. To say that it is one: structure='auto', or structure={rules}, NAME being a "
        "structure and REST the other rules, llqr.structures.rule_table(NAME). If "
        f"{each} one matrix: llqr.Rule(match={word!r}, structure=NAME, rows=(...), columns=(...)) "
        "before the other rules."
    )


def _pattern(module: str) -> str:
    return rf"(^|/){re.escape(module.split('/')[-1])}(/|$)" if module else "."
