// What recformer/models/kernel.py hands over: an encoder and a batch.

#pragma once

#include <cstdint>

extern "C" {

struct Matrix {
    const void *weight;
    const float *bias;
};

struct Layer {
    Matrix qkv, out, inner, outer, first_query, first_key, first_value;
    const float *attention_norm, *attention_shift, *output_norm, *output_shift;
    int64_t half;
};

struct Model {
    int64_t hidden, inner, heads, layers, first_position, tables_are_bf16;
    double eps;
    const Layer *layer;
    const void *tables[4];  // of words, positions, token types, item positions
    int64_t rows[4];
    const float *norm, *shift;
};

struct Batch {
    int64_t sequences, chunk_tokens;
    int64_t pooling;  // 0: all states, 1: that of `<s>`, 2: mean, 3: mean as published
    const int64_t *ids[4];  // positions may be null: counted from first_position
    const int64_t *starts;
    void *result;
};

}  // extern "C"
