"""The whole way: train -> push -> another process -> from_pretrained -> generate. The client is not modified."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_adaptive_sparse import push_to_hub, save_masks
from tests.cli.runs import run_process
from tests.hf.two_four_models import two_four_model
from tests.tiny_models import tiny_model

ROOT = Path(__file__).parents[2]
FRESH = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
repo, commit, adapter, other, masks = sys.argv[1:]
said = {}
try:
    AutoModelForCausalLM.from_pretrained(repo)
except OSError as problem:
    said["without the package"] = str(problem)
import hf_adaptive_sparse
model = AutoModelForCausalLM.from_pretrained(repo)
tokens = AutoTokenizer.from_pretrained(repo)("the cat", return_tensors="pt")["input_ids"]
said["tokens"] = model.generate(tokens, max_new_tokens=12, do_sample=False)[0].tolist()
said["by its hash"] = AutoModelForCausalLM.from_pretrained(repo, revision=commit).generate(
    tokens, max_new_tokens=12, do_sample=False
)[0].tolist()
from peft import PeftModel
tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(repo), adapter)
said["with the adapter"] = tuned.generate(input_ids=tokens, max_new_tokens=12, do_sample=False)[0].tolist()
masked = hf_adaptive_sparse.load_with_masks(masks)  # the base that they name is fetched as well
known = tokens % masked.config.vocab_size
said["masks and base"] = masked.generate(known, max_new_tokens=12, do_sample=False)[0].tolist()
try:
    model.push_to_hub(other)
except hf_adaptive_sparse.OutputError as problem:
    said["plain push_to_hub"] = str(problem)
print(json.dumps(said))
"""


def test_train_push_and_generate_in_another_process(place, trained_run, tmp_path):
    environment = place.environment(tmp_path / "home")
    repo, adapter, other = place.new(), place.new("adapter"), place.new()
    done = run_process("push", trained_run, repo, "--license", "mit", **environment)
    assert done.code == 0, done.err
    commit = place.api.model_info(repo).sha
    assert done.out == f"{place.url}/{repo}: packed, commit {commit}\n"
    local = AutoModelForCausalLM.from_pretrained(trained_run / "packed")
    base = AutoModelForCausalLM.from_pretrained(trained_run / "packed")
    tuned = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM"))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    push_to_hub(tuned, adapter, base_model=repo, token=place.token, endpoint=place.url)
    masks, masked = _push_base_and_masks(place, tmp_path)
    again = subprocess.run(
        [sys.executable, "-c", FRESH, repo, commit, adapter, other, masks], capture_output=True, text=True, timeout=240,
        env=_environment(environment), cwd=tmp_path,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    said = json.loads(again.stdout.splitlines()[-1])
    assert f"{repo} does not appear to have a file named" in said["without the package"]
    prompt = torch.tensor([said["tokens"][:-12]])
    for model, name in ((local, "tokens"), (tuned, "with the adapter"), (masked, "masks and base")):
        given = prompt % model.config.vocab_size
        assert said[name] == model.generate(input_ids=given, max_new_tokens=12, do_sample=False)[0].tolist()
    assert said["with the adapter"] != said["tokens"]
    assert said["by its hash"] == said["tokens"]
    # What transformers' own method makes of a packed model is a refusal, and at most an empty repository.
    assert "push_to_hub(model, repo_id) of hf_adaptive_sparse" in said["plain push_to_hub"]
    assert not place.api.repo_exists(other) or place.api.list_repo_files(other) == [".gitattributes"]
    _check_no_token(place, tmp_path, done.out + done.err + again.stdout + again.stderr)


def _push_base_and_masks(place, folder: Path) -> tuple[str, torch.nn.Module]:
    """The repository of the masks, and the sparse model that they and the base, in a repository of its own, make."""
    base, masks = place.new("base"), place.new("masks")
    dense = tiny_model()
    dense.save_pretrained(folder / "base")
    push_to_hub(folder / "base", base, license="mit", token=place.token, endpoint=place.url)
    dense.name_or_path = base  # as if it had been loaded from there
    sparse = two_four_model()
    saved = save_masks(sparse, folder / "masks", base=dense)
    assert saved.caution is None
    push_to_hub(folder / "masks", masks, license="mit", token=place.token, endpoint=place.url)
    return masks, sparse


def _environment(more: dict[str, str]) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)} | more


def _check_no_token(place, folder: Path, printed: str) -> None:
    written = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert place.token.encode() not in written and place.token not in printed
    if place.hub is not None:
        # The weights of each of four repositories were fetched once: the later loads came from the cache.
        assert place.hub.count("GET /storage/") == 4
