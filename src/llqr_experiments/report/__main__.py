"""`python -m llqr_experiments.report`."""

import sys

from llqr_experiments.report.command import main

sys.exit(main())
