"""Scripts for an environment of their own (test_trainers.py): pytest imports none of them."""

collect_ignore_glob = ["*.py"]
