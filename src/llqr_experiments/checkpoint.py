"""`python -m llqr_experiments.checkpoint`."""

from llqr_experiments.command.look import main

if __name__ == "__main__":
    main()
