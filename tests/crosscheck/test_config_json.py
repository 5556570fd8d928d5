"""config.json files as transformers writes them, read as the model that transformers builds from them.

transformers renames keys from version to version (`num_experts`, `layer_types`), and leaves out what equals its defaults.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from planner.architectures import ARCHITECTURES, load_model, preset_names, preset_record

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[dev]'")

NO_CLASS = {"palm"}
NO_DEFAULT_SIZES = {"deepseek_v2"}
"""Its class has no default for num_experts_per_tok, which the planner requires."""
TELLS_MORE_THAN_THE_PRESET = {
    "deepseek-v3": "transformers writes num_nextn_predict_layers: 1; the preset leaves the prediction block out",
    "flan-t5-xl": "transformers 5 ties T5's head whatever it is told",
}
PRESETS = [name for name in preset_names() if preset_record(name)["config"]["model_type"] not in NO_CLASS and name not in TELLS_MORE_THAN_THE_PRESET]


def written(config: dict[str, Any], *, all_keys: bool) -> dict[str, Any]:
    """The config.json of `config`: every key, or only those that differ from the defaults of the class."""
    values = dict(config)
    built = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    text: dict[str, Any] = json.loads(built.to_json_string(use_diff=not all_keys))
    return text


@pytest.mark.parametrize("all_keys", [True, False], ids=["every key", "changed keys"])
@pytest.mark.parametrize("name", PRESETS)
def test_written_config_reads_as_the_preset(name: str, all_keys: bool) -> None:
    config = written(preset_record(name)["config"], all_keys=all_keys)
    assert load_model(config).model_dump(exclude={"name"}) == load_model(name).model_dump(exclude={"name"})


@pytest.mark.parametrize("model_type", sorted(set(ARCHITECTURES) - NO_CLASS - NO_DEFAULT_SIZES))
def test_defaults_of_the_class_read_as_a_model(model_type: str) -> None:
    """What transformers writes for an unconfigured model has every size, so nothing is missing or unknown."""
    config = json.loads(transformers.AutoConfig.for_model(model_type).to_json_string(use_diff=False))
    assert load_model(config).num_layers > 0
