"""Options by group: data, model, logging, translation, toy functions, comparisons."""

from dataclasses import dataclass

from llqr_experiments.config.row import option

ARCHITECTURES = (
    "mlp", "mlp-legacy", "resnet-18", "resnet-50", "vgg16-bn", "wide-resnet-28-10",
    "pyramidnet-110", "vit-ti-16", "vit-s-16", "grok-transformer", "gpt2-small",
    "transformer-iwslt-de-en", "pinn", "regressor",
)  # fmt: skip


@dataclass
class Dataset:
    """Where the data comes from."""

    name: str = option("mnist", "which data; see docs/data.md")
    dataset_dir: str | None = option(
        None, "folder with the official files; null: search", path=True
    )
    download: bool = option(True, "download the files if they are found nowhere")
    augment: bool = option(
        False, "random crops, flips and the like in training, for the CIFAR sets and imagenet"
    )
    imbalance: float | None = option(
        None, "long tail: largest class / smallest class of the training set; null: as it is", low=1
    )
    truncate: int | None = option(None, "only this many first training examples; null: all", low=1)
    p: int = option(97, "prime: size of the groups of the grokking sets", low=2, high=5000)
    train_fraction: float = option(
        0.6, "of all equations of a grokking set, those to train on", above=0, below=1
    )
    split_seed: int = option(0, "which equations those are", low=0)
    tokenizer: str | None = option(
        None, "of a text; null: that of the dataset", choices=("char", "bpe", "gpt2")
    )
    tokenizer_dir: str | None = option(
        None, "folder of GPT-2's files; null: that of the text", path=True
    )
    vocabulary: int = option(8192, "most tokens that bpe learns", low=1)
    target_len: int | None = option(
        None, "tokens of a window of text; null: 1024 for wikitext103, else 256", low=1
    )
    held_out: list[float] = option(
        [0.1, 0.1],
        "shares of valid and test, of a text without splits of its own",
        length=2,
        of={"low": 0, "below": 1},
    )
    cache_dir: str | None = option(
        None,
        "where tokens are kept; null: ./data/tokens for a text, beside the files for pairs",
        path=True,
    )
    max_tokens: int = option(
        4096,
        "most words of one language in a batch of translation",
        low=1,
        becomes="bucketing.max_tokens",
    )
    padding_factor: int = option(
        8, "widths of such batches are multiples of it", low=1, becomes="bucketing.padding_factor"
    )
    percentiles: int = option(
        8,
        "of the lengths, at which batches get another width",
        low=1,
        becomes="bucketing.percentiles",
    )
    max_length: int = option(1024, "most words of a sentence", low=1)
    points: int = option(
        32, "of an equation: squares along a side, in whose middles it is asked for", low=1
    )
    boundary_points: int | None = option(
        None,
        "points on the boundary of an equation, all faces together; null: `points` on each, or a "
        "quarter of `fresh`",
        low=1,
    )
    fresh: int | None = option(
        None,
        "points inside that are others in every batch, as those on the boundary then are; null: "
        "squares, and 512 in more than two variables",
        low=1,
    )
    measurements: int = option(
        200, "of the solution, where a coefficient of the equation is sought", low=1
    )
    noise: float = option(
        0.01, "errors of measurements, by the root mean square of what is measured", low=0
    )
    refit_coverage: float = option(
        0.95, "share of sentences that fit the one width of refit batches", above=0, high=1
    )


@dataclass
class Architecture:
    """The model."""

    name: str = option("mlp", "the model", choices=ARCHITECTURES)
    hidden: list[int] | None = option(
        None, "widths of hidden layers; null: the model's own", shortest=1, of={"low": 1}
    )
    width: int | None = option(None, "channels or features; null: the model's own", low=1)
    depth: int | None = option(None, "blocks, or layers; null: the model's own", low=1)
    dropout: float | None = option(
        None, "share of activations dropped in training; null: the model's own", low=0, below=1
    )
    heads: int | None = option(None, "of attention; null: the model's own", low=1)
    mlp: int | None = option(None, "features inside a transformer's layer; null: its own", low=1)
    patch: int | None = option(None, "side of a ViT's patches; null: by the image", low=1)
    alpha: float | None = option(None, "channels that a PyramidNet adds; null: 270", above=0)
    blocks: list[int] | None = option(
        None, "convolutions in each block of a VGG; null: its own", shortest=1, of={"low": 1}
    )
    units_per_group: int | None = option(
        None, "of a wide ResNet; null: 4; 5 is the size of the papers", low=1
    )
    positions: str | None = option(
        None, "of GPT-2; null: sinusoidal", choices=("sinusoidal", "learned")
    )
    tied: bool | None = option(None, "GPT-2's output matrix is its embedding; null: it is not")


