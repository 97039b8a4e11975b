#!/usr/bin/env bash
# The three stages on real answers and GPT-4 rankings (AlpacaEval; CC BY-NC 4.0, not part of this project).
#
#   DATA=path/to/data examples/alpaca_eval/run.sh          about 30 minutes on two CPU cores
#   DATA=path/to/data examples/alpaca_eval/run.sh --gpu    a 110 M model, for one GPU
#
# DATA holds alpaca_eval_{sft,ranked}_{train,test}.jsonl. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export DATA="${DATA:-../shared/data}"
PYTHON="${PYTHON:-python}"
run=(recipe=alpaca_eval --config-dir examples/alpaca_eval/conf)
vocabulary=4096
sft=() reward=() ppo=()
if [ "${1:-}" = --gpu ]; then
    shift
    vocabulary=16384
    sft=(run_name=alpaca_eval_gpu model.config.hidden_size=768 model.config.intermediate_size=2048
        model.config.num_hidden_layers=12 model.config.num_attention_heads=12
        model.config.num_key_value_heads=12 dataset.max_length=1024 trainer.num_train_epochs=4
        trainer.learning_rate=6e-4 response_length=512)
    reward=(run_name=alpaca_eval_gpu trainer.num_train_epochs=2 trainer.learning_rate=5e-5)
    ppo=(run_name=alpaca_eval_gpu ppo.num_updates=200 ppo.batch_size=128 ppo.num_ppo_epochs=4
        ppo.max_prompt_length=512 ppo.response_length=512 ppo.learning_rate=1e-5)
fi
name=alpaca_eval
[ "$vocabulary" = 4096 ] || name=alpaca_eval_gpu

"$PYTHON" examples/alpaca_eval/make_tokenizer.py "$DATA/alpaca_eval_sft_train.jsonl" \
    "runs/$name/tokenizer" "$vocabulary"
"$PYTHON" -m rlhf.sft "${run[@]}" "${sft[@]}" "$@"
"$PYTHON" -m rlhf.reward "${run[@]}" "${reward[@]}" "$@"
"$PYTHON" -m rlhf.ppo "${run[@]}" "${ppo[@]}" "$@"
