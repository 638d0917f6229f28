"""`hf-adaptive-sparse analyze`: what sparsity would bring to a model, and cost, before anything is done."""

import dataclasses
import json

from ..errors import ConfigError
from ..reports import Report, write_report
from . import PROGRAM
from .analysis import add_predictions, add_sensitivity, describe
from .analyze_arguments import AnalyzeArguments
from .console import print_plan, say
from .models import find_model, load_config, skeleton_of, stored_dtype
from .output import check_output, clear, command_line, versions
from .verdict import print_verdict

ARGUMENTS = AnalyzeArguments


def run(arguments: AnalyzeArguments) -> int:
    """Predict, measure what was asked for, print and report."""
    source = find_model(arguments.model)
    if source.kind == "adapter":
        raise ConfigError(
            f"MODEL {arguments.model}: is an adapter. Analyze its base model, or make a model of it first: {PROGRAM} "
            f"export {arguments.model} OUT --format dense."
        )
    output = None if arguments.output_dir is None else check_output(arguments.output_dir, arguments.overwrite)
    config = load_config(source, arguments.trust_remote_code)
    model = skeleton_of(config, arguments.trust_remote_code)
    dtype = stored_dtype(config, arguments.dtype)
    plan = {
        "model": f"{source.name} ({source.kind}, {model.num_parameters():,} parameters)",
        "machines": ", ".join(arguments.hardware),
        "sensitivity": "not measured: no --data" if arguments.data is None
        else f"on the first {arguments.sensitivity_windows} windows of {arguments.data}",
        "output": "the screen only" if output is None else f"{output}: report.json, report.html",
    }  # fmt: skip
    print_plan(f"{PROGRAM} analyze", plan, arguments.dry_run, quiet=arguments.json)
    if arguments.dry_run:
        return 0

    report = Report(
        title=f"Analysis of {arguments.model}", command=command_line("analyze"),
        settings=dataclasses.asdict(arguments), versions=versions(),
    )  # fmt: skip
    add_predictions(report, model, arguments, dtype)
    if arguments.data is not None:
        add_sensitivity(report, source, arguments)
    report.summary = describe(report, model)
    if output is not None:
        clear(output, ("report.json", "report.html"))
        say(f"report: {write_report(report, output)}")
    if arguments.json:
        print(json.dumps(report.as_json(), indent=2, ensure_ascii=False))
    else:
        print_verdict(report)
    return 0
