"""`python -m llqr_experiments.doctor`."""

from llqr_experiments.command.doctor import main

if __name__ == "__main__":
    main()
