#!/usr/bin/env bash
# Installs the test extra into .venv and runs the default tests, two at a time (each uses one thread; a file's tests
# share what is slow to make). Arguments go to pytest: `bash tools/test.sh -m slow`.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/install.sh
install "[test]"
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
