"""Train a model: `uv run python run.py experiment=quick-local-test`; see --help."""

# Imports take a while, and Ctrl-C in one of them ends the process without a word.
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from llqr_experiments.command import cli
from llqr_experiments.config.options import Config

ConfigStore.instance().store(name="schema", node=Config)


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
def main(config: DictConfig) -> str | None:
    """Run the composed experiment in Hydra's output folder; return why a job of a sweep failed."""
    return cli.execute(config, Path(HydraConfig.get().runtime.output_dir))


if __name__ == "__main__":
    sys.argv[1:] = cli.at_home(sys.argv[1:])
    cli.check_arguments(sys.argv[1:])
    print("starting: loading JAX and the models ...", file=sys.stderr, flush=True)
    main()
