"""Which samples a step reads, on which rank."""

import json

import numpy as np
import pytest
import torch

from planner.errors import InputError
from reftrain.batches import MASK_ID, open_batches
from reftrain.config import load_run_config
from reftrain.data import TokenDataset, TokenWriter
from reftrain.kernels import IGNORED
from reftrain.parallel import Ranks

SEQ_LEN = 8


def write_data(folder, num_tokens=400, vocab_size=256):
    with TokenWriter(folder, vocab_size=vocab_size, end_of_text_id=0, tokenizer_sha256="0" * 64, shard_tokens=150) as writer:
        writer.add([1 + i % (vocab_size - 1) for i in range(num_tokens)], 2 * num_tokens)


def config_of(tmp_path, *, dp=1, micro=2, model_type="gpt2", batch=16):
    names = {
        "gpt2": ("n_embd", "n_layer", "n_head", "n_positions"),
        "bert": ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
    }
    model = {"model_type": model_type, "vocab_size": 256, **dict(zip(names[model_type], (16, 1, 2, 64), strict=True)),
             **({"intermediate_size": 32} if model_type == "bert" else {})}  # fmt: skip
    plan = {
        "schema_version": 1, "model": model, "workload": {"seq_len": SEQ_LEN, "global_batch_size": batch, "tokens": 10_000, "precision": "fp32"},
        "cluster": {"accelerator": "h100", "num_devices": dp}, "layout": {"micro_batch_size": micro, "dp_replicate": dp, "zero_stage": 0},
        "training": {"data": str(tmp_path), "eval_tokens": 10**6},
    }  # fmt: skip
    file = tmp_path / "plan.yaml"
    file.write_text(json.dumps(plan))
    return load_run_config(file)


def batches_of(config, rank, data):
    return open_batches(config, Ranks(config.layout, torch.device("cpu"), rank), str(data))


@pytest.mark.parametrize("position", [0, 16, 16 * 3, 16 * 10_000])
def test_every_layout_reads_the_same_samples_once(tmp_path, position):
    write_data(tmp_path / "train")
    data = TokenDataset.open(tmp_path / "train")
    expected = data.sequences(position, 16, SEQ_LEN, 0)
    assert position + 16 > data.num_sequences(SEQ_LEN) or position < 16 * 3  # an epoch ends within the third step
    for dp in (1, 2, 4):
        config = config_of(tmp_path, dp=dp)
        ranks = [batches_of(config, rank, tmp_path).microbatches(position) for rank in range(dp)]
        assert all(len(found) == config.num_microbatches == 8 // dp for found in ranks)
        in_order = [ranks[rank][j] for j in range(config.num_microbatches) for rank in range(dp)]
        tokens, targets = (torch.cat([pair[i] for pair in in_order]).numpy() for i in (0, 1))
        np.testing.assert_array_equal(tokens, expected[:, :-1])
        np.testing.assert_array_equal(targets, expected[:, 1:])


def test_masks_follow_from_the_sample_alone(tmp_path):
    write_data(tmp_path / "train")
    one = batches_of(config_of(tmp_path, model_type="bert", micro=2), 0, tmp_path).microbatches(32)
    other = batches_of(config_of(tmp_path, model_type="bert", micro=8), 0, tmp_path).microbatches(32)
    for i in (0, 1):
        assert torch.equal(torch.cat([pair[i] for pair in one]), torch.cat([pair[i] for pair in other]))
    tokens, targets = (torch.cat([pair[i] for pair in one]) for i in (0, 1))
    original = torch.from_numpy(TokenDataset.open(tmp_path / "train").sequences(32, 16, SEQ_LEN, 0)[:, :-1])
    masked = targets != IGNORED
    assert masked.sum(1).tolist() == [1] * 16
    assert (tokens[masked] == MASK_ID).all()
    assert torch.equal(targets[masked], original[masked])
    assert torch.equal(tokens[~masked], original[~masked])
    later = torch.cat([pair[1] for pair in batches_of(config_of(tmp_path, model_type="bert"), 0, tmp_path).microbatches(48)]) != IGNORED
    assert not torch.equal(later, masked)


def test_held_out_text_is_read_once_and_in_order(tmp_path):
    for part, num_tokens in (("train", 400), ("valid", 200)):
        write_data(tmp_path / part, num_tokens)
    valid = TokenDataset.open(tmp_path / "valid")
    for dp in (1, 2):
        lists = [[pairs for pairs, _ in batches_of(config_of(tmp_path, dp=dp), rank, tmp_path).validation()] for rank in range(dp)]
        tokens = torch.cat([lists[rank][i][0][0] for i in range(len(lists[0])) for rank in range(dp)]).numpy()
        count = valid.num_sequences(SEQ_LEN) // (2 * dp) * 2 * dp
        np.testing.assert_array_equal(tokens, valid.sequences(0, count, SEQ_LEN, 0, shuffle=False)[:, :-1])


def test_unusable_data_is_refused_before_the_first_step(tmp_path):
    config = config_of(tmp_path)
    with pytest.raises(InputError):
        batches_of(config, 0, tmp_path)
    write_data(tmp_path / "train", 5)
    with pytest.raises(InputError, match="seq_len"):
        batches_of(config, 0, tmp_path)
    write_data(tmp_path / "train", vocab_size=300)
    with pytest.raises(InputError, match="300 distinct tokens"):
        batches_of(config, 0, tmp_path)
    write_data(tmp_path / "train")
    write_data(tmp_path / "valid")
    (tmp_path / "valid" / "index.json").write_text("{")  # damaged held-out text is no reason to leave the evaluation out
    with pytest.raises(InputError):
        batches_of(config, 0, tmp_path)
    write_data(tmp_path / "valid", 3)
    assert list(batches_of(config, 0, tmp_path).validation()) == []
