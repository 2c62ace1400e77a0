#!/usr/bin/env bash
# Pretraining, from a language model to checkpoints. Variables have the published values as defaults;
# further flags are passed on (`python -m recformer.pretrain --help` lists them):
#
#   bash lightning_run.sh
#   MODEL=sentence-transformers/all-MiniLM-L6-v2 DEVICE=1 \
#       bash lightning_run.sh --pooler_type avg --max_token_num 256
#   bash lightning_run.sh --ckpt last          # go on with a run that was cut off
#
# With nothing set and no published files in their places it pretrains a small model on the bundled
# sample instead. Afterwards convert_pretrain_ckpt.py makes a model for finetuning of a checkpoint.
set -euo pipefail
unset CDPATH
START=$PWD
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/environment.sh
source scripts/environment.sh
# shellcheck source=scripts/sample.sh
source scripts/sample.sh

STRATEGY=${STRATEGY:-deepspeed_stage_2}
extra=
if [ "$STRATEGY" = deepspeed_stage_2 ]; then extra=deepspeed; fi
if given --help "$@" || given -h "$@"; then
    help_of lightning_run.sh
    use_environment $extra
    exec "$PYTHON" -m recformer.pretrain --help
fi

data=pretrain_data weights=longformer_ckpt/longformer-base-4096.bin
named_data=${DATA_PATH:-} named_start=${MODEL:-}${LONGFORMER_CKPT:-}
if given --train_file "$@"; then named_data=flag; fi
if given --model_name_or_path "$@" || given --longformer_ckpt "$@" || given --from_scratch "$@"; then
    named_start=flag
fi
sample=
if [ -z "$named_data$named_start" ] && [ ! -e $data/train.json ] && [ ! -e $weights ]; then
    sample=yes
elif [ -z "$named_data" ] && [ ! -e $data/train.json ]; then
    {
        echo "error: DATA_PATH is not set, and its default $data has no train.json; name the folder that"
        echo "pretrain_data/*.py wrote:"
        echo "    DATA_PATH=my_pretrain_data ${named_start:+MODEL=… }bash lightning_run.sh"
    } >&2
    exit 1
elif [ -z "$named_start" ] && [ ! -e $weights ]; then
    {
        echo "error: MODEL is not set, and $weights, the published start,"
        echo "does not exist; make it with \`python save_longformer_ckpt.py\`, or name a language model:"
        echo "    MODEL=sentence-transformers/all-MiniLM-L6-v2 bash lightning_run.sh --pooler_type avg"
    } >&2
    exit 1
fi
use_environment $extra

if [ -n "$sample" ]; then
    echo "**** NO PUBLISHED FILES (pretrain_data/train.json, longformer_ckpt/longformer-base-4096.bin):"
    echo "**** pretraining a SMALL RANDOM MODEL on the bundled SAMPLE; set DATA_PATH and MODEL"
    echo "**** (2 epochs; quickstart.sh trains it to its end)"
    prepare_sample quickstart_run "${SEED:-0}"
    cd "$START"
    exec "$PYTHON" -m recformer.pretrain \
        --train_file "$RECFORMER_ROOT/$SAMPLE_PRETRAIN_DATA/train.json" \
        --dev_file "$RECFORMER_ROOT/$SAMPLE_PRETRAIN_DATA/dev.json" \
        --item_attr_file "$RECFORMER_ROOT/$SAMPLE_PRETRAIN_DATA/meta_data.json" \
        --tokenizer_name "$RECFORMER_ROOT/$SAMPLE_TOKENIZER" \
        "${SMALL_MODEL[@]}" "${SMALL_PRETRAINING[@]}" \
        --num_train_epochs "${NUM_TRAIN_EPOCHS:-2}" \
        ${BATCH_SIZE:+--batch_size "$BATCH_SIZE"} \
        ${GRADIENT_ACCUMULATION_STEPS:+--gradient_accumulation_steps "$GRADIENT_ACCUMULATION_STEPS"} \
        ${LEARNING_RATE:+--learning_rate "$LEARNING_RATE"} \
        ${VALID_STEP:+--valid_step "$VALID_STEP"} \
        --device "${DEVICE:-1}" --strategy "$STRATEGY" \
        --output_dir "${OUTPUT_DIR:-$RECFORMER_ROOT/quickstart_run/lightning_run}" \
        --seed "${SEED:-0}" "$@"
fi

DATA_PATH=${DATA_PATH:-$RECFORMER_ROOT/pretrain_data}
if [ -z "${MODEL:-}" ]; then # another model starts from its own weights
    LONGFORMER_CKPT=${LONGFORMER_CKPT-$RECFORMER_ROOT/longformer_ckpt/longformer-base-4096.bin}
fi
cd "$START"
exec "$PYTHON" -m recformer.pretrain \
    --model_name_or_path "${MODEL:-allenai/longformer-base-4096}" \
    ${LONGFORMER_CKPT:+--longformer_ckpt "$LONGFORMER_CKPT"} \
    --train_file "$DATA_PATH/train.json" \
    --dev_file "$DATA_PATH/dev.json" \
    --item_attr_file "$DATA_PATH/meta_data.json" \
    --output_dir "${OUTPUT_DIR:-result/recformer_pretraining}" \
    --num_train_epochs "${NUM_TRAIN_EPOCHS:-32}" \
    --batch_size "${BATCH_SIZE:-16}" \
    --gradient_accumulation_steps "${GRADIENT_ACCUMULATION_STEPS:-8}" \
    --learning_rate "${LEARNING_RATE:-5e-5}" \
    --valid_step "${VALID_STEP:-2000}" \
    ${SEED:+--seed "$SEED"} \
    --device "${DEVICE:-4}" \
    --strategy "$STRATEGY" \
    --fp16 \
    --fix_word_embedding \
    "$@"
