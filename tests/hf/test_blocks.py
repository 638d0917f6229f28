"""Blocks found by structure, and the weights inside them."""

from __future__ import annotations

import re

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import prune
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from hf_adaptive_sparse.errors import ConfigError, TargetError
from hf_adaptive_sparse.families import FAMILIES
from hf_adaptive_sparse.hf.blocks import block_linears, check_blocks, find_blocks
from hf_adaptive_sparse.layers import PackedLinear

from ..tiny_models import CONFIGS, tiny_model
from .two_four_models import two_four_model
from .walked_models import MOE_CONFIGS, any_model, linears


@pytest.mark.parametrize("model_type", CONFIGS)
def test_structure_finds_the_blocks_and_linears_that_the_family_names(model_type):
    model, family = tiny_model(model_type), FAMILIES[model_type]
    stack = find_blocks(model)
    assert stack.name == family.blocks and len(stack.blocks) == 2
    found = [name for index in range(2) for name in block_linears(stack, index)]
    assert sorted(found) == sorted(name for name in linears(model) if family.is_target(name))


def test_blocks_of_an_encoder_and_of_a_model_without_a_head_are_found():
    bert = any_model("bert")
    assert find_blocks(bert).name == "bert.encoder.layer"
    assert find_blocks(bert.bert).name == "encoder.layer"
    assert list(block_linears(find_blocks(bert), 1)) == [
        "bert.encoder.layer.1.attention.self.query",
        "bert.encoder.layer.1.attention.self.key",
        "bert.encoder.layer.1.attention.self.value",
        "bert.encoder.layer.1.attention.output.dense",
        "bert.encoder.layer.1.intermediate.dense",
        "bert.encoder.layer.1.output.dense",
    ]


@pytest.mark.parametrize("model_type", MOE_CONFIGS)
def test_every_expert_is_a_matrix_and_the_router_is_none(model_type):
    model = any_model(model_type)
    found = block_linears(find_blocks(model), 1)
    experts = [name for name in found if "experts." in name]
    assert len(experts) == 8 and "model.layers.1.mlp.experts.gate_up_proj[3]" in experts
    assert not [name for name in found if name.endswith(("gate", "router"))]
    assert all(found[name].shape[0 if "down" in name else 1] == 32 for name in experts)
    assert {found[name].shape[1 if "down" in name else 0] for name in experts} in ({64, 128}, {16, 32})


def test_the_gate_of_a_shared_expert_stays_dense_and_its_layers_do_not():
    found = block_linears(find_blocks(any_model("qwen2_moe")), 0)
    shared = [name.removeprefix("model.layers.0.mlp.") for name in found if "shared" in name]
    assert shared == ["shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj"]


def test_a_router_is_found_by_what_it_stands_beside():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
            self.latent = nn.Linear(8, 8)

    model = tiny_model()
    model.model.layers[0].mlp = Mixture()
    found = [name for name in block_linears(find_blocks(model), 0) if "mlp" in name]
    assert [name.removeprefix("model.layers.0.mlp.") for name in found] == ["experts.0", "experts.1", "latent"]


@pytest.mark.parametrize(
    "model_type, ends",
    [("llama", ["up_proj"]), ("gpt2", ["mlp.c_fc"]), ("gpt_oss", ["down_proj[2]", "gate_up_proj[0]"])],
)
def test_a_weight_reads_and_writes_out_by_in_however_it_is_stored(model_type, ends):
    members = block_linears(find_blocks(any_model(model_type)), 0)
    for end in ends:
        member = next(member for name, member in members.items() if name.endswith(end))
        others = {name: other.weight.clone() for name, other in members.items() if other is not member}
        new = torch.randn(member.shape, dtype=torch.float64)
        member.set_weight(new)
        torch.testing.assert_close(member.weight, new.float(), rtol=0, atol=0)
        stored = member.parameter if member.expert is None else member.parameter[member.expert]
        assert torch.equal(stored, new.float().t() if member.transposed else new.float())
        assert not member.weight.requires_grad and member.parameter.requires_grad
        assert all(torch.equal(members[name].weight, before) for name, before in others.items())


