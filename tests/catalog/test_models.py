"""Every preset: sourced, dated, loads, and counts what was published."""

from __future__ import annotations

import re

import pytest

from planner.architectures import load_model, preset_names, preset_record
from planner.graph import count_params
from planner.units import parse_count

MUST_EXIST = {
    "gpt2", "bert-base", "bert-large", "gpt3-175b", "palm-8b", "palm-62b", "palm-540b", "llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b",
    "mixtral-8x7b", "deepseek-v3", "qwen3-30b-a3b", "qwen3-235b-a22b",
}  # fmt: skip
NAMED_ROUGHLY = {
    "bert-large": "arXiv:1810.04805 rounds to tens of millions, and counts the pooler but not the head of masked language modelling",
    "falcon-40b": "41.3B is called 40B",
    "falcon-180b": "178.6B is called 180B",
    "gpt3-13b": "12.85B is called 13.0B: the paper's width of 5140 is not divisible by 40 heads, 5120 is meant",
    "llama-2-70b": "68.98B is called 70B",
    "t5-base": "222.9M is called 220M",
    "t5-large": "737.7M is called 770M",
}
"""Presets further from the published figure than its last digit, and why; all within 5%."""


def steps_off(published: str, total: float) -> float:
    """How far `total` lies from `published`, in units of the last digit printed."""
    found = re.fullmatch(r"\d+(?:\.(\d+))?([KMBT]?)", published)
    assert found, published
    value = parse_count(published)
    unit = parse_count(f"1{found[2]}") / 10 ** len(found[1] or "")
    return (total - value) / unit


def test_there_are_at_least_40_and_the_named_ones() -> None:
    assert len(preset_names()) >= 40
    assert set(preset_names()) >= MUST_EXIST


@pytest.mark.parametrize("name", preset_names())
def test_count_is_the_published_one(name: str) -> None:
    record = preset_record(name)
    total = count_params(load_model(name))["total"]
    assert total == record["params"], "the exact count stored beside the published one"
    off = steps_off(str(record["published_params"]), total)
    if name in NAMED_ROUGHLY:
        assert not -0.5 <= off < 1, "the exception is no longer needed"
        assert total == pytest.approx(parse_count(record["published_params"]), rel=0.05)
    else:
        assert -0.5 <= off < 1, "authors round to the last digit, or cut behind it"


@pytest.mark.parametrize("name", preset_names())
def test_preset_is_sourced_dated_and_named_after_its_size(name: str) -> None:
    record = preset_record(name)
    active = {"active_params"} if load_model(name).is_moe else set()
    assert set(record) == {"published_params", "params", "source", "date", "config"} | active
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", record["date"])
    assert len(record["source"]) > 8
    assert re.fullmatch(r"[a-z0-9.-]+", name)


@pytest.mark.parametrize("name", [name for name in preset_names() if "active_params" in preset_record(name)])
def test_active_parameters_are_the_published_ones(name: str) -> None:
    """Some count the input embedding, of which a token reads one row (Mixtral, Qwen), some do not (GPT-OSS, DeepSeek-V2-Lite)."""
    counts = count_params(load_model(name))
    published = parse_count(preset_record(name)["active_params"])
    assert published == pytest.approx(counts["active"], rel=0.02) or published == pytest.approx(counts["active"] - counts["embedding"] / 2, rel=0.025)
