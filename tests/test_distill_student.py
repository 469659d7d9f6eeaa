"""Students cut out of their teachers, and which layer learns from which."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import tiny
import torch
from helpers import seeded
from torch import nn

from lightning_accel import layer_map, student_from

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import (
        AlbertConfig,
        AlbertModel,
        ConvNextConfig,
        ConvNextModel,
        DebertaV2Config,
        DebertaV2ForSequenceClassification,
        Dinov2Config,
        Dinov2ForImageClassification,
        DistilBertConfig,
        DistilBertForSequenceClassification,
        ElectraConfig,
        ElectraForSequenceClassification,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        MarianConfig,
        MarianMTModel,
        Phi3Config,
        Phi3ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
        SmolLM3Config,
        SmolLM3ForCausalLM,
        SwinConfig,
        SwinModel,
        T5Config,
        T5ForConditionalGeneration,
        Wav2Vec2Config,
        Wav2Vec2ForCTC,
        WhisperConfig,
        WhisperForConditionalGeneration,
    )


def whisper(encoder: int = 3, decoder: int = 4) -> Any:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=97, d_model=32, encoder_layers=encoder, decoder_layers=decoder, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=20,
        max_target_positions=30, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config).eval()


def distilbert() -> Any:
    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=97, dim=32, hidden_dim=64, n_layers=4, n_heads=4)
    return DistilBertForSequenceClassification(config).eval()


def qwen() -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


IDS = {"input_ids": tiny.ids()}
SOUND = {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": tiny.ids()}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bert": (tiny.bert, 1, IDS),
    "gpt2": (tiny.gpt2, [1], IDS),
    "llama": (tiny.llama, [1], IDS),
    "vit": (tiny.vit, 1, {"pixel_values": torch.randn(2, 3, 16, 16)}),
    "distilbert": (distilbert, 2, IDS),
    "qwen3": (qwen, 2, IDS),
    "whisper": (whisper, {"decoder": 2}, SOUND),
}


@pytest.mark.parametrize("width", [None, 0.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_is_saved_and_loaded_as_any_transformers_model(tmp_path, family, width):
    make, layers, inputs = FAMILIES[family]
    teacher = make()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = student_from(teacher, layers=layers, width=width)
    student.save_pretrained(tmp_path)
    again = type(teacher).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        logits = student(**inputs).logits
        assert logits.shape == teacher(**inputs).logits.shape and logits.isfinite().all()
        assert torch.equal(again(**inputs).logits, logits)
    assert type(student) is type(teacher) and not student.training and student.dtype == teacher.dtype
    sizes = [sum(p.numel() for p in model.parameters()) for model in (student, teacher)]
    assert sizes[0] < (0.5 if width else 0.9) * sizes[1]
    assert all(torch.equal(teacher.state_dict()[name], tensor) for name, tensor in before.items())
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.parameters()}


def test_all_layers_at_full_width_in_their_order_are_the_teacher():
    for make, layers, inputs in ((tiny.llama, [0, 1], IDS), (whisper, {"decoder": [0, 1, 2, 3]}, SOUND)):
        teacher = make()
        student = student_from(teacher, layers=layers)
        with torch.no_grad():
            assert torch.equal(student(**inputs).logits, teacher(**inputs).logits)


def test_layers_are_as_far_apart_as_they_can_be_or_those_that_are_named():
    teacher = whisper(encoder=6, decoder=6)
    for chosen, kept in ((1, [0]), (2, [0, 5]), (3, [0, 2, 5]), ([4, 1], [4, 1])):
        student = student_from(teacher, layers={"decoder": chosen})
        own, theirs = student.model.decoder.layers, teacher.model.decoder.layers
        assert len(own) == len(kept) == student.config.decoder_layers and student.config.encoder_layers == 6
        assert all(torch.equal(a.fc1.weight, theirs[i].fc1.weight) for a, i in zip(own, kept, strict=True))
    both = student_from(teacher, layers={"encoder": 2, "decoder": [5]})
    assert torch.equal(both.model.encoder.layers[1].fc2.weight, teacher.model.encoder.layers[5].fc2.weight)
    assert (both.config.encoder_layers, both.config.num_hidden_layers, both.config.decoder_layers) == (2, 2, 1)


def test_widths_are_cut_in_step_and_heads_stay_whole():
    teacher = tiny.llama()
    student = student_from(teacher, width=0.5)
    config = student.config
    assert (config.hidden_size, config.intermediate_size) == (16, 24)
    assert (config.num_attention_heads, config.num_key_value_heads, student.model.layers[0].self_attn.head_dim) == (
        2, 1, 8,
    )  # fmt: skip
    own, theirs = student.model.layers[1], teacher.model.layers[1]
    assert torch.equal(own.self_attn.k_proj.weight, theirs.self_attn.k_proj.weight[:8, :16])
    assert torch.equal(own.mlp.down_proj.weight, theirs.mlp.down_proj.weight[:16, :24])
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_query_key_and_value_side_by_side_are_cut_each_on_its_own():
    teacher = tiny.gpt2()
    student = student_from(teacher, width=0.5)
    own, theirs = student.transformer.h[0].attn.c_attn, teacher.transformer.h[0].attn.c_attn
    for i in range(3):
        assert torch.equal(own.weight[:, 16 * i : 16 * (i + 1)], theirs.weight[:16, 32 * i : 32 * i + 16])
        assert torch.equal(own.bias[16 * i : 16 * (i + 1)], theirs.bias[32 * i : 32 * i + 16])


def test_a_part_that_the_teacher_was_built_without_is_not_in_the_student():
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    teacher = BertModel(config, add_pooling_layer=False)
    student = student_from(teacher, layers=1)
    assert student.pooler is None and student.config.num_hidden_layers == 1
    assert student(torch.ones(1, 3, dtype=torch.long)).last_hidden_state.shape == (1, 3, 16)


def test_the_dtype_the_mode_and_how_it_generates_are_the_teachers():
    teacher = tiny.llama().bfloat16().train()
    teacher.generation_config.max_new_tokens = 7
    state = torch.get_rng_state()
    student = student_from(teacher, layers=1)
    assert student.dtype == torch.bfloat16 and student.training and student.generation_config.max_new_tokens == 7
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (tiny.mlp, {"layers": 1}, "a Sequential has no config to make smaller; student_from takes transformers models"),
        (tiny.bert, {}, "the student would be the teacher; write student_from"),
        (tiny.bert, {"layers": 3}, "the teacher has 2 layers, 3 are asked for; write 1 to 2"),
        (tiny.bert, {"layers": [0, 2]}, r"must be different indices of 2 layers, 0 to 1"),
        (tiny.bert, {"layers": {"decoder": 1}}, r"does not fit a BertConfig; write layers=3"),
        (whisper, {"layers": 2}, r"does not fit a WhisperConfig; write layers=\{'decoder': 2\}"),
        (whisper, {"layers": {"middle": 2}}, r"layers has \['middle'\]"),
        (tiny.bert, {"width": 1.5}, r"outside \(0, 1\]; write width=0\.5"),
        (tiny.bert, {"width": 0.3}, r"width=0\.3 makes hidden_size=32 to 9\.6, and a size is whole"),
    ],
)
def test_what_cannot_be_cut_says_why(make, options, message):
    with pytest.raises(ValueError, match=message):
        student_from(make(), **options)


def test_an_architecture_whose_widths_are_not_known_keeps_them():
    config = T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, decoder_start_token_id=0)
    teacher = T5ForConditionalGeneration(config)
    with pytest.raises(ValueError, match="the widths of a T5Config are not known; give layers= alone"):
        student_from(teacher, width=0.5)
    student = student_from(teacher, layers={"decoder": [0, 2]})
    assert torch.equal(
        student.decoder.block[1].layer[2].DenseReluDense.wo.weight,
        teacher.decoder.block[2].layer[2].DenseReluDense.wo.weight,
    )


def test_what_a_configuration_says_of_each_layer_follows_the_layers():
    config = SmolLM3Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, no_rope_layer_interval=4, max_position_embeddings=64,
    )  # fmt: skip
    teacher = seeded(SmolLM3ForCausalLM, config)
    student = student_from(teacher, layers=[0, 3, 7])
    assert student.config.no_rope_layers == [config.no_rope_layers[i] for i in (0, 3, 7)] == [1, 0, 0]
    assert [layer.self_attn.use_rope for layer in student.model.layers] == [1, 0, 0]


def test_matrices_that_lie_together_in_an_unknown_order_keep_their_width():
    config = Phi3Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, pad_token_id=0,
    )  # fmt: skip
    teacher = seeded(Phi3ForCausalLM, config)
    with pytest.raises(ValueError, match=r"qkv_proj\.weight holds several matrices.*give layers= alone"):
        student_from(teacher, width=0.5)
    student = student_from(teacher, layers=[1])
    ours, theirs = student.model.layers[0].self_attn, teacher.model.layers[1].self_attn
    assert torch.equal(ours.qkv_proj.weight, theirs.qkv_proj.weight)


def test_rotary_frequencies_stay_in_float32_beside_weights_in_bfloat16(tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    teacher = type(tiny.llama()).from_pretrained(tmp_path, dtype=torch.bfloat16)
    student = student_from(teacher, layers=[0, 1])
    assert student.dtype == torch.bfloat16 and student.model.rotary_emb.inv_freq.dtype == torch.float32
    ids = tiny.ids(2, 12)
    with torch.no_grad():
        assert torch.equal(student.eval()(ids).logits, teacher.eval()(ids).logits)


def test_keys_and_values_of_gpt2s_cross_attention_are_cut_each_on_its_own():
    config = GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=6, n_positions=32, add_cross_attention=True)
    teacher = seeded(GPT2LMHeadModel, config)
    student = student_from(teacher, width=0.5)
    ours, theirs = (model.transformer.h[0].crossattention.c_attn.weight for model in (student, teacher))
    assert torch.equal(ours, torch.cat((theirs[:12, :12], theirs[:12, 24:36]), 1))


def test_one_head_of_keys_stays_and_so_do_lists_that_are_not_of_layers():
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=1, eos_token_id=[7, 8, 9], pad_token_id=0,
    )  # fmt: skip
    student = student_from(seeded(LlamaForCausalLM, config), layers=2, width=0.5)
    assert (student.config.num_attention_heads, student.config.num_key_value_heads) == (2, 1)
    assert student.config.eos_token_id == [7, 8, 9]
    assert student(tiny.ids(1, 4) % 50).logits.shape == (1, 4, 50)


def test_students_that_would_lose_a_part_or_not_run_are_refused_or_right(tmp_path):
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4}  # fmt: skip
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
    deberta = seeded(DebertaV2ForSequenceClassification, DebertaV2Config(**sizes, **relative))
    assert student_from(deberta, width=0.5)(tiny.ids(1, 4) % 50).logits.shape == (1, 2)
    electra = seeded(ElectraForSequenceClassification, ElectraConfig(**sizes, embedding_size=16))
    with pytest.raises(ValueError, match=r"the teacher's electra\.embeddings_project.* has no place in the student"):
        student_from(electra, width=0.5)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=32, patch_size=8)
    student = student_from(seeded(Dinov2ForImageClassification, config), layers=2)
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path)
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(again.eval()(images).logits, student.eval()(images).logits)


def test_lists_that_are_not_of_layers_stay_whole():
    config = Wav2Vec2Config(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
        conv_dim=(8,) * 7, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    teacher = seeded(Wav2Vec2ForCTC, config).eval()
    student = student_from(teacher, layers=[0, 3])
    mine, theirs = student.state_dict(), teacher.state_dict()
    name = "wav2vec2.encoder.layers.{}.feed_forward.output_dense.weight"
    assert torch.equal(mine[name.format(1)], theirs[name.format(3)])
    assert all(torch.equal(mine[n], theirs[n]) for n in mine if "conv_layers" in n)
    assert student(torch.randn(1, 800)).logits.shape == teacher(torch.randn(1, 800)).logits.shape


def test_layers_in_stages_and_layers_that_know_their_index_are_refused():
    swin = seeded(SwinModel, SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2],
                                        window_size=4))  # fmt: skip
    with pytest.raises(ValueError, match="layers of a SwinModel are not one list"):
        student_from(swin, layers=1)
    convnext = seeded(ConvNextModel, ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], image_size=32))
    for layers in (1, 2):
        with pytest.raises(ValueError, match="are not one list"):
            student_from(convnext, layers=layers)
    scaled = GPT2Config(vocab_size=20, n_embd=16, n_layer=3, n_head=2, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ValueError, match=r"keep the first layers: layers=\[0, 1\]"):
        student_from(seeded(GPT2LMHeadModel, scaled), layers=2)
    assert student_from(seeded(GPT2LMHeadModel, scaled), layers=[0, 1]).config.n_layer == 2
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    albert = AlbertConfig(**sizes, embedding_size=8, num_hidden_layers=4)
    assert student_from(seeded(AlbertModel, albert), layers=2).config.num_hidden_layers == 2
    groups = AlbertConfig(**sizes, embedding_size=8, num_hidden_layers=4, num_hidden_groups=2)
    with pytest.raises(ValueError, match="are not one list"):
        student_from(seeded(AlbertModel, groups), layers=3)


def test_tables_of_positions_that_are_not_saved_are_those_of_the_students_width(tmp_path):
    sizes = {"vocab_size": 20, "decoder_vocab_size": 20, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
             "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
             "pad_token_id": 0, "decoder_start_token_id": 0, "max_position_embeddings": 16}  # fmt: skip
    student = student_from(seeded(MarianMTModel, MarianConfig(**sizes)).eval(), width=0.5)
    student.save_pretrained(tmp_path)
    again, ids = MarianMTModel.from_pretrained(tmp_path).eval(), tiny.ids(1, 6) % 20
    assert torch.equal(again(ids, decoder_input_ids=ids).logits, student(ids, decoder_input_ids=ids).logits)


def test_t5_without_its_first_layer_keeps_the_bias_that_lies_in_it():
    config = T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, decoder_start_token_id=0)
    teacher = seeded(T5ForConditionalGeneration, config)
    student = student_from(teacher, layers={"decoder": [1, 2]})
    ours, theirs = (m.decoder.block[0].layer[0].SelfAttention for m in (student, teacher))
    assert torch.equal(ours.relative_attention_bias.weight, theirs.relative_attention_bias.weight)
    assert torch.equal(ours.q.weight, teacher.decoder.block[1].layer[0].SelfAttention.q.weight)


# --- layer maps -------------------------------------------------------------------------------------------------------


def encoder(layers: int) -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), layers)


def test_layers_are_spread_or_are_the_last_ones():
    def found(n: int, total: int, how: str) -> list[int]:
        pairs = layer_map(encoder(n), encoder(total), how)
        assert list(pairs) == [f"layers.{i}" for i in range(n)]
        return [int(name.rpartition(".")[2]) for name in pairs.values()]

    assert found(3, 6, "uniform") == [1, 3, 5] and found(3, 6, "last") == [3, 4, 5]
    assert found(4, 6, "uniform") == [1, 2, 4, 5] and found(6, 6, "uniform") == list(range(6))
    assert found(1, 12, "uniform") == [11]


def test_each_side_of_an_encoder_decoder_is_mapped_on_its_own():
    pairs = layer_map(whisper(2, 1), whisper(4, 3), "uniform")
    assert pairs == {
        "model.encoder.layers.0": "model.encoder.layers.1",
        "model.encoder.layers.1": "model.encoder.layers.3",
        "model.decoder.layers.0": "model.decoder.layers.2",
    }


def test_models_of_other_families_are_mapped_onto_each_other():
    assert layer_map(tiny.gpt2(), tiny.llama(), "last") == {
        "transformer.h.0": "model.layers.0",
        "transformer.h.1": "model.layers.1",
    }


def test_maps_that_do_not_exist_say_what_there_is():
    with pytest.raises(ValueError, match=r"0 in the Sequential and 1 in the TransformerEncoder; name the layers"):
        layer_map(tiny.mlp(), encoder(2), "uniform")
    with pytest.raises(ValueError, match=r"the student has 3 layers \(layers\.0, \.\.\.\), the teacher 2"):
        layer_map(encoder(3), encoder(2), "last")
    with pytest.raises(ValueError, match=r"the teacher, a TransformerEncoder, has no module 'layers\.7'.*layers\.0"):
        layer_map(encoder(1), encoder(2), {"layers.0": "layers.7"})
    with pytest.raises(ValueError, match=r"the student, a TransformerEncoder, has no module 'layer\.0'"):
        layer_map(encoder(1), encoder(2), {"layer.0": "layers.1"})
