"""LoRA training on PyTorch, transformers and PEFT, on the CPU in float32.

    python train_peft.py fixed  MODEL fixed_128.jsonl --batch-size 8          all tokens real, one shape
    python train_peft.py script MODEL data/train_data.json                    a plain script: pad to 512, loss on all of it
    python train_peft.py sorted MODEL data/train_data.json --token-budget 1024   batches of samples of like length

Prints one JSON object: useful (not padding) tokens a second, peak memory, seconds from the start of the process to the
end of the first step, losses. `--metrics FILE` gets one line a step with the names fastlora uses. Environment variables
(threads that spin, malloc, MKL) are the caller's business: see README.md, or run `compare`.
"""

import argparse
import json
import random
import resource
import statistics
import time
from pathlib import Path

import psutil

from samples import IGNORED, read_records, tokenise

PROCESS_START = psutil.Process().create_time()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["fixed", "script", "sorted"])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=8, help="steps measured")
    parser.add_argument("--warmup-steps", type=int, default=2, help="steps before those")
    parser.add_argument("--batch-size", type=int, default=4, help="samples in a batch (fixed, script)")
    parser.add_argument("--token-budget", type=int, default=1024, help="positions in a batch (sorted)")
    parser.add_argument("--rank", type=int, help="default: 16 for fixed, else 8; alpha is twice the rank")
    parser.add_argument("--target-modules", help="all-linear or names with commas; default: all-linear for fixed, else q_proj,v_proj")
    parser.add_argument("--lora-dropout", type=float, help="default: 0.05 for script, else 0")
    parser.add_argument("--loss-on", choices=["all", "completion"], default="all", help="(sorted)")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--metrics", type=Path)
    arguments = parser.parse_args()
    fixed = arguments.mode == "fixed"
    if arguments.rank is None:
        arguments.rank = 16 if fixed else 8
    if arguments.target_modules is None:
        arguments.target_modules = "all-linear" if fixed else "q_proj,v_proj"
    if arguments.lora_dropout is None:
        arguments.lora_dropout = 0.05 if arguments.mode == "script" else 0.0
    return arguments


def pad(samples: list[dict], length: int, padding_id: int, loss_on: str) -> dict:
    """Right-padded `input_ids`, `attention_mask` and `labels` [samples, length]; no loss on padding."""
    import torch

    input_ids = torch.full((len(samples), length), padding_id)
    attention_mask = torch.zeros((len(samples), length), dtype=torch.long)
    labels = torch.full((len(samples), length), IGNORED)
    for row, sample in enumerate(samples):
        ids = torch.tensor(sample["input_ids"])
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
        first_labelled = sample["prompt_length"] if loss_on == "completion" else 0
        labels[row, first_labelled : len(ids)] = ids[first_labelled:]
    return dict(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def make_batches(arguments: argparse.Namespace, tokenizer) -> list[dict]:
    """The batches of an epoch, in the order in which they are trained."""
    import torch

    records = read_records(arguments.data)
    size = arguments.batch_size
    if arguments.mode == "fixed":
        rows = torch.tensor([record["input_ids"] for record in records])
        # No attention mask: then scaled_dot_product_attention takes its causal path, the fastest.
        return [dict(input_ids=ids, labels=ids) for ids in rows.split(size) if len(ids) == size]

    samples = tokenise(records, tokenizer, arguments.max_length)
    shuffler = random.Random(arguments.seed)
    if arguments.mode == "script":
        shuffler.shuffle(samples)
        batches = []
        for start in range(0, len(samples), size):
            batch = pad(samples[start : start + size], arguments.max_length, tokenizer.pad_token_id, "all")
            batches.append(batch | dict(labels=batch["input_ids"].clone()))  # loss on padding too
        return batches

    groups: list[list[dict]] = [[]]
    for sample in sorted(samples, key=lambda sample: len(sample["input_ids"])):
        if groups[-1] and len(sample["input_ids"]) * (len(groups[-1]) + 1) > arguments.token_budget:
            groups.append([])
        groups[-1].append(sample)
    shuffler.shuffle(groups)
    # Sorted by length, so the last sample of a group is its longest.
    return [pad(group, len(group[-1]["input_ids"]), tokenizer.pad_token_id, arguments.loss_on) for group in groups]


def load_model(arguments: argparse.Namespace):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, attn_implementation="sdpa")
    base.config.use_cache = False
    targets = arguments.target_modules
    model = get_peft_model(
        base,
        LoraConfig(
            r=arguments.rank,
            lora_alpha=2 * arguments.rank,
            lora_dropout=arguments.lora_dropout,
            target_modules=targets if targets == "all-linear" else targets.split(","),
            task_type="CAUSAL_LM",
        ),
    )
    return model.train()


def main() -> None:
    arguments = parse_arguments()

    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = load_model(arguments)
    batches = make_batches(arguments, tokenizer)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # The plain script takes the optimizer as it comes; the others its fastest form.
    optimizer = torch.optim.AdamW(parameters, lr=arguments.learning_rate, fused=arguments.mode != "script")
    forward = torch.compile(model, dynamic=arguments.mode == "sorted") if arguments.compile else model
    metrics = arguments.metrics.open("w") if arguments.metrics else None

    steps = []
    start_to_first_step = None
    for step in range(1, arguments.warmup_steps + arguments.steps + 1):
        batch = batches[(step - 1) % len(batches)]
        start = time.perf_counter()
        loss = forward(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = float(loss.detach())
        seconds = time.perf_counter() - start
        if start_to_first_step is None:
            start_to_first_step = time.time() - PROCESS_START
        positions = batch["input_ids"].numel()
        tokens = int(batch["attention_mask"].sum()) if "attention_mask" in batch else positions
        labelled = int((batch["labels"][:, 1:] != IGNORED).sum())
        steps.append(dict(step=step, loss=loss, labelled_tokens=labelled, tokens=tokens, positions=positions, seconds=seconds))
        if metrics:
            print(json.dumps(steps[-1]), file=metrics, flush=True)

    measured = steps[arguments.warmup_steps :]
    print(
        json.dumps(
            dict(
                mode=arguments.mode,
                compiled=arguments.compile,
                useful_tokens_per_second=statistics.median(step["tokens"] / step["seconds"] for step in measured),
                useful_share=sum(step["tokens"] for step in measured) / sum(step["positions"] for step in measured),
                peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                start_to_first_step_seconds=start_to_first_step,
                trainable_parameters=sum(parameter.numel() for parameter in parameters),
                samples_per_batch=statistics.mean(len(batch["input_ids"]) for batch in batches),
                losses=[step["loss"] for step in steps],
            )
        )
    )


if __name__ == "__main__":
    main()
