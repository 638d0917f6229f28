"""What `hf-adaptive-sparse demo` runs on: a small pretrained model, and text that every Python brings."""

from pathlib import Path

from .corpus import SPLITS, demo_documents, demo_files, documents_digest, split_of

# A complete from_pretrained folder: LlamaForCausalLM with its tokenizer. Its README.md is the model card.
MODEL_FOLDER = Path(__file__).resolve().parent / "model"

# Three openings in the style of the training text, for generations side by side.
PROMPTS = (
    "class Queue:\n",
    "    def __init__(self, name, ",
    "def read_file(path):\n",
)

__all__ = [
    "MODEL_FOLDER",
    "PROMPTS",
    "SPLITS",
    "demo_documents",
    "demo_files",
    "documents_digest",
    "split_of",
]
