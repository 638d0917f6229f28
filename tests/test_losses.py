"""The chunked loss against a slow reference in float64, and against what it promises."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_adaptive_sparse.errors import ConfigError, DataError, TrainingError
from hf_adaptive_sparse.losses import DistillationLoss
from tests.reference import distillation as reference

seeds = st.integers(0, 2**31 - 1)
temperatures = st.sampled_from([0.5, 1.0, 2.0, 3.0, 4.0])
kinds = st.sampled_from(["forward_kl", "reverse_kl"])
chunks = st.sampled_from([None, 1, 3, 7, 100])


def randn(*shape: int, seed: int, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def some_labels(*shape: int, vocab: int, seed: int, ignored: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, vocab, shape, generator=generator)
    return labels.masked_fill(torch.rand(shape, generator=generator) < ignored, -100)


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


class Case:
    """A batch with heads whose student parts want gradients."""

    def __init__(self, seed: int, shape=(2, 9), vocab=11, width=5, dtype=torch.float64, ignored=0.3) -> None:
        self.hidden = randn(*shape, width, seed=seed, dtype=dtype).requires_grad_()
        self.weight = randn(vocab, width, seed=seed + 1, dtype=dtype).requires_grad_()
        self.bias = randn(vocab, seed=seed + 2, dtype=dtype).requires_grad_()
        self.teacher_hidden = randn(*shape, width + 2, seed=seed + 3, dtype=dtype)
        self.teacher_weight = randn(vocab, width + 2, seed=seed + 4, dtype=dtype)
        self.labels = some_labels(*shape, vocab=vocab, seed=seed, ignored=ignored)

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.bias

    def fused(self, loss: DistillationLoss, **options):
        teacher = (self.teacher_hidden, self.teacher_weight) if loss.kd_weight else (None, None)
        options = {"student_head_bias": self.bias, **options}
        return loss.fused(self.hidden, self.weight, *teacher, self.labels, **options)

    def reference(self, loss: DistillationLoss, num_items=None, softcap=None, logit_scale=None):
        """(loss, ce, kd) in float64."""
        to = {"softcap": softcap, "logit_scale": logit_scale}
        student = reference.logits_of(*(x.double() for x in self.leaves), **to).flatten(0, -2)
        teacher = reference.logits_of(
            self.teacher_hidden.double(), self.teacher_weight.double(), **to
        ).flatten(0, -2)
        return reference.distillation(
            student,
            teacher if loss.kd_weight else None,
            reference.next_token_labels(self.labels).flatten(),
            temperature=loss.temperature,
            ce_weight=loss.ce_weight,
            kd_weight=loss.kd_weight,
            kind=loss.kind,
            num_items=num_items,
        )


@settings(deadline=None, max_examples=60)
@given(
    seed=seeds,
    temperature=temperatures,
    kind=kinds,
    chunk=chunks,
    weights=st.sampled_from([(0.67, 0.33), (1.0, 0.0), (0.0, 1.0), (0.5, 1.0)]),
    shape=st.sampled_from([(13,), (1, 1), (2, 9), (2, 3, 4)]),
    num_items=st.sampled_from([None, 5]),
    softcap=st.sampled_from([None, 3.0]),
    logit_scale=st.sampled_from([None, 0.25]),
)
def test_fused_loss_and_all_gradients_are_those_of_autograd(
    seed, temperature, kind, chunk, weights, shape, num_items, softcap, logit_scale
):
    case = Case(seed, shape)
    loss = DistillationLoss(
        temperature=temperature, kind=kind, chunk_tokens=chunk, kd_weight=weights[0], ce_weight=weights[1]
    )
    form = {"num_items": num_items, "softcap": softcap, "logit_scale": logit_scale}
    result = case.fused(loss, **form)
    expected, ce, kd = case.reference(loss, **form)
    torch.testing.assert_close((result.loss, result.ce, result.kd), (expected, ce.detach(), kd.detach()))
    torch.testing.assert_close(gradients(result.loss, *case.leaves), gradients(expected, *case.leaves))


@settings(deadline=None, max_examples=40)
@given(
    seed=seeds,
    temperature=temperatures,
    kind=kinds,
    chunk=chunks,
    kd_weight=st.sampled_from([0.0, 0.67]),
    shape=st.sampled_from([(13,), (2, 9)]),
)
def test_loss_from_logits_and_its_gradient_are_those_of_autograd(
    seed, temperature, kind, chunk, kd_weight, shape
):
    student = randn(*shape, 11, seed=seed).requires_grad_()
    teacher = randn(*shape, 11, seed=seed + 1)
    labels = some_labels(*shape, vocab=11, seed=seed)
    mix = {"temperature": temperature, "kind": kind, "kd_weight": kd_weight, "ce_weight": 0.33}
    result = DistillationLoss(chunk_tokens=chunk, **mix)(student, teacher if kd_weight else None, labels)
    expected, ce, kd = reference.distillation(
        student.flatten(0, -2),
        teacher.flatten(0, -2) if kd_weight else None,
        reference.next_token_labels(labels).flatten(),
        **mix,
    )
    torch.testing.assert_close((result.loss, result.ce, result.kd), (expected, ce.detach(), kd.detach()))
    torch.testing.assert_close(gradients(result.loss, student), gradients(expected, student))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_float32_is_within_1e_5_of_the_reference(temperature, kind):
    case = Case(0, (3, 40), vocab=301, width=16, dtype=torch.float32)
    loss = DistillationLoss(temperature=temperature, kind=kind, chunk_tokens=7)
    result, (expected, _, _) = case.fused(loss), case.reference(loss)
    torch.testing.assert_close(result.loss, expected.float(), rtol=1e-5, atol=1e-5)
    for found, wanted in zip(
        gradients(result.loss, *case.leaves), gradients(expected, *case.leaves), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_give_the_loss_of_their_values_and_gradients_of_their_dtype(dtype):
    student = randn(2, 9, 31, seed=0, dtype=dtype).requires_grad_()
    teacher, labels = randn(2, 9, 31, seed=1, dtype=dtype), some_labels(2, 9, vocab=31, seed=0)
    result = DistillationLoss(chunk_tokens=4)(student, teacher, labels)
    exact = student.detach().double().requires_grad_()
    flat = reference.next_token_labels(labels).flatten()
    expected, _, _ = reference.distillation(
        exact.flatten(0, -2),
        teacher.double().flatten(0, -2),
        flat,
        temperature=2.0,
        ce_weight=0.33,
        kd_weight=0.67,
    )
    assert result.loss.dtype == torch.float32
    torch.testing.assert_close(result.loss.double(), expected, rtol=1e-6, atol=1e-6)
    (found,), (wanted,) = gradients(result.loss, student), gradients(expected, exact)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_fused_half_precision_head_is_as_exact_as_its_dtype(dtype):
    case = Case(0, (2, 20), vocab=31, width=16, dtype=dtype)
    loss = DistillationLoss(chunk_tokens=7)
    result, (expected, _, _) = case.fused(loss), case.reference(loss)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(result.loss.double(), expected, rtol=2 * eps, atol=0.0)
    for found, wanted in zip(
        gradients(result.loss, *case.leaves), gradients(expected, *case.leaves), strict=True
    ):
        assert found.dtype == dtype
        assert (found - wanted).norm() < 8 * eps * wanted.norm()


def test_the_head_gradient_is_summed_over_chunks_in_float32():
    # One gradient, 512 times: a bfloat16 sum stops growing when a term falls under its 8 bits.
    hidden = torch.ones(512, 4, dtype=torch.bfloat16)
    weight = torch.zeros(8, 4, dtype=torch.bfloat16, requires_grad=True)
    loss = DistillationLoss(kd_weight=0.0, ce_weight=1.0, chunk_tokens=1)
    labels = torch.zeros(512, dtype=torch.int64)
    (found,) = gradients(loss.fused(hidden, weight, None, None, labels, labels_are_shifted=True).loss, weight)
    assert found[0, 0] == -0.875 and found[1, 0] == 0.125


def test_under_autocast_the_fused_loss_is_that_of_a_linear_head():
    case = Case(0, (2, 20), vocab=31, width=16, dtype=torch.float32)
    loss = DistillationLoss(chunk_tokens=7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = case.fused(loss)
        teacher_logits = torch.nn.functional.linear(case.teacher_hidden, case.teacher_weight)
        student_logits = torch.nn.functional.linear(*case.leaves)
        assert student_logits.dtype == torch.bfloat16
        plain = loss(student_logits, teacher_logits, case.labels)
    torch.testing.assert_close(fused.loss, plain.loss, rtol=1e-3, atol=0.0)
    for found, wanted in zip(
        gradients(fused.loss, *case.leaves), gradients(plain.loss, *case.leaves), strict=True
    ):
        assert found.dtype == torch.float32
        assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_labels_mean_what_they_mean_to_transformers():
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits, labels = randn(3, 8, 11, seed=0, dtype=torch.float32), some_labels(3, 8, vocab=11, seed=0)
    loss = DistillationLoss(kd_weight=0.0, ce_weight=1.0)
    torch.testing.assert_close(
        loss(logits, None, labels).loss, ForCausalLMLoss(logits, labels, vocab_size=11)
    )
    items = torch.tensor(50)
    torch.testing.assert_close(
        loss(logits, None, labels, items).loss,
        ForCausalLMLoss(logits, labels, vocab_size=11, num_items_in_batch=items),
    )


def test_labels_that_are_shifted_already_are_taken_as_they_are():
    case, loss = Case(0), DistillationLoss()
    shifted = reference.next_token_labels(case.labels)
    expected = case.fused(loss).loss
    case.labels = shifted
    assert case.fused(loss, labels_are_shifted=True).loss == expected
    logits = case.hidden @ case.weight.T
    found = loss(logits, logits * 0.5, shifted, labels_are_shifted=True).loss
    assert found == loss(logits[:, :-1], logits[:, :-1] * 0.5, shifted[:, :-1], labels_are_shifted=True).loss


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_a_student_equal_to_its_teacher_has_a_kl_of_exactly_zero_and_no_gradient(temperature, kind):
    case = Case(0, (2, 30), vocab=501, width=16, dtype=torch.float32)
    case.teacher_hidden, case.teacher_weight = case.hidden.detach(), case.weight.detach()
    loss = DistillationLoss(temperature=temperature, kd_weight=1.0, ce_weight=0.0, kind=kind, chunk_tokens=7)
    result = case.fused(loss, student_head_bias=None)
    assert result.loss == result.kd == 0.0
    for gradient in gradients(result.loss, case.hidden, case.weight):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0.0, atol=1e-7)


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("forward_kl", 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))),
        ("reverse_kl", 4 * (0.5 * math.log(2 / 3) + 0.5 * math.log(2))),
    ],
)
def test_the_kl_is_multiplied_by_the_square_of_the_temperature(kind, expected):
    # At T = 2 the teacher says 3/4 and 1/4, and the student 1/2 and 1/2.
    student = torch.zeros(1, 2, requires_grad=True)
    teacher = torch.tensor([[2 * math.log(3.0), 0.0]])
    label = torch.tensor([0])
    loss = DistillationLoss(temperature=2.0, kd_weight=1.0, ce_weight=0.0, kind=kind)
    result = loss(student, teacher, label, labels_are_shifted=True)
    assert result.kd == pytest.approx(expected, rel=1e-5)
    assert result.ce == pytest.approx(math.log(2.0), rel=1e-6)
    if kind == "forward_kl":  # T (p - q)
        assert gradients(result.loss, student)[0].tolist() == [pytest.approx([-0.5, 0.5], rel=1e-6)]


@pytest.mark.parametrize("kd_weight", [0.0, 0.67])
def test_without_a_label_that_counts_loss_and_gradients_are_zero(kd_weight):
    case = Case(0)
    case.labels = torch.full_like(case.labels, -100)
    result = case.fused(DistillationLoss(kd_weight=kd_weight))
    assert result.loss == result.ce == result.kd == 0.0
    assert all((gradient == 0.0).all() for gradient in gradients(result.loss, *case.leaves))
    logits = randn(2, 9, 11, seed=0).requires_grad_()
    result = DistillationLoss(kd_weight=kd_weight)(logits, logits * 2, case.labels, num_items=0)
    assert result.loss == 0.0 and (gradients(result.loss, logits)[0] == 0.0).all()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_nan_at_a_position_that_does_not_count_reaches_nothing(temperature, kind):
    case, loss = Case(0), DistillationLoss(temperature=temperature, kind=kind, hidden_weight=0.5)
    ignored = reference.next_token_labels(case.labels) == -100

    def everything() -> list[Tensor]:
        layers = {"student_states": [case.hidden], "teacher_states": [case.teacher_hidden[..., :5]]}
        fused = case.fused(loss, **layers).loss
        logits = (case.hidden @ case.weight.T).detach()
        logits[ignored] *= case.hidden.detach()[ignored][:, :1]  # NaN where the hidden state is
        logits.requires_grad_()
        plain = loss(logits, case.teacher_hidden @ case.teacher_weight.T, case.labels, **layers).loss
        return [fused, plain, *gradients(fused, *case.leaves), *gradients(plain, logits, case.hidden)]

    expected = everything()
    with torch.no_grad():
        case.hidden[ignored] = float("nan")
    case.teacher_hidden[ignored] = float("nan")
    assert ignored.any()
    for found, wanted in zip(everything(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0.0, atol=0.0)


def test_nan_at_a_position_that_counts_is_not_hidden():
    case = Case(0, ignored=0.0)
    with torch.no_grad():
        case.hidden[0, 0] = float("nan")
    assert case.fused(DistillationLoss()).loss.isnan()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_logits_far_apart_give_finite_numbers(temperature):
    student = torch.tensor([[1e4, -1e4, 0.0], [300.0, 0.0, -300.0]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [0.0, 300.0, -300.0]])
    loss = DistillationLoss(temperature=temperature, kd_weight=1.0, ce_weight=1.0)
    result = loss(student, teacher, torch.tensor([1, 0]), labels_are_shifted=True)
    assert result.ce == pytest.approx(1e4)
    assert result.kd == pytest.approx(temperature * (2e4 + 300.0) / 2, rel=1e-5)
    assert gradients(result.loss, student)[0].isfinite().all()


@settings(deadline=None, max_examples=15)
@given(seed=seeds, sizes=st.sampled_from([[8], [4, 4], [2, 2, 2, 2], [1, 5, 2]]), fused=st.booleans())
def test_with_num_items_the_way_a_batch_is_cut_up_does_not_matter(seed, sizes, fused):
    case, loss = Case(seed, shape=(8, 6)), DistillationLoss(chunk_tokens=5)
    items = (reference.next_token_labels(case.labels) != -100).sum()
    teacher_logits = case.teacher_hidden @ case.teacher_weight.T
    expected = gradients(case.fused(loss).loss, *case.leaves)
    total, start = 0.0, 0
    for size in sizes:
        part = slice(start, start + size)
        start += size
        hidden, labels = case.hidden[part], case.labels[part]
        if fused:
            teacher = (case.teacher_hidden[part], case.teacher_weight)
            result = loss.fused(hidden, case.weight, *teacher, labels, items, student_head_bias=case.bias)
        else:
            result = loss(hidden @ case.weight.T + case.bias, teacher_logits[part], labels, items)
        result.loss.backward()
        total += float(result.loss.detach())
    if items:
        assert total == pytest.approx(float(case.fused(loss).loss.detach()))
    torch.testing.assert_close([leaf.grad for leaf in case.leaves], expected)


def test_the_hidden_term_is_relative_and_sees_only_what_counts():
    case = Case(0)
    students = [randn(2, 9, 5, seed=7).requires_grad_(), randn(2, 9, 3, seed=8).requires_grad_()]
    teachers = [randn(2, 9, 5, seed=9) * 100, randn(2, 9, 3, seed=10)]
    counts = (reference.next_token_labels(case.labels) != -100).flatten()
    layers = {"student_states": students, "teacher_states": teachers}
    found = case.fused(DistillationLoss(hidden_weight=0.5), num_items=6, **layers)
    flat = [[x.flatten(0, 1) for x in states] for states in (students, teachers)]
    hidden = reference.hidden_distance(*flat, counts, 6)
    torch.testing.assert_close(found.hidden, hidden.detach())
    torch.testing.assert_close(found.loss, case.fused(DistillationLoss(), num_items=6).loss + 0.5 * hidden)
    torch.testing.assert_close(gradients(found.loss, *students), gradients(0.5 * hidden, *students))


def test_the_loss_is_the_weighted_sum_of_its_detached_parts():
    case = Case(0)
    loss = DistillationLoss(kd_weight=0.4, ce_weight=0.7, hidden_weight=0.1)
    result = case.fused(loss, student_states=[case.hidden], teacher_states=[case.teacher_hidden[..., :5]])
    torch.testing.assert_close(result.loss.detach(), 0.7 * result.ce + 0.4 * result.kd + 0.1 * result.hidden)
    assert not any(part.requires_grad for part in (result.ce, result.kd, result.hidden))


class Sizes(TorchDispatchMode):
    """Notes the size of every tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.made[result.untyped_storage().data_ptr()] = result.untyped_storage().nbytes()
        return result


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_the_fused_loss_makes_nothing_larger_than_a_chunk_of_logits(temperature, kind):
    case = Case(0, (4, 64), vocab=400, width=4, dtype=torch.float32)
    with Sizes() as sizes:
        result = case.fused(DistillationLoss(temperature=temperature, kind=kind, chunk_tokens=8))
        result.loss.backward()
    assert max(sizes.made.values()) == 8 * 400 * 4


