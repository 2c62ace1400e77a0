#!/usr/bin/env bash
# Two-stage finetuning and evaluation. Variables have defaults; further flags are passed on, e.g.
#   bash finetune.sh --zero_shot
#   DATA_PATH=finetune_data/Arts PRETRAIN_CKPT=my_ckpt.bin bash finetune.sh --max_token_num 512
# `python -m recformer.finetune --help` lists every flag.
set -euo pipefail
cd "$(dirname "$0")"
source scripts/environment.sh

DATA_PATH=${DATA_PATH:-finetune_data/Scientific}
PRETRAIN_CKPT=${PRETRAIN_CKPT:-pretrain_ckpt/seqrec_pretrain_ckpt.bin}
