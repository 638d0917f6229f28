"""The classes that build every block with its own widths: loaded, run, trained, adapted and shrunk again."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, Trainer

from hf_adaptive_sparse.families import FAMILIES as FAMILIES_OF_LINEARS
from hf_adaptive_sparse.hf.adapter import AdaptiveSparseConfig
from hf_adaptive_sparse.hf.pretrained import save_packed
from hf_adaptive_sparse.hf.shrunk_export import export_shrunk
from hf_adaptive_sparse.hf.shrunk_models import BlockConfig
from hf_adaptive_sparse.hf.shrunk_registry import SHRUNK_CLASSES
from hf_adaptive_sparse.hf.surgery import block_widths, remove_units
from hf_adaptive_sparse.hf.units import find_axes

from ..tiny_models import CONFIGS, tokens
from .runs import arguments, examples
from .shrunk_cases import FAMILIES, add_biases, assert_generates, load, logits_of, shrunk_model
from .two_four_models import prune

every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Of a family: a model whose blocks differ, and the folder in which it is."""
    made = {}

    def make(family):
        if family not in made:
            model = shrunk_model(family, even=False)
            folder = tmp_path_factory.mktemp("shrunk") / family
            export_shrunk(model, folder, form="per_layer")
            made[family] = model, folder
        return made[family]

    return make


def seen_by_blocks(model):
    """The modules whose config is that of a block."""
    return [module for module in model.modules() if isinstance(getattr(module, "config", None), BlockConfig)]


# --- loaded ---------------------------------------------------------------------------------------------------


@every_family
def test_a_loaded_model_has_the_logits_the_widths_and_the_tensor_names_of_the_saved_one(family, uneven):
    model, folder = uneven(family)
    loaded = load(folder)
    assert type(loaded) is SHRUNK_CLASSES[family][1]
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert block_widths(loaded) == block_widths(model)
    assert len({str(widths) for widths in block_widths(loaded)}) > 1
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in loaded.state_dict().items()} == shapes


@every_family
def test_a_loaded_model_generates_the_same_with_every_cache_as_without_one(family, uneven):
    assert_generates(load(uneven(family)[1]))


@every_family
def test_padded_batches_give_what_the_model_in_memory_gives(family, uneven):
    model, folder = uneven(family)
    attention_mask = torch.ones(2, 9, dtype=torch.int64)
    attention_mask[0, :4] = 0
    options = {"attention_mask": attention_mask}
    assert torch.equal(logits_of(load(folder), **options), logits_of(model, **options))


@every_family
def test_what_transformers_asks_a_model_about_itself_is_as_in_the_stock_family(family, uneven):
    model, folder = uneven(family)
    loaded = load(folder)
    assert loaded._no_split_modules == model._no_split_modules
    assert loaded.all_tied_weights_keys == model.all_tied_weights_keys
    assert loaded.loss_type == model.loss_type
    assert loaded.tp_plan == model.tp_plan
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])  # which has eager alone
def test_the_attention_implementation_can_be_changed_after_loading(family, uneven):
    model, folder = uneven(family)
    loaded = load(folder, attn_implementation="eager")
    attended = seen_by_blocks(loaded)
    assert attended and {module.config._attn_implementation for module in attended} == {"eager"}
    loaded.set_attn_implementation("sdpa")
    assert {module.config._attn_implementation for module in attended} == {"sdpa"}
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("family", ["phi3", "gpt2"])
def test_copies_and_pickles_have_the_same_logits_and_share_one_config(family, uneven):
    loaded = load(uneven(family)[1])
    for copied in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert torch.equal(logits_of(copied), logits_of(loaded))
        views = [module.config for module in seen_by_blocks(copied)]
        assert views and all(view._shared is copied.config for view in views)


@every_family
def test_a_config_alone_builds_a_model_with_initialised_blocks(family, uneven):
    config = AutoConfig.from_pretrained(uneven(family)[1])
    built = AutoModelForCausalLM.from_config(config)
    assert block_widths(built) == block_widths(uneven(family)[0])
    for name, parameter in built.named_parameters():
        assert parameter.isfinite().all() and parameter.abs().max() < 2, name
        if parameter.dim() > 1:
            assert 0.2 * config_std(config) < parameter.std() < 5 * config_std(config), name


def config_std(config):
    return getattr(config, "initializer_range", None) or config.init_std


@every_family
def test_saving_a_loaded_model_by_itself_keeps_everything(family, uneven, tmp_path):
    model, folder = uneven(family)
    load(folder).save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(logits_of(again), logits_of(model))
    assert again.config.to_diff_dict() == load(folder).config.to_diff_dict()


# --- trained and adapted --------------------------------------------------------------------------------------


@every_family
def test_every_parameter_gets_the_same_gradient_with_checkpointing_as_without(family, uneven):
    gradients = []
    for checkpointing in (False, True):
        loaded = load(uneven(family)[1])
        loaded.config.use_cache = False
        for module in loaded.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        for dropout in ("dropout", "attention_dropout", "layerdrop"):
            if hasattr(loaded.config, dropout):
                setattr(loaded.config, dropout, 0.0)
            for module in loaded.modules():
                if isinstance(getattr(module, dropout, None), float):
                    setattr(module, dropout, 0.0)
        loaded.train()
        if checkpointing:
            getattr(loaded, "activation_checkpointing_enable", loaded.gradient_checkpointing_enable)()
        loaded(input_ids=tokens(), labels=tokens()).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in loaded.named_parameters()})
        assert all(grad is not None for grad in gradients[-1].values())
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, msg=name)


