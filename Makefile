# The few commands of everyday work. Each sets up what it needs.

.PHONY: setup fmt check test processes clients slow smoke bench

setup:
	bash -c 'set -e; . scripts/setup.sh'

# Rewrite the sources in the house's format.
fmt: setup
	uv run --no-sync ruff format .
	uv run --no-sync ruff check --fix .
	cargo fmt

# Lint, types, floors.
check: setup
	uv run --no-sync ruff format --check .
	uv run --no-sync ruff check .
	uv run --no-sync pyrefly check
	uv run --no-sync lint-imports
	cargo fmt --check
	cargo clippy --all-targets -- -D warnings
	cargo clippy --features python -- -D warnings -D clippy::unwrap_used -D clippy::expect_used

# The fast tests, Python and Rust.
test: setup
	uv run --no-sync pytest tests -m "not slow" -rs
	cargo test -p rustbpe

# The slow tests of what no fast one starts: runs of several processes, a server's end, a benchmark.
processes: setup
	uv run --no-sync pytest -rs --durations=0 \
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
	uv run --no-sync python -c "import lm_eval"
	uv run --no-sync pytest tests/test_server_clients.py -k lm_eval -rs

# Every test, lm-eval's too.
slow:
	bash -c 'set -e; . scripts/setup.sh --group lm-eval'
	uv run --no-sync pytest tests

# The whole pipeline on a toy model, in a folder of its own, in under three minutes.
smoke:
	JAXCHAT_TIER=smoke JAXCHAT_BASE_DIR=$${JAXCHAT_SMOKE_DIR:-$$(mktemp -d)} bash speedrun_jax.sh

# Tables for LOG.md.
bench: setup
	uv run --no-sync python -m benchmarks.train_step
	uv run --no-sync python -m benchmarks.startup
	uv run --no-sync python -m benchmarks.loader
	uv run --no-sync python -m benchmarks.scaling
	uv run --no-sync python -m benchmarks.tokenizer
	uv run --no-sync python -m scripts.infer_bench --depth 6 --vocab-size 8192 --sequence-len 512 --sequential 16
