"""What `hf-adaptive-sparse demo` runs on: a small pretrained model, and text that every Python brings."""

from pathlib import Path

from .corpus import SPLITS, demo_documents, demo_files, documents_digest, split_of

# A complete from_pretrained folder: LlamaForCausalLM with its tokenizer. Its README.md is the model card.
MODEL_FOLDER = Path(__file__).resolve().parent / "model"

# Three openings in the style of the training text, for generations side by side. None ends in white space: the
# tokenizer joins a line end with the indentation after it, so a prompt that ends in one is text never trained on.
PROMPTS = (
    "def read_file(path):",
    "    def __len__(self):\n        return",
    "    if not isinstance(value, str):\n        raise",
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
