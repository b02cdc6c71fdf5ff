"""`python -m vqrae_jax` lists the verbs."""

import ast
from pathlib import Path

VERBS = ("main", "evaluate", "study", "reconstruct", "tokenize", "detokenize", "generate", "convert", "plan", "bench")

if __name__ == "__main__":
    print("Each of these is a command, python -m vqrae_jax.VERB, and explains itself with --help:\n")
    for verb in VERBS:
        docstring = ast.get_docstring(ast.parse((Path(__file__).parent / f"{verb}.py").read_text())) or ""
        print(f"  {verb:12s} {docstring.partition(chr(10))[0]}")
