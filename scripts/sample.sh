# Sourced by quickstart.sh, lightning_run.sh and finetune.sh, not run: the bundled sample and the
# small model on it.
#
#   prepare_sample DIR SEED      raw files, processed folders and a tokenizer below DIR
#
# A step that was finished is not repeated; one that was cut off is. Sets SAMPLE_DATA (the target's
# processed folder), SAMPLE_PRETRAIN_DATA and SAMPLE_TOKENIZER. SMALL_MODEL, SMALL_PRETRAINING and
# SMALL_FINETUNING are flags of a Recformer that trains in a minute or two on two cores.

SAMPLE_PRETRAIN="Camping Kitchen Garden"
SAMPLE_DEV="Music"
SAMPLE_TARGET="Cycling"

# A step writes a folder and, when all of it is there, a note in it of what it was made from. Files
# alone do not tell a finished folder from one whose step was killed between two of them.
made_from() { # folder, words: whether a finished step wrote it from just this
    [ "$(cat "$1/.made_from" 2>/dev/null)" = "$2" ]
}

note_made_from() { # folder, words
    printf '%s\n' "$2" >"$1/.made_from.part" && mv -f "$1/.made_from.part" "$1/.made_from"
}

prepare_sample() { # directory, seed
    local root=$1 seed=$2 source
    SAMPLE_DATA="$root/finetune_data/$SAMPLE_TARGET"
    SAMPLE_PRETRAIN_DATA="$root/pretrain_data"
    SAMPLE_TOKENIZER="$root/tokenizer"
    if [ "$(cat "$root/seed" 2>/dev/null || echo "$seed")" != "$seed" ]; then
        echo "error: $root holds a sample of seed $(cat "$root/seed"); choose another folder" >&2
        return 1
    fi
    mkdir -p "$root"
    echo "$seed" >"$root/seed"
    source="seed $seed"
    if ! made_from "$root/raw" "$source"; then
        echo "== writing a sample in the raw Amazon format to $root/raw"
        "$PYTHON" -m recformer sample --output_dir "$root/raw" --seed "$seed"
        note_made_from "$root/raw" "$source"
    fi
    if ! made_from "$root/pretrain_data" "$source, $SAMPLE_PRETRAIN, $SAMPLE_DEV"; then
        echo "== processing the categories to pretrain on"
        # shellcheck disable=SC2086  # a list of words
        "$PYTHON" pretrain_data/meta_data_process.py --meta_root "$root/raw" \
            --seq_root "$root/raw" --categories $SAMPLE_PRETRAIN \
            --dev_category "$SAMPLE_DEV" --output_dir "$root/pretrain_data"
        # shellcheck disable=SC2086
        "$PYTHON" pretrain_data/interaction_data_process.py --seq_root "$root/raw" \
            --categories $SAMPLE_PRETRAIN --dev_category "$SAMPLE_DEV" --output_dir "$root/pretrain_data"
        note_made_from "$root/pretrain_data" "$source, $SAMPLE_PRETRAIN, $SAMPLE_DEV"
    fi
    if ! made_from "$SAMPLE_DATA" "$source, $SAMPLE_TARGET"; then
        echo "== processing the category to finetune on"
        "$PYTHON" finetune_data/process.py --file_path "$root/raw/${SAMPLE_TARGET}_5.json.gz" \
            --meta_file_path "$root/raw/meta_$SAMPLE_TARGET.json.gz" --output_path "$SAMPLE_DATA"
        note_made_from "$SAMPLE_DATA" "$source, $SAMPLE_TARGET"
    fi
    if ! made_from "$SAMPLE_TOKENIZER" "$source"; then
        echo "== training a small tokenizer"
        "$PYTHON" -m recformer tokenizer --meta_file "$root/pretrain_data/meta_data.json" \
            "$SAMPLE_DATA/meta_data.json" --vocab_size 4096 --output_dir "$SAMPLE_TOKENIZER"
        note_made_from "$SAMPLE_TOKENIZER" "$source"
    fi
}

# About 150,000 parameters; words and order are learned within a minute or two on two cores. Random
# item vectors must differ for there to be anything to learn from, hence avg and the wide start.
# shellcheck disable=SC2034  # read by the scripts that source this
SMALL_MODEL=(
    --from_scratch
    --config_overrides "hidden_size=64,num_hidden_layers=2,num_attention_heads=2,intermediate_size=256,initializer_range=0.05"
    --pooler_type avg --max_token_num 192
)
# Threads of a small model meet every few microseconds. By default they wait for each other by spinning,
# which takes a whole time slice as soon as anything else needs a core: an epoch of 1.2 s becomes one
# of 13 to 26 s. So short a spin costs a fifth on an idle machine and makes that 4 to 5 s.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000}
# shellcheck disable=SC2034
SMALL_PRETRAINING=(
    --num_train_epochs 4 --batch_size 32 --gradient_accumulation_steps 1 --learning_rate 2e-3
    --log_step 25 --dataloader_num_workers 0
)
# shellcheck disable=SC2034
SMALL_FINETUNING=(
    --finetune_negative_sample_size -1 --num_train_epochs 24 --verbose 4
    --batch_size 32 --gradient_accumulation_steps 1 --learning_rate 2e-3
)
# shellcheck disable=SC2034
SMALL_HEAD=(--method head --next_offsets)
