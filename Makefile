.PHONY: help check format lint types layers test typed slow docs lock bench
RUN = uv run --no-sync

help:  ## Show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

check: format lint types layers test docs  ## What CI runs on Python 3.11; it adds tests on 3.12 (.ci/run)

format:  ## Formatting is as ruff wants it
	$(RUN) ruff format --check

lint:  ## Lint
	$(RUN) ruff check

types:  ## Types
	$(RUN) pyright

layers:  ## Imports only go down
	$(RUN) lint-imports

# These touch every numerical module, and run with every function of the library under jaxtyping and
# beartype: annotations of shapes are checked where they run.
TYPED = $(addprefix tests/unit/test_,metrics.py quadratic.py routes.py describe.py operators.py streaming.py)

test: typed  ## Tests, without the slow ones
	$(RUN) pytest -n 2 -m "not slow" $(addprefix --ignore=,$(TYPED))
	$(RUN) pytest -m "wrong_type and not slow" $(TYPED)

typed:  ## Those that run under the type checker
	PYTHONPATH=tests $(RUN) pytest -n 2 -m "not slow and not wrong_type" \
		--jaxtyping-packages=llqr,typechecking.check $(TYPED)

slow:  ## The slow tests
	$(RUN) pytest -m slow

docs:  ## Documentation builds without warnings
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict

lock:  ## Resolve anew and write the versions into pyproject.toml
	python3 tools/lock.py

bench:  ## Refit and step times as ratios, in one process
	$(RUN) python benchmarks/refit_cost.py
