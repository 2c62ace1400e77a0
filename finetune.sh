#!/usr/bin/env bash
# Finetuning and evaluation by full ranking: the two published stages, or with METHOD=head a head
# that knows the catalogue, in minutes (docs/method.md). Variables have the published values as
# defaults; further flags are passed on (`python -m recformer.finetune --help` lists them):
#
#   bash finetune.sh
#   METHOD=head PRETRAIN_CKPT=sentence-transformers/all-MiniLM-L6-v2 \
#       bash finetune.sh --pooler_type avg
#   DATA_PATH=finetune_data/Arts PRETRAIN_CKPT=my_ckpt.bin bash finetune.sh --max_token_num 512
#   PRETRAIN_CKPT=sentence-transformers/all-MiniLM-L6-v2 bash finetune.sh --pooler_type avg
#
# With nothing set and no published files in their places it finetunes a small model on the bundled
# sample instead. The same command again continues a run that was cut off.
set -euo pipefail
unset CDPATH
START=$PWD
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/environment.sh
source scripts/environment.sh
# shellcheck source=scripts/sample.sh
source scripts/sample.sh
if given --help "$@" || given -h "$@"; then
    help_of finetune.sh
    use_environment
    exec "$PYTHON" -m recformer.finetune --help
fi

data=finetune_data/Scientific pretrained=pretrain_ckpt/seqrec_pretrain_ckpt.bin
named_data=${DATA_PATH:-} named_start=${PRETRAIN_CKPT:-}
if given --data_path "$@"; then named_data=flag; fi
if given --pretrain_ckpt "$@" || given --from_scratch "$@"; then named_start=flag; fi
sample=
if [ -z "$named_data$named_start" ] && [ ! -e $data/train.json ] && [ ! -e $pretrained ]; then
    sample=yes
elif [ -z "$named_data" ] && [ ! -e $data/train.json ]; then
    {
        echo "error: DATA_PATH is not set, and its default $data does not exist; name your folder:"
        echo "    DATA_PATH=finetune_data/MyShop ${named_start:+PRETRAIN_CKPT=… }bash finetune.sh"
        for folder in finetune_data/*/train.json; do
            if [ -e "$folder" ]; then echo "A processed folder that exists: ${folder%/train.json}"; fi
        done
    } >&2
    exit 1
elif [ -z "$named_start" ] && [ ! -e $pretrained ]; then
    {
        echo "error: PRETRAIN_CKPT is not set, and its default $pretrained does not exist; name a"
        echo "checkpoint or a language model to start from:"
        echo "    PRETRAIN_CKPT=sentence-transformers/all-MiniLM-L6-v2 bash finetune.sh --pooler_type avg"
    } >&2
    exit 1
fi
use_environment
METHOD=${METHOD:-published}

if [ -n "$sample" ]; then
    echo "**** NO PUBLISHED FILES (finetune_data/Scientific, pretrain_ckpt/seqrec_pretrain_ckpt.bin):"
    echo "**** finetuning a SMALL RANDOM MODEL on the bundled SAMPLE; set DATA_PATH and PRETRAIN_CKPT"
    prepare_sample quickstart_run "${SEED:-0}"
    settings=("${SMALL_FINETUNING[@]}" --num_train_epochs 4)
    if [ "$METHOD" = head ]; then
        settings=("${SMALL_HEAD[@]}")
    else
        echo "**** (4 epochs a stage; quickstart.sh trains it to its end)"
    fi
    cd "$START"
    exec "$PYTHON" -m recformer.finetune --data_path "$RECFORMER_ROOT/$SAMPLE_DATA" \
        --tokenizer_name "$RECFORMER_ROOT/$SAMPLE_TOKENIZER" "${SMALL_MODEL[@]}" \
        "${settings[@]}" \
        ${NUM_TRAIN_EPOCHS:+--num_train_epochs "$NUM_TRAIN_EPOCHS"} \
        ${BATCH_SIZE:+--batch_size "$BATCH_SIZE"} \
        --output_dir "${OUTPUT_DIR:-$RECFORMER_ROOT/quickstart_run/finetune_run}" \
        --seed "${SEED:-0}" "$@"
fi

epochs=${NUM_TRAIN_EPOCHS:-} batch=${BATCH_SIZE:-}
if [ "$METHOD" = published ]; then epochs=${epochs:-128} batch=${batch:-16}; fi
cd "$START"
exec "$PYTHON" -m recformer.finetune \
    --data_path "${DATA_PATH:-$RECFORMER_ROOT/finetune_data/Scientific}" \
    --pretrain_ckpt "${PRETRAIN_CKPT:-$RECFORMER_ROOT/pretrain_ckpt/seqrec_pretrain_ckpt.bin}" \
    --output_dir "${OUTPUT_DIR:-result}" \
    --method "$METHOD" \
    ${epochs:+--num_train_epochs "$epochs"} \
    ${batch:+--batch_size "$batch"} \
    ${SEED:+--seed "$SEED"} \
    --fp16 \
    --finetune_negative_sample_size -1 \
    "$@"
