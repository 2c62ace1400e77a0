"""sentence-transformers with its ONNX backend in 8 bits, for `benchmarks/sentences.py`.

    python onnx_peer.py MODEL TEXTS

It runs in an environment that has `sentence-transformers[onnx]`, whose versions may clash with
ours, so it imports nothing of this repository. It prints "ready", and then, for every line that it
reads, encodes the texts (a JSON list) and prints "done".
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path


def main() -> None:
    import onnxruntime
    from sentence_transformers import SentenceTransformer, export_dynamic_quantized_onnx_model

    folder, texts = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    known = {"provider": "CPUExecutionProvider", "session_options": options}
    with tempfile.TemporaryDirectory() as scratch:
        exported = SentenceTransformer(folder, backend="onnx", device="cpu", model_kwargs=known)
        exported.save_pretrained(scratch)
        export_dynamic_quantized_onnx_model(exported, "avx512_vnni", scratch)
        known["file_name"] = "model_qint8_avx512_vnni.onnx"
        peer = SentenceTransformer(scratch, backend="onnx", device="cpu", model_kwargs=known)
    peer.max_seq_length = 512
    print("ready", flush=True)
    for _ in sys.stdin:
        peer.encode(texts, show_progress_bar=False)
        print("done", flush=True)


if __name__ == "__main__":
    main()
