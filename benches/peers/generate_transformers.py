"""Greedy decoding with transformers and its KV cache, on the CPU.

    python generate_transformers.py MODEL --new-tokens 128

Prints one JSON object: tokens a second of `generate` (prompt included in the time), of a bare decoding loop without
generate's own work (the faster of the two is the one to compare with), peak memory and the text.
"""

import argparse
import json
import resource
import statistics
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt", default="[hash: science] User: Explain how rain forms, in detail.\nAssistant:")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    dtype = getattr(torch, arguments.dtype)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval()
    prompt = tokenizer(arguments.prompt, add_special_tokens=False, return_tensors="pt")
    count = arguments.new_tokens

    def with_generate() -> tuple[list[int], float]:
        start = time.perf_counter()
        ids = model.generate(**prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        return ids[0, prompt["input_ids"].shape[1] :].tolist(), count / (time.perf_counter() - start)

    def with_bare_loop() -> tuple[list[int], float]:
        cache, ids, output = DynamicCache(), prompt["input_ids"], []
        start = 0.0
        for _ in range(count):
            logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)
            output.append(int(ids))
            start = start or time.perf_counter()  # after the prompt and its first token
        return output, (count - 1) / (time.perf_counter() - start)

    with torch.inference_mode():
        with_bare_loop()
        runs = [(with_generate(), with_bare_loop()) for _ in range(arguments.repetitions)]
    (generated, _), (bare, _) = runs[-1]
    print(
        json.dumps(
            dict(
                dtype=arguments.dtype,
                prompt_tokens=prompt["input_ids"].shape[1],
                new_tokens=count,
                generate_tokens_per_second=statistics.median(run[0][1] for run in runs),
                bare_loop_tokens_per_second=statistics.median(run[1][1] for run in runs),
                peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                tokens=bare,
                text=tokenizer.decode(generated),
            )
        )
    )


if __name__ == "__main__":
    main()
