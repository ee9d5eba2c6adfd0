"""Loads the imported tiny models in transformers and compares their logits with the models they were made from.

    pip install torch transformers safetensors
    python tests/interop/check_import.py target/debug/fastlora

The GGUF files hold matrices in F16, the golden logits come from f32: a difference of some 1e-3 of the largest logit is
rounding; a wrong row order or RoPE differs by the size of the logits.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

FIXTURES = Path(__file__).parent.parent / "fixtures"
TOKENS = {"llama": ["<|begin|>", "Hello", "Ġworld", "12", "<|end|>"], "qwen2": ["Hello", "Ġworld", "1", "2", "<|end|>"]}

for name, original in [("llama", "tiny_llama3rope"), ("qwen2", "tiny_qwen2")]:
    with tempfile.TemporaryDirectory() as parent:
        folder = f"{parent}/model"
        source = FIXTURES / "gguf" / f"tiny_{name}.gguf"
        subprocess.run([sys.argv[1], "import", source, "-o", folder, "--dtype", "f32", "-q"], check=True)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        golden = load_file(FIXTURES / original / "forward.safetensors")
        with torch.no_grad():
            logits = model(input_ids=golden["input_ids"], attention_mask=golden["attention_mask"]).logits
        difference = ((logits - golden["logits_f32"]).abs() * golden["attention_mask"][..., None]).max().item()
        largest = golden["logits_f32"].abs().max().item()
        print(f"{name}: largest difference of logits {difference:.2e}, largest logit {largest:.2f}")
        assert difference < 4e-3 * largest
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.convert_ids_to_tokens(tokenizer("Hello world12<|end|>").input_ids) == TOKENS[name]