def test_trainer_trains_it_and_its_checkpoint_opens(uneven, tmp_path):
    loaded = load(uneven("llama")[1])
    before = {name: parameter.detach().clone() for name, parameter in loaded.named_parameters()}
    settings = arguments(tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=2)
    trainer = Trainer(model=loaded, args=settings, train_dataset=examples())
    trainer.train()
    assert all(not torch.equal(before[name], parameter) for name, parameter in loaded.named_parameters())
    assert torch.equal(logits_of(load(tmp_path / "run" / "checkpoint-2")), logits_of(loaded.eval()))


@every_family
def test_lora_runs_on_a_loaded_model_with_the_default_targets_of_its_family(family, uneven):
    model, folder = uneven(family)
    # peft has no default for these two.
    targets = "all-linear" if family in ("phi3", "qwen3_moe") else None
    fan_in_fan_out = family == "gpt2"
    config = LoraConfig(init_lora_weights=False, target_modules=targets, fan_in_fan_out=fan_in_fan_out)
    adapted = get_peft_model(load(folder), config)
    assert torch.isfinite(logits_of(adapted)).all() and not torch.equal(logits_of(adapted), logits_of(model))
    with adapted.disable_adapter():
        torch.testing.assert_close(logits_of(adapted), logits_of(model))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family in FAMILIES_OF_LINEARS])
def test_masks_are_learned_on_a_loaded_model(family, tmp_path):
    # Widths that a group of four divides.
    model = shrunk_model(family, even=True, kinds=("kv_head",))
    export_shrunk(model, tmp_path / "model", form="per_layer")
    adapted = get_peft_model(load(tmp_path / "model"), AdaptiveSparseConfig())
    adapted(input_ids=tokens(), labels=tokens()).loss.backward()
    learned = [parameter for name, parameter in adapted.named_parameters() if "adaptive_sparse_weight" in name]
    assert len(learned) == 3 * len(FAMILIES_OF_LINEARS[family].targets)
    assert all(parameter.grad is not None for parameter in learned)
    with adapted.disable_adapter():
        assert torch.equal(logits_of(adapted), logits_of(model))


def test_a_two_four_model_of_this_kind_is_packed_and_opened(tmp_path):
    model = shrunk_model("llama", even=False, kinds=("kv_head",), head_dim=8, intermediate_size=32)
    export_shrunk(model, tmp_path / "dense", form="per_layer")
    loaded = load(tmp_path / "dense")
    for name, module in loaded.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            prune(module)
    saved = save_packed(loaded, tmp_path / "packed")
    assert len(saved.modules) == 3 * 7
    assert torch.equal(logits_of(load(tmp_path / "packed")), logits_of(loaded))


# --- shrunk again ---------------------------------------------------------------------------------------------


@every_family
def test_a_loaded_model_can_lose_more_units_and_be_saved_again(family, uneven, tmp_path):
    loaded = load(uneven(family)[1])
    axis = find_axes(loaded, ("kv_head",))[0]
    keep = torch.ones(axis.count, dtype=torch.bool)
    keep[0] = False
    remove_units(loaded, {axis.name: keep})
    assert_generates(loaded)
    export_shrunk(loaded, tmp_path / "again")
    again = load(tmp_path / "again")
    assert block_widths(again) == block_widths(loaded)
    assert torch.equal(logits_of(again), logits_of(loaded))


def test_biases_that_the_stock_class_does_not_have_are_trained_and_kept(tmp_path):
    model = add_biases(shrunk_model("mistral", even=False), "self_attn.o_proj", "mlp.down_proj")
    export_shrunk(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert loaded.config.added_biases == ["mlp.down_proj", "self_attn.o_proj"]
    assert torch.equal(logits_of(loaded), logits_of(model))
    loaded(input_ids=tokens(), labels=tokens()).loss.backward()
    assert loaded.model.layers[2].mlp.down_proj.bias.grad is not None


# --- configs that cannot be right -----------------------------------------------------------------------------


def test_heads_that_do_not_divide_are_refused_with_the_layer_named():
    changes = {**CONFIGS["llama"], "per_layer_config": {1: {"num_attention_heads": 3}}}
    expected = (
        "layer 1 has 3 attention heads and 2 key and value heads; the first must be a multiple of the second, and "
        "neither can be 0."
    )
    with pytest.raises(StrictDataclassClassValidationError, match=re.escape(expected)):
        AutoConfig.for_model("shrunk_llama", **changes)


def test_the_config_gives_no_width_that_differs_between_layers(uneven):
    config = load(uneven("llama")[1]).config
    with pytest.raises(RuntimeError, match="'num_attention_heads' is a per-layer attribute"):
        config.num_attention_heads  # noqa: B018
    assert [config.per_layer_config[index].num_attention_heads for index in range(3)] == [6, 4, 2]
