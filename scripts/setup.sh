# Source this from the repository root: finds or installs uv, then makes .venv what uv.lock says.
# Arguments go to `uv sync`, such as --extra gpu. uv builds the Rust tokenizer through maturin, and
# again whenever its sources change. Bytecode is compiled once here (half a minute), not in the first
# start of every stage.

export PATH="$HOME/.local/bin:$HOME/.cargo/bin:$PATH"

if ! command -v cargo >/dev/null; then
    echo "error: no Rust toolchain (cargo) found, and the tokenizer is built from source." >&2
    echo "       Install one with: curl --proto '=https' -sSf https://sh.rustup.rs | sh" >&2
    return 2
fi

if ! command -v uv >/dev/null; then
    echo "uv not found: installing it for this user"
    python3 -m pip install --quiet --user uv 2>/dev/null ||
        python3 -m pip install --quiet --user --break-system-packages uv 2>/dev/null ||
        curl -LsSf https://astral.sh/uv/install.sh | sh
    export PATH="$(python3 -m site --user-base)/bin:$PATH"
fi

# inexact: what an earlier call asked for, such as CUDA, stays
uv sync --quiet --locked --inexact --compile-bytecode "$@"
