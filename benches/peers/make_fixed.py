"""Writes samples of one exact length from real text, as pre-tokenised records that both programs read.

    python make_fixed.py MODEL data/train_data.json --length 128 --samples 160 -o fixed_128.jsonl

The records of the data file are shuffled, tokenised, laid end to end (again from the start where they run out) and cut.
"""

import argparse
import json
import random
from pathlib import Path

from samples import read_records, tokenise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder with the tokenizer")
    parser.add_argument("data", type=Path)
    parser.add_argument("--length", type=int, required=True, help="tokens in a sample")
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()

    from transformers import AutoTokenizer

    samples = tokenise(read_records(arguments.data), AutoTokenizer.from_pretrained(arguments.model), 10**9)
    shuffler = random.Random(arguments.seed)
    stream: list[int] = []
    with arguments.output.open("w") as out:
        for _ in range(arguments.samples):
            while len(stream) < arguments.length:
                shuffler.shuffle(samples)
                stream += [token for sample in samples for token in sample["input_ids"]]
            out.write(json.dumps(dict(input_ids=stream[: arguments.length])) + "\n")
            del stream[: arguments.length]


if __name__ == "__main__":
    main()
