# Source this from the repository root: finds or installs uv, then makes .venv what uv.lock says.
# Arguments go to `uv sync`, such as --extra gpu. uv builds the Rust tokenizer through maturin, and
# again whenever its sources change. Bytecode is compiled once here (half a minute), not in the first
# start of every stage.

export PATH="$HOME/.local/bin:$HOME/.cargo/bin:$PATH"

rust="$(cargo --version 2>/dev/null | cut -d' ' -f2 || true)"
if [[ "$(printf '%s\n' 1.83 "${rust:-0}" | sort -V | head -1)" != 1.83 ]]; then
    echo "error: the tokenizer is built from source by Rust 1.83 or later; found: ${rust:-none}." >&2
    echo "       Install it with: curl --proto '=https' -sSf https://sh.rustup.rs | sh" >&2
    return 2
fi

if ! command -v uv >/dev/null; then
    echo "uv not found: installing it for this user"
    python3 -m pip install --quiet --user uv 2>/dev/null ||
        python3 -m pip install --quiet --user --break-system-packages uv 2>/dev/null ||
        curl -LsSf https://astral.sh/uv/install.sh | sh
    export PATH="$(python3 -m site --user-base)/bin:$PATH"
fi

loudness=--quiet
if [[ ! -d .venv ]]; then
    echo "installing the packages into .venv: up to 3 GB to download"
    [[ ! -t 2 ]] || loudness=  # uv's bars, where somebody looks
fi
# inexact: what an earlier call asked for, such as CUDA, stays
uv sync $loudness --locked --inexact --compile-bytecode "$@"
