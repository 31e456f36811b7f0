# The few commands of everyday work. Each sets up what it needs.

.PHONY: setup fmt check test page processes clients slow smoke bench

# what setup finds or makes, also where the caller's PATH lacks it
BIN = .venv/bin
UV_PATH = PATH="$$HOME/.local/bin:$$PATH"
CARGO = PATH="$$HOME/.cargo/bin:$$PATH" cargo

setup:
	bash -c 'set -e; . scripts/setup.sh'

# Rewrite the sources in the house's format.
fmt: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(CARGO) fmt

# Lint, types, floors.
check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports
	$(CARGO) fmt --check
	$(CARGO) clippy --all-targets -- -D warnings
	$(CARGO) clippy --features python -- -D warnings -D clippy::unwrap_used -D clippy::expect_used

# The fast tests, Python and Rust. Two at a time: most of them compile, which one core does.
test: setup
	$(BIN)/pytest tests -m "not slow" -rs -n 2 --dist loadfile
	$(CARGO) test -p rustbpe

# The chat page in a real browser; without one they skip and say so.
page: setup
	$(BIN)/pytest tests/page -m slow -rs -n 2 --dist loadfile

# The slow tests of what no fast one starts: runs of several processes, a server's end, a benchmark.
processes: setup
	$(BIN)/pytest -rs --durations=0 \
		"tests/test_many_processes.py::test_processes_train_as_one[2-2-auto]" \
		"tests/test_many_processes.py::test_a_lost_process_ends_the_run_and_any_number_continues_it[2-1-1]" \
		"tests/test_many_processes.py::test_an_error_on_one_process_asks_nobody_to_try_again[2-1]" \
		tests/test_many_processes.py::test_sigterm_to_one_process_stops_all_at_the_same_step \
		tests/test_launchers.py::test_a_slurm_job_trains_on_two_processes_and_goes_back_into_the_queue \
		tests/test_chat_web.py::test_sigterm_drains_and_exits_with_0 \
		tests/test_infer_bench.py::test_the_last_line_is_one_document_about_both_backends

# lm-eval against our server.
clients:
	bash -c 'set -e; . scripts/setup.sh --group lm-eval'
	$(BIN)/python -c "import lm_eval"
	$(BIN)/pytest tests/server/test_clients.py -k lm_eval -rs

# Every test, lm-eval's too.
slow:
	bash -c 'set -e; . scripts/setup.sh --group lm-eval'
	$(BIN)/pytest tests

# The whole pipeline on a toy model, in a folder of its own, in under three minutes.
smoke:
	JAXCHAT_TIER=smoke JAXCHAT_BASE_DIR=$${JAXCHAT_SMOKE_DIR:-$$(mktemp -d)} bash speedrun_jax.sh

# Tables for LOG.md.
bench: setup
	$(BIN)/python -m benchmarks.train_step
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.loader
	$(BIN)/python -m benchmarks.scaling
	$(UV_PATH) $(BIN)/python -m benchmarks.tokenizer
	$(BIN)/python -m scripts.infer_bench --depth 6 --vocab-size 8192 --sequence-len 512 --sequential 16
