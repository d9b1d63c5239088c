#!/usr/bin/env bash
# One MoE out of plain Hugging Face checkpoints, without any text: fuse_checkpoints.sh [RUN] [--set key=value ...]
# The checkpoints are two that come with the package; give `deepfusion fuse` a folder of your own in their place.
set -euo pipefail
run=${1:-runs/fuse}
models=$(mktemp -d)
trap 'rm -rf "$models"' EXIT

tiny=$(python -c "from deepfusion.tiny import FOLDER; print(FOLDER)")
cp -r "$tiny/tiny-gpt2" "$tiny/tiny-bloom" "$models"

deepfusion fuse "$models" --out "$run" "${@:2}"
deepfusion generate "$run/moe/final" "The city of"
