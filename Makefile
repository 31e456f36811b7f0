# The few commands of everyday work. Each sets up what it needs.

.PHONY: setup fmt check test clients slow smoke bench

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
