"""Shrunk models that are saved and loaded again: by transformers alone, and by `load_checkpoint`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from helpers import assert_same, llama, texts, trainer, weights
from test_callbacks_cut import IDS, every_epoch

from lightning_accel import AccelModule, PruneConfig, Pruning, load_checkpoint, prune_model_, shrink_model


@pytest.mark.parametrize("case", ["heads of gpt2", "heads of bert", "hidden of bert"])
def test_what_no_configuration_says_is_replayed_from_the_record_beside_it(tmp_path, case):
    structure, _, kind = case.split()
    make = {"gpt2": tiny.gpt2, "bert": tiny.bert}[kind]
    model = make()
    masks = prune_model_(model, PruneConfig((structure, "neurons"), 0.5), example_inputs=IDS)
    shrunk: Any = shrink_model(model, masks, example_inputs=IDS).eval()
    shrunk.save_pretrained(tmp_path)
    again = load_checkpoint(tmp_path, make(seed=1)).eval()
    with torch.no_grad():
        assert torch.equal(again(**IDS).logits, shrunk(**IDS).logits)
    assert_same(weights(again), weights(shrunk))
    with pytest.raises(ValueError, match=r"have other sizes|there is no module"):
        load_checkpoint(tmp_path, tiny.llama() if kind == "bert" else tiny.bert())
    with pytest.raises(ValueError, match=r"have other sizes .*size mismatch for"):
        (tmp_path / "config.json").write_text("{}")
        load_checkpoint(tmp_path, make())


@pytest.mark.parametrize("structure", ["neurons", "heads", "layers", "hidden"])
def test_a_plain_checkpoint_is_loaded_into_the_model_of_before_or_of_the_saved_configuration(tmp_path, structure):
    make: Any = tiny.llama
    model = make()
    masks = prune_model_(model, PruneConfig(structure, 0.5), example_inputs=IDS, calibration=[IDS])
    shrunk: Any = shrink_model(model, masks, example_inputs=IDS).eval()
    shrunk.save_pretrained(tmp_path)
    saved = type(model)(type(model.config).from_pretrained(tmp_path))
    for again in (load_checkpoint(tmp_path, make(seed=1)), load_checkpoint(tmp_path, saved), plain(model, tmp_path)):
        assert_same(weights(again), weights(shrunk))
        with torch.no_grad():
            assert torch.equal(again.eval()(**IDS).logits, shrunk(**IDS).logits)


def plain(model: Any, folder: Path) -> Any:
    """What `from_pretrained` loads without a word of missing or other weights."""
    again, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return again


@pytest.mark.parametrize("order", [("neurons", "heads", "layers"), ("layers", "heads"), ("heads", "layers", "neurons")])
def test_what_was_cut_in_steps_is_loaded_by_either_way(tmp_path, order):
    shrunk: Any = tiny.gpt2(n_layer=4)
    for structure in order:
        config = PruneConfig(structure, 0.5)
        masks = prune_model_(shrunk, config, example_inputs=IDS, calibration=[IDS])
        shrunk = shrink_model(shrunk, masks, example_inputs=IDS).eval()
    shrunk.save_pretrained(tmp_path)
    saved = type(shrunk)(type(shrunk.config).from_pretrained(tmp_path))
    for again in (load_checkpoint(tmp_path, tiny.gpt2(seed=1, n_layer=4)), load_checkpoint(tmp_path, saved)):
        assert_same(weights(again), weights(shrunk))
        with torch.no_grad():
            assert torch.equal(again.eval()(**IDS).logits, shrunk(**IDS).logits)


@pytest.mark.parametrize("where", ["", "model", "model.model"])
def test_what_a_fit_cut_is_saved_and_loaded(tmp_path, where):
    module = AccelModule(llama())
    inputs = {"": IDS | {"labels": IDS["input_ids"]}, "model": IDS, "model.model": IDS}[where]
    pruning = Pruning(PruneConfig("neurons", 0.5), module=where, cut_first=True, example_inputs=inputs)
    trainer(tmp_path, [pruning, every_epoch(tmp_path)], max_epochs=1).fit(module, texts())
    restored = load_checkpoint(tmp_path / "epoch=0.ckpt", llama())
    for saved in (module.model, restored):
        saved.save_pretrained(tmp_path / "folder")
        again = load_checkpoint(tmp_path / "folder", llama())
        assert_same(weights(again), weights(module.model))
        if where and saved is module.model:  # what is cut above a model does not reach its configuration's own entries
            assert_same(weights(plain(saved, tmp_path / "folder")), weights(module.model))


def test_eps_of_norms_is_set_once_where_the_configuration_refuses_the_width(tmp_path):
    make: Any = tiny.llama
    model = make(rms_norm_eps=1e-3)
    masks = prune_model_(model, PruneConfig("hidden", 10 / 32), example_inputs=IDS)  # 22 is no multiple of 4 heads
    shrunk: Any = shrink_model(model, masks, example_inputs=IDS).eval()
    assert shrunk.config.hidden_size == 32 and shrunk.config.rms_norm_eps == 1e-3
    shrunk.save_pretrained(tmp_path)
    saved = type(model)(type(model.config).from_pretrained(tmp_path))
    for again in (load_checkpoint(tmp_path, make(seed=1, rms_norm_eps=1e-3)), load_checkpoint(tmp_path, saved)):
        assert again.model.norm.variance_epsilon == pytest.approx(1e-3 * 32 / 22)
        with torch.no_grad():
            assert torch.equal(again.eval()(**IDS).logits, shrunk(**IDS).logits)


@pytest.mark.parametrize("structure", ["neurons", "heads", "layers"])
def test_weights_that_are_saved_under_other_names_are_loaded(tmp_path, structure):
    model, inputs = tiny.vit(), {"pixel_values": torch.randn(2, 3, 16, 16)}
    masks = prune_model_(model, PruneConfig(structure, 0.5), example_inputs=inputs, calibration=[inputs])
    shrunk: Any = shrink_model(model, masks, example_inputs=inputs).eval()
    shrunk.save_pretrained(tmp_path)
    again = load_checkpoint(tmp_path, tiny.vit(seed=1)).eval()
    with torch.no_grad():
        assert torch.equal(tiny.logits(again(**inputs)), tiny.logits(shrunk(**inputs)))


@pytest.mark.parametrize("make", [tiny.gpt2, tiny.vit])
def test_heads_and_hidden_that_a_configuration_cannot_tell_apart_are_not_loaded_as_others(tmp_path, make):
    inputs = IDS if make is tiny.gpt2 else {"pixel_values": torch.randn(2, 3, 16, 16)}
    model = make()
    masks = prune_model_(model, PruneConfig(("heads", "hidden"), 0.5), example_inputs=inputs)
    shrunk: Any = shrink_model(model, masks, example_inputs=inputs).eval()
    shrunk.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatched"):
        type(model).from_pretrained(tmp_path)
    saved = type(model)(type(model.config).from_pretrained(tmp_path))
    for again in (load_checkpoint(tmp_path, make(seed=1)), load_checkpoint(tmp_path, saved)):
        with torch.no_grad():
            assert torch.equal(tiny.logits(again.eval()(**inputs)), tiny.logits(shrunk(**inputs)))


@pytest.mark.parametrize(("gone", "left"), [(0, 2), (1, 1)])  # every second block shifts its windows
def test_layers_that_alternate_are_counted_where_those_that_stay_are_alike(tmp_path, gone, left):
    shape: dict[str, Any] = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 4], "num_heads": [2, 4]}
    config = transformers.SwinConfig(**shape, window_size=4)
    model = transformers.SwinForImageClassification(config).eval()
    inputs, block = {"pixel_values": torch.randn(2, 3, 32, 32)}, f"swin.encoder.layers.0.blocks.{gone}."
    masks = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in model.named_parameters() if n.startswith(block)}
    shrunk: Any = shrink_model(model, masks, example_inputs=inputs).eval()
    assert len(shrunk.swin.encoder.layers[0].blocks) == 1 and shrunk.config.depths == [left, 4]
    shrunk.save_pretrained(tmp_path)
    for built in (transformers.SwinConfig(**shape, window_size=4), transformers.SwinConfig.from_pretrained(tmp_path)):
        again = load_checkpoint(tmp_path, transformers.SwinForImageClassification(built)).eval()
        with torch.no_grad():
            assert torch.equal(again(**inputs).logits, shrunk(**inputs).logits)


def test_layers_of_a_stage_are_counted_in_the_configuration(tmp_path):
    shape: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [3, 3], "layer_type": "basic"}
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**shape)).eval()
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    masks = prune_model_(model, PruneConfig("layers", 0.5), example_inputs=inputs, calibration=[inputs])
    shrunk: Any = shrink_model(model, masks, example_inputs=inputs).eval()
    assert sum(shrunk.config.depths) < 6
    shrunk.save_pretrained(tmp_path)
    again = plain(model, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, shrunk(**inputs).logits)


def test_heads_that_a_configuration_refuses_are_in_its_record(tmp_path):
    model = tiny.llama(num_key_value_heads=4)
    masks = prune_model_(model, PruneConfig("heads", 0.25), example_inputs=IDS)
    shrunk: Any = shrink_model(model, masks, example_inputs=IDS)
    assert shrunk.config.num_attention_heads == 4 and shrunk.config.pruned  # 32 is no multiple of 3
    shrunk.save_pretrained(tmp_path)
    again = load_checkpoint(tmp_path, tiny.llama(seed=1, num_key_value_heads=4))
    assert torch.equal(again(**IDS).logits, shrunk(**IDS).logits)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    cached = again.generate(IDS["input_ids"], **options)
    assert torch.equal(cached, again.generate(IDS["input_ids"], use_cache=False, **options))
