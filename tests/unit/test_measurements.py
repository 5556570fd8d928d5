"""Rows of a table of measurements: read strictly, expressed as requests, skipped only with a reason."""

from pathlib import Path

import pytest

from planner.errors import InputError
from planner.estimate import estimate
from planner.files import DATA_DIR, to_json
from planner.measured_requests import stack_of, to_request
from planner.measured_values import predicted_memory_bytes
from planner.measurements import REQUIRED_COLUMNS, Measurement, read_rows
from planner.units import GIB
from planner.validation import validate_rows

ANCHORS = {row.id: row for row in read_rows(DATA_DIR / "measurements" / "anchors.csv")}
PLAIN = ANCHORS["megatron-t1-7.5b"]


def changed(**cells: str) -> Measurement:
    return Measurement({name: cell for name, cell in (PLAIN.values | cells).items() if cell})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "lacks the columns"),
        ("id,source\n1,2\n", "lacks the columns framework"),
        (",".join(REQUIRED_COLUMNS) + "\na,b\n", "has 2 cells under 10 columns"),
        (",".join(REQUIRED_COLUMNS) + "\n" + "a" + "," * 9 + "\na" + "," * 9 + "\n", "once in the file"),
        ('id,"source\n', "must be a CSV file"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=said):
        read_rows(path)


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"hidden_size": "many"}, "hidden_size = 'many': must be a positive number"),
        ({"num_layers": "-3"}, "must be a positive number"),
        ({"measured_tflops_per_device": "nan"}, "must be a positive number"),
        ({"seq_len": ""}, "seq_len = None: was not published"),
        ({"arch_family": "mamba2-hybrid"}, "is no architecture that the planner knows"),
        ({"micro_batch_size": ""}, "micro_batch_size = None: was not published"),
        ({"accelerator": "abacus"}, "known names"),
        ({"job": "distillation"}, "is no job of the planner"),
        ({"optimizer": "SOAP"}, "is no optimizer of the planner"),
        ({"sharding": "zero-3 +opt offload", "zero_stage": "3"}, "host memory"),
        ({"dp": "7"}, "disagrees with num_devices"),
        ({"measured_tflops_per_device": ""}, "neither time nor memory"),
        ({"flops_definition": "unknown"}, "neither time nor memory"),
    ],
)
def test_rows_that_cannot_be_expressed_are_skipped_with_the_reason(cells: dict[str, str], reason: str) -> None:
    report = validate_rows([changed(**cells)])
    assert not report.per_row
    assert reason in report.skipped[0].reason
    assert report.throughput.median_abs_error_fraction is None
    to_json(report.to_dict())


def test_being_far_off_is_no_reason() -> None:
    report = validate_rows([changed(measured_step_s="1e-6"), changed(id="slow", measured_step_s="1e6")])
    assert not report.skipped
    assert report.throughput.interval_coverage_fraction == 0


@pytest.mark.parametrize(
    ("framework", "year", "stack"),
    [
        ("Megatron-LM", "2021", "megatron-2021"), ("Megatron-LM/Core CI", "2026", "megatron-core"),
        ("Megatron-DeepSpeed", "2022", "megatron-deepspeed"),
        ("Megatron-DeepSpeed", "2023", "megatron-deepspeed"), ("HF Trainer + DeepSpeed ZeRO", "2022", "deepspeed"),
        ("NeMo 2/Megatron-Core", "2025", "nemo"),
        ("Megatron-Bridge (NeMo 26.04)", "2026", "nemo"), ("llm-foundry/Composer FSDP", "2023", "llm-foundry"), ("MaxText", "2024", "maxtext"),
        ("torchtitan", "2025", "torchtitan"), ("LitGPT", "2024", "litgpt"), ("nanotron", "2024", "nanotron"), ("", "", "torch-eager"),
    ],
)  # fmt: skip
def test_stacks_by_framework_and_year(framework: str, year: str, stack: str) -> None:
    assert stack_of(Measurement({"framework": framework} | ({"year": year} if year else {}))) == stack


def test_time_can_be_published_in_any_of_four_ways() -> None:
    step_s = validate_rows([PLAIN]).per_row[0].measured_step_s
    assert step_s is not None
    tokens_per_s = 512 * 2048 / 128 / step_s
    for cells in ({"measured_step_s": repr(step_s)}, {"measured_tokens_per_s_per_device": repr(tokens_per_s)}, {"measured_mfu": repr(142 / 312)}):
        row = changed(**{"measured_tflops_per_device": "", **cells})
        assert validate_rows([row]).per_row[0].measured_step_s == pytest.approx(step_s, rel=1e-9)


def test_memory_is_compared_in_the_sense_in_which_it_was_measured() -> None:
    plan = estimate(to_request(PLAIN))
    states, torch, device = (
        predicted_memory_bytes(plan, definition) for definition in ("breakdown figure", "torch max allocated", "nvidia-smi, GB as printed")
    )
    assert states < torch < device == plan.memory.peak_bytes.value
    report = validate_rows([changed(measured_peak_mem_gib=repr(device / GIB), mem_definition="nvidia-smi")])
    assert report.memory.median_abs_error_fraction == pytest.approx(0, abs=1e-9)
    assert report.memory.interval_coverage_fraction == 1
