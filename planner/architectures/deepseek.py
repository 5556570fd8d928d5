"""DeepSeek V2 and V3: multi-head latent attention, shared and routed experts, dense first layers, multi-token prediction.

Sources: arXiv:2405.04434, 2412.19437. The published 671B of V3 leave out its multi-token prediction layer; with
`num_nextn_predict_layers: 1` that layer (11.5B) is counted and trained too. V3's router correction bias is no parameter: it is not trained
by gradients.
"""

from __future__ import annotations

from planner.architectures import ARCHITECTURES, ModelOps
from planner.architectures._blocks import block_norm, decoder, head, standard_block
from planner.architectures._common import decoder_fields
from planner.architectures._config import Config
from planner.model_spec import Mla, ModelSpec, Moe
from planner.op_cost import Op
from planner.ops import Linear


@ARCHITECTURES.register("deepseek_v2", "deepseek_v3")
class DeepSeek:
    """HF words: q_lora_rank (null: direct queries), n_routed_experts, n_shared_experts, first_k_dense_replace."""

    @staticmethod
    def read(config: Config) -> ModelSpec:
        """ModelSpec of a DeepSeek configuration."""
        nope, rope = config.size("qk_nope_head_dim"), config.size("qk_rope_head_dim")
        width = config.size("moe_intermediate_size")
        fields = {**decoder_fields(config), "head_dim": nope + rope}
        return config.spec(
            family=str(config.values["model_type"]),
            **fields,
            tie_word_embeddings=config.flag("tie_word_embeddings", False),
            num_mtp_layers=config.size("num_nextn_predict_layers", 0, 0),
            mla=Mla(
                q_lora_rank=config.size("q_lora_rank", 0, 0),
                kv_lora_rank=config.size("kv_lora_rank"),
                qk_nope_head_dim=nope,
                qk_rope_head_dim=rope,
                v_head_dim=config.size("v_head_dim"),
            ),
            moe=Moe(
                num_experts=config.size("n_routed_experts"),
                num_experts_per_token=config.size("num_experts_per_tok"),
                intermediate_size=width,
                shared_intermediate_size=width * config.size("n_shared_experts", 0, 0),
                num_dense_layers=config.size("first_k_dense_replace", 0, 0),
                layer_period=config.size("moe_layer_freq", 1),
            ),
        )

    @staticmethod
    def ops(spec: ModelSpec) -> ModelOps:
        """Ops from embedding to loss, with the prediction layers last."""
        main = decoder(spec)
        if not spec.num_mtp_layers:
            return main
        h = spec.hidden_size
        shared = spec.model_copy(update={"tie_word_embeddings": True})
        join = Linear(name="mtp.join", in_features=2 * h, out_features=h, split="none")
        norms = (block_norm(spec, "mtp.hidden_norm"), block_norm(spec, "mtp.embedding_norm"))
        block: tuple[Op, ...] = (*norms, join, *standard_block(spec, spec.num_layers - 1), *head(shared))
        layers = (*main.layers, *[len(main.blocks)] * spec.num_mtp_layers)
        return ModelOps(main.embedding, (*main.blocks, ("prediction block", block)), layers, main.head)
