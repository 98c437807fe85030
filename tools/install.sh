# Sourced by quickstart.sh and test.sh: `install EXTRAS` makes .venv and installs this checkout into it, once.
# What is installed is remembered by the contents of pyproject.toml and constraints.txt, so a second call is free.

install() {
    local extras=$1 stamp python
    if [ ! -x .venv/bin/python ]; then
        for python in python3 python3.13 python3.12 python3.11 python3.10 none; do
            if [ "$python" = none ]; then
                echo "Python 3.10 or newer is needed; python3 is $(python3 --version 2>&1)" >&2
                return 1
            fi
            "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && break
        done
        "$python" -m venv .venv
    fi
    stamp=".venv/installed-${extras//[^a-z]/}-$(cat pyproject.toml tools/constraints.txt | cksum | cut -d' ' -f1)"
    if [ ! -f "$stamp" ]; then
        echo "installing into .venv (a few minutes the first time)"
        .venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check \
            --constraint tools/constraints.txt --editable ".$extras"
        touch "$stamp"
    fi
}
