.PHONY: help check fast format lint types layers test typed slow docs lock bench
RUN = uv run --no-sync

# Bytecode is kept, whatever the environment says: many tests are processes of their own, and half of
# what those do would be to compile the same modules again.
export PYTHONDONTWRITEBYTECODE =

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

# Parts of a list that a worker has not come to yet are done by the other.
PYTEST = $(RUN) pytest -n 2 --dist worksteal -m "not slow"

# These touch every numerical module, and run with every function of the library under jaxtyping and
# beartype: annotations of shapes are checked where they run.
TYPED = $(addprefix tests/unit/test_,metrics.py quadratic.py routes.py describe.py operators.py streaming.py)

test: typed  ## Tests, without the slow ones
	$(PYTEST) $(addprefix --ignore=,$(TYPED))

typed:  ## Those that run under the type checker
	PYTHONPATH=tests $(PYTEST) --jaxtyping-packages=llqr,typechecking.check $(TYPED)

# What a change of the library meets first: the maths of structures, one loop in numpy for each way to
# learn P, what is refused, and in what words.
FAST = $(addprefix tests/unit/test_,advice.py bases.py batches.py gradients.py operators.py schedules.py \
	structures.py) tests/contract/test_wrong_state.py tests/golden

fast:  ## The tests that a change of the library should meet first, in a minute
	$(PYTEST) $(FAST)

slow:  ## The slow tests
	$(RUN) pytest -m slow

docs:  ## Documentation builds without warnings
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict

lock:  ## Resolve anew and write the versions into pyproject.toml
	python3 tools/lock.py

bench:  ## Refit and step times as ratios, in one process
	$(RUN) python benchmarks/refit_cost.py