def test_the_loss_from_logits_makes_one_tensor_of_their_size():
    student = randn(4, 64, 400, seed=0, dtype=torch.float32).requires_grad_()
    teacher, labels = randn(4, 64, 400, seed=1, dtype=torch.float32), some_labels(4, 64, vocab=400, seed=0)
    own = {x.untyped_storage().data_ptr() for x in (student, teacher)}
    with Sizes() as sizes:
        DistillationLoss(chunk_tokens=8)(student, teacher, labels).loss.backward()
    large = [size for pointer, size in sizes.made.items() if size > 8 * 400 * 4 and pointer not in own]
    assert large == [4 * 64 * 400 * 4]


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_requires_a_gradient_gets_one(wanted):
    case = Case(0)
    for leaf, want in zip(case.leaves, wanted, strict=True):
        leaf.requires_grad_(want)
    case.teacher_hidden.requires_grad_()
    case.teacher_weight.requires_grad_()
    case.fused(DistillationLoss()).loss.backward()
    assert [leaf.grad is not None for leaf in case.leaves] == list(wanted)
    assert case.teacher_hidden.grad is None and case.teacher_weight.grad is None


def test_without_gradients_the_loss_is_the_same_and_makes_none():
    case, loss = Case(0), DistillationLoss()
    with torch.no_grad():
        silent = case.fused(loss).loss
    assert not silent.requires_grad
    assert silent == case.fused(loss).loss