def test_a_weight_of_another_shape_is_refused():
    member = block_linears(find_blocks(tiny_model("gpt2")), 0)["transformer.h.0.mlp.c_fc"]
    with pytest.raises(TargetError) as error:
        member.set_weight(torch.zeros(32, 128))
    assert str(error.value) == (
        "transformer.h.0.mlp.c_fc: the new weight is [32, 128], the layer needs [128, 32] [out, in]."
    )


def test_skipped_modules_and_parameters_stay_dense():
    stack = find_blocks(any_model("mixtral"))
    everything = set(block_linears(stack, 0))
    left = set(
        block_linears(stack, 0, skip=["k_proj", "experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj[1]"])
    )
    gone = {name.removeprefix("model.layers.0.") for name in everything - left}
    assert gone == {
        "self_attn.k_proj", "mlp.experts.down_proj[1]", *(f"mlp.experts.gate_up_proj[{expert}]" for expert in range(4)),
    }  # fmt: skip
    assert "model.layers.0.self_attn.q_proj" not in block_linears(stack, 0, skip=["self_attn"])


def test_several_lists_of_blocks_must_be_told_apart():
    model = tiny_model()
    model.extra = nn.ModuleList([nn.Sequential(nn.Linear(4, 4))])
    model.get_decoder = lambda: model
    with pytest.raises(TargetError) as error:
        find_blocks(model)
    assert str(error.value) == (
        "LlamaForCausalLM: cannot tell where its blocks are. Its lists of blocks are model.layers (2), extra (1). Name "
        "one with `blocks`."
    )
    assert find_blocks(model, "model.layers").blocks == list(model.model.layers)
    with pytest.raises(TargetError) as error:
        find_blocks(model, "layers")
    assert str(error.value) == (
        "LlamaForCausalLM: layers is no list of blocks. Its lists of blocks are model.layers (2), extra (1)."
    )


def test_models_without_one_stack_of_blocks_are_refused():
    model = tiny_model()
    model.model.layers = nn.Sequential(*model.model.layers)
    with pytest.raises(TargetError) as error:
        find_blocks(model)
    assert str(error.value) == (
        "LlamaForCausalLM: cannot tell where its blocks are. It has no nn.ModuleList of modules with linear layers in "
        "them. Only models that keep their blocks in one can be walked."
    )
    model = tiny_model()
    for block in model.model.layers:
        for name in [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]:
            block.set_submodule(name, nn.Bilinear(4, 4, 4))
    with pytest.raises(TargetError) as error:
        find_blocks(model)
    assert str(error.value) == (
        "LlamaForCausalLM: cannot tell where its blocks are. It has no nn.ModuleList of modules with linear layers in "
        "them. model.layers.0.self_attn.q_proj holds weights, and a torch.nn.modules.linear.Bilinear is not known: "
        "make it an nn.Linear or a Conv1D. Only models that keep their blocks in one can be walked."
    )
    t5 = AutoConfig.for_model("t5", vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(TargetError) as error:
        find_blocks(AutoModelForSeq2SeqLM.from_config(t5))
    assert str(error.value) == (
        "T5ForConditionalGeneration: is an encoder and a decoder, whose blocks read each other. Only models with one "
        "stack of blocks can be walked."
    )
    with pytest.raises(TargetError) as error:
        find_blocks(nn.Linear(2, 2))
    assert str(error.value) == "Linear: is no model of transformers, and only their blocks are known."


def test_models_with_adapters_are_refused_by_name():
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    for adapted in (model, model.base_model.model):
        with pytest.raises(ConfigError, match="^pruning: this .* has adapters in it. Call merge_and_unload"):
            find_blocks(adapted)


def test_packed_layers_are_refused_by_name():
    model = two_four_model()
    layer = model.model.layers[1].mlp.up_proj
    model.model.layers[1].mlp.up_proj = PackedLinear(layer.in_features, layer.out_features, False, "cpu")
    with pytest.raises(TargetError) as error:
        block_linears(find_blocks(model), 1)
    assert str(error.value) == ("model.layers.1.mlp.up_proj: is packed already. Call dequantize() on the model first.")


def test_a_module_that_is_not_known_is_named_with_what_to_do():
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.ones(4, 4))

    model = tiny_model()
    model.model.layers[0].mlp.up_proj = Scaled(32, 64)
    stack = find_blocks(model)
    with pytest.raises(TargetError) as error:
        block_linears(stack, 0)
    kind = re.escape(f"{Scaled.__module__}.{Scaled.__qualname__}")
    assert re.fullmatch(
        rf"model.layers.0.mlp.up_proj: a {kind} holds weights \(weight\) and is not known: only nn.Linear, Conv1D and "
        "the fused experts of transformers are. To leave them dense, add to `skip`: up_proj.weight.",
        str(error.value),
    )
    assert "model.layers.0.mlp.up_proj" not in block_linears(stack, 0, skip=["up_proj"])
    model.model.layers[0].mlp.up_proj = Own()
    with pytest.raises(TargetError, match=r"holds weights \(kernel\).*add to `skip`: up_proj.kernel.$"):
        block_linears(stack, 0)
    assert "model.layers.0.mlp.down_proj" in block_linears(stack, 0, skip=["up_proj.kernel"])
    assert "model.layers.0.mlp.down_proj" in block_linears(stack, 0, refuse_unknown=False)


