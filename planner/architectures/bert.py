"""BERT: encoder with learned positions and token types, norms after each branch, masked-language-model head.

Source: arXiv:1810.04805. Counted as HF's BertForMaskedLM: without the pooler, with the head's transform and output bias.
"""

from __future__ import annotations

from planner.architectures import ARCHITECTURES, ModelOps
from planner.architectures._blocks import Ops, attention, block_norm, decoder, dropout, enter, feed_forward, head, leave, residual
from planner.architectures._common import decoder_fields
from planner.architectures._config import Config
from planner.model_spec import ModelSpec
from planner.ops import Elementwise, Linear


def _block(spec: ModelSpec, layer: int) -> Ops:
    """norm(x + attention(x)), then norm(x + feed-forward(x))."""
    return (
        *enter(spec, "attention"), *attention(spec, normed="residual"), *leave(spec, "attention"),
        *dropout(spec, "attention_dropout"), *residual(spec, "attention_add"),
        block_norm(spec, "attention_norm"),
        *enter(spec, "mlp"), *feed_forward(spec), *leave(spec, "mlp"), *dropout(spec, "mlp_dropout"), *residual(spec, "mlp_add"),
        block_norm(spec, "mlp_norm"),
    )  # fmt: skip


@ARCHITECTURES.register("bert")
class Bert:
    """Every position is predicted in the cost model, as HF's class computes it."""

    @staticmethod
    def read(config: Config) -> ModelSpec:
        """ModelSpec of a BERT configuration."""
        fields = {
            **decoder_fields(config, act="gelu", max_positions=512),
            "attention_dropout": config.fraction("attention_probs_dropout_prob", 0.1),
        }
        return config.spec(
            family="bert",
            assumptions=("the head runs on every position, masked or not",),
            **fields,
            tie_word_embeddings=config.flag("tie_word_embeddings", True),
            position="learned",
            norm="layernorm",
            norm_bias=True,
            is_gated=False,
            qkv_bias=True,
            attention_out_bias=True,
            mlp_bias=True,
            head_bias=True,
            has_embedding_norm=True,
            has_final_norm=False,
            is_causal=False,
            num_token_types=config.size("type_vocab_size", 2),
            hidden_dropout=config.fraction("hidden_dropout_prob", 0.1),
        )

    @staticmethod
    def ops(spec: ModelSpec) -> ModelOps:
        """Ops from embedding to loss."""
        h = spec.hidden_size
        transform: Ops = (
            Linear(name="transform", in_features=h, out_features=h, bias=True, split="none", is_adapted=False),
            Elementwise(name="transform.activation", reads=h, writes=h, saves=(("matmul", h),)),
            block_norm(spec, "transform_norm", "activation"),
        )
        main = decoder(spec, _block)
        return ModelOps(main.embedding, main.blocks, main.layers, (*transform, *head(spec)))
