"""`python -m llqr_experiments.options > docs/options.md`."""

from llqr_experiments.command.reference import page

if __name__ == "__main__":
    print(page(), end="")
