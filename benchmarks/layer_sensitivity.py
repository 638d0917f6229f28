"""How well the sensitivities of `analyze` tell what making one matrix 2:4 does to the loss.

For every matrix of a model: the error of its outputs, its Fisher trace and the predicted loss, next to the loss that
was measured with that matrix alone at 2:4 (Wanda). The rank correlations say which of them to go by.

    python benchmarks/layer_sensitivity.py --model FOLDER --data FILE
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_adaptive_sparse import load_documents, token_windows
from hf_adaptive_sparse.hf.layer_sensitivity import layer_sensitivity


def rank_correlation(x: list[float], y: list[float]) -> float:
    """Spearman's; no ties."""
    ranks = torch.stack([torch.tensor(values).argsort().argsort().double() for values in (x, y)])
    return torch.corrcoef(ranks)[0, 1].item()


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "layer_sensitivity.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    windows = token_windows(load_documents(arguments.data), tokenizer, 256, limit=arguments.windows)
    predicted = layer_sensitivity(model, windows)
    measured = [each.loss for each in layer_sensitivity(model, windows, measure=True)]
    attention = [index for index, each in enumerate(predicted) if each.name.endswith(("q_proj", "k_proj"))]
    others = [index for index in range(len(predicted)) if index not in attention]
    ratios = [predicted[index].loss / measured[index] for index in range(len(predicted))]
    result = {
        "model": Path(arguments.model).name,
        "windows": len(windows),
        "matrices": len(predicted),
        "rank correlation with the measured loss": {
            "output error": rank_correlation([each.error for each in predicted], measured),
            "Fisher trace": rank_correlation([each.trace for each in predicted], measured),
            "predicted loss": rank_correlation([each.loss for each in predicted], measured),
            "predicted loss, without queries and keys": rank_correlation(
                [predicted[index].loss for index in others], [measured[index] for index in others]
            ),
        },
        "predicted by measured loss, median": {
            "queries and keys": torch.tensor([ratios[index] for index in attention]).median().item(),
            "all others": torch.tensor([ratios[index] for index in others]).median().item(),
        },
        "torch": torch.__version__,
    }
    rows = []
    if arguments.output.exists():
        rows = [json.loads(line) for line in arguments.output.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["model"] != result["model"]] + [result]
    arguments.output.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
