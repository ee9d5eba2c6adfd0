"""Training records as token ids, cut as fastlora cuts them, so that both programs compute on the same tokens."""

import json
from pathlib import Path

HASH_NAMES = ["hash", "domain", "category", "type"]
INSTRUCTION_NAMES = ["instruction", "question", "prompt", "input", "text"]
OUTPUT_NAMES = ["output", "answer", "response", "label", "completion"]
IGNORED = -100


def read_records(path: Path) -> list[dict]:
    """A JSON list of objects, or JSONL."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix in (".jsonl", ".ndjson"):
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    return json.loads(text)


def field(record: dict, names: list[str], default: str | None = None) -> str:
    """The first of `names` that the record has."""
    for name in names:
        if record.get(name) is not None:
            return str(record[name])
    if default is None:
        raise KeyError(f"record has none of {names}: {record}")
    return default


def tokenise(records: list[dict], tokenizer, max_length: int) -> list[dict]:
    """`input_ids` and `prompt_length` of each record: prompt and completion encoded on their own, then EOS."""
    samples = []
    for record in records:
        hash_ = field(record, HASH_NAMES, default="unknown")
        prompt = f"[hash: {hash_}] User: {field(record, INSTRUCTION_NAMES)}\nAssistant:"
        completion = f" {field(record, OUTPUT_NAMES)}"
        prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
        completion_ids = tokenizer(completion, add_special_tokens=False).input_ids
        input_ids = prompt_ids + completion_ids + [tokenizer.eos_token_id]
        samples.append(dict(input_ids=input_ids[:max_length], prompt_length=len(prompt_ids)))
    return samples
