"""What blanks and notes of a published run are taken to mean, and that each such guess is listed."""

import pytest

from planner.architectures import load_model
from planner.errors import InputError
from planner.files import DATA_DIR
from planner.graph import count_params
from planner.measured_requests import inferred, stack_of, to_request
from planner.measurements import Measurement, read_rows
from planner.validation import validate_rows

PLAIN = next(row for row in read_rows(DATA_DIR / "measurements" / "anchors.csv") if row.id == "megatron-t1-7.5b")
NEMO = {"framework": "NeMo 2/Megatron-Core", "year": "2025", "accelerator": "h100-80gb-sxm", "precision": "bf16"}
MIXTURE = {
    "arch_family": "gpt-moe", "hidden_size": "512", "num_layers": "12", "num_heads": "8", "num_kv_heads": "8", "ffn_hidden": "2048", "vocab": "50257",
    "num_experts": "8", "top_k": "2", "num_devices": "8", "dp": "8", "tp": "1", "pp": "1", "global_batch_size": "32", "micro_batch_size": "4",
}  # fmt: skip


def changed(**cells: str) -> Measurement:
    return Measurement({name: cell for name, cell in (PLAIN.values | cells).items() if cell})


def said(row: Measurement, name: str) -> str:
    return next((text for text in inferred(row) if text.startswith(name)), "")


@pytest.mark.parametrize(
    ("cells", "stack"),
    [
        ({"framework": "PyTorch 2.8.0, ROCm 7.0"}, "nemo"),
        ({"framework": "LLMBoost 1.2.0"}, "nemo"),
        ({"framework": "PyTorch", "notes": "layout from 'config_XE_1x8x2xtp2pp1cp1.sh'"}, "nemo"),
        ({"framework": "PyTorch"}, "torch-eager"),
        ({"framework": "PyTorch", "compile": "true"}, "torch-compile"),
        ({"framework": "ms-swift DeepSpeed"}, "deepspeed"),
        ({"framework": "Megatron-SWIFT"}, "megatron-core"),
        ({"framework": "Paxml", "accelerator": "h100-80gb-sxm"}, "xla-gpu"),
        ({"framework": "Paxml", "accelerator": "tpu-v4"}, "maxtext"),
        ({"framework": "NeMo Megatron (Neuron)", "accelerator": "trainium1"}, "neuronx"),
        ({"framework": "optimum-habana", "accelerator": "gaudi2"}, "optimum-habana"),
        ({"framework": "nanochat"}, "torch-compile"),
    ],
)
def test_stacks_of_frameworks_devices_and_configuration_files(cells: dict[str, str], stack: str) -> None:
    assert stack_of(Measurement({"year": "2025", **cells})) == stack


def test_layers_and_heads_of_a_gpt_whose_size_is_in_its_name() -> None:
    row = changed(model="GPT 7.5B", num_layers="", num_heads="", params_total="")
    model = to_request(row)["model"]
    assert model["n_layer"] == int(PLAIN.values["num_layers"])
    assert row.count("hidden_size") % model["n_head"] == 0
    assert "parameters in the model's name" in said(row, "num_layers 36")
    assert said(row, "num_heads")
    report = validate_rows([changed(model="GPT", num_layers="", params_total="")])
    assert "num_layers = None: was not published" in report.skipped[0].reason


def test_pipeline_stages_decide_between_numbers_of_layers() -> None:
    """Of a 194B GPT of width 14400: 76.5 layers by its parameters, 76 + 2 by six stages."""
    blank = dict.fromkeys(("ffn_hidden", "num_layers", "num_heads", "num_kv_heads", "params_total", "vpp"), "")
    sizes = {"hidden_size": "14400", "vocab": "250880", "pp": "6", "tp": "8", "dp": "8", "num_devices": "384", "global_batch_size": "2048"}
    row = changed(model="GPT 194B", micro_batch_size="1", **blank, **sizes)
    assert to_request(row)["model"]["n_layer"] == 76


def test_gpt_with_experts_gated_or_not() -> None:
    gated, plain = (changed(**MIXTURE, notes=notes, model="m") for notes in ("bias-free", "no glu; bias-free"))
    sizes = [count_params(load_model(to_request(row)["model"]))["total"] for row in (gated, plain)]
    assert sizes[0] - sizes[1] == 12 * 8 * 512 * 2048
    assert said(plain, "architecture gpt-moe")


def test_stand_ins_of_megatrons_gpt_drop_out_as_it_does() -> None:
    heads = {"num_heads": "32", "num_kv_heads": "8", "hidden_size": "4096"}
    for cells in (MIXTURE, heads, {}):
        for framework, rate in (("Megatron-LM/Core CI", 0.1), ("NeMo 2/Megatron-Core", 0.0)):
            spec = load_model(to_request(changed(**cells, framework=framework, year="2025"))["model"])
            assert (spec.hidden_dropout, spec.attention_dropout) == (rate, rate)


def test_notes_of_experts_and_latent_attention_are_read() -> None:
    notes = "moe ffn 1024; moe layer freq ([0]*1+[1]*11); shared expert 512; no glu"
    model = to_request(changed(**MIXTURE, notes=notes))["model"]
    assert model["model_type"] == "qwen2_moe"
    assert (model["moe_intermediate_size"], model["shared_expert_intermediate_size"], model["mlp_only_layers"]) == (1024, 512, [0])
    latent = "; mla q-lora-rank=256 kv-lora-rank=128 qk-head-dim=128 qk-pos-emb-head-dim=64 v-head-dim=128; mtp layers 1"
    spec = load_model(to_request(changed(**MIXTURE, notes="moe ffn 1024; shared expert 1024" + latent))["model"])
    assert spec.mla is not None
    assert (spec.mla.q_lora_rank, spec.mla.kv_lora_rank, spec.num_mtp_layers) == (256, 128, 1)


