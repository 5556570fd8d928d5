"""DeepSeek V2 and V3: multi-head latent attention, shared and routed experts, dense first layers, multi-token prediction.

Sources: arXiv:2405.04434, 2412.19437. The published 671B of V3 leave out its multi-token prediction layer, and so does
transformers; with `num_nextn_predict_layers: 1` its 11.6B are counted and trained too. The 685B of the published files are
both, and the prediction layer's own copies of embedding and head (2 * 0.93B): 671.03 + 11.61 + 1.85 = 684.49. V3's router
correction bias is no parameter (a buffer in transformers): gradients do not train it.
"""

from __future__ import annotations

from planner.architectures import ARCHITECTURES, ModelOps
from planner.architectures._blocks import block_norm, decoder, head, standard_block
from planner.architectures._common import decoder_fields
from planner.architectures._config import MAX_LAYERS, Config
from planner.model_spec import Mla, ModelSpec
from planner.op_cost import Op
from planner.ops import Linear

MAX_SHARED_EXPERTS = 1000


@ARCHITECTURES.register("deepseek_v2", "deepseek_v3")
class DeepSeek:
    """HF words: q_lora_rank (null: direct queries), n_routed_experts, n_shared_experts, first_k_dense_replace."""

    @staticmethod
    def read(config: Config) -> ModelSpec:
        """ModelSpec of a DeepSeek configuration."""
        nope, rope = config.size("qk_nope_head_dim", 128), config.size("qk_rope_head_dim", 64)
        is_third = config.model_type == "deepseek_v3"
        config.also_called(n_routed_experts="num_local_experts" if is_third else "num_experts")
        width = config.size("moe_intermediate_size")
        shared = 0 if config.is_null("n_shared_experts") else config.size("n_shared_experts", 1 if is_third else 2, 0, MAX_SHARED_EXPERTS)
        num_mtp = config.size("num_nextn_predict_layers", 0, 0, MAX_LAYERS)
        bias = config.flag("attention_bias", False)
        # Latent attention expands keys and values to all heads, whatever num_key_value_heads says.
        fields = decoder_fields(config, max_positions=4096 if is_third else 2048)
        fields |= {"head_dim": nope + rope, "num_key_value_heads": fields["num_attention_heads"]}
        config.rule(config.size("moe_layer_freq", 1) == 1, "moe_layer_freq", "must be 1: no published model has another", "leave it out")
        # null: queries are projected directly; left out: the class default
        q_rank = config.size("q_lora_rank", 0 if config.is_null("q_lora_rank") else 1536, 0)
        return config.spec(
            family=config.model_type,
            **fields,
            tie_word_embeddings=config.flag("tie_word_embeddings", False),
            qkv_bias=bias,
            attention_out_bias=bias,
            num_mtp_layers=num_mtp,
            assumptions=(f"{num_mtp} multi-token prediction layer(s) trained beside the main model",) if num_mtp else (),
            mla=Mla(
                q_lora_rank=q_rank,
                kv_lora_rank=config.size("kv_lora_rank", 512),
                qk_nope_head_dim=nope,
                qk_rope_head_dim=rope,
                v_head_dim=config.size("v_head_dim", 128),
            ),
            moe=config.moe(
                "n_routed_experts",
                num_experts_per_token=config.size("num_experts_per_tok"),
                intermediate_size=width,
                shared_intermediate_size=width * shared,
                num_dense_layers=config.size("first_k_dense_replace", 3 if is_third else 0, 0),
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
