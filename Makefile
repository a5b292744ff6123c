# `make demo` and `make test` set up what they need; a second run starts at once.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup browser demo pictures test check lint bench docs

setup:
	@$(PYTHON) tools/setup_env.py

browser: setup
	@$(BIN)/python tools/setup_browser.py

demo: setup
	@$(BIN)/vllm-wsi demo

# The pictures of docs/pictures, on a real slide; two to three minutes.
pictures: setup browser
	@$(BIN)/python tools/make_pictures.py

# Two tests run at a time, each on a core of its own: threads that spin for a core that the other has cost minutes.
test check: export OMP_NUM_THREADS = 1

test: setup browser lint
	@$(BIN)/pytest -n 2 --dist loadscope --no-loadscope-reorder

# What a developer runs on each save: three minutes on two cores.
check: lint
	@$(BIN)/pytest -n 2 --dist loadscope --no-loadscope-reorder -q -m fast

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

# The pages, at http://127.0.0.1:8090; 8000 is vLLM's.
docs: export NO_MKDOCS_2_WARNING = 1
docs: setup
	@$(BIN)/mkdocs serve --dev-addr 127.0.0.1:8090

bench: setup
	@$(BIN)/python -m bench.selection.cpu_selection --quick
	@$(BIN)/python -m bench.serving.first_token --quick
	@$(BIN)/python -m bench.serving.throughput
	@$(BIN)/python -m bench.serving.throughput_report