def test_batch_per_rank_of_the_notes_is_one_microbatch() -> None:
    cells = {"framework": "ColossalAI", "num_devices": "8", "dp": "8", "tp": "1", "pp": "1", "zero_stage": "2", "sharding": "zero-2"}
    row = changed(**cells, global_batch_size="", micro_batch_size="", vpp="", notes="batch size per DP 36")
    request = to_request(row)
    assert (request["workload"]["global_batch_size"], request["layout"]["micro_batch_size"]) == (288, 36)
    assert "notes" in said(row, "global_batch_size")
    assert "micro_batch_size" in validate_rows([changed(**cells, micro_batch_size="", vpp="")]).skipped[0].reason


def test_packed_sequences_go_one_by_one_in_nemo() -> None:
    notes = 'enabled_features {"sequence_packing": "offline"}'
    row = changed(**NEMO, micro_batch_size="", notes=notes)
    assert to_request(row)["layout"]["micro_batch_size"] == 1
    assert "one by one" in said(row, "micro_batch_size")
    with pytest.raises(InputError, match="micro_batch_size"):
        to_request(changed(micro_batch_size="", notes=notes))


def test_experts_without_a_column_take_the_fewest_ranks_with_which_they_fit() -> None:
    cells = {
        "arch_family": "mixtral-moe", "hidden_size": "4096", "num_layers": "32", "num_heads": "32", "num_kv_heads": "8", "ffn_hidden": "14336",
        "vocab": "32000", "num_experts": "8", "top_k": "2", "tied_embeddings": "false", "params_total": "", "seq_len": "4096", "num_devices": "64",
        "dp": "", "tp": "1", "pp": "4", "vpp": "", "global_batch_size": "256", "micro_batch_size": "1", "recompute": "",
    }  # fmt: skip
    row = changed(**NEMO, **cells)
    ep = to_request(row)["layout"]["ep"]
    assert 1 < ep <= 8
    assert "fewest ranks" in said(row, f"ep {ep}")
    assert to_request(changed(**NEMO, **cells, ep="8"))["layout"]["ep"] == 8


@pytest.mark.parametrize(
    ("cells", "recompute"),
    [
        ({"recompute": "full (uniform, 1 layers)"}, "full"),
        ({"recompute": "selective modules=core_attn"}, "selective"),
        ({"recompute": "selective modules=mlp,core_attn"}, "selective"),
        ({"recompute": ""}, "none"),
        ({"recompute": "", "framework": "ms-swift DeepSpeed", "micro_batch_size": "1"}, "full"),
        ({"recompute": "", "flops_definition": "unknown", "implied_flops_per_token": "8e9", "model_flops_per_token_6N_attn_full": "6e9"}, "full"),
        ({"recompute": "", "flops_definition": "model", "implied_flops_per_token": "8e9", "model_flops_per_token_6N_attn_full": "6e9"}, "none"),
        ({"recompute": "none", "flops_definition": "unknown", "implied_flops_per_token": "8e9", "model_flops_per_token_6N_attn_full": "6e9"}, "none"),
    ],
)
def test_recompute_is_the_nearest_that_can_be_expressed(cells: dict[str, str], recompute: str) -> None:
    row = changed(**cells)
    assert to_request(row)["workload"]["recompute"] == recompute
    assert bool(said(row, "recompute")) == (not cells["recompute"] or "modules" in cells["recompute"])


def test_a_peak_alone_needs_neither_replicas_nor_whole_rounds() -> None:
    alone = {"measured_tflops_per_device": "", "measured_peak_mem_gib": "20", "mem_definition": "torch max allocated", "zero_stage": "0"}
    row = changed(**alone, num_devices="", dp="", tp="2", pp="4", vpp="")
    assert to_request(row)["cluster"]["num_devices"] == 8
    assert "replicas do not change" in said(row, "num_devices")
    uneven = changed(**alone, num_devices="4", dp="1", tp="1", pp="4", vpp="3", global_batch_size="10", micro_batch_size="1")
    assert to_request(uneven)["workload"]["global_batch_size"] == 12
    assert "published as 10" in said(uneven, "global_batch_size 12")
    with pytest.raises(InputError, match="num_devices"):
        to_request(changed(num_devices=""))


def test_cores_are_told_as_chips() -> None:
    row = changed(framework="NeuronX Distributed", accelerator="trainium1", precision="bf16", num_devices="16", dp="4", tp="8", pp="1", vpp="")
    assert to_request(row)["layout"]["tp"] == 4
    assert "published in cores as 8" in said(row, "tp 4")


def test_activations_in_host_memory_cannot_be_expressed() -> None:
    report = validate_rows([changed(notes="fine-grained activation offloading")])
    assert "host memory" in report.skipped[0].reason


def test_results_list_the_assumptions() -> None:
    row = changed(optimizer="")
    (result,) = validate_rows([row]).per_row
    assert result.assumptions == inferred(row)
    assert any(text.startswith("optimizer adamw: not published") for text in result.assumptions)


@pytest.mark.parametrize(
    ("flag", "is_consistent"), [("", True), ("ok", True), ("unchecked(no flop formula for this arch)", True), ("step_vs_tokens:+100%", False)]
)
def test_figures_that_disagree_are_flagged(flag: str, is_consistent: bool) -> None:
    assert changed(consistency_flag=flag).is_consistent is is_consistent