def test_blocks_that_share_a_weight_are_refused():
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(TargetError) as error:
        check_blocks(model, find_blocks(model))
    assert str(error.value) == (
        "model.layers.0.mlp.up_proj.weight: is shared with another block, and blocks are pruned one by one. Untie the "
        "blocks first."
    )


def test_weights_without_values_are_refused():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_model().config)
    with pytest.raises(TargetError) as error:
        check_blocks(model, find_blocks(model))
    assert str(error.value) == (
        "model.embed_tokens.weight: is on the meta device, without values. Load the model into memory."
    )


def test_integer_weights_are_refused():
    model = tiny_model()
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(TargetError) as error:
        block_linears(find_blocks(model), 0)
    assert str(error.value) == (
        "model.layers.0.mlp.up_proj: the weight is torch.int8, and pruning starts from float weights. Load the model "
        "without quantization."
    )


def test_the_blocks_of_a_base_model_are_those_of_the_whole():
    model = tiny_model("opt")
    base = AutoModel.from_config(model.config)
    assert find_blocks(base).name == "decoder.layers"


def test_a_model_that_accelerate_moves_about_is_refused():
    model = tiny_model()
    add_hook_to_module(model.model.layers[0], AlignDevicesHook(execution_device="cpu"))
    with pytest.raises(TargetError) as error:
        check_blocks(model, find_blocks(model))
    assert str(error.value) == (
        "model.layers.0: is moved between devices by accelerate (device_map). Load the model without device_map; "
        "`device` and `offload` bring its blocks to the device one at a time."
    )


@pytest.mark.parametrize("apply, sources", [
    (lambda layer: prune.l1_unstructured(layer, "weight", 0.3), "weight_orig"),
    (nn.utils.weight_norm, "weight_g, weight_v"),
    (nn.utils.spectral_norm, "weight_orig"),
    (nn.utils.parametrizations.weight_norm, "parametrizations.weight.original0, parametrizations.weight.original1"),
], ids=["prune", "weight norm", "spectral norm", "parametrization"])  # fmt: skip
@pytest.mark.parametrize("model_type, end", [("llama", "0.mlp.up_proj"), ("gpt2", "0.mlp.c_fc")])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_a_weight_that_is_computed_in_every_pass_is_refused(apply, sources, model_type, end):
    model = tiny_model(model_type)
    stack = find_blocks(model)
    name = f"{stack.name}.{end}"
    apply(model.get_submodule(name))
    with pytest.raises(TargetError) as error:
        block_linears(stack, 0)
    assert str(error.value) == (
        f"{name}: its weight is computed from {sources} in every forward pass, so pruning it would have no effect. "
        "Make it a parameter first: call torch.nn.utils.prune.remove, remove_weight_norm, remove_spectral_norm or "
        "parametrize.remove_parametrizations, whichever undoes what was applied."
    )
    assert name not in block_linears(stack, 0, skip=[name])


def test_a_weight_that_was_made_a_parameter_again_can_be_pruned():
    model = tiny_model()
    layer = model.model.layers[0].mlp.up_proj
    prune.l1_unstructured(layer, "weight", 0.3)
    prune.remove(layer, "weight")
    assert "model.layers.0.mlp.up_proj" in block_linears(find_blocks(model), 0)
