#!/bin/sh
# Prints the path of a Python that can run this project (at least the version below, with venv).
# Looks at $PYTHON, at the names on PATH, then under pyenv. Says what is missing if there is none.
#
# A name on PATH proves nothing (a pyenv shim fails unless its version is selected), so every
# candidate is run before it is believed.

MINIMUM="3.12"
CHECK='import sys, venv, ensurepip
minimum = tuple(int(part) for part in sys.argv[1].split("."))
if sys.version_info[:2] < minimum:
    sys.exit(1)
print(sys.executable)'

# Prints the real path of the interpreter $1 and succeeds, if it runs and is new enough.
check() {
    "$1" -c "$CHECK" "$MINIMUM" 2>/dev/null
}

if [ -n "${PYTHON:-}" ]; then
    if check "$PYTHON"; then
        exit 0
    fi
    echo "error: PYTHON=$PYTHON does not run, is older than $MINIMUM, or lacks venv." >&2
    exit 1
fi

for name in python3 python3.12 python3.13 python3.14 python; do
    if command -v "$name" >/dev/null 2>&1 && check "$name"; then
        exit 0
    fi
done

# Each unmatched pattern stays as it is written and simply fails to run.
for candidate in \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-4]*/bin/python3 \
    "$HOME"/.pyenv/versions/3.1[2-4]*/bin/python3; do
    if [ -x "$candidate" ] && check "$candidate"; then
        exit 0
    fi
done

cat >&2 <<EOF
error: no usable Python >= $MINIMUM was found (python3, python3.12 .. python3.14 on PATH, or under pyenv).

Found instead: $(python3 --version 2>&1 || echo "no python3 that runs")

Get one of these, then run make again:
  Debian, Ubuntu   sudo apt install python3.12 python3.12-venv
  Fedora           sudo dnf install python3.12
  macOS            brew install python@3.12
  pyenv            pyenv install 3.12
Or name an interpreter:  make test PYTHON=/path/to/python3.12
EOF
exit 1
