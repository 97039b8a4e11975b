#!/usr/bin/env bash
# The three stages on a real chat model, SmolLM2-135M-Instruct, with LoRA, real answers and real rankings. Half of
# the rankings train the reward model; the other half train a judge, which PPO never sees. The page: docs/smollm2.md.
#
#   DATA=path/to/data bash examples/smollm2/run.sh          under an hour on two CPU cores
#   DATA=path/to/data bash examples/smollm2/run.sh gpu      longer and larger, for one GPU; not run yet
#
# DATA holds alpaca_eval_{sft,ranked}_{train,test}.jsonl (AlpacaEval; CC BY-NC 4.0, not part of this project).
# MODEL is a Hub id, a directory or a GGUF file, PYTHON the interpreter, RUNS the output folder. What follows the
# preset goes to `python -m rlhf.pipeline`: run.sh cpu ppo.kl_coef=0.02. Typed again, a stopped run goes on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export DATA="${DATA:-../shared/data}"
PYTHON="${PYTHON:-python}" RUNS="${RUNS:-runs}" MODEL="${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}"
preset="${1:-cpu}"

refuse() {
    echo "error: $1" >&2
    exit 2
}
[ "$preset" = cpu ] || [ "$preset" = gpu ] || refuse "the preset must be cpu or gpu, got $preset"
for rows in sft_train sft_test ranked_train ranked_test; do
    [ -f "$DATA/alpaca_eval_$rows.jsonl" ] ||
        refuse "DATA=$DATA has no alpaca_eval_$rows.jsonl; give the folder of the four files: DATA=<folder> bash $0"
done

run="$RUNS/smollm2_$preset"
recipe=(--config-dir=examples/smollm2/conf "recipe=smollm2_$preset" "runs_dir=$RUNS")
pipeline() {
    "$PYTHON" -m rlhf.pipeline "${recipe[@]}" "model.path=$MODEL" \
        "reward.dataset.path=$run/rankings_reward.jsonl" "$@"
}
mkdir -p "$run"
awk 'NR % 2' "$DATA/alpaca_eval_ranked_train.jsonl" >"$run/rankings_reward.jsonl"
awk 'NR % 2 == 0' "$DATA/alpaca_eval_ranked_train.jsonl" >"$run/rankings_judge.jsonl"
pipeline 'stages=[sft,reward]' "${@:2}"
"$PYTHON" -m rlhf.reward "${recipe[@]}" "run_name=smollm2_${preset}_judge" "model.path=$run/sft/final" \
    "dataset.path=$run/rankings_judge.jsonl" trainer.num_train_epochs=1 seed=2 resume=auto
pipeline "evaluation.scorer=${run}_judge/reward/final" "${@:2}"

# The judge on the same answers once more, with the win rate at equal length; then one page about the run.
count="$(grep -c '"step": 0,' "$run/ppo/samples.jsonl")"
head -n "$count" "$run/ppo/samples.jsonl" >"$run/before.jsonl"
tail -n "$count" "$run/ppo/samples.jsonl" >"$run/after.jsonl"
[ -f "$run/evaluation/report.json" ] ||
    "$PYTHON" -m rlhf.evaluate by=scorer "scorer=${run}_judge/reward/final" "a=$run/before.jsonl" "b=$run/after.jsonl" \
        "out=$run/evaluation"
"$PYTHON" -m rlhf.report "path=$run"
