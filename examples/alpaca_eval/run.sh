#!/usr/bin/env bash
# The three stages on real answers and GPT-4 rankings (AlpacaEval; CC BY-NC 4.0, not part of this project).
#
#   DATA=path/to/data examples/alpaca_eval/run.sh          about half an hour on a laptop CPU
#   DATA=path/to/data examples/alpaca_eval/run.sh --gpu    a model of 100 M parameters, for one GPU
#
# DATA holds alpaca_eval_{sft,ranked}_{train,test}.jsonl. PYTHON chooses the interpreter, RUNS the
# output folder; SFT, REWARD and PPO add overrides to one stage, e.g. PPO="ppo.kl_coef=0.02".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export DATA="${DATA:-../shared/data}"
PYTHON="${PYTHON:-python}" RUNS="${RUNS:-runs}" name=alpaca_eval vocabulary=4096
SFT="${SFT:-}" REWARD="${REWARD:-}" PPO="${PPO:-}"
if [ "${1:-}" = --gpu ]; then
    name=alpaca_eval_gpu vocabulary=16384
    SFT="model.config.hidden_size=768 model.config.intermediate_size=2048
        model.config.num_hidden_layers=12 model.config.num_attention_heads=12
        model.config.num_key_value_heads=12 dataset.max_length=1024 trainer.num_train_epochs=4
        trainer.learning_rate=6e-4 trainer.per_device_train_batch_size=16 response_length=512 $SFT"
    REWARD="trainer.num_train_epochs=2 trainer.learning_rate=5e-5 $REWARD"
    PPO="ppo.num_updates=200 ppo.batch_size=128 ppo.num_ppo_epochs=4 ppo.max_prompt_length=512
        ppo.response_length=512 ppo.learning_rate=1e-5 $PPO"
fi

stage() { # $1: its name, $2: overrides
    # shellcheck disable=SC2086  # overrides are several words
    "$PYTHON" -m "rlhf.$1" --config-dir examples/alpaca_eval/conf recipe=alpaca_eval \
        "runs_dir=$RUNS" "run_name=$name" $2
}

"$PYTHON" examples/alpaca_eval/make_tokenizer.py "$DATA/alpaca_eval_sft_train.jsonl" \
    "$RUNS/$name/tokenizer" "$vocabulary"
stage sft "$SFT"
stage reward "$REWARD"
stage ppo "$PPO"