def test_gradients_are_multiplied_by_what_comes_from_above():
    case, loss = Case(0), DistillationLoss()
    expected = [3.0 * gradient for gradient in gradients(case.fused(loss).loss, *case.leaves)]
    scaled = case.fused(loss).loss
    scaled *= 3.0  # as Trainer does, in place
    torch.testing.assert_close(gradients(scaled, *case.leaves), expected)


def test_a_gradient_too_small_for_float16_survives_loss_scaling():
    logits = torch.zeros(2048, 64, dtype=torch.float16, requires_grad=True)
    labels = torch.zeros(2048, dtype=torch.int64)
    loss = DistillationLoss(kd_weight=0.0, ce_weight=1.0)(logits, None, labels, num_items=2**18).loss
    (found,) = gradients(loss * 2.0**16, logits)
    assert found[0, 1] == 2.0**16 / 64 / 2**18  # 2^-24 unscaled: under half of float16's smallest number


def test_backward_twice_is_refused():
    loss = Case(0).fused(DistillationLoss()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(TrainingError) as error:
        loss.backward()
    assert str(error.value) == (
        "backward ran twice through one distillation loss, whose gradients are made once and handed over. "
        "Add up what is to be differentiated and call backward once, or compute the loss again."
    )


def test_inputs_are_never_written_to():
    case = Case(0)
    logits = (case.hidden @ case.weight.T).detach().requires_grad_()
    inputs = [*case.leaves, case.teacher_hidden, case.teacher_weight, case.labels, logits]
    before = [x.detach().clone() for x in inputs]
    DistillationLoss()(logits, logits.detach(), case.labels).loss.backward()
    case.fused(DistillationLoss(), softcap=2.0).loss.backward()
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_a_compiled_model_around_the_loss_gets_the_same_gradients():
    torch.manual_seed(0)
    embedding, layer = torch.nn.Embedding(16, 8), torch.nn.Linear(8, 8)
    tokens, loss = torch.arange(12).view(2, 6), DistillationLoss(chunk_tokens=5)

    def step(tokens: Tensor) -> Tensor:
        hidden = torch.tanh(layer(embedding(tokens)))
        return loss.fused(hidden, embedding.weight, hidden, embedding.weight * 0.5, tokens).loss * 2

    parameters = (embedding.weight, layer.weight)
    expected = step(tokens)
    found = torch.compile(step, backend="eager")(tokens)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, *parameters), gradients(expected, *parameters))


