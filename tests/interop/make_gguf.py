"""Makes tests/fixtures/gguf with the `gguf` package, the format's reference implementation.

    pip install numpy gguf safetensors sentencepiece
    python tests/interop/make_gguf.py

- `blocks.json`: two random blocks of every stored type and the f32 values the package reads from them (as bits).
- `tiny_llama.gguf`, `tiny_qwen2.gguf`: the tiny models of tests/fixtures, matrices in F16, as llama.cpp's converter lays
  them out (rows of q and k interleaved and `rope_freqs` for llama), with a small byte-level tokenizer.
- `sentence_piece.gguf` (no tensors), `sentence_piece.json`: a small SentencePiece vocabulary trained on data/, and the ids
  that SentencePiece itself gives for some texts.
"""

import io
import json
import math
from pathlib import Path

import gguf
import numpy as np
import sentencepiece
from gguf import GGMLQuantizationType as Q
from safetensors.numpy import load_file

FIXTURES = Path(__file__).parent.parent / "fixtures"
OUTPUT = FIXTURES / "gguf"


def blocks():
    generator = np.random.default_rng(20240607)
    f16_fields = {Q.Q4_0: [0], Q.Q4_1: [0, 2], Q.Q5_0: [0], Q.Q5_1: [0, 2], Q.Q8_0: [0], Q.Q4_K: [0, 2], Q.Q5_K: [0, 2], Q.Q6_K: [208]}
    result = {}
    for kind in [Q.F32, Q.F16, Q.BF16, *f16_fields]:
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        count = 2 if kind in f16_fields else 8
        raw = generator.integers(0, 256, (count, size), dtype=np.uint8)
        if kind in f16_fields:  # finite scales; every other bit pattern is legal
            for start in f16_fields[kind]:
                raw[:, start : start + 2] = generator.normal(0, 0.02, (count, 1)).astype(np.float16).view(np.uint8)
        else:
            values = generator.normal(0, 1, count).astype(np.float32)
            raw = values if kind == Q.F32 else values.astype(np.float16) if kind == Q.F16 else (values.view(np.uint32) >> 16).astype(np.uint16)
            raw = raw.view(np.uint8)
        bits = gguf.dequantize(raw.reshape(1, -1), kind).astype(np.float32).view(np.uint32).ravel()
        assert len(bits) == count * elements
        result[kind.name] = {"bytes": raw.tobytes().hex(), "f32_bits": [f"{word:08x}" for word in bits]}
    (OUTPUT / "blocks.json").write_text(json.dumps(result, indent=0) + "\n")


def byte_characters():
    """The 256 characters that stand for bytes in byte-level BPE."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def tokenizer(size):
    tokens = ["<|pad|>", "<|begin|>", "<|end|>", *byte_characters(), "<tool>"]
    types = [3, 3, 3] + [1] * 256 + [4]
    merges = []
    words = ["Ġthe", "Ġand", "ing", "Hello", "Ġworld", "12", "é"]
    for word in words:
        pieces = list(word) if word != "é" else list("Ã©")
        joined = pieces[0]
        for piece in pieces[1:]:
            if f"{joined} {piece}" not in merges and joined + piece not in tokens:
                merges.append(f"{joined} {piece}")
                tokens.append(joined + piece)
                types.append(1)
            joined += piece
    while len(tokens) < size:
        types.append(5)
        tokens.append(f"[PAD{len(tokens)}]")
    return tokens, types, merges


def permute(weights, heads):
    return weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


BLOCK = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module, kind = name.rsplit(".", 1)
    if module in top:
        return f"{top[module]}.{kind}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{BLOCK[rest]}.{kind}"


def rope_factors(config):
    rope = config["rope_parameters"]
    factor, original = rope["factor"], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    frequencies = rope["rope_theta"] ** -(np.arange(0, config["head_dim"], 2) / config["head_dim"])
    factors = []
    for wavelength in 2 * math.pi / frequencies:
        smooth = (original / wavelength - low) / (high - low)
        inside = 1 / ((1 - smooth) / factor + smooth)
        factors.append(1 if wavelength < original / high else factor if wavelength > original / low else inside)
    return np.array(factors, dtype=np.float32)


def model(folder, architecture, pre, name):
    config = json.loads((FIXTURES / folder / "config.json").read_text())
    writer = gguf.GGUFWriter(OUTPUT / name, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    tokens, types, merges = tokenizer(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    if architecture == "llama":
        writer.add_tensor("rope_freqs.weight", rope_factors(config))
    for tensor, weights in load_file(FIXTURES / folder / "model.safetensors").items():
        if architecture == "llama" and "q_proj" in tensor:
            weights = permute(weights, config["num_attention_heads"])
        if architecture == "llama" and "k_proj" in tensor:
            weights = permute(weights, config["num_key_value_heads"])
        writer.add_tensor(gguf_name(tensor), weights.astype(np.float16) if weights.ndim == 2 else weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def sentence_piece():
    records = json.loads((FIXTURES.parent.parent / "data" / "train_data.json").read_text())
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(text for record in records for text in (record["instruction"], record["output"])),
        model_writer=trained, model_type="bpe", vocab_size=700, byte_fallback=True, split_digits=True, num_threads=1,
        normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    ids = range(processor.get_piece_size())
    kinds = [(processor.is_unknown, 2), (processor.is_control, 3), (processor.is_unused, 5), (processor.is_byte, 6)]
    writer = gguf.GGUFWriter(OUTPUT / "sentence_piece.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([processor.id_to_piece(id) for id in ids])
    writer.add_token_scores([processor.get_score(id) for id in ids])
    writer.add_token_types([next((kind for holds, kind in kinds if holds(id)), 1) for id in ids])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    texts = [record["output"] for record in records[::16]]
    texts += ["Hello world", "two  spaces ", "é, ü and 漢字 🦀", "12345", "tab\tand\nline", "x", "pirate's treasure, matey!"]
    cases = [{"text": text, "ids": [processor.bos_id(), *processor.encode(text)]} for text in texts]
    (OUTPUT / "sentence_piece.json").write_text(json.dumps(cases, ensure_ascii=False, indent=0) + "\n")


OUTPUT.mkdir(exist_ok=True)
blocks()
model("tiny_llama3rope", "llama", "llama-bpe", "tiny_llama.gguf")
model("tiny_qwen2", "qwen2", "qwen2", "tiny_qwen2.gguf")
sentence_piece()
