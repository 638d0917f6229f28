"""The walk over blocks: what it measures, what it sends on, what it leaves behind."""

from __future__ import annotations

import gc
import itertools
import tempfile
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, T5EncoderModel

from hf_adaptive_sparse.errors import CalibrationError, ConfigError, DataError, OutputError, TargetError
from hf_adaptive_sparse.hf import accumulators, calibration, offload
from hf_adaptive_sparse.hf.accumulators import StatsSum
from hf_adaptive_sparse.hf.calibration import walk_blocks
from hf_adaptive_sparse.hf.data import load_documents, token_windows
from hf_adaptive_sparse.hf.walk_state import load_walk, save_walk

from ..tiny_models import tiny_model, tokens
from .walked_models import ALL, any_model, hidden_states, inputs_of, linears

WAYS = list(itertools.product(("block", "group"), ("sparse", "dense")))
WINDOWS = tokens(5, 12)
_ROBERTA = {
    "vocab_size": 64, "pad_token_id": 1, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32,
    "intermediate_size": 64, "max_position_embeddings": 64,
}  # fmt: skip


def prune(member) -> None:
    """A change that every later activation feels: the first half of the inputs goes."""
    weight = member.weight.clone()
    weight[:, : weight.shape[1] // 2] = 0
    member.set_weight(weight)


def gram(inputs, others=None):
    return ((inputs if others is None else others).t() @ inputs).float()


# --- what goes through the blocks ------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ALL)
def test_a_walk_without_changes_returns_the_hidden_states_of_the_model(model_type):
    model = any_model(model_type)
    walk = walk_blocks(model, WINDOWS, needs=(), batch_size=2)
    for _ in walk:
        pass
    expected = hidden_states(model, walk.stack.blocks, WINDOWS)
    assert walk.state.next_block == 2
    torch.testing.assert_close(walk.state.hidden, expected, rtol=0, atol=0)


def test_layers_of_different_attention_each_get_their_own_mask():
    types = ["sliding_attention", "full_attention"]
    model = tiny_model("gemma3_text", layer_types=types, sliding_window=3)
    walk = walk_blocks(model, WINDOWS, needs=(), batch_size=2)
    for _ in walk:
        pass
    torch.testing.assert_close(walk.state.hidden, hidden_states(model, walk.stack.blocks, WINDOWS), rtol=0, atol=0)
    full = tiny_model("gemma3_text", layer_types=types[1:] * 2, sliding_window=3)
    assert not torch.equal(walk.state.hidden, hidden_states(full, list(full.model.layers), WINDOWS))


def test_arguments_that_depend_on_the_tokens_are_kept_for_every_batch():
    model = tiny_model()
    rotary = model.model.rotary_emb
    plain = rotary.forward
    rotary.forward = lambda x, position_ids: tuple(part * (1 + x.mean()) for part in plain(x, position_ids))
    walk = walk_blocks(model, WINDOWS, needs=(), batch_size=2)
    for _ in walk:
        pass
    torch.testing.assert_close(walk.state.hidden, hidden_states(model, walk.stack.blocks, WINDOWS), rtol=0, atol=0)


@pytest.mark.parametrize("order, propagate", WAYS)
@pytest.mark.parametrize("needs", [(), ("squares",), ("gram", "cross")], ids=["nothing", "squares", "cross"])
def test_blocks_read_what_the_pruned_or_the_dense_blocks_before_them_return(order, propagate, needs):
    model, dense = tiny_model(), tiny_model()
    walk = walk_blocks(model, WINDOWS, needs=needs, order=order, propagate=propagate, batch_size=2)
    for visit in walk:
        for group in visit.groups:
            if needs:
                assert group.stats.tokens == 60
            for member in group.members:
                prune(member)
    source = model if propagate == "sparse" else dense
    expected = hidden_states(source, list(source.model.layers), WINDOWS)
    torch.testing.assert_close(walk.state.hidden, expected, rtol=0, atol=0)
    assert not torch.equal(
        hidden_states(model, list(model.model.layers), WINDOWS), hidden_states(dense, list(dense.model.layers), WINDOWS)
    )
    if needs == ("gram", "cross") and propagate == "sparse":
        torch.testing.assert_close(
            walk.state.dense, hidden_states(dense, list(dense.model.layers), WINDOWS), rtol=0, atol=0
        )
    else:
        assert walk.state.dense is None


# --- what is measured -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "falcon", "bert"])
def test_every_gram_is_the_sum_over_tokens_of_the_inputs_of_its_members(model_type):
    model = any_model(model_type)
    expected, seen = inputs_of(model, WINDOWS), []
    for visit in walk_blocks(model, WINDOWS, batch_size=2):
        for group in visit.groups:
            for member in group.members:
                seen.append(member.name)
                torch.testing.assert_close(group.stats.gram, gram(expected[member.name]), rtol=1e-5, atol=1e-5)
            assert group.tokens == group.stats.tokens == 60 and group.shrinkage == 0
            assert torch.equal(group.stats.squares, group.stats.gram.diagonal())
            assert torch.equal(group.stats.gram, group.stats.gram.t())
            assert group.stats.cross is None and group.stats.where == group.name
        assert sorted(visit.members) == sorted(name for name in seen if name.startswith(f"{visit.name}."))
    assert len(seen) == len(set(seen))


def test_members_are_grouped_by_the_tensor_they_read():
    def groups(model):
        return [group.name.split(".", 3)[-1] for group in next(iter(walk_blocks(model, WINDOWS, needs=()))).groups]

    assert groups(tiny_model("llama")) == [
        "self_attn.(q_proj, k_proj, v_proj)", "self_attn.o_proj", "mlp.(gate_proj, up_proj)", "mlp.down_proj",
    ]  # fmt: skip
    assert groups(tiny_model("falcon")) == [
        "(self_attention.query_key_value, mlp.dense_h_to_4h)", "self_attention.dense", "mlp.dense_4h_to_h",
    ]  # fmt: skip
    assert groups(tiny_model("gpt2")) == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


def test_equal_inputs_in_different_tensors_are_not_grouped():
    model = tiny_model()
    for block in model.model.layers:
        block.self_attn.k_proj.register_forward_pre_hook(lambda _, args: (args[0].clone(),))
    names = [group.name for group in next(iter(walk_blocks(model, WINDOWS, needs=()))).groups]
    assert "model.layers.0.self_attn.(q_proj, v_proj)" in names and "model.layers.0.self_attn.k_proj" in names


def test_a_tensor_that_changes_between_two_reads_is_two_inputs():
    model = tiny_model()
    model.model.layers[0].self_attn.k_proj.register_forward_pre_hook(lambda _, args: (args[0].mul_(2),))
    names = [group.name for group in next(iter(walk_blocks(model, WINDOWS, needs=()))).groups]
    assert names[:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.(k_proj, v_proj)"]


@pytest.mark.parametrize("order, propagate", WAYS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_statistics_are_of_the_model_as_it_stands_in_that_order(model_type, order, propagate):
    """Reference: at every group the inputs of a model that is pruned as far as the order says."""
    model, dense, reference = any_model(model_type), any_model(model_type), any_model(model_type)
    places, dense_inputs = linears(reference), inputs_of(dense, WINDOWS)
    walk = walk_blocks(model, WINDOWS, needs=("gram", "cross"), order=order, propagate=propagate, batch_size=2)
    for visit in walk:
        if propagate == "dense":  # only this block is pruned, as far as it is
            reference.load_state_dict(dense.state_dict())
        inputs = inputs_of(reference, WINDOWS)
        for group in visit.groups:
            if order == "group":
                inputs = inputs_of(reference, WINDOWS)
            name = group.members[0].name
            torch.testing.assert_close(group.stats.gram, gram(inputs[name]), rtol=1e-4, atol=1e-4)
            expected = gram(inputs[name], dense_inputs[name])
            torch.testing.assert_close(group.stats.cross, expected, rtol=1e-4, atol=1e-4)
            for member in group.members:
                prune(member)
                weight = member.weight.t() if member.transposed else member.weight
                places[member.name].weight.data.copy_(weight)


def test_squares_alone_cost_no_gram(monkeypatch):
    def refuse(*args):
        raise AssertionError("a Gram matrix was computed")

    monkeypatch.setattr(accumulators, "_add_gram", refuse)
    model = tiny_model()
    expected = inputs_of(model, WINDOWS)
    for visit in walk_blocks(model, WINDOWS, needs={"squares"}, batch_size=3):
        for group in visit.groups:
            assert group.stats.gram is None and group.stats.cross is None
            squares = expected[group.members[0].name].square().sum(0).float()
            torch.testing.assert_close(group.stats.squares, squares, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_of_raw_values_in_float32(dtype, monkeypatch):
    monkeypatch.setattr(accumulators, "_TOKENS", 7)
    monkeypatch.setattr(accumulators, "_TILE", 5)
    drawn = torch.randn(2, 20, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    other = drawn.roll(1, dims=0)
    total = StatsSum(12, ("gram", "cross"), torch.device("cpu"))
    total.add(drawn[:, :9], other[:, :9])
    total.add(drawn[:, 9:], other[:, 9:])
    stats = total.stats("layer")
    x, y = drawn.flatten(0, 1).double(), other.flatten(0, 1).double()
    assert stats.tokens == 40 and stats.gram.dtype == torch.float32
    torch.testing.assert_close(stats.gram, (x.t() @ x).float(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(stats.cross, (y.t() @ x).float(), rtol=1e-6, atol=1e-5)


def test_float32_products_are_exact_inside_and_as_they_were_outside(monkeypatch):
    seen = []
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    add = accumulators._add_gram
    monkeypatch.setattr(
        accumulators, "_add_gram", lambda *args: (seen.append([s.fp32_precision for s in settings]), add(*args))
    )
    torch.set_float32_matmul_precision("medium")
    try:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            StatsSum(4, ("gram",), torch.device("cpu")).add(torch.randn(3, 4, dtype=dtype))
        assert [setting.fp32_precision for setting in settings] == ["tf32", "bf16"]
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == [["ieee", "ieee"], ["tf32", "ieee"], ["tf32", "bf16"]]


def test_statistics_are_released_when_the_walk_goes_on():
    walk = iter(walk_blocks(tiny_model(), WINDOWS))
    first = next(walk).groups[0]
    stats = first.stats
    next(walk)
    with pytest.raises(CalibrationError) as error:
        _ = first.stats
    assert str(error.value) == (
        "model.layers.0.self_attn.(q_proj, k_proj, v_proj): its statistics were released when the walk went on to the "
        "next block."
    )
    assert stats.tokens == 60  # what the caller keeps, stays


def test_a_walk_without_needs_says_so_when_it_is_asked_for_statistics():
    walk = iter(walk_blocks(tiny_model(), WINDOWS, needs=()))
    visit = next(walk)
    with pytest.raises(CalibrationError) as error:
        _ = visit.groups[0].stats
    assert str(error.value) == "model.layers.0: the walk was asked for no statistics (`needs` is empty)."


# --- what is left behind ----------------------------------------------------------------------------------------


def traces(model):
    """All that a walk could leave in a model."""
    return [
        (
            name, module.training, "forward" in vars(module),
            len(module._forward_pre_hooks), len(module._forward_hooks),
            [(p.requires_grad, p.grad is None, p.device) for p in module.parameters(recurse=False)],
        )
        for name, module in model.named_modules()
    ]  # fmt: skip


@pytest.mark.parametrize("end", ["finish", "break", "error"])
@pytest.mark.parametrize("order", ["block", "group"])
def test_the_model_is_as_it_was_however_the_loop_ends(order, end):
    model = tiny_model(attention_dropout=0.5).train()
    model.model.layers[1].eval()
    before = traces(model)
    walk = walk_blocks(model, WINDOWS, order=order, needs={"gram", "cross"})
    try:
        for visit in walk:
            _ = visit.groups[1].stats
            assert torch.is_grad_enabled() and not visit.block.training
            if end == "break":
                break
            if end == "error":
                raise KeyError
    except KeyError:
        pass
    assert traces(model) == before


def test_the_model_is_as_it_was_when_its_activations_are_nan():
    model = tiny_model().train()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    before = traces(model)
    with pytest.raises(CalibrationError) as error:
        for _ in walk_blocks(model, WINDOWS):
            pass
    assert str(error.value) == (
        "model.layers.1.mlp.down_proj: its inputs hold NaN or inf (input feature 3), the first in block "
        "model.layers.1. Load the model in float32 or bfloat16, and check the dense model on this text."
    )
    assert traces(model) == before


def test_a_layer_that_no_token_reaches_is_named():
    model = tiny_model()
    model.model.layers[0].mlp.spare = nn.Linear(8, 8)
    with pytest.raises(CalibrationError) as error:
        for _ in walk_blocks(model, WINDOWS):
            pass
    assert str(error.value) == (
        "model.layers.0.mlp.spare: no calibration token reached it in block model.layers.0. Calibrate on more text, or "
        "add it to `skip` to leave it dense."
    )
    for visit in walk_blocks(model, WINDOWS, skip=["spare"]):
        assert "model.layers.0.mlp.spare" not in visit.members


def test_hidden_states_have_the_dtype_of_the_model_and_no_gradient():
    model = tiny_model(dtype=torch.bfloat16)
    walk = walk_blocks(model, WINDOWS, batch_size=2)
    for visit in walk:
        assert visit.groups[0].stats.gram.dtype == torch.float32
    assert walk.state.hidden.dtype == torch.bfloat16 and not walk.state.hidden.requires_grad
    torch.testing.assert_close(walk.state.hidden, hidden_states(model, walk.stack.blocks, WINDOWS), rtol=0, atol=0)


# --- models that cannot be walked -------------------------------------------------------------------------------


def test_models_that_do_not_call_each_block_once_are_refused():
    small = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    albert = AutoConfig.for_model("albert", **small, num_attention_heads=2, max_position_embeddings=64)
    with pytest.raises(TargetError) as error:
        next(iter(walk_blocks(AutoModel.from_config(albert), WINDOWS)))
    assert str(error.value) == (
        "encoder.albert_layer_groups.0: is called as block 1. Only models that call each block once and in order can "
        "be walked."
    )
    model = tiny_model()
    model.config.num_hidden_layers = 1
    with pytest.raises(TargetError) as error:
        next(iter(walk_blocks(model, WINDOWS)))
    assert str(error.value) == (
        "model.layers: 1 of its 2 blocks are called. Only models that call each once can be walked."
    )


def test_a_model_that_changes_hidden_states_between_its_blocks_is_refused():
    model = tiny_model()
    model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    with pytest.raises(TargetError) as error:
        next(iter(walk_blocks(model, WINDOWS)))
    assert str(error.value) == (
        "model.layers.1: does not read what the block before it returned: the model changes the hidden states between "
        "its blocks. Such a model cannot be walked."
    )


def test_a_block_that_is_given_more_than_tensors_is_refused():
    model = tiny_model()
    model.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "memory": set()}), with_kwargs=True
    )
    with pytest.raises(TargetError) as error:
        next(iter(walk_blocks(model, WINDOWS)))
    assert str(error.value) == (
        "model.layers.0: its argument memory is a set, through which blocks could pass on more than hidden states. "
        "Such a model cannot be walked."
    )


def test_blocks_that_pass_on_more_than_hidden_states_are_refused():
    config = AutoConfig.for_model("t5", vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    for length in (8, 16):  # of the window by which blocks are known, and longer
        with pytest.raises(TargetError) as error:
            next(iter(walk_blocks(T5EncoderModel(config).eval(), tokens(2, length))))
        assert str(error.value) == (
            "encoder.block.1: its argument 2 is what a block before it returned, so blocks pass on more than hidden "
            "states. Such a model cannot be walked."
        )


def test_a_model_that_pads_its_windows_is_refused():
    config = AutoConfig.for_model("longformer", **_ROBERTA, attention_window=8)
    model = AutoModel.from_config(config).eval()
    with pytest.raises(TargetError) as error:
        next(iter(walk_blocks(model, tokens(2, 12))))
    assert str(error.value) == (
        "encoder.layer.0: reads [2, 16] hidden states for [2, 12] tokens. Give windows of a length that the model does "
        "not pad."
    )


@pytest.mark.parametrize("model_type", ["roberta", "mpnet"])
def test_positions_that_padding_takes_are_not_there_for_windows(model_type):
    model = AutoModel.from_config(AutoConfig.for_model(model_type, **_ROBERTA)).eval()
    assert len(list(walk_blocks(model, tokens(2, 62)))) == 2
    with pytest.raises(DataError) as error:
        walk_blocks(model, tokens(2, 63))
    assert str(error.value) == "windows of 63 tokens are longer than the 62 positions of the model."


def test_positions_go_by_other_names_too():
    config = AutoConfig.for_model(
        "mpt", vocab_size=64, d_model=32, n_layers=2, n_heads=4, max_seq_len=16, expansion_ratio=2
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    assert len(list(walk_blocks(model, tokens(2, 16)))) == 2
    with pytest.raises(DataError) as error:
        walk_blocks(model, tokens(2, 17))
    assert str(error.value) == "windows of 17 tokens are longer than the 16 positions of the model."


def test_settings_and_windows_that_do_not_fit_are_refused_before_anything_runs():
    model = tiny_model()

    def message(error, windows=WINDOWS, **settings):
        with pytest.raises(error) as caught:
            next(iter(walk_blocks(model, windows, **settings)))
        return str(caught.value)

    assert message(ConfigError, order="row") == "unknown order 'row'; known: block, group."
    assert message(ConfigError, propagate="both") == "unknown propagate 'both'; known: sparse, dense."
    assert message(ConfigError, needs={"mean"}) == "unknown statistic 'mean'; the walk collects squares, gram, cross."
    assert message(ConfigError, offload="tape") == "unknown offload 'tape'; known: none, cpu, disk."
    assert message(ConfigError, batch_size=0) == "batch_size is at least 1, got 0."
    assert message(ConfigError, start_block=3) == "start_block is from 0 to the 2 blocks of the model, got 3."
    assert message(ConfigError, start_block=1, needs={"cross"}) == (
        "start_block=1 with cross needs the dense model's hidden states, which pruned blocks cannot give. Pass "
        "`hidden`, as saved by the run that pruned them."
    )
    assert message(DataError, WINDOWS[0]) == "calibration needs a [windows, length] tensor of tokens, got [12]."
    for windows, found in ((WINDOWS[:0], [0, 12]), (WINDOWS[:, :0], [5, 0]), ([[1, 2]], "list"), (None, "NoneType")):
        assert message(DataError, windows) == f"calibration needs a [windows, length] tensor of tokens, got {found}."
    for dtype in (torch.float32, torch.bool):
        assert message(DataError, WINDOWS.to(dtype)) == (
            f"calibration needs the whole numbers that a tokenizer returns, got {dtype}."
        )
    assert message(DataError, WINDOWS + 60) == (
        f"the windows hold tokens from {int(WINDOWS.min()) + 60} to {int(WINDOWS.max()) + 60}, the model knows 0 to "
        "63. Use the tokenizer that belongs to the model."
    )
    assert message(DataError, tokens(1, 65)) == "windows of 65 tokens are longer than the 64 positions of the model."


# --- offload ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_offload_changes_no_bit_and_leaves_no_file(tmp_path, kind, model_type):
    def run(**settings):
        model = any_model(model_type)
        walk = walk_blocks(model, WINDOWS, needs={"gram", "cross"}, order="group", batch_size=2, **settings)
        sums = []
        for visit in walk:
            for group in visit.groups:
                sums.append(group.stats.gram.clone())
                for member in group.members:
                    prune(member)
            if settings and kind == "disk":  # nameless files, of which a kill leaves nothing
                assert list(tmp_path.iterdir()) == []
                assert f"{tmp_path}/" in Path("/proc/self/maps").read_text()
        return model, walk, sums

    plain, expected, sums = run()
    model, walk, others = run(offload=kind, offload_folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(walk.state.hidden, expected.state.hidden)
    assert all(torch.equal(one, other) for one, other in zip(sums, others, strict=True))
    state = plain.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():  # the model stays usable without the files, also to write to
        assert torch.equal(model(input_ids=WINDOWS).logits, plain(input_ids=WINDOWS).logits)
        model.model.layers[0].self_attn.q_proj.weight.mul_(2)


def test_a_full_disk_is_reported_and_the_weights_stay(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(offload.os, "posix_fallocate", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(OutputError) as error:
        next(iter(walk_blocks(model, WINDOWS, offload="disk")))
    assert str(error.value) == (
        f"{tmp_path}: cannot hold 7680 bytes of offloaded tensors (No space left on device). Choose another folder "
        "with offload_folder, or use offload='cpu'."
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["none", "cpu", "disk"])
def test_a_model_in_memory_is_walked_on_an_accelerator(kind):
    model, other = tiny_model(), tiny_model()
    walk, expected = walk_blocks(model, WINDOWS, device="cuda", offload=kind), walk_blocks(other, WINDOWS)
    for visit, visit_cpu in zip(walk, expected, strict=True):
        assert next(visit.block.parameters()).is_cuda
        for group, group_cpu in zip(visit.groups, visit_cpu.groups, strict=True):
            torch.testing.assert_close(group.stats.gram.cpu(), group_cpu.stats.gram, rtol=1e-4, atol=1e-4)
            for member in (*group.members, *group_cpu.members):
                prune(member)
    assert all(not parameter.is_cuda for parameter in model.parameters())
    state = other.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


# --- resume -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order, propagate", WAYS)
def test_a_killed_run_goes_on_at_the_last_finished_block_with_equal_bits(tmp_path, order, propagate):
    settings = {"needs": {"gram", "cross"}, "order": order, "propagate": propagate, "batch_size": 2}

    def shrink(visit):
        """A change that depends on the statistics."""
        for group in visit.groups:
            for member in group.members:
                member.set_weight(member.weight / (1 + group.stats.squares.sqrt() + group.stats.cross.diagonal().abs()))

    whole = tiny_model(num_hidden_layers=3)
    for visit in walk_blocks(whole, WINDOWS, **settings):
        shrink(visit)

    for killed_in in range(3):
        folder = tmp_path / str(killed_in)
        for attempt in range(2):
            model = tiny_model(num_hidden_layers=3)
            state = load_walk(folder, calibration.find_blocks(model), WINDOWS, "note")
            assert (state.next_block if state else 0) == attempt * killed_in
            start = state.next_block if state else 0
            for visit in walk_blocks(model, WINDOWS, start_block=start, hidden=state, **settings):
                if attempt == 0 and visit.index == killed_in:
                    prune(next(iter(visit.members.values())))
                    break
                shrink(visit)
                save_walk(folder, visit, WINDOWS, "note")
        assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_earlier_blocks_are_run_again_where_no_state_was_kept():
    model = tiny_model()
    for visit in walk_blocks(model, WINDOWS, batch_size=2):
        if visit.index == 0:
            for member in visit.members.values():
                prune(member)
        else:
            expected = [group.stats.gram for group in visit.groups]
    for visit in walk_blocks(model, WINDOWS, batch_size=2, start_block=1):
        assert visit.index == 1
        assert all(torch.equal(group.stats.gram, gram) for group, gram in zip(visit.groups, expected, strict=True))
    assert visit.index == 1


def test_a_saved_walk_of_something_else_is_refused(tmp_path):
    model = tiny_model()
    for visit in walk_blocks(model, WINDOWS):
        save_walk(tmp_path, visit, WINDOWS, "sparsity 0.5")
    stack = calibration.find_blocks(model)
    with pytest.raises(ConfigError, match="is of a run with other windows .* Resume with the same, or choose another"):
        load_walk(tmp_path, stack, WINDOWS.flip(0), "sparsity 0.5")
    with pytest.raises(ConfigError) as error:
        load_walk(tmp_path, stack, WINDOWS, "sparsity 0.7")
    assert str(error.value) == (
        f"{tmp_path / 'state.safetensors'}: is of a run with other settings ('sparsity 0.5', now 'sparsity 0.7'). "
        "Resume with the same, or choose another folder."
    )
    with pytest.raises(
        ConfigError, match="block-0.safetensors: is not of transformer.h.0. The saved run pruned another"
    ):
        load_walk(tmp_path, calibration.find_blocks(tiny_model("gpt2")), WINDOWS, "sparsity 0.5")
    state = load_walk(tmp_path, stack, WINDOWS, "sparsity 0.5")
    assert state.next_block == 2
    with pytest.raises(ConfigError) as error:
        walk_blocks(model, WINDOWS, hidden=state)
    assert str(error.value) == "hidden is the input of block 2, not of start_block=0."
    with pytest.raises(ConfigError) as error:
        walk_blocks(model, WINDOWS[:3], hidden=state, start_block=2)
    assert str(error.value) == "hidden is of windows [5, 12], got windows [3, 12]. Resume with the same windows."
    with pytest.raises(ConfigError) as error:
        walk_blocks(model, WINDOWS, hidden=state, start_block=2, needs={"cross"})
    assert str(error.value) == "cross needs the dense model's hidden states too, which this saved state does not have."


# --- a trained model --------------------------------------------------------------------------------------------


def test_a_walk_over_a_trained_model_gives_its_logits(stories_folder):
    folder = stories_folder / "models" / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    documents = load_documents(stories_folder / "data" / "tinystories", split="validation").select(range(20))
    windows = token_windows(documents, AutoTokenizer.from_pretrained(folder), 64, limit=6)
    walk = walk_blocks(model, windows, batch_size=4)
    for visit in walk:
        ranks = [torch.linalg.matrix_rank(group.stats.gram) for group in visit.groups]
        assert min(ranks) > 1
    with torch.no_grad():
        logits = model.lm_head(model.model.norm(walk.state.hidden))
        torch.testing.assert_close(logits, model(input_ids=windows.tokens.long()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way, blocks", [("none", 0), ("cpu", 2), ("disk", 2)])
def test_what_a_block_freed_goes_back_to_the_system_where_blocks_are_offloaded(monkeypatch, way, blocks):
    given_back = []
    monkeypatch.setattr(offload, "_trim", lambda: given_back.append(True))
    for visit in walk_blocks(tiny_model(), WINDOWS, offload=way):
        assert len(given_back) >= min(blocks, visit.index)
    assert bool(given_back) == bool(blocks) and len(given_back) >= blocks


@pytest.mark.parametrize("order", ["block", "group"])
def test_a_finished_block_leaves_nothing_to_the_garbage_collector(order):
    # What only a search for circles frees stays for many blocks: memory would grow with the depth of the model.
    held, alive = [], []
    model = tiny_model()
    gc.collect()
    gc.disable()
    try:
        for visit in walk_blocks(model, tokens(4, 16), needs=("gram", "cross"), order=order):
            alive.append([kind for kind, reference in held if reference() is not None])
            for group in visit.groups:
                held.append(("statistics", weakref.ref(group.stats)))
                held.append(("group", weakref.ref(group)))
            if order == "group":
                held.append(("dense block", weakref.ref(visit._dense)))
            held.append(("meter", weakref.ref(visit._meter)))
            del group
    finally:
        gc.enable()
    assert len(alive) > 1 and not any(alive)
