"""The parts of an analysis, one by one added to its report."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..errors import DataError, TargetError
from ..families import FAMILIES, stock_type
from ..hardware import HARDWARE, Hardware, custom_hardware
from ..hf.block_shapes import block_shapes
from ..hf.data import data_digest, eval_protocol, load_documents, token_windows
from ..hf.layer_sensitivity import layer_sensitivity
from ..hf.linear_inventory import linear_inventory
from ..hf.machine import measured_hardware
from ..hf.model_sizes import footprints, model_work
from ..hf.predictions import CAP_NOTES, COST_NOTES, caps, costs
from ..reports import CapRow, CostRow, LinearRow, Report, SensitivityRow, SizeRow
from ..reports.text import human_bytes
from .analyze_arguments import THIS, AnalyzeArguments
from .console import Progress, say
from .models import ModelSource, load_dense, load_tokenizer, pick_device


def machines(arguments: AnalyzeArguments, dtype: torch.dtype) -> list[Hardware]:
    """What was asked for; this machine is measured here."""
    found = []
    for name in dict.fromkeys(arguments.hardware):
        if name == THIS:
            device = pick_device(arguments.device)
            say(f"measuring {device} ...")
            found.append(measured_hardware(device, dtype))
        elif name in HARDWARE:
            found.append(HARDWARE[name])
        else:
            found.append(custom_hardware(arguments.gb_per_second or 0.0, arguments.gflop_per_second or 0.0))
    return found


def add_predictions(
    report: Report, model: PreTrainedModel, arguments: AnalyzeArguments, dtype: torch.dtype | None
) -> None:
    """Which matrices qualify, sizes, caps and costs."""
    dtype = dtype or torch.float32
    skip = arguments.skip or ()
    kinds = linear_inventory(model, skip)
    report.linears = [
        LinearRow(
            name=kind.name, shape=kind.shape, count=kind.count, sparse=kind.sparse, packed=kind.packed,
            reason=kind.reason,
        )
        for kind in kinds
    ]  # fmt: skip
    sizes = footprints(kinds, model, dtype)
    dense = sizes["dense"]
    report.forms = [
        SizeRow(
            form=form, file_bytes=size.file_bytes, file_ratio=size.file_bytes / dense.file_bytes,
            token_bytes=size.token_bytes, token_ratio=size.token_bytes / dense.token_bytes,
        )
        for form, size in sizes.items()
    ]  # fmt: skip
    try:
        prompt_shapes = block_shapes(model, arguments.prompt, skip)
        shapes = block_shapes(model, arguments.window, skip)
    except TargetError as problem:
        report.notes.append(f"Caps and costs are not predicted: {problem}")
        return
    work = model_work(model, kinds, prompt_shapes, arguments.prompt, dtype)
    train_work = model_work(model, kinds, shapes, arguments.window, dtype)
    name = str(dtype).removeprefix("torch.")
    for machine in machines(arguments, dtype):
        found = caps(sizes, work, machine, name, batch=arguments.sequences, context=arguments.context)
        report.caps += [
            CapRow(
                hardware=machine.name, form=cap.form, decode=cap.decode, decode_speedup=cap.decode / found[0].decode,
                prefill=cap.prefill, prefill_speedup=cap.prefill / found[0].prefill, memory_bytes=cap.memory_bytes,
                fits=cap.fits,
            )
            for cap in found
        ]  # fmt: skip
        # As the jobs themselves have it: on a CPU they compute in float32 unless told otherwise.
        on_cpu = machine.name.startswith(THIS) and pick_device(arguments.device).type == "cpu"
        in_jobs = torch.float32 if on_cpu and arguments.dtype == "auto" else dtype
        jobs = costs(
            model, kinds, shapes, train_work, machine, in_jobs, calibration_windows=arguments.calibration_windows,
            window=arguments.window, train_tokens=arguments.train_tokens, batch_size=arguments.batch_size, skip=skip,
            in_host_memory=on_cpu or machine.memory_bytes is None,
        )  # fmt: skip
        report.costs += [CostRow(hardware=machine.name, **vars(job)) for job in jobs]
        rates = ", ".join(f"{rate / 1e12:,.4g} TFLOP/s in {each}" for each, rate in machine.flops_per_second.items())
        memory = "" if machine.memory_bytes is None else f", {human_bytes(int(machine.memory_bytes))} of memory"
        report.notes.append(
            f"{machine.name}: {machine.bytes_per_second / 1e9:,.4g} GB/s, {rates}{memory}, 2:4 products "
            f"{machine.sparse_factor:g} times as fast. Source: {machine.source}."
        )
    report.notes += [*CAP_NOTES, *COST_NOTES]
    if work.kv_bytes is None:
        report.notes.append("The cache of keys and values is not counted: the configuration does not say its size.")


def add_sensitivity(report: Report, source: ModelSource, arguments: AnalyzeArguments) -> None:
    """Measure every matrix on the text."""
    assert arguments.data is not None
    tokenizer = load_tokenizer(source, arguments.trust_remote_code)
    protocol = eval_protocol(source.name)
    options = {"split": arguments.split, "column": arguments.column}
    try:
        windows = token_windows(
            load_documents(arguments.data, **options), tokenizer, arguments.window, protocol.prefix, protocol.suffix,
            limit=arguments.sensitivity_windows,
        )  # fmt: skip
    except DataError as problem:
        raise DataError(f"{arguments.data}: {problem}") from problem
    model = load_dense(source, arguments.dtype, arguments.device, arguments.trust_remote_code)
    with Progress("sensitivity of block", model.config.get_text_config().num_hidden_layers) as progress:
        found = layer_sensitivity(
            model, windows, batch_size=arguments.batch_size, skip=arguments.skip or (),
            measure=arguments.measure_loss, on_block=lambda done, _: progress.update(done),
        )  # fmt: skip
    report.sensitivity = [
        SensitivityRow(
            module=each.name, shape=each.shape, error=each.error, trace=each.trace, loss=each.loss,
            measured=each.measured,
        )
        for each in found
    ]  # fmt: skip
    report.data = {
        "text": arguments.data, "windows": len(windows), "tokens in a window": arguments.window,
        "sha256": data_digest(arguments.data, **options),
    }  # fmt: skip


def describe(report: Report, model: PreTrainedModel) -> list[str]:
    """The verdict in a few lines."""
    packed = sum(row.count for row in report.linears if row.packed)
    matrices = sum(row.count for row in report.linears)
    forms = {row.form: row for row in report.forms}
    lines = [
        f"{packed} of {matrices} matrices can be 2:4 and packed: {human_bytes(forms['dense'].file_bytes)} become "
        f"{human_bytes(forms['2:4'].file_bytes)} on disk, {forms['2:4'].file_ratio:.4f} of dense."
    ]
    for row in report.caps:
        if row.form == "2:4":
            fits = "" if row.fits is not False else "; it does not fit its memory"
            lines.append(
                f"{row.hardware}: 2:4 is at most {row.decode_speedup:.2f} times as fast as dense while decoding, and "
                f"{row.prefill_speedup:.2f} times on prompts{fits}."
            )
    if report.sensitivity:
        worst = sorted(report.sensitivity, key=lambda row: row.loss, reverse=True)[:3]
        named = ", ".join(f"{row.module} ({row.loss:.3g} nats per token)" for row in worst)
        lines.append(f"Most sensitive to 2:4: {named}.")
    else:
        lines.append("How much each matrix suffers was not measured: that takes --data and the weights.")
    if stock_type(model.config.model_type) not in FAMILIES:
        lines.append(
            f"train has no default targets for models of type {model.config.model_type!r}: name them with "
            "--target-modules, or write all-linear."
        )
    return lines
