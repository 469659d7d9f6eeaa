"""Serves an artifact: torch, tokenizers and `lightning_accel.load`, nothing more.

    python recipes/generate.py out/demo/model --prompt "The import statement" --tokens 60
"""

import argparse
import sys

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
    print(options.prompt, end="")
    sampling = {"temperature": options.temperature, "top_k": 40 if options.temperature else None, "seed": options.seed}
    for piece in model.generate_text(options.prompt, options.tokens, stream=True, **sampling):
        print(piece, end="", flush=True)
    print()
    loaded = [name for name in ("transformers", "lightning", "torchao") if name in sys.modules]
    assert not loaded, loaded


if __name__ == "__main__":
    main()
