#!/usr/bin/env bash
# From a fresh checkout to a model that has learned something: installs into .venv, fetches the demo model, trains it
# on one-digit sums (on the CPU: no card is needed), and shows the held-out accuracy before and after.
# Run again, it goes on where it stopped, or shows the result that is there.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/install.sh
install ""

run=runs/quickstart
.venv/bin/lowmem-grpo model fetch smollm2-135m
if [ ! -f $run/adapter/adapter_model.safetensors ]; then
    resume=()
    [ -f $run/config.toml ] && resume=(--resume)
    .venv/bin/lowmem-grpo train tools/quickstart.toml --profile cpu --output $run "${resume[@]}"
fi
.venv/bin/python tools/show_curve.py $run
