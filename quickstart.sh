#!/usr/bin/env bash
# From nothing to a metrics table: an environment, a generated sample in the raw Amazon format,
# processing, a small tokenizer, a small Recformer pretrained on three categories and finetuned in
# two stages on a fourth that it has never seen, and two simple lines to beat. Downloads Python
# packages and nothing else. A second run reuses what is there; one that was cut off goes on.
#
#   bash quickstart.sh                              writes to quickstart_run/
#   OUTPUT_DIR=elsewhere SEED=1 bash quickstart.sh
set -euo pipefail
unset CDPATH
# A folder of one's own is meant from where one stands.
[ -n "${OUTPUT_DIR:-}" ] && [ "${OUTPUT_DIR#/}" = "$OUTPUT_DIR" ] && OUTPUT_DIR="$PWD/$OUTPUT_DIR"
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/environment.sh
source scripts/environment.sh
# shellcheck source=scripts/sample.sh
source scripts/sample.sh
if given --help "$@" || given -h "$@"; then
    help_of quickstart.sh
    exit
elif [ $# -gt 0 ]; then
    echo "error: quickstart.sh takes no arguments, got: $*; see --help" >&2
    exit 2
fi
use_environment serve # for the page that the last line names

OUTPUT_DIR=${OUTPUT_DIR:-quickstart_run}
SEED=${SEED:-0}
prepare_sample "$OUTPUT_DIR" "$SEED"

echo "== pretraining a small Recformer on $SAMPLE_PRETRAIN, validated on $SAMPLE_DEV"
"$PYTHON" -m recformer.pretrain --train_file "$SAMPLE_PRETRAIN_DATA/train.json" \
    --dev_file "$SAMPLE_PRETRAIN_DATA/dev.json" \
    --item_attr_file "$SAMPLE_PRETRAIN_DATA/meta_data.json" --tokenizer_name "$SAMPLE_TOKENIZER" \
    "${SMALL_MODEL[@]}" "${SMALL_PRETRAINING[@]}" \
    --output_dir "$OUTPUT_DIR/pretraining" --seed "$SEED"
last="$OUTPUT_DIR/pretraining/checkpoints/last.ckpt"
converted="last.ckpt of checksum $(cksum <"$last")"
if ! made_from "$OUTPUT_DIR/pretrain_ckpt" "$converted"; then
    echo "== converting its last checkpoint into a model to start from"
    "$PYTHON" convert_pretrain_ckpt.py --checkpoint "$last" --output_dir "$OUTPUT_DIR/pretrain_ckpt"
    note_made_from "$OUTPUT_DIR/pretrain_ckpt" "$converted"
fi

echo "== what it can do on $SAMPLE_TARGET before it was pretrained: nothing much, as a line to compare"
"$PYTHON" -m recformer.finetune --data_path "$SAMPLE_DATA" --tokenizer_name "$SAMPLE_TOKENIZER" \
    "${SMALL_MODEL[@]}" --zero_shot --output_dir "$OUTPUT_DIR/untrained" --seed "$SEED" >/dev/null

echo "== finetuning it on $SAMPLE_TARGET, which it has never seen"
"$PYTHON" -m recformer.finetune --data_path "$SAMPLE_DATA" \
    --pretrain_ckpt "$OUTPUT_DIR/pretrain_ckpt/recformer_pretrain_ckpt" \
    "${SMALL_FINETUNING[@]}" --output_dir "$OUTPUT_DIR/recformer" --seed "$SEED"

echo "== training only a head on it, which knows the catalogue (docs/method.md)"
"$PYTHON" -m recformer.finetune --data_path "$SAMPLE_DATA" \
    --pretrain_ckpt "$OUTPUT_DIR/pretrain_ckpt/recformer_pretrain_ckpt" \
    "${SMALL_HEAD[@]}" --output_dir "$OUTPUT_DIR/head" --seed "$SEED"

echo "== the lines to beat: popularity, text neighbours (TF-IDF), what is bought together"
for line in popularity text_neighbours cooccurrence; do
    "$PYTHON" -m baselines --model "$line" --data_path "$SAMPLE_DATA" \
        --output_dir "$OUTPUT_DIR/$line" >/dev/null
done

echo "== test users of $SAMPLE_TARGET, every item ranked"
"$PYTHON" -m recformer compare --against "Recformer with a head" --output_dir "$OUTPUT_DIR" \
    "popularity=$OUTPUT_DIR/popularity" "TF-IDF neighbours=$OUTPUT_DIR/text_neighbours" \
    "co-occurrence=$OUTPUT_DIR/cooccurrence" \
    "Recformer, random weights=$OUTPUT_DIR/untrained" \
    "Recformer, pretrained=$OUTPUT_DIR/recformer:zero_shot" \
    "Recformer, finetuned=$OUTPUT_DIR/recformer" \
    "Recformer with a head=$OUTPUT_DIR/head"
echo "The best model is in $OUTPUT_DIR/recformer/best_model, its curves in $OUTPUT_DIR/recformer/curves.png."
cat <<END
To try both on a page, http://127.0.0.1:8000, in this checkout:
    $PYTHON -m recformer serve $OUTPUT_DIR/head/best_model \\
        --beside $OUTPUT_DIR/recformer/best_model --data_path $SAMPLE_DATA
END