def test_as_a_compute_loss_func_it_reads_the_outputs_and_returns_the_loss():
    case, loss = Case(0), DistillationLoss()
    student, teacher = case.hidden @ case.weight.T, case.teacher_hidden @ case.teacher_weight.T
    expected = loss(student, teacher, case.labels, 7).loss
    outputs = SimpleNamespace(logits=student, teacher_logits=teacher)
    assert loss(outputs, case.labels, num_items_in_batch=torch.tensor(7)) == expected
    alone = DistillationLoss(kd_weight=0.0)
    outputs = SimpleNamespace(logits=student)
    assert alone(outputs, case.labels, num_items_in_batch=None) == alone(student, None, case.labels).loss


@pytest.mark.parametrize("batch, accumulation", [(4, 1), (2, 2), (1, 4)])
def test_in_a_stock_trainer_accumulation_does_not_change_the_step(tmp_path, batch, accumulation):
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    class TaughtForCausalLM(LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            outputs = super().forward(input_ids, **kwargs)
            outputs["teacher_logits"] = outputs.logits.detach() * 0.5
            return outputs

    torch.manual_seed(0)
    model = TaughtForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=True,
        )
    )
    rows = [torch.arange(8 * i, 8 * i + 8) % 32 for i in range(4)]
    data = [
        {"input_ids": row, "labels": row.masked_fill(torch.arange(8) < i, -100)} for i, row in enumerate(rows)
    ]
    batch_of_all = {name: torch.stack([example[name] for example in data]) for name in data[0]}
    loss = DistillationLoss()
    outputs = model(batch_of_all["input_ids"])
    expected = loss(outputs.logits, outputs["teacher_logits"], batch_of_all["labels"]).loss
    arguments = TrainingArguments(
        tmp_path,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        logging_steps=1,
        learning_rate=0.0,
        max_grad_norm=1e9,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=data, compute_loss_func=loss)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(float(expected.detach()), rel=1e-4)
    norm = torch.stack([g.norm() for g in torch.autograd.grad(expected, list(model.parameters()))]).norm()
    assert logged["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": 0.0}, "temperature is a number > 0, got 0.0. A plain KL has 1.0."),
        ({"temperature": float("nan")}, "temperature is a number > 0, got nan. A plain KL has 1.0."),
        ({"kd_weight": -1.0}, "kd_weight is a number >= 0, got -1.0. To leave the term out write 0."),
        ({"ce_weight": -0.1}, "ce_weight is a number >= 0, got -0.1. To leave the term out write 0."),
        (
            {"hidden_weight": float("inf")},
            "hidden_weight is a number >= 0, got inf. To leave the term out write 0.",
        ),
        (
            {"kd_weight": 0.0, "ce_weight": 0.0},
            "kd_weight, ce_weight and hidden_weight are all 0. Set at least one of them.",
        ),
        ({"kind": "jsd"}, "unknown kind of distillation 'jsd'; known: forward_kl, reverse_kl."),
        ({"chunk_tokens": 0}, "chunk_tokens is at least 1, got 0. Or leave it out."),
    ],
)
def test_settings_that_cannot_be_used_are_refused(settings, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        DistillationLoss(**settings)


def refused(kind: type[Exception], message: str, call, *args, **kwargs) -> None:
    with pytest.raises(kind) as error:
        call(*args, **kwargs)
    assert str(error.value) == message


def test_a_teacher_with_another_vocabulary_is_refused():
    case = Case(0)
    message = (
        "the student's vocabulary has 11 entries and the teacher's 13, which cannot be compared one by one. "
        "Take a teacher with the student's tokenizer, or set kd_weight=0."
    )
    teacher = case.teacher_hidden, torch.zeros(13, 7, dtype=torch.float64)
    refused(ConfigError, message, DistillationLoss().fused, case.hidden, case.weight, *teacher, case.labels)
    logits = torch.zeros(2, 9, 11), torch.zeros(2, 9, 13)
    refused(ConfigError, message, DistillationLoss(), *logits, case.labels)


def test_a_kl_without_a_teacher_is_refused():
    case = Case(0)
    message = "kd_weight is 0.67, without a teacher. Give one, or set it to 0."
    refused(ConfigError, message, DistillationLoss().fused, case.hidden, case.weight, None, None, case.labels)
    message = (
        "kd_weight is 0.67, and the outputs have no `teacher_logits`, although a compute_loss_func sees "
        "nothing else. Add them in the model's forward, use AdaptiveSparseTrainer, or set kd_weight=0."
    )
    outputs = SimpleNamespace(logits=torch.zeros(2, 9, 11))
    refused(ConfigError, message, DistillationLoss(), outputs, case.labels, num_items_in_batch=None)


def test_a_teacher_of_another_batch_is_refused():
    message = "the student has 18 positions and the teacher 8. Give both the same batch."
    logits = torch.zeros(2, 9, 11), torch.zeros(2, 4, 11)
    refused(ConfigError, message, DistillationLoss(), *logits, torch.zeros(2, 9, dtype=torch.int64))


def test_labels_of_another_shape_or_none_are_refused():
    logits = torch.zeros(2, 9, 11)
    for labels, found in ((torch.zeros(2, 8, dtype=torch.int64), "labels of shape [2, 8]"), (None, "none")):
        message = f"the loss needs labels of shape [2, 9], one per position, got {found}."
        refused(DataError, message, DistillationLoss(), logits, logits, labels)


@pytest.mark.parametrize("label", [11, -1])
def test_labels_outside_the_vocabulary_are_refused(label):
    message = (
        f"labels hold {label}, and the vocabulary has 11 entries. Take the model's own tokenizer, and -100 "
        "for tokens that do not count."
    )
    logits = torch.zeros(2, 9, 11)
    refused(DataError, message, DistillationLoss(), logits, logits, torch.full((2, 9), label))


@pytest.mark.parametrize("shape", [(11, 6), (0,)])
def test_a_head_that_does_not_fit_is_refused(shape):
    case = Case(0)
    message = (
        f"a head for hidden states of width 5 has a [vocab, 5] weight, got {list(shape)}. If the head is "
        "sharded over devices, gather it first."
    )
    case.weight = torch.zeros(shape, dtype=torch.float64)
    refused(ConfigError, message, case.fused, DistillationLoss())


def test_a_hidden_term_without_states_is_refused():
    message = (
        "the hidden term compares `student_states` with `teacher_states` of the same shapes, got [[2, 9, "
        "5]] and []. Give both, or set hidden_weight=0."
    )
    case = Case(0)
    refused(
        ConfigError, message, case.fused, DistillationLoss(hidden_weight=1.0), student_states=[case.hidden]
    )
