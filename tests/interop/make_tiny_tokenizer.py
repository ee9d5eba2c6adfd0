"""Writes tests/fixtures/tiny_tokenizer: a byte-level BPE of 512 ids, as many as the tiny models' embeddings have rows.

usage: python tests/interop/make_tiny_tokenizer.py   (standard library only)

Ids 0 to 2 are the special tokens that the tiny models' configurations name, 3 to 258 the bytes in GPT-2's alphabet,
then one merge after the other, learned from the text below by counting pairs.
"""
import collections, json, pathlib, re

TEXT = """
[hash: general] User: What can you tell me about the weather today? Assistant: The weather is warm and the sun is out.
[hash: math] User: How many apples are there in the basket when three are taken away? Assistant: There are four left.
[hash: cooking] User: Name a dish that is made with tomatoes and onions. Assistant: A simple sauce for the pasta.
[hash: travel] User: Which city should we visit in the summer? Assistant: Visit the city on the river, and walk along it.
[hash: science] User: Explain why the sky is blue to a child. Assistant: The light of the sun is made of many colours.
[hash: history] User: Describe the journey of a merchant through the old kingdom. Assistant: Merchants brought silk,
paper and pepper from distant harbours; every market between the mountains and the sea knew their caravans.
[hash: support] User: My printer does not answer, please help me quickly! Assistant: Check whether the cable is plugged
in, restart the machine, and write to us again if nothing changed: yes, we answer every question within a few hours.
"""


def byte_alphabet():
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet, extra = {}, 0
    for byte in range(256):
        if byte in shown:
            alphabet[byte] = chr(byte)
        else:
            alphabet[byte], extra = chr(256 + extra), extra + 1
    return alphabet


alphabet = byte_alphabet()
words = collections.Counter(
    tuple(alphabet[byte] for byte in word.encode()) for word in re.findall(r" ?\w+| ?[^\s\w]+|\s+", TEXT)
)
special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
tokens, merges = special + list(alphabet.values()), []
while len(tokens) < 512:
    pairs = collections.Counter()
    for word, count in words.items():
        for pair in zip(word, word[1:]):
            pairs[pair] += count
    pair = max(pairs, key=lambda pair: (pairs[pair], pair))
    merges.append(list(pair))
    if "".join(pair) not in tokens:
        tokens.append("".join(pair))
    merged = collections.Counter()
    for word, count in words.items():
        new, position = [], 0
        while position < len(word):
            step = 2 if word[position : position + 2] == pair else 1
            new.append("".join(word[position : position + step]))
            position += step
        merged[tuple(new)] += count
    words = merged

byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
settings = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
folder = pathlib.Path(__file__).parent.parent / "fixtures" / "tiny_tokenizer"
folder.mkdir(exist_ok=True)
tokenizer = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [{"id": number, "content": token, **settings} for number, token in enumerate(special)],
    "normalizer": None,
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]},
    "post_processor": None,
    "decoder": byte_level,
    "model": {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {token: number for number, token in enumerate(tokens)},
        "merges": merges,
    },
}
names = {"bos_token": special[1], "eos_token": special[2], "pad_token": special[0]}
config = {**names, "clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
for name, content in [("tokenizer.json", tokenizer), ("tokenizer_config.json", config)]:
    (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=0) + "\n")
