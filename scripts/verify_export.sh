#!/usr/bin/env bash
# SmolLM2 from its GGUF file, a few steps of training, exports of the policy and of both preference models, and
# transformers beside charjax on them: the same prompts, logits, greedy replies and rewards. Prints the figures; exits
# with 1 where one is too large. Takes some minutes on two cores after ./scripts/test.sh. WORKDIR keeps the run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

workdir=${WORKDIR:-}
if [[ -z $workdir ]]; then
  workdir=$(mktemp -d)
  trap 'rm -rf "$workdir"' EXIT
fi
charjax=(.venv/bin/python -m charjax.main)

# float32, in which the two can be compared closely; of everything just enough to move the weights. Effects are not
# measured.
for stage in messages replies rankings preference policy; do
  "${charjax[@]}" "$stage" --config=configs/smoke.py --workdir="$workdir" --config.model.path=smollm2-135m-instruct \
    --config.messages.train_per_trait=4 --config.messages.heldout_per_trait=1 --config.messages.train_neutral=4 \
    --config.messages.heldout_neutral=1 --config.messages.near_duplicate=0.5 --config.messages.opening_words=3 \
    --config.replies.shown=2 --config.replies.plain=1 --config.replies.opposed=1 --config.replies.examples=1 \
    --config.rankings.ranker=likelihood --config.rankings.examples=0 --config.preference.depth=0.67
done
for model in policy preference judge; do
  "${charjax[@]}" export --workdir="$workdir" --model="$model" --dtype=float32 --output="$workdir/out/$model"
done
"${charjax[@]}" export --workdir="$workdir" --output="$workdir/out/policy-bfloat16"
.venv/bin/python scripts/compare_export.py --workdir="$workdir" --exports="$workdir/out"