@dataclass
class Logging:
    """Where metrics go besides metrics.jsonl."""

    aim: bool = option(True, "log to Aim when it is installed")
    aim_repo: str | None = option(
        None, "folder of the Aim repository; null: the current one", path=True
    )
    tensorboard: bool = option(False, "log to TensorBoard, in the run's folder")


@dataclass
class Mesh:
    """How the devices of a run are arranged."""

    data: int | None = option(
        None, "devices along which a batch is spread; null: all that are left", low=1
    )
    fsdp: int = option(1, "the same, along which parameters and P are spread too", low=1)
    tensor: int = option(1, "devices along which the columns of matrices are spread", low=1)


@dataclass
class Distributed:
    """The processes of a run that has several."""

    coordinator: str | None = option(
        None, "HOST:PORT of process 0, the same for all; null: as SLURM or mpirun say"
    )
    processes: int | None = option(
        None, "how many there are; null: as the launcher says, or one", low=1
    )
    index: int | None = option(None, "which one this is, from 0; null: as the launcher says", low=0)


@dataclass
class Toy:
    """A toy function instead of a training run."""

    name: str | None = option(
        None,
        "function to minimise; null: train a model",
        choices=("rosenbrock", "split_rosenbrock", "ackley", "goldstein_price"),
    )
    start: list[float] = option([], "where to start; empty: the usual point")
    iterations: int = option(500, "most steps of every method", low=1)
    tolerance: float = option(1e-8, "value above the least at which to stop", above=0)
    damping: float = option(1e-3, "first damping of the exact methods, raised as needed", low=0)
    gradient_rate: float = option(1e-3, "learning rate of gradient descent", above=0)


@dataclass
class Comparison:
    """Methods side by side, and how sharp the loss is where they end."""

    name: str | None = option(
        None,
        "what main optimizer, SAM, LLQR and LLQR+SAM are compared on; null: one run",
        choices=("potholes", "training"),
    )
    runs: int = option(3, "random starts of every method: points, or seeds of training", low=1)
    steps: int = option(1500, "steps of every run on potholes", low=1)
    radii: list[float] = option(
        [0.03, 0.1, 0.3, 1.0],
        "distances at which the rise of the loss is measured",
        shortest=1,
        of={"above": 0},
    )


@dataclass
class TranslationEval:
    """Translations during and after training, scored by BLEU."""

    enabled: bool = option(False, "translate the valid set, and in the end the test set")
    freq: int | None = option(
        None, "steps between BLEU of a sample; null: test_eval_freq; 0: never", low=0
    )
    max_examples: int | None = option(None, "sentences of the sample; null: all", low=1)
    full_eval_at_end: bool = option(True, "BLEU of the whole valid set in the end")
    full_eval_freq: int | None = option(
        None, "steps between BLEU of the whole valid set; null: only in the end", low=1
    )
    progress_freq: int = option(
        64, "batches between lines of progress where there is no terminal", low=1
    )
    beam_size: int = option(
        5, "hypotheses that are followed", low=1, high=1000, becomes="rules.beam"
    )
    max_len_a: float = option(
        1.2, "longest translation: this times the source's length,", low=0, becomes="rules.ratio"
    )
    max_len_b: int = option(10, "... plus this many tokens", low=0, becomes="rules.extra")
    remove_bpe: str = option("@@ ", "mark of split words, which is removed", choices=("@@ ",))
    detok: str = option(
        "moses",
        "how tokens become text: by Moses' rules, or apart",
        choices=("moses", "space", "none"),
    )
    print_samples: bool = option(False, "show some translations")
    checkpoint_metric: str = option(
        "bleu",
        "what the best checkpoint is best in: BLEU of the whole valid set, or its loss",
        choices=("bleu", "loss"),
    )
    maximize_checkpoint_metric: bool = option(True, "whether more BLEU is better")
