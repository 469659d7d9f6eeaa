"""Serves an artifact: torch, tokenizers and `lightning_accel.load`, nothing more.

python recipes/generate.py out/demo/model --prompt "The import statement" --tokens 60
"""

import argparse
import sys

from tokenizers import Tokenizer

from lightning_accel import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--prompt", default="The import statement")
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    model = load(options.artifact)
    tokenizer = Tokenizer.from_file(str(model.asset("tokenizer.json")))
    ids = tokenizer.encode(options.prompt).ids
    tokens = [
        int(token)
        for token in model.generate(
            ids, options.tokens, temperature=options.temperature, top_k=40, seed=options.seed, stream=True
        )
    ]
    print(options.prompt + tokenizer.decode(tokens))
    loaded = [name for name in ("transformers", "lightning", "torchao") if name in sys.modules]
    assert not loaded, loaded


if __name__ == "__main__":
    main()
